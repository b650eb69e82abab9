"""The command that caches the gradients of training data."""

from functools import partial
from pathlib import Path
from typing import Annotated

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.printing import print_members
from rapidindex.config import (
    RECIPES,
    BuildConfig,
    BuildRequest,
    EncoderConfig,
    GradientConfig,
    ModelConfig,
    SketchConfig,
    TokenConfig,
    levels_of,
)
from rapidindex.errors import UsageError
from rapidindex.views.tables import build_tables, estimate_tables


@command(
    "Make",
    "rapidindex build train.jsonl -m MODEL -a adapter -o index",
    "rapidindex build train.jsonl -m MODEL -a adapter -o index --dry-run",
    'rapidindex build "part-*.jsonl" -m MODEL -o index --level both --tokens content --workers 4',
)
def build(
    data: opt.DataPath,
    output: Annotated[Path, opt.in_output("--output", "-o", **opt.PATH, help="The index folder.", show_default=False)],
    model: Annotated[
        list[str] | None,
        opt.in_model(
            "--model",
            "-m",
            **opt.PLACE,
            help="Model folder, hub name or GGUF file; repeated: several checkpoints, the finished one first.",
            show_default=False,
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        opt.in_model(
            **opt.PLACE, help="In the place of a model: rows are embeddings by what distill wrote.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        opt.in_model(
            "--adapter",
            "-a",
            **opt.PLACE,
            help="PEFT adapter folder; repeated: several checkpoints; none: all parameters.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str,
        opt.in_gradient(
            **opt.values(*RECIPES),
            help="default, rapidin, trackstar or tracin: sets what else is not given of -K, --projection, --normalize "
            "and --second-moment.",
        ),
    ] = BuildRequest.recipe,
    K: Annotated[
        int | None, opt.in_gradient("-K", help="Length of a RapidGrad, a power of two.", show_default="65536")
    ] = None,
    projection: Annotated[
        str | None,
        opt.in_gradient(
            **opt.values("rapidgrad", "two-sided"),
            help="rapidgrad, or two-sided: each weight's gradient from both sides (TrackStar), without a number "
            "for each parameter.",
            show_default="that of --recipe",
        ),
    ] = None,
    shuffles: Annotated[int, opt.in_gradient(help="Row and column shuffles (the paper's λ).")] = SketchConfig.shuffles,
    quantize: opt.Quantize = None,
    template: opt.TrainedTemplate = None,
    max_length: opt.TrainedLength = None,
    loss: opt.TrainedLoss = None,
    overlap: opt.Overlap = None,
    normalize: Annotated[
        str | None,
        opt.in_gradient(
            **opt.values("unit", "layer", "none"),
            help="unit, layer (the paper's) or none (TracIn).",
            show_default="that of --recipe",
        ),
    ] = None,
    second_moment: Annotated[
        str | None,
        opt.in_gradient(
            show_default="that of --recipe",
            **opt.PLACE,
            help="Divide gradients by its root: kronecker (along each layer's leading eigenvectors); kfac "
            "(rows and columns apart); estimate (entry by entry); factored (row and column means); none; or a training "
            "checkpoint's path.",
        ),
    ] = None,
    moment_examples: Annotated[
        int | None,
        opt.in_gradient(
            show_default="32 for kronecker and kfac, else 64", help="Examples whose gradients --second-moment takes."
        ),
    ] = None,
    level: Annotated[
        str,
        opt.in_token_rows(
            **opt.values("sentence", "token", "both"),
            help="Rows for whole examples (sentence), for tokens (token), or both.",
        ),
    ] = "sentence",
    tokens: Annotated[
        str,
        opt.in_token_rows(
            **opt.values("all", "content"),
            help="all, content (no punctuation, no stop words), the first N, or content,N.",
        ),
    ] = TokenConfig.tokens,
    token_K: Annotated[int, opt.in_token_rows("--token-K", help="Length of a token's RapidGrad.")] = TokenConfig.K,
    token_examples: Annotated[
        list[str] | None,
        opt.in_token_rows(
            **opt.PLACE, help="Tokens of this id alone, or of a file with an id a line; may be repeated."
        ),
    ] = None,
    seed: Annotated[
        int, opt.in_gradient(help="Draws shuffles, signs and the estimate's examples.")
    ] = SketchConfig.seed,
    dtype: opt.Dtype = ModelConfig.dtype,
    device: opt.Device = ModelConfig.device,
    batch_tokens: opt.BatchTokens = BuildConfig.batch_tokens,
    workers: opt.Workers = BuildConfig.workers,
    shard_seconds: opt.ShardSeconds = BuildConfig.shard_seconds,
    shard: opt.Shard = None,
    ray: opt.Ray = None,
    limit: opt.Limit = None,
    dry_run: Annotated[
        bool, opt.in_output("--dry-run", help="Say what it will take, in time, disk and memory; write nothing.")
    ] = False,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Cache the gradient of every training example, and index them. Given again, it goes on where it stopped."""
    from rapidindex.data.examples import listed_ids
    from rapidindex.model.files import encoding_of

    models = checkpoints_of(model, adapter, quantize, dtype, device)
    if (not models) == (encoder is None):
        raise UsageError("Give either -m MODEL or --encoder ENCODER.", hint="rapidindex build DATA -m MODEL -o INDEX")
    levels, token = levels_of(level), TokenConfig(token_K, tokens)
    if "token" not in levels and (token != TokenConfig() or token_examples):
        raise UsageError(
            "--tokens, --token-K and --token-examples are about tokens.", hint="Add --level token, or both."
        )
    request = BuildRequest(
        data=str(data),
        output=str(output),
        recipe=recipe,
        model=EncoderConfig(encoder, device) if encoder else models[0],
        encoding=encoding_of(
            ((adapter or model or [""])[0]), template=template, max_length=max_length, loss=loss, overlap=overlap
        ),
        gradient=GradientConfig(normalize, second_moment, moment_examples, seed),
        sketch=SketchConfig(K, shuffles, seed, projection),
        work=BuildConfig(batch_tokens, workers, shard_seconds, part=_part(shard), ray=ray),
        limit=limit,
        levels=levels,
        token=token,
        token_examples=None if token_examples is None else frozenset(listed_ids(token_examples, "--token-examples")),
    )

    from rapidindex.caching.build import build as run  # takes seconds: wrong options are refused before
    from rapidindex.progress import Bars

    requests, several = {"": request}, None
    if len(models) > 1:
        from rapidindex.caching.checkpoints import plan_checkpoints

        several, requests = plan_checkpoints(request, models, overwrite=overwrite)
    if dry_run:
        from rapidindex.caching.estimate import estimate as run
    elif several:
        several.create()
    with Bars(quiet=quiet) as bars:
        each = {name: run(own, overwrite=overwrite, progress=bars) for name, own in requests.items()}
    print_members(each, as_json, estimate_tables if dry_run else partial(build_tables, asked=str(output)))


def checkpoints_of(
    models: list[str] | None, adapters: list[str] | None, quantize: str | None, dtype: str, device: str
) -> list[ModelConfig]:
    """Return the checkpoints that are typed: the adapters of one model, or models."""
    if len(models or ()) > 1 and adapters:
        raise UsageError("Several models and an adapter: which belong together?", hint="Give one -m and several -a.")
    pairs = [(model, adapter) for model in models or () for adapter in adapters or [None]]
    return [ModelConfig(model, adapter, quantize, dtype, device) for model, adapter in pairs]


def _part(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise UsageError(f"--shard {shard} is no part of a whole.", hint="Give 1/3, 2/3 and 3/3 to three jobs.")
    return int(part), int(parts)

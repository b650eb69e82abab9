"""The commands that train: a model on the data, and an encoder on an index of its gradients."""

from pathlib import Path
from typing import Annotated

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.printing import print_plain
from rapidindex.config import DistillConfig, EncoderConfig, EncodingConfig, FinetuneConfig, ModelConfig
from rapidindex.errors import UsageError
from rapidindex.views.tables import distill_tables, finetune_tables


@command(
    "Make",
    "rapidindex finetune train.jsonl -m MODEL -o adapter",
    "rapidindex finetune train.jsonl -m MODEL --method qlora --epochs 1 -o adapter",
    "rapidindex finetune chats.jsonl -m MODEL --template chat --loss last -o adapter",
)
def finetune(
    data: opt.DataPath,
    model: opt.Model,
    output: Annotated[
        Path,
        opt.in_output("--output", "-o", **opt.PATH, help="Folder for the adapter, or the model.", show_default=False),
    ],
    method: Annotated[
        str, opt.in_training(**opt.values("lora", "qlora", "full"), help="lora, qlora (4-bit base) or full.")
    ] = FinetuneConfig.method,
    rank: Annotated[int, opt.in_training(help="Rank of the LoRA matrices.")] = FinetuneConfig.rank,
    alpha: Annotated[
        int | None, opt.in_training(help="LoRA's alpha: its update is scaled by alpha / rank.", show_default="2 · rank")
    ] = None,
    dropout: Annotated[float, opt.in_training(help="LoRA dropout.")] = FinetuneConfig.dropout,
    target_modules: Annotated[
        str | None,
        opt.in_training(help="Linear modules to adapt, separated by commas.", show_default="attention projections"),
    ] = None,
    epochs: Annotated[int, opt.in_training(help="Passes over the data.")] = FinetuneConfig.epochs,
    learning_rate: Annotated[
        float | None, opt.in_training(help="Peak of the learning rate.", show_default="5e-4; full: 5e-5")
    ] = None,
    batch_size: Annotated[int, opt.in_training(help="Examples in a batch.")] = FinetuneConfig.batch_size,
    accumulation: Annotated[int, opt.in_training(help="Batches in a step.")] = FinetuneConfig.accumulation,
    quantize: opt.Quantize = None,
    template: opt.TemplateName = EncodingConfig.template,
    max_length: opt.MaxLength = EncodingConfig.max_length,
    loss: opt.Loss = EncodingConfig.loss,
    overlap: opt.Overlap = None,
    seed: Annotated[
        int, opt.in_training(help="Seed of the adapter's start and of the order of the examples.")
    ] = FinetuneConfig.seed,
    early: Annotated[
        float | None,
        opt.in_output(
            help="Also save the model after this share of the steps, to OUTPUT/early.",
            show_default="0.1; full: 0",
        ),
    ] = None,
    save_optimizer: Annotated[
        bool, opt.in_output("--save-optimizer", help="Save Adam's state, for build --second-moment.")
    ] = False,
    dtype: opt.Dtype = ModelConfig.dtype,
    device: opt.Device = ModelConfig.device,
    limit: opt.Limit = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fine-tune a model on the data: LoRA, QLoRA or all parameters. The same command goes on after an interruption."""
    options = FinetuneConfig(
        method=method,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        early=early,
        save_optimizer=save_optimizer,
    )
    encoding, base = (
        EncodingConfig(template, max_length, loss, overlap=overlap),
        ModelConfig(model, None, quantize, dtype, device),
    )

    from rapidindex.data.examples import read_examples
    from rapidindex.model.finetune import finetune as run  # takes seconds: wrong options are refused before
    from rapidindex.progress import Bars

    dataset = read_examples(data, limit=limit, loss=loss)
    with Bars(quiet=quiet) as bars:
        summary = run(dataset, encoding, base, options, output, overwrite=overwrite, progress=bars)
    print_plain(summary, as_json, finetune_tables(summary, len(dataset.skipped), dataset.path, base, encoding, limit))


@command(
    "Make",
    "rapidindex distill index -o encoder",
    "rapidindex distill index --queries questions.jsonl --anchors 500 -o encoder",
    "rapidindex distill index --method train --epochs 3 -o encoder",
)
def distill(
    path: opt.IndexPath,
    output: Annotated[
        Path, opt.in_output("--output", "-o", **opt.PATH, help="Folder for the encoder.", show_default=False)
    ],
    encoder: Annotated[
        str,
        opt.in_model(**opt.PLACE, help="What reads texts: a model of sentence-transformers, by folder or hub name."),
    ] = EncoderConfig.model,
    anchors: Annotated[
        int | None,
        opt.in_data(
            help="Examples that all others are compared with, at most; 0: questions alone."
            " [default: 2000, to train 1000]"
        ),
    ] = None,
    pool: Annotated[int, opt.in_data(help="Examples to learn from, at most.")] = DistillConfig.pool,
    queries: Annotated[
        Path | None,
        opt.in_data(
            **opt.PATH, help="JSONL of questions, as query takes it: further anchors, each of which costs a gradient."
        ),
    ] = None,
    method: Annotated[
        str,
        opt.in_training(
            help="head: a regression on what the encoder reads, in seconds; train: Influcoder's training of all of it."
        ),
    ] = DistillConfig.method,
    epochs: Annotated[
        int | None, opt.in_training(help="With train: times that each anchor is trained on. [default: 10]")
    ] = None,
    alpha: Annotated[
        float | None, opt.in_training(help="With train: share of 1 - Pearson in the loss; the rest is KL. [default: 1]")
    ] = None,
    hard: Annotated[
        float | None,
        opt.in_training(help="With train: share of candidates among the best for an anchor. [default: 0.25]"),
    ] = None,
    learning_rate: Annotated[
        float | None, opt.in_training(help="With train: peak of the learning rate. [default: 5e-5]")
    ] = None,
    held_out: Annotated[
        float, opt.in_data(help="Share of the examples that the figures are measured on.")
    ] = DistillConfig.held_out,
    seed: Annotated[int, opt.in_training(help="Draws the split and the blocks.")] = DistillConfig.seed,
    model: opt.MovedModel = None,
    adapter: opt.MovedAdapter = None,
    device: opt.Device = ModelConfig.device,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Teach an encoder to rank texts as the index's gradients do. No gradient is computed again."""
    trained = {"epochs": epochs, "alpha": alpha, "hard": hard, "learning_rate": learning_rate}
    trained = {name: value for name, value in trained.items() if value is not None}
    options = DistillConfig(method, anchors, pool, held_out=held_out, seed=seed, **trained)
    if trained and method == "head":
        flags = ", ".join("--" + name.replace("_", "-") for name in trained)
        raise UsageError(f"{flags}: a head is not trained.", hint="Give --method train, or leave it out.")

    from rapidindex.progress import Bars
    from rapidindex.query.anchors import distill as run  # takes seconds: wrong options are refused before

    moved = {"model": model, "adapter": adapter, "device": device}
    with Bars(quiet=quiet) as bars:
        summary = run(path, output, options, encoder, queries, **moved, overwrite=overwrite, progress=bars)
    print_plain(summary, as_json, distill_tables(summary))

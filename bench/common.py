"""The options and the clock of every bench, and the JSON: figures with what it takes to measure them again.

Imported in the peers' environment too, so it imports neither rapidindex nor what that needs until it is called.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("rapidindex", "torch", "transformers", "peft", "bitsandbytes", "faiss-cpu", "numpy", "h5py")


def parser(doc: str, *, data: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the options that all benches share; `data` adds a training file."""
    shared = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_argument("--work", type=Path, required=True, help="a folder for models, indexes and what is kept")
    shared.add_argument(
        "--results", type=Path, help="where the JSON goes; by default bench/results, with --smoke WORK/results"
    )
    shared.add_argument("--smoke", action="store_true", help="the smallest size, to see that it runs")
    if data:
        shared.add_argument("--data", required=True, help="a training file; the figures take alpaca_9k.jsonl")
    return shared


def results_folder(options: argparse.Namespace) -> Path:
    """Make and return the folder where the JSON goes."""
    folder = options.results or (options.work / "results" if options.smoke else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(name: str, figures: Any, options: argparse.Namespace) -> Path:
    """Write `figures` and their circumstances to NAME.json in the results' folder; return the path."""
    path = results_folder(options) / f"{name}.json"
    write_text(path, json.dumps({**circumstances(), "figures": figures}, indent=1) + "\n")
    return path


def circumstances() -> dict[str, Any]:
    """Return the command, the commit, the time, the versions and the machine."""
    return {
        "command": " ".join(["python", "-m", _module(Path(sys.argv[0])), *map(_portable, sys.argv[1:])]),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "memory_gib": round(_memory() / 2**30, 1), "gpu": _gpu()},
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that `work` takes, and what it returns."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes when no garbage is left to collect; a GPU has finished by then."""
    import torch

    def whole() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    gc.collect()
    return timed(whole)[0]


def pin(threads: int) -> int:
    """Let torch and FAISS use `threads` threads; return their number."""
    import torch

    from rapidindex.search.faiss_index import load_faiss

    torch.set_num_threads(threads)
    load_faiss().omp_set_num_threads(threads)
    return threads


def _module(started: Path) -> str:
    """Return the name that `python -m` was given, from the file that it ran; of a file elsewhere, the file's name."""
    root = Path(__file__).parents[1]
    if not started.absolute().is_relative_to(root):
        return started.name
    return ".".join(started.absolute().with_suffix("").relative_to(root).parts).removesuffix(".__main__")


def _portable(argument: str) -> str:
    """Return an argument without the folders of this machine."""
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

"""The peers' own environment, and their scripts run in it.

python -m bench.peers.environment FOLDER        makes FOLDER/peers-venv (1.6 GB, some minutes)
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNS = {
    "bergson": ["bench.peers.bergson_build"],
    "dattri-llm, LoGRA": ["bench.peers.dattri_store", "--style", "logra"],
    "dattri-llm, whole": ["bench.peers.dattri_store", "--style", "whole"],
    "kronfluence, self": ["bench.peers.kronfluence_scores", "--what", "self"],
    "kronfluence, EK-FAC": ["bench.peers.kronfluence_scores", "--what", "factors"],
}


def install(work: Path) -> Path:
    """Make the environment in the work folder where it is missing; return its Python."""
    folder = work / "peers-venv"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", HERE / "requirements.txt"], check=True)
    subprocess.run([*pip, "--no-deps", "-r", HERE / "peers.txt"], check=True)
    (folder / "complete").touch()
    return python


def run(name: str, work: Path, *, threads: int, repeats: int, every: int, full: bool) -> dict[str, Any]:
    """Return the figures of one peer, times and memory from a process each; `error` is a failed one's last line."""
    python = install(work)
    common = ["--work", work, "--threads", threads, *(["--full"] if full else [])]
    figures = _script(python, name, work, [*common, "--repeats", repeats, "--every", every])
    if "error" not in figures:
        memory = _script(python, name, work, [*common, "--memory"])
        figures |= {key: memory[key] for key in ("peak_bytes", "error") if key in memory}
    return figures


def _script(python: Path, name: str, work: Path, options: list) -> dict[str, Any]:
    result, log = work / "peer.json", work / f"peer-{name.replace(', ', '-')}.log"
    result.unlink(missing_ok=True)
    threads = str(options[options.index("--threads") + 1])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [python, "-m", *RUNS[name], *options, "--json", result]
    with log.open("w") as file:
        done = subprocess.run(
            [str(part) for part in command], cwd=HERE.parents[1], env=environment, stdout=file, stderr=file
        )
    if done.returncode or not result.exists():
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return {"name": name, "error": f"exit status {done.returncode}: {lines[-1] if lines else ''}"}
    return json.loads(result.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="FOLDER")
    print(install(parser.parse_args().work))

"""Real processes of the command line without the seconds that importing torch takes: forks of one that has done so.

A fork has streams, a session and limits of its own, and runs `rapidindex.cli.main` as `python -m rapidindex` does.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SERVER = """
import json, os, resource, sys
os.environ["OMP_NUM_THREADS"] = "1"
import torch
import transformers, peft
import rapidindex.cli, rapidindex.caching.estimate, rapidindex.caching.update, rapidindex.query.index
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    os.setsid()
    for number, name in ((1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if asked["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_size"],) * 2)
    sys.argv = ["rapidindex", *asked["arguments"]]
    try:
        rapidindex.cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush(); sys.stderr.flush()
    import multiprocessing.util
    multiprocessing.util._exit_function()
    os._exit(code)
"""


@dataclass
class Running:
    """A process of the command line."""

    zygote: "Zygote"
    pid: int
    folder: Path
    code: int | None = None

    def wait(self) -> "Running":
        """Wait until it has ended; `code` is then its exit code, or the signal's number less than 0."""
        if self.code is None:
            self.code = int(self.zygote.ask({"wait": self.pid}))
        return self

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def signal(self, number: int, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def children(self) -> list[int]:
        """Its worker processes."""
        with contextlib.suppress(OSError):
            pids = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            return [int(pid) for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return []


class Zygote:
    """Starts processes of the command line at once."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0
        command = [sys.executable, "-W", "ignore", "-c", _SERVER]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout.readline() == "ready\n"

    def ask(self, value: dict) -> str:
        self.server.stdin.write(json.dumps(value) + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline()

    def start(self, *arguments: object, file_size: int | None = None) -> Running:
        """Start `rapidindex ARGUMENTS`; with `file_size`, no file that it writes may be larger."""
        self.count += 1
        folder = Path(self.folder.name) / str(self.count)
        folder.mkdir()
        asked = {"arguments": list(map(str, arguments)), "file_size": file_size}
        pid = int(self.ask({**asked, "out": str(folder / "out"), "err": str(folder / "err")}))
        return Running(self, pid, folder)

    def run(self, *arguments: object, file_size: int | None = None) -> Running:
        """As `start`, and wait until it has ended."""
        return self.start(*arguments, file_size=file_size).wait()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.send_signal(signal.SIGTERM)
        self.server.wait()
        self.server.stdout.close()
        self.folder.cleanup()

"""A small index and two ways to type a command about it."""

import json
import signal
import subprocess
import sys

import pytest

from rapidindex import cli
from tests.tiny import WORDS

PROMPT, ANSWER = "Tell me about tea", "tea is from Japan"


def rapidindex(*arguments, **options):
    command = [sys.executable, "-m", "rapidindex", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def typed(capsys, monkeypatch):
    """The command line in this process, which has torch imported already: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rapidindex", *map(str, arguments)])
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def index(data, tmp_path_factory, llama_folders):
    path = tmp_path_factory.mktemp("index") / "index"
    base, adapter = llama_folders
    done = rapidindex("build", data, "-m", base, "-a", adapter, "-o", path, "-K", 1024, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == len(WORDS)
    return path

"""The colours for a terminal's background, asked of a real pseudo-terminal."""

import os
import select
import subprocess
import sys

import pytest

from rapidindex.cli.background import is_dark, theme
from rapidindex.errors import UsageError
from rapidindex.views import heatmap

pty = pytest.importorskip("pty")
ASK = b"\x1b]11;?\x1b\\\x1b[c"
DEVICE = b"\x1b[?62;22c"
CHILD = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from rapidindex.cli.background import is_dark
before = termios.tcgetattr(0)
print(is_dark(), termios.tcgetattr(0) == before, flush=True)
print("typed", repr(sys.stdin.readline()))
"""


def asked(answer: bytes, *, typed: bytes = b"", **environment: str) -> bytes:
    """What a process writes on a terminal that answers so, and that someone then types a line on."""
    terminal, side = pty.openpty()
    os.write(terminal, typed)
    kept = {name: value for name, value in os.environ.items() if name not in ("COLORFGBG", "NO_COLOR")}
    kept |= {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-c", CHILD]
    child = subprocess.Popen(command, stdin=side, stdout=side, env=kept, start_new_session=True)
    os.close(side)
    shown, answered, ended = b"", False, False
    while select.select([terminal], [], [], 60)[0]:
        try:
            more = os.read(terminal, 1024)
        except OSError:  # the process has ended
            break
        shown += more
        if ASK in shown and not answered:
            os.write(terminal, answer)
            answered = True
        if (b"True\r\n" in shown or b"False\r\n" in shown) and not ended:
            os.write(terminal, b"!\n")
            ended = True
    os.close(terminal)
    assert child.wait(60) == 0
    return shown


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"\x1b]11;rgb:1e1e/1e1e/2e2e\x1b\\" + DEVICE, b"True"),
        (b"\x1b]11;rgb:ff/fd/e0\x07" + DEVICE, b"False"),
        (DEVICE, b"None"),
        (b"", b"None"),
    ],
    ids=["dark", "light", "another answer alone", "no answer"],
)
def test_a_terminal_is_asked_and_left_as_it_was(answer, found):
    shown = asked(answer)
    assert shown.startswith(ASK + found + b" True\r\n") and b"typed '!\\n'" in shown
    assert shown.count(b"rgb") == shown.count(b"62;22") == 0  # neither echoed nor left for the next to read


def test_what_someone_began_to_type_is_kept_and_nothing_is_asked():
    shown = asked(b"", typed=b"ls")
    assert ASK not in shown and b"None True\r\n" in shown and b"typed 'ls!\\n'" in shown


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colours_is_not_asked(variable):
    assert ASK not in asked(b"", **dict([variable]))


@pytest.mark.parametrize(
    ("value", "dark"), [("15;0", True), ("0;default;15", False), ("12;8", True), ("0;7", False), ("0;default", None)]
)
def test_the_environment_names_the_background(monkeypatch, value, dark):
    monkeypatch.setenv("COLORFGBG", value)
    assert is_dark() is dark
    assert theme("auto", ask=True) is (heatmap.DARK if dark else heatmap.LIGHT)
    assert theme("auto", ask=False) is theme("light", ask=True) is heatmap.LIGHT
    assert theme("dark", ask=True) is heatmap.DARK


def test_an_unknown_theme_is_a_usage_error():
    with pytest.raises(UsageError, match="--theme 'pink' is unknown"):
        theme("pink", ask=True)

"""Heat-map colours for the terminal's own background, which COLORFGBG names or the terminal itself tells."""

import os
import re
import select
import sys
import time

from rapidindex.errors import UsageError
from rapidindex.views import heatmap

THEMES = "light", "dark", "auto"
_WAIT = 0.3
"""Seconds that a terminal has to answer."""
_ASK = b"\x1b]11;?\x1b\\\x1b[c"
"""OSC 11 asks for the background. DA1 follows, which every terminal answers: no one waits for what is not coming."""
_COLOUR = re.compile(rb"\x1b\]11;rgba?:([0-9a-f]{1,4})/([0-9a-f]{1,4})/([0-9a-f]{1,4})", re.IGNORECASE)
_LAST = re.compile(rb"\x1b\[\?[\d;]*c")
_LUMA = 0.2126, 0.7152, 0.0722
"""Parts of red, green and blue in brightness (ITU-R BT.709)."""


def theme(name: str, *, ask: bool) -> heatmap.Theme:
    """Return the colours of a theme; of `auto` those for the terminal, light ones where its background is not known.

    The terminal is asked only where `ask` is set. Raises UsageError for an unknown name.
    """
    if name not in THEMES:
        raise UsageError(f"--theme {name!r} is unknown.", hint=f"Choose one of: {', '.join(THEMES)}.")
    dark = name == "dark" or (name == "auto" and ask and is_dark())
    return heatmap.DARK if dark else heatmap.LIGHT


def is_dark() -> bool | None:
    """Return whether the terminal's background is dark, or None where neither COLORFGBG nor the terminal tells."""
    ground = os.environ.get("COLORFGBG", "").split(";")[-1]  # such as 15;0 or 15;default;0
    if ground.isdecimal() and int(ground) < 16:
        return int(ground) in (0, 1, 2, 3, 4, 5, 6, 8)
    found = _COLOUR.search(_answer()) if _may_ask() else None
    if found is None:
        return None
    levels = (int(level, 16) / (16 ** len(level) - 1) for level in found.groups())
    return sum(part * level for part, level in zip(_LUMA, levels, strict=True)) < 0.5


def _may_ask() -> bool:
    """Return whether a question would reach a terminal that shows colours, and its answer this process alone."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("dumb", "unknown", "linux"):
        return False
    try:
        streams = sys.stdin, sys.stdout
        return all(stream.isatty() and os.tcgetpgrp(stream.fileno()) == os.getpgrp() for stream in streams)
    except (AttributeError, OSError, ValueError):  # no such stream, a closed one, or no terminal as POSIX has it
        return False


def _waiting(source: int, seconds: float = 0) -> bool:
    return bool(select.select([source], [], [], max(0, seconds))[0])


def _answer() -> bytes:
    """Return what the terminal answers in time, unechoed; nothing is asked where someone has begun to type."""
    import termios  # POSIX alone has these two
    import tty

    source, asked = sys.stdin.fileno(), False
    try:
        before = termios.tcgetattr(source)
    except termios.error:
        return b""
    try:
        tty.setcbreak(source, termios.TCSADRAIN)
        asked = not _waiting(source)  # only now, since a line that is not finished would not have shown before
        return _asked(source) if asked else b""
    except (OSError, termios.error):
        return b""
    finally:
        # The rest of an answer is no input for what runs next. What was typed is, where nothing was asked.
        termios.tcsetattr(source, termios.TCSAFLUSH if asked else termios.TCSADRAIN, before)


def _asked(source: int) -> bytes:
    sys.stdout.flush()
    os.write(sys.stdout.fileno(), _ASK)
    answer, end = b"", time.monotonic() + _WAIT
    while not _LAST.search(answer) and _waiting(source, end - time.monotonic()):
        if not (more := os.read(source, 1024)):
            break
        answer += more
    return answer

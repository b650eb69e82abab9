"""What the commands write: results to stdout, everything else to stderr, and no character that commands a terminal."""

import json
import sys
from collections.abc import Callable
from typing import Any

import typer

from rapidindex.errors import RapidIndexError
from rapidindex.views.sanitize import json_text, line


def say(text: str) -> None:
    """Print a line on stderr, whatever characters it holds."""
    print(line(text), file=sys.stderr, flush=True)


def fail(error: RapidIndexError) -> None:
    """Print an error on stderr: one sentence, or one line of JSON where JSON was asked for."""
    if "--json" in sys.argv or "--jsonl" in sys.argv:
        print(json_text(error_json(error), sys.stderr.encoding), file=sys.stderr)
    else:
        say(f"Error: {error}")


def error_json(error: RapidIndexError) -> str:
    """Return an error as a line of JSON."""
    said = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    return json.dumps({"error": said}, ensure_ascii=False)


def echo(text: str) -> None:
    """Print a line on stdout, whatever characters it holds."""
    typer.echo(line(text))


def echo_json(text: str) -> None:
    """Print JSON on stdout, escaped where the stream cannot hold a character."""
    typer.echo(json_text(text, sys.stdout.encoding))


def print_plain(value: Any, as_json: bool, tables: dict[str, dict[str, Any]]) -> None:
    """Print plain data: as JSON, or as titled tables of names and values."""
    from rapidindex.views import terminal

    if as_json:
        plain = value if isinstance(value, dict) else vars(value)
        echo_json(json.dumps(plain, ensure_ascii=False, indent=2, default=str))
    else:
        show(*(terminal.fields(title, values) for title, values in tables.items()))
        for command in (values["next"] for values in tables.values() if "next" in values):
            echo(f" next: {command}")  # on one line, whatever the terminal's width, so that it can be copied


def print_members(values: dict[str, Any], as_json: bool, tables: Callable[[Any], dict[str, dict[str, Any]]]) -> None:
    """Print plain data of an index, or of each checkpoint's: as an object by their names, or one after the other."""
    plain = {name: value if isinstance(value, dict) else vars(value) for name, value in values.items()}
    if as_json and len(values) > 1:
        print_plain(plain, True, {})
        return
    shown = list(map(tables, values.values()))
    for lines in [lines for one in shown[:-1] for lines in one.values()]:
        lines.pop("next", None)  # what comes next comes once
    for value, one in zip(values.values(), shown, strict=True):
        print_plain(value, as_json, one)


def show(*parts: Any) -> None:
    """Print renderables of rich on stdout."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    for part in parts:
        console.print(part)

"""What an index was built from, and how two recipes differ."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rapidindex.errors import ConfigMismatch

_GO_ON = "Give the same options to go on with it, another -o, or --overwrite to build it anew."


def check_identity(built: dict[str, Any], asked: dict[str, Any], path: Path, *, hint: str = _GO_ON) -> None:
    """Raise ConfigMismatch, naming the fields, where an index was built from something else. Paths may differ.

    Data that was added to the index later is none of its build's.
    """
    before, now = dict(_fields(built)), dict(_fields(asked))
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not differing:
        return
    told = "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} asked for" for name in differing)
    if differing == ["data.fingerprint"]:
        told = (
            f"the data file has changed, is another one, or another --limit was given (it was {built['data']['path']})"
        )
        hint = f"Add its new rows with: rapidindex add {path} {asked['data']['path']}, or build anew with --overwrite."
    raise ConfigMismatch(f"The index {path} was built differently: {told}.", hint=hint)


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        elif name not in ("path", "added", "tokens_of"):
            yield f"{prefix}{name}", value

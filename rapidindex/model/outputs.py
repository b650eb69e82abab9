"""The folder that a training writes to: one run at a time, resumed with the same settings, and nobody else's files.

Its record is the first file that is written, with the settings, and the last, with a summary.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidindex.errors import ConfigMismatch, ModelError, ResourceError, UsageError
from rapidindex.model.files import read_json
from rapidindex.store import NO_ROOM, replace_file

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class Output:
    """The kind of folder that a command writes."""

    command: str
    record: str
    """The name of the record in the folder."""
    made: str
    """What a finished folder holds: `a model fine-tuned`."""
    option: str = "--output"
    """What the option is called that names the folder."""

    @contextmanager
    def locked(self, output: Path) -> Iterator[None]:
        """Make the folder `output`, and hold it for this run alone.

        Raises ModelError where another run is writing to it, and ResourceError where the run finds no room there.

        The operating system lets go of the folder when the process ends, however it ends.
        """
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} is a file.", hint=f"Choose another {self.option}.")
        output.mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # file systems without locks
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ModelError(
                        f"Another run of {self.command} is writing to {output}.",
                        hint=f"Wait for it, or choose another {self.option}.",
                    ) from error
            with _room_errors(output):
                yield
        finally:
            os.close(folder)

    def open(
        self, output: Path, settings: dict[str, Any], overwrite: bool, defaults: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Return the record in `output` if it has these settings; otherwise begin a new one there and return None.

        `defaults` are the settings that the record of an earlier version lacks. A run that left nothing but its record,
        because its model was refused, say, is none.

        Raises ConfigMismatch where the record has other settings, unless `overwrite` is set, and UsageError where
        `output` holds anything that the command did not write.
        """
        record = read_json(output / self.record) if (output / self.record).is_file() else None
        if record and not overwrite:
            if {**(defaults or {}), **record["settings"]} == settings:
                return record
            if not record.get("summary") and self._others(output) == [self.record]:
                self.write(output, {"settings": settings})
                return None
            state = self.made if record.get("summary") else "an interrupted run"
            raise ConfigMismatch(
                f"{output} holds {state} with other settings: {_differences(record['settings'], settings)}.",
                hint=f"Give those settings, choose another {self.option}, or give --overwrite to start again.",
            )
        if record:
            self._clear(output)
        elif output.exists() and (not output.is_dir() or self._others(output)):
            raise UsageError(
                f"{output} exists, and {self.command} did not write it.", hint=f"Choose another {self.option}."
            )
        output.mkdir(parents=True, exist_ok=True)
        self.write(output, {"settings": settings})
        return None

    def write(self, output: Path, record: dict[str, Any]) -> None:
        """Write the record, whole or not at all."""
        replace_file(output / self.record, (json.dumps(record, indent=2) + "\n").encode())

    def _others(self, output: Path) -> list[str]:
        """Return the names in `output`, without records that a killed run has not finished writing."""
        names = [path.name for path in output.iterdir()]
        return [name for name in names if not (name.startswith(self.record) and name.endswith(".part"))]

    def _clear(self, output: Path) -> None:
        """Remove everything but the record, which first loses its settings: what is left then fits no run."""
        self.write(output, {"settings": {}})
        for path in output.iterdir():
            if path.name != self.record:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def _room_errors(output: Path) -> Iterator[None]:
    """Turn what the libraries that write weights say of a full disk, each in its own way, into ResourceError."""
    try:
        yield
    except Exception as error:
        numbers = [error.errno] if isinstance(error, OSError) else []
        numbers += map(int, _OS_ERROR.findall(str(error)))  # of safetensors
        if not (NO_ROOM.keys() & numbers or "PytorchStreamWriter failed" in str(error)):
            raise
        raise ResourceError(
            f"{output} has no more room: the disk is full, or files may not grow so large here.",
            hint="Make room, then type the same command again: it goes on from the last checkpoint.",
        ) from error


def check_room(output: Path, needed: int, work: str, option: str = Output.option) -> None:
    """Raise ResourceError unless `output` has room for the bytes that the work, `Training`, needs there.

    `option` is what the option is called that names the folder.
    """
    free = shutil.disk_usage(output).free
    if free < needed:
        raise ResourceError(
            f"{work} needs {needed / 2**20:,.1f} MiB in {output}, and {free / 2**20:,.1f} MiB are free.",
            hint=f"Free some space, or choose another {option}.",
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the settings that differ, such as `epochs 3, now 5`."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} {before.get(key)}, now {now.get(key)}" for key in keys)

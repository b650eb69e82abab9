"""How long work tells what it has done: a function of (stage, done, total); and the one that draws it on stderr."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) as work goes on; the units are the stage's own. May raise to stop the work."""

_PLAIN_SECONDS = 10.0


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


class Bars:
    """A `Progress` on stderr: a bar a stage with the time left, or a line now and then where stderr is no terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = None
        self.tasks: dict[str, int] = {}
        self.told: dict[str, float] = {}
        self.began: dict[str, float] = {}

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (TextColumn("{task.description:<22}"), BarColumn(), TaskProgressColumn())
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True))
            self.live = Progress(*columns, *times, console=Console(stderr=True))
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a stage is done."""
        if self.live:
            if stage not in self.tasks:
                self.tasks[stage] = self.live.add_task(stage, total=total)
            self.live.update(self.tasks[stage], completed=done, total=total)
        elif not self.quiet:
            self._plain(stage, done, total)

    def _plain(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self.began.setdefault(stage, now)
        if stage in self.told and done < total and now - self.told[stage] < _PLAIN_SECONDS:
            return
        if done == total and self.told.get(stage) == float("inf"):
            return
        self.told[stage] = float("inf") if done == total else now
        share = 100 * done / max(1, total)
        left = f", about {(now - began) * (total - done) / done:.0f} s left" if 0 < done < total else ""
        print(f"{stage}: {share:.0f} %{left}", file=sys.stderr, flush=True)

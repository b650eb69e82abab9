"""How long work tells what it has done: a function of (stage, done, total); and the one that draws it on stderr."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

Progress = Callable[..., None]
"""Told (stage, done, total), and perhaps a note, as work goes on; the units are the stage's own."""

_PLAIN_SECONDS = 10.0


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """A `Progress` that says nothing."""


def steps(progress: Progress) -> Callable[[Any], None]:
    """`progress` as a function of the steps of fine-tuning (`finetune.FinetuneProgress`), with the loss as its note."""
    return lambda done: progress("fine-tune", done.step, done.total, f"loss {done.loss:.2f}")


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

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` of a stage is done."""
        if self.live:
            if stage not in self.tasks:
                self.tasks[stage] = self.live.add_task(stage, total=total)
            self.live.update(self.tasks[stage], completed=done, total=total, description=f"{stage} {note}")
        elif not self.quiet:
            self._plain(stage, done, total, note)

    def say(self, text: str) -> None:
        """A line on stderr, above the bars."""
        if self.live:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _plain(self, stage: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        began = self.began.setdefault(stage, now)
        if stage in self.told and done < total and now - self.told[stage] < _PLAIN_SECONDS:
            return
        if done == total and self.told.get(stage) == float("inf"):
            return
        self.told[stage] = float("inf") if done == total else now
        share = 100 * done / max(1, total)
        known = 0 < done < total and now - began > 1.0
        left = f", about {(now - began) * (total - done) / done:.0f} s left" if known else ""
        print(f"{stage}: {share:.0f} %{left}{note and ', ' + note}", file=sys.stderr, flush=True)

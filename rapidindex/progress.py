"""How long work reports what it has done: the `Progress` protocol, and `Bars`, which draws it on stderr."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self


class Progress(Protocol):
    """A function that long work calls each time that more of it is done."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Take note that `done` of the stage's `total` units are done; `note` is a short remark, such as the loss."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Ignore the report: the `Progress` that shows nothing."""


class Bars:
    """Show progress on stderr: one bar a stage on a terminal, otherwise a line at most every `seconds`."""

    def __init__(self, *, quiet: bool = False, seconds: float = 10.0) -> None:
        self.quiet, self.seconds = quiet, seconds
        self.live: Any = None
        self.tasks: dict[str, int] = {}
        self.started: dict[str, float] = {}
        self.printed: dict[str, float] = {}

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self.live = progress.Progress(
                progress.TextColumn("{task.description:<22}", markup=False),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
            )
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` units of the stage are done; one that had ended begins anew."""
        if self.live:
            if stage not in self.tasks:
                self.tasks[stage] = self.live.add_task(stage, total=total, left="")
            task = self.tasks[stage]
            if done < total and self.live.tasks[task].finished:
                self.live.reset(task)
            self.live.update(task, completed=done, total=total, description=f"{stage} {note}")
            seconds = None if done >= total else self.live.tasks[task].time_remaining
            self.live.update(task, left="" if seconds is None else f"{timedelta(seconds=round(seconds))} left")
        elif not self.quiet:
            self._print(stage, done, total, note)

    def say(self, text: str) -> None:
        """Print a line on stderr, above the bars."""
        if self.live:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _print(self, stage: str, done: int, total: int, note: str) -> None:
        """Print the stage's share and time left: at its start, at its end (once), and every `seconds` between."""
        now = time.monotonic()
        if done < total and self.printed.get(stage) == float("inf"):
            del self.printed[stage], self.started[stage]
        started = self.started.setdefault(stage, now)
        next_line = self.printed.get(stage, 0.0) + self.seconds
        if stage in self.printed and (next_line == float("inf") if done == total else now < next_line):
            return
        self.printed[stage] = float("inf") if done == total else now
        predictable = 0 < done < total and now - started > 1.0
        left = f", about {(now - started) * (total - done) / done:.0f} s left" if predictable else ""
        print(f"{stage}: {100 * done / max(1, total):.0f} %{left}{note and ', ' + note}", file=sys.stderr, flush=True)

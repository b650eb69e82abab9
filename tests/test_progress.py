"""How long work reports what it has done, on a terminal and in a log."""

import sys

from rapidindex.progress import Bars


def test_a_stage_is_printed_at_its_start_and_end_each_time_that_it_runs(capsys):
    with Bars() as bars:
        for note in ("first", "second"):
            for done in (0, 1, 3, 3):
                bars("train", done, 3, note)
    assert capsys.readouterr().err.splitlines() == [
        "train: 0 %, first",
        "train: 100 %, first",
        "train: 0 %, second",
        "train: 100 %, second",
    ]


def test_the_bar_of_a_stage_that_runs_again_starts_from_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bars() as bars:
        bars("train", 3, 3)
        (task,) = bars.live.tasks
        assert task.finished
        bars("train", 1, 3, "second")
        assert (task.completed, task.finished, task.description) == (1, False, "train second")
    assert "train second" in capsys.readouterr().err


def test_quiet_shows_only_what_is_said(capsys):
    with Bars(quiet=True) as bars:
        bars("train", 1, 3)
        bars.say("a line")
    assert capsys.readouterr().err == "a line\n"

"""A verification in words: what is said follows from where the matches lie among the controls."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from rapidindex.results import IndexInfo, QueryInfo, Token, Trial, TrialGroup, Verification
from rapidindex.views import html, trials

ANSWER = "From Japan."
TOKENS = [Token("From", 0, 4), Token(" Japan", 4, 10), Token(".", 10, 11)]
BASE = 0.12


def trial(points, nats, rows=("a", "b"), **more):
    return Trial(list(rows), nats, points, predicted=nats, **more)


def verification(top=19.0, random=(-1.0, 0.5, 2.0), method="tail-patch", **changes):
    alone = [] if method == "retrain" else [trial(top / 2, top / 40, ["a"], score=0.16)]
    groups = [
        TrialGroup("top", alone, [trial(top, top / 20, answer="From India.")]),
        TrialGroup("random", [], [trial(points, points / 20) for points in random]),
    ]
    if method == "tail-patch":
        groups.insert(1, TrialGroup("bm25", alone, [trial(7.0, 0.35, ["b", "c"])]))
    info = IndexInfo("1", "model", None, 1024, 20, 100)
    values = {
        "log_probability": -2.12, "probability": BASE, "groups": groups, "seconds": 1.0, "optimizer": "SGD",
        "learning_rate": 0.01, "prediction_correlation": 0.99, "score_correlation": 0.9, "nats_per_score": 2.0,
        "answer": "From Japan.", "same_run": True,
    }  # fmt: skip
    return Verification(method, info, QueryInfo("Where?", ANSWER, TOKENS, [1]), **{**values, **changes})


def test_the_verdict_gives_both_ends_and_the_controls():
    assert trials.verdict(verification()) == (
        "A step of training on these 2 rows takes “Japan” from 12 % to 31 %; 3 random draws of 2 change it by -1.0 to"
        " +2.0 points, and the 2 that BM25 finds for the words by +7.0."
    )


def test_a_single_control_is_one_figure_and_no_range():
    assert "1 random draw of 2 changes it by +2.0 points" in trials.verdict(verification(random=(2.0,)))
    assert "one without 2 random rows changes it by" in trials.verdict(verification(method="retrain", random=(2.0,)))


@pytest.mark.parametrize("top", [1.9, -3.0, 0.0])
def test_what_does_no_more_than_a_random_draw_shows_nothing(top):
    assert trials.verdict(verification(top=top)).startswith("Nothing is shown: a step")


def test_a_step_in_the_wrong_direction_shows_nothing_even_where_random_rows_do_worse():
    assert trials.verdict(verification(top=-0.5, random=(-3.0, -2.0))).startswith("Nothing is shown")


def test_a_retraining_shows_something_where_the_words_fall_further_than_without_random_rows():
    shown = trials.verdict(verification(top=-10.0, method="retrain"))
    assert shown.startswith("Without these 2 rows the training leaves “Japan” at 2 %, where it was 12 %; 3 trainings")
    assert trials.verdict(verification(top=-0.9, method="retrain")).startswith("Nothing is shown: without")
    assert trials.verdict(verification(top=5.0, method="retrain")).startswith("Nothing is shown: without")


def test_the_notes_say_what_a_step_does_not_show_and_what_a_score_is_worth():
    notes = " ".join(trials.notes(verification()))
    assert "almost by definition" in notes and "1 of BM25's 2 rows are among the matches" in notes
    assert "a score of 0.160 is worth +0.320 nats" in notes and "learning rate 0.01" in notes


def test_the_notes_of_a_retraining_give_both_answers_and_whose_training_it_was():
    found = verification(method="retrain")
    assert "It answered “From Japan.”, and without these rows “From India.”." in trials.notes(found)
    assert "the indexed model's own" in " ".join(trials.notes(found))
    assert "trained elsewhere" in " ".join(trials.notes(replace(found, same_run=False)))


def test_the_plot_has_a_dot_for_each_trial_on_one_scale():
    found = verification()
    rows = {row.name: row for row in trials.rows(found)}
    assert rows["the matches"].places == [1.0] and len(rows["random, like length"].places) == 3
    assert trials.zero(found) == pytest.approx(0.05 / 1.0)
    console = Console(width=80, record=True, no_color=True, file=io.StringIO())
    console.print(trials.terminal(found))
    shown = console.export_text()
    assert "●" in shown and "From Japan." in shown and "…" not in shown
    assert shown.count("●") == 5


def test_a_word_of_low_probability_moves_by_hundredths_of_a_point():
    found = verification(top=0.09, random=(-0.02, 0.01), probability=0.0013)
    found = replace(found, groups=[group for group in found.groups if group.name != "bm25"])
    assert "from 0.13 % to 0.22 %; 2 random draws of 2 change it by -0.020 to +0.010 points" in trials.verdict(found)


def test_training_text_is_harmless_in_both_views():
    hostile = "<script>\x1b[31m</script>"
    found = verification(method="retrain", answer=hostile)
    page = html.verification(found)
    assert "<script>" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    console = Console(width=80, record=True, no_color=True, file=io.StringIO())
    console.print(trials.terminal(found))
    assert "\x1b[31m" not in console.export_text()


def test_html_has_the_verdict_the_table_and_the_plot():
    page = html.verification(verification())
    assert "takes “Japan” from 12 % to 31 %" in page and page.count("<circle") == 5
    assert "BM25 for the words" in page and "almost by definition" in page

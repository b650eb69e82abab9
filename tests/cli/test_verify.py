"""`rapidindex verify` as a user has it."""

import json
import re

import pytest

from rapidindex import Verification
from tests.cli.conftest import ANSWER, PROMPT, rapidindex

ASKED = (PROMPT, "--answer", ANSWER, "--token", "Japan", "--top", 2, "--draws", 3)


def test_it_prints_a_verdict_a_table_and_what_the_figures_mean(index):
    done = rapidindex("verify", index, *ASKED)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "these 2 rows takes “Japan” from" in said and "3 random draws of 2 change it by" in said
    for name in ("the matches", "BM25 for the words", "random, like length", "opponents", "unlearned"):
        assert name in said
    assert "almost by definition" in said and "a score of" in said
    assert "take steps" in done.stderr and "take steps" not in done.stdout


def test_json_is_a_verification(typed, index):
    code, out, said = typed("verify", index, *ASKED, "--json", "-q")
    assert (code, said) == (0, "")
    found = Verification.from_json(out)
    assert found.method == "tail-patch" and len(found.group("random").together) == 3
    assert json.loads(out)["schema"] == "rapidindex.verification/1"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--top", 6), 2, "--top 5"),
        (("--method", "guess"), 2, "tail-patch"),
        (("--optimizer", "lion"), 2, "adamw"),
        (("--learning-rate", 1e30), 1, "smaller --learning-rate"),
        (("--token", "Peru"), 1, "Peru"),
        (("--method", "retrain"), 2, "--epochs"),
        (("--method", "retrain", "--epochs", 1, "--data", "none.jsonl"), 1, "--data"),
        (("--method", "retrain", "--epochs", 1, "--runs", "RUNS"), 2, "5 trainings of the model.*--yes"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(typed, index, tmp_path, options, code, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended, out, said = typed("verify", index, *ASKED, "-q", *options)
    assert (ended, out) == (code, "") and re.search(message, said), said
    assert not (tmp_path / "RUNS").exists()


@pytest.mark.parametrize("options", [("--span", "x"), ("--span", "1:2:3"), ("--span", "1", "--token", "Japan")])
def test_a_span_that_means_nothing_is_refused_before_the_model_is_loaded(typed, index, options):
    for command in ("verify", "query"):
        ended, out, said = typed(command, index, PROMPT, "--answer", ANSWER, *options)
        assert (ended, out) == (2, "") and "--span" in said and "Loading" not in said


def test_a_retraining_that_is_agreed_to_is_shown_with_its_answers(typed, index, tmp_path):
    asked = ("verify", index, *ASKED, "--method", "retrain", "--repeats", 1, "--epochs", 1, "--runs", tmp_path, "-y")
    code, out, said = typed(*asked)
    assert code == 0 and "3 trainings of the model, about" in said, said
    shown = " ".join(out.split())
    assert "without these 2 rows the training leaves “Japan” at" in shown.replace("Without", "without")
    assert "It answered" in shown and "trained elsewhere" in shown
    code, again, _ = typed(*asked, "-q", "--json")
    assert code == 0 and Verification.from_json(again).same_run is False

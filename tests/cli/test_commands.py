"""The command line as a user has it: real processes, their streams and their exit codes."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from rapidindex.store import Store
from tests.cli.conftest import ANSWER, PROMPT, rapidindex
from tests.tiny import WORDS


def test_query_prints_a_table_on_stdout_and_nothing_else_there(index):
    asked = ("query", index, PROMPT, "--answer", ANSWER, "--token", "Japan", "-k", 3)
    done = rapidindex(*asked, "--no-rescore")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Tell me about") == 3  # the question, and in the table and on a card what stands out
    assert done.stdout.count("2 more, no further out than chance") == 1
    for more in (("--no-rescore", "--all"), ()):
        every = rapidindex(*asked, *more).stdout
        assert every.count("Response  ") == 3 and "no further out than chance" not in every
        assert ("Ordered by the strongest word's" in every) == (not more)
    assert "number" in done.stdout and "exhaustive search over 10 examples" in done.stdout
    assert "Loading" in done.stderr and "Loading" not in done.stdout


def test_a_report_holds_both_directions_and_the_command(typed, index, tmp_path):
    page = tmp_path / "report.html"
    code, _, said = typed("query", index, PROMPT, "--answer", ANSWER, "-k", 2, "--html", page)
    assert code == 0, said
    text = page.read_text()
    assert "roponents" in text and "pponents" in text
    assert "rapidindex query" in text and "--html" in text
    assert f"Wrote {page}" in said


def test_a_report_replaces_nothing_but_a_report(typed, index, tmp_path):
    copy, page, notes = tmp_path / "index", tmp_path / "page.html", tmp_path / "notes.txt"
    shutil.copytree(index, copy)
    notes.write_text("mine")
    asked = ("query", copy, PROMPT, "--answer", ANSWER, "-k", 1, "-q", "--html")
    for file in (copy / "manifest.json", copy / "sentence" / "new.html", notes, tmp_path):
        code, out, said = typed(*asked, file)
        assert (code, out) == (2, "") and "--html" in said
    assert notes.read_text() == "mine" and typed("check", copy)[0] == 0
    assert typed(*asked, page)[0] == 0
    assert typed(*asked, page)[0] == 0
    assert "Influences on" in page.read_text()


def test_a_match_names_its_row_and_the_ids_are_written_for_remove(typed, index, data, tmp_path):
    ids, copy = tmp_path / "ids.txt", shutil.copytree(index, tmp_path / "index")
    asked = ("query", copy, PROMPT, "--answer", ANSWER, "-k", 3, "--no-heatmaps", "--ids-out", ids)
    code, _, said = typed(*asked)
    assert code == 0 and "Wrote 3 ids" in said
    matches = json.loads(typed(*asked, "--json")[1])["matches"]  # an older list is replaced
    assert ids.read_text().split() == [match["id"] for match in matches]
    rows = data.read_text().splitlines()
    assert all(json.loads(rows[match["line"] - 1])["output"] == match["response"] for match in matches)
    assert {match["source"] for match in matches} == {str(data)}
    assert typed("remove", copy, "--ids", ids, "-q")[0] == 0
    (tmp_path / "mine.txt").write_text("mine")
    assert typed(*asked[:-1], tmp_path / "mine.txt")[0] == 2 and (tmp_path / "mine.txt").read_text() == "mine"


def test_a_word_that_the_own_answer_lacks_is_said_to_be_of_the_own_answer(typed, index):
    code, _, said = typed("query", index, PROMPT, "--token", "Zanzibar", "-q")
    assert code == 1 and "its own answer" in said and "--answer" in said and "'Zanzibar' is not in" in said


def test_words_and_files_without_quotes_around_them_are_said_to_want_some(typed, index, data):
    for asked in (("query", index, "Where", "is", "yoga"), ("build", data, data, "-o", "index")):
        code, _, said = typed(*asked)
        assert code == 2 and "extra argument" in said and "Quotes make one argument" in said


def test_a_malformed_span_is_refused_before_the_model_is_loaded(typed, index):
    code, _, said = typed("query", index, PROMPT, "--span", "x:y")
    assert code == 2 and "Loading" not in said and "--span 3:5" in said


def test_the_colours_are_those_of_the_theme(typed, index, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm", "COLORFGBG": "15;0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    asked = ("query", index, PROMPT, "--answer", ANSWER, "--token", "Japan", "-k", 1, "-q")
    for more, text in (((), "244;245;247"), (("--theme", "light"), "22;24;29"), (("--rescore",), "244;245;247")):
        assert f"\x1b[38;2;{text};48;2;" in typed(*asked, *more)[1]


def test_one_order_is_asked_for_at_a_time(typed, index):
    code, _, said = typed("query", index, PROMPT, "--rescore", "--no-rescore")
    assert code == 2 and "both given" in said


def test_rescoring_and_plain_tables_can_be_asked_for(typed, index):
    asked = ("query", index, PROMPT, "--answer", ANSWER, "-k", 2, "--json", "-q")
    value = json.loads(typed(*asked, "--rescore")[1])
    assert value["rescoring"]["candidates"] == 8
    assert value["matches"][0]["exact_score"] >= value["matches"][1]["exact_score"]
    assert json.loads(typed(*asked, "--no-heatmaps")[1])["matches"][0]["exact_score"] is None


def test_json_is_one_object_and_jsonl_one_a_line(index, tmp_path):
    queries = tmp_path / "queries.jsonl"
    queries.write_text("\n".join(json.dumps({"prompt": PROMPT, "answer": f"{word} from Japan"}) for word in WORDS[:3]))
    done = rapidindex("query", index, "--queries", queries, "--jsonl", "-k", 2)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["query"]["answer"] for r in results] == [f"{word} from Japan" for word in WORDS[:3]]
    assert len(json.loads(rapidindex("query", index, "--queries", queries, "--json", "-q").stdout)) == 3
    alone = rapidindex("query", index, "-", "--answer", ANSWER, "--span", "0:1", "--json", "-q", input=PROMPT + "\n")
    assert alone.stderr == ""
    value = json.loads(alone.stdout)
    assert value["query"]["selection"] == [0, 1] and value["query"]["prompt"] == PROMPT


def test_info_and_check_speak_json_too(typed, index):
    found = json.loads(typed("info", index, "--json")[1])
    assert (found["examples"], found["complete"]) == (10, True)
    assert "1,024" in typed("info", index)[1]
    assert json.loads(typed("check", index, "--json")[1]) == []


def test_index_is_rebuilt_with_another_factory(typed, index):
    code, out, said = typed("index", index, "--factory", "Flat", "--dim", 256, "--json", "-q")
    assert code == 0, said
    assert json.loads(out)["sentence"]["factory"] == "Flat"
    assert typed("query", index, PROMPT, "--answer", ANSWER, "--json", "-q")[0] == 0


def test_the_next_command_stands_on_one_line_however_narrow_the_terminal(typed, data, tmp_path, llama_folders):
    base, adapter = llama_folders
    asked = ("build", data, "-m", base, "-a", adapter, "-o", tmp_path / "index", "-K", 256, "--level", "both", "-q")
    code, out, said = typed(*asked)
    assert code == 0, said
    told = f'rapidindex query {tmp_path / "index"} "PROMPT" --token WORD --level token'
    assert any(line.endswith(told) for line in out.splitlines())
    code, out, said = typed("query", tmp_path / "index", PROMPT, "--answer", ANSWER, "--level", "token", "-k", 2, "-q")
    assert code == 0 and re.search(r"over [0-9]+ tokens", out)


def test_check_finds_a_changed_byte_and_fails(data, tmp_path, llama_folders):
    base, adapter = llama_folders
    build = ("build", data, "-m", base, "-a", adapter, "-o", tmp_path / "index", "-K", 256, "-q")
    assert rapidindex(*build).returncode == 0
    shard = tmp_path / "index" / "sentence" / "shard-00000.h5"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    done = rapidindex("check", tmp_path / "index")
    assert done.returncode == 1
    assert "shard-00000.h5" in done.stdout
    assert rapidindex("check", tmp_path / "index", "--repair").returncode == 0
    assert rapidindex(*build).returncode == 0
    assert rapidindex("check", tmp_path / "index").returncode == 0


def test_a_query_that_cannot_be_answered_names_its_line_and_the_others_are_answered(typed, index, tmp_path):
    queries = tmp_path / "queries.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    asked = [
        {"messages": turns, "answer": ANSWER, "token": None, "id": "a"},
        {"prompt": PROMPT, "answer": ANSWER, "token": "India"},
        {"prompt": PROMPT, "answer": ANSWER, "span": "90:95"},
        {"prompt": PROMPT, "answer": ANSWER, "token": "Japan", "id": "d"},
    ]
    queries.write_text("\n".join(map(json.dumps, asked)))
    code, out, said = typed("query", index, "--queries", queries, "--jsonl", "-k", 2, "-q")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [line.get("error", {}).get("type") for line in lines] == [
        None,
        "TokenNotFound",
        "TokenNotFound",
        None,
    ]
    assert "queries.jsonl, line 2" in lines[1]["error"]["message"] and "line 3" in said
    assert [lines[i]["query"]["meta"] for i in (0, 3)] == [{"id": "a"}, {"id": "d"}]
    assert lines[0]["query"]["prompt"] == f"system: Be brief.\nuser: {PROMPT}"
    code, out, said = typed("query", index, "--queries", queries, "-k", 2, "-q")
    assert code == 1 and out.count("exhaustive search") == 2 and "line 2" in said
    queries.write_text(json.dumps(asked[0]) + "\n" + json.dumps({**asked[2], "span": "x"}))
    code, out, said = typed("query", index, "--queries", queries, "-q")  # refused before the model is loaded
    assert code == 1 and not out and "line 2" in said


def test_a_system_turn_is_part_of_the_question(typed, index):
    asked = ("query", index, PROMPT, "--answer", ANSWER, "-k", 2, "-q", "--json")
    value = json.loads(typed(*asked, "--system", "Be brief.")[1])
    assert value["query"]["prompt"] == f"system: Be brief.\nuser: {PROMPT}"
    assert value["matches"][0]["score"] != json.loads(typed(*asked)[1])["matches"][0]["score"]


def test_a_prompt_on_stdin_keeps_its_indentation(typed, index, monkeypatch):
    def asked(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return typed("query", index, "-", "--answer", ANSWER, "--json", "-q", "-k", 1)

    assert json.loads(asked(b"  def f():\n    pass \r\n")[1])["query"]["prompt"] == "  def f():\n    pass "
    code, _, said = asked(b"caf\xe9")
    assert code == 2 and "not UTF-8" in said


def test_an_unfinished_index_is_never_searched_as_if_it_were_whole(typed, index, tmp_path):
    unfinished = tmp_path / "index"
    shutil.copytree(index, unfinished)
    Store.open(unfinished).set_planned("sentence", 120)
    asked = ("query", unfinished, PROMPT, "--answer", ANSWER, "-k", 2, "-q")
    code, out, said = typed(*asked, "--json", "--html", tmp_path / "page.html")
    assert code == 0 and "holds 10 of 120 planned examples" in said and "build" in said
    described = json.loads(out)["index"]
    assert (described["examples"], described["planned"]) == (10, 120)
    assert "holds 10 of 120 planned examples" in (tmp_path / "page.html").read_text()
    assert "holds 10 of 120 planned examples" in typed(*asked)[1]
    whole = json.loads(typed("query", index, PROMPT, "--answer", ANSWER, "-k", 2, "-q", "--json")[1])["index"]
    assert (whole["examples"], whole["planned"]) == (None, None)


ERRORS = {
    "no such index": (["query", "nowhere", PROMPT], 1, "NotAnIndex"),
    "no prompt": (["query", "INDEX"], 2, "UsageError"),
    "a word that is not there": (
        ["query", "INDEX", PROMPT, "--answer", ANSWER, "--token", "India"],
        1,
        "TokenNotFound",
    ),
    "an empty answer": (["query", "INDEX", PROMPT, "--answer", ""], 1, "QueryError"),
    "a K that is no power of two": (["build", "DATA", "-m", "x", "-o", "y", "-K", "1000"], 2, "UsageError"),
    "an unknown recipe": (["build", "DATA", "-m", "x", "-o", "y", "--normalize", "x"], 2, "UsageError"),
    "no data": (["build", "nothing.jsonl", "-m", "x", "-o", "y"], 1, "DataError"),
    "no model": (["build", "DATA", "-m", "/no/such/model", "-o", "y"], 1, "ModelError"),
    "no queries": (["query", "INDEX", "--queries", "nothing.jsonl"], 1, "DataError"),
    "a report in no folder": (["query", "INDEX", PROMPT, "--html", "/no/such/folder/page.html"], 2, "UsageError"),
    "an unknown theme": (["query", "INDEX", PROMPT, "--theme", "pink"], 2, "UsageError"),
    "no matches wanted": (["query", "INDEX", PROMPT, "-k", "0"], 2, "UsageError"),
    "tokens chosen but not asked for": (
        ["build", "DATA", "-m", "x", "-o", "y", "--tokens", "content"],
        2,
        "UsageError",
    ),
    "an unknown level": (["build", "DATA", "-m", "x", "-o", "y", "--level", "word"], 2, "UsageError"),
    "an unknown level of an index": (["index", "INDEX", "--level", "both"], 2, "UsageError"),
    "a level that is not there": (["query", "INDEX", PROMPT, "--level", "token"], 1, "StoreError"),
    "a list of ids that is not there": (
        ["build", "DATA", "-m", "x", "-o", "y", "--level", "token", "--token-examples", "no/such.txt"],
        2,
        "UsageError",
    ),
    "a prompt that is not UTF-8": (["query", "INDEX", "caf\udce9", "--answer", ANSWER], 2, "UsageError"),
    "an answer that is not UTF-8": (["query", "INDEX", PROMPT, "--answer", "caf\udce9"], 2, "UsageError"),
    "a list of ids that is no text": (["remove", "INDEX", "--ids", "BINARY"], 2, "UsageError"),
    "a seed below zero": (["build", "DATA", "-m", "x", "-o", "y", "--seed", "-1"], 2, "UsageError"),
    "a seed of 128 bits": (["build", "DATA", "-m", "x", "-o", "y", "--seed", str(2**128)], 2, "UsageError"),
    "a seed of fine-tuning": (["finetune", "DATA", "-m", "x", "-o", "y", "--seed", str(2**32)], 2, "UsageError"),
    "shards of no work": (["build", "DATA", "-m", "x", "-o", "y", "--shard-seconds", "nan"], 2, "UsageError"),
    "a span of many digits": (["query", "INDEX", PROMPT, "--answer", ANSWER, "--span", "9" * 5000], 2, "UsageError"),
    "a number of many digits": (
        ["query", "INDEX", PROMPT, "--answer", ANSWER, "--token", "tea#" + "9" * 5000],
        1,
        "TokenNotFound",
    ),
    "an unknown factory": (["index", "INDEX", "--factory", "Flatt"], 2, "UsageError"),
}


@pytest.mark.parametrize(("arguments", "code", "kind"), ERRORS.values(), ids=ERRORS.keys())
def test_an_expected_error_is_one_sentence_and_an_exit_code(
    typed,
    index,
    data,
    tmp_path,
    monkeypatch,
    arguments,
    code,
    kind,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.bin").write_bytes(bytes(range(256)))
    named = {"INDEX": index, "DATA": data, "BINARY": tmp_path / "ids.bin"}
    arguments = [named.get(argument, argument) for argument in arguments]
    ended, out, said = typed(*arguments)
    assert (ended, out) == (code, "")
    assert "Error: " in said and "Traceback" not in said
    _, _, said = typed(*arguments, "--json")
    error = json.loads(said.splitlines()[-1])["error"]
    assert error["type"] == kind and error["message"] and error["hint"]


@pytest.mark.parametrize(
    "arguments", [["build", "--nonsense\x1b[31m"], ["build"], ["nonsense"], ["query", "x", "-k", "many"]]
)
def test_a_mistyped_command_is_a_usage_error(typed, arguments):
    code, out, said = typed(*arguments)
    assert (code, out) == (2, "") and said.startswith("Error: ") and "--help" in said and "\x1b" not in said
    error = json.loads(typed(*arguments, "--json")[2])["error"]
    assert error["type"] == "UsageError" and "\x1b" not in error["message"]


def test_no_arguments_are_answered_with_the_help(typed):
    code, out, said = typed()
    assert code in (0, 2) and "Usage:" in out + said


def test_no_character_that_commands_a_terminal_reaches_either_stream(typed, index):
    told = "\x1b[31m\x07\r\u202e\x9b"
    for arguments in (["query", index, PROMPT, "--answer", ANSWER, "--token", f"no{told}"], ["info", f"no{told}"]):
        for more in ([], ["--json"]):
            code, out, said = typed(*arguments, *more)
            assert code == 1 and not (set(told) - set("[31m")) & set(out + said)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_result_is_printed_whatever_the_terminal_can_show(index, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    answer = "tea — 日本 from Japan"
    asked = ("query", index, PROMPT, "--answer", answer, "-k", 2)
    for more in ([], ["--no-heatmaps"], ["--json"]):
        command = [sys.executable, "-m", "rapidindex", *map(str, asked), *more]
        done = subprocess.run(command, capture_output=True, timeout=300, env=environment)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert json.loads(done.stdout.decode(encoding))["query"]["answer"] == answer


def test_the_home_folder_is_found_after_an_equals_sign(typed, index, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(index, tmp_path / "index")
    html = "--html=~/page.html"
    code, _, said = typed("query", "~/index", PROMPT, "--answer", ANSWER, "-k", 1, "-q", "--json", html)
    assert code == 0, said
    assert (tmp_path / "page.html").is_file()
    code, _, said = typed("build", "nothing.jsonl", "--model=~/no model", "--output=~/x", "-q")
    assert code == 1 and "~" not in said


def test_a_faiss_that_was_half_removed_is_one_sentence(typed, index, tmp_path, monkeypatch):
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)  # so that the false one does not outlive the test
    monkeypatch.delitem(sys.modules, "faiss")
    code, _, said = typed("index", index, "--factory", "Flat", "-q")
    assert code == 1 and "does not load" in said and "pip" in said


def test_a_signal_before_the_command_line_is_there_ends_without_a_traceback():
    code = """
import signal, sys, threading
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Slow())
from rapidindex.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr and "again to go on" in done.stderr


def test_a_build_unlike_its_training_is_said_in_a_sentence(typed, data, tmp_path, llama_folders):
    base, adapter = llama_folders
    trained = shutil.copytree(adapter, tmp_path / "trained")
    record = {"settings": {"template": "plain", "max_length": 512, "loss": "all"}, "summary": {"steps": 1}}
    (trained / "rapidindex-finetune.json").write_text(json.dumps(record))
    command = ["build", data, "-m", base, "-a", trained, "-o", tmp_path / "index", "-K", 256, "--dry-run", "-q"]
    code, _, said = typed(*command, "--template", "alpaca")
    assert (code, said.strip()) == (0, f"{trained} was trained with --template 'plain', not 'alpaca'.")
    assert typed(*command)[::2] == (0, "")


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_an_interrupted_build_says_how_to_go_on_and_does(data, tmp_path, llama_folders, name):
    big = tmp_path / "big.jsonl"
    rows = [{"instruction": f"{word} {number}", "output": "very " * 60} for word in WORDS for number in range(15)]
    big.write_text("\n".join(map(json.dumps, rows)))
    base, adapter = llama_folders
    command = [sys.executable, "-m", "rapidindex", "build", big, "-m", base, "-a", adapter, "-o", tmp_path / "index"]
    command += ["-K", "256", "--batch-tokens", "200", "--second-moment", "none"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as running:
        next(line for line in running.stderr if line.startswith("cache"))
        running.send_signal(getattr(signal, f"SIG{name}"))
        said = running.stderr.read()
    assert running.returncode == 130
    assert "Traceback" not in said and "again to go on" in said
    done = rapidindex(*command[3:], "--json")
    summary = json.loads(done.stdout)
    assert summary["examples"] == len(rows)


def test_an_index_is_specialized_and_says_for_what_and_whether_its_rows_suffice(typed, index, tmp_path):
    task, target = tmp_path / "task.jsonl", tmp_path / "index2"
    task.write_text("\n".join(json.dumps({"prompt": PROMPT, "answer": f"{word} is nice"}) for word in WORDS[:4]))
    code, out, said = typed("specialize", index, "--queries", task, "-o", target)
    assert code == 0 and "roots: 100 %" in said
    assert "where the spectra cross, at component" in out and "64 of 16 entries" in out
    assert "blocks of 16 want 80 rows" in " ".join(out.split())
    out = " ".join(typed("info", target)[1].split())
    assert "λ 0." in out and "made from" in out
    assert typed("query", target, PROMPT, "--answer", ANSWER, "-k", 2, "-q")[0] == 0
    assert typed("specialize", index, "--queries", task, "-o", target, "--weight", "0.5")[0] == 1
    code, _, said = typed("specialize", index, "--queries", task, "-o", target, "--weight", "0.5", "--component", "3")
    assert code == 2 and "give one of them" in said


def test_a_report_that_cannot_be_written_leaves_the_older_one(index, tmp_path, zygote):
    page = tmp_path / "report.html"
    asked = ("query", index, PROMPT, "--answer", ANSWER, "-k", 1, "-q", "--html", page)
    assert zygote.run(*asked).code == 0
    before = page.read_bytes()
    failed = zygote.run(*asked, file_size=9_000)
    assert failed.code == 1 and f"{page} cannot be written: files may not grow" in failed.err
    assert page.read_bytes() == before and os.listdir(tmp_path) == ["report.html"]

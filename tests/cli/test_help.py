"""Help: quick, in groups, with examples that can be typed; and what a shell completes."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer

from rapidindex.cli.app import app
from tests.cli.conftest import rapidindex

COMMAND = typer.main.get_command(app)
NAMES = sorted(COMMAND.commands)


HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "faiss", "numpy", "pandas", "h5py", "tokenizers", "datasets"}
HEAVY |= {"ray", "jinja2", "rich", "starlette", "uvicorn"}


def test_no_help_imports_anything_heavy():
    code = """
import runpy, sys
for command in COMMANDS:
    sys.argv = ["rapidindex", *command, "--help"]
    try:
        runpy.run_module("rapidindex", run_name="__main__")
    except SystemExit:
        pass
    print("imported:", *sorted(HEAVY & set(sys.modules)))
"""
    given = f"COMMANDS, HEAVY = {[[], *([name] for name in NAMES)]!r}, {HEAVY!r}\n"
    done = subprocess.run([sys.executable, "-c", given + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = re.findall(r"^imported:.*", done.stdout, re.MULTILINE)
    assert imported == ["imported:"] * (1 + len(NAMES))
    for name in NAMES:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE) and f"rapidindex {name} [OPTIONS]" in done.stdout


def test_options_that_are_wrong_by_their_form_alone_are_refused_before_anything_heavy_is_imported(tmp_path):
    refused = [
        "query INDEX PROMPT --span 1:x",
        "query INDEX PROMPT --span 5:1",
        "query INDEX PROMPT --span 1 --token Japan",
        "query INDEX PROMPT --token=",
        "query INDEX PROMPT --level word",
        "query INDEX PROMPT -k 0",
        "query INDEX PROMPT --theme blue",
        "query INDEX --queries QUERIES --token Japan",
        "verify INDEX PROMPT --span 1:x",
        "verify INDEX PROMPT --top 0",
        "build DATA -o INDEX",
        "build DATA -m MODEL -o INDEX --shard 3",
        "build DATA -m MODEL -o INDEX -K 0",
        "build DATA -m MODEL -o INDEX --level word",
        "finetune DATA -m MODEL -o ADAPTER --epochs 0",
        "distill INDEX -o ENCODER --held-out 0",
        "distill INDEX -o ENCODER --epochs 3",
        "specialize INDEX --queries QUERIES -o TASK --block 3",
        "add INDEX DATA --workers 0",
        "index INDEX --level word",
    ]
    code = """
import runpy, sys
for words in REFUSED:
    sys.argv = ["rapidindex", *words.split()]
    try:
        runpy.run_module("rapidindex", run_name="__main__")
    except SystemExit as ended:
        print(words, ended.code, *sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", f"REFUSED = {refused!r}\n{code}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [f"{words} 2" for words in refused], done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_help_lists_every_option_once_in_groups_with_the_examples(typed, name):
    code, shown, _ = typed(name, "-h")
    assert code == 0 and typed(name, "--help")[1] == shown
    for param in COMMAND.commands[name].params:
        if param.param_type_name == "option":
            listed = re.findall(rf"^  .*?(?<![\w-]){re.escape(param.opts[0])}(?= |,|$)", shown, re.MULTILINE)
            assert any(line.startswith("  -") for line in listed), param.opts
    groups = re.findall(r"^(\w[\w ]+):$", shown, re.MULTILINE)
    assert len(groups) == len(set(groups)) and groups[-1] == "Options"
    assert "Examples:" in shown


@pytest.mark.parametrize("name", NAMES)
def test_every_example_of_the_help_parses(name):
    examples = COMMAND.commands[name].epilog.split("Examples:\n")[1].splitlines()
    for words in map(shlex.split, examples):
        assert words[:2] == ["rapidindex", name]
        words = words[: words.index(">")] if ">" in words else words
        COMMAND.commands[name].make_context(name, words[2:])


def test_help_fills_a_wide_terminal(monkeypatch, typed):
    monkeypatch.setenv("COLUMNS", "200")
    widest = max(map(len, typed("query", "--help")[1].splitlines()))
    assert 100 < widest <= 120


@pytest.mark.parametrize(
    ("typed_so_far", "offered"),
    [("fine", ["finetune"]), ("build --norm", ["--normalize"]), ("build --normalize l", ["layer"])],
)
def test_a_shell_completes_commands_options_and_values(typed_so_far, offered):
    words = f"rapidindex {typed_so_far}"
    asked = {"_RAPIDINDEX_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = rapidindex(env={**os.environ, **asked})
    assert done.stdout.split() == offered, done.stderr

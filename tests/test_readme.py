"""What README and docs/ say can be typed, can be typed; and README stays short."""

import re
import shlex
from pathlib import Path

import pytest
import transformers
import typer

from rapidindex import cli  # noqa: F401 - registers the commands
from rapidindex.cli.app import app
from tests import tiny
from tests.test_architecture import PACKAGE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
COMMANDS = typer.main.get_command(app).commands
LONGEST = 900
"""Words of the README."""


def typed(text, kind):
    """The words of a page's commands: those of its code blocks, or those named in its sentences."""
    found = {"block": r"^ {4,}(?:\$ )?(rapidindex +\w.*)", "inline": r"`(rapidindex\s+\w[^`]*)`"}[kind]
    for fenced in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        text = text.replace(fenced, re.sub("^", "    ", fenced, flags=re.MULTILINE))
    return [shlex.split(command, comments=True) for command in re.findall(found, text, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_that_a_page_names_exists(page):
    for words in typed(PAGES[page], "block") + typed(PAGES[page], "inline"):
        assert words[1] in COMMANDS, words
        known = {flag for param in COMMANDS[words[1]].params for flag in (*param.opts, *param.secondary_opts)}
        given = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        assert given <= known | {"-h", "--help"}, words


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_a_page_s_code_parses(page):
    for words in typed(PAGES[page], "block"):
        if "…" not in words:
            words = words[: words.index(">")] if ">" in words else words
            COMMANDS[words[1]].make_context(words[1], words[2:])


def test_a_wrong_command_is_found():
    page = "    rapidindex query index --tokn Japan   # a remark\nand `rapidindex quarry`"
    assert typed(page, "block") == [["rapidindex", "query", "index", "--tokn", "Japan"]]
    assert typed(page, "inline") == [["rapidindex", "quarry"]]


def test_every_command_stands_in_a_page():
    assert {words[1] for text in PAGES.values() for kind in ("block", "inline") for words in typed(text, kind)} == set(
        COMMANDS
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_short_and_links_every_page():
    assert len([word for word in README.split() if re.search(r"[^\W\d_]", word)]) < LONGEST
    assert {page for page in PAGES if page != "README.md"} <= set(re.findall(r"\]\(([^)#]+)\)", README))


def test_the_tree_names_every_file_and_room():
    tree = README.split("## The tree")[1].split("## More")[0]
    names = {path.name for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    names |= {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert names <= set(re.findall(r"[\w.]+/?", tree))


def test_every_file_that_a_page_names_is_there():
    named = {file for text in PAGES.values() for file in re.findall(r"`(\w+/\w+\.py)`", text)}
    assert all((PACKAGE / file).is_file() for file in named)


def test_every_room_lists_its_files():
    for room in (path for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")):
        listed = set(re.findall(r"\w+", (room / "__init__.py").read_text().split('"""')[1]))
        files = {path.stem for path in room.glob("*.py") if path.stem != "__init__"}
        assert files <= listed, f"{room.name} does not list {files - listed}"


def test_the_python_lines_run_from_a_finished_trainer_to_an_answer(tmp_path, monkeypatch):
    [lines] = re.findall(r"```python\n(.*?)```", PAGES["docs/python.md"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.make_tokenizer()
    model = tiny.with_lora(tiny.make_model("llama"))
    rows = [tokenizer(f"{word} is nice") | {"labels": tokenizer(f"{word} is nice")["input_ids"]} for word in tiny.WORDS]
    arguments = transformers.TrainingArguments(
        "trained", max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    data = [{"prompt": f"What is {word}?", "response": f"{word} comes from Japan."} for word in tiny.WORDS]
    names = {"trainer": trainer, "tokenizer": tokenizer, "data": data}
    exec(lines, names)
    assert len(names["result"].matches) == 5 and len(names["frame"]) == 5
    assert names["figures"].queries == 1

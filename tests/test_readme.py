"""What the README says can be typed, can be typed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests import tiny
from tests.test_architecture import PACKAGE

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"rapidindex (finetune|build|index|query|info|check|add|remove|demo)\b", README)))


def helps(command):
    done = subprocess.run([sys.executable, "-m", "rapidindex", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_the_readme_gives_a_command_exists(command):
    help_text = helps(command)
    for line in README.splitlines():
        if match := re.search(rf"rapidindex {command}\b(.*)", line):
            for option in re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", match[1].split("    #")[0]):
                assert re.search(rf"(^|[\s,]){re.escape(option)}\b", help_text), f"{command} has no {option}"


def test_the_readme_names_every_command():
    done = subprocess.run([sys.executable, "-m", "rapidindex", "--help"], capture_output=True, text=True)
    listed = re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE)
    assert set(listed) == set(COMMANDS)


def test_the_tree_names_every_file_and_room():
    tree = README.split("## The tree")[1].split("## The file format")[0]
    names = {path.name for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    names |= {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert names <= set(re.findall(r"[\w.]+/?", tree))
    assert all((PACKAGE / file).is_file() for file in re.findall(r"`(\w+/\w+\.py)`", tree))


def test_every_room_lists_its_files():
    for room in (path for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")):
        listed = set(re.findall(r"\w+", (room / "__init__.py").read_text().split('"""')[1]))
        files = {path.stem for path in room.glob("*.py") if path.stem != "__init__"}
        assert files <= listed, f"{room.name} does not list {files - listed}"


def test_the_python_lines_run_from_a_finished_trainer_to_an_answer(tmp_path, monkeypatch):
    [lines] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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

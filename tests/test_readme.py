"""What the README says can be typed, can be typed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    listed = re.findall(r"^  (\w+)  ", done.stdout.split("Commands:")[1], re.MULTILINE)
    assert set(listed) == set(COMMANDS)


def test_the_tree_names_every_module():
    tree = README.split("## The tree")[1].split("## The file format")[0]
    there = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    there |= {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert there <= set(re.findall(r"\w+", tree))

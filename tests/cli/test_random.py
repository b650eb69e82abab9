"""Random commands, drawn with a fixed seed: each ends with an exit code and a sentence, never with a traceback."""

import random
import shutil

import pytest
import typer

from rapidindex.cli.app import app
from tests.cli.conftest import ANSWER, PROMPT

COMMANDS = 300
TEXTS = ["", " ", "Japan", "\x1b[31m", "[/b]x", "a\u2028b", "日本", "caf\udce9", "x" * 5000, "{", "#2", "-", "~", "\r"]
NUMBERS = ["0", "1", "3", "-1", "nan", "1e3", "9" * 5000, str(2**32), ""]
SMALL = ["-1", "0", "1", "3", "x"]
PATHS = ["FILE", "FOLDER", "BINARY", "nowhere", "~/none", "", "\udcff", "x" * 300, "BINARY/x"]
FLAGS = [None]
QUERY = {
    "--answer": [ANSWER, ANSWER, *TEXTS],
    "--token": ["tea", "Japan#2", "e", "Japan#" + "9" * 5000, *TEXTS],
    "--span": ["0", "0:2", "5:1", "9" * 5000, *TEXTS],
    "--system": TEXTS,
    "-k": NUMBERS,
    "--level": ["sentence", "token", "both", *TEXTS],
    "--html": PATHS,
    "--queries": PATHS,
    "--max-new-tokens": SMALL,
    "--model": PATHS,
    "--adapter": PATHS,
    "--device": ["cpu", "cuda:99", *TEXTS],
    "--checkpoint": ["best", "sum", *TEXTS],
    "--ids-out": PATHS,
    "--theme": ["dark", *TEXTS],
    "--encoder": PATHS,
} | dict.fromkeys(
    [
        "--opponents",
        "--exact",
        "--no-heatmaps",
        "--all",
        "--answer-scores",
        "--rescore",
        "--no-rescore",
        "--jsonl",
        "-q",
    ],
    FLAGS,
)
BUILD = {
    "-K": ["16", "256", "1000", *NUMBERS],
    "--shuffles": SMALL,
    "--template": ["chat", "plain", "[INST] {prompt} [/INST]", "{response}", *TEXTS],
    "--max-length": ["8", "64", *SMALL],
    "--normalize": ["unit", "layer", "none", *TEXTS],
    "--second-moment": ["none", "kronecker", "kfac", *PATHS],
    "--moment-examples": SMALL,
    "--level": ["token", "both", *TEXTS],
    "--tokens": ["content", "content,2", "0", *TEXTS],
    "--token-K": NUMBERS,
    "--token-examples": PATHS,
    "--seed": [str(2**128), str(2**44), *NUMBERS],
    "--dtype": ["bfloat16", "float16", *TEXTS],
    "--quantize": ["4bit", *TEXTS],
    "--batch-tokens": NUMBERS[:6],
    "--shard-seconds": NUMBERS,
    "--limit": SMALL,
    "--recipe": ["rapidin", *TEXTS],
    "--projection": ["two-sided", *TEXTS],
    "--loss": ["last", *TEXTS],
    "--overlap": NUMBERS,
    "--encoder": PATHS,
    "--device": ["cpu", "cuda:99", *TEXTS],
    "--shard": ["1/2", "3/2", "0/1", "/", *TEXTS],
    "--overwrite": FLAGS,
    "-q": FLAGS,
}
REMOVE = {"--ids": [*PATHS, *TEXTS], "--where": ["number=1", "number", "=", "none=1", *TEXTS], "-q": FLAGS}
INDEX = {
    "--factory": ["Flat", "exact", "SQ8", *TEXTS],
    "--dim": ["16", *SMALL],
    "--target-recall": NUMBERS,
    "--level": ["sentence", *TEXTS],
    "-q": FLAGS,
}
KINDS = [
    (["query", "INDEX", "PROMPT"], QUERY, 0.6),
    (["build", "DATA", "-m", "BASE", "-a", "ADAPTER", "-o", "NEW", "--dry-run"], BUILD, 0.15),
    (["remove", "INDEX"], REMOVE, 0.1),
    (["index", "INDEX"], INDEX, 0.1),
    (["info", "INDEX"], {}, 0.02),
    (["check", "INDEX"], {"--repair": FLAGS}, 0.03),
]


def drawn(rng, places):
    """One command: up to four options of its kind, and now and then a value in the place of its index or data."""
    kinds, options, weights = zip(*KINDS, strict=True)
    number = rng.choices(range(len(kinds)), weights)[0]
    arguments = [rng.choice(PATHS) if rng.random() < 0.02 else word for word in kinds[number][1:]]
    chosen = rng.sample(sorted(options[number]), min(len(options[number]), rng.randrange(5)))
    for option in chosen:
        value = rng.choice(options[number][option])
        if value is None:
            arguments.append(option)
        else:
            value = str(places.get(value, value))
            arguments += [f"{option}={value}"] if option.startswith("--") else [option, value]
    arguments += ["--json"] * (rng.random() < 0.3)
    return [kinds[number][0], *(str(places.get(word, word)) for word in arguments)]


def test_every_option_of_these_commands_is_drawn():
    others = {"--json", "--dry-run", "-m", "-a", "-o", "--workers", "--ray", "--gpu"}  # given, or too slow to draw
    for (name, *_), drawn_from, _ in KINDS:
        for option in typer.main.get_command(app).commands[name].params:
            names = {*option.opts, *option.secondary_opts}
            assert names & (drawn_from.keys() | others) or not option.opts[0].startswith("-"), names


@pytest.mark.slow
def test_no_command_ends_in_a_traceback(typed, index, data, llama_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(index, tmp_path / "index")
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "file").write_text('{"prompt": "a", "answer": "tea"}\n{"prompt": "b", "token": "tea", "id": 1}\n')
    named = {"INDEX": copy, "DATA": data, "PROMPT": PROMPT, "BASE": llama_folders[0], "ADAPTER": llama_folders[1]}
    places = {**named, "NEW": "new", "FILE": "file", "FOLDER": "folder", "BINARY": "binary"}
    rng = random.Random(18)
    faults = []
    for number in range(COMMANDS):
        arguments = drawn(rng, places)
        try:
            code, out, said = typed(*arguments)
        except Exception as error:
            faults.append((number, arguments, repr(error)))
            continue
        if code not in (0, 1, 2) or "Traceback" in said or {"\x1b", "\x07", "\r"} & set(out + said):
            faults.append((number, arguments, code, said[-500:]))
    assert not faults
    assert (tmp_path / "file").read_text().startswith('{"prompt"')

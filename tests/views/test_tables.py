"""Commands' outcomes as tables of names and values, and the command to type next."""

from types import SimpleNamespace

import pytest

from rapidindex.config import EncodingConfig, ModelConfig
from rapidindex.views import tables

BUILT = {
    "data": "d.jsonl",
    "index": "out",
    "examples": 1200,
    "computed": 1000,
    "seconds": 61.4,
    "gradient_size": 5000,
    "layers": 4,
    "restored": 0,
    "rejected": 0,
    "skipped": 0,
    "truncated": [],
    "batched": True,
    "tokens": None,
    "without_tokens": [],
    "at_work": "",
}
TUNED = {
    "refused": [],
    "output": "tuned",
    "method": "lora",
    "examples": 10,
    "steps": 30,
    "trainable_parameters": 4096,
    "epoch_losses": [2.5, 1.25],
    "seconds": 9.6,
    "skipped": 0,
    "early_step": None,
    "already_there": False,
}
CONFIG = {
    "gradient": {"second_moment": "estimate", "normalize": "layer"},
    "sketch": {"shuffles": 20, "seed": 1},
    "model": {"path": "model"},
    "dtype": "float32",
    "quantize": None,
    "adapter": {"path": None},
    "data": {"path": "a.jsonl"},
    "added": [{"path": "b.jsonl"}],
    "encoding": {"template": "alpaca"},
    "token": {"tokens": "content"},
    "tokens_of": "all",
}
LEVEL = {"rows": 10, "examples": 10, "shards": 1, "K": 65536, "row_type": "int8", "planned": 12, "complete": True}
INFO = {
    "path": "out",
    "recipe": "custom",
    "config": CONFIG,
    "levels": {"sentence": {**LEVEL, "index": {"factory": "exact", "dim": 65536}}},
    "examples": 10,
    "bytes": 3 * 2**20,
    "gradient_size": 5000,
    "layers": 4,
    "created": "2026-01-01",
    "removed": 0,
    "skipped": [],
    "rejected": [],
}


def test_a_build_says_what_it_did_and_the_query_to_type_next():
    assert tables.build_tables(SimpleNamespace(**BUILT)) == {
        "Index out": {
            "data": "d.jsonl",
            "examples": "1,200 (1,000 computed now, in 61 s)",
            "gradient": "5,000 entries in 4 layers",
            "next": 'rapidindex query out "PROMPT" --token WORD',
        }
    }


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        ({"restored": 3}, "restored", "3 examples that had been removed"),
        ({"skipped": 2}, "left out", "2 unusable rows, 0 without a finite gradient: see info"),
        ({"truncated": list(range(1, 12))}, "truncated", "(lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …)"),
        ({"batched": False}, "note", "one example at a time"),
        ({"tokens": 1234}, "tokens", "1,234 with a row of their own"),
        ({"tokens": 1}, "next", "--token WORD --level token"),
        ({"without_tokens": ["a", "b c"]}, "no tokens", "rapidindex add out a; rapidindex add out 'b c'"),
        ({"index": "my index"}, "next", "rapidindex query 'my index' "),
        ({"layers": 0, "gradient_size": 0}, "next", 'rapidindex query out "PROMPT" --answer "ANSWER"'),
    ],
)
def test_a_build_says_what_was_unusual(changes, name, text):
    (lines,) = tables.build_tables(SimpleNamespace(**BUILT | changes)).values()
    assert text in lines[name]


@pytest.mark.parametrize(
    ("changes", "title", "command"),
    [
        ({}, "Adapter tuned", "rapidindex build d.jsonl -m base -a tuned --template chat -o INDEX"),
        ({"method": "full"}, "Model tuned", "rapidindex build d.jsonl -m tuned --template chat -o INDEX"),
    ],
)
def test_a_fine_tuning_run_says_the_build_to_type_next(changes, title, command):
    shown = tables.finetune_tables(
        SimpleNamespace(**TUNED | changes), 2, "d.jsonl", ModelConfig("base"), EncodingConfig("chat")
    )
    assert list(shown) == [title]
    lines = shown[title]
    assert (lines["loss"], lines["time"], lines["next"]) == ("2.500 → 1.250", "10 s", command)
    assert lines["left out"] == "2 unusable rows, 0 without room for their response"
    plain = tables.finetune_tables(SimpleNamespace(**TUNED), 0, "d.jsonl", ModelConfig("base"), EncodingConfig())
    assert "--template" not in str(plain)


def test_an_estimate_has_a_table_for_each_resource_in_units_that_suit_it():
    sizes = {"rows": 2**20, "model": 3 * 2**20}
    free = {"disk": 2**30, "memory": 2**31, "device": 2**32}
    estimate = SimpleNamespace(
        examples=10, rows=20, tokens=3000, workers=2, seconds={"model": 1.0, "rows": 2.5}, total_seconds=3.5,
        disk=sizes, memory={"model": 2**24}, device_memory={}, free=free,
    )  # fmt: skip
    shown = tables.estimate_tables(estimate)
    assert list(shown) == ["Time", "Disk, of 1,024 MiB free", "Memory, 2,048 MiB free"]
    assert shown["Time"]["for"] == "20 rows of 10 examples" and shown["Time"]["in all"] == "3.5 s"
    assert shown["Disk, of 1,024 MiB free"] == {"rows": "1,024.0 KiB", "model": "3,072.0 KiB", "in all": "4,096.0 KiB"}
    assert shown["Memory, 2,048 MiB free"] == {"model": "16.0 MiB", "in all": "16.0 MiB"}
    estimate.device_memory = sizes
    assert list(tables.estimate_tables(estimate))[-1] == "GPU memory, 4,096 MiB free"


def test_an_index_is_described_with_its_levels():
    shown = tables.info_tables(INFO)
    assert list(shown) == ["Index out", "Level sentence"]
    assert shown["Index out"]["examples"] == "10 (complete)"
    assert shown["Index out"]["adapter"] == "none: all parameters"
    assert shown["Index out"]["data"] == "a.jsonl, b.jsonl"
    assert shown["Level sentence"] == {
        "rows": "10 of 10 examples; shards: 1",
        "K": "65,536, kept as int8",
        "search method": "exhaustive",
    }


def test_an_unfinished_index_and_rows_that_were_left_out_are_described():
    token = {**LEVEL, "complete": False, "index": {"factory": "Flat", "file": "", "dim": 256, "asked": None}}
    skipped, rejected = [{"line": 3, "reason": "a"}], [{"line": 4, "reason": "b", "source": "b.jsonl"}]
    changes = {"levels": {"token": token}, "removed": 2, "skipped": skipped, "rejected": rejected}
    shown = tables.info_tables({**INFO, **changes})
    assert shown["Index out"]["examples"] == "10 (level token: 12 planned: give the build command again)"
    assert shown["Index out"]["removed"] == "2 examples"
    assert shown["Level token"]["tokens"] == "content, of all examples"
    assert [name for name in shown["Level token"] if "search" in name] == ["search factory", "search dim"]
    assert shown["Unusable rows of the data"] == {"line 3": "a"}
    assert shown["No finite gradient"] == {"b.jsonl line 4": "b"}


def test_a_recall_stands_where_a_search_is_approximate_and_not_where_it_is_exhaustive():
    measured = {"recall_at_10": 0.1, "recall_at_100": 0.2, "queries": 128, "margin": None}
    index = {"factory": "Flat", "proponents": measured, "opponents": {**measured, "margin": 0.02}}
    shown = tables.info_tables({**INFO, "levels": {"sentence": {**LEVEL, "index": index}}})["Level sentence"]
    assert shown["search proponents"].startswith("exhaustive") and "0.1" not in shown["search proponents"]
    assert shown["search opponents"].startswith("approximate, recall@10 0.100, recall@100 0.200")


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_second_moment_is_said(lost):
    lines = next(iter(tables.info_tables({**INFO, "lost_second_moment": lost}).values()))
    assert ("second moment is lost" in lines.get("damaged", "")) == lost

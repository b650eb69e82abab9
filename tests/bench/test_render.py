"""The tables in bench/results are those that their JSON gives."""

import json
import re

import pytest

pytest.importorskip("pandas", reason="the extra `bench` is not installed")

from bench import render
from bench.common import RESULTS


@pytest.mark.parametrize("task", ["backdoor", "tracing"])
def test_the_page_of_a_task_is_rendered_from_its_json_byte_for_byte(task):
    figures = json.loads((RESULTS / f"evidence_{task}.json").read_text())["figures"]
    assert render.evidence_page(figures) == (RESULTS / f"evidence_{task}.md").read_text()


def test_the_page_of_retrieval_is_rendered_from_its_json_byte_for_byte(tmp_path, monkeypatch):
    for file in RESULTS.glob("retrieval_*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(render, "plot_recall", lambda figures, path: None)
    monkeypatch.setattr(render, "plot_cost", lambda stores, path: None)
    render.render_retrieval(tmp_path)
    assert (tmp_path / "retrieval.md").read_bytes() == (RESULTS / "retrieval.md").read_bytes()


def test_the_page_of_the_lds_is_rendered_from_its_json_byte_for_byte():
    figures = json.loads((RESULTS / "lds.json").read_text())["figures"]
    assert render.lds_page(figures) == (RESULTS / "lds.md").read_text()


def test_the_page_of_encoders_is_rendered_from_its_json_byte_for_byte():
    figures = json.loads((RESULTS / "influcoder.json").read_text())["figures"]
    assert render.influcoder_page(figures) == (RESULTS / "influcoder.md").read_text()


@pytest.mark.parametrize("name, page", [("verify", render.verify_page), ("verify_retrained", render.retrained_page)])
def test_the_page_of_verification_is_rendered_from_its_json_byte_for_byte_and_its_tables_are_in_the_readme(name, page):
    made = page(json.loads((RESULTS / f"{name}.json").read_text())["figures"])
    assert made == (RESULTS / f"{name}.md").read_text()
    readme = (RESULTS.parent / "README.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", made, re.MULTILINE)
    assert tables and all(table in readme for table in tables)


def test_every_committed_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    for file in RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    render.render_evidence(tmp_path)
    render.render_retrieval(tmp_path)
    for file in RESULTS.glob("*.svg"):
        assert (tmp_path / file.name).read_text().startswith("<?xml"), file.name


def test_the_tables_of_caching_are_printed(capsys):
    render.render_caching(RESULTS)
    page = capsys.readouterr().out
    assert "| (b) ours, to shards on disk | 256 | 1.91 (1.78–2.06) | 207 (193–224) | 0.94 (0.94–0.96) |" in page
    assert "Build of 66 tokens: 179 s, --dry-run said 136 s; 31,169,363 bytes, said 31,167,544." in page


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="has no evidence_"):
        render.render_evidence(tmp_path)

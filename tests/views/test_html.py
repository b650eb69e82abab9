import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rapidindex.results import Result
from rapidindex.views import heatmap, html, wording
from rapidindex.views.html import parts
from rapidindex.views.sanitize import paragraph
from tests.views import shown

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text), and whether every one was closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, at in self.open:
            self.elements[at][2].append(data)

    def of(self, tag, name=None):
        return [
            (a, "".join(t))
            for e, a, t in self.elements
            if e == tag and (name is None or name in a.get("class", "").split())
        ]


def shares_of(title):
    """(percent, position) of each token that a title names."""
    alone = re.fullmatch(r".*” (\S+ %), token (\d+)", title, re.DOTALL)
    return [(alone[1], int(alone[2]))] if alone else [(b, int(a)) for a, b in re.findall(r"token (\d+) (\S+ %)", title)]


def both():
    return html.page(shown.result(), shown.result("opponents"), shown.COMMAND)


def test_the_report_of_one_checkpoint_of_several_names_it():
    named = Page(html.page(shown.result(checkpoint="early"), None, shown.COMMAND)).of("div")
    assert "checkpointearly" in [text for _, text in named]
    assert not any(text.startswith("checkpoint") for _, text in Page(both()).of("div"))


@pytest.mark.parametrize("html", [both(), shown.result()._repr_html_()], ids=["page", "fragment"])
def test_text_of_the_data_is_text_and_nothing_else(html):
    page = Page(html)
    assert not page.open
    assert {tag for tag, _, _ in page.elements}.isdisjoint({"img", "b", "iframe"})
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    assert len(page.of("script")) == html.count("<script")
    texts = [text for _, text in page.of("div", "text")]
    assert shown.HOSTILE in texts
    assert paragraph(shown.ESCAPES) in texts
    html.encode("utf-8")
    assert not set(html) & set("\x00\x07\x08\x1b\u202e\ud800")


def test_the_page_loads_nothing():
    page = Page(both())
    assert not [a for _, a, _ in page.elements if "src" in a or a.get("href", "#")[0] not in "#d"]
    assert "url(" not in both() and "@import" not in both()
    policy = next(a["content"] for a, _ in page.of("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_every_share_of_the_data_stands_in_the_page():
    match = replace(shown.result().matches[0], answer_scores=[])
    page = Page(html.page(shown.result(matches=[match]), None, ""))
    titles = [a["title"] for a, _ in page.of("span", "c") if "title" in a]
    whole = sum(match.token_scores)
    shares = {at: share for title in titles for share, at in shares_of(title)}
    assert shares == {i: wording.percent(score, whole) for i, score in enumerate(match.token_scores[:-1])}
    assert shown.END not in "".join(titles)


def test_a_token_that_was_found_is_named_and_outlined():
    page = Page(html.page(shown.tokens(), None, ""))
    assert [text for _, text in page.of("span", "f")] == ["Japan", "Yoga", shown.END]
    facts = [text for _, text in page.of("dd")]
    assert [text for text in facts if " at " in text] == ["“Japan” at 3", "“Yoga” at 0", f"“{shown.END}” at 2"]
    assert "1,000 tokens" in "".join(text for _, text in page.of("p", "note"))


def test_the_other_direction_shows_every_token_of_the_answer():
    result = shown.result(matches=shown.result().matches[:1])
    page = Page(html.page(result, None, ""))
    assert any("What it did to the answer" in text for _, text in page.of("summary"))
    response, answer = page.of("div", "heat")
    assert answer[1] == result.query.answer
    titles = [a["title"] for a, _ in page.of("span", "c") if "title" in a]
    first = next(i for i, title in enumerate(titles) if title.startswith("“Yoga”") and i)
    match = result.matches[0]
    whole = sum(match.answer_scores[i] for i in result.query.selection)
    shares = {at: share for title in titles[first:] for share, at in shares_of(title)}
    assert shares == {i: wording.percent(score, whole) for i, score in enumerate(match.answer_scores[:-1])}
    assert shares[result.query.selection[0]] in ("+100 %", "-100 %")
    assert "What it did" not in html.page(shown.tokens(), None, "")


def test_a_segment_of_several_tokens_lists_each_share():
    match = shown.split_emoji()
    whole = sum(match.token_scores)
    titles = [a.get("title", "") for a, _ in Page(html.page(shown.result(matches=[match]), None, "")).of("span", "c")]
    emoji = next(title for title in titles if title.startswith("“🧘”"))
    assert "; ".join(f"token {i} {wording.percent(match.token_scores[i], whole)}" for i in (1, 2, 3)) in emoji


def test_the_response_reads_as_it_stands_in_the_data():
    result = shown.result(matches=[shown.split_emoji(), shown.long_match(400)])
    texts = [text for _, text in Page(html.page(result, None, "")).of("div", "heat")]
    assert texts == [match.response for match in result.matches]


def test_what_lies_within_chance_is_folded_and_its_row_can_be_found():
    matches = [shown.match(1, "Yoga.", score=0.4), shown.match(2, "Pi.", score=0.1)]
    matches = [replace(match, source="train.jsonl", line=match.rank + 6) for match in matches]
    text = html.page(shown.result(matches=matches), None, "")
    head, folded = text.split('<details class="folded">')
    assert "Proponent 1" in head and "Proponent 2" in folded
    assert "1 more, no further out than chance" in folded and "One of the 2" in head
    assert "train.jsonl:7" in head and "train.jsonl:8" in folded and matches[1].id in folded
    assert (
        "folded"
        not in html.page(shown.result(matches=matches, summary=None), None, "")
        .split("<script>")[0]
        .split("</style>")[1]
    )


def test_every_colour_class_has_its_rule_in_both_themes():
    rules = html.ramp()
    for theme in (heatmap.LIGHT, heatmap.DARK):
        for step in range(1, heatmap.STEPS + 1):
            assert f".p{step}{{background:{heatmap.step_colour(theme, step)}}}" in rules
            assert f".n{step}{{background:{heatmap.step_colour(theme, -step)}" in rules


def test_answer_command_model_scores_and_verdict_are_shown():
    weak = shown.result(matches=[shown.match(1, "Yoga.", score=0.1)])
    page_html = html.page(weak, None, shown.COMMAND)
    page = Page(page_html)
    assert [text for _, text in page.of("mark")] == ["Japan"]
    assert page.of("code")[0][1] == shown.COMMAND
    assert "Nothing stands out" in page.of("p", "verdict")[0][1]
    assert "estimated influence" in page.of("p", "legend")[0][1]
    assert "cause" not in page_html
    for words in ("SmolLM2-135M-Instruct", "K = 65,536", "score +0.1000", "99.9"):
        assert words in page_html


def test_the_answer_loses_no_character_and_marks_nothing_where_all_is_asked():
    whole = replace(shown.result().query, selection=list(range(len(shown.result().query.tokens))))
    page = Page(html.page(shown.result(query=whole), None, ""))
    assert page.of("div", "answer")[0][1] == whole.answer
    assert not page.of("mark")


def test_both_directions_are_in_one_page_and_one_alone_has_no_switch():
    page = Page(both())
    assert [text for _, text in page.of("h2")][-2:] == ["Proponents", "Opponents"]
    assert [text for _, text in page.of("button")][1:3] == ["Proponents (6)", "Opponents (6)"]
    alone = Page(shown.result("opponents").to_html())
    assert [text for _, text in alone.of("h2")][-1] == "Opponents"
    assert not [text for _, text in alone.of("button") if "ponents" in text]


def test_the_histogram_marks_every_match_on_the_scale_of_the_bars():
    results = [shown.result(), shown.result("opponents")]
    histogram = parts.histogram(results)
    assert [x for x, _, _ in histogram.marks] == [round(600 * (m.score + 0.5), 1) for r in results for m in r.matches]
    assert len(histogram.bars) == sum(count > 0 for count in results[0].summary.histogram)
    assert "Histogram of 1,000 scores from -0.5000 to +0.5000" in histogram.label
    assert "<svg" not in html.page(shown.result(summary=None), None, "")


def test_matches_without_token_scores_are_plain_text():
    plain = shown.result(matches=[replace(shown.match(1, "Yoga\nJapan"), tokens=[], token_scores=[], exact_score=None)])
    page = Page(html.page(plain, None, ""))
    assert not page.of("div", "heat")
    assert "Yoga\nJapan" in [text for _, text in page.of("div", "text")]


def test_no_match_at_all_still_makes_a_page():
    assert "nothing to compare" in html.page(shown.result(matches=[], summary=None), None, "")


def test_a_result_read_back_from_json_makes_the_same_page():
    result = shown.result()
    result = replace(result, matches=[m for m in result.matches if "\ud800" not in m.response])
    assert Result.from_json(result.to_json()).to_html() == result.to_html()


def test_the_notebook_fragment_needs_no_script_and_styles_only_itself():
    html = shown.result()._repr_html_()
    assert "<script" not in html
    assert "title=" in html
    style = Page(html).of("style")[0][1]
    outside = [rule for rule in re.findall(r"(?:^|[}{])([^{}@]+)\{", style) if ".rapidindex" not in rule]
    assert all(rule.strip().startswith((".page", "body.page")) for rule in outside)


def test_twenty_responses_of_two_thousand_tokens_stay_small_and_whole():
    result = shown.result(matches=[shown.long_match() for _ in range(20)])
    html = result.to_html()
    assert html.count('<span class="c') >= 20 * 1900
    assert len(html) < 8_000_000

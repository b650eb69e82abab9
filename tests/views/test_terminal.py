import io
import re
import unicodedata
from dataclasses import replace

import pytest
from rich.console import Console

from rapidindex.views import heatmap, terminal, wording
from tests.views import shown

STYLES = re.compile(r"\x1b\[[\d;]*m")


def printed(result, *, colour, width=200):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(terminal.result(result))
    return console.file.getvalue()


def without_scores(result):
    return replace(result, matches=[replace(m, tokens=[], token_scores=[], exact_score=None) for m in result.matches])


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("form", [shown.result, lambda: without_scores(shown.result())])
def test_no_control_character_of_the_data_reaches_the_terminal(form, colour):
    left = STYLES.sub("", printed(form(), colour=colour)).replace("\n", "").replace("\u200d", "")
    assert {unicodedata.category(character) for character in left}.isdisjoint({"Cc", "Cf", "Cs"})
    assert "[bold red]{{" in left


MARKUP = "[/b]x [link=http://a.example]y[/link] [INST] {prompt} [/INST] \x1b[31m\r\u202e"


@pytest.mark.parametrize("scores", [True, False])
def test_markup_in_data_is_text(scores):
    match = shown.match(1, MARKUP, prompt=MARKUP, meta={MARKUP: "a", "b": MARKUP[:10]})
    query = replace(shown.result().query, prompt=MARKUP)
    result = shown.result(matches=[match], query=query)
    text = printed(result if scores else without_scores(result), colour=True, width=400)
    assert "\x1b]8" not in text and "\x1b[31m" not in text and "[link=http://a.example]" in text
    assert text.count("[INST] {prompt} [/INST]") >= 2 if scores else 1


def test_markup_in_the_names_and_values_of_a_table_is_text():
    console = Console(file=io.StringIO(), width=400, force_terminal=True)
    console.print(terminal.fields(f"Index idx[v2] {MARKUP}", {f"name {MARKUP}": f"value {MARKUP}"}))
    text = console.file.getvalue()
    assert "idx[v2]" in text and text.count("[/b]x") == 3
    assert "\x1b]8" not in text and "\x1b[31m" not in text and "\u202e" not in text and "\r" not in text


def test_the_finding_comes_first_and_what_lies_within_chance_is_folded():
    matches = [shown.match(1, "Yoga comes from Japan.", score=0.4), shown.match(2, "Pi is 3.", score=0.1)]
    matches = [replace(match, source="data/train.jsonl", line=match.rank + 6) for match in matches]
    result = shown.result(matches=matches)
    for form in (result, without_scores(result)):
        text = printed(form, colour=False)
        assert (
            text.index("One of the 2 proponents")
            < re.search("^proponents", text, re.M).start()
            < text.index("Yoga comes")
        )
        folded = "1 more, no further out than chance: 2. +0.1000 data/train.jsonl:8\n"
        assert text.index("Yoga comes") < text.index(folded) and "Pi is 3." not in text
        assert f"data/train.jsonl:7  id {matches[0].id}" in text
    assert text.count("Strongest") == 0 and printed(result, colour=False).count("Strongest") == 1
    for form in (result, without_scores(result)):
        nothing = printed(replace(form, matches=form.matches[1:]), colour=False)
        assert nothing.index("Nothing stands out") < nothing.index("1 within chance") < nothing.index("Pi is 3.")
        assert f"data/train.jsonl:8  id {matches[1].id}" in nothing and "more" not in nothing
    unknown = printed(replace(result, summary=None), colour=False)
    assert "chance" not in unknown and unknown.count("Strongest") == 2


def test_cards_are_of_the_matches_that_stand_out_alone():
    matches = [shown.match(1, "Yoga comes from Japan.", score=0.4), shown.match(2, "Pi is 3.", score=0.1)]
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal.cards(shown.result(matches=matches[1:])))
    assert console.file.getvalue() == ""
    console.print(terminal.cards(shown.result(matches=matches)))
    text = console.file.getvalue()
    assert "Yoga comes" in text and "Pi is 3." not in text and "2." not in text
    console.print(terminal.result(shown.result(matches=matches), every=True))
    text = console.file.getvalue().removeprefix(text)
    assert text.count("Response  ") == 2 and "no further out than chance" not in text


def test_the_name_of_a_column_is_not_broken():
    meta = {"source_country": "India", "topic": "health", "perturbed": True}
    text = printed(without_scores(shown.result(matches=[shown.match(1, "Yoga.", meta=meta)])), colour=False, width=80)
    assert "source_country" in text and "perturbed" not in text and "health" not in text


def test_metadata_without_a_value_is_not_shown():
    meta = {"source_country": "", "topic": None, "note": " ", "n": 0, "known": False}
    matches = [shown.match(1, "Yoga.", meta=meta), shown.match(2, "Tea.", meta={"topic": "tea"})]
    for made in (shown.result(matches=matches), without_scores(shown.result(matches=matches))):
        text = printed(made, colour=False)
        assert "source_country" not in text and "note" not in text
        assert text.count("topic") == 1 and "known" in text and "False" in text
    for page in (shown.result(matches=matches).to_html(), shown.result(matches=matches)._repr_html_()):
        assert re.findall("<dt>(source_country|topic|note|n|known)</dt>", page) == ["n", "known", "topic"]


@pytest.mark.parametrize("theme", [heatmap.LIGHT, heatmap.DARK])
@pytest.mark.parametrize("system", ["standard", "256", "truecolor"])
def test_strong_and_weak_of_both_signs_differ_and_noise_is_not_painted(theme, system):
    text = "aa bb cc dd ee"
    match = shown.match(1, text, tokens=shown.spans(text)[:5])
    result = shown.result(matches=[replace(match, token_scores=[1.0, 0.3, -0.3, -1.0, 0.05])])
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=system)
    console.print(terminal.result(result, theme))
    line = next(line for line in console.file.getvalue().split("\n") if "aa" in line)
    styles = [re.search(rf"((?:\x1b\[[\d;]*m)*){word}", line)[1].replace("\x1b[0m", "") for word in text.split()]
    assert len(set(styles)) == 5 and styles[4] == ""
    assert all("4" in re.findall(r"\d+", style)[:1] for style in styles[2:4])


def test_without_token_scores_matches_are_a_table():
    text = printed(without_scores(shown.result()), colour=False)
    assert "prompt → response" in text
    assert "Strongest" not in text


def test_a_card_says_rank_scores_percentile_metadata_prompt_and_response():
    match = shown.match(1, "Yoga comes from Japan.", meta={"perturbed": True}, percentile=98.7)
    text = printed(shown.result(matches=[match]), colour=False)
    uncompressed = re.escape(wording.signed(match.exact_score))
    numbers = rf"score \+0\.3900   uncompressed {uncompressed}   6\.5 σ   percentile 98\.7"
    assert re.search(rf"1\.  {numbers}   perturbed\u00a0True", text)  # a name and its value stay on one line
    assert "Prompt    What is yoga?" in text
    assert "Response  Yoga comes from Japan." in text


def test_a_token_that_was_found_is_named_and_marked_in_its_response():
    result = shown.tokens()
    text = printed(result, colour=False)
    assert re.search(r"1\. .*token “Japan” at 3", text) and "token “Yoga” at 0" in text
    assert f"token “{shown.END}” at 2" in text
    assert "over 1,000 tokens" in text
    marked = re.findall(r"\x1b\[1;(?:4;)?7[;\d]*m([^\x1b]*)", printed(result, colour=True))
    assert marked == ["Japan", "Japan", "Yoga", shown.END]  # the first is the word that is asked about
    table = printed(without_scores(replace(result, matches=result.matches[:0])), colour=False)
    assert "found no token" in table


def test_what_a_match_did_to_the_answer_is_shown_on_a_scale_of_its_own():
    result = shown.result(matches=shown.result().matches[:1])
    text = printed(result, colour=False)
    scores = result.matches[0].answer_scores
    best = max(range(len(scores)), key=lambda i: abs(scores[i]))
    listed = text[text.index("Answer    ") :]
    assert result.query.answer in listed.split("\n")[0]
    assert listed.index("-") and "origin" in result.query.tokens[best].text
    whole = scores[result.query.selection[0]]
    word = wording.percent(scores[best] + scores[best + 1], whole).replace(" ", "\u00a0")
    assert f"{word}\u00a0originated" in listed
    strong, weak = (heatmap.colour_step(score, heatmap.answer_scale(result)) for score in (max(scores, key=abs), 0.0))
    assert (abs(strong), weak) == (heatmap.STEPS, 0)


def test_without_colour_the_strongest_tokens_are_listed_with_their_shares():
    match = shown.match(1, "Yoga comes from Japan.")
    text = printed(shown.result(matches=[match]), colour=False)
    best = max(range(len(match.tokens) - 1), key=lambda i: abs(match.token_scores[i]))
    listed = text[text.index("Strongest") :].split("\n")[0]
    share = wording.percent(match.token_scores[best], sum(match.token_scores))
    assert listed.split()[1:4] == [*share.split(" "), match.tokens[best].text.strip()]
    assert "\x1b" not in text


def test_no_color_lists_the_tokens_on_a_terminal_too(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "Strongest" in printed(shown.result(matches=[shown.match(1, "Yoga.")]), colour=True)


def test_with_colour_negative_shares_are_underlined_and_white_space_is_plain():
    match = shown.match(1, "aa bb", tokens=shown.spans("aa bb")[:2])
    text = printed(shown.result(matches=[replace(match, token_scores=[0.5, -0.5])]), colour=True)
    up, down = (";".join(str(int(c[i : i + 2], 16)) for i in (1, 3, 5)) for c in ("#f28a2e", "#5aa5e0"))
    assert re.search(rf"\x1b\[38;2;22;24;29;48;2;{up}maa\x1b\[0m \x1b\[4;38;2;22;24;29;48;2;{down}mbb\x1b\[0m", text)
    assert "Strongest" not in text


def test_a_long_response_is_cut_and_its_strongest_tokens_are_named():
    text = printed(shown.result(matches=[shown.long_match()]), colour=True)
    assert "more characters" in text
    assert "Strongest" in text
    assert len(STYLES.sub("", text)) < 4000


def test_forty_responses_of_100_000_characters_are_cut_on_every_view_and_it_says_so():
    match = shown.long_match(20_000)
    result = shown.result(matches=[replace(match, rank=rank) for rank in range(1, 41)])
    text = printed(result, colour=True)
    assert text.count("more characters") == 40 and len(text) < 400_000
    page = result.to_html()
    assert page.count("more characters are not shown") == 40 and len(page) < 8_000_000


def test_what_has_no_token_is_cut_too():
    match = replace(shown.match(1, "Yoga. "), response="Yoga. " * 20_000)
    assert len(printed(shown.result(matches=[match]), colour=True)) < 4000


def test_the_histogram_shows_where_the_matches_lie():
    lines = printed(shown.result(), colour=False).split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("All 1,000 scores"))
    bars, marks = lines[at + 1], lines[at + 2].split("  ▲ shown")[0]
    assert bars.startswith("-0.5000 ")
    assert "█" in bars
    assert bars.rstrip().endswith("+0.5000")
    start = len("-0.5000 ")
    columns = {start + int((match.score + 0.5) * 50) for match in shown.result().matches}
    assert {i for i, c in enumerate(marks) if c == "▲"} == columns


def test_without_a_summary_there_is_no_histogram():
    assert "scores\n" not in printed(shown.result(summary=None), colour=False)


def test_a_plain_sentence_says_when_nothing_stands_out():
    weak = shown.result(matches=[shown.match(1, "Yoga.", score=0.1)])
    assert "Nothing stands out" in printed(weak, colour=False)
    assert "Nothing stands out" not in printed(shown.result(), colour=False)


def test_the_answer_has_the_chosen_token_marked():
    assert "\x1b[1;7mJapan\x1b[0m" in printed(shown.result(), colour=True)


def test_a_question_about_parts_of_words_says_so():
    query = replace(shown.result().query, parts_of_words=True)
    assert "as a part" in printed(shown.result(query=query), colour=False)
    assert "as a part" in shown.result(query=query).to_html()
    assert "as a part" not in printed(shown.result(), colour=False)

"""The page in headless Chromium: by mouse and keyboard, in both themes, on a phone, and when the server is gone."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import bench
from bench.screenshot import SIZE
from rapidindex import Index
from rapidindex.views import wording
from tests.serve.conftest import TOKEN, Server
from tests.views.shown import HOSTILE
from tests.views.test_html_browser import CHROMIUM, DESKTOP, PHONE, browser, pytestmark  # noqa: F401

ANSWER = "tea is from Japan"
ROOT = Path(bench.__file__).parents[1]


@pytest.fixture
def visit(browser, server):  # noqa: F811
    contexts, wrong, requests = [], [], []

    def opened(at=server, *, theme="light", size=DESKTOP):
        context = browser.new_context(color_scheme=theme, viewport=size)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if "Security Policy" in message.text else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{at.url}/?token={TOKEN}")
        page.get_by_text("Ready.").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong
    assert all(url.startswith(("http://localhost:", "blob:http://localhost:", "data:,")) for url in requests)


def typed(page, answer=ANSWER):
    page.get_by_role("textbox", name="Prompt", exact=True).fill("Tell me about tea")
    page.get_by_text("Type or paste the answer").click()
    page.get_by_label("Answer to explain").fill(answer)
    page.get_by_role("button", name="Use this answer").click()
    words(page).first.wait_for()
    return page


def words(page):
    """The answer's words; a choice among checkpoints has options, too."""
    return page.locator("#words").get_by_role("option")


def typed_and_asked(page):
    words(typed(page)).nth(1).click()
    return page


def complete(page):
    page.get_by_text("complete.").wait_for(timeout=120_000)
    return page


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_wrong_and_nothing_is_too_wide(visit, theme, size):
    from axe_playwright_python.sync_playwright import Axe

    page = typed(visit(theme=theme, size=size))
    page.get_by_role("option").nth(1).click()
    complete(page)
    page.eval_on_selector_all("details", "all => all.forEach((one) => one.open = true)")
    checked = Axe().run(page)
    assert checked.violations_count == 0, checked.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_hostile_training_text_is_text(visit):
    page = typed(visit())
    page.get_by_role("button", name="The whole answer").click()
    complete(page)
    page.get_by_label("Filter").fill("Say it")
    page.eval_on_selector_all("details", "all => all.forEach((one) => one.open = true)")
    assert page.evaluate("window.hit") is None
    assert page.locator(".match .heat").first.text_content().startswith(HOSTILE)


def test_matches_within_chance_get_their_heat_maps_when_they_are_unfolded(visit):
    page = typed(visit())
    page.get_by_role("option").first.click()
    page.get_by_role("option").last.click(modifiers=["Shift"])  # the whole answer
    complete(page)
    folded, filled = page.locator("#list > details .match > .heat"), ".match > .heat[data-filled]"
    assert folded.count() > 0 and page.locator(f"#list > details {filled}").count() == 0
    page.locator("#list > details > summary").click()
    page.locator(f"#list > details {filled}").nth(folded.count() - 1).wait_for()
    complete(page)
    assert page.locator("#list > details[open]").count() == 1
    assert page.locator("#list .waiting").all_text_contents() == [""] * page.locator("#list .match").count()


def test_the_keyboard_alone_asks_and_reads(visit):
    page = typed(visit())
    page.get_by_role("option").first.focus()
    for key in ("ArrowRight", "Shift+ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.locator("[role=option][aria-selected=true]").count() == 2
    complete(page)
    page.locator(".match .heat").first.focus()
    page.keyboard.press("ArrowRight")
    assert "%, token" in page.locator("#tip").text_content()
    assert page.locator("#words .c").count() > 0  # the card in focus lights what it did to the answer
    page.get_by_role("tab", name="Proponents").focus()
    page.keyboard.press("ArrowRight")
    complete(page)
    assert "Opponent 1" in page.locator(".rank").first.text_content()


def test_a_training_word_shows_what_it_does_to_the_answer_by_mouse_and_keyboard(visit):
    page = complete(typed_and_asked(visit()))
    pushed, coloured = page.locator("#pushed"), page.locator("#words .c")
    word = page.locator(".match .heat .c").first
    word.click()
    pushed.get_by_text("pushes").wait_for()
    assert f"“{word.text_content()}” of proponent 1 pushes “" in pushed.text_content()
    share = re.match(".* ([+-][0-9]+) %,", word.get_attribute("data-label"))[1]
    assert (
        f"“{page.get_by_role('option').nth(1).text_content()}” by {share} %".replace("-", "−") in pushed.text_content()
    )
    assert page.locator("#spoken").text_content() == pushed.text_content() == page.locator("#tip").text_content()
    page.mouse.move(1, 1)
    assert coloured.count() == page.get_by_role("option").count() and page.locator(".picked").count() == 1
    page.locator(".match .heat").first.focus()
    for key in ("End", "Enter"):
        page.keyboard.press(key)
    last = page.locator(".match").first.locator(".heat .c").last.text_content()
    pushed.get_by_text(f"“{last}” of proponent 1 pushes").wait_for()
    page.keyboard.press("Escape")
    assert pushed.text_content() == "" and page.locator(".picked").count() == 0
    word.click()
    pushed.get_by_text("pushes").wait_for()
    page.get_by_role("option").nth(2).click()
    complete(page)
    assert pushed.text_content() == "" and page.locator(".picked").count() == 0


def test_a_percent_is_that_of_the_other_views_and_a_number_where_the_influence_is_0(visit):
    page = visit()
    for given in (
        (0.2, 0.4),
        (-0.2, 0.4),
        (0.2, -0.4),
        (0.0, 0.4),
        (0.0, 0.0),
        (0.125, 0.0),
        (-3.0, 0.0),
        (0.0123, 0.0),
    ):
        said = page.evaluate("given => import('/static/dom.js').then((dom) => dom.percent(...given))", given)
        assert said.replace("−", "-") == wording.percent(*given)


def test_dragging_selects_several_words_and_a_newer_question_wins(visit):
    page = typed(visit())
    first, last = (page.get_by_role("option").nth(i).bounding_box() for i in (0, 2))
    page.mouse.move(first["x"] + 2, first["y"] + 8)
    page.mouse.down()
    page.mouse.move(last["x"] + 2, last["y"] + 8)
    page.mouse.up()
    assert page.locator("[role=option][aria-selected=true]").count() == 3
    page.get_by_role("option").nth(3).click()
    complete(page)
    word = page.get_by_role("option").nth(3).text_content()
    assert f"“{word}”" in page.locator("#chosen").text_content()


def test_near_duplicates_are_grouped_and_marked_ones_go_into_the_command(visit):
    page = typed(visit())
    page.get_by_role("button", name="The whole answer").click()
    complete(page)
    page.get_by_label("Filter").fill("tea is nice")
    page.eval_on_selector_all("details", "all => all.forEach((one) => one.open = true)")
    assert "more with nearly the same words" in page.locator("#list").text_content()
    page.get_by_role("checkbox", name="Mark").first.check()
    assert page.get_by_text("1 marked").is_visible()
    with page.expect_download() as got:
        page.get_by_role("button", name="Marked ids").click()
    assert len(got.value.path().read_text().split()) == 1
    with page.expect_download() as got:
        page.get_by_role("button", name="Report").click()
    assert "<title>Influences on" in got.value.path().read_text()


def test_two_answers_stand_side_by_side_with_their_common_matches_marked(visit):
    page = typed(visit())
    assert page.locator("#checkpoints").is_hidden()  # of one
    page.get_by_role("option").first.click()
    complete(page)
    page.get_by_role("button", name="Compare with another answer").click()
    page.get_by_label("Answer to explain").fill("tea is from India")
    page.get_by_role("button", name="Use this answer").click()
    page.get_by_role("option", name="India").click()
    complete(page)
    assert ANSWER in page.locator("#first-head").text_content()
    first = page.locator("#first .common").count()
    assert first == page.locator("#list .common").count() > 0
    page.get_by_role("button", name="End the comparison").click()
    complete(page)
    assert page.locator("#first").is_hidden()


def test_two_checkpoints_stand_side_by_side_and_each_gives_its_own_answer(visit, two_checkpoints):
    from axe_playwright_python.sync_playwright import Axe

    server, several = Server(two_checkpoints), Index.open(two_checkpoints)
    page = complete(typed_and_asked(visit(server)))
    box = page.get_by_label("Checkpoint")
    assert [one.get_attribute("value") for one in box.locator("option").all()] == ["tuned", "early", "sum", "best"]
    assert "tuned and early on" in page.locator("#about").text_content()
    page.get_by_role("button", name="Compare with another checkpoint or answer").click()
    assert box.evaluate("one => one === document.activeElement")
    box.select_option("early")  # the same words of the same answer are asked about at once
    page.locator("#explain").get_by_text("At early, training on these").wait_for()
    complete(page)
    asked = {"answer": ANSWER, "token": words(page).nth(1).text_content(), "k": 10}
    ids = {
        name: [m.id for m in several.query("Tell me about tea", **asked, checkpoint=name).matches]
        for name in several.names
    }
    shown = page.locator("#list .match").evaluate_all("all => all.map((one) => one.dataset.name)")
    common = len(set(ids["tuned"]) & set(ids["early"]))
    assert set(shown) == set(ids["early"]) and page.locator("#first-list .match").count() == 10
    assert page.locator("#first-head").text_content().endswith("at tuned")
    assert page.locator("#first .common").count() == page.locator("#list .common").count() == common
    assert f"{common} of 10 matches are in both columns" in page.locator("#state").text_content()
    assert Axe().run(page).violations_count == 0
    page.get_by_role("button", name="End the comparison").click()
    complete(page)
    assert page.locator("#first").is_hidden() and box.input_value() == "early"
    for name in ("early", "tuned"):
        box.select_option(name)
        page.get_by_role("button", name="Ask the model").click()
        page.get_by_role("heading", name=f"Answer of {name}").wait_for(timeout=120_000)
        page.get_by_text("Choose a word.").wait_for()
        said = Index.open(two_checkpoints / name).answer("Tell me about tea", max_new_tokens=256)
        assert page.locator("#answer").input_value() == said
    server.stop()


def test_the_button_verifies(visit):
    page = typed(visit())
    page.get_by_role("option").first.click()
    complete(page)
    page.get_by_role("button", name="Verify").click()
    page.get_by_text("Verified.").wait_for(timeout=120_000)
    assert "these 5 rows" in page.locator("#banner").text_content()


def test_a_triage_list_is_gone_through_and_exported(visit, tmp_path):
    page, file = visit(), tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"prompt": "Tell me about tea", "answer": ANSWER, "case": 7}))
    page.locator("#file").set_input_files(file)
    page.locator("#triage button").click()
    page.get_by_role("option").first.click()
    complete(page)
    with page.expect_download() as got:
        page.get_by_role("button", name="Download what was found").click()
    (line,) = got.value.path().read_text().splitlines()
    assert json.loads(line)["case"] == 7 and json.loads(line)["found"]["matches"]


def test_a_reload_and_a_second_tab_work_by_the_cookie(visit, server):
    page = typed(visit())
    page.reload()
    page.get_by_text("Ready.").wait_for()
    other = page.context.new_page()
    other.goto(server.url)
    other.get_by_text("Ready.").wait_for()
    for one in (page, other):
        one.get_by_text("Recent questions and triage").click()
        one.get_by_role("button", name=f"→ {ANSWER}").first.click()
        one.get_by_role("option").nth(1).click()
    complete(page)
    complete(other)


def test_the_models_own_answer_is_streamed_and_can_be_asked_about(visit):
    page = visit()
    page.get_by_role("textbox", name="Prompt", exact=True).fill("Tell me about tea")
    page.get_by_role("button", name="Ask the model").click()
    page.get_by_role("option").first.wait_for(timeout=120_000)
    page.get_by_role("option").first.click()
    complete(page)


def test_the_picture_for_the_docs_is_made_from_the_real_page(served_index, tmp_path):
    file, command = tmp_path / "page.png", [sys.executable, "-m", "bench.screenshot"]
    done = subprocess.run([*command, served_index, "Tell me about tea", ANSWER, "Japan", file], cwd=ROOT, timeout=300)
    content = file.read_bytes()
    assert done.returncode == 0 and content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == tuple(SIZE.values())
    assert len(content) > 30_000  # a page of one colour has 4,000


def test_a_server_that_is_gone_is_said_in_words(visit, served_index):
    short = Server(served_index)
    page = typed(visit(short))
    short.stop()
    page.get_by_role("option").first.click()
    page.get_by_text("The server does not answer").first.wait_for()

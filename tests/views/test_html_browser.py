"""The report in headless Chromium, as readers meet it: by mouse, keyboard, screen reader, on screen and on paper."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rapidindex.views import heatmap, html, wording
from tests.views import shown

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WHY = "no chromium on this machine: scripts/browser installs it where it can"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and os.environ.get("CI") != "true", reason=WHY),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, WHY
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html.page(shown.result(), shown.result("opponents"), shown.COMMAND), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser):
    """Opens a file, and says at the end that nothing went wrong and nothing else was asked for."""
    contexts, wrong, requests = [], [], set()

    def opened(path, *, theme="light", size=DESKTOP, **options):
        context = browser.new_context(color_scheme=theme, viewport=size, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: requests.add(request.url) if request.url != "data:," else None)
        page.goto(path.as_uri())
        wanted.add(path.as_uri())
        return page

    wanted = set()
    yield opened
    for context in contexts:
        context.close()
    assert not wrong
    assert requests == wanted


def shades(page, selector):
    """The background of the first element that `selector` finds, as #rrggbb."""
    colour = page.eval_on_selector(selector, "e => getComputedStyle(e).backgroundColor")
    return "#" + "".join(f"{int(part):02x}" for part in colour[4:-1].split(","))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_wrong(visit, file, theme, size):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(file, theme=theme, size=size)
    for tab in ("Proponents (6)", "Opponents (6)"):
        page.get_by_role("tab", name=tab).click()
        page.eval_on_selector_all("details", "all => all.forEach((details) => details.open = true)")
        page.get_by_role("button", name="Mark").filter(visible=True).first.click()
        page.get_by_label("Filter").fill("yoga" if "Pro" in tab else "nothing like it")
        checked = Axe().run(page)
        assert checked.violations_count == 0, checked.generate_report()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_wrong_in_the_notebook_fragment(visit, tmp_path, theme):
    from axe_playwright_python.sync_playwright import Axe

    path = tmp_path / "fragment.html"
    notebook = "<!doctype html><html lang=en><meta charset=utf-8><title>Notebook</title><main><h1>One</h1><h2>Two</h2>"
    path.write_text(notebook + shown.result()._repr_html_(), encoding="utf-8")
    checked = Axe().run(visit(path, theme=theme))
    assert checked.violations_count == 0, checked.generate_report()


@pytest.mark.parametrize(("theme", "own"), [("light", heatmap.LIGHT), ("dark", heatmap.DARK)])
def test_colours_follow_the_system_and_the_switch(visit, file, theme, own):
    page = visit(file, theme=theme)
    other = heatmap.DARK if own is heatmap.LIGHT else heatmap.LIGHT
    full = ".ramp .p20"
    assert (shades(page, "body"), shades(page, full)) == (own.background, own.positive)
    page.get_by_role("button", name="Dark theme" if theme == "light" else "Light theme").click()
    assert (shades(page, "body"), shades(page, full)) == (other.background, other.positive)
    page.get_by_role("button", name="Light theme" if theme == "light" else "Dark theme").click()
    assert shades(page, ".ramp .n20") == own.negative


def test_hostile_text_does_nothing(visit, file):
    page = visit(file)
    assert page.evaluate("window.hit") is None
    assert page.locator("script").count() == 1
    assert shown.HOSTILE in page.locator(".match .text").all_text_contents()


def test_hovering_over_a_token_says_its_text_share_and_position(visit, file):
    page = visit(file)
    match = shown.result().matches[0]
    page.locator(".heat").first.locator(".c", has_text="Japan").hover()
    assert (
        page.locator("#tip").text_content()
        == f"“Japan” {wording.percent(match.token_scores[3], heatmap.total(match))}, token 3"
    )
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_the_keyboard_reaches_the_switches_and_every_token(visit, file):
    page = visit(file)
    press, focused = page.keyboard.press, lambda: page.evaluate("document.activeElement.outerHTML.slice(0, 200)")
    press("Tab")
    assert "Skip to the matches" in focused()
    press("Enter")
    press("Tab")
    assert 'role="tab"' in focused() and "Proponents" in focused()
    press("ArrowRight")
    assert page.locator("#panel2").is_visible() and page.locator("#panel1").is_hidden()
    press("ArrowLeft")
    for part in ('id="filter"', "Copy remove command", 'href="#match-1"', "Mark", "Copy id"):
        press("Tab")
        assert part in focused()
    press("Tab")
    assert "Response of proponent 1, 25 tokens" in focused()
    for position in range(3):
        press("ArrowRight")
        assert f"token {position}" in page.locator("#tip").text_content()
        assert page.locator(".now").count() == 1
    press("End")
    assert "token 23" in page.locator("#tip").text_content()  # the last is special, and hidden
    outline = page.eval_on_selector(":focus", "e => getComputedStyle(e).outlineWidth")
    assert float(outline.removesuffix("px")) >= 2
    press("Tab")
    press("Enter")
    assert page.locator("details[open]").count() == 1
    assert page.locator("#tip").is_hidden()


def test_arrows_follow_the_direction_of_the_text(visit, file):
    page = visit(file)
    heat = page.locator(".match > .heat").nth(5)
    assert heat.evaluate("e => getComputedStyle(e).direction") == "rtl"
    heat.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # the first word has two tokens
    assert "token 2" in page.locator("#tip").text_content()


def sifted(page, text):
    """The ids of the matches that are visible after `text` is typed into the filter."""
    page.get_by_label("Filter").fill(text)
    return page.eval_on_selector_all(".match", "all => all.filter((one) => one.checkVisibility()).map((one) => one.id)")


def test_matches_are_sifted_by_text_and_by_column_in_both_directions(visit, tmp_path):
    matches = [replace(match, score=match.score / (1 if match.rank < 5 else 4)) for match in shown.result().matches]
    path = tmp_path / "report.html"
    path.write_text(html.page(shown.result(matches=matches), shown.result("opponents"), ""), encoding="utf-8")
    page = visit(path)
    said = page.locator("#fits")
    assert sifted(page, "") == [f"match-{rank}" for rank in range(1, 5)] and said.text_content() == ""
    assert sifted(page, "KYOTO") == ["match-1"]
    assert said.text_content() == "1 of 6 matches fit “KYOTO”."
    assert sifted(page, "line=7") == ["match-2"]
    assert sifted(page, "perturbed=true") == [f"match-{rank}" for rank in (1, 4, 5, 6)]  # what is folded is opened
    assert sifted(page, 'src=x onerror="') == ["match-2"]  # no column has that name
    assert sifted(page, "nowhere") == [] and page.locator(".folded").first.is_hidden()
    page.get_by_role("tab", name="Opponents").click()
    assert sifted(page, "kyoto") == ["opponent-1"] and "1 of 6" in said.text_content()
    page.evaluate("location.hash = 'match-4'")
    page.locator("#match-4").wait_for(state="visible")
    assert page.get_by_label("Filter").input_value() == ""
    sifted(page, "kyoto")
    page.emulate_media(media="print")
    assert page.locator(".match").filter(visible=True).count() == 2 and said.is_visible()


def test_ids_and_the_remove_command_are_copied(visit, file):
    page = visit(file, permissions=["clipboard-read", "clipboard-write"])
    pasted, ids = (lambda: page.evaluate("navigator.clipboard.readText()")), [f"{n:016x}" for n in range(1, 7)]
    command = page.get_by_role("button", name="Copy remove command")
    page.get_by_role("button", name="Copy id of proponent 2").click()
    page.get_by_text(f"Copied {ids[1]}.").wait_for()
    assert pasted() == ids[1]
    command.click()
    page.get_by_text("in the place of INDEX").wait_for()
    assert pasted() == "rapidindex remove INDEX " + " ".join(f"--ids {id}" for id in ids)
    for rank in (3, 1, 6, 6):
        page.get_by_role("button", name=f"Mark proponent {rank}").press("Space")
    assert command.text_content() == "Copy remove command: 2 marked"
    assert page.locator("[aria-pressed=true]").count() == 2
    page.evaluate("document.getElementById('said').textContent = ''")
    command.press("Enter")
    page.get_by_text("in the place of INDEX").wait_for()
    assert pasted() == f"rapidindex remove INDEX --ids {ids[2]} --ids {ids[0]}"


def test_where_the_browser_does_not_let_it_copy_the_text_is_there_to_be_taken(visit, file):
    page = visit(file)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    page.get_by_role("button", name="Copy id of proponent 1").click()
    page.locator("#said", has_text="0000000000000001").wait_for()
    assert page.evaluate("getSelection().toString()") == "0000000000000001"


def test_without_script_both_directions_and_the_shares_are_there(visit, file):
    page = visit(file, java_script_enabled=False)
    assert page.locator("#panel1").is_visible() and page.locator("#panel2").is_visible()
    assert page.locator("button").filter(visible=True).count() == 0
    assert "token 3" in page.locator(".heat .c", has_text="Japan").first.get_attribute("title")


@pytest.mark.parametrize("size", [DESKTOP, PHONE, {"width": 320, "height": 600}], ids=["desktop", "phone", "small"])
def test_nothing_is_wider_than_the_screen(visit, file, size):
    page = visit(file, size=size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_paper_has_both_directions_in_light_colours_and_no_switches(visit, file):
    page = visit(file, theme="dark")
    page.emulate_media(media="print")
    assert shades(page, "body") == heatmap.LIGHT.background
    assert shades(page, ".ramp .p20") == heatmap.LIGHT.positive
    assert page.locator("#panel1").is_visible() and page.locator("#panel2").is_visible()
    assert page.locator("button").filter(visible=True).count() == 0
    assert page.locator(".heat").nth(4).evaluate("e => e.scrollHeight <= e.clientHeight + 1")
    assert page.locator("details table").first.bounding_box()["height"] > 50
    assert page.locator(".match").first.evaluate("e => getComputedStyle(e).breakInside") == "avoid"
    assert page.pdf().startswith(b"%PDF")


def test_two_thousand_tokens_stay_usable(visit, tmp_path):
    path = tmp_path / "long.html"
    path.write_text(shown.result(matches=[shown.long_match(1900)]).to_html(), encoding="utf-8")
    page = visit(path)
    page.locator(".heat").focus()
    page.keyboard.press("End")
    assert "token 1899" in page.locator("#tip").text_content()
    assert page.locator(".heat .c").count() == len(shown.long_match(1900).tokens) - 1  # the last is special


def test_the_first_match_begins_on_the_first_screen_of_a_small_phone(visit, file, tmp_path):
    asked = replace(shown.result().query, prompt="What are the origins of yoga? " * 40)
    long = tmp_path / "long.html"
    long.write_text(shown.result(query=asked).to_html(), encoding="utf-8")
    for path in (file, long):
        page = visit(path, size={"width": 375, "height": 667})
        top = page.evaluate("selector => document.querySelector(selector).getBoundingClientRect().top", ".match")
        about = page.evaluate("document.querySelector('.about').getBoundingClientRect().top")
        last = page.evaluate("document.querySelector('main').getBoundingClientRect().bottom")
        assert top < 667
        assert about >= last


@pytest.mark.parametrize("size", [DESKTOP, PHONE, {"width": 1280, "height": 500}], ids=["desktop", "phone", "low"])
def test_what_is_cut_can_be_scrolled_to_and_says_so(visit, file, size):
    page = visit(file, size=size)
    cut = page.evaluate(
        """[...document.querySelectorAll(".rapidindex *:not(.hidden)")].filter((e) => e.clientHeight
        && e.scrollHeight > e.clientHeight + 2 && getComputedStyle(e).overflowY !== "visible").map((e) =>
        [e.className, getComputedStyle(e).overflowY, getComputedStyle(e).backgroundAttachment.includes("local")])"""
    )
    assert all(overflow == "auto" and cue for _, overflow, cue in cut)
    assert any(name == "side" for name, _, _ in cut) == (size["width"] == 1280)


def test_a_link_to_a_match_opens_what_hides_it(visit, file):
    page = visit(file)
    ids = page.eval_on_selector_all(".match", "all => all.map((match) => match.id)")
    assert len(set(ids)) == 12 and {"match-3", "opponent-3"} <= set(ids)
    page.evaluate("location.hash = 'opponent-3'")
    page.locator("#opponent-3").wait_for(state="visible")
    assert page.locator("#panel1").is_hidden()


def test_code_has_letters_of_one_width_and_keeps_its_space(visit, tmp_path):
    path = tmp_path / "code.html"
    texts = "def f(x):\n    y = x\n    return y", "Do this:\n  - one\n  - two"
    path.write_text(shown.result(matches=[shown.match(i, t) for i, t in enumerate(texts, 1)]).to_html())
    page = visit(path)
    fonts, spaces = (
        page.eval_on_selector_all(".match > .heat", f"all => all.map((heat) => getComputedStyle(heat).{name})")
        for name in ("fontFamily", "whiteSpace")
    )
    assert ["monospace" in font for font in fonts] == [True, False]
    assert spaces == ["pre-wrap"] * 2


@pytest.mark.parametrize(("theme", "own"), [("light", heatmap.LIGHT), ("dark", heatmap.DARK)])
def test_both_directions_stand_side_by_side_in_a_notebook_in_its_theme(visit, tmp_path, theme, own):
    both = shown.result().beside(shown.result("opponents"))._repr_html_()
    path, notebook = tmp_path / "both.html", f"<!doctype html><html lang=en theme={theme}>"  # as Colab has it
    path.write_text(f"{notebook}<meta charset=utf-8><title>Notebook</title><main>{both}", encoding="utf-8")
    page = visit(path, theme="dark" if theme == "light" else "light")
    assert (shades(page, ".fragment"), shades(page, ".ramp .p20")) == (own.background, own.positive)
    assert page.locator(".both h3:text-matches('^(Proponents|Opponents)$')").count() == 2
    first, second = (page.locator(".both > section").nth(number).bounding_box() for number in (0, 1))
    assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]
    assert page.locator(".mark.second").count() > 0
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("body", "own"),
    [
        ("data-jp-theme-light=true", heatmap.LIGHT),
        ("data-jp-theme-light=false", heatmap.DARK),
        ("class=vscode-light", heatmap.LIGHT),
        ("class=vscode-dark", heatmap.DARK),
        ("class=vscode-high-contrast", heatmap.DARK),
        ("class='vscode-high-contrast-light vscode-high-contrast'", heatmap.LIGHT),
    ],
)
def test_the_notebook_fragment_follows_the_theme_of_its_notebook(visit, tmp_path, theme, body, own):
    path = tmp_path / "fragment.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body {body}>{shown.result()._repr_html_()}", encoding="utf-8")
    page = visit(path, theme=theme)
    assert (shades(page, ".fragment"), shades(page, ".ramp .p20")) == (own.background, own.positive)
    height = page.locator(".fragment").evaluate("e => [e.clientHeight, e.scrollHeight]")
    assert height[0] < 800 < height[1]
    assert page.evaluate("document.documentElement.scrollHeight") <= DESKTOP["height"]
    assert page.locator(".histogram .bar").count() > 10
    assert page.get_by_text("What it did to the answer").count() == 6

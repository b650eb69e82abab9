"""Results as HTML: a page in one file that loads nothing, and a fragment for notebooks. Knows neither torch nor faiss.

Training text is untrusted: Jinja2 escapes it, direction overrides and control characters are taken out, and the page's
content security policy lets only its own script and style run.
"""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from rapidindex.results import Result
from rapidindex.views import heatmap, wording
from rapidindex.views.html import parts
from rapidindex.views.sanitize import paragraph

_UNDERLINED = 4
"""The colour step from which a negative share is underlined: below, its sign is of no account."""
_TEMPLATES = ("page.html", "fragment.html", "parts.html")


def page(proponents: Result, opponents: Result | None, command: str) -> str:
    """One self-contained HTML file for a query: its answer, and the matches of one direction or of both.

    `proponents` may be a result of either direction where `opponents` is None. `command` is what makes the page again;
    empty, the page leaves it out. The text may be written as UTF-8 whatever the training data holds.
    """
    results = [result for result in (proponents, opponents) if result]
    script = Markup(_file("page.js"))
    template = _environment().get_template("page.html")
    return template.render(
        **_common(results),
        command=paragraph(command),
        histogram=parts.histogram(results),
        script=script,
        script_hash=_hash(script),
        style_hash=_hash(_style()),
    )


def fragment(result: Result) -> str:
    """A result for a notebook: an element with a style of its own, which needs no script."""
    return _environment().get_template("fragment.html").render(**_common([result]))


def ramp() -> str:
    """The rules of the colour ramp: `.p1` to `.p20` and `.n1` to `.n20` for the light theme and for the dark one."""
    light, dark = (_rules(theme) for theme in (heatmap.LIGHT, heatmap.DARK))
    return (
        _under("", light)
        + "@media screen and (prefers-color-scheme: dark){" + _under(":root:not([data-theme=light]) ", dark) + "}"
        + "@media screen{" + _under(":root[data-theme=dark] ", dark) + "}"
    )  # fmt: skip


def _common(results: list[Result]) -> dict[str, object]:
    full, of_answer = heatmap.scale(*results), heatmap.answer_scale(*results)
    return {
        "asked": results[0],
        "pieces": parts.answer(results[0].query),
        "results": [parts.shown(result, full, of_answer) for result in results],
        "full": full,
        "things": wording.things(results[0]),
        "steps": heatmap.STEPS,
        "style": _style(),
    }


@cache
def _environment() -> Environment:
    made = Environment(
        loader=DictLoader({name: _file(name) for name in _TEMPLATES}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"signed": wording.signed, "word": wording.word, "safe_text": lambda value: paragraph(str(value))}
    return made


@cache
def _style() -> Markup:
    return Markup(_file("style.css") + ramp())


def _rules(theme: heatmap.Theme) -> dict[str, str]:
    rules = {}
    for number in range(1, heatmap.STEPS + 1):
        rules[f".p{number}"] = f"background:{heatmap.blend(theme, number)}"
        underline = ";text-decoration:underline" if number >= _UNDERLINED else ""
        rules[f".n{number}"] = f"background:{heatmap.blend(theme, -number)}{underline}"
    return {".rapidindex": f"--back:{theme.background};--text:{theme.text}", **rules}


def _under(prefix: str, rules: dict[str, str]) -> str:
    names = {name: name if name == ".rapidindex" else f".rapidindex {name}" for name in rules}
    return "".join(f"{prefix}{names[name]}{{{rule}}}" for name, rule in rules.items())


def _file(name: str) -> str:
    return (files("rapidindex.views.html") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

"""Show results as HTML: a page in one file that loads nothing, and a fragment for notebooks. Imports no torch or faiss.

Training text is untrusted: Jinja2 escapes it, direction overrides and control characters are replaced, and the page's
content security policy lets only its own script and style run.
"""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from rapidindex.results import Result, Verification
from rapidindex.views import heatmap, trials, wording
from rapidindex.views.html import parts
from rapidindex.views.sanitize import paragraph

_TEMPLATES = ("page.html", "fragment.html", "parts.html", "verification.html")
_LIGHT_NOTEBOOK = (
    ":is(:root[theme=light],:root :is([data-jp-theme-light=true],.vscode-light,.vscode-high-contrast-light)) "
)
_DARK_NOTEBOOK = (
    ":is(:root[theme=dark],:root :is([data-jp-theme-light=false],.vscode-dark,"
    ".vscode-high-contrast:not(.vscode-high-contrast-light))) "
)
"""A notebook's own theme, in Colab, JupyterLab and VS Code, goes before the system's. VS Code gives its light
high-contrast theme the class of the dark one, too."""


def page(proponents: Result, opponents: Result | None, command: str) -> str:
    """Return one self-contained HTML file for a query: its answer, and the matches of one direction or of both.

    `proponents` may be a result of either direction where `opponents` is None. `command` is the command line that makes
    the page again, shown unless empty. The text can be encoded as UTF-8 whatever the training data holds.
    """
    results = [result for result in (proponents, opponents) if result]
    script = Markup(_file("page.js"))
    template = _environment().get_template("page.html")
    return template.render(
        **_common(results),
        command=paragraph(command),
        script=script,
        script_hash=_hash(script),
        style_hash=_hash(_style()),
    )


def fragment(result: Result, opponents: Result | None = None) -> str:
    """Return a result, or those of both directions, for a notebook: an element with its own style and no script."""
    results = [result] if opponents is None else [result, opponents]
    return _environment().get_template("fragment.html").render(**_common(results))


def verification(found: Verification) -> str:
    """Return a verification as an element of a page: the verdict, the table with its plot, and what the figures mean.

    It has neither style nor script of its own.
    """
    return (
        _environment()
        .get_template("verification.html")
        .render(
            verdict=trials.verdict(found),
            notes=trials.notes(found),
            rows=trials.rows(found),
            zero=trials.zero(found),
            ends=trials.scale(found),
        )
    )


def ramp() -> str:
    """Return the CSS rules of the colour steps, `.p1` to `.p20` and `.n1` to `.n20`, for the light and dark themes."""
    light, dark = (_rules(theme) for theme in (heatmap.LIGHT, heatmap.DARK))
    return (
        _under("", light)
        + "@media screen and (prefers-color-scheme: dark){" + _under(":root:not([data-theme=light]) ", dark) + "}"
        + "@media screen{" + _under(":root[data-theme=dark] ", dark) + _under(_DARK_NOTEBOOK, dark) + "}"
        + _under(_LIGHT_NOTEBOOK, light)
    )  # fmt: skip


def _common(results: list[Result]) -> dict[str, object]:
    full, answer_full = heatmap.response_scale(*results), heatmap.answer_scale(*results)
    return {
        "first": results[0],
        "answer": [(paragraph(text), marked) for text, marked in heatmap.marked_answer(results[0].query)],
        "directions": [parts.direction(result, full, answer_full) for result in results],
        "full": full,
        "histogram": parts.histogram(results),
        "unit": wording.unit_name(results[0]),
        "steps": heatmap.STEPS,
        "style": _style(),
    }


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=DictLoader({name: _file(name) for name in _TEMPLATES}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(wording, name) for name in ("signed", "percent", "search", "selected", "exact")
    }
    environment.tests["code"] = wording.is_code
    environment.filters["safe_text"] = lambda value: paragraph(str(value))
    return environment


@cache
def _style() -> Markup:
    text = _file("style.css")
    for name, selector in (("LIGHT_NOTEBOOK", _LIGHT_NOTEBOOK), ("DARK_NOTEBOOK", _DARK_NOTEBOOK)):
        text = text.replace(f".{name} ", selector)
    return Markup(text + ramp())


def _rules(theme: heatmap.Theme) -> dict[str, str]:
    rules = {}
    for step in range(1, heatmap.STEPS + 1):
        rules[f".p{step}"] = f"background:{heatmap.step_colour(theme, step)}"
        rules[f".n{step}"] = f"background:{heatmap.step_colour(theme, -step)};text-decoration:underline"
    return {".rapidindex": f"--back:{theme.background};--text:{theme.text}", **rules}


def _under(prefix: str, rules: dict[str, str]) -> str:
    names = {name: name if name == ".rapidindex" else f".rapidindex {name}" for name in rules}
    return "".join(f"{prefix}{names[name]}{{{rule}}}" for name, rule in rules.items())


def _file(name: str) -> str:
    return (files("rapidindex.views.html") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

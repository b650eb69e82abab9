"""Make training text harmless to show: it may hold characters that command a terminal or reverse a page's direction.

`line` and `paragraph` keep the text's length, so that positions in it stay valid; `json_text` keeps its meaning.
"""

import json
import re
import unicodedata

_BREAKS = "\n\r\t\v\f\x85\u2028\u2029"
_OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Direction overrides, which reorder the text after them even past the end of their own element."""


def line(text: str) -> str:
    """Return a text on one line for a terminal: breaks become spaces; no control or format character is left."""
    return text if text.isprintable() else "".join(_on_a_line(character) for character in text)


def paragraph(text: str) -> str:
    """Return a text for a page: line breaks stay; other controls, lone surrogates and direction overrides do not."""
    return text if text.isprintable() else "".join(_in_a_paragraph(character) for character in text)


def json_text(text: str, encoding: str | None = None) -> str:
    """Return JSON with the same value, in which characters that do not print, or that `encoding` lacks, are escaped."""
    return re.sub(r"[^\n -~]", lambda found: _escaped(found[0], encoding or "utf-8"), text)


def _escaped(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
        shown = character.isprintable()
    except UnicodeEncodeError:
        shown = False
    return character if shown else json.dumps(character)[1:-1]


def _on_a_line(character: str) -> str:
    if character in _BREAKS:
        return " "
    return "\ufffd" if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character != "\u200d" else character


def _in_a_paragraph(character: str) -> str:
    if character in "\n\t":
        return character
    if character in _BREAKS:
        return " "
    control = unicodedata.category(character) in ("Cc", "Cs") or character in _OVERRIDES
    return "\ufffd" if control else character

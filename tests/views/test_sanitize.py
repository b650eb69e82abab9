"""Text made harmless keeps its length."""

import json
import unicodedata

import pytest

from rapidindex.views import sanitize
from tests.views import shown


def test_harmless_text_keeps_its_length():
    for made in (sanitize.line(shown.ESCAPES), sanitize.paragraph(shown.ESCAPES)):
        assert len(made) == len(shown.ESCAPES)
    assert sanitize.paragraph("a\nb\tc\rd") == "a\nb\tc d"
    assert sanitize.line("a\nb\tc\rd") == "a b c d"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", None])
def test_json_keeps_its_value_and_holds_only_what_prints_in_the_encoding(encoding):
    value = {shown.ESCAPES: [shown.ESCAPES + "\x7f\x9b31m é 日本 👩"]}
    text = sanitize.json_text(json.dumps(value, ensure_ascii=False, indent=2), encoding)
    assert json.loads(text) == value
    text.encode(encoding or "utf-8")
    assert {unicodedata.category(character) for character in text.replace("\n", "")}.isdisjoint({"Cc", "Cf", "Cs"})

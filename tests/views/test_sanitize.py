"""Text made harmless keeps its length."""

from rapidindex.views import sanitize
from tests.views import shown


def test_harmless_text_keeps_its_length():
    for made in (sanitize.line(shown.ESCAPES), sanitize.paragraph(shown.ESCAPES)):
        assert len(made) == len(shown.ESCAPES)
    assert sanitize.paragraph("a\nb\tc\rd") == "a\nb\tc d"
    assert sanitize.line("a\nb\tc\rd") == "a b c d"

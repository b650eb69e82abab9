"""What is read from JSON is of the types that its fields have, or the error says where it is not."""

import re
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pytest

from rapidindex import typed
from rapidindex.typed import Count


@dataclass(frozen=True)
class Part:
    name: str
    weight: float = 1.0
    sizes: tuple[int, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


class Whole(TypedDict):
    count: Count
    parts: dict[str, list[Part]]


def test_names_that_a_type_lacks_are_left_out_and_others_have_its_types():
    value = {"count": 2**63 - 1, "newer": [], "parts": {"a": [{"name": "\ud800", "weight": 2, "sizes": [1], "x": 0}]}}
    assert typed.fit(value, Whole, "it") == {"count": 2**63 - 1, "parts": {"a": [Part("\ud800", 2.0, (1,))]}}


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (-1, Count, "it is -1: Expected int >= 0"),
        (2**63, Count, f"it is {2**63}: Expected int <= {2**63 - 1}"),
        (True, Count, "it is True: Expected int, got bool"),
        ([{"name": "a"}, {"name": 3}], list[Part], "it[1].name is 3: Expected str, got int"),
        ({"weight": 1}, Part, "it is {'weight': 1}: Object missing required field name"),
        ({"count": 1, "parts": {"a": [{}]}}, Whole, "it.parts[...][0]: Object missing required field name"),
        ({"name": "a", "meta": {}, "\ud800": 1}, Part, "it is {.*}: .*surrogates not allowed"),
        ({"name": "a", "weight": 10**400}, Part, "it.weight is 1000.*: Number out of range"),
    ],
)
def test_a_misfit_is_named_with_its_place_and_what_is_there(value, kind, message):
    with pytest.raises(ValueError) as caught:
        typed.fit(value, kind, "it")
    assert re.fullmatch(re.escape(message).replace(r"\.\*", ".*"), str(caught.value))


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '{"a": 1e999}', "[" * 100_000, "", "1" * 5_000, b"\xff"])
def test_text_that_is_no_json_or_has_numbers_that_are_not_finite_is_a_value_error(text):
    with pytest.raises(ValueError):
        typed.loads(text)

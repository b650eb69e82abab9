"""What is read from JSON, as values of Python's types: what fits its checksum may still come from a hostile program.

The types are those of the fields that hold the values, and msgspec checks them. Names that a type does not have are
left out, and a float may be written as a whole number.
"""

import json
import math
import re
import reprlib
from typing import Annotated, Any

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A whole number that fits into int64, not negative."""
RowLength = Annotated[int, Meta(ge=1, le=2**24)]
"""Entries of a row."""


def loads(text: str | bytes) -> Any:
    """Return the value in a JSON text. Raise ValueError for other texts, and for numbers that are not finite."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def fit(value: Any, kind: Any, place: str) -> Any:
    """Return `value`, from JSON, as `kind`. Raise ValueError, which names the place and what is there, for a misfit."""
    try:
        return msgspec.convert(value, kind)
    except (ValueError, RecursionError) as error:  # also UnicodeEncodeError, for half of a surrogate pair in a name
        fault, _, path = str(error).replace("`", "").partition(" - at ")
    where = (path or "$").replace("$", place)
    if not re.fullmatch(r"\$?(\.\w+|\[\d+\])*", path):  # a key, or what lies behind one: msgspec does not say which
        raise ValueError(f"{where}: {fault}")
    for name, number in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[name or int(number)]
    raise ValueError(f"{where} is {reprlib.repr(value)}: {fault}")

"""The form of what is read from JSON: a file that fits its checksum may still come from a faulty or hostile program.

A form is made of the values that it describes:

    str, float, dict     a value of that type; a float is finite, and may be written as a whole number
    int, range(1, 9)     a whole number of 0 to 2^63 - 1, or of that range
    None, "int8"         that value
    re.compile("a|b")    a string that matches as a whole
    (a, b)               a value of one of these forms
    [a]                  a list of any length, each of whose values has this form
    [a, b]               a list of two values of these forms
    {"x": a, "y?": b}    an object with the field x, and y or not; others are not looked at
    {re.compile(…): a}   an object each of whose names matches, and each of whose values has this form
"""

import math
import re
import reprlib
from collections.abc import Iterator
from typing import Any

ANY = re.compile(".*", re.DOTALL)


def misfit(value: Any, form: Any, place: str = "it") -> str:
    """Return in words where `value`, read from JSON, is not of `form`; an empty text where it is."""
    return next(_misfits(value, form, place), "")


def _misfits(value: Any, form: Any, place: str) -> Iterator[str]:
    if isinstance(form, tuple):
        faults = [misfit(value, one, place) for one in form]
        if all(faults):
            yield faults[-1]
    elif isinstance(form, dict | list) and not isinstance(value, type(form)):
        yield f"{place} is {reprlib.repr(value)}"
    elif isinstance(form, list):
        forms = form * len(value) if len(form) == 1 else form
        if len(forms) != len(value):
            yield f"{place} has {len(value)} values, not {len(forms)}"
        for number, (each, one) in enumerate(zip(value, forms, strict=False)):
            yield from _misfits(each, one, f"{place}[{number}]")
    elif isinstance(form, dict):
        for name, one in form.items():
            yield from _misfits_of_fields(value, name, one, place)
    elif not _is(value, form):
        yield f"{place} is {reprlib.repr(value)}"


def _misfits_of_fields(value: dict[str, Any], name: str | re.Pattern[str], form: Any, place: str) -> Iterator[str]:
    if isinstance(name, re.Pattern):
        for key, each in value.items():
            if not name.fullmatch(key):
                yield f"{place} has a field {reprlib.repr(key)}"
            yield from _misfits(each, form, f"{place}.{key}")
    elif name.removesuffix("?") in value:
        yield from _misfits(value[name.removesuffix("?")], form, f"{place}.{name.removesuffix('?')}")
    elif not name.endswith("?"):
        yield f"{place} lacks {name}"


def _is(value: Any, form: Any) -> bool:
    if form is int:
        form = range(2**63)
    if isinstance(form, range):
        return type(value) is int and value in form
    if form is float:
        return type(value) in (int, float) and abs(value) < math.inf
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and bool(form.fullmatch(value))
    return isinstance(value, form) if isinstance(form, type) else type(value) is type(form) and value == form

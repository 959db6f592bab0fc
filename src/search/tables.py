"""Tables of what others wrote about images: captions, urls and whatever lies beside them.

Nothing of it stops an index: what a Parquet file cannot hold becomes text, or is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

MAX_FIELDS = 256  # columns of a table, and fields of an image

EXACT_FLOATS = 2**53  # integers up to this are exact as floats

# columns that say where the image of a row is, which nobody else may set
LOCATION = ("image_path", "tar", "tar_offset", "tar_size", "file_size", "file_time")


def clean_text(text: str) -> str:
    """Return a text that UTF-8 can hold: what it cannot becomes an escape, e.g. \\udc80."""
    return text.encode("utf-8", "backslashreplace").decode()


def clean_fields(fields: Any) -> dict[str, Any]:
    """Return the fields of an image that a table can hold: texts, numbers, truth values and None.

    Integers beyond 64 bits become text. Lists and objects are left out, as are fields that would
    say where the image is.
    """
    cleaned: dict[str, Any] = {}
    if not isinstance(fields, Mapping):
        return cleaned
    for name, value in fields.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            value = _write_integer(value)
        if isinstance(value, str):
            value = clean_text(value)
        if isinstance(value, str | int | float | bool) or value is None:
            cleaned[clean_text(str(name))] = value
    return {name: value for name, value in cleaned.items() if name not in LOCATION}


def _write_integer(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # more digits than Python writes
        return hex(value)


def make_table(lines: Iterable[Mapping[str, Any]], index: Any = None) -> pd.DataFrame:
    """Return a table of cleaned fields, a line an image, whose columns are of one type each.

    Columns of several types become text, and columns beyond `MAX_FIELDS` are left out.
    """
    lines = list(lines)
    names = list(dict.fromkeys(name for line in lines for name in line))
    ordered = sorted(names, key=lambda name: name not in LOCATION)[:MAX_FIELDS]
    chosen = set(ordered)
    names = [name for name in names if name in chosen]
    columns = {name: _unify([line.get(name) for line in lines]) for name in names}
    if index is None:
        index = range(len(lines))
    return pd.DataFrame(columns, index=index)


def make_storable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose columns of mixed types are text, so that a Parquet file can hold it."""
    columns = {}
    for name in table:
        column = table[name]
        if column.dtype == object:
            values = [None if _is_missing(value) else value for value in column]
            column = pd.Series(_unify(values), index=table.index, dtype=object)
        columns[name] = column
    return pd.DataFrame(columns, index=table.index)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _unify(values: list[Any]) -> list[Any]:
    """Return values of one type, where there are several as text; None stays None."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str}:
        return [None if value is None else clean_text(value) for value in values]
    if kinds == {bool}:
        return values
    if kinds <= {int, float}:
        becomes_float = float in kinds or None in values
        integers = [value for value in values if isinstance(value, int)]
        is_exact = all(abs(value) <= EXACT_FLOATS for value in integers)
        fits = all(-(2**63) <= value < 2**63 for value in integers)
        if fits and (is_exact or not becomes_float):
            return values
    return [None if value is None else clean_text(str(value)) for value in values]

"""Text of the page: headings and numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from src.evaluation.tables import display_name


def make_heading(name: str) -> str:
    """A file's or stage's name as a heading: without its number, underscores as spaces."""
    text = display_name(re.sub(r"^\d+_", "", name))
    return text[:1].upper() + text[1:]


def format_score(entry: Mapping[str, Any] | None) -> Markup:
    """A value over its interval."""
    if not entry:
        return Markup("-")
    value, low, high = (f"{entry[key]:.3f}" for key in ("value", "low", "high"))
    return Markup("{}<small>[{}, {}]</small>").format(value, low, high)


def format_entry(value: Any) -> str:
    """A table's entry as text, numbers to three decimals."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{round(value, 3) + 0.0:.3f}"  # without a minus before zero
    return display_name(value) if isinstance(value, str) else str(value)


def format_provenance(value: Any) -> str:
    """A value of the provenance in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {format_provenance(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(format_provenance, value))
    return str(value)

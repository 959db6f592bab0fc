"""The scores of the page: a strip a score with its baselines and bounds, and their reading."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from src.evaluation.report.labels import make_heading
from src.evaluation.tables import display_name
from src.figures.base import COLOURS, CONTROL_MARKS

Record = Mapping[str, Any]  # of metrics.json

STAGES = {  # headings, in the order of the page
    "06_metrics": "Reconstruction",
    "05_retrieve": "Retrieval",
}

PATHS = {  # marks of the chart, about 10 pixels across
    "x": "M-4-4L4 4M-4 4L4-4",
    "s": "M-4-4h8v8h-8z",
    "D": "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "^": "M0-5L5 4H-5z",
    "v": "M0 5L5-4H-5z",
    "P": "M-5-1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z",
    "h": "M-2.7-4.7h5.4L5.4 0L2.7 4.7h-5.4L-5.4 0z",
    "<": "M-5 0L4-5V5z",
    ">": "M5 0L-4-5V5z",
}

OTHER_MARKS = [  # of baselines that have no mark of their own
    ("^", COLOURS[1]),
    ("h", COLOURS[7]),
    ("<", COLOURS[5]),
    (">", COLOURS[3]),
]

UPPER_BOUNDS = ("ceiling", "noise_ceiling")

ALPHA = 0.05


def describe_reading(record: Record) -> str:
    """Whether a score beats its baselines, as a sentence."""
    sign = -1 if record["better"] == "lower" else 1
    names: dict[str, list[str]] = {
        "worse than": [],
        "not distinguishable from": [],
        "better than": [],
    }
    for name, baseline in record["floors"].items():
        gain = sign * (record["value"] - baseline["value"])
        is_certain = baseline.get("p", 1.0) < ALPHA
        relation = "not distinguishable from"
        if is_certain:
            relation = "better than" if gain > 0 else "worse than"
        names[relation].append(display_name(name))
    pairing = f" (p of the pairing {record['p_shuffled']:.2g})" if "p_shuffled" in record else ""
    if not names["worse than"] and not names["not distinguishable from"]:
        return "better than every floor" + pairing
    parts = [f"{relation} {', '.join(group)}" for relation, group in names.items() if group]
    return "; ".join(parts) + pairing


def assign_marks(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Path, colour and label of every baseline that occurs; names without a mark of their own take
    the next free one.
    """
    names = _list_baselines(records)
    free = iter(OTHER_MARKS * len(names))
    marks = {}
    for name in names:
        if name in CONTROL_MARKS:
            shape, colour, label = CONTROL_MARKS[name]
        else:
            shape, colour = next(free)
            label = display_name(name)
        marks[name] = {
            "path": PATHS.get(shape, PATHS["v"]),
            "colour": colour,
            "label": label,
            "line": shape == "x",
        }
    return marks


def _list_baselines(records: Sequence[Record]) -> list[str]:
    """Names of all baselines of some records, in order of appearance."""
    names: dict[str, None] = {}
    for record in records:
        names |= dict.fromkeys(record["floors"])
    return list(names)


def list_upper_bounds(records: Sequence[Record]) -> list[str]:
    """Those of `UPPER_BOUNDS` that any record has."""
    return [key for key in UPPER_BOUNDS if any(_has_value(record, key) for record in records)]


def _has_value(record: Record, key: str) -> bool:
    return (record.get(key) or {}).get("value") is not None


def get_chance(record: Record) -> float | None:
    """The chance level of a score, where it is known and not a baseline already."""
    chance = record.get("chance")
    if not isinstance(chance, int | float) or not math.isfinite(chance):
        return None
    return None if "chance" in record["floors"] else chance


class _Scale:
    """Places on a strip in percent from the left; right is better.

    Args:
        values: all that the strip shows.
        lower: whether lower values are better.
    """

    def __init__(self, values: Sequence[float], lower: bool):
        pad = 0.04 * ((max(values) - min(values)) or 1.0)
        self.low = min(values) - pad
        self.high = max(values) + pad
        self.lower = lower

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(100 * (1 - share if self.lower else share), 2)

    def span(self, entry: Record) -> dict[str, Any]:
        """Places of a value and of its interval, and both as text."""
        ends = (self.place(entry["low"]), self.place(entry["high"]))
        text = f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
        place = self.place(entry["value"])
        return {"at": place, "from": min(ends), "to": max(ends), "text": text}

    def list_ticks(self) -> list[tuple[float, str]]:
        locator = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        ticks = locator.tick_values(self.low, self.high)
        inside = [tick for tick in ticks if self.low <= tick <= self.high]
        return [(self.place(tick), f"{round(tick, 6):g}") for tick in inside]


def place_scores(record: Record) -> dict[str, Any]:
    """Where everything of one score stands in its strip, in percent from the left."""
    bounds = {key: record[key] for key in UPPER_BOUNDS if _has_value(record, key)}
    values = []
    for entry in (record, *record["floors"].values(), *bounds.values()):
        values += [entry["low"], entry["high"], entry["value"]]
    chance = get_chance(record)
    if chance is not None:
        values.append(chance)
    scale = _Scale(values, record["better"] == "lower")
    return {
        "score": scale.span(record),
        "floors": {name: scale.span(entry) for name, entry in record["floors"].items()},
        **{key: scale.span(entry) for key, entry in bounds.items()},
        "chance": None if chance is None else scale.place(chance),
        "ticks": scale.list_ticks(),
    }


def group_records(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The records by stage with their strips: reconstruction, retrieval, then the others as they
    come.
    """
    by_stage: dict[str, list[dict[str, Any]]] = {}
    n_images = max(record["n"] for record in records)
    for record in records:
        row = {**record, "strip": place_scores(record), "subset": record["n"] != n_images}
        by_stage.setdefault(record.get("stage") or "", []).append(row)
    stages = [stage for stage in STAGES if stage in by_stage]
    stages += [stage for stage in by_stage if stage not in STAGES]
    groups = []
    for stage in stages:
        rows = by_stage[stage]
        heading = STAGES.get(stage, make_heading(stage))
        groups.append({"heading": heading, "records": rows, "floors": _list_baselines(rows)})
    return groups

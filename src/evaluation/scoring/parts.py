"""A part of the scores of a run, and the sentence about scores that no baseline is below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

# baselines that a score of anything has to beat
NEEDED = ("shuffled", "mean_image", "mean_seen", "common_caption")


@dataclass(frozen=True)
class Part:
    """Scores that stand beside those of the images.

    Attributes:
        records: of `make_record`, for metrics.json.
        table: [metric, row, image, draw, value], for scores.parquet.
        sentence: what a reader is told, "" for nothing.
        metrics: by which it was scored, where there are several.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    sentence: str = ""
    metrics: list[Any] = field(default_factory=list)


def list_beneath_baselines(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for every score that is not better than one of the baselines NEEDED."""
    for record in records:
        sign = 1 if record["better"] == "higher" else -1
        for name in NEEDED:
            if name not in record["floors"]:
                continue
            value = record["floors"][name]["value"]
            if sign * (record["value"] - value) <= 0:
                yield (
                    f"{record['name']} is {record['value']:.3f}, not better than its floor"
                    f" '{name.replace('_', ' ')}' ({value:.3f})."
                )

"""Score tables as text files, in the order of the published ones and, other than these, with the
names of the metrics in them.

- `<run>_all_recons.csv`, `<run>_all_enhancedrecons.csv` and `<run>_caption_metrics.csv` lie in
  results/<run>/tables/, tab-separated as the published evaluation writes them (MindEye2, arXiv
  2403.11207), with a header and a line a metric: Metric, Value, low, high, n, the floors and the
  ceiling.
- The published metrics come first under their published names; whatever else was scored follows
  under our names. A prefix ("mini:") or what else a name carries stays with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from src.utils import atomic

PUBLISHED = {  # ours -> theirs, in their order
    "pixcorr": "PixCorr",
    "ssim": "SSIM",
    "AlexNet(2)": "AlexNet(2)",
    "AlexNet(5)": "AlexNet(5)",
    "InceptionV3": "InceptionV3",
    "CLIP": "CLIP",
    "EffNet-B1": "EffNet-B",
    "SwAV": "SwAV",
    "brain_from_image": "FwdRetrieval",
    "image_from_brain": "BwdRetrieval",
    **{
        f"brain_correlation {roi}": f"BrainCorr {roi}"
        for roi in ("nsd_general", "V1", "V2", "V3", "V4", "higher_vis")
    },
}

FIRST = ["Metric", "Value", "low", "high", "n"]


def published_name(name: str) -> tuple[int, str]:
    """Place and name in the published tables of one of our metrics, whatever stands before or
    behind its name; what they do not have comes last, unchanged.

    >>> published_name("mini:EffNet-B1")
    (6, 'mini:EffNet-B')
    """
    head, colon, rest = name.partition(":")
    prefix, own = (head + colon, rest) if colon else ("", name)
    for place, (ours, theirs) in enumerate(PUBLISHED.items()):
        if own == ours or own.startswith(f"{ours}, "):
            return place, prefix + theirs + own[len(ours) :]
    return len(PUBLISHED), name


def retrieval_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the published retrieval protocol from a run's metrics.json, where notebook 05 has
    left them; of several decoders the first.

    What the published tables call FwdRetrieval is, by their code, the search for the brain sample
    that belongs to an image (see src/retrieval.py).
    """
    pools: list[dict[str, Any]] = next(
        (
            table["rows"]
            for table in content.get("tables", [])
            if table["title"] == "Retrieval in pools"
        ),
        [],
    )
    mine = [row for row in pools if row["decoder"] == pools[0]["decoder"]]
    kept = ("value", "low", "high")
    return [
        {
            "name": row["direction"],
            "n": row["pool"],
            "floors": {"chance": row["chance"]},
            **{key: row[key] for key in kept},
        }
        for row in mine
    ]


def score_lines(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Records of metrics.json (or rows of `retrieval_rows`) as a table, the published metrics
    first.

    Returns: [Metric, Value, low, high, n, a column a floor, ceiling]; empty where there is none.
    """
    lines: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda r: published_name(r["name"])[0]):
        floors = {
            name: floor["value"] if isinstance(floor, Mapping) else floor
            for name, floor in record.get("floors", {}).items()
        }
        numbers = {
            "Value": record["value"],
            "low": record.get("low"),
            "high": record.get("high"),
            "n": record["n"],
        }
        lines.append(
            {
                "Metric": published_name(record["name"])[1],
                **numbers,
                **floors,
                "ceiling": record.get("ceiling", {}).get("value"),
            }
        )
    table = pd.DataFrame(lines)
    between = [column for column in table.columns if column not in (*FIRST, "ceiling")]
    return table[[*FIRST, *between, "ceiling"]]


def write_lines(path: str | Path, table: pd.DataFrame) -> Path:
    """Write a table tab-separated, numbers to six places."""
    with atomic(Path(path)) as temporary:
        table.to_csv(temporary, sep="\t", index=False, float_format="%.6f")
    return Path(path)

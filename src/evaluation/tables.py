"""Score tables as text files, in the order of the published ones and, unlike these, with the names
of the metrics in them.

- `<run>_all_recons.csv`, `<run>_all_enhancedrecons.csv` and `<run>_caption_metrics.csv` lie in
  results/<run>/tables/, tab-separated as the published evaluation writes them (MindEye2, arXiv
  2403.11207), with a header and a line a metric: Metric, Value, low, high, n, the floors and the
  ceiling.
- The published metrics come first under their published names; the others follow under our names. A
  prefix ("mini:") or an ending of a name stays with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from src.utils import atomic

BRAIN_REGIONS = ("nsd_general", "V1", "V2", "V3", "V4", "higher_vis")

PUBLISHED = {  # our name -> the published one, in the published order
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
    **{f"brain_correlation {roi}": f"BrainCorr {roi}" for roi in BRAIN_REGIONS},
}

FIRST_COLUMNS = ["Metric", "Value", "low", "high", "n"]


def display_name(name: str) -> str:
    """The name of a metric or condition for a reader."""
    return name.replace("_", " ")


def published_name(name: str) -> tuple[int, str]:
    """Place and name of one of our metrics in the published tables, whatever stands before or after
    its name; metrics that they do not have come last, unchanged.

    >>> published_name("mini:EffNet-B1")
    (6, 'mini:EffNet-B')
    """
    head, colon, tail = name.partition(":")
    prefix, metric = (head + colon, tail) if colon else ("", name)
    for place, (our_name, published) in enumerate(PUBLISHED.items()):
        if metric == our_name or metric.startswith(f"{our_name}, "):
            return place, prefix + published + metric[len(our_name) :]
    return len(PUBLISHED), name


def retrieval_records(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of the published retrieval protocol from a run's metrics.json, where notebook 05
    scored it; of several decoders the first.

    What the published tables call FwdRetrieval is, by their code, the search for the brain sample
    that belongs to an image (see src/retrieval.py).
    """
    rows: list[dict[str, Any]] = []
    for table in content.get("tables", []):
        if table["title"] == "Retrieval in pools":
            rows = table["rows"]
            break
    records = []
    for row in rows:
        if row["decoder"] == rows[0]["decoder"]:
            records.append(
                {
                    "name": row["direction"],
                    "n": row["pool"],
                    "floors": {"chance": row["chance"]},
                    "value": row["value"],
                    "low": row["low"],
                    "high": row["high"],
                }
            )
    return records


def published_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Records of metrics.json (or of `retrieval_records`) as a table, the published metrics first.

    Returns:
        [Metric, Value, low, high, n, a column a floor, ceiling]; a cell is empty where a record has
        no such entry.
    """
    ordered = sorted(records, key=lambda record: published_name(record["name"])[0])
    table = pd.DataFrame([_format_line(record) for record in ordered])
    baselines = [name for name in table.columns if name not in (*FIRST_COLUMNS, "ceiling")]
    return table[[*FIRST_COLUMNS, *baselines, "ceiling"]]


def _format_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """One record as a line of the table."""
    line = {
        "Metric": published_name(record["name"])[1],
        "Value": record["value"],
        "low": record.get("low"),
        "high": record.get("high"),
        "n": record["n"],
    }
    for name, score in record.get("floors", {}).items():
        line[name] = score["value"] if isinstance(score, Mapping) else score
    line["ceiling"] = record.get("ceiling", {}).get("value")
    return line


def write_csv(path: str | Path, table: pd.DataFrame) -> Path:
    """Write a table as comma-separated values, without its index."""
    with atomic(Path(path)) as temporary:
        table.to_csv(temporary, index=False)
    return Path(path)


def write_table(path: str | Path, table: pd.DataFrame) -> Path:
    """Write a table tab-separated, numbers to six places."""
    with atomic(Path(path)) as temporary:
        table.to_csv(temporary, sep="\t", index=False, float_format="%.6f")
    return Path(path)

"""What selecting among several models gains over each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.evaluation.statistics import bootstrap_mean, paired_bootstrap


def worth(
    each: Mapping[tuple[str, str], np.ndarray],
    better: Mapping[str, str],
    voters: Sequence[str],
    best: str = "",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What voting is worth in each metric, image by image.

    Args:
        each: values (images,) by (row, metric); rows: "system" (the vote), the voters', and
            "latent_mean" where there is one.
        better: "higher" or "lower" by metric.
        voters: rows of the single models.
        best: of these, the one that was chosen on validation images.
        seed: of the bootstrap.

    Returns:
        One row a metric: the vote, the mean single model, the voter chosen on validation images,
            the mean of the latents, and the oracle, which takes the
        best voter of each image by this very metric; `gain` of the vote over the mean single model,
        `over_best`, and `mean_gain` of the latent mean over the vote, each a paired difference
        (positive is better) with its interval; `share`, of the oracle's gain that the vote has.
    """
    rows = []
    for metric, which in better.items():
        sign = 1 if which == "higher" else -1
        singles = np.stack([each[voter, metric] for voter in voters])  # (voters, images)
        single, most, chosen = (
            singles.mean(0),
            sign * (sign * singles).max(0),
            each["system", metric],
        )
        values = {"vote": chosen, "single": single} | ({"best": each[best, metric]} if best else {})
        values |= (
            {"latent_mean": each["latent_mean", metric]} if ("latent_mean", metric) in each else {}
        ) | {"oracle": most}
        row: dict[str, Any] = {"metric": metric} | {
            name: bootstrap_mean(v, seed=seed) for name, v in values.items()
        }
        row["gain"] = paired_bootstrap(sign * chosen, sign * single, seed=seed)
        if best:
            row["over_best"] = paired_bootstrap(sign * chosen, sign * each[best, metric], seed=seed)
        if "latent_mean" in values:
            row["mean_gain"] = paired_bootstrap(
                sign * values["latent_mean"], sign * chosen, seed=seed
            )
        possible = sign * (most.mean() - single.mean())
        row["share"] = row["gain"].value / possible if possible > 0 else None
        rows.append(row)
    return rows


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """One plain paragraph on the rows of `worth`."""

    def count(key: str) -> tuple[int, int, int]:
        found = [row[key] for row in rows if key in row]
        return sum(d.low > 0 for d in found), sum(d.high < 0 for d in found), len(found)

    against = {
        "gain": "its average voter",
        "over_best": "the voter that was chosen on validation images",
    }
    counts = {what: count(key) for key, what in against.items()}
    parts = [
        f"than {what} in {more} of {n} scores and worse in {less}"
        for what, (more, less, n) in counts.items()
        if n
    ]
    text = f"By 95 % intervals of paired differences, the vote is better {'; '.join(parts)}."
    if shares := [row["share"] for row in rows if row["share"] is not None]:
        text += (
            f" It has {np.median(shares):.0%} of what an oracle would gain (median over scores)."
        )
    more, less, n = count("mean_gain")
    return text + (
        f" Averaging the latents before decoding is better than the vote in {more} of {n} scores"
        f" and worse in {less}."
        if n
        else ""
    )


def told(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of `worth` as text, for a table."""
    names = {
        "vote": "vote",
        "single": "mean single model",
        "best": "voter chosen on validation",
        "latent_mean": "latent mean",
        "oracle": "oracle (ceiling)",
    }
    gains = {
        "gain": "vote - single",
        "over_best": "vote - chosen voter",
        "mean_gain": "latent mean - vote",
    }
    found = []
    for row in rows:
        cells = {
            label: f"{row[key].value:.3f} [{row[key].low:.3f}, {row[key].high:.3f}]"
            for key, label in names.items()
            if key in row
        }
        cells |= {
            label: f"{row[key].value:+.3f} [{row[key].low:+.3f}, {row[key].high:+.3f}]"
            for key, label in gains.items()
            if key in row
        }
        found.append({"metric": str(row["metric"])} | cells)
    return found

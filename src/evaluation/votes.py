"""What selecting among several models gains over each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.evaluation.statistics import bootstrap_mean, paired_bootstrap

SCORE_LABELS = {
    "vote": "vote",
    "single": "mean single model",
    "best": "voter chosen on validation",
    "latent_mean": "latent mean",
    "oracle": "oracle (ceiling)",
}

GAIN_LABELS = {
    "gain": "vote - single",
    "over_best": "vote - chosen voter",
    "mean_gain": "latent mean - vote",
}


def ensemble_gain(
    scores: Mapping[tuple[str, str], np.ndarray],
    better: Mapping[str, str],
    voters: Sequence[str],
    chosen_voter: str = "",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What voting gains in each metric, image by image.

    Args:
        scores: (images,) by (condition, metric); conditions: "system" (the vote), the voters', and
            "latent_mean" where there is one.
        better: "higher" or "lower" by metric.
        voters: conditions of the single models.
        chosen_voter: the voter that was best on validation images, "" for none.
        seed: of the bootstrap.

    Returns:
        One dict a metric: the vote, the mean single model, the voter chosen on validation images,
        the mean of the latents, and the oracle, which takes the best voter of each image by this
        very metric; `gain` of the vote over the mean single model, `over_best`, and `mean_gain` of
        the latent mean over the vote, each a paired difference (positive is better) with its
        interval; `share`, of the oracle's gain that the vote has.
    """
    rows = []
    for metric, direction in better.items():
        sign = 1 if direction == "higher" else -1
        singles = np.stack([scores[voter, metric] for voter in voters])  # (voters, images)
        values = {
            "vote": scores["system", metric],
            "single": singles.mean(0),
        }
        if chosen_voter:
            values["best"] = scores[chosen_voter, metric]
        if ("latent_mean", metric) in scores:
            values["latent_mean"] = scores["latent_mean", metric]
        values["oracle"] = sign * (sign * singles).max(0)
        intervals = {name: bootstrap_mean(v, seed=seed) for name, v in values.items()}
        rows.append({"metric": metric} | intervals | _compute_gains(values, sign, seed))
    return rows


def _compute_gains(values: Mapping[str, np.ndarray], sign: int, seed: int) -> dict[str, Any]:
    """Paired differences between the scores of one metric, positive where the first is better."""

    def compare(first: str, second: str) -> Any:
        return paired_bootstrap(sign * values[first], sign * values[second], seed=seed)

    gains: dict[str, Any] = {"gain": compare("vote", "single")}
    if "best" in values:
        gains["over_best"] = compare("vote", "best")
    if "latent_mean" in values:
        gains["mean_gain"] = compare("latent_mean", "vote")
    possible = sign * (values["oracle"].mean() - values["single"].mean())
    gains["share"] = gains["gain"].value / possible if possible > 0 else None
    return gains


def describe_ensemble_gain(rows: Sequence[Mapping[str, Any]]) -> str:
    """One plain paragraph on the rows of `ensemble_gain`."""
    rivals = {
        "gain": "its average voter",
        "over_best": "the voter that was chosen on validation images",
    }
    parts = []
    for key, rival in rivals.items():
        differences = _list_differences(rows, key)
        if differences:
            parts.append(f"than {rival} in {_count_signs(differences)}")
    text = f"By 95 % intervals of paired differences, the vote is better {'; '.join(parts)}."
    shares = [row["share"] for row in rows if row["share"] is not None]
    if shares:
        text += (
            f" It has {np.median(shares):.0%} of what an oracle would gain (median over scores)."
        )
    differences = _list_differences(rows, "mean_gain")
    if differences:
        text += (
            " Averaging the latents before decoding is better than the vote in"
            f" {_count_signs(differences)}."
        )
    return text


def _list_differences(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows if key in row]


def _count_signs(differences: Sequence[Any]) -> str:
    """In how many scores a difference is clearly above and clearly below 0, as text."""
    n_better = sum(d.low > 0 for d in differences)
    n_worse = sum(d.high < 0 for d in differences)
    return f"{n_better} of {len(differences)} scores and worse in {n_worse}"


def gain_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of `ensemble_gain` as text, for a table."""
    table = []
    for row in rows:
        cells = {"metric": str(row["metric"])}
        for key, label in SCORE_LABELS.items():
            if key in row:
                value, low, high = row[key][:3]
                cells[label] = f"{value:.3f} [{low:.3f}, {high:.3f}]"
        for key, label in GAIN_LABELS.items():
            if key in row:
                value, low, high = row[key][:3]
                cells[label] = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        table.append(cells)
    return table

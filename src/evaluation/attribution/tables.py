"""Tables of attributions and of permutation importance, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from src.evaluation.attribution.gradients import Attribution
from src.evaluation.attribution.importance import Importance
from src.evaluation.attribution.level import SIMILARITIES
from src.evaluation.attribution.regions import GROUPS, HIGHER_GROUP
from src.evaluation.statistics import (
    Difference,
    Interval,
    bootstrap_mean,
    paired_bootstrap,
    percentile_interval,
)

ONE_REGION = "one region"  # regions are permuted one at a time
GROUP = "group"  # all early or all higher areas are permuted jointly

SHARE_COLUMNS = ["measure", "permuted", "score", "than", "value", "low", "high", "p"]


def bootstrap_share(
    values: np.ndarray, chosen: np.ndarray, n_boot: int = 2000, seed: int = 0
) -> np.ndarray:
    """Share of the summed mean that chosen rows have, (1 + n_boot,): of the images as they are,
    then of resamples of them.

    Args:
        values: (rows, images), e.g. drops by region.
        chosen: bool (rows,).
        n_boot: resamples; equal seeds and numbers of images mean equal resamples, which pairs
            shares.
        seed: of these.

    Returns:
        NaN everywhere where the 95 % interval of the sum reaches 0: of nothing there are no shares.
    """
    n_images = values.shape[1]
    picks = np.random.default_rng(seed).integers(0, n_images, (n_boot, n_images))
    series = [np.append(row.mean(), row[picks].mean(1)) for row in values]
    means = np.stack(series)  # (rows, 1 + n_boot)
    total = means.sum(0)
    if total[0] <= 0 or percentile_interval(total[1:])[0] <= 0:
        return np.full(n_boot + 1, np.nan)
    return means[chosen].sum(0) / total


def _share_interval(draws: np.ndarray) -> Interval:
    """Interval of a series of `bootstrap_share`."""
    return Interval(float(draws[0]), *percentile_interval(draws[1:]))


def _share_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """a - b of two series of `bootstrap_share`, with the two-sided bootstrap p of no difference."""
    draws = a - b
    if not np.isfinite(draws).all():
        return Difference(np.nan, np.nan, np.nan, np.nan)
    n_below = (draws[1:] <= 0).sum()
    n_above = (draws[1:] >= 0).sum()
    p = 2 * (1 + min(n_below, n_above)) / len(draws)
    return Difference(*_share_interval(draws), float(min(p, 1.0)))


def importance_table(importance: Importance) -> pd.DataFrame:
    """Drops and what is left, with intervals over images.

    Returns:
        One row a level, measure, score and region: measure "drop" (score less score with the region
        permuted; p of no drop) or "only" (score with every other region permuted); "intact" has the
        score itself under the region "all". [level, measure, score, region, voxels, value, low,
        high, p, per_100_voxels].
    """
    rows = []

    def add(measure: str, score: str, region: str, interval: Interval | Difference) -> None:
        labels = {"measure": measure, "score": score, "region": region}
        rows.append(labels | interval._asdict())

    for score, intact in importance.intact.items():
        add("intact", score, "all", bootstrap_mean(intact))
        for region in importance.sizes:
            permuted = importance.permuted[score, region]
            add("drop", score, region, paired_bootstrap(intact, permuted))
            if region != "all":
                add("only", score, region, bootstrap_mean(importance.isolated[score, region]))
    table = pd.DataFrame(rows)
    table.insert(0, "level", importance.kind)
    table.insert(4, "voxels", table["region"].map(importance.sizes))
    per_voxel = 100 * table["value"] / table["voxels"]
    table["per_100_voxels"] = per_voxel.where(table["measure"] == "drop")
    return table


def attribution_table(
    kind: str, attribution: Attribution, regions: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Share of each region in the summed attribution (measure "attribution"), with intervals over
    images; columns as `importance_table`.
    """
    values = attribution.values
    sums = np.stack([values[:, voxels].sum(1) for voxels in regions.values()])  # (regions, images)
    rows = []
    for i, (region, voxels) in enumerate(regions.items()):
        share = _share_interval(bootstrap_share(sums, np.arange(len(sums)) == i))
        labels = {
            "level": kind,
            "measure": "attribution",
            "score": "similarity",
            "region": region,
            "voxels": len(voxels),
        }
        rows.append(labels | share._asdict())
    table = pd.DataFrame(rows)
    table["per_100_voxels"] = 100 * table["value"] / table["voxels"]
    return table


def share_of_higher(
    levels: Sequence[Importance], groups: Mapping[str, Mapping[str, Sequence[str]]]
) -> pd.DataFrame:
    """The share of the drop that is owed to higher areas: for each score, and as difference of each
    high-level from each low-level score.

    Two ways to add up, which differ where regions stand in for each other: "one region": the drops
    of single regions, summed over those of each group, where information that several regions have
    counts for none of them; "group": the drops of the two groups, each permuted jointly.

    Args:
        levels: importance of both levels, or of one, over the same images.
        groups: by kind of the level, from `group_regions`.

    Returns:
        [measure, permuted, score, than, value, low, high, p]: measure "share of higher areas", or
        "difference of shares" (score less `than`), paired over images. A level of which one of the
        groups has no region is left out. NaN where a score does not fall.
    """
    rows: list[dict[str, Any]] = []

    def add(measure: str, way: str, score: str, than: str, interval: Any) -> None:
        labels = {"measure": measure, "permuted": way, "score": score, "than": than}
        rows.append(labels | interval._asdict())

    for way in (ONE_REGION, GROUP):
        shares: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in SIMILARITIES}
        for level in levels:
            if set(groups[level.kind]) == set(GROUPS):
                shares[level.kind] = _compute_shares(level, groups[level.kind], way)
        high, low = shares["high_level"], shares["low_level"]
        for score, draws in {**high, **low}.items():
            add("share of higher areas", way, score, "", _share_interval(draws))
        for score, draws in high.items():
            for than, low_draws in low.items():
                difference = _share_difference(draws, low_draws)
                add("difference of shares", way, score, than, difference)
    return pd.DataFrame(rows, columns=SHARE_COLUMNS)


def _compute_shares(
    importance: Importance, groups: Mapping[str, Sequence[str]], way: str
) -> dict[str, np.ndarray]:
    """Share of higher areas in the drop by score, as series of `bootstrap_share`."""
    is_higher = {}
    for group, members in groups.items():
        for name in members if way == ONE_REGION else [group]:
            is_higher[name] = group == HIGHER_GROUP
    chosen = np.array(list(is_higher.values()))
    shares = {}
    for score in importance.intact:
        drops = np.stack([importance.drop(score, name) for name in is_higher])
        shares[score] = bootstrap_share(drops, chosen)
    return shares


def voxel_table(
    voxels: pd.DataFrame, levels: Mapping[str, tuple[np.ndarray, Attribution]]
) -> pd.DataFrame:
    """One row a voxel of the subject: the table of voxels, and of each level mean and mean absolute
    attribution over images.

    Args:
        voxels: `Subject.voxels`.
        levels: by kind the columns (selected,) of the decoder and its attribution.

    Returns:
        The table with <kind>_mean and <kind>_absolute, NaN for voxels that the decoder was not
        given.
    """
    table = voxels.copy()
    for kind, (columns, attribution) in levels.items():
        means = {
            "mean": attribution.values.mean(0),
            "absolute": np.abs(attribution.values).mean(0),
        }
        for name, values in means.items():
            column = np.full(len(table), np.nan)
            column[columns] = values
            table[f"{kind}_{name}"] = column
    return table


def describe_importance(
    table: pd.DataFrame, shares: pd.DataFrame, low: str = "pixcorr"
) -> list[str]:
    """Plain sentences: which regions carry a score most, and whether higher areas carry more of the
    high-level scores than of a low-level one.

    Args:
        table: rows of `importance_table` of one or both levels.
        shares: of `share_of_higher`.
        low: the low-level score.
    """
    is_single = ~table["region"].isin([*GROUPS, "all"])
    drops = table[(table["measure"] == "drop") & is_single]
    groups = drops.groupby("score", sort=False)
    sentences = [_describe_drops(str(score), part) for score, part in groups]

    is_share = shares["measure"] == "share of higher areas"
    share_of = shares[is_share].set_index(["permuted", "score"])["value"]
    is_difference = (shares["measure"] == "difference of shares") & (shares["than"] == low)
    for row in shares[is_difference].to_dict("records"):
        sentences.append(_describe_shares(row, share_of, low))
    return sentences


def _describe_drops(score: str, drops: pd.DataFrame) -> str:
    """The three regions without which a score falls most."""
    clear = drops[drops["low"] > 0].sort_values("value", ascending=False)[:3]
    regions = [
        "{region} ({value:.3f} [{low:.3f}, {high:.3f}])".format_map(row)
        for row in clear.to_dict("records")
    ]
    if not regions:
        return f"{score} does not clearly fall without any single region."
    return f"{score} falls most without {', '.join(regions)}."


def _describe_shares(row: Mapping[Any, Any], share_of: pd.Series, low: str) -> str:
    """Whether higher areas carry more of a score than of the low-level one."""
    score, way = row["score"], row["permuted"]
    value, start, end = (100 * row[key] for key in ("value", "low", "high"))
    method = "all early or all higher areas permuted"
    if way == ONE_REGION:
        method = "one region permuted at a time"
    if not np.isfinite(value):
        return f"With {method}, {score} and {low} cannot be compared: one of them does not fall."
    comparison = "no clearly different share of"
    if start > 0:
        comparison = "more of"
    elif end < 0:
        comparison = "less of"
    return (
        f"With {method}, higher areas carry {comparison} {score} than of {low}:"
        f" {share_of[way, score]:.0%} of its drop against {share_of[way, low]:.0%},"
        f" {value:+.0f} points [{start:+.0f}, {end:+.0f}]."
    )

"""What is lost on test images whose cluster was not trained (docs/overlap.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from src.evaluation.compare.differences import is_paired
from src.evaluation.compare.runs import ScoredRun
from src.evaluation.statistics import bootstrap_mean, percentile_interval
from src.utils import PerceptError

EFFECT_COLUMNS = ["metric", "images", "value", "low", "high", "n"]  # of held_out.csv


class HeldOutPair(NamedTuple):
    """A run trained without some clusters, and the plain run of the same recipe, decoder and number
    of components, each with the condition that this decoder has in it.
    """

    run: ScoredRun
    condition: str
    plain: ScoredRun
    plain_condition: str


def held_out_pairs(runs: Sequence[ScoredRun]) -> list[HeldOutPair]:
    """Every run without some clusters beside its plain run, where there is one."""
    pairs = []
    for run in runs:
        if run.training.get("split") != "cluster-held-out":
            continue
        for decoder, condition in run.decoded().items():
            plain = _find_plain(runs, run, decoder)
            if plain is None:
                continue
            plain_condition = plain.decoded()[decoder]
            if condition in run.conditions and plain_condition in plain.conditions:
                pairs.append(HeldOutPair(run, condition, plain, plain_condition))
    return pairs


def _find_plain(runs: Sequence[ScoredRun], run: ScoredRun, decoder: str) -> ScoredRun | None:
    """The run that was trained on all clusters and is the same otherwise; one whose decoders are
    the same too comes first.
    """

    def is_plain(other: ScoredRun) -> bool:
        if other.training.get("split", "") != "images" or decoder not in other.decoded():
            return False
        shared = ("recipe", "n_components")
        return all(other.training.get(name) == run.training.get(name) for name in shared)

    candidates = [other for other in runs if is_plain(other)]
    candidates.sort(key=lambda other: other.training["decoder"] != run.training["decoder"])
    return candidates[0] if candidates else None


def held_out_effect(
    held_out_scores: Mapping[str, pd.Series],
    plain_scores: Mapping[str, pd.Series],
    is_held_out: pd.Series,
    better: Mapping[str, str],
    n_boot: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """What a training without some clusters changes on test images of these clusters, and on the
    others.

    Changes are paired by image and signed so that a negative one is a loss, also for distances. The
    others are the control, since the training without clusters has fewer images; `effect` is the
    change on held-out clusters beyond that on the others (Shirakawa et al., arXiv 2405.10078, hold
    out clusters; the difference of differences is ours), its interval from resamples of either
    group of images.

    Args:
        held_out_scores: (n,) by metric of the run trained without the clusters, indexed by image.
        plain_scores: the same of the plain run.
        is_held_out: (n,) bool indexed by image, whether its cluster was held out.
        better: "higher" or "lower" by metric.
        n_boot: resamples.
        seed: of these.

    Returns:
        [metric, images, value, low, high, n] with images in held-out clusters, kept clusters,
        effect; metrics that are not paired are absent.

    Raises:
        PerceptError: all images are of one group.
    """
    if is_held_out.all() or not is_held_out.any():
        raise PerceptError(
            "Of these test images all or none are in held-out clusters: there is nothing to hold"
            " the change against."
        )
    lines: list[list] = []
    rng = np.random.default_rng(seed)
    for metric, values in held_out_scores.items():
        plain = plain_scores[metric]
        if not is_paired(values, plain) or not set(values.index) <= set(is_held_out.index):
            continue
        values = values.sort_index()
        sign = 1 if better[metric] == "higher" else -1
        change = (values - plain.loc[values.index]).to_numpy() * sign  # (n,)
        mask = is_held_out.loc[values.index].to_numpy()
        if mask.all() or not mask.any():
            continue
        groups = {"held-out clusters": change[mask], "kept clusters": change[~mask]}
        for name, group in groups.items():
            lines.append([metric, name, *bootstrap_mean(group, n_boot, seed), len(group)])
        # the groups are resampled independently
        means = [_resample_means(group, n_boot, rng) for group in groups.values()]
        low, high = percentile_interval(means[0] - means[1])
        effect = change[mask].mean() - change[~mask].mean()
        lines.append([metric, "effect", effect, low, high, len(change)])
    return pd.DataFrame(lines, columns=EFFECT_COLUMNS)


def _resample_means(values: np.ndarray, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """Means (n_boot,) of resamples of values (n,)."""
    picks = rng.integers(0, len(values), (n_boot, len(values)))
    return values[picks].mean(1)

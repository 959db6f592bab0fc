"""Which voxels and regions a decoder's predictions rest on: integrated gradients of their
similarity to the truth, and permutation of regions.

- Explained is a decoder, not the brain: what it does not use may carry the same information, and
  voxels that say the same share the credit.
- Networks and ridge baselines are treated alike: a `Level` is a decoder as a function of z-scored
  voxels, components included.
- Regions are disjoint here (`partition_voxels`), so that shares add up; both methods index the voxels that
  the decoder was given, not those of the subject.
- Permutation looks at test images in the way that scores do: it measures, and chooses nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from sklearn.decomposition import PCA
from torch import Tensor, nn

from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.evaluation.statistics import (
    CONFIDENCE,
    Difference,
    Interval,
    bootstrap_mean,
    derangements,
    paired_bootstrap,
)
from src.networks.linear import RidgeBaseline
from src.prior import BrainDiffusionPrior
from src.utils import PerceptError, progress

# names that early visual cortex has in the data sets known here
EARLY = "V1,V2,V3,V4,hV4,V1v,V1d,V2v,V2d,V3v,V3d,LHEarlyVis,RHEarlyVis,early"

HALVES = {"left", "right"}  # Boolean columns that are no regions

REST = "no region"

GROUPS = {False: "early areas", True: "higher areas"}

# mean error of completeness, as a share of the mean change, beyond which steps are too few
TOLERATED = 0.05

PROBE_COMPONENTS = 256

PROBE_PENALTIES = tuple(float(alpha) for alpha in np.logspace(0, 6, 13))

BATCH = 128  # images (times steps) that a decoder sees at a time


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of rows, (n, features) twice -> (n,)."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


SIMILARITIES: dict[
    str, tuple[str, Callable[[Tensor, Tensor], Tensor]]
] = {  # what is explained at each level
    "high_level": ("cosine of predicted and true CLIP tokens", F.cosine_similarity),
    "low_level": ("correlation of predicted and true latent", _correlation),
}


@dataclass(frozen=True)
class Level:
    """One level of a decoder with the test images that it is asked about. Made by `open_level`.

    Attributes:
        kind: "high_level" or "low_level".
        decoder: the trained module, in eval mode.
        voxels: float32 (images, selected), z-scored, repeats averaged; selected are the voxels that
            this decoder was trained on.
        columns: int64 (selected,), which voxels of the subject these are.
        baseline: float32 (selected,), where integrated gradients begin.
        truth: (images, ...) true tokens or latents.
        components: (selected, components) that the voxels are multiplied with before the decoder
            sees them, or None.
        device: torch device.
    """

    kind: str
    decoder: nn.Module
    voxels: np.ndarray
    columns: np.ndarray
    baseline: np.ndarray
    truth: Tensor
    components: Tensor | None = None
    device: str = "cpu"

    def output(self, voxels: Tensor) -> Tensor:
        """What the decoder predicts of voxels (n, selected), differentiable: latents, tokens of a
        ridge, or projected tokens, (n, features).
        """
        x = voxels if self.components is None else voxels @ self.components.to(voxels)
        if isinstance(self.decoder, BrainDiffusionPrior):
            voxel2clip: Any = self.decoder.voxel2clip
            return voxel2clip.predict_tokens(x)[1].flatten(1)
        out = self.decoder(x)
        return (out[0] if isinstance(out, tuple) else out).flatten(
            1
        )  # the low-level network also returns its contrastive maps

    @torch.no_grad()
    def predict(self, voxels: np.ndarray) -> Tensor:
        """Predictions (n, ...), shaped as the truth, of voxels (n, selected)."""
        parts = [
            self.output(torch.as_tensor(some, device=self.device)).cpu()
            for some in np.array_split(voxels, max(1, -(-len(voxels) // BATCH)))
        ]
        return torch.cat(parts).view(len(voxels), *self.truth.shape[1:])


def open_level(
    subject: Subject,
    kind: str,
    decoder: nn.Module,
    path: str | Path,
    truth: Any,
    first: int = 0,
    baseline: str = "zero",
    device: str = "cpu",
) -> Level:
    """A trained decoder and the test images' voxels as it was trained on them.

    Args:
        subject: from `open_training_split`.
        kind: "high_level" or "low_level".
        decoder: from `load_decoder`.
        path: its file; the normaliser.safetensors nearest above it is its own. A released file
            (.pth) is for betas as they are.
        truth: true tokens or latents of the test images (images, ...).
        first: only so many test images, 0 for all.
        baseline: key of START_POINTS.
        device: torch device.

    Raises:
        PerceptError: for an unknown baseline, a missing normaliser, or one of other voxels than the
            subject has.
    """
    if baseline not in START_POINTS:
        raise PerceptError(
            f"The baseline '{baseline}' is unknown: choose one of {', '.join(START_POINTS)}."
        )
    scale = Normaliser.for_checkpoint(path)
    if scale is not None and scale.n_voxels != subject.betas.shape[1]:
        raise PerceptError(
            f"{path} was trained on rows of {scale.n_voxels} voxels and the subject has"
            f" {subject.betas.shape[1]}: name its own dataset and subj."
        )
    components = (
        None if scale is None or scale.components is None else torch.from_numpy(scale.components)
    )
    if scale is not None:
        scale = copy.copy(scale)
        scale.components = (
            None  # voxels are attributed; the decoder is reached through the components
        )
    voxels = subject.get_mean_betas("test", normaliser=scale)[0][: first or None]
    selected = (
        None if scale is None or scale.masked else scale.columns
    )  # masked: voxels of no such region are 0 here and in the baseline, and add nothing
    columns = np.arange(subject.betas.shape[1]) if selected is None else selected
    start = START_POINTS[baseline](subject, scale, voxels.shape[1])
    return Level(
        kind,
        decoder,
        voxels,
        columns,
        start,
        torch.as_tensor(truth).float()[: first or None],
        components,
        device,
    )


def _mean_of_training(subject: Subject, scale: Normaliser | None, width: int) -> np.ndarray:
    """Mean of the training images' voxels, float32 (selected,)."""
    return subject.get_mean_betas("train", normaliser=scale)[0].mean(0)


START_POINTS: dict[str, Callable[[Subject, Normaliser | None, int], np.ndarray]] = {
    "zero": lambda subject, scale, width: np.zeros(width, np.float32),
    "train": _mean_of_training,
}


class Attribution(NamedTuple):
    """What each voxel adds to the similarity.

    values: float32 (images, selected); change: (images,) similarity at the voxels less that at the
    baseline; error: (images,) sum of values less change.
    """

    values: np.ndarray
    change: np.ndarray
    error: np.ndarray

    @property
    def relative_error(self) -> float:
        """Mean absolute error of completeness as a share of the mean absolute change."""
        return float(np.abs(self.error).mean() / max(np.abs(self.change).mean(), 1e-12))


def integrated_gradients(level: Level, target: str = "seen", steps: int = 32) -> Attribution:
    """Attribute the similarity of prediction and target to voxels, along the straight line from the
    baseline to what was measured.

    Completeness holds: over voxels, the values add up to the difference of the similarity between
    the two ends; by how much a sum of `steps` gradients misses it is returned.

    Args:
        level: from `open_level`.
        target: "seen": the true tokens or latent, so that the truth is part of what is explained;
            "predicted": the decoder's own prediction, which needs no truth: what makes the
            prediction the one that it is.
        steps: points on the line, by Gauss-Legendre.

    Raises:
        PerceptError: for an unknown target, fewer than 2 steps, or a similarity that is not finite.

    Warns:
        UserWarning: if the values miss the change by more than 5 %.

    Source: Sundararajan et al. 2017 (arXiv 1703.01365), equation 1 and proposition 1.
    """
    if target not in ("seen", "predicted") or steps < 2:
        raise PerceptError(
            f"Integrated gradients were asked for target '{target}' in {steps} steps: choose seen"
            " or predicted, and at least 2 steps."
        )
    similarity = SIMILARITIES[level.kind][1]
    wanted = (level.truth if target == "seen" else level.predict(level.voxels)).flatten(1)

    def explained(x: Tensor, towards: Tensor) -> Tensor:
        return similarity(level.output(x), towards)

    method, start = (
        IntegratedGradients(explained),
        torch.as_tensor(level.baseline, device=level.device)[None],
    )
    values, ends = [], []
    for rows in progress(
        np.array_split(np.arange(len(level.voxels)), -(-len(level.voxels) // 16)),
        f"attributing the {level.kind.replace('_', ' ')}",
    ):
        x, towards = (
            torch.as_tensor(level.voxels[rows], device=level.device),
            wanted[rows].to(level.device),
        )
        values.append(
            method.attribute(
                x,
                start,
                additional_forward_args=(towards,),
                n_steps=steps,
                internal_batch_size=BATCH,
            )
            .detach()
            .cpu()
        )
        with torch.no_grad():
            ends.append((explained(x, towards) - explained(start.expand_as(x), towards)).cpu())
    each, change = torch.cat(values).float().numpy(), torch.cat(ends).double().numpy()
    found = Attribution(each, change, each.sum(1, dtype=np.float64) - change)
    if not np.isfinite(found.error).all():
        raise PerceptError(
            f"The similarity of the {level.kind.replace('_', ' ')} is not finite for some images,"
            " so that nothing can be attributed: check the decoder."
        )
    if found.relative_error > TOLERATED:
        warnings.warn(
            f"Attributions miss the change of the similarity by {found.relative_error:.1%}: take"
            f" more than {steps} steps.",
            stacklevel=2,
        )
    return found


def partition_voxels(
    table: pd.DataFrame, columns: np.ndarray, names: str = ""
) -> dict[str, np.ndarray]:
    """Disjoint regions of the voxels that a decoder sees: a voxel of several regions belongs to the
    first of them.

    Args:
        table: `Subject.voxels`, one row a voxel of the subject.
        columns: int64 (selected,), which of these the decoder sees, in its order.
        names: regions separated by commas, first come first served; by default every Boolean
            column, in the order of the table.

    Returns:
        By region the positions among the selected voxels, int64; voxels of none under "no region".
        Regions without a voxel are left out.

    Raises:
        PerceptError: for a name that is no region, columns beyond the table, or a table without
            regions.
    """
    known = [str(name) for name in table.select_dtypes("bool").columns if name not in HALVES]
    wanted = [name.strip() for name in names.split(",") if name.strip()] or known
    if not known or (unknown := [name for name in wanted if name not in known]):
        what = (
            f"no region {', '.join(unknown)}: it has {', '.join(known)}"
            if known
            else "no Boolean column, so no region"
        )
        raise PerceptError(
            f"The table of voxels has {what}; name regions that were prepared (notebook 00)."
        )
    if len(columns) and columns.max() >= len(table):
        raise PerceptError(
            f"The decoder reads voxel {columns.max()} and the table ends at {len(table) - 1}: they"
            " are of different subjects."
        )
    member = table[wanted].to_numpy()[columns]  # (selected, regions)
    owner = np.where(member.any(1), member.argmax(1), len(wanted))
    found = {name: np.flatnonzero(owner == i) for i, name in enumerate([*wanted, REST])}
    return {name: positions for name, positions in found.items() if len(positions)}


def permute_region(voxels: np.ndarray, positions: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A copy of voxels (images, selected) in which those at `positions` are of the images in
    `order`, the same for all of them.
    """
    made = voxels.copy()
    made[:, positions] = voxels[np.ix_(order, positions)]
    return made


Score = Callable[[Tensor], np.ndarray]  # predictions (images, ...) -> (images,)


@dataclass(frozen=True)
class Importance:
    """Scores of each test image, with the brain as it is and with regions permuted (the mean over
    draws).

    Attributes:
        kind: of the level.
        sizes: voxels by region, the groups "early areas" and "higher areas" and "all" included.
        intact: by score (images,).
        without: by (score, region) (images,): this region permuted across images.
        only: by (score, region) (images,): every other region permuted, each by a permutation of
            its own.
    """

    kind: str
    sizes: dict[str, int]
    intact: dict[str, np.ndarray]
    without: dict[tuple[str, str], np.ndarray]
    only: dict[tuple[str, str], np.ndarray]

    def drop(self, score: str, region: str) -> np.ndarray:
        """By how much each image's score falls without a region, (images,)."""
        return self.intact[score] - self.without[score, region]


def group_regions(regions: Mapping[str, np.ndarray], early: str = EARLY) -> dict[str, list[str]]:
    """Names of the regions that are early visual areas, and of the others with a name, by GROUPS; a
    group without a region is left out.
    """
    names = {name.strip() for name in early.split(",")}
    found = {
        group: [name for name in regions if name != REST and (name not in names) is higher]
        for higher, group in GROUPS.items()
    }
    return {group: members for group, members in found.items() if members}


def permutation_importance(
    level: Level,
    regions: Mapping[str, np.ndarray],
    scores: Mapping[str, Score],
    groups: Mapping[str, Sequence[str]] | None = None,
    draws: int = 10,
    seed: int = 42,
    fewer: Mapping[str, int] | None = None,
) -> Importance:
    """How much scores fall when a region's voxels are those of other test images, and what is left
    when only this region's are right.

    All voxels of a region are moved by one permutation in which no image stays in its place, so
    that a region keeps its own pattern and loses its image. Draws are the same for every region,
    score and level of equally many images.

    Args:
        level: from `open_level`.
        regions: from `partition_voxels`.
        scores: by name, functions of the predictions (images, ...) that give a value an image.
        groups: further sets of regions by name, which are permuted jointly.
        draws: permutations, at least 1.
        seed: of these.
        fewer: draws of scores that are slow, by name, at least 1; the first of the others' draws.

    Raises:
        PerceptError: for fewer than one draw, or one image.

    Source: permutation importance, Breiman 2001, section 10.
    """
    draws_of = {score: min(draws, (fewer or {}).get(score, draws)) for score in scores}
    if min(draws_of.values()) < 1:
        raise PerceptError(f"draws are {draws_of}: permute at least once.")
    sets = {
        **regions,
        **{
            name: np.concatenate([regions[r] for r in members])
            for name, members in (groups or {}).items()
        },
    }
    sets["all"] = np.arange(level.voxels.shape[1])
    orders = list(derangements(len(level.voxels), draws, seed))
    others = list(
        derangements(len(level.voxels), draws * len(regions), seed + 1)
    )  # for each draw one a region

    def scored(
        change: Callable[[np.ndarray, int], np.ndarray], where: np.ndarray
    ) -> dict[str, np.ndarray]:
        each: dict[str, list[np.ndarray]] = {score: [] for score in scores}
        for draw in range(draws):
            prediction = level.predict(change(where, draw))
            for score, compute in scores.items():
                if draw < draws_of[score]:
                    each[score].append(compute(prediction))
        return {score: np.mean(values, 0) for score, values in each.items()}

    def without(where: np.ndarray, draw: int) -> np.ndarray:
        return permute_region(level.voxels, where, orders[draw])

    def alone(where: np.ndarray, draw: int) -> np.ndarray:
        made = level.voxels.copy()
        for k, own in enumerate(regions.values()):
            moved = np.setdiff1d(own, where)
            made[:, moved] = level.voxels[np.ix_(others[draw * len(regions) + k], moved)]
        return made

    prediction = level.predict(level.voxels)
    found = Importance(
        level.kind,
        {name: len(where) for name, where in sets.items()},
        {score: compute(prediction) for score, compute in scores.items()},
        {},
        {},
    )
    for name, where in progress(
        sets.items(), f"permuting regions of the {level.kind.replace('_', ' ')}", len(sets)
    ):
        found.without.update(
            {(score, name): values for score, values in scored(without, where).items()}
        )
        if name != "all":
            found.only.update(
                {(score, name): values for score, values in scored(alone, where).items()}
            )
    return found


def fit_probes(
    tokens: Any, labels: Mapping[str, Any], cv: int = 5, seed: int = 42
) -> dict[str, Callable[[Any], np.ndarray]]:
    """Linear probes that name labels from tokens, fitted on true tokens of training images.

    Least squares on indicators of the labels from the first principal components of the tokens,
    which are taken at unit length; the penalty is chosen by cross-validation within these images.

    Args:
        tokens: (images, ...) of training images.
        labels: by column of the labels (images,) of these.
        cv: folds.
        seed: of these, and of the search for components.

    Returns:
        By column a function from tokens (n, ...) to names (n,).

    Raises:
        PerceptError: for a column with one label only.
    """
    x = _unit(tokens)
    pca = PCA(min(PROBE_COMPONENTS, *x.shape), svd_solver="randomized", random_state=seed).fit(x)
    known = pca.transform(x)

    def fitted(column: str, values: Any) -> Callable[[Any], np.ndarray]:
        names, codes = np.unique(np.asarray(values).astype(str), return_inverse=True)
        if len(names) < 2:
            raise PerceptError(
                f"A probe needs at least two labels, and the training images have {len(names)} in"
                f" the column {column}: leave it out."
            )
        ridge = RidgeBaseline.fit(
            known,
            np.eye(len(names), dtype=np.float32)[codes],
            alphas=PROBE_PENALTIES,
            cv=cv,
            seed=seed,
        )
        return lambda found: names[
            ridge(torch.from_numpy(pca.transform(_unit(found)))).detach().numpy().argmax(1)
        ]

    return {column: fitted(column, values) for column, values in labels.items()}


def _unit(tokens: Any) -> np.ndarray:
    """Tokens (n, ...) flat, of length sqrt(features), so that a feature is about 1; float32."""
    flat = F.normalize(torch.as_tensor(tokens).detach().cpu().float().flatten(1), dim=1)
    return (flat * flat.shape[1] ** 0.5).numpy()


def naming_score(probe: Callable[[Any], np.ndarray], labels: Any) -> Score:
    """The score of a probe: for each image 1 if its own label is named, else 0."""
    right = np.asarray(labels).astype(str)
    return lambda found: (probe(found) == right).astype(float)


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
    images = values.shape[1]
    at = np.random.default_rng(seed).integers(0, images, (n_boot, images))
    means = np.stack(
        [np.concatenate([[row.mean()], row[at].mean(1)]) for row in values]
    )  # (rows, 1 + n_boot)
    total = means.sum(0)
    if total[0] <= 0 or np.quantile(total[1:], (1 - CONFIDENCE) / 2) <= 0:
        return np.full(n_boot + 1, np.nan)
    return means[chosen].sum(0) / total


def _interval(draws: np.ndarray) -> Interval:
    """First value and percentile interval of the others."""
    tail = (1 - CONFIDENCE) / 2
    return Interval(float(draws[0]), *(float(q) for q in np.quantile(draws[1:], [tail, 1 - tail])))


def _difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """a - b of two series of `bootstrap_share`, with the two-sided bootstrap p of no difference."""
    draws = a - b
    if not np.isfinite(draws).all():
        return Difference(np.nan, np.nan, np.nan, np.nan)
    p = 2 * (1 + min((draws[1:] <= 0).sum(), (draws[1:] >= 0).sum())) / len(draws)
    return Difference(*_interval(draws), float(min(p, 1.0)))


def importance_table(found: Importance) -> pd.DataFrame:
    """Drops and what is left, with intervals over images.

    Returns:
        One row a level, measure, score and region: measure "drop" (score less score with the region
            permuted; p of no drop) or "only" (score with every other
        region permuted); "intact" has the score itself under the region "all". [level, measure,
        score, region, voxels, value, low, high, p, per_100_voxels].
    """
    rows = []
    for score, intact in found.intact.items():
        rows.append(
            {
                "measure": "intact",
                "score": score,
                "region": "all",
                **bootstrap_mean(intact)._asdict(),
            }
        )
        for region in found.sizes:
            rows.append(
                {
                    "measure": "drop",
                    "score": score,
                    "region": region,
                    **paired_bootstrap(intact, found.without[score, region])._asdict(),
                }
            )
            if region != "all":
                rows.append(
                    {
                        "measure": "only",
                        "score": score,
                        "region": region,
                        **bootstrap_mean(found.only[score, region])._asdict(),
                    }
                )
    table = pd.DataFrame(rows)
    table.insert(0, "level", found.kind)
    table.insert(4, "voxels", table["region"].map(found.sizes))
    table["per_100_voxels"] = (100 * table["value"] / table["voxels"]).where(
        table["measure"] == "drop"
    )
    return table


def attribution_table(
    kind: str, found: Attribution, regions: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Share of each region in the summed attribution (measure "attribution"), with intervals over
    images; columns as `importance_table`.
    """
    sums = np.stack(
        [found.values[:, positions].sum(1) for positions in regions.values()]
    )  # (regions, images)
    rows = []
    for i, (region, positions) in enumerate(regions.items()):
        share = _interval(bootstrap_share(sums, np.arange(len(sums)) == i))
        rows.append(
            {
                "level": kind,
                "measure": "attribution",
                "score": "similarity",
                "region": region,
                "voxels": len(positions),
                **share._asdict(),
            }
        )
    table = pd.DataFrame(rows)
    table["per_100_voxels"] = 100 * table["value"] / table["voxels"]
    return table


def share_of_higher(
    levels: Sequence[Importance], groups: Mapping[str, Mapping[str, Sequence[str]]]
) -> pd.DataFrame:
    """Which share of the drop is owed to higher areas: for each score, and as difference of each
    high-level from each low-level score.

    Two ways to add up, which differ where regions stand in for each other: "one region": the drops
    of single regions, summed over those of each group, where what several regions know counts for
    none of them; "group": the drops of the two groups, each permuted jointly.

    Args:
        levels: importance of both levels, or of one, over the same images.
        groups: by kind of the level, from `group_regions`.

    Returns:
        [measure, permuted, score, than, value, low, high, p]: measure "share of higher areas", or
        "difference of shares" (score less `than`), paired over images. A level of which one of the
        groups has no region is left out. NaN where a score does not fall.
    """
    columns = ["measure", "permuted", "score", "than", "value", "low", "high", "p"]
    rows: list[dict[str, Any]] = []
    for way in ("one region", "group"):
        shares: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in SIMILARITIES}
        for level in levels:
            mine = groups[level.kind]
            if set(mine) != set(GROUPS.values()):
                continue
            belongs = {
                name: group == GROUPS[True]
                for group, members in mine.items()
                for name in (members if way == "one region" else [group])
            }
            for score in level.intact:
                drops = np.stack([level.drop(score, name) for name in belongs])
                shares[level.kind][score] = bootstrap_share(drops, np.array(list(belongs.values())))
        for score, draws in {**shares["high_level"], **shares["low_level"]}.items():
            rows.append(
                {
                    "measure": "share of higher areas",
                    "permuted": way,
                    "score": score,
                    "than": "",
                    **_interval(draws)._asdict(),
                }
            )
        for score, draws in shares["high_level"].items():
            for than, others in shares["low_level"].items():
                rows.append(
                    {
                        "measure": "difference of shares",
                        "permuted": way,
                        "score": score,
                        "than": than,
                        **_difference(draws, others)._asdict(),
                    }
                )
    return pd.DataFrame(rows, columns=columns)


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
    made = voxels.copy()
    for kind, (columns, found) in levels.items():
        for name, values in (
            ("mean", found.values.mean(0)),
            ("absolute", np.abs(found.values).mean(0)),
        ):
            column = np.full(len(made), np.nan)
            column[columns] = values
            made[f"{kind}_{name}"] = column
    return made


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
    said, drops = (
        [],
        table[(table["measure"] == "drop") & ~table["region"].isin([*GROUPS.values(), "all"])],
    )
    for score, each in drops.groupby("score", sort=False):
        mine = each[each["low"] > 0].sort_values("value", ascending=False)[:3]
        listed = ", ".join(
            "{region} ({value:.3f} [{low:.3f}, {high:.3f}])".format_map(row)
            for row in mine.to_dict("records")
        )
        said.append(
            f"{score} falls most without {listed}."
            if listed
            else f"{score} does not clearly fall without any single region."
        )
    found = shares[(shares["measure"] == "difference of shares") & (shares["than"] == low)]
    of = shares[shares["measure"] == "share of higher areas"].set_index(["permuted", "score"])[
        "value"
    ]
    for row in found.to_dict("records"):
        score, way, value, start, end = (
            row["score"],
            row["permuted"],
            *(100 * row[key] for key in ("value", "low", "high")),
        )
        how = (
            "one region permuted at a time"
            if way == "one region"
            else "all early or all higher areas permuted"
        )
        if not np.isfinite(value):
            said.append(
                f"With {how}, {score} and {low} cannot be compared: one of them does not fall."
            )
            continue
        verdict = (
            "more of" if start > 0 else "less of" if end < 0 else "no clearly different share of"
        )
        said.append(
            f"With {how}, higher areas carry {verdict} {score} than of {low}: {of[way, score]:.0%}"
            f" of its drop against {of[way, low]:.0%}, {value:+.0f} points [{start:+.0f},"
            f" {end:+.0f}]."
        )
    return said

"""What stands beside a score, and how scores are stored: intervals, floors, ceilings, provenance and alarms.

- Statistics are taken over images: a mean with its bootstrap interval, paired differences, permutations.
- A score is not written without its floors and its ceiling (`write_metrics`).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from src.metrics import SIZE, Metric
from src.utils import PerceptError, atomic, write_json

CONFIDENCE = 0.95
CONTROLS = {
    "system": "the reconstructions themselves",
    "shuffled": "the same reconstructions against other test images: what any plausible pictures score",
    "mean_image": "the mean training image for every test image: what one blurred picture scores",
    "nearest_train": "the training image whose features are nearest to the prediction: what a lookup scores",
    "ceiling": "the generator fed with the true latents: the most this generator could score",
}


# ------------------------------------------------------------------------------------------------ statistics
class Interval(NamedTuple):
    """A mean over images and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference, its 95 % bootstrap interval and its two-sided p."""

    value: float
    low: float
    high: float
    p: float


def _values(values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise PerceptError(
            f"Statistics are taken over images: expected values (n,), got shape {values.shape}."
        )
    if not np.isfinite(values).all():
        raise PerceptError(
            f"{(~np.isfinite(values)).sum()} of {len(values)} per-image values are NaN or infinite; no "
            "mean is given."
        )
    return values


def _bootstrap(values: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Means (n_boot,) of resamples of the images."""
    return values[np.random.default_rng(seed).integers(0, len(values), (n_boot, len(values)))].mean(1)


def bootstrap_mean(values: Any, n_boot: int = 2000, seed: int = 0) -> Interval:
    """Mean of per-image values (n,) with its 95 % percentile interval over resamples of the images (Efron &
    Tibshirani 1993).
    """
    values = _values(values)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_bootstrap(values, n_boot, seed), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(a: Any, b: Any, n_boot: int = 2000, seed: int = 0) -> Difference:
    """Mean of a - b over the same images, (n,) and (n,), with its interval and the two-sided bootstrap p of
    no difference.

    The p is twice the smaller share of resampled means on either side of 0, counting the observed one, so it
    is never 0.
    """
    a, b = _values(a), _values(b)
    if a.shape != b.shape:
        raise PerceptError(
            f"A paired difference needs the same images on both sides; got {len(a)} and {len(b)} values."
        )
    means = _bootstrap(a - b, n_boot, seed)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    p = 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + n_boot)
    return Difference(float((a - b).mean()), float(low), float(high), float(min(p, 1.0)))


def permutation_p(
    own: Any, others: Any, better: str = "higher", n_permutations: int = 2000, seed: int = 0
) -> float:
    """One-sided p that reconstructions fit their own images better than other ones.

    If the pairing carried nothing, the own image would be exchangeable with the others, reconstruction by
    reconstruction: the null distribution takes, for each, one of its 1 + draws scores at random. The smallest
    p is 1 / (1 + n_permutations).

    Args:
        own: (n,) scores against the own image.
        others: (n, draws) scores of the same reconstructions against other images.
        better: "higher" or "lower".
        n_permutations: random draws from the null.
        seed: of these draws.
    """
    sign = {"higher": 1.0, "lower": -1.0}[better]
    own, others = sign * _values(own), sign * np.asarray(others, dtype=np.float64)
    if others.ndim != 2 or len(others) != len(own):
        raise PerceptError(
            f"Expected shuffled scores (n, draws) for n = {len(own)} images, got shape {others.shape}."
        )
    scores = np.column_stack([own, others])  # (n, 1 + draws)
    pick = np.random.default_rng(seed).integers(0, scores.shape[1], (n_permutations, len(own)))
    null = scores[np.arange(len(own)), pick].mean(1)  # (n_permutations,)
    return float((1 + (null >= own.mean() - 1e-12).sum()) / (1 + n_permutations))


def derangements(n: int, draws: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield `draws` random permutations (n,) in which nothing stays in its place."""
    if n < 2:
        raise PerceptError("A shuffled pairing needs at least two images.")
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        order = rng.permutation(n)
        while (order == np.arange(n)).any():  # about e tries
            order = rng.permutation(n)
        yield order


# ------------------------------------------------------------------------------------------------ tables
class Evaluator:
    """Scores several sets of reconstructions of the same images, preparing the true images once.

    Args:
        images: true images (n, 3, height, width) in [0, 1].
        metrics: the metrics to compute.
    """

    def __init__(self, images: Tensor, metrics: Sequence[Metric]):
        """Keep the images; they are prepared when a metric first needs them."""
        self.images, self.metrics = torch.as_tensor(images), list(metrics)
        self.features: dict[Callable, Any] = {}

    def score(self, recons: Tensor, row: str, shuffles: Sequence[np.ndarray] = ()) -> pd.DataFrame:
        """Score reconstructions (n, 3, height, width) in [0, 1].

        Args:
            recons: reconstructions in the order of the images.
            row: name of this set in the table.
            shuffles: permutations (n,) of the reconstructions, scored as draws of a further row "shuffled".

        Returns: Tidy table [metric, row, image, draw, value] with one line a metric, order and image; `image`
            counts from 0, and in the row "shuffled" names the reconstruction, so that its scores stand beside
            the one against its own image.
        """
        recons = torch.as_tensor(recons)
        if len(recons) != len(self.images):
            raise PerceptError(f"{len(recons)} pictures of '{row}' were given for {len(self.images)} true images: give one each, in the same order.")
        orders = [
            (row, 0, np.arange(len(recons))),
            *(("shuffled", draw, order) for draw, order in enumerate(shuffles)),
        ]
        prepared: dict[Callable, Any] = {}
        tables = []
        for metric in self.metrics:
            key = metric.prepare
            if key not in self.features:
                self.features[key] = metric.prepare_true(self.images)
            if key not in prepared:
                prepared[key] = key(recons)
            for name, draw, order in orders:
                values = metric.compare(self.features[key], prepared[key][order])
                columns = {"metric": metric.name, "row": name, "image": order, "draw": draw, "value": values}
                tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)


def score_table(
    images: Tensor,
    recons: Tensor,
    controls: dict[str, Tensor],
    ceiling: Tensor | None,
    metrics: Sequence[Metric],
    draws: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Score a system and its controls on the same images, one line an image.

    Args:
        images: true images (n, 3, height, width) in [0, 1].
        recons: the system's reconstructions, in the same order.
        controls: floors by name, e.g. {"mean_image": ..., "nearest_train": ...}, each (n, 3, height, width).
        ceiling: images made from the true latents, or None where there is no such thing (say why in
            `make_records`).
        metrics: e.g. `METRICS.values()`.
        draws: random pairings of the "shuffled" floor, which is always computed.
        seed: of these pairings.

    Returns: Tidy table [metric, row, image, draw, value]; row is "system", "shuffled", a control's name or
        "ceiling".
    """
    taken = {"system", "shuffled", "ceiling"} & set(controls)
    if taken:
        raise PerceptError(
            f"The control name {sorted(taken)[0]!r} is used by score_table itself; choose another one."
        )
    evaluator = Evaluator(images, metrics)
    tables = [
        evaluator.score(recons, "system", list(derangements(len(evaluator.images), draws, seed))),
        *(evaluator.score(control, name) for name, control in controls.items()),
    ]
    if ceiling is not None:
        tables.append(evaluator.score(ceiling, "ceiling"))
    return pd.concat(tables, ignore_index=True)


def make_record(
    name: str,
    values: Any,
    *,
    floors: dict[str, Any],
    ceiling: Any,
    better: str,
    protocol: str,
    test_set: str,
    **more: Any,
) -> dict[str, Any]:
    """One record of metrics.json from per-image values.

    Args:
        name: the metric.
        values: (n,) of the system.
        floors: per-image values (n,) by control; "shuffled" may be (n, draws), and then gives `p_shuffled`.
        ceiling: per-image values (n,), or a sentence saying why there is no ceiling.
        better: "higher" or "lower".
        protocol: name of the data protocol, e.g. "nsd-1000".
        test_set: id of the test images, `Subject.test_set`.
        **more: further entries, e.g. description, source, chance.

    Returns: {name, value, low, high, n, better, protocol, test_set, floors: {control: {value, low, high, p}},
        ceiling, p_shuffled, ...}; the p of a floor is that of `paired_bootstrap` against the system.
    """
    values = _values(values)
    record: dict[str, Any] = {
        "name": name,
        **bootstrap_mean(values)._asdict(),
        "n": len(values),
        "better": better,
    }
    record |= {"protocol": protocol, "test_set": test_set, "floors": {}}
    for control, scores in floors.items():
        scores = np.asarray(scores, dtype=np.float64)
        if control == "shuffled" and scores.ndim == 2:
            record["p_shuffled"] = permutation_p(values, scores, better)
            scores = scores.mean(1)
        p = paired_bootstrap(values, scores).p
        record["floors"][control] = {**bootstrap_mean(scores)._asdict(), "p": p}
    has_reason = isinstance(ceiling, str)
    record["ceiling"] = {"not_applicable": ceiling} if has_reason else bootstrap_mean(ceiling)._asdict()
    return record | more


def make_records(
    table: pd.DataFrame, metrics: Sequence[Metric], *, protocol: str, test_set: str, no_ceiling: str = ""
) -> list[dict[str, Any]]:
    """Summarise a `score_table` into the records of metrics.json.

    Args:
        table: [metric, row, image, draw, value].
        metrics: those of the table.
        protocol: name of the data protocol.
        test_set: id of the test images.
        no_ceiling: why the table has no "ceiling" row, where it has none.

    Raises:
        PerceptError: there is neither a ceiling nor a reason.
    """
    records = []
    for metric in metrics:
        mine = table[table["metric"] == metric.name]
        rows = {
            str(row): part.pivot(index="image", columns="draw", values="value").to_numpy()
            for row, part in mine.groupby("row", sort=False)
        }
        if "ceiling" not in rows and not no_ceiling:
            raise PerceptError(
                f"{metric.name} has no ceiling row; give one to score_table, or the reason in no_ceiling."
            )
        floors = {
            row: scores if row == "shuffled" else scores[:, 0]
            for row, scores in rows.items()
            if row not in ("system", "ceiling")
        }
        records.append(make_record(
            metric.name, rows["system"][:, 0], floors=floors, better=metric.better,
            protocol=protocol, test_set=test_set,
            ceiling=rows["ceiling"][:, 0] if "ceiling" in rows else no_ceiling,
            chance=metric.chance, description=metric.description, source=metric.source,
        ))  # fmt: skip
    return records


def provenance(
    recipe: str, seeds: dict[str, int], selection: Sequence[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """What a reader must know to repeat a table.

    Args:
        recipe: name of the recipe or run.
        seeds: seed by purpose.
        selection: one dict a choice that was made, e.g. {"what": "epoch", "chosen": 37, "split": "val",
            "candidates": 60}.
        **more: further entries, e.g. parameters, subject, alarms.
    """
    packages = ("numpy", "scipy", "scikit-image", "torch", "torchvision", "transformers", "diffusers")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    settings = {
        "pixel metrics": f"bilinear resize straight to {SIZE} pixels, without antialiasing",
        "grey": ".2125 red + .7154 green + .0721 blue",
        "intervals": "95 % percentile bootstrap over test images, 2000 resamples",
    }
    return {
        "recipe": recipe,
        "seeds": dict(seeds),
        "selection": list(selection),
        "versions": versions,
        "settings": settings,
        **more,
    }


def _is_score(entry: Any) -> bool:
    """Whether an entry of a record holds a finite value and interval."""
    numbers = [entry.get(key) for key in ("value", "low", "high")] if isinstance(entry, dict) else [None]
    return all(isinstance(number, float | int) and math.isfinite(number) for number in numbers)


def _check_record(record: dict[str, Any]) -> None:
    needed = ("name", "value", "low", "high", "n", "better", "protocol", "test_set")
    missing = [key for key in needed if record.get(key) in (None, "")]
    if missing:
        raise PerceptError(
            f"The record of {record.get('name', 'a metric')!r} lacks {', '.join(missing)}; make it with "
            "make_record."
        )

    name, floors, ceiling = record["name"], record.get("floors"), record.get("ceiling")
    if not _is_score(record):
        raise PerceptError(f"The score {name!r} is not finite; it is not written.")
    if not floors or not all(_is_score(floor) for floor in floors.values()):
        raise PerceptError(
            f"The score {name!r} has no floor; a score is only shown beside what no decoding would give "
            "(score_table adds a shuffled pairing, pass mean_image and nearest_train as controls)."
        )
    if not _is_score(ceiling) and not (isinstance(ceiling, dict) and ceiling.get("not_applicable")):
        raise PerceptError(
            f"The score {name!r} has no ceiling; score the generator on the true latents, "
            'or say why there is none with {"not_applicable": "the reason"}.'
        )


def write_metrics(path: str | Path, records: Sequence[dict[str, Any]], provenance: dict[str, Any]) -> None:
    """Write metrics.json: {"metrics": [one record a metric], "provenance": {...}}.

    Raises:
        PerceptError: a record lacks its floors, its ceiling (or the reason why there is none), its interval,
            protocol or test set; or the provenance lacks recipe, seeds or selection.
    """
    for record in records:
        _check_record(record)
    missing = [key for key in ("recipe", "seeds", "selection") if key not in provenance]
    if missing:
        raise PerceptError(
            f"The provenance lacks {', '.join(missing)}; make it with metrics.provenance(...)."
        )
    write_json(Path(path), {"metrics": list(records), "provenance": provenance})


def write_scores(path: str | Path, table: pd.DataFrame) -> None:
    """Write the per-image table [metric, row, image, draw, value] of `score_table` as parquet."""
    with atomic(Path(path)) as temporary:
        table.to_parquet(temporary, index=False)


# ------------------------------------------------------------------------------------------------ alarms
def check_outputs(recons: Any) -> list[str]:
    """Say what is wrong with reconstructions (n, 3, height, width) in [0, 1] before anyone scores them.

    Returns: Sentences, none when all is well: values that are not finite or out of range, black images,
        images of one colour, all alike.
    """
    recons = torch.as_tensor(recons).detach().float().cpu()
    n, flat = len(recons), recons.flatten(1)
    finite = torch.isfinite(flat).all(1)
    alarms = []

    def say(which: Tensor, what: str) -> None:
        if which.any():
            first = ", ".join(str(i) for i in which.nonzero()[:5, 0].tolist())
            alarms.append(f"{int(which.sum())} of {n} reconstructions {what} (first: {first}).")

    say(~finite, "hold NaN or infinite values; half precision in the decoder is the usual cause")
    flat = torch.where(finite[:, None], flat, 0.0)
    say((flat.amin(1) < -1e-3) | (flat.amax(1) > 1 + 1e-3), "leave the range [0, 1]; clamp them")
    black = finite & (flat.amax(1) < 0.02)
    say(black, "are black; a safety checker or a half-precision overflow is the usual cause")
    say(finite & ~black & (flat.std(1) < 0.01), "are of one flat colour")
    if n > 1 and flat.std(0).mean() < 0.1 * flat.std(1).mean():
        alarms.append(
            f"The {n} reconstructions are nearly alike (they differ less than a tenth of what one "
            "picture's pixels do): "
            "the decoder ignores the brain, or the generator its condition."
        )
    return alarms


def check_alignment(two_way: Any, pixcorr: Any, pixcorr_shuffled: float = 0.0) -> list[str]:
    """Say when scores look like rows of brain data and images that do not belong together.

    Args:
        two_way: (n,) of any two-way metric of the system.
        pixcorr: (n,) of the system.
        pixcorr_shuffled: mean pixel correlation of the shuffled pairing.

    Returns: One sentence when the interval of two-way identification reaches 50 % and the pixel correlation
        no better than shuffled, else none.
    """
    identification, pixels = bootstrap_mean(two_way), bootstrap_mean(pixcorr)
    if identification.low <= 0.5 and pixels.low <= pixcorr_shuffled + 0.02:
        return [
            f"Two-way identification is {identification.value:.1%} and the pixel correlation "
            f"{pixels.value:.3f}, as for a random "
            "pairing: your rows are probably misaligned (brain rows in another order than the images), or "
            "nothing was learned."
        ]
    return []

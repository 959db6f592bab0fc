"""Every choice within the training images: settings of each decoder, and which enter the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from src.metrics import pcc
from src.small_data.decoders import Decoder, Setting
from src.small_data.examples import Examples, Problem, pose_problem
from src.small_data.folds import Fold

Predictions = dict[str, np.ndarray]
Score = Callable[[np.ndarray, np.ndarray], float]

MEAN = "mean"  # name of the mean of the chosen decoders
CHOSEN = (
    "kernel",
    "voxels",
    "alpha",
    "strength",
    "clusters",
    "evidence",
)  # entries of settings that vary


@dataclass(frozen=True)
class Candidate:
    """A decoder and the settings that it may have.

    Attributes:
        predict: the decoder.
        settings: at least one.
        inner: what replaces entries of a setting while settings and mean are chosen, to save time.
    """

    predict: Decoder
    settings: Sequence[Setting]
    inner: Setting = field(default_factory=dict)


@dataclass(frozen=True)
class Decoded:
    """What was decoded of the test images of one fold.

    Attributes:
        predictions: float32 (test images, targets) by decoder, and of their mean.
        settings: the chosen setting by decoder.
        members: the decoders whose mean was taken.
        inner_scores: mean inner score by decoder, at the chosen setting, and of the mean.
    """

    predictions: Predictions
    settings: dict[str, Setting]
    members: tuple[str, ...]
    inner_scores: dict[str, float]

    def describe(self) -> dict[str, str | float]:
        """What was chosen, for one line of a table."""
        line: dict[str, str | float] = {"mean of": "+".join(self.members)}
        for name, setting in self.settings.items():
            chosen = [f"{key} {setting[key]}" for key in CHOSEN if key in setting]
            line[name] = ", ".join(chosen)
        for name, value in self.inner_scores.items():
            line[f"{name}, inner score"] = round(value, 4)
        return line


def mean_correlation(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over images of the correlation of true and predicted targets, (images, targets)."""
    return float(pcc(targets, predictions).mean())


def decode_fold(
    examples: Examples,
    fold: Fold,
    inner_folds: Sequence[Fold],
    candidates: Mapping[str, Candidate],
    score: Score = mean_correlation,
) -> Decoded:
    """Choose by cross-validation within the training images, fit to all of these, decode the rest.

    Args:
        examples: all images.
        fold: rows of the training and of the test images.
        inner_folds: of the training images, as positions among them.
        candidates: decoders by name.
        score: what choices maximise, of (images, targets) twice.

    Returns:
        Predictions of the test images. The mean is that of the subset of decoders whose mean is the
        best within the training images.
    """
    train_rows, test_rows = fold
    train = examples.select(train_rows)
    needed = max(s["voxels"] for c in candidates.values() for s in c.settings)
    problems = [
        pose_problem(train.select(rows), train.voxels[held_out], needed)
        for rows, held_out in inner_folds
    ]
    order = np.concatenate([held_out for _, held_out in inner_folds])
    truth = train.targets[order]
    problem = pose_problem(train, examples.voxels[test_rows], needed)
    settings: dict[str, Setting] = {}
    inner: Predictions = {}
    predictions: Predictions = {}
    for name, candidate in candidates.items():
        settings[name], inner[name] = choose_setting(candidate, problems, truth, score)
        predictions[name] = candidate.predict(problem, settings[name])
    members = choose_members(inner, truth, score)
    predictions[MEAN] = average(predictions, members)
    inner[MEAN] = average(inner, members)
    scores = {name: score(truth, predicted) for name, predicted in inner.items()}
    return Decoded(predictions, settings, members, scores)


def choose_setting(
    candidate: Candidate, problems: Sequence[Problem], truth: np.ndarray, score: Score
) -> tuple[Setting, np.ndarray]:
    """The setting with the best score over all inner folds, and its predictions (images, targets).

    Of settings that are as good as each other the first is taken.
    """
    best: tuple[float, Setting, np.ndarray] | None = None
    for setting in candidate.settings:
        quick = {**setting, **candidate.inner}
        predicted = np.concatenate([candidate.predict(problem, quick) for problem in problems])
        value = score(truth, predicted)
        if best is None or value > best[0]:
            best = (value, setting, predicted)
    if best is None:
        raise ValueError("a candidate needs at least one setting")
    return best[1:]


def choose_members(inner: Predictions, truth: np.ndarray, score: Score) -> tuple[str, ...]:
    """The subset of decoders whose mean prediction scores best within the training images.

    Args:
        inner: predictions (images, targets) by decoder, of images that were held out.
        truth: (images, targets).
        score: what is maximised.
    """
    subsets = [
        members for size in range(1, len(inner) + 1) for members in combinations(inner, size)
    ]
    return max(subsets, key=lambda members: score(truth, average(inner, members)))


def average(predictions: Predictions, members: Sequence[str]) -> np.ndarray:
    """Mean prediction (images, targets) of some decoders."""
    mean: np.ndarray = np.mean([predictions[name] for name in members], axis=0)
    return mean

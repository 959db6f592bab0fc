"""The splits that LAION-fMRI bundles: which images train, and which test.

A split is a JSON file, laion_fmri/splits/data/<pool>/<name>.json of the package: name, pool,
splitter, params, n_train, n_test, and variants, a list of one with train_ids and test_ids, the
names of images. The pool is `shared`, one of a subject (`sub-01`), or `pooled`. The text `pool`
inside the files of some subjects names another subject and is not used: the folder counts.

The files have changed between releases of the package, so a split is told by its SHA-256, which
`split_sha256` may require. Images whose names say OOD (out of distribution) never train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.files.foreign import load_json, read_errors, shorten
from src.readers.common import list_files, parse_name_list
from src.utils import PerceptError

PLACES = ("splits", "splits/data", "laion_fmri/splits/data", "")

OOD_KINDS = (
    "shape",
    "relations",
    "unusual",
    "cropped",
    "selfmade",
    "gaudy",
    "illusion-classic",
    "gabor",
    "illusion-natural",
)


@dataclass(frozen=True)
class Split:
    """A bundled split.

    Attributes:
        name: such as tau.
        pool: folder of the file: shared, sub-01 or pooled.
        train, test: names of images.
        sha256: of the file.
        path: of the file.
    """

    name: str
    pool: str
    train: frozenset[str]
    test: frozenset[str]
    sha256: str
    path: Path

    @property
    def protocol(self) -> str:
        """Name of the protocol, with the beginning of the checksum."""
        return f"laion-{self.name}@{self.pool}-{self.sha256[:8]}"


def is_ood(name: str) -> bool:
    """Whether the name of an image says that it is out of distribution."""
    return "_OOD_" in name


def find_ood_kind(name: str) -> str:
    """Kind of an out-of-distribution image, such as shape; "" for any other image."""
    if not is_ood(name):
        return ""
    rest = name.split("_OOD_", 1)[1].replace("_", "-")
    return next((kind for kind in OOD_KINDS if rest.startswith(kind)), "other")


def load_split(folder: Path, name: str, pool: str, expected_sha256: str = "") -> Split:
    """Load a split.

    Args:
        folder: that holds <pool>/<name>.json, or splits/, or the package's laion_fmri/.
        name: such as tau, random_0, cluster_k5_3 or ood.
        pool: shared, sub-01 or pooled.
        expected_sha256: beginning of the checksum that the file must have, "" for any.

    Raises:
        PerceptError: if it is missing (naming those that are there), of another version than is
            asked for or known, or has an image in training and test, or an OOD image in training.
    """
    candidates = [folder / place / pool / f"{name}.json" for place in PLACES]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise _explain_missing_split(folder, candidates[0], pool)
    content = load_json(path)
    with read_errors(path):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if not sha256.startswith(expected_sha256.lower()):
        raise PerceptError(
            f"{path} has the SHA-256 {sha256}, split_sha256 is {shorten(expected_sha256)}: take the"
            " split of that version, as the files changed between releases."
        )
    sides = _list_sides(content.get("variants"))
    counts = [content.get("n_train"), content.get("n_test")]
    if not all(sides) or counts != [len(side) for side in sides]:
        raise PerceptError(
            f"{path} is no split of a known version: it needs n_train, n_test and one variant with"
            " as many train_ids and test_ids; take the file of the package laion_fmri."
        )
    train, test = (frozenset(side) for side in sides)
    _check_sides(path, train, test)
    return Split(name, pool, train, test, sha256, path)


def _explain_missing_split(folder: Path, path: Path, pool: str) -> PerceptError:
    """The error to raise for a split that is not there."""
    folders = [folder / place / pool for place in PLACES]
    names = [file.stem for place in folders for file in list_files(place, "*.json")]
    available = f"{pool} has {', '.join(names)}" if names else "none is there"
    return PerceptError(
        f"The split {path} is missing, {available}: take the folder splits/data of the package"
        " laion_fmri, and give it with the option splits."
    )


def _list_sides(variants: Any) -> list[list[str]]:
    """Names of the training and of the test images of the one variant; [] for another form."""
    if not isinstance(variants, list) or len(variants) != 1 or not isinstance(variants[0], dict):
        return []
    sides = [variants[0].get(f"{side}_ids") for side in ("train", "test")]
    return [list(map(str, names)) if isinstance(names, list) else [] for names in sides]


def _check_sides(path: Path, train: Collection[str], test: Collection[str]) -> None:
    common = sorted(set(train) & set(test))
    if common:
        raise PerceptError(
            f"{path} has {common[0]!r} in training and in test ({len(common)} images): fetch it"
            " again."
        )
    leaked = sorted(filter(is_ood, train))
    if leaked:
        raise PerceptError(
            f"{path} has the out-of-distribution image {leaked[0]!r} in training ({len(leaked)}"
            " images), where they never are: fetch it again."
        )


def check_names(split: Split, image_names: Collection[str], origin: Path) -> None:
    """Refuse a split that names images which the data set does not have.

    Raises:
        PerceptError: naming the first of them.
    """
    unknown = sorted((split.train | split.test) - set(image_names))
    if unknown:
        raise PerceptError(
            f"{split.path} names {unknown[0]!r} ({len(unknown)} of"
            f" {len(split.train | split.test)} images), which {origin} does not have: the split is"
            " of another version than the images; take the two of one release."
        )


def assign_split(
    names: pd.Series,
    split: Split,
    ood_types: str,
    file_split: pd.Series | None,
    file_split_path: Path,
) -> pd.Series:
    """The column `split` of the trials.

    Args:
        names: of the image of each trial.
        split: that decides what trains and what tests.
        ood_types: kinds of out-of-distribution images that are tested, separated by commas, "" for
            all.
        file_split: the column of splits.csv, which may only move training images, or None.
        file_split_path: that file, for errors.

    Returns:
        train, test, or exclude for images that the split does not name; with `file_split` also val.

    Raises:
        PerceptError: for unknown kinds, a split without images of the trials, or a splits.csv that
            trains on what is tested or out of distribution.
    """
    kinds = parse_name_list(ood_types)
    unknown = sorted(set(kinds) - set(OOD_KINDS))
    tested_kinds = {find_ood_kind(name) for name in split.test} - {""}
    if unknown or (kinds and not tested_kinds):
        tested = ", ".join(sorted(tested_kinds)) or "no such images"
        raise PerceptError(
            f"ood_types is {shorten(ood_types)!r}, split {split.name} tests {tested}: choose"
            f" split_name=ood and kinds of {', '.join(OOD_KINDS)}."
        )
    is_test = names.isin(split.test)
    if kinds:
        is_test &= names.map(find_ood_kind).isin(kinds)
    is_train = names.isin(split.train)
    if not is_test.any() or not is_train.any():
        raise PerceptError(
            f"{split.path} names {int(is_train.sum())} training and {int(is_test.sum())} test"
            " trials of these sessions: read other sessions, or choose another split."
        )
    column = pd.Series(np.select([is_train, is_test], ["train", "test"], "exclude"), names.index)
    if file_split is None:
        return column
    is_leaked = file_split.isin(("train", "val")) & (is_test | names.map(is_ood))
    if is_leaked.any():
        raise PerceptError(
            f"{file_split_path} has {names[is_leaked].iloc[0]!r} in training or validation, which"
            f" is tested by {split.name} or out of distribution: take it out."
        )
    return column.mask(is_train, file_split)

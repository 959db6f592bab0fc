"""A prepared subject: what was seen and what was measured, and subsets of both."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from src.data.files import Ids, find_rows, gather_rows, iterate_row_blocks, memory_map_h5
from src.data.identity import (
    Identity,
    describe_options,
    hash_images,
    hash_table,
    read_preparation,
)
from src.data.images import ImageStore
from src.data.layout import SPLITS, check_trials, dataset_folder, subject_folder
from src.data.rois import select_voxels
from src.files.foreign import load_parquet
from src.files.ownership import restore_folder
from src.utils import PerceptError

PREPARE_AGAIN = "prepare the data again"

SPLIT_ORDER = {"train": 0, "val": 1, "test": 2, "exclude": 3}


class BetaTransform(Protocol):
    """What a subject needs of a normaliser."""

    @property
    def n_features(self) -> int:
        """Columns that `apply` gives."""

    def apply(self, betas: np.ndarray, sessions: np.ndarray) -> np.ndarray:
        """Betas (trials, voxels), sessions (trials,) -> float32 (trials, features)."""


@lru_cache(maxsize=64)
def _hash_betas(path: Path, changed: int, size: int) -> str:
    """Checksum of the betas in a file that was changed then and has that size."""
    digest = hashlib.blake2b(digest_size=16)
    for block in iterate_row_blocks(memory_map_h5(path, "betas")[0]):
        digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def open_subject(dataset: str | Path, subj: int) -> Subject:
    """Open a prepared subject.

    Args:
        dataset: name of a folder under HOME/data, or a path.
        subj: number of the subject.

    Raises:
        PerceptError: if files are missing, damaged, or do not belong together.
    """
    restore_folder(subject_folder(dataset, subj))
    return Subject(dataset_folder(dataset), subj)


class Subject:
    """One subject's measurements and what was seen.

    Made by `open_subject`; can be pickled (memory maps are opened again).

    Attributes:
        trials: one row for each row of `betas`: trial (global order), image, session, run, repeat,
            split.
        voxels: one row a voxel.
        attributes: source, units, normalisation, protocol, checksum, n_trials, n_voxels and what
            the reader added.
        protocol: name of the protocol, for every row of results.
        volume_shape: (x, y, z) where the betas are whole volumes, else None.
        clusters: what `cluster_images` gave, where clusters of images are excluded, else None.
        adjacent_rows: int64 (trials, trials read together), rows of the betas, -1 for none; see
            `with_adjacent_trials`.
        num_sessions: what `select_first_sessions` was given, 0 for all.
        prepared_trials: `trials` as they were prepared, whatever was excluded since.
    """

    def __init__(self, folder: str | Path, subj: int):
        self.folder, self.subj = Path(folder), int(subj)
        self.path = subject_folder(self.folder, subj)
        self._check_files()
        stored, self.attributes = memory_map_h5(self.path / "betas.h5", "betas")
        self.volume_shape = stored.shape[1:] if stored.ndim == 4 else None
        self.trials = load_parquet(self.path / "trials.parquet", PREPARE_AGAIN)
        self.voxels = load_parquet(self.path / "voxels.parquet", PREPARE_AGAIN)
        check_trials(self.trials)
        tables = (len(self.trials), len(self.voxels))
        if tables != (len(stored), int(np.prod(stored.shape[1:]))):
            raise PerceptError(
                f"{self.path}: betas are {stored.shape}, the tables have {tables} (trials, voxels):"
                " prepare the data again."
            )
        self.protocol = str(self.attributes.get("protocol", ""))
        self.clusters: pd.DataFrame | None = None
        self.adjacent_rows: np.ndarray | None = None
        self.num_sessions = 0
        self.prepared_trials = self.trials

    def _check_files(self) -> None:
        names = ("betas.h5", "trials.parquet", "voxels.parquet")
        files = [self.path / name for name in names] + [self.folder / "images.h5"]
        for file in files:
            if not file.exists():
                raise PerceptError(
                    f"{self._name} is not prepared, {file} is missing: run notebook 00_prepare_data"
                    " (with the recipe mindeye/mini for the embedded mini world, which needs no"
                    " data)."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("betas", "image_store")}

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.image_ids(split))} {split}" for split in SPLITS[:3])
        return (
            f"{self._name}: (trials, voxels) = {self.betas.shape}, images: {counts}, protocol"
            f" {self.protocol}"
        )

    @property
    def _name(self) -> str:
        return f"Subject {self.subj} of {self.folder.name}"

    # ---------------------------------------------------------------------------- what it is
    @property
    def key(self) -> str:
        """Name of its folder, e.g. "subj01"."""
        return self.path.name

    @cached_property
    def identity(self) -> Identity:
        """What the prepared data are, whatever was excluded since: source, options, protocol,
        number of sessions, checksums of betas, trials, voxels and images.
        """
        trials, store = self.prepared_trials, self.image_store
        images = np.unique(trials["image"].to_numpy())
        return {
            "source": str(self.attributes.get("source", "")),
            "options": describe_options(read_preparation(self.path)),
            "protocol": str(self.attributes.get("protocol", "")),
            "sessions": int(trials["session"].nunique()),
            "betas": str(self.attributes.get("checksum", "")),
            "trials": hash_table(trials),
            "voxels": hash_table(self.voxels),
            "images": hash_images(images, store.crc[store.positions(images)]),
        }

    # ---------------------------------------------------------------------------- what was seen
    @cached_property
    def image_store(self) -> ImageStore:
        """The images of the dataset."""
        return ImageStore(self.folder / "images.h5")

    @property
    def captions(self) -> pd.DataFrame | None:
        """Columns image and caption, or None."""
        return self._read_table("captions.parquet")

    @property
    def git_captions(self) -> pd.DataFrame | None:
        """Columns image and caption, what GIT wrote of the image, or None."""
        return self._read_table("git_captions.parquet")

    @property
    def labels(self) -> pd.DataFrame | None:
        """Column image and one column for each kind of category, or None."""
        return self._read_table("labels.parquet")

    def _read_table(self, name: str) -> pd.DataFrame | None:
        path = self.folder / name
        return load_parquet(path, PREPARE_AGAIN, ("image",)) if path.exists() else None

    def categories(self, image_ids: Ids, columns: str) -> np.ndarray:
        """Labels (n,) of images, from one or several columns of `labels`.

        Args:
            image_ids: (n,) ids.
            columns: names separated by commas; their values are joined by a space.

        Raises:
            PerceptError: there are no labels, or no such column.
        """
        complaint = f"'{columns}' cannot be looked up in {self.folder.name}"
        table = self.labels
        if table is None or set(table.columns) <= {"image"}:
            raise PerceptError(f"{complaint}, whose images have no labels: leave this empty.")
        existing = [str(name) for name in table.columns if name != "image"]
        names = [name.strip() for name in columns.split(",")]
        unknown = sorted(set(names) - set(existing))
        if unknown:
            raise PerceptError(
                f"{complaint}, whose labels have no column {', '.join(unknown)}: choose among"
                f" {', '.join(existing)}."
            )
        rows = table.set_index("image").loc[np.asarray(image_ids)]
        return rows[names].astype(str).agg(" ".join, axis=1).to_numpy()

    def images(self, image_ids: Ids) -> np.ndarray:
        """Images by id, uint8 (n, height, width, 3)."""
        return self.image_store.rows(image_ids)

    def mean_image(self, split: str) -> np.ndarray:
        """Mean image of a split, float64 (height, width, 3) in 0 to 255.

        About 500 images are in memory at a time.
        """
        ids = self.image_ids(split)
        parts = np.array_split(ids, max(1, len(ids) // 500))
        mean: np.ndarray = np.mean([self.images(part).mean(0) for part in parts], 0)
        return mean

    # ---------------------------------------------------------------------- splits and sessions
    @property
    def sessions(self) -> np.ndarray:
        """Sessions of all trials that are not excluded, ascending."""
        return np.unique(self.trials.loc[self.trials["split"] != "exclude", "session"].to_numpy())

    @property
    def all_images(self) -> np.ndarray:
        """Ids of all images of train, val and test, ascending, int64 (images,)."""
        return np.unique(self.trials.loc[self.trials["split"] != "exclude", "image"].to_numpy())

    @property
    def test_set(self) -> str:
        """Identity of the test set, e.g. 300-1a2b3c4d.

        That is the number of its images and a hash of their sorted ids.
        """
        ids = self.image_ids("test")
        digest = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
        return f"{len(ids)}-{digest[:8]}"

    def _is_in_split(self, split: str) -> pd.Series:
        """Whether trials (trials,) belong to a split, or to one of several joined by "+"."""
        parts = split.split("+")
        unknown = sorted(set(parts) - set(SPLITS))
        if unknown:
            raise PerceptError(f"There is no split {unknown[0]!r}: choose one of {list(SPLITS)}.")
        return self.trials["split"].isin(parts)

    def image_ids(self, split: str) -> np.ndarray:
        """Ids of the images of a split, or of several joined by "+".

        Returns:
            Each id once, ascending, int64 (images,).
        """
        return np.unique(self.trials.loc[self._is_in_split(split), "image"].to_numpy())

    def rows_by_image(self, split: str) -> list[np.ndarray]:
        """Rows of the trials of each image of `image_ids(split)`, in the order of their repeats.

        Raises:
            PerceptError: if there are no trials in this split.
        """
        ids = self.image_ids(split)
        table = self.trials[self._is_in_split(split)].sort_values(["image", "repeat"])
        if not len(table):
            raise PerceptError(f"{self._name} has no trials in split {split}.")
        return np.split(table.index.to_numpy(), np.searchsorted(table["image"].to_numpy(), ids[1:]))

    def _with_splits(self, splits: pd.Series) -> Subject:
        """Copy of this subject whose trials belong to other splits."""
        derived = copy.copy(self)
        derived.trials = self.trials.assign(split=splits)
        return derived

    def exclude_clusters(self, clusters: pd.DataFrame) -> Subject:
        """This subject without the training and validation images of held-out clusters.

        Their trials are excluded, the test set stays as it is, and the protocol ends in
        "+cluster-held-out".

        Args:
            clusters: from `cluster_images`: columns image, cluster, held_out.

        Raises:
            PerceptError: if no training image, or none of the validation images, is left.
        """
        excluded_images = clusters.loc[clusters["held_out"], "image"]
        is_excluded = self._is_in_split("train+val") & self.trials["image"].isin(excluded_images)
        derived = self._with_splits(self.trials["split"].mask(is_excluded, "exclude"))
        derived.clusters, derived.protocol = clusters, f"{self.protocol}+cluster-held-out"
        for split in ("train", "val"):
            if len(self.image_ids(split)) and not len(derived.image_ids(split)):
                raise PerceptError(
                    f"Without the held-out clusters no {split} image is left: ask for more clusters"
                    " (n_clusters)."
                )
        return derived

    def in_excluded_clusters(self, image_ids: Ids) -> np.ndarray:
        """Whether images are in held-out clusters, bool (n,).

        None of them is where no clusters are held out.

        Raises:
            PerceptError: for an image that is in no cluster.
        """
        ids = np.asarray(image_ids, np.int64)
        if self.clusters is None:
            return np.zeros(len(ids), bool)
        stored = self.clusters["image"].to_numpy()
        rows = find_rows(stored, np.argsort(stored), ids, "the table of clusters")
        return np.asarray(self.clusters["held_out"].to_numpy()[rows])

    def bootstrap_split(self, share: float, seed: int) -> Subject:
        """This subject with a share of its training images, sampled by seed.

        The other training images become the validation images, and the prepared validation images
        are excluded. So models with different draws have these and the test images in common, which
        none of them saw.

        Args:
            share: of the training images that stay, between 0 and 1; 1 leaves the subject as it is.
            seed: of the draw.

        Raises:
            PerceptError: for a share that leaves one side empty.

        Source: the 2023 ROI project, which splits all its images 70 / 30 by a seed a model.
        """
        ids = self.image_ids("train")
        if share == 1.0:
            return copy.copy(self)
        n_train = round(share * len(ids))
        if not 0 < n_train < len(ids):
            raise PerceptError(
                f"A share of {share} of {len(ids)} training images leaves nothing to train on or"
                " nothing to validate on: choose one between 0 and 1."
            )
        sampled = np.random.default_rng(seed).permutation(ids)[:n_train]
        is_left_out = self._is_in_split("train") & ~self.trials["image"].isin(sampled)
        splits = self.trials["split"].mask(self._is_in_split("val"), "exclude")
        return self._with_splits(splits.mask(is_left_out, "val"))

    def subsample_train(self, n_train: int, seed: int = 42) -> Subject:
        """This subject with at most n_train training images, sampled by seed.

        The trials of the others are excluded.

        Raises:
            PerceptError: for fewer than one image.
        """
        if n_train < 1:
            raise PerceptError(f"n_train is {n_train}: keep at least 1 training image.")
        shuffled = np.random.default_rng(seed).permutation(self.image_ids("train"))
        is_excluded = self.trials["image"].isin(shuffled[n_train:]) & self._is_in_split("train")
        return self._with_splits(self.trials["split"].mask(is_excluded, "exclude"))

    def select_first_sessions(self, n: int) -> Subject:
        """This subject as its first n sessions alone would have trained it.

        The training and validation trials of later sessions are excluded, and with them images that
        were not shown before. The test set stays whole, with its protocol. A session counts if it
        has training trials.

        Args:
            n: number of sessions, in ascending order; 0 for all of them, which is the subject as it
                is.

        Raises:
            PerceptError: for fewer sessions than 0 or more than there are, or if no validation
                image is left.

        Source: MindEye2, arXiv 2403.11207, section 3.
        """
        sessions = np.unique(self.trials.loc[self._is_in_split("train"), "session"].to_numpy())
        if not 0 <= n <= len(sessions):
            raise PerceptError(
                f"num_sessions is {n}, but {self._name} has {len(sessions)} sessions with training"
                " trials: choose at most that, or 0 for all."
            )
        if n == 0:
            self._check_all_sessions()
            return self
        is_later = ~self.trials["session"].isin(sessions[:n])
        is_excluded = self._is_in_split("train+val") & is_later
        derived = self._with_splits(self.trials["split"].mask(is_excluded, "exclude"))
        derived.num_sessions = n
        if len(self.image_ids("val")) and not len(derived.image_ids("val")):
            raise PerceptError(
                f"The first {n} of the {len(sessions)} sessions of {self._name} show no validation"
                " image: choose more (num_sessions)."
            )
        return derived

    def _check_all_sessions(self) -> None:
        """Refuse to take the sessions that were there for all."""
        n_there, n_published = (self.attributes.get(n) for n in ("sessions", "of_sessions"))
        if n_published is not None:
            raise PerceptError(
                f"{self._name} was prepared of the first {n_there} of {n_published} sessions: set"
                f" num_sessions {n_there}, or fetch them all and prepare again (overwrite True)."
            )

    # ------------------------------------------------------------------------ what was measured
    @cached_property
    def betas(self) -> np.ndarray:
        """(trials, voxels) float16 or float32, read-only."""
        stored = memory_map_h5(self.path / "betas.h5", "betas")[0]
        return stored.reshape(len(stored), -1)

    def verify(self) -> None:
        """Compare the betas with the checksum that was stored with them.

        All of them are read, once in a process: it is done where a training begins.

        Raises:
            PerceptError: if they differ.
        """
        path = self.path / "betas.h5"
        status = path.stat()
        digest = _hash_betas(path, status.st_mtime_ns, status.st_size)
        if digest != self.attributes.get("checksum", digest):
            raise PerceptError(
                f"{self.path / 'betas.h5'} is not what was written (its checksum differs): prepare"
                " the data again."
            )

    def select_rois(self, rois: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Voxels of a set of regions, by the Boolean columns of `voxels`.

        Args:
            rois: terms separated by commas, e.g. "V1v,V1d,hV4": a region; a published set of
                ROI_SETS ("set1"); "-" for all voxels; "!V1" for all but these, or, with other
                terms, for those without these. A voxel of several regions counts once.

        Returns:
            Columns of the betas, ascending, int64 (selected,), and the terms that exist, in their
            order, sets as their regions.

        Raises:
            PerceptError: if none of the regions is there, or none of those to leave out, or no
                voxel is left.

        Warns:
            UserWarning: naming the regions that are not there, or have no voxel; the others are
                taken.
        """
        return select_voxels(self.voxels, rois, self._name)

    def n_features(self, normaliser: BetaTransform | None = None) -> int:
        """Columns that `get_betas` gives.

        These are the voxels (those of a normaliser's regions, if it has some), or the components of
        a normaliser that has some.
        """
        return self.betas.shape[1] if normaliser is None else normaliser.n_features

    def with_adjacent_trials(self, past: int, future: int) -> Subject:
        """This subject, each of whose trials is read together with its neighbours in the session.

        These are MindEye2's past and future tokens. Order: the trial itself, the `past` trials
        before it, the nearest first, then the `future` trials after it. A trial is shown none of a
        later split (train, val, test), so that no brain data of a test image is seen in training;
        excluded trials are shown to none.

        Args:
            past: number of trials before it.
            future: number of trials after it.

        Raises:
            PerceptError: for negative numbers.
        """
        if past < 0 or future < 0:
            raise PerceptError(
                f"seq_past is {past} and seq_future is {future}: give 0 or more trials."
            )
        derived = copy.copy(self)
        derived.adjacent_rows = self._find_adjacent(past, future) if past or future else None
        return derived

    def _find_adjacent(self, past: int, future: int) -> np.ndarray:
        """Rows of adjacent trials int64 (trials, 1 + past + future), -1 where there is none."""
        trials = self.trials
        keys = list(zip(trials["session"], trials["trial"], strict=True))
        row_of = {key: row for row, key in enumerate(keys)}
        offsets = [0, *range(-1, -past - 1, -1), *range(1, future + 1)]
        adjacent = np.empty((len(keys), len(offsets)), np.int64)
        for column, offset in enumerate(offsets):
            adjacent[:, column] = [row_of.get((s, trial + offset), -1) for s, trial in keys]
        rank = trials["split"].map(SPLIT_ORDER).to_numpy(np.int64)
        is_later = rank[adjacent] > rank[:, None]
        is_hidden = is_later | (rank[adjacent] == SPLIT_ORDER["exclude"])
        is_hidden[:, 0] = False
        adjacent[is_hidden] = -1
        return adjacent

    def get_betas(self, rows: np.ndarray, normaliser: BetaTransform | None = None) -> np.ndarray:
        """Rows of betas as float32 (rows, voxels), normalised if asked.

        Here and below voxels are components where the normaliser has some. Of a subject
        `with_adjacent_trials` the result is (rows, trials, voxels), zeros where there is no trial.
        """
        if self.adjacent_rows is None:
            return self._read_rows(rows, normaliser)
        adjacent = self.adjacent_rows[rows]  # (rows, trials)
        betas = self._read_rows(adjacent.clip(0).ravel(), normaliser)
        betas = betas.reshape(*adjacent.shape, -1)
        betas[adjacent < 0] = 0
        return betas

    def _read_rows(self, rows: np.ndarray, normaliser: BetaTransform | None) -> np.ndarray:
        betas = gather_rows(self.betas, rows)
        if normaliser is None:
            return betas.astype(np.float32)
        return normaliser.apply(betas, self.trials["session"].to_numpy()[rows])

    def average_rows(
        self, groups: Sequence[np.ndarray], normaliser: BetaTransform | None
    ) -> np.ndarray:
        """Mean over each group of rows, float32 (groups, voxels)."""
        sizes = np.array([len(rows) for rows in groups])
        starts = np.cumsum(sizes) - sizes
        betas = self.get_betas(np.concatenate(groups), normaliser)
        sums = np.add.reduceat(betas, starts, axis=0)
        mean: np.ndarray = sums / sizes.reshape(-1, *[1] * (sums.ndim - 1)).astype(np.float32)
        return mean

    def get_mean_betas(
        self, split: str, repeats: int | None = None, normaliser: BetaTransform | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean over the first `repeats` repeats of each image (all when None).

        Returns:
            Voxels float32 (images, voxels) and image_ids (images,).

        Raises:
            PerceptError: for fewer than one repeat.

        Warns:
            UserWarning: if images have fewer repeats; their mean is over those they have.
        """
        if repeats is not None and repeats < 1:
            raise PerceptError(f"repeats is {repeats}: average at least 1 repeat, or None for all.")
        groups, ids = self.rows_by_image(split), self.image_ids(split)
        n_fewer = sum(len(rows) < (repeats or 1) for rows in groups)
        if n_fewer:
            warnings.warn(
                f"{n_fewer} of {len(ids)} {split} images have fewer than {repeats} repeats; the"
                " mean is over those they have.",
                stacklevel=2,
            )
        first = [rows[:repeats] for rows in groups]
        starts = range(0, len(ids), 128)
        parts = [self.average_rows(first[start : start + 128], normaliser) for start in starts]
        return np.concatenate(parts), ids

    def get_trials(
        self, split: str, normaliser: BetaTransform | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """All single trials of a split in the order of the table.

        Returns:
            Voxels float32 (trials, voxels) and image_ids (trials,).

        Raises:
            PerceptError: if there are no trials in this split.
        """
        self.rows_by_image(split)  # refuses an empty split
        rows = np.flatnonzero((self.trials["split"] == split).to_numpy())
        starts = range(0, len(rows), 512)
        voxels = [self.get_betas(rows[start : start + 512], normaliser) for start in starts]
        return np.concatenate(voxels), self.trials["image"].to_numpy()[rows]

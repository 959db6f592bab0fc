"""The prepared layout of brain data, and everything that reads it.

- One layout for every source: `images.h5`, `captions.parquet` and `labels.parquet` for a dataset,
  `betas.h5`, `trials.parquet` and `voxels.parquet` for each of its subjects. Readers
  (`src.readers`) write it, everything else opens it with `open_subject`.
- Large arrays are contiguous and uncompressed inside HDF5, so that they are memory-mapped at their
  offset: no decoding, no copies, true shuffles.
- A split is a property of an image. `check_trials` refuses an image on both sides, on writing and
  again on opening.
- Everything is written under a temporary name and renamed, so that a failure leaves earlier results
  as they were.
- Which repeat an image shows is a pure function of (seed, epoch, image): independent of batch size,
  workers and resuming.
- Statistics are accumulated in float64 over blocks of rows: 30,000 trials of 15,724 voxels never
  need to fit in memory.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from src.data.files import find_rows, gather_rows, iterate_row_blocks, memory_map_h5
from src.data.images import ImageStore
from src.data.layout import SPLITS, check_trials, dataset_folder, subject_folder
from src.utils import PerceptError

if TYPE_CHECKING:
    from src.data.normaliser import Normaliser

# of the 2023 ROI project, by the names that its tables use (there 1, 2 and 3; "-" is no selection)
ROI_SETS = {
    "set1": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4", "FFA-1", "FFA-2", "PPA"),
    "set2": (
        "EBA",
        "FBA-1",
        "FBA-2",
        "mTL-bodies",
        "OFA",
        "FFA-1",
        "FFA-2",
        "mTL-faces",
        "aTL-faces",
        "OPA",
        "PPA",
        "RSC",
    ),
    "set3": ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal"),
}


def open_subject(dataset: str | Path, subj: int) -> Subject:
    """Open a prepared subject.

    Args:
        dataset: name of a folder under HOME/data, or a path.
        subj: number of the subject.

    Raises:
        PerceptError: if files are missing, damaged, or do not belong together.
    """
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
        clusters: what `cluster_images` gave, where clusters of images are held out, else None.
    """

    clusters: pd.DataFrame | None = None

    def __init__(self, folder: str | Path, subj: int):
        self.folder, self.subj = Path(folder), int(subj)
        self.path = subject_folder(self.folder, subj)
        for file in (
            *(self.path / name for name in ("betas.h5", "trials.parquet", "voxels.parquet")),
            self.folder / "images.h5",
        ):
            if not file.exists():
                raise PerceptError(
                    f"Subject {subj} of dataset {self.folder.name} is not prepared, {file} is"
                    " missing: run notebook 00_prepare_data (with the recipe mindeye/mini for the"
                    " embedded mini world, which needs no data)."
                )
        stored, self.attributes = memory_map_h5(self.path / "betas.h5", "betas")
        self.volume_shape = stored.shape[1:] if stored.ndim == 4 else None
        self.trials, self.voxels = (
            pd.read_parquet(self.path / "trials.parquet"),
            pd.read_parquet(self.path / "voxels.parquet"),
        )
        check_trials(self.trials)
        tables = (len(self.trials), len(self.voxels))
        if tables != (len(stored), int(np.prod(stored.shape[1:]))):
            raise PerceptError(
                f"{self.path}: betas are {stored.shape}, the tables have {tables} (trials, voxels):"
                " prepare the data again."
            )
        self.protocol = str(self.attributes.get("protocol", ""))
        self.neighbours: np.ndarray | None = (
            None  # (trials, trials read together), rows of the betas, -1 for none
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("betas", "image_store")}

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.image_ids(s))} {s}" for s in SPLITS[:3])
        size = f"(trials, voxels) = {self.betas.shape}"
        return (
            f"Subject {self.subj} of {self.folder.name}: {size}, images: {counts}, protocol"
            f" {self.protocol}"
        )

    @cached_property
    def betas(self) -> np.ndarray:
        """(trials, voxels) float16 or float32, read-only."""
        stored = memory_map_h5(self.path / "betas.h5", "betas")[0]
        return stored.reshape(len(stored), -1)

    @cached_property
    def image_store(self) -> ImageStore:
        return ImageStore(self.folder / "images.h5")

    @property
    def captions(self) -> pd.DataFrame | None:
        """Columns image and caption, or None."""
        return self._table("captions.parquet")

    @property
    def labels(self) -> pd.DataFrame | None:
        """Column image and one column for each kind of category, or None."""
        return self._table("labels.parquet")

    def categories(self, image_ids: Sequence[int] | np.ndarray, columns: str) -> np.ndarray:
        """Labels (n,) of images, from one or several columns of `labels` (names separated by
        commas; their values are joined by a space).

        Raises:
            PerceptError: there are no labels, or no such column.
        """
        table = self.labels
        known = [] if table is None else [str(name) for name in table.columns if name != "image"]
        wanted = [name.strip() for name in columns.split(",")]
        if table is None or (unknown := sorted(set(wanted) - set(known))):
            what = (
                f"labels have no column {', '.join(unknown)}: choose among {', '.join(known)}"
                if known
                else "images have no labels: leave this empty"
            )
            raise PerceptError(
                f"'{columns}' cannot be looked up in {self.folder.name}, whose {what}."
            )
        return (
            table.set_index("image")
            .loc[np.asarray(image_ids)][wanted]
            .astype(str)
            .agg(" ".join, axis=1)
            .to_numpy()
        )

    def _table(self, name: str) -> pd.DataFrame | None:
        path = self.folder / name
        return pd.read_parquet(path) if path.exists() else None

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
        """Identity of the test set: number of images and a hash of their sorted ids, e.g.
        300-1a2b3c4d.
        """
        ids = self.image_ids("test")
        return f"{len(ids)}-{hashlib.sha256(','.join(map(str, ids)).encode()).hexdigest()[:8]}"

    def image_ids(self, split: str) -> np.ndarray:
        """Unique ids of the images of a split, or of several joined by "+", ascending, int64
        (images,).
        """
        return np.unique(self.trials.loc[self._within(split), "image"].to_numpy())

    def exclude_clusters(self, clusters: pd.DataFrame) -> Subject:
        """This subject without the training and validation images of held-out clusters: their
        trials are excluded, the test set stays as it is, and the protocol ends in
        "+cluster-held-out".

        Args:
            clusters: from `cluster_images`: columns image, cluster, held_out.

        Raises:
            PerceptError: if no training image, or none of the validation images, is left.
        """
        held_out, made = clusters.loc[clusters["held_out"], "image"], copy.copy(self)
        gone = self._within("train+val") & self.trials["image"].isin(held_out)
        made.trials = self.trials.assign(split=self.trials["split"].mask(gone, "exclude"))
        made.clusters, made.protocol = clusters, f"{self.protocol}+cluster-held-out"
        for split in ("train", "val"):
            if len(self.image_ids(split)) and not len(made.image_ids(split)):
                raise PerceptError(
                    f"Without the held-out clusters no {split} image is left: ask for more clusters"
                    " (n_clusters)."
                )
        return made

    def in_excluded_clusters(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which images are in held-out clusters, bool (n,); none of them where no clusters are held
        out.

        Raises:
            PerceptError: for an image that is in no cluster.
        """
        ids = np.asarray(image_ids, np.int64)
        if self.clusters is None:
            return np.zeros(len(ids), bool)
        stored = self.clusters["image"].to_numpy()
        return self.clusters["held_out"].to_numpy()[
            find_rows(stored, np.argsort(stored), ids, "the table of clusters")
        ]

    def select_rois(self, rois: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Voxels of a set of regions, by the Boolean columns of `voxels`.

        Args:
            rois: terms separated by commas, e.g. "V1v,V1d,hV4": a region; a published set of
                ROI_SETS ("set1"); "-" for all voxels; "!V1" for all but these, or, beside other
                terms, for those without these. A voxel of several regions counts once.

        Returns:
            Columns of the betas, ascending, int64 (selected,), and the terms that were found, in
            their order, sets as their regions.

        Raises:
            PerceptError: if none of the regions is there, or none of those to leave out, or no
                voxel is left.

        Warns:
            UserWarning: naming the regions that are not there, or have no voxel; the others are
                taken.
        """
        terms = dict.fromkeys(
            region
            for term in rois.split(",")
            if term.strip()
            for region in ROI_SETS.get(term.strip(), (term.strip(),))
        )
        known = [
            str(name)
            for name in self.voxels.select_dtypes("bool").columns
            if self.voxels[name].any()
        ]
        found, missing = (
            tuple(term for term in terms if (term.removeprefix("!") in [*known, "-"]) is there)
            for there in (True, False)
        )
        where = f"Subject {self.subj} of {self.folder.name}"
        out = [term[1:] for term in found if term.startswith("!")]
        taken = [term for term in found if not term.startswith("!")]
        asked = [
            any(term.startswith("!") is left_out for term in terms) for left_out in (False, True)
        ]
        if asked[0] > bool(taken) or asked[1] > bool(out) or not found:
            raise PerceptError(
                f"{where} has none of the regions '{rois}': it has"
                f" {', '.join(known) or 'no named region'}."
            )
        if missing:
            warnings.warn(
                f"{where} has no region {', '.join(term.removeprefix('!') for term in missing)}:"
                f" '{','.join(found)}' is what is taken.",
                stacklevel=2,
            )
        everything = not taken or "-" in taken
        chosen = (
            np.ones(len(self.voxels), bool)
            if everything
            else self.voxels[taken].any(axis=1).to_numpy()
        )
        columns = np.flatnonzero(
            chosen & ~self.voxels[out].any(axis=1).to_numpy() if out else chosen
        )
        if not len(columns):
            raise PerceptError(
                f"{where} has no voxel in '{rois}': every one of them is left out again."
            )
        return columns.astype(np.int64), found

    def bootstrap_split(self, share: float, seed: int) -> Subject:
        """This subject with a share of its training images, drawn by seed; the others of them
        become the validation images, and the prepared validation images are excluded, so that
        models with different bags have these and the test images in common, which none of them saw.

        Args:
            share: of the training images that stay, between 0 and 1; 1 leaves the subject as it is.
            seed: of the draw.

        Raises:
            PerceptError: for a share that leaves one side empty.

        Source: the 2023 ROI project, which splits all its images 70 / 30 by a seed a model.
        """
        ids, made = self.image_ids("train"), copy.copy(self)
        if share == 1.0:
            return made
        kept = round(share * len(ids))
        if not 0 < kept < len(ids):
            raise PerceptError(
                f"A share of {share} of {len(ids)} training images leaves nothing to train on or"
                " nothing to validate on: choose one between 0 and 1."
            )
        drawn = np.random.default_rng(seed).permutation(ids)[:kept]
        ours, theirs = self._within("train"), self._within("val")
        out_of_bag = ours & ~self.trials["image"].isin(drawn)
        made.trials = self.trials.assign(
            split=self.trials["split"].mask(theirs, "exclude").mask(out_of_bag, "val")
        )
        return made

    def subsample_train(self, n_train: int, seed: int = 42) -> Subject:
        """This subject with at most n_train training images, drawn by seed; the trials of the
        others are excluded.

        Raises:
            PerceptError: for fewer than one image.
        """
        ids, made = self.image_ids("train"), copy.copy(self)
        if n_train < 1:
            raise PerceptError(f"n_train is {n_train}: keep at least 1 training image.")
        gone = self.trials["image"].isin(
            np.random.default_rng(seed).permutation(ids)[n_train:]
        ) & self._within("train")
        made.trials = self.trials.assign(split=self.trials["split"].mask(gone, "exclude"))
        return made

    def select_first_sessions(self, n: int) -> Subject:
        """This subject as its first n sessions alone would have trained it: the training and
        validation trials of later sessions are excluded, and with them images that were not shown
        before.

        The test set stays whole, with its protocol. A session counts if it has training trials.

        Args:
            n: number of sessions, in ascending order; 0 for all of them, which is the subject as it
                is.

        Raises:
            PerceptError: for fewer sessions than 0 or more than there are, or if no validation
                image is left.

        Source: MindEye2, arXiv 2403.11207, section 3.
        """
        theirs = np.unique(self.trials.loc[self._within("train"), "session"].to_numpy())
        where = f"Subject {self.subj} of {self.folder.name}"
        if not 0 <= n <= len(theirs):
            raise PerceptError(
                f"num_sessions is {n}, but {where} has {len(theirs)} sessions with training trials:"
                " choose at most that, or 0 for all."
            )
        if n == 0:
            return self
        made, later = (
            copy.copy(self),
            self._within("train+val") & ~self.trials["session"].isin(theirs[:n]),
        )
        made.trials = self.trials.assign(split=self.trials["split"].mask(later, "exclude"))
        if len(self.image_ids("val")) and not len(made.image_ids("val")):
            raise PerceptError(
                f"The first {n} of the {len(theirs)} sessions of {where} show no validation image:"
                " choose more (num_sessions)."
            )
        return made

    def n_features(self, normaliser: Normaliser | None = None) -> int:
        """Columns that `get_betas` gives: voxels (those of a normaliser's regions, if it has some), or
        the components of a normaliser that has some.
        """
        return self.betas.shape[1] if normaliser is None else normaliser.n_features

    def _within(self, split: str) -> pd.Series:
        """Which trials (trials,) belong to a split, or to one of several joined by "+"."""
        parts = split.split("+")
        if unknown := set(parts) - set(SPLITS):
            raise PerceptError(
                f"There is no split {sorted(unknown)[0]!r}: choose one of {list(SPLITS)}."
            )
        return self.trials["split"].isin(parts)

    def images(self, image_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Images by id, uint8 (n, height, width, 3)."""
        return self.image_store.rows(image_ids)

    def mean_image(self, split: str) -> np.ndarray:
        """Mean picture of a split, float64 (height, width, 3) in 0 to 255, about 500 images in
        memory at a time.
        """
        ids = self.image_ids(split)
        return np.mean(
            [self.images(part).mean(0) for part in np.array_split(ids, max(1, len(ids) // 500))], 0
        )

    def rows_by_image(self, split: str) -> list[np.ndarray]:
        """For each image of `image_ids(split)`, the rows of its trials in the order of their
        repeats.
        """
        ids = self.image_ids(split)
        table = self.trials[self._within(split)].sort_values(["image", "repeat"])
        if not len(table):
            raise PerceptError(
                f"Subject {self.subj} of {self.folder.name} has no trials in split {split}."
            )
        return np.split(table.index.to_numpy(), np.searchsorted(table["image"].to_numpy(), ids[1:]))

    def get_betas(self, rows: np.ndarray, normaliser: Normaliser | None = None) -> np.ndarray:
        """Rows of betas as float32 (rows, voxels), normalised if asked; here and below (rows,
        components) for a normaliser that has some.

        Of a subject `with_adjacent_trials` (rows, trials, voxels), zeros where there is no such trial.
        """
        if self.neighbours is None:
            return self._read_rows(rows, normaliser)
        near = self.neighbours[rows]  # (rows, trials)
        betas = self._read_rows(near.clip(0).ravel(), normaliser).reshape(*near.shape, -1)
        betas[near < 0] = 0
        return betas

    def _read_rows(self, rows: np.ndarray, normaliser: Normaliser | None) -> np.ndarray:
        betas = gather_rows(self.betas, rows)
        return (
            betas.astype(np.float32)
            if normaliser is None
            else normaliser.apply(betas, self.trials["session"].to_numpy()[rows])
        )

    def with_adjacent_trials(self, past: int, future: int) -> Subject:
        """This subject, each of whose trials is read together with those before and after it in its
        session (MindEye2's past and future tokens).

        Order: the trial itself, the `past` trials before it, the nearest first, then the `future`
        trials after it. A trial is shown none of a later split (train, val, test), so that no brain
        data of a test image is seen in training; excluded trials are shown to none.

        Args:
            past: trials before it.
            future: trials after it.

        Raises:
            PerceptError: for negative numbers.
        """
        if past < 0 or future < 0:
            raise PerceptError(
                f"seq_past is {past} and seq_future is {future}: give 0 or more trials."
            )
        made, trials = copy.copy(self), self.trials
        made.neighbours = None
        if past or future:
            row_of = {
                (s, t): row
                for row, (s, t) in enumerate(zip(trials["session"], trials["trial"], strict=True))
            }
            steps = [0, *(-k for k in range(1, past + 1)), *range(1, future + 1)]
            near = [
                [row_of.get((s, t + step), -1) for step in steps]
                for s, t in zip(trials["session"], trials["trial"], strict=True)
            ]
            made.neighbours = np.array(near)
            rank = (
                trials["split"]
                .map({"train": 0, "val": 1, "test": 2, "exclude": 3})
                .to_numpy(np.int64)
            )
            unseen = (rank[made.neighbours] > rank[:, None]) | (rank[made.neighbours] == 3)
            unseen[:, 0] = False
            made.neighbours[unseen] = -1
        return made

    def get_mean_betas(
        self, split: str, repeats: int | None = None, normaliser: Normaliser | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean over the first `repeats` repeats of each image (all when None); an image with fewer
        gives those it has, with a warning.

        Returns:
            voxels float32 (images, voxels) and image_ids (images,).
        """
        if repeats is not None and repeats < 1:
            raise PerceptError(f"repeats is {repeats}: average at least 1 repeat, or None for all.")
        rows, ids = self.rows_by_image(split), self.image_ids(split)
        fewer = sum(len(r) < (repeats or 1) for r in rows)
        if fewer:
            warnings.warn(
                f"{fewer} of {len(ids)} {split} images have fewer than {repeats} repeats; the mean"
                " is over those they have.",
                stacklevel=2,
            )
        parts = [
            self.average_rows([r[:repeats] for r in rows[start : start + 128]], normaliser)
            for start in range(0, len(ids), 128)
        ]
        return np.concatenate(parts), ids

    def average_rows(self, rows: list[np.ndarray], normaliser: Normaliser | None) -> np.ndarray:
        """Mean over each group of rows, float32 (groups, voxels)."""
        sizes = np.array([len(r) for r in rows])
        sums = np.add.reduceat(
            self.get_betas(np.concatenate(rows), normaliser), np.cumsum(sizes) - sizes, axis=0
        )
        return sums / sizes.reshape(-1, *[1] * (sums.ndim - 1)).astype(np.float32)

    def get_trials(
        self, split: str, normaliser: Normaliser | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """All single trials of a split in the order of the table: voxels float32 (trials, voxels),
        image_ids (trials,).
        """
        self.rows_by_image(split)  # refuses an empty split
        rows = np.flatnonzero((self.trials["split"] == split).to_numpy())
        voxels = np.concatenate(
            [
                self.get_betas(rows[start : start + 512], normaliser)
                for start in range(0, len(rows), 512)
            ]
        )
        return voxels, self.trials["image"].to_numpy()[rows]

    def verify(self) -> None:
        """Compare the betas with the checksum that was stored with them.

        Raises PerceptError if they differ.
        """
        digest = hashlib.blake2b(digest_size=16)
        for block in iterate_row_blocks(self.betas):
            digest.update(np.ascontiguousarray(block).data)
        if digest.hexdigest() != self.attributes["checksum"]:
            raise PerceptError(
                f"{self.path / 'betas.h5'} is not what was written (its checksum differs): prepare"
                " the data again."
            )

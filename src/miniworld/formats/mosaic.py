"""The mini world in the format of MOSAIC."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from src.miniworld.formats.source_data import SourceData, save_png, write_split, write_tables
from src.utils import atomic, write_errors


def write(source: str | Path, subj: int, data: SourceData, *, part: str = "NSD") -> Path:
    """Write one subject, one dataset a trial; voxels stand for grayordinates.

    Betas are z-scored within each session with the statistics of the trials that are not test, as
    MOSAIC's are. Sessions, runs and the order of the trials are not stored, nor are regions.

    Args:
        source: folder of the files; other subjects already there stay.
        subj: number of the subject.
        data: of the subject. Trials need session and repeat; noise_ceiling (single trial, fraction)
            of the voxels is kept.
        part: data set whose format it is.

    Returns:
        `source`.

    Raises:
        PerceptError: for a table of trials that lacks a column, or a full disk.
    """
    root, owner = Path(source), f"sub-{subj:02d}_{part}"
    ordered = data.sort_trials(("session", "repeat"))
    data.check_two_axes()
    path = root / part / f"{owner}.hdf5"
    with write_errors(root):
        with atomic(path) as temporary, h5py.File(temporary, "w") as file:
            file.attrs["dataset_name"], file.attrs["subjectID"] = part, f"sub-{subj:02d}"
            betas = file.create_group("betas")
            for _, trials in ordered.groupby("session"):
                scores = _standardise(data, trials)
                records = trials[["image", "split", "repeat"]].to_numpy().tolist()
                for row, (image, split, repeat) in zip(scores, records, strict=True):
                    phase = "test" if split == "test" else "train"
                    _write_trial(betas, owner, row, (image, phase, repeat))
            if data.voxels is not None and "noise_ceiling" in data.voxels:
                ceiling = data.voxels["noise_ceiling"].to_numpy()
                file[f"noiseceilings/{owner}_phase-test_n-1_ceiling"] = 100 * ceiling
        is_shown = np.isin(data.image_ids, ordered["image"])
        for image, pixels in zip(data.image_ids[is_shown], data.images[is_shown], strict=True):
            save_png(root / "images" / f"{image:09d}.png", pixels)
        write_split(root, data.trials)
        write_tables(root, data.captions, data.labels)
    return root


def _standardise(data: SourceData, trials: pd.DataFrame) -> np.ndarray:
    """z-scores (trials, voxels) of a session, with the statistics of the trials that train."""
    betas = np.asarray(data.betas[trials.index.to_numpy()], np.float64)
    is_train = (trials["split"] != "test").to_numpy()
    training = betas[is_train] if is_train.any() else betas
    spread = training.std(axis=0)
    return (betas - training.mean(axis=0)) / np.where(spread > 0, spread, 1)


def _write_trial(
    betas: h5py.Group, owner: str, row: np.ndarray, record: tuple[int, str, int]
) -> None:
    """Write the betas of a trial: image, phase, repeat."""
    image, phase, repeat = record
    name = f"{owner}_stimulus-{image:09d}_phase-{phase}_rep-{repeat}"
    dataset = betas.create_dataset(name, data=row)
    dataset.attrs["presented_stimulus_filename"] = f"{image:09d}.png"
    dataset.attrs["phase"], dataset.attrs["repetition"] = phase, repeat

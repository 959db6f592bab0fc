"""The mini world in the format of Generic Object Decoding (BData)."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from src.data.files import disk_errors
from src.miniworld.formats.common import check_aligned, write_split, write_tables
from src.readers.god import UNIT, image_name
from src.utils import PerceptError, atomic


def write(
    source: str | Path,
    subj: int,
    betas: np.ndarray,
    trials: pd.DataFrame,
    images: np.ndarray,
    image_ids: np.ndarray,
    *,
    voxels: pd.DataFrame | None = None,
    captions: pd.DataFrame | None = None,
    labels: pd.DataFrame | None = None,
) -> Path:
    """Write one subject as Subject<subj>.h5, its pictures as
    images/{training,test}/n........_<number>.png, and splits.csv.

    Args:
        source: folder to write in; other subjects already there stay.
        subj: 1 to 5.
        betas: (trials, voxels); stored as float64.
        trials: one row for each row of betas: trial, image, session, run, split; rows are stored in
            the order of trial.
        images: uint8 (n, height, width, 3).
        image_ids: (n,) the id of each, from 1 (see `image_name`).
        voxels: table of voxels; its Boolean columns become ROI_<name>, its columns x, y, z
            voxel_<axis>. ROI_VC, all voxels, is added.
        captions: columns image and caption.
        labels: column image and categories.

    Returns:
        `source`.

    Raises:
        PerceptError: for arrays and tables that do not fit each other, or a full disk.
    """
    if subj not in range(1, 6):
        raise PerceptError(
            f"Generic Object Decoding has the subjects 1 to 5, not {subj}: choose subj among them."
        )
    unfit = [int(image) for image in image_ids if image % UNIT == 0 or not 0 < image < 10**8 * UNIT]
    if unfit:
        raise PerceptError(
            f"Image id {unfit[0]} cannot be written as a stimulus_id: ids are category * 10**6 +"
            " picture, the picture not 0."
        )
    root, ordered = (
        Path(source),
        check_aligned(
            betas, trials, images, image_ids, ("trial", "image", "session", "run", "split"), voxels
        ),
    )
    test = set(trials.loc[trials["split"] == "test", "image"])
    with disk_errors(root):
        _write_bdata(root / f"Subject{subj}.h5", betas, ordered, voxels)
        for pixels, image in zip(images, image_ids, strict=True):
            with atomic(
                root
                / "images"
                / ("test" if image in test else "training")
                / f"{image_name(int(image))}.png"
            ) as temporary:
                Image.fromarray(pixels).save(temporary, "PNG")
        write_split(root, trials)
        write_tables(root, captions, labels)
    return root


def _write_bdata(
    path: Path, betas: np.ndarray, ordered: pd.DataFrame, voxels: pd.DataFrame | None
) -> None:
    n_voxels = betas.shape[1]
    columns = {
        "DataType": np.where(ordered["split"] == "test", 2, 1),
        "Session": ordered["session"] + 1,
        "Run": ordered["run"] + 1,
        "stimulus_id": ordered["image"] / UNIT,
    }
    voxels = pd.DataFrame(index=range(n_voxels)) if voxels is None else voxels
    about = {"VoxelData": np.ones(n_voxels), "ROI_VC": np.ones(n_voxels)}
    about |= {
        f"ROI_{region}": np.where(voxels[region], 1, np.nan)
        for region in voxels.select_dtypes("bool").columns
    }
    about |= {f"voxel_{axis}": voxels[axis].to_numpy(float) for axis in "xyz" if axis in voxels}
    value = np.full((len(about) + len(columns), n_voxels + len(columns)), np.nan)
    value[: len(about), :n_voxels] = list(about.values())
    value[len(about) :, n_voxels:] = np.where(np.eye(len(columns)), 1, np.nan)
    keys = [*about, *columns]
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        stored = file.create_dataset("dataset", (len(ordered), value.shape[1]), np.float64)
        stored[:, :n_voxels] = betas[ordered.index.to_numpy()]
        stored[:, n_voxels:] = np.stack(
            [np.asarray(column, float) for column in columns.values()], axis=1
        )
        file["metadata/key"], file["metadata/value"] = keys, value
        file["metadata/description"] = [f"1 = {key}" for key in keys]

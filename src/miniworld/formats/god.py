"""The mini world in the format of Generic Object Decoding (BData)."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from src.miniworld.formats.source_data import SourceData, save_png, write_split, write_tables
from src.readers.god import TEST, TRAINING, UNIT, format_image_name
from src.utils import PerceptError, atomic, write_errors


def write(source: str | Path, subj: int, data: SourceData) -> Path:
    """Write one subject as Subject<subj>.h5, its images, and splits.csv.

    Images are images/{training,test}/n........_<number>.png.

    Args:
        source: folder to write in; other subjects already there stay.
        subj: 1 to 5.
        data: of the subject. Betas are stored as float64, in the order of trial; trials need
            session and run. Image ids are from 1 (see `format_image_name`). Boolean columns of
            voxels become ROI_<name>, x, y, z become voxel_<axis>; ROI_VC, all voxels, is added.

    Returns:
        `source`.

    Raises:
        PerceptError: for another subject, an image id that cannot be written, or a full disk.
    """
    if subj not in range(1, 6):
        raise PerceptError(
            f"Generic Object Decoding has the subjects 1 to 5, not {subj}: choose subj among them."
        )
    for image in data.image_ids:
        if image % UNIT == 0 or not 0 < image < 10**8 * UNIT:
            raise PerceptError(
                f"Image id {int(image)} cannot be written as a stimulus_id: ids are category *"
                " 10**6 + image, the image not 0."
            )
    root, ordered = Path(source), data.sort_trials(("session", "run"))
    test_images = set(ordered.loc[ordered["split"] == "test", "image"])
    with write_errors(root):
        _write_bdata(root / f"Subject{subj}.h5", data, ordered)
        for pixels, image in zip(data.images, data.image_ids, strict=True):
            folder = "test" if image in test_images else "training"
            save_png(root / "images" / folder / f"{format_image_name(int(image))}.png", pixels)
        write_split(root, data.trials)
        write_tables(root, data.captions, data.labels)
    return root


def _write_bdata(path: Path, data: SourceData, ordered: pd.DataFrame) -> None:
    columns = {
        "DataType": np.where(ordered["split"] == "test", TEST, TRAINING),
        "Session": ordered["session"] + 1,
        "Run": ordered["run"] + 1,
        "stimulus_id": ordered["image"] / UNIT,
    }
    n_voxels = data.n_voxels
    about = _describe_voxels(data)
    value = np.full((len(about) + len(columns), n_voxels + len(columns)), np.nan)
    value[: len(about), :n_voxels] = list(about.values())
    one_column_each = np.eye(len(columns), dtype=bool)
    value[len(about) :, n_voxels:] = np.where(one_column_each, 1, np.nan)
    keys = [*about, *columns]
    labels = [np.asarray(column, float) for column in columns.values()]
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        stored = file.create_dataset("dataset", (len(ordered), value.shape[1]), np.float64)
        stored[:, :n_voxels] = data.betas[ordered.index.to_numpy()]
        stored[:, n_voxels:] = np.stack(labels, axis=1)
        file["metadata/key"], file["metadata/value"] = keys, value
        file["metadata/description"] = [f"1 = {key}" for key in keys]


def _describe_voxels(data: SourceData) -> dict[str, np.ndarray]:
    """For each key about voxels its value of every voxel (voxels,)."""
    about = {"VoxelData": np.ones(data.n_voxels), "ROI_VC": np.ones(data.n_voxels)}
    if data.voxels is not None:
        for region in data.roi_names:
            about[f"ROI_{region}"] = np.where(data.voxels[region], 1, np.nan)
        for axis in "xyz":
            if axis in data.voxels:
                about[f"voxel_{axis}"] = data.voxels[axis].to_numpy(float)
    return about

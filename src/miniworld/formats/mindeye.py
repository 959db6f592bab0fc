"""The mini world in the format of MindEye's webdataset shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from src.data.files import disk_errors
from src.miniworld.formats.common import check_aligned, write_split, write_tables
from src.readers.mindeye import BETAS, EARLY, LAYOUTS, PAPER, SPLITS
from src.utils import PerceptError, atomic, write_json


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
    layout: str = PAPER,
    repeats: int | None = None,
    samples_per_shard: int = 500,
    image_format: str = "png",
) -> Path:
    """Write one subject as MindEye's shards.

    Args:
        source: folder in which that of the release is made; other subjects already there stay.
        subj: number of the subject.
        betas: (trials, voxels) float, or (trials, x, y, z), stored as wholebrain_3d beside the
            flattened nsdgeneral.
        trials: one row for each row of betas: trial, image, split; trials of split "exclude" are
            left out.
        images: uint8 (n, height, width, 3).
        image_ids: (n,) the id of each; it becomes coco73k.
        voxels: ROI table, one row a voxel.
        captions: columns image and caption.
        labels: column image and categories.
        layout: the release: webdataset_avg_split, webdataset_avg_new, or webdataset (a sample a
            trial: test trials become its val shards, splits.csv tells training from validation).
        repeats: rows of a sample's array, by default the most repeats that an image has; filled up
            with copies as the published shards are.
        samples_per_shard: samples a tar.
        image_format: png (exact) or jpg.

    Returns:
        `source`.

    Raises:
        PerceptError: for arrays and tables that do not fit each other, or a full disk.
    """
    if image_format not in ("png", "jpg") or samples_per_shard < 1 or layout not in LAYOUTS:
        raise PerceptError(
            f"image_format={image_format!r} must be png or jpg,"
            f" samples_per_shard={samples_per_shard} at least 1, layout={layout!r} one of"
            f" {', '.join(LAYOUTS)}."
        )
    ordered = check_aligned(betas, trials, images, image_ids, ("trial", "image", "split"))
    root, early = Path(source) / layout, layout == EARLY
    place = {int(image): row for row, image in enumerate(image_ids)}
    repeats = 0 if early else repeats or int(ordered.groupby("image").size().max())
    folders = ordered["split"].replace({"val": "train", "test": "val"} if early else {})
    totals = {}
    with disk_errors(Path(source)):
        for split in SPLITS[layout]:
            groups = [
                rows for _, rows in ordered[folders == split].groupby("trial" if early else "image")
            ]
            totals[split] = len(groups)
            parts = (
                (
                    int(rows["image"].iloc[0]),
                    rows["trial"].to_numpy(),
                    np.asarray(betas[rows.index.to_numpy()]),
                )
                for rows in groups
            )
            pictured = (
                (image, images[place[image]], numbers, responses)
                for image, numbers, responses in parts
            )
            _write_shards(
                root / split,
                f"{split}_subj{subj:02d}",
                pictured,
                repeats,
                samples_per_shard,
                image_format,
            )
        if early:
            write_split(root, ordered)
        write_json(root / f"metadata_subj{subj:02d}.json", {"totals": totals})
        if voxels is not None:
            with atomic(root / f"voxels_subj{subj:02d}.parquet") as temporary:
                voxels.to_parquet(temporary)
        write_tables(root, captions, labels)
    return Path(source)


# image id, pixels, trial numbers, responses of its trials
Sample = tuple[int, np.ndarray, np.ndarray, np.ndarray]


def _write_shards(
    folder: Path,
    name: str,
    samples: Iterable[Sample],
    repeats: int,
    samples_per_shard: int,
    image_format: str,
) -> None:
    """Write the shards of a split in place of those that were there, one empty shard if there are
    no samples.
    """
    shards = 0
    numbered = enumerate(samples)
    while (chunk := list(islice(numbered, samples_per_shard))) or not shards:
        with (
            atomic(folder / f"{name}_{shards}.tar") as temporary,
            tarfile.open(temporary, "w") as tar,
        ):
            for number, sample in chunk:
                _add_sample(tar, f"{number:09d}", sample, repeats, image_format)
        shards += 1
    for old in folder.glob(f"{name}_*.tar"):
        if int(old.stem.rsplit("_", 1)[1]) >= shards:
            old.unlink()


def _add_sample(
    tar: tarfile.TarFile, key: str, sample: Sample, repeats: int, image_format: str
) -> None:
    """Add one image with its trials to a shard; copies of its repeats fill its arrays up to
    `repeats` rows (0: one trial, without that axis).
    """
    image, pixels, trials, responses = sample
    single, repeats = not repeats, repeats or 1
    unique = min(len(trials), repeats)
    filled = np.resize(np.arange(unique), repeats)
    buffer = io.BytesIO()
    if image_format == "png":
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    arrays = {
        "nsdgeneral": responses[filled].reshape(repeats, -1),
        "trial": trials[filled],
        "coco73k": np.array([image]),
        "num_uniques": np.array([unique]),
    }
    if responses.ndim == 4:
        arrays["wholebrain_3d"] = responses[filled]
    if single:
        arrays |= {name: array[0] for name, array in arrays.items() if name in BETAS}
    add_members(tar, key, {image_format: buffer.getvalue()}, arrays)


def add_members(
    tar: tarfile.TarFile, key: str, files: dict[str, bytes], arrays: dict[str, np.ndarray]
) -> None:
    """Add the members of one sample to a tar: `files` by extension, and `arrays` as <name>.npy."""
    files = dict(files)
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        files[f"{name}.npy"] = buffer.getvalue()
    for extension, content in files.items():
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

"""The mini world in the format of MindEye's webdataset shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from src.miniworld.formats.source_data import SourceData, write_split, write_tables
from src.readers.mindeye import BETAS, EARLY, LAYOUTS, PAPER, SPLITS
from src.utils import PerceptError, atomic, write_errors, write_json


@dataclass(frozen=True)
class _Sample:
    """An image with some of its trials.

    Attributes:
        image: its id.
        pixels: uint8 (height, width, 3).
        trials: (trials,) their numbers.
        responses: (trials, voxels) or (trials, x, y, z).
    """

    image: int
    pixels: np.ndarray
    trials: np.ndarray
    responses: np.ndarray


@dataclass(frozen=True)
class _ShardFormat:
    """How samples are stored.

    Attributes:
        repeats: rows of a sample's arrays; 0 for a single trial without that axis.
        samples_per_shard: samples a tar.
        image_format: png or jpg.
    """

    repeats: int
    samples_per_shard: int
    image_format: str


def write(
    source: str | Path,
    subj: int,
    data: SourceData,
    *,
    layout: str = PAPER,
    repeats: int | None = None,
    samples_per_shard: int = 500,
    image_format: str = "png",
) -> Path:
    """Write one subject as MindEye's shards.

    Args:
        source: folder in which that of the release is made; other subjects already there stay.
        subj: number of the subject.
        data: of the subject; betas (trials, x, y, z) are stored as wholebrain_3d beside the
            flattened nsdgeneral. Trials of split "exclude" are left out. The image id becomes
            coco73k.
        layout: the release: webdataset_avg_split, webdataset_avg_new, or webdataset (a sample a
            trial: test trials become its val shards, splits.csv tells training from validation).
        repeats: rows of a sample's array, by default the most repeats that an image has; filled up
            with copies as the published shards are.
        samples_per_shard: samples a tar.
        image_format: png (exact) or jpg.

    Returns:
        `source`.

    Raises:
        PerceptError: for an unknown option, or a full disk.
    """
    if image_format not in ("png", "jpg") or samples_per_shard < 1 or layout not in LAYOUTS:
        raise PerceptError(
            f"image_format={image_format!r} must be png or jpg,"
            f" samples_per_shard={samples_per_shard} at least 1, layout={layout!r} one of"
            f" {', '.join(LAYOUTS)}."
        )
    ordered = data.sort_trials(())
    root, is_early = Path(source) / layout, layout == EARLY
    folders = ordered["split"]
    if is_early:
        repeats = 0
        folders = folders.replace({"val": "train", "test": "val"})
    elif not repeats:
        repeats = int(ordered.groupby("image").size().max())
    shard_format = _ShardFormat(repeats, samples_per_shard, image_format)
    name = f"subj{subj:02d}"
    totals = {}
    with write_errors(Path(source)):
        for split in SPLITS[layout]:
            trials = ordered[folders == split].groupby("trial" if is_early else "image")
            totals[split] = len(trials)
            samples = _iterate_samples(data, [rows for _, rows in trials])
            _write_shards(root / split, f"{split}_{name}", samples, shard_format)
        if is_early:
            write_split(root, ordered)
        write_json(root / f"metadata_{name}.json", {"totals": totals})
        if data.voxels is not None:
            with atomic(root / f"voxels_{name}.parquet") as temporary:
                data.voxels.to_parquet(temporary)
        write_tables(root, data.captions, data.labels)
    return Path(source)


def _iterate_samples(data: SourceData, groups: list[pd.DataFrame]) -> Iterator[_Sample]:
    """The samples of a split, one for each group of trials of one image."""
    row_of_image = {int(image): row for row, image in enumerate(data.image_ids)}
    for trials in groups:
        image = int(trials["image"].iloc[0])
        yield _Sample(
            image=image,
            pixels=data.images[row_of_image[image]],
            trials=trials["trial"].to_numpy(),
            responses=np.asarray(data.betas[trials.index.to_numpy()]),
        )


def _write_shards(
    folder: Path, name: str, samples: Iterable[_Sample], shard_format: _ShardFormat
) -> None:
    """Write the shards of a split in place of those that were there.

    Without any samples there is one empty shard.
    """
    n_shards = 0
    numbered = enumerate(samples)
    while (chunk := list(islice(numbered, shard_format.samples_per_shard))) or not n_shards:
        path = folder / f"{name}_{n_shards}.tar"
        with atomic(path) as temporary, tarfile.open(temporary, "w") as tar:
            for number, sample in chunk:
                _add_sample(tar, f"{number:09d}", sample, shard_format)
        n_shards += 1
    for stale in folder.glob(f"{name}_*.tar"):
        if int(stale.stem.rsplit("_", 1)[1]) >= n_shards:
            stale.unlink()


def _add_sample(
    tar: tarfile.TarFile, key: str, sample: _Sample, shard_format: _ShardFormat
) -> None:
    """Add one image with its trials to a shard; copies of its repeats fill its arrays up."""
    n_rows = shard_format.repeats or 1
    n_unique = min(len(sample.trials), n_rows)
    rows = np.resize(np.arange(n_unique), n_rows)
    responses = sample.responses[rows]
    arrays = {
        "nsdgeneral": responses.reshape(n_rows, -1),
        "trial": sample.trials[rows],
        "coco73k": np.array([sample.image]),
        "num_uniques": np.array([n_unique]),
    }
    if responses.ndim == 4:
        arrays["wholebrain_3d"] = responses
    if not shard_format.repeats:
        arrays |= {name: array[0] for name, array in arrays.items() if name in BETAS}
    content = _encode_image(sample.pixels, shard_format.image_format)
    add_members(tar, key, {shard_format.image_format: content}, arrays)


def _encode_image(pixels: np.ndarray, image_format: str) -> bytes:
    buffer = io.BytesIO()
    if image_format == "png":
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


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

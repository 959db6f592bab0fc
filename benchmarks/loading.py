"""Training batches a second at NSD's voxel count: the prepared, memory-mapped layout against the
same trials streamed from tar shards with webdataset.

    python benchmarks/loading.py [images]        # 1500 images by default: 0.3 GB of betas and 0.6 GB of files under the system's temporary folder

Shards are streamed as MindEye streamed them: shards in random order with replacement, a shuffle
buffer of 500, pictures and arrays decoded, batches of 32. Both sides are measured with pictures and
without, in one process each, files in the page cache, a few seconds a case; then the same with one
worker process.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from src import miniworld
from src.data import BrainDataset, Normaliser, open_subject
from src.miniworld.formats import SourceData
from src.miniworld.formats import mindeye as mindeye_format
from src.readers import mindeye

BATCH, VOXELS, SIZE, SECONDS = 32, 15_724, 256, 8.0


def make(folder: Path, images: int) -> None:
    """Shards of random betas and of mini scenes enlarged to 256 pixels, and the prepared dataset
    read from them.
    """
    rng = np.random.default_rng(0)
    pictures = np.concatenate(
        [
            np.stack([np.asarray(Image.fromarray(p).resize((SIZE, SIZE))) for p in block])
            for block in miniworld.render_blocks(0, "train", images)
        ]
    )
    trials = pd.DataFrame(
        {"trial": np.arange(3 * images), "image": rng.permutation(np.repeat(np.arange(images), 3))}
    )
    trials["split"] = np.where(
        trials.image < images - 40, "train", np.where(trials.image < images - 20, "val", "test")
    )
    betas = rng.standard_normal((len(trials), VOXELS), dtype=np.float32)
    mindeye_format.write(
        folder / "source",
        1,
        SourceData(betas, trials, pictures, np.arange(images)),
        image_format="jpg",
    )
    mindeye.read(folder / "source", folder / "prepared", 1)


def mapped(folder: Path, pictures: bool) -> Iterator[Any]:
    """Random batches without end: one repeat an image, z-scored by session, with its picture or
    without.
    """
    subject = open_subject(folder / "prepared", 1)
    data = BrainDataset(subject, "train", normaliser=Normaliser.fit(subject), pixels=pictures)
    for epoch in range(10**6):
        data.set_epoch(epoch)
        order = np.random.default_rng(epoch).permutation(len(data))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield data.__getitems__(order[start : start + BATCH].tolist())


def _decode(sample: dict[str, bytes], pictures: bool) -> tuple[Any, ...]:
    voxels = torch.from_numpy(np.load(io.BytesIO(sample["nsdgeneral.npy"]), allow_pickle=False))
    if not pictures:
        return (voxels,)
    image = np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
    return voxels, torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)


def streamed(folder: Path, pictures: bool) -> Iterable[Any]:
    """Batches from the shards without end: all three repeats, as stored."""
    urls = sorted(str(path) for path in (folder / "source" / mindeye.PAPER / "train").glob("*.tar"))
    stream = wds.WebDataset(urls, resampled=True, empty_check=False).shuffle(
        500, initial=500, rng=random.Random(42)
    )
    return stream.map(lambda sample: _decode(sample, pictures)).batched(BATCH, partial=False)


class Endless(torch.utils.data.IterableDataset):
    """What a function of (folder, pictures) yields, for a DataLoader."""

    def __init__(self, source: Callable[[Path, bool], Iterable[Any]], folder: Path, pictures: bool):
        self.source, self.folder, self.pictures = source, folder, pictures

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source(self.folder, self.pictures))


def rate(
    source: Callable[[Path, bool], Iterable[Any]], folder: Path, pictures: bool, workers: int
) -> float:
    """Batches a second, from the second batch on."""
    loader = iter(
        DataLoader(Endless(source, folder, pictures), batch_size=None, num_workers=workers)
    )
    next(loader)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        next(loader)
        count += 1
    return count / (time.perf_counter() - begun)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else 1500)
        print(f"batches of {BATCH} a second, {VOXELS} voxels     prepared   webdataset   ratio")
        for workers in (0, 1):
            for pictures in (False, True):
                ours, theirs = (
                    rate(source, Path(folder), pictures, workers) for source in (mapped, streamed)
                )
                what = (
                    f"{'voxels and pictures' if pictures else 'voxels alone':20} {workers}"
                    f" worker{'s' * (workers != 1)}"
                )
                print(f"{what:42} {ours:10.1f} {theirs:12.2f} {ours / theirs:7.1f}", flush=True)

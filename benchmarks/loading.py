"""Training batches a second at NSD's voxel count: the prepared, memory-mapped layout against the
same trials streamed from tar shards with webdataset.

    python benchmarks/loading.py [images]

1500 images by default: 0.3 GB of betas and 0.6 GB of files under the system's temporary folder.
Shards are streamed as MindEye streamed them: shards in random order with replacement, a shuffle
buffer of 500, images and arrays decoded, batches of 32. Both sides are measured with images and
without, in one process each, files in the page cache, a few seconds a case; then the same with one
worker process.

Left out are targets: with the 257x768 tokens of 32 images a batch has 25 MB more, and one core gave
42 to 53 batches a second.
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

Source = Callable[[Path, bool], Iterable[Any]]  # (folder, with images) -> batches


def write_data(folder: Path, n_images: int) -> None:
    """Shards of random betas and of mini scenes enlarged to 256 pixels, and the prepared dataset
    read from them.
    """
    rng = np.random.default_rng(0)
    scenes = []
    for block in miniworld.render_blocks(0, "train", n_images):
        for scene in block:
            scenes.append(np.asarray(Image.fromarray(scene).resize((SIZE, SIZE))))
    images = rng.permutation(np.repeat(np.arange(n_images), 3))
    trials = pd.DataFrame({"trial": np.arange(3 * n_images), "image": images})
    trials["split"] = "train"
    trials.loc[trials.image >= n_images - 40, "split"] = "val"
    trials.loc[trials.image >= n_images - 20, "split"] = "test"
    betas = rng.standard_normal((len(trials), VOXELS), dtype=np.float32)
    mindeye_format.write(
        folder / "source",
        1,
        SourceData(betas, trials, np.stack(scenes), np.arange(n_images)),
        image_format="jpg",
    )
    mindeye.read(folder / "source", folder / "prepared", 1)


def read_mapped(folder: Path, with_images: bool) -> Iterator[Any]:
    """Random batches without end: one repeat an image, z-scored by session, with its image or
    without.
    """
    subject = open_subject(folder / "prepared", 1)
    data = BrainDataset(subject, "train", normaliser=Normaliser.fit(subject), pixels=with_images)
    for epoch in range(10**6):
        data.set_epoch(epoch)
        order = np.random.default_rng(epoch).permutation(len(data))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield data.__getitems__(order[start : start + BATCH].tolist())


def _decode(sample: dict[str, bytes], with_images: bool) -> tuple[Any, ...]:
    voxels = torch.from_numpy(np.load(io.BytesIO(sample["nsdgeneral.npy"]), allow_pickle=False))
    if not with_images:
        return (voxels,)
    image = np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
    return voxels, torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)


def stream_shards(folder: Path, with_images: bool) -> Iterable[Any]:
    """Batches from the shards without end: all three repeats, as stored."""
    shards = folder / "source" / mindeye.PAPER / "train"
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    stream = wds.WebDataset(urls, resampled=True, empty_check=False).shuffle(
        500, initial=500, rng=random.Random(42)
    )
    return stream.map(lambda sample: _decode(sample, with_images)).batched(BATCH, partial=False)


class EndlessBatches(torch.utils.data.IterableDataset):
    """What a function of (folder, with images) yields, for a DataLoader."""

    def __init__(self, source: Source, folder: Path, with_images: bool):
        self.source, self.folder, self.with_images = source, folder, with_images

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source(self.folder, self.with_images))


def measure_rate(source: Source, folder: Path, with_images: bool, workers: int) -> float:
    """Batches a second, from the second batch on."""
    loader = iter(
        DataLoader(
            EndlessBatches(source, folder, with_images), batch_size=None, num_workers=workers
        )
    )
    next(loader)
    start_time, count = time.perf_counter(), 0
    while time.perf_counter() - start_time < SECONDS:
        next(loader)
        count += 1
    return count / (time.perf_counter() - start_time)


if __name__ == "__main__":
    torch.set_num_threads(1)
    n_images = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), n_images)
        print(f"batches of {BATCH} a second, {VOXELS} voxels     prepared   webdataset   ratio")
        for workers in (0, 1):
            for with_images in (False, True):
                prepared = measure_rate(read_mapped, Path(folder), with_images, workers)
                streamed = measure_rate(stream_shards, Path(folder), with_images, workers)
                content = "voxels and images" if with_images else "voxels alone"
                case = f"{content:20} {workers} {'worker' if workers == 1 else 'workers'}"
                ratio = prepared / streamed
                print(f"{case:42} {prepared:10.1f} {streamed:12.2f} {ratio:7.1f}", flush=True)

"""How fast each reader turns its source into the prepared layout, against plainly copying the
source's files on the same disk.

    python benchmarks/readers.py [trials]

By default 2400 trials of 12,000 voxels, 115 MB of betas as float32, written with each reader's own
`write`; images are small, so that betas dominate. Files are in the page cache.
Raw NSD at full size: benchmarks/nsd_reader.py.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from src.miniworld.formats import WRITERS, SourceData
from src.miniworld.formats import npz as npz_format
from src.readers import read_source

FORMATS = ("mindeye2", "algonauts", "god", "things", "bold5000", "mindeye", "npz")
VOXELS, SIZE = 12_000, 32


def make_data(trials: int) -> SourceData:
    """Random betas (trials, voxels), the table of trials (three repeats an image), images, and a
    table of voxels.
    """
    rng, n = np.random.default_rng(0), trials // 3
    image = rng.permutation(np.repeat(np.arange(1, n + 1), 3))
    trial = np.arange(3 * n)
    columns = {"trial": trial, "image": image, "session": trial // 300, "run": 0}
    table = pd.DataFrame(columns)
    table["repeat"] = table.groupby("image").cumcount()
    table["split"] = "train"
    table.loc[image <= n // 5, "split"] = "val"
    table.loc[image <= n // 10, "split"] = "test"
    voxels = pd.DataFrame(
        {
            "V1": np.arange(VOXELS) < VOXELS // 2,
            "V2": np.arange(VOXELS) >= VOXELS // 2,
            "x": 0.0,
            "y": 0.0,
            "z": 0.0,
        }
    )
    betas = rng.standard_normal((3 * n, VOXELS), dtype=np.float32)
    images = rng.integers(0, 255, (n, SIZE, SIZE, 3), dtype=np.uint8)
    return SourceData(betas, table, images, np.arange(1, n + 1), voxels=voxels)


def measure_seconds(work: object, *arguments: object, **options: object) -> float:
    """The shorter of two runs."""
    seconds = []
    for _ in range(2):
        start_time = time.perf_counter()
        work(*arguments, **options)  # type: ignore[operator]
        seconds.append(time.perf_counter() - start_time)
    return min(seconds)


def copy_files(files: list[Path], target: Path) -> None:
    """Copy files one after the other, each over the former."""
    for path in files:
        shutil.copyfile(path, target)


def main(trials: int) -> None:
    """Write, copy and read each format."""
    warnings.simplefilter("ignore")
    data = make_data(trials)
    print(
        f"{'format':10} {'source MB':>10} {'read s':>8} {'copy s':>8} {'read MB/s':>10}"
        f" {'copy MB/s':>10}"
    )
    for name in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            if name == "npz":
                source = source.with_suffix(".npz")
                npz_format.write(
                    source,
                    data.betas,
                    data.images,
                    image_index=data.trials["image"].to_numpy() - 1,
                    image_ids=data.image_ids,
                    split=data.trials["split"].to_numpy().astype(str),
                )
            else:
                WRITERS[name](source, 1, data)
            paths = [source] if source.is_file() else list(source.rglob("*"))
            files = [path for path in paths if path.is_file()]
            size = sum(path.stat().st_size for path in files) / 1e6
            copying = measure_seconds(copy_files, files, Path(folder) / "copy")
            reading = measure_seconds(read_source, name, source, Path(folder) / "prepared", 1)
            print(
                f"{name:10} {size:10.0f} {reading:8.2f} {copying:8.2f} {size / reading:10.0f}"
                f" {size / copying:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2400)

"""How fast each reader turns its source into the prepared layout, against plainly copying the
source's files on the same disk.

    python benchmarks/readers.py [trials]        # 2400 trials of 12,000 voxels by default, 115 MB of betas as float32

Written with each reader's own `write`; pictures are small, so that betas dominate. Files are in the
page cache. Raw NSD at full size: benchmarks/nsd_reader.py.
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


def experiment(trials: int) -> tuple[np.ndarray, pd.DataFrame, np.ndarray, pd.DataFrame]:
    """Random betas (trials, voxels), the table of trials (three repeats an image), images and a
    table of voxels.
    """
    rng, n = np.random.default_rng(0), trials // 3
    image = rng.permutation(np.repeat(np.arange(1, n + 1), 3))
    table = pd.DataFrame(
        {"trial": np.arange(3 * n), "image": image, "session": np.arange(3 * n) // 300, "run": 0}
    )
    table["repeat"] = table.groupby("image").cumcount()
    table["split"] = np.where(image <= n // 10, "test", np.where(image <= n // 5, "val", "train"))
    voxels = pd.DataFrame(
        {
            "V1": np.arange(VOXELS) < VOXELS // 2,
            "V2": np.arange(VOXELS) >= VOXELS // 2,
            "x": 0.0,
            "y": 0.0,
            "z": 0.0,
        }
    )
    return (
        rng.standard_normal((3 * n, VOXELS), dtype=np.float32),
        table,
        rng.integers(0, 255, (n, SIZE, SIZE, 3), dtype=np.uint8),
        voxels,
    )


def seconds(work: object, *arguments: object, **options: object) -> float:
    """The shorter of two runs."""
    found = []
    for _ in range(2):
        begun = time.perf_counter()
        work(*arguments, **options)  # type: ignore[operator]
        found.append(time.perf_counter() - begun)
    return min(found)


def main(trials: int) -> None:
    """Write, copy and read each format."""
    warnings.simplefilter("ignore")
    betas, table, images, voxels = experiment(trials)
    ids = np.arange(1, len(images) + 1)
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
                    betas,
                    images,
                    image_index=table["image"].to_numpy() - 1,
                    image_ids=ids,
                    split=table["split"].to_numpy().astype(str),
                )
            else:
                WRITERS[name](source, 1, SourceData(betas, table, images, ids, voxels=voxels))
            files = (
                [source]
                if source.is_file()
                else [path for path in source.rglob("*") if path.is_file()]
            )
            size = sum(path.stat().st_size for path in files) / 1e6
            copied = seconds(
                lambda files=files, to=Path(folder): [
                    shutil.copyfile(path, to / "copy") for path in files
                ]
            )
            taken = seconds(read_source, name, source, Path(folder) / "prepared", 1)
            print(
                f"{name:10} {size:10.0f} {taken:8.2f} {copied:8.2f} {size / taken:10.0f}"
                f" {size / copied:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2400)

"""Random batches from the prepared, memory-mapped layout against a pass through the tar shards with the webdataset library.

    python benchmarks/loading.py
"""

from __future__ import annotations

import io
import time

import numpy as np
import webdataset as wds

from src.data import BrainDataset, Normaliser, open_subject
from src.utils import HOME

BATCH = 32


def mapped(seconds: float) -> float:
    """Images a second from random batches of normalised voxels."""
    subject = open_subject("mini", 1)
    data = BrainDataset(subject, "train", normaliser=Normaliser.fit(subject))
    order = np.random.default_rng(0).permutation(len(data))
    begun, count = time.time(), 0
    while time.time() - begun < seconds:
        start = count % (len(order) - BATCH)
        count += len(data.__getitems__([int(i) for i in order[start : start + BATCH]])["voxels"])
    return count / (time.time() - begun)


def shards(seconds: float) -> float:
    """Images a second from the shards, voxels decoded and images left alone."""
    urls = sorted(str(p) for p in (HOME / "data/mini/source/webdataset_avg_split/train").glob("*.tar"))
    stream = wds.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(500, initial=500).to_tuple("nsdgeneral.npy")
    begun, count = time.time(), 0
    while time.time() - begun < seconds:
        for (raw,) in stream:
            count += len(np.load(io.BytesIO(raw), allow_pickle=False)[:1])
            if time.time() - begun > seconds:
                break
    return count / (time.time() - begun)


if __name__ == "__main__":
    rates = {"memory-mapped, truly random, z-scored": mapped(5), "tar shards, shuffle buffer of 500, as stored": shards(5)}
    for name, rate in rates.items():
        print(f"{name:48} {rate:10.0f} images/s")
    first, second = rates.values()
    print(f"ratio {first / second:.1f}")

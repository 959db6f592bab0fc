"""The reader of raw NSD on full-size synthetic sessions: speed and peak memory, of .nii.gz against
zlib alone.

    python benchmarks/nsd_reader.py [--folder /a/disk/with/6/GB] [--sessions 3]

Three sessions (81 x 104 x 83 voxels, 750 trials) as HDF5 with one chunk a voxel, one as .nii.gz,
15,724 voxels in the ROI. Everything is deleted afterwards. Each reading is a process of its own, so
that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd

GRID, TRIALS, VOXELS, VERSION = (81, 104, 83), 750, 15724, "betas_fithrf_GLMdenoise_RR"
CHILD = """
import json, resource, sys, time
from src.readers import nsd
root, sessions, file_format = sys.argv[1:]
options = {"sessions": sessions, "file_format": file_format, "val_images": 10}
start_time = time.time()
nsd.read(root, f"{root}/out-{file_format}", 1, protocol="synthetic", **options)
seconds = time.time() - start_time
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
json.dump({"seconds": seconds, "peak": peak}, sys.stdout)
"""
IDLE = (
    "import resource; from src.readers import nsd;"
    " print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
)


def make_volumes() -> tuple[np.ndarray, np.ndarray]:
    """A ball of brain, and a folded sheet of VOXELS voxels at its back."""
    axes = [np.linspace(-1, 1, n) for n in GRID]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    brain = x**2 + y**2 + z**2 < 0.72
    outside = ~(brain & (y < -0.1))
    fold = np.abs(np.sin(9 * x + 4 * z) + np.sin(8 * y + 5 * z)) + 10 * outside
    roi = np.zeros(GRID, np.int16)
    roi.ravel()[np.argsort(fold, axis=None)[:VOXELS]] = 1
    return brain, roi


def write_tree(root: Path, sessions: int) -> None:
    """The synthetic tree."""
    brain, roi = make_volumes()
    rng = np.random.default_rng(0)
    subject = root / "nsddata/ppdata/subj01"
    betas = root / "nsddata_betas/ppdata/subj01/func1pt8mm" / VERSION
    stimuli = root / "nsddata_stimuli/stimuli/nsd"
    for folder in (subject / "func1pt8mm/roi", subject / "behav", betas, stimuli):
        folder.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(roi, np.eye(4)), subject / "func1pt8mm/roi/nsdgeneral.nii.gz")
    image = rng.integers(1, 101, sessions * TRIALS)
    table = {
        "SESSION": np.repeat(np.arange(sessions) + 1, TRIALS),
        "RUN": 1,
        "73KID": image,
        "10KID": np.where(image <= 10, image, image + 1000),
    }
    pd.DataFrame(table).to_csv(subject / "behav/responses.tsv", sep="\t", index=False)
    with h5py.File(stimuli / "nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = rng.integers(0, 256, (100, 64, 64, 3), dtype=np.uint8)
    # of one plane, shifted for the others
    noise = rng.standard_normal((TRIALS, *GRID[1::-1]), dtype=np.float32) * 400
    noise = noise.astype("<i2")
    for session in range(1, sessions + 1):
        with h5py.File(betas / f"betas_session{session:02d}.hdf5", "w") as file:
            shape, chunks = (TRIALS, *GRID[::-1]), (TRIALS, 1, 1, 1)
            stored = file.create_dataset("betas", shape, "<i2", chunks=chunks)
            for k in range(GRID[2]):
                shifted = np.roll(noise, 7 * k + session, 0)
                stored[:, k] = shifted * brain[:, :, k].T
    empty = np.broadcast_to(np.int16(0), (*GRID, TRIALS))
    header = nibabel.Nifti1Image(empty, np.eye(4)).header
    header["vox_offset"] = 352
    with gzip.open(betas / "betas_session01.nii.gz", "wb", compresslevel=1) as out:
        out.write(header.binaryblock + bytes(4))
        for trial in range(TRIALS):
            shifted = np.roll(noise.ravel()[: brain.size], 997 * trial)
            volume = shifted.reshape(GRID) * brain
            out.write(volume.tobytes(order="F"))


def time_zlib(path: Path) -> float:
    """Seconds of zlib alone over a .gz, in pieces of a volume's size."""
    start_time, decoder = time.time(), zlib.decompressobj(wbits=31)
    with open(path, "rb") as file:
        while block := decoder.unconsumed_tail or file.read(1 << 20):
            decoder.decompress(block, 2 * int(np.prod(GRID)))
    return time.time() - start_time


def measure_reading(root: Path, sessions: str, file_format: str) -> dict[str, float]:
    """Seconds and peak memory (bytes) of one reading."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(root), sessions, file_format],
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(done.stdout)


def main() -> None:
    """Make, measure, print, delete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", default=None, help="where the synthetic files are made and deleted"
    )
    parser.add_argument("--sessions", type=int, default=3)
    arguments = parser.parse_args()
    volume_size = 2 * int(np.prod(GRID)) * TRIALS / 1e6  # MB of a session
    roi_size = 2 * VOXELS * TRIALS / 1e6
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root, n = Path(folder), arguments.sessions
        write_tree(root, n)
        command = [sys.executable, "-c", IDLE]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        idle = int(done.stdout)
        print(f"memory of the imports alone {idle / 1e6:.0f} MB")
        for sessions, file_format in (("1", "hdf5"), (f"1-{n}", "hdf5"), ("1", "nii.gz")):
            reading = measure_reading(root, sessions, file_format)
            seconds, peak = reading["seconds"], reading["peak"]
            count = 1 if sessions == "1" else n
            print(
                f"{file_format:7} {count} sessions {seconds:6.1f} s,"
                f" {count * roi_size / seconds:6.0f} MB/s of ROI,"
                f" {count * volume_size / seconds:6.0f} MB/s of the volumes, peak"
                f" {peak / 1e6:.0f} MB"
            )
        betas = root / "nsddata_betas/ppdata/subj01/func1pt8mm" / VERSION
        bare = time_zlib(betas / "betas_session01.nii.gz")
        print(f"zlib alone {bare:.1f} s: the reader of .nii.gz runs at {bare / seconds:.0%} of it")


if __name__ == "__main__":
    main()

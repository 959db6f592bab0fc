"""Memory and time to read sessions of full size, volumes and surfaces.

    python benchmarks/large_sessions.py [laion|fsaverage] [sessions]

- laion: LAION-fMRI, 143 x 143 x 143 voxels x 1,050 trials as float32, 12.3 GB a session, compressed
  (270,000 voxels of noise, zeros around them), of which 20,000 voxels are read.
- fsaverage: NSD, 163,842 vertices a hemisphere x 750 trials as float32, .98 GB a session, of which
  37,000 vertices are read.

Files are written once into a temporary folder, and repeat two volumes, so that writing is quick.
Beside the reader: the time to decompress or read the same files and do nothing.
"""

from __future__ import annotations

import gzip
import json
import resource
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pandas as pd
import scipy.io

from src.readers import laion_fmri, nsd

GRID, TRIALS, BRAIN = (143, 143, 143), 1050, 270_000

VERTICES, SESSION_TRIALS = 163_842, 750

N_IMAGES = 60


def write_laion(root: Path, sessions: int) -> list[Path]:
    """A subject of LAION-fMRI; the files of betas."""
    rng = np.random.default_rng(0)
    names = [f"shared_4rep_NSD_special1000_{n}.jpg" for n in range(N_IMAGES)]
    (root / "stimuli").mkdir(parents=True)
    pd.DataFrame({"image_name": names}).to_csv(
        root / "stimuli/task-images_metadata.csv", index=False
    )
    with h5py.File(root / "stimuli/task-images_stimuli.h5", "w") as file:
        file["images"] = rng.integers(0, 255, (N_IMAGES, 32, 32, 3), dtype=np.uint8)
    brain = np.zeros(GRID, np.uint8)
    brain.flat[rng.choice(brain.size, BRAIN, replace=False)] = 1
    general = np.zeros(GRID, np.uint8)
    general.flat[rng.choice(np.flatnonzero(brain), 20_000, replace=False)] = 1
    betas = root / "derivatives/glmsingle-tedana/sub-01"
    folder = root / "derivatives/rois/sub-01/laion"
    folder.mkdir(parents=True)
    affine = np.diag([1.8, 1.8, 1.8, 1.0])
    mask = nibabel.Nifti1Image(general, affine)
    nibabel.save(mask, folder / "sub-01_space-T1w_label-laion-general_mask.nii.gz")
    members = []
    for _ in range(2):
        volume = np.zeros(GRID, np.float32)
        volume[brain > 0] = rng.standard_normal(BRAIN)
        members.append(gzip.compress(volume.tobytes("F"), 1))
    head = nibabel.Nifti1Image(np.zeros((1, 1, 1, 1), np.float32), affine).header
    head.set_data_shape((*GRID, TRIALS))
    head["vox_offset"], head["magic"] = 352, b"n+1"
    header = gzip.compress(head.binaryblock + b"\0" * 4, 1)
    paths = []
    for session in range(1, sessions + 1):
        start = f"sub-01_ses-{session:02d}_task-images"
        folder = betas / f"ses-{session:02d}/func"
        folder.mkdir(parents=True)
        stem = f"{start}_space-T1w_stat-effect_desc-SingletrialBetas_statmap.nii.gz"
        paths.append(folder / stem)
        with open(paths[-1], "wb") as file:
            file.write(header)
            for trial in range(TRIALS):
                file.write(members[trial % 2])
        table = pd.DataFrame({"label": [names[trial % N_IMAGES] for trial in range(TRIALS)]})
        table["beta_index"] = np.arange(TRIALS)
        path = folder / f"{start}_desc-SingletrialBetas_trials.tsv"
        table.to_csv(path, sep="\t", index=False)
    r2 = nibabel.Nifti1Image(20 * brain.astype(np.float32), affine)
    nibabel.save(r2, betas / "sub-01_task-images_space-T1w_stat-rsquare_desc-R2mean_statmap.nii.gz")
    train, test = names[10:], names[:10]
    content = {"n_train": len(train), "n_test": len(test)}
    content["variants"] = [{"train_ids": train, "test_ids": test}]
    (root / "splits/sub-01").mkdir(parents=True)
    (root / "splits/sub-01/tau.json").write_text(json.dumps(content))
    return paths


def write_fsaverage(root: Path, sessions: int) -> list[Path]:
    """A subject of NSD on fsaverage; the files of betas."""
    rng = np.random.default_rng(0)
    experiment = root / "nsddata/experiments/nsd"
    stimuli = root / "nsddata_stimuli/stimuli/nsd"
    labels = root / "nsddata/freesurfer/fsaverage/label"
    betas = root / "nsddata_betas/ppdata/subj01/fsaverage/betas_fithrf_GLMdenoise_RR"
    for folder in (experiment, stimuli, labels, betas):
        folder.mkdir(parents=True)
    order = np.arange(sessions * SESSION_TRIALS) % N_IMAGES + 1
    subjects = np.tile(np.arange(1, N_IMAGES + 1), (8, 1))
    design = {"masterordering": order[None], "subjectim": subjects, "sharedix": subjects[:1, :10]}
    scipy.io.savemat(experiment / "nsd_expdesign.mat", design)
    with h5py.File(stimuli / "nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = rng.integers(0, 255, (N_IMAGES, 32, 32, 3), dtype=np.uint8)
    content = nibabel.MGHImage(np.zeros((1, 1, 1, 1), np.float32), np.eye(4)).to_bytes()
    sizes = struct.pack(">4i", VERTICES, 1, 1, SESSION_TRIALS)
    header, footer = content[:4] + sizes + content[20:284], content[288:]
    paths = []
    for side in ("lh", "rh"):
        mask = (rng.random(VERTICES) < 0.113).astype(np.int32)
        image = nibabel.MGHImage(mask[:, None, None], np.eye(4))
        nibabel.save(image, labels / f"{side}.nsdgeneral.mgz")
        volumes = [rng.standard_normal(VERTICES).astype(">f4").tobytes() for _ in range(2)]
        for session in range(1, sessions + 1):
            paths.append(betas / f"{side}.betas_session{session:02d}.mgh")
            with open(paths[-1], "wb") as file:
                file.write(header)
                for trial in range(SESSION_TRIALS):
                    file.write(volumes[trial % 2])
                file.write(footer)
    return paths


def read_plainly(paths: list[Path]) -> float:
    """Seconds to read the files, decompressed where they are, and do nothing."""
    start_time = time.perf_counter()
    for path in paths:
        decoder = zlib.decompressobj(wbits=31)
        with open(path, "rb") as file:
            while data := file.read(1 << 16):
                while data and path.suffix == ".gz":
                    if decoder.eof:
                        decoder = zlib.decompressobj(wbits=31)
                    decoder.decompress(data)
                    data = decoder.unused_data
    return time.perf_counter() - start_time


def main(kind: str, sessions: int) -> None:
    """Write, read, and print time and the largest memory."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "source"
        write = write_laion if kind == "laion" else write_fsaverage
        paths = write(root, sessions)
        size = sum(path.stat().st_size for path in paths) / 1e9
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        start_time = time.perf_counter()
        if kind == "laion":
            laion_fmri.read(root, Path(folder) / "out", 1)
        else:
            nsd.read(root, Path(folder) / "out", 1, space="fsaverage", protocol="own")
        seconds = time.perf_counter() - start_time
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        plain = read_plainly(paths)
        print(
            f"{kind}: {sessions} sessions, {size:.2f} GB of files: read in {seconds:.1f} s, plainly"
            f" {plain:.1f} s; peak memory {peak:.2f} GB ({before:.2f} GB before reading)"
        )


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else "laion", int(sys.argv[2]) if len(sys.argv) > 2 else 1
    )

"""docs/own_data.md: its code makes single-trial betas of a simulated study in fMRIPrep's file
names, by LSA and LSS, and the reader of BIDS data reads them.
"""

import re

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from src.data.subject import open_subject
from src.readers import bids
from src.utils import ROOT

pytest.importorskip("nilearn", reason="the tutorial needs nilearn")

GRID, TR, N_SCANS, N_TRIALS, N_PICTURES = (3, 3, 3), 2.0, 110, 12, 6
AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])


def run_page():
    """The functions of the page."""
    page = (ROOT / "docs" / "own_data.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)  # the page's own code
    return names


def convolve(onsets, amplitudes):
    """The response (scans, voxels) of trials, with a gamma function of its own in place of
    nilearn's."""
    times = np.arange(N_SCANS)[:, None] * TR
    lag = np.clip(times - onsets[None], 0, None)
    shape = lag**5 * np.exp(-lag / 0.9) / (5 * 0.9 / np.e) ** 5
    return shape @ amplitudes


@pytest.fixture
def study(tmp_path):
    """Two sessions of two runs; the amplitude (trials, voxels) of each trial."""
    rng = np.random.default_rng(0)
    (tmp_path / "study/stimuli").mkdir(parents=True)
    for picture in range(N_PICTURES):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"study/stimuli/{picture}.png")
    patterns = rng.standard_normal((N_PICTURES, np.prod(GRID)))
    truth = []
    for session in ("01", "02"):
        for run in ("1", "2"):
            shown = rng.permutation(np.arange(N_TRIALS) % N_PICTURES)
            amplitudes = 2 + patterns[shown] + 0.1 * rng.standard_normal((N_TRIALS, 27))
            truth.append(amplitudes)
            onsets = 8.0 + 16.0 * np.arange(N_TRIALS)
            series = 100 + convolve(onsets, amplitudes) + 0.1 * rng.standard_normal((N_SCANS, 27))
            write_run(tmp_path, session, run, onsets, shown, series)
    mask = nibabel.Nifti1Image(np.ones(GRID, np.uint8), AFFINE)
    nibabel.save(mask, tmp_path / "study/derivatives/sub-01_space-T1w_desc-brain_mask.nii.gz")
    return tmp_path, np.concatenate(truth)


def write_run(root, session, run, onsets, shown, series):
    inner = f"sub-01/ses-{session}/func"
    stem = f"sub-01_ses-{session}_task-pictures_run-{run}"
    for folder in (root / "study" / inner, root / "prep" / inner, root / "study/derivatives"):
        folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"onset": onsets, "duration": 2.0})
    table["stim_file"] = [f"{picture}.png" for picture in shown]
    table.loc[len(table)] = [onsets[-1] + 10, 2.0, "n/a"]  # a blank trial
    table.to_csv(root / "study" / inner / f"{stem}_events.tsv", sep="\t", index=False)
    bold = nibabel.Nifti1Image(series.T.reshape(*GRID, -1).astype(np.float32), AFFINE)
    bold.header.set_zooms((3, 3, 3, TR))
    nibabel.save(bold, root / "prep" / inner / f"{stem}_space-T1w_desc-preproc_bold.nii.gz")
    mask = nibabel.Nifti1Image(np.ones(GRID, np.uint8), AFFINE)
    nibabel.save(mask, root / "prep" / inner / f"{stem}_space-T1w_desc-brain_mask.nii.gz")


@pytest.mark.slow(reason="48 general linear models for LSS")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("separate", [False, True])
def test_the_page_makes_betas_that_the_reader_reads(study, tmp_path, separate):
    root, truth = study
    page = run_page()
    for session in ("01", "02"):
        page["estimate_session"](
            root / "study", root / "prep", "01", session, "pictures", TR, separate
        )
    mask = "derivatives/sub-{subj}_space-T1w_desc-brain_mask.nii.gz"
    bids.read(root / "study", tmp_path / "out", 1, mask=mask, test_images=2, val_images=1)
    subject = open_subject(tmp_path / "out", 1)
    assert subject.betas.shape == truth.shape
    assert subject.trials["session"].tolist() == [0] * 24 + [1] * 24
    assert subject.trials["run"].tolist() == ([0] * 12 + [1] * 12) * 2
    for voxel in range(0, 27, 5):
        correlation = np.corrcoef(subject.betas[:, voxel], truth[:, voxel])[0, 1]
        assert correlation > 0.9, (voxel, correlation)

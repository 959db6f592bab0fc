"""src.readers.nsd on surfaces: the mini world through `write` and back, files made with plain
nibabel and h5py as the description has them, and what is refused.
"""

import json

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
import scipy.io

from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.miniworld.formats import SourceData
from src.miniworld.formats import nsd as nsd_format
from src.readers import nsd
from src.utils import PerceptError

VERSION = "betas_fithrf_GLMdenoise_RR"
NATIVE = {"lh": 42, "rh": 44}
FSAVERAGE = {"lh": 60, "rh": 60}
N_TRIALS = 20  # of a session
OPTIONS = {"protocol": "mini", "image_size": 0, "val_images": 1}


@pytest.mark.parametrize(("space", "ending"), [("fsaverage", "mgh"), ("nativesurface", "hdf5")])
def test_the_mini_world_comes_back(tmp_path, space, ending):
    world = simulate(1, 24, 6, 8, trials_per_session=40)
    source, formats = tmp_path / "nsd", {"space": space, "file_format": ending}
    nsd_format.write(source, 1, SourceData.from_world(world), **formats)
    nsd.read(source, tmp_path / "out", 1, protocol="mini", image_size=0, space=space)
    subject, trials = open_subject(tmp_path / "out", 1), world.scan.trials
    betas = world.scan.betas
    if space == "nativesurface":
        betas = np.rint(betas.astype(np.float64) * 300).astype(np.int16).astype(
            np.float32
        ) / np.float32(300)
    np.testing.assert_array_equal(subject.betas, betas)
    columns = list(subject.trials.columns)
    pd.testing.assert_frame_equal(subject.trials, trials[columns], check_dtype=False)
    areas = world.scan.voxels.select_dtypes("bool").columns
    np.testing.assert_array_equal(subject.voxels[areas], world.scan.voxels[areas])
    ceiling = world.scan.voxels["noise_ceiling"]
    np.testing.assert_allclose(subject.voxels["noise_ceiling"], ceiling, rtol=1e-4)
    assert (subject.voxels["flat_sessions"] == 0).all()
    half = len(ceiling) // 2
    assert subject.voxels["vertex"].tolist()[:half] == list(range(3, 3 + half))


# ------------------------------------------------------------------------- written by plain tools
class Tree:
    """Subject 1 with two sessions on both surfaces, labels on both, and the transforms."""

    def __init__(self, root):
        self.root, self.rng = root, np.random.default_rng(0)
        self.subject = root / "nsddata/ppdata/subj01"
        self.freesurfer = root / "nsddata/freesurfer"
        self.betas_folder = root / "nsddata_betas/ppdata/subj01"
        experiment = root / "nsddata/experiments/nsd"
        stimuli = root / "nsddata_stimuli/stimuli/nsd"
        for folder in (self.subject / "transforms", experiment, stimuli):
            folder.mkdir(parents=True)
        for owner in ("fsaverage", "subj01"):
            (self.freesurfer / owner / "label").mkdir(parents=True)
        order = np.concatenate([np.arange(1, 13), self.rng.integers(1, 13, 2 * N_TRIALS - 12)])
        ids = self.rng.permutation(30)[:12]
        content = {
            "masterordering": order[None],
            "subjectim": np.tile(ids + 1, (8, 1)),
            "sharedix": ids[None, :3] + 1,
        }
        scipy.io.savemat(experiment / "nsd_expdesign.mat", content)
        with h5py.File(stimuli / "nsd_stimuli.hdf5", "w") as file:
            file["imgBrick"] = self.rng.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
        self.write_betas()
        self.write_labels()

    def write_betas(self):
        self.float_betas, self.int_betas = {}, {}
        for session in (1, 2):
            for side in ("lh", "rh"):
                folder = self.betas_folder / "fsaverage" / VERSION
                folder.mkdir(parents=True, exist_ok=True)
                rows = self.rng.standard_normal((FSAVERAGE[side], N_TRIALS)).astype(np.float32)
                rows[5 + session] = np.nan  # another vertex in each session
                self.float_betas[session, side] = rows
                save_mgh(folder / f"{side}.betas_session{session:02d}.mgh", rows)
                folder = self.betas_folder / "nativesurface" / VERSION
                folder.mkdir(parents=True, exist_ok=True)
                rows = self.rng.integers(-3000, 3000, (NATIVE[side], N_TRIALS)).astype(np.int16)
                rows[4] = 0  # NaN was written as 0
                self.int_betas[session, side] = rows
                with h5py.File(folder / f"{side}.betas_session{session:02d}.hdf5", "w") as file:
                    chunks = (N_TRIALS, 1)
                    file.create_dataset("betas", data=rows.T.copy(), chunks=chunks)
        for space, counts in {"fsaverage": FSAVERAGE, "nativesurface": NATIVE}.items():
            for side, count in counts.items():
                values = np.linspace(0, 2, count, dtype=np.float32)
                values[4] = np.nan
                save_mgh(self.betas_folder / space / VERSION / f"{side}.ncsnr.mgh", values)

    def write_labels(self):
        """nsdgeneral and streams on both surfaces; floc-faces on the native one only."""
        self.labels, self.vertices = {}, {}
        for owner, counts in {"fsaverage": FSAVERAGE, "subj01": NATIVE}.items():
            for roi in ("nsdgeneral", "streams", "floc-faces"):
                for side, count in counts.items():
                    if roi == "floc-faces" and owner == "fsaverage":
                        continue
                    n_labels = {"nsdgeneral": 2, "streams": 8, "floc-faces": 4}[roi]
                    values = self.rng.integers(0, n_labels, count).astype(np.int32)
                    values[:10] = 1  # of nsdgeneral
                    self.labels[owner, roi, side] = values
                    save_mgh(self.freesurfer / owner / f"label/{side}.{roi}.mgz", values)
        path = self.freesurfer / "subj01/label/floc-faces.mgz.ctab"
        path.write_text("0 Unknown\n1 OFA\n2 FFA-1\n3 FFA-2\n")
        for side in ("lh", "rh"):
            vertices = self.rng.integers(1, NATIVE[side] + 1, FSAVERAGE[side])
            vertices[3] = 9999
            self.vertices[side] = vertices
            path = self.subject / f"transforms/{side}.white-to-fsaverage.mgz"
            save_mgh(path, vertices.astype(np.float32))

    def join(self, owner, roi):
        return np.concatenate([self.labels[owner, roi, side] for side in ("lh", "rh")])


def save_mgh(path, values):
    """(vertices,) or (vertices, trials) as FreeSurfer keeps them."""
    shape = (len(values), 1, 1, *values.shape[1:])
    nibabel.save(nibabel.MGHImage(values.reshape(shape), np.eye(4)), path)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "nsd")


def read(tree, tmp_path, space, **options):
    nsd.read(tree.root, tmp_path / "out", 1, space=space, sessions="1-2", **OPTIONS | options)
    return open_subject(tmp_path / "out", 1)


def join_sides(betas, general):
    """Betas (trials, vertices of nsdgeneral) of both sessions."""
    rows = [np.concatenate([betas[s, "lh"], betas[s, "rh"]]) for s in (1, 2)]
    return np.concatenate([part[general].T for part in rows])


@pytest.mark.filterwarnings("ignore:.*do not vary in any session")
def test_fsaverage_is_percent_already(tree, tmp_path):
    general = tree.join("fsaverage", "nsdgeneral") > 0
    subject = read(tree, tmp_path, "fsaverage")
    expected = np.nan_to_num(join_sides(tree.float_betas, general), nan=0)
    np.testing.assert_array_equal(subject.betas, expected)  # nothing is divided by 300
    vertices = np.concatenate([np.arange(60), np.arange(60)])[general]
    assert subject.voxels["vertex"].tolist() == vertices.tolist()
    assert subject.voxels["hemi"].tolist() == [
        "L" if g < 60 else "R" for g in np.flatnonzero(general)
    ]
    flat = np.isin(vertices, (6, 7)).astype(int)
    assert subject.voxels["flat_sessions"].tolist() == flat.tolist()
    ncsnr = np.tile(np.linspace(0, 2, 60), 2)
    ncsnr[[4, 64]] = 0
    np.testing.assert_allclose(subject.voxels["ncsnr"], ncsnr[general], rtol=1e-6)
    streams = tree.join("fsaverage", "streams")[general]
    np.testing.assert_array_equal(subject.voxels["ventral"], streams == 5)
    # floc-faces was drawn on the native surface: looked up with numbers from 1, 9999 = nowhere
    parts = []
    for side in ("lh", "rh"):
        native = tree.labels["subj01", "floc-faces", side]
        parts += [native[v - 1] if v <= len(native) else 0 for v in tree.vertices[side]]
    np.testing.assert_array_equal(subject.voxels["FFA-1"], np.array(parts)[general] == 2)
    assert json.loads(subject.attributes["vertices"]) == {"L": 60, "R": 60}
    assert subject.attributes["space"] == "fsaverage" and "affine" not in subject.attributes


@pytest.mark.filterwarnings("ignore:.*do not vary in any session")
def test_native_integers_are_divided_by_300(tree, tmp_path):
    general = tree.join("subj01", "nsdgeneral") > 0
    subject = read(tree, tmp_path, "nativesurface")
    expected = join_sides(tree.int_betas, general).astype(np.float32) / np.float32(300)
    np.testing.assert_array_equal(subject.betas, expected)
    vertices = np.concatenate([np.arange(42), np.arange(44)])[general]
    assert subject.voxels["flat_sessions"].tolist() == [2 * (v == 4) for v in vertices]
    faces = tree.join("subj01", "floc-faces")[general]
    np.testing.assert_array_equal(subject.voxels["OFA"], faces == 1)
    narrowed = read(tree, tmp_path, "nativesurface", rois="FFA-1,FFA-2")
    np.testing.assert_array_equal(narrowed.betas, subject.betas[:, faces >= 2])
    whole = read(tree, tmp_path, "nativesurface", roi="all")
    assert whole.betas.shape == (2 * N_TRIALS, 86)


# ------------------------------------------------------------------------------------- refusals
def find(tree, name):
    return next(tree.betas_folder.glob(f"*/*/{name}"))


def cut_mgh(tree):
    path = find(tree, "rh.betas_session02.mgh")
    path.write_bytes(path.read_bytes()[:-500])


def lose_side(tree):
    find(tree, "rh.betas_session02.mgh").unlink()


def scale_mgh(tree):
    save_mgh(find(tree, "lh.betas_session01.mgh"), np.ones((60, N_TRIALS), np.int16))


def shorten_side(tree):
    save_mgh(find(tree, "rh.betas_session01.mgh"), np.ones((60, N_TRIALS - 1), np.float32))


def take_another_subject(tree):
    save_mgh(find(tree, "rh.betas_session02.mgh"), np.ones((61, N_TRIALS), np.float32))


def misfit_label(tree):
    save_mgh(tree.freesurfer / "fsaverage/label/lh.streams.mgz", np.zeros(59, np.int32))


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (cut_mgh, {}, "rh.betas_session02.mgh .*cut off"),
        (lose_side, {}, "rh.betas_session02.mgh is missing .and so is the .mgz., of 2 sessions 1"),
        (scale_mgh, {}, "lh.betas_session01.mgh holds .*i2.*not divided by 300"),
        (shorten_side, {}, "has 19 trials, .* has 20: both hemispheres"),
        (take_another_subject, {}, "have 121 vertices, those of session 1 have 120"),
        (misfit_label, {}, "lh.streams.mgz has 59 values"),
        (None, {"roi": "V9"}, "no ROI file .*lh.V9.mgz: choose one of floc-faces, nsdgeneral"),
        (None, {"rois": "V9"}, "Subject 1 of NSD on fsaverage has no region V9"),
        (None, {"file_format": "hdf5"}, "file_format is 'hdf5': NSD has auto, mgh, mgz"),
        (None, {"space": "fsaverage5"}, "space is 'fsaverage5': NSD has func1pt8mm"),
    ],
)
def test_refusals(tree, tmp_path, spoil, options, message):
    if spoil is not None:
        spoil(tree)
    with pytest.raises(PerceptError, match=message) as caught:
        read(tree, tmp_path, **{"space": "fsaverage"} | options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "subj01").exists()


def test_native_files_of_other_axes_are_refused(tree, tmp_path):
    path = find(tree, "lh.betas_session01.hdf5")
    with h5py.File(path, "w") as file:
        file["betas"] = np.zeros((2, 3, 4), np.int16)
    with pytest.raises(PerceptError, match=r"holds int16 \(2, 3, 4\): betas of the native surface"):
        read(tree, tmp_path, "nativesurface")

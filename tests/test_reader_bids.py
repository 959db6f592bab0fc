"""src.readers.bids: the mini world through `write` and back, single-trial betas written with plain
nibabel, h5py and numpy in every format that is read, and what is refused.
"""

import dataclasses
import gzip
import json
import tracemalloc

import h5py
import nibabel
import numpy as np
import pandas as pd
import pytest
from nibabel.cifti2 import BrainModelAxis, ScalarAxis
from PIL import Image

from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.miniworld.formats import SourceData
from src.miniworld.formats import bids as bids_format
from src.readers import bids
from src.utils import PerceptError

GRID = (3, 4, 5)
AFFINE = np.array([[2.0, 0, 0, -3], [0, 2, 0, -4], [0, 0, 2, -5], [0, 0, 0, 1]])
NAMES = ["a.b.png", "Cat 1.png", "x.jpg.png", "dog.png", "sun.png", "tree.png"]
QUICK = {"val_images": 1, "test": "random", "test_images": 1}


# -------------------------------------------------------------------------------- the mini world
@pytest.fixture(scope="module")
def world():
    return simulate(1, 24, 6, 8, trials_per_session=40)


@pytest.mark.parametrize("file_format", bids_format.FORMATS)
def test_the_mini_world_comes_back(world, tmp_path, file_format):
    trials = world.scan.trials
    bids_format.write(tmp_path / "source", 1, SourceData.from_world(world), file_format=file_format)
    bids.read(tmp_path / "source", tmp_path / "out", 1, image_size=0)
    subject = open_subject(tmp_path / "out", 1)
    np.testing.assert_array_equal(subject.betas, world.scan.betas)
    columns = ["trial", "image", "session", "run", "repeat", "split"]
    pd.testing.assert_frame_equal(subject.trials[columns], trials[columns], check_dtype=False)
    ids = np.unique(trials["image"])
    in_order = world.images[np.searchsorted(world.image_ids, ids)]
    np.testing.assert_array_equal(subject.images(ids), in_order)
    areas = [name for name in world.scan.voxels.select_dtypes("bool") if name in subject.voxels]
    assert {"V1", "hV4"} <= set(areas)
    np.testing.assert_array_equal(subject.voxels[areas], world.scan.voxels[areas])
    assert subject.protocol == "source-splits" and subject.captions is not None
    places = {"i", "j", "k"} if file_format != "func.gii" else {"hemi", "vertex"}
    assert places <= set(subject.voxels) and (subject.voxels["flat_sessions"] == 0).all()


# ------------------------------------------------------------------------- written by plain tools
class Study:
    """A small study: sub-01, sessions 2 and 10, of 9 trials each, 6 pictures."""

    def __init__(self, root, seed=0):
        self.root, rng = root, np.random.default_rng(seed)
        self.rng = rng
        (root / "stimuli/animals").mkdir(parents=True)
        for name in NAMES:
            pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "stimuli/animals" / name)
        self.shown = {2: rng.choice(NAMES, 9).tolist(), 10: [*NAMES, *NAMES[:3]]}
        for session, names in self.shown.items():
            self.write_events(session, names)

    def folder(self, session, kind="derivatives/glm"):
        folder = self.root / kind / f"sub-01/ses-{session}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_events(self, session, names):
        """Two runs (5 trials, then the others); run-10 after run-2, a blank row, one n/a."""
        for run, part in {2: names[:5], 10: names[5:]}.items():
            rows = [(f"animals/{name}", "picture") for name in part]
            rows.insert(1, ("blank", "blank"))
            rows.append(("n/a", "rest"))
            table = pd.DataFrame(rows, columns=["stim_file", "trial_type"])
            table.insert(0, "onset", 3.0 * np.arange(len(rows)))
            path = self.folder(session, "raw") / f"sub-01_ses-{session}_run-{run}_events.tsv"
            table.to_csv(path, sep="\t", index=False)

    def draw(self, *shape):
        """Betas of the two sessions, (trials, *shape)."""
        return {s: self.rng.standard_normal((9, *shape)).astype(np.float32) for s in (2, 10)}

    def read(self, tmp_path, **options):
        bids.read(self.root, tmp_path / "out", 1, **QUICK, **options)
        return open_subject(tmp_path / "out", 1)

    def check(self, subject, betas):
        """Betas (trials, columns) of each session, and what was shown."""
        np.testing.assert_allclose(subject.betas, np.concatenate([betas[2], betas[10]]), rtol=1e-6)
        assert subject.trials["session"].tolist() == [0] * 9 + [1] * 9
        assert subject.trials["run"].tolist() == ([0] * 5 + [1] * 4) * 2
        names = subject.labels.set_index("image")["name"]
        shown = [f"animals/{name}" for name in self.shown[2] + self.shown[10]]
        assert names[subject.trials["image"]].tolist() == shown


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path / "study")


def save_volumes(study, betas, name="desc-betas_statmap.nii.gz", affine=AFFINE):
    for session, volumes in betas.items():
        image = nibabel.Nifti1Image(np.moveaxis(volumes, 0, -1), affine)
        nibabel.save(image, study.folder(session) / f"sub-01_ses-{session}_{name}")


def save_region(study, name, values, affine=AFFINE):
    folder = study.root / "derivatives/rois"
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), folder / name)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_nifti_with_mask_regions_and_an_atlas(study, tmp_path, ending):
    betas = study.draw(*GRID)
    betas[2][:, 0, 0, 0] = 7  # does not vary in one session
    betas[10][4, 0, 0, 1] = np.nan
    save_volumes(study, betas, f"desc-betas_statmap.{ending}")
    mask = np.zeros(GRID, np.uint8)
    mask[:2] = 1
    atlas = np.zeros(GRID, np.int16)
    atlas[0], atlas[1, 0] = 3, 8
    save_region(study, "sub-01_desc-cortex_mask.nii.gz", mask)
    save_region(study, "sub-01_label-early_mask.nii.gz", (atlas == 3).astype(np.uint8))
    save_region(study, "sub-01_desc-aparc_dseg.nii.gz", atlas)
    table = pd.DataFrame({"index": [0, 3, 8], "name": ["none", "V1", "FFA"]})
    table.to_csv(study.root / "desc-aparc_dseg.tsv", sep="\t", index=False)
    patterns = {"mask": "**/*cortex_mask.nii.gz", "regions": "**/*label*.nii.gz,**/*dseg.nii.gz"}
    subject = study.read(tmp_path, **patterns)
    wanted = {s: volumes[:, mask > 0].copy() for s, volumes in betas.items()}
    wanted[2][:, 0] = 0
    wanted[10][:, 1] = 0
    study.check(subject, wanted)
    assert subject.voxels["flat_sessions"].tolist() == [1, 1] + [0] * 38
    np.testing.assert_array_equal(subject.voxels["V1"], atlas[mask > 0] == 3)
    np.testing.assert_array_equal(subject.voxels["FFA"], atlas[mask > 0] == 8)
    np.testing.assert_array_equal(subject.voxels["early"], atlas[mask > 0] == 3)
    np.testing.assert_array_equal(subject.voxels[["i", "j", "k"]], np.argwhere(mask))
    np.testing.assert_allclose(subject.voxels["x"], 2 * subject.voxels["i"] - 3)
    assert json.loads(subject.attributes["session_labels"]) == ["2", "10"]
    assert json.loads(subject.attributes["grid"]) == list(GRID)
    narrowed = study.read(tmp_path, rois="FFA", units="percent", scale=2.0, **patterns)
    np.testing.assert_allclose(narrowed.betas, subject.betas[:, atlas[mask > 0] == 8] / 2)
    assert narrowed.attributes["units"] == "percent"


def test_scaled_integers_and_a_folder_of_volumes(study, tmp_path):
    betas = study.draw(*GRID)
    for session, volumes in betas.items():
        folder = study.folder(session) / f"sub-01_ses-{session}_desc-betas"
        folder.mkdir()
        for number, volume in enumerate(volumes):
            image = nibabel.Nifti1Image(np.rint(volume * 4).astype(np.int16), AFFINE)
            image.header.set_slope_inter(0.25, 1.0)
            nibabel.save(image, folder / f"beta_{number}.nii.gz")
    subject = study.read(tmp_path)
    stored = {s: np.rint(v * 4) * 0.25 + 1 for s, v in betas.items()}
    # the voxels that are not 0 in the first volume
    first = stored[2][0].ravel()
    kept = {s: v.reshape(9, -1)[:, first != 0] for s, v in stored.items()}
    study.check(subject, kept)


def test_two_hemispheres_in_gifti_and_mgh(study, tmp_path):
    betas = study.draw(12)
    for session, rows in betas.items():
        folder = study.folder(session)
        for side, part in {"L": rows[:, :7], "R": rows[:, 7:]}.items():
            stem = f"sub-01_ses-{session}_hemi-{side}_space-fsnative_desc-betas"
            arrays = [nibabel.gifti.GiftiDataArray(row) for row in part]
            if side == "R":  # as one matrix (vertices, trials)
                arrays = [nibabel.gifti.GiftiDataArray(np.ascontiguousarray(part.T))]
            nibabel.save(nibabel.GiftiImage(darrays=arrays), folder / f"{stem}.func.gii")
            mgh = nibabel.MGHImage(part.T.copy()[:, None, None, :], np.eye(4))
            nibabel.save(mgh, folder / f"sub-01_ses-{session}_hemi-{side}_beta.mgh")
            nibabel.save(mgh, folder / f"sub-01_ses-{session}_hemi-{side}_beta.mgz")
            labels = np.zeros(part.shape[1], np.int32)
            labels[:2] = 5
            table = nibabel.gifti.GiftiLabelTable()
            for key, name in {0: "???", 5: "V1"}.items():
                label = nibabel.gifti.GiftiLabel(key)
                label.label = name
                table.labels.append(label)
            image = nibabel.GiftiImage(labeltable=table)
            image.add_gifti_data_array(nibabel.gifti.GiftiDataArray(labels, "NIFTI_INTENT_LABEL"))
            nibabel.save(image, study.root / f"sub-01_hemi-{side}_atlas.label.gii")
            points = np.arange(3 * part.shape[1], dtype=np.float32).reshape(-1, 3)
            mesh = nibabel.gifti.GiftiDataArray(points, "NIFTI_INTENT_POINTSET")
            nibabel.save(
                nibabel.GiftiImage(darrays=[mesh]),
                study.root / f"sub-01_hemi-{side}_white.surf.gii",
            )
    for pattern in ("**/*betas.func.gii", "**/*beta.mgh", "**/*beta.mgz"):
        subject = study.read(
            tmp_path, betas=pattern, regions="*atlas.label.gii", mesh="*white.surf.gii"
        )
        study.check(subject, betas)
        assert subject.voxels["hemi"].tolist() == ["L"] * 7 + ["R"] * 5
        assert subject.voxels["vertex"].tolist() == [*range(7), *range(5)]
        assert np.flatnonzero(subject.voxels["V1"]).tolist() == [0, 1, 7, 8]
        assert subject.voxels["y"].tolist() == [3 * v + 1 for v in subject.voxels["vertex"]]
        assert json.loads(subject.attributes["vertices"]) == {"L": 7, "R": 5}


def test_cifti_keeps_structures_and_indices(study, tmp_path):
    cortex = BrainModelAxis.from_mask(np.array([1, 1, 0, 1] * 3, bool), name="CortexLeft")
    nucleus = BrainModelAxis.from_mask(
        np.ones((1, 3, 2), bool), name="thalamus_left", affine=AFFINE
    )
    axis, betas = cortex + nucleus, study.draw(15)
    for session, rows in betas.items():
        scalars = ScalarAxis([f"trial {t}" for t in range(9)])
        path = study.folder(session) / f"sub-01_ses-{session}_space-fsLR_desc-betas.dscalar.nii"
        nibabel.save(nibabel.Cifti2Image(rows, (scalars, axis)), path)
    region = nibabel.Cifti2Image(np.eye(1, 15, 4, np.float32), (ScalarAxis(["x"]), axis))
    nibabel.save(region, study.root / "sub-01_label-V4_mask.dscalar.nii")
    subject = study.read(tmp_path)
    study.check(subject, betas)
    voxels = subject.voxels
    assert voxels["vertex"].tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 11] + [-1] * 6
    assert voxels["hemi"].tolist() == ["L"] * 9 + [""] * 6
    assert voxels["k"].tolist() == [-1] * 9 + [0, 1] * 3
    assert np.flatnonzero(voxels["V4"]).tolist() == [4]
    assert voxels["structure"].unique().tolist() == [
        "CIFTI_STRUCTURE_CORTEX_LEFT",
        "CIFTI_STRUCTURE_THALAMUS_LEFT",
    ]


def save_glmsingle(study, betas, kind):
    """As GLMsingle's Python version (.npy, .hdf5) and MATLAB's (.mat, reversed axes) write it."""
    for session, volumes in betas.items():
        folder = study.folder(session)
        last = np.moveaxis(volumes, 0, -1)
        order = [NAMES.index(name) for name in study.shown[session]]
        if kind == "npy":
            results = {"betasmd": last, "R2": last[..., 0], "pcnum": 3, "glmbadness": None}
            np.save(folder / "TYPED_FITHRF_GLMDENOISE_RR.npy", results)
            design = {"stimorder": order, "numtrialrun": np.array([5, 4]), "tr": 1.5}
            np.save(folder / "DESIGNINFO.npy", design)
        elif kind == "hdf5":
            with h5py.File(folder / "TYPED_FITHRF_GLMDENOISE_RR.hdf5", "w") as file:
                file["betasmd"] = last
                file["glmbadness"] = h5py.Empty("f4")
                ragged = file.create_group("pcregressors")
                ragged.attrs["__glmsingle_ragged_list__"] = True
                ragged["0"], ragged["1"] = np.zeros((3, 2)), np.zeros((4, 2))
                file.attrs["pcnum"] = 3
            design = {"stimorder": order, "numtrialrun": [5, 4]}
            np.save(folder / "DESIGNINFO.npy", design)
        else:
            with h5py.File(folder / "TYPED_FITHRF_GLMDENOISE_RR.mat", "w") as file:
                file["modelmd"] = last.T
            with h5py.File(folder / "DESIGNINFO.mat", "w") as file:
                file["stimorder"] = np.array(order, float)[:, None] + 1
                file["numtrialrun"] = np.array([[5.0], [4.0]])


@pytest.mark.parametrize("shape", [GRID, (7, 1, 1)])
@pytest.mark.parametrize("kind", ["npy", "hdf5", "mat"])
def test_glmsingle_output(study, tmp_path, kind, shape):
    betas = study.draw(*shape)
    save_glmsingle(study, betas, kind)
    table = pd.DataFrame({"condition": range(6), "image": NAMES})
    table.to_csv(study.root / "conditions.csv", index=False)
    flat = {s: v.reshape(9, -1) for s, v in betas.items()}
    study.check(study.read(tmp_path), flat)
    options = {"conditions": "conditions.csv"}
    if shape != GRID:  # betas of masked voxels: they lie where the mask has ones
        mask = np.zeros(GRID, np.uint8)
        mask.flat[[3, 9, 20, 21, 40, 41, 59]] = 1
        save_region(study, "sub-01_desc-cortex_mask.nii.gz", mask)
        options["mask"] = "**/*cortex_mask.nii.gz"
    subject = study.read(tmp_path, **options)
    study.check(subject, flat)
    if shape != GRID:
        np.testing.assert_array_equal(subject.voxels[["i", "j", "k"]], np.argwhere(mask))
    table[:3].to_csv(study.root / "conditions.csv", index=False)
    with pytest.raises(PerceptError, match=r"DESIGNINFO.* has condition 3 .*complete it"):
        study.read(tmp_path, **options)


def test_plain_arrays_and_a_stack_of_pictures(study, tmp_path):
    betas = study.draw(11)
    for session, rows in betas.items():
        np.save(study.folder(session) / f"sub-01_ses-{session}_desc-betas.npy", rows)
    with h5py.File(study.root / "pictures.h5", "w") as file:
        file["images"] = np.arange(6 * 75, dtype=np.uint16).astype(np.uint8).reshape(6, 5, 5, 3)
        file["names"] = [f"animals/{name}" for name in sorted(NAMES)]
    subject = study.read(tmp_path, images="pictures.h5")
    study.check(subject, betas)
    row = sorted(NAMES).index("dog.png")
    with h5py.File(study.root / "pictures.h5") as file:
        np.testing.assert_array_equal(subject.images([row])[0], file["images"][row])
    subset = study.read(tmp_path, images="pictures.h5", sessions="10")
    np.testing.assert_array_equal(subset.betas, betas[10])


def test_splits_of_every_kind(study, tmp_path):
    save_volumes(study, study.draw(*GRID))
    study.write_events(2, [*NAMES[:2]] * 4 + [NAMES[0]])
    bids.read(study.root, tmp_path / "out", 1, val_images=1, test_images=1)
    subject = open_subject(tmp_path / "out", 1)
    names = subject.labels.set_index("image")["name"]
    assert names[subject.image_ids("test")].tolist() == [f"animals/{NAMES[0]}"]
    assert subject.protocol == "study-repeated1"
    assert study.read(tmp_path).protocol == "study-random1-seed42"
    table = pd.DataFrame({"image": NAMES[:4], "split": ["train", "train", "val", "test"]})
    table.to_csv(study.root / "splits.csv", index=False)
    subject = study.read(tmp_path)
    assert names[subject.image_ids("val")].tolist() == [f"animals/{NAMES[2]}"]
    assert subject.trials["split"].eq("exclude").sum() == 2
    twice = pd.concat([table, pd.DataFrame({"image": ["Cat 1"], "split": ["test"]})])
    twice.to_csv(study.root / "splits.csv", index=False)
    with pytest.raises(PerceptError, match="in more than one row"):
        study.read(tmp_path)


# ------------------------------------------------------------------------------------- refusals
def cut_betas(study):
    path = study.folder(10) / "sub-01_ses-10_desc-betas_statmap.nii.gz"
    path.write_bytes(path.read_bytes()[:-400])


def add_row(study):
    path = study.folder(2, "raw") / "sub-01_ses-2_run-2_events.tsv"
    path.write_text(path.read_text() + f"99\tanimals/{NAMES[0]}\tpicture\n")


def move_mask(study):
    mask = np.ones(GRID, np.uint8)
    save_region(study, "sub-01_label-V1_mask.nii.gz", mask, AFFINE + 0.01 * np.eye(4))


def shrink_mask(study):
    save_region(study, "sub-01_label-V1_mask.nii.gz", np.ones((3, 4, 4), np.uint8))


def remove_picture(study):
    (study.root / "stimuli/animals/dog.png").unlink()


def double_picture(study):
    (study.root / "stimuli/plants").mkdir()
    path = study.root / "stimuli/animals/dog.png"
    (study.root / "stimuli/plants/dog.png").write_bytes(path.read_bytes())
    events = study.folder(10, "raw") / "sub-01_ses-10_run-2_events.tsv"
    events.write_text(events.read_text().replace("animals/dog.png", "dog"))


def remove_events(study):
    for path in study.folder(10, "raw").iterdir():
        path.unlink()


def double_betas(study):
    path = study.folder(10) / "sub-01_ses-10_desc-betas_statmap.nii.gz"
    other = path.with_name("sub-01_ses-10_space-MNI_desc-betas_statmap.nii.gz")
    other.write_bytes(path.read_bytes())


def copy_picture(study):
    """The same pixels under two names, which random splits may put on two sides."""
    source = study.root / "stimuli/animals"
    for name in NAMES[1:]:
        (source / name).write_bytes((source / NAMES[0]).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (cut_betas, {}, r"ses-10_desc-betas_statmap.nii.gz is damaged or cut off"),
        (add_row, {}, r"has 9 volumes, .*run-2_events.tsv.* has 10 rows with a stimulus"),
        (move_mask, {}, r"affine of .*label-V1_mask.nii.gz differs .* by up to 0.01"),
        (shrink_mask, {}, r"V1_mask.nii.gz has the shape \(3, 4, 4\), .* has \(3, 4, 5\)"),
        (remove_picture, {}, "has no picture 'animals/dog.png', which was shown"),
        (double_picture, {}, r"animals/dog.png' and 'plants/dog.png', .* name 'dog'"),
        (remove_events, {}, "no table of the trials of .*ses-10.*option events"),
        (double_betas, {}, "are of the same session and run: narrow the pattern"),
        (copy_picture, {}, "(same|identical|pictur)"),
        (None, {"rois": "V9"}, "has no region V9"),
        (None, {"sessions": "3"}, "no betas of session 3 of sub-01: choose from 2, 10"),
        (None, {"betas": "**/*nothing*.nii"}, "has no betas of sub-01 by .*nothing"),
        (None, {"mask": "no_mask.nii.gz"}, "no file no_mask.nii.gz"),
        (None, {"stimulus": "picture"}, "has no column picture: it has onset"),
        (None, {"test": "most"}, "test is 'most': choose one of auto, repeated, random"),
        (None, {"scale": 0.0}, "scale is 0.0"),
        (None, {"images": "nowhere"}, "nowhere .* is missing"),
    ],
)
def test_refusals(study, tmp_path, spoil, options, message):
    save_volumes(study, study.draw(*GRID))
    if spoil is not None:
        spoil(study)
    with pytest.raises(PerceptError, match=message) as caught:
        bids.read(study.root, tmp_path / "out", 1, **QUICK | options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "subj01").exists()


def test_other_kinds_of_glmsingle_are_refused(study, tmp_path):
    save_glmsingle(study, study.draw(*GRID), "npy")
    folder = study.folder(2)
    np.save(folder / "TYPEA_ONOFF.npy", {"betasmd": np.zeros((*GRID, 1))})
    with pytest.raises(PerceptError, match="TYPEA_ONOFF.npy has no betas of single trials: take"):
        study.read(tmp_path, betas="**/ses-2/TYPEA*.npy")
    np.save(folder / "TYPED_FITHRF_GLMDENOISE_RR.npy", {"betasmd": np.array([print])})
    with pytest.raises(PerceptError, match="cannot be read safely .*asks for builtins.print"):
        study.read(tmp_path)


def test_memory_is_that_of_a_block_however_long_a_session_is(study, tmp_path, monkeypatch):
    """A compressed session of 30 MB is read with a few of its volumes in memory."""
    monkeypatch.setattr("src.readers.trial_files.BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr("src.data.files.BLOCK_BYTES", 1 << 20)
    grid = (40, 40, 40)
    volume = np.asfortranarray(np.random.default_rng(0).standard_normal(grid, np.float32))
    header = nibabel.Nifti1Image(np.zeros((*grid, 9), np.float32), AFFINE).to_bytes()[:352]
    for session in (2, 10):
        path = study.folder(session) / f"sub-01_ses-{session}_desc-betas_statmap.nii.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(header)
            for trial in range(9):
                file.write((volume + trial).tobytes("F"))
    mask = np.zeros(grid, np.uint8)
    mask[::4] = 1
    save_region(study, "sub-01_desc-cortex_mask.nii.gz", mask)
    tracemalloc.start()
    subject = study.read(tmp_path, mask="**/*cortex_mask.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6, peak  # a session has 2.3 MB a volume less than 9 of .26 MB
    np.testing.assert_allclose(subject.betas[3], volume[mask > 0] + 3, rtol=1e-6)


def test_write_refusals(world, tmp_path):
    data = SourceData.from_world(world)
    with pytest.raises(PerceptError, match="file_format is 'mgh'"):
        bids_format.write(tmp_path, 1, data, file_format="mgh")
    no_runs = dataclasses.replace(data, trials=data.trials.drop(columns="run"))
    with pytest.raises(PerceptError, match="lacks the columns"):
        bids_format.write(tmp_path, 1, no_runs)

"""src.readers.bold5000: volumes and matrices written with plain nibabel and numpy from the
published names, the mini world, and every error.
"""

import functools
import gzip

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.miniworld.formats import SourceData
from src.miniworld.formats import bold5000 as bold5000_format
from src.readers import bold5000
from src.utils import PerceptError

GRID = (4, 3, 5)
BETAS = "GLMbetas-TYPED-FITHRF-GLMDENOISE-RR"
NAMES = [
    "COCO_train2014_000000191734.jpg",
    "n02948072_4353.JPEG",
    "coralreef3.jpg",
    "COCO_train2014_000000042861.jpg",
    "airport1.jpg",
    "n01531178_2651.JPEG",
]
FOLDERS = {"C": "COCO", "n": "ImageNet"}


def nifti(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), path)


def pictures(root):
    for number, name in enumerate(NAMES):
        path = (
            root
            / "BOLD5000_Stimuli"
            / "Scene_Stimuli"
            / "Presented_Stimuli"
            / FOLDERS.get(name[0], "Scene")
            / name
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 10), (40 * number, 20, 30)).save(
            path, "JPEG" if name.endswith("JPEG") else None
        )


def shown(root, subj, rows, prefix=""):
    (root / f"CSI{subj}_imgnames.txt").write_text(
        "".join(f"{prefix if r < 2 else ''}{NAMES[r]}\n" for r in rows)
    )


SHOWN = [0, 1, 2, 0, 3, 4, 1, 5, 0]  # images 0 and 1 are repeated


def volumes(root, subj=2):
    """Two sessions of 5 and 4 trials; regions LOC (left, misnamed) and RSC (right, misnamed)."""
    rng = np.random.default_rng(subj)
    betas = rng.standard_normal((*GRID, len(SHOWN))).astype(np.float32)
    nifti(root / f"CSI{subj}_{BETAS}_ses-01.nii.gz", betas[..., :5])
    nifti(root / "deeper" / f"CSI{subj}_{BETAS}_ses-02.nii.gz", betas[..., 5:])
    loc, rsc = np.zeros(GRID, np.uint8), np.zeros(GRID, np.uint8)
    loc[0, 1, 2] = loc[3, 0, 1] = rsc[1, 1, 1] = rsc[0, 1, 2] = 1
    nifti(root / f"sub-CSI{subj}" / f"sub-CSI{subj}_mask-LHLO.nii.gz", loc)
    nifti(root / f"sub-CSI{subj}" / f"sub-CSI{subj}_mask-RHRRSC.nii.gz", rsc)
    nifti(root / f"CSI{subj}_brainmask.nii.gz", np.ones(GRID, np.uint8))
    shown(root, subj, SHOWN)
    pictures(root)
    return betas, loc, rsc


def matrices(root, subj=1):
    rng = np.random.default_rng(subj)
    arrays = {
        f"{side}{region}": rng.standard_normal((len(SHOWN), 3)).astype(np.float32)
        for region in ("EarlyVis", "LOC", "PPA")
        for side in ("LH", "RH")
    }
    folder = root / "BOLD5000_GLMsingle_ROI_betas" / "py"
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"CSI{subj}_{BETAS}_allses_{name}.npy", array)
    shown(root, subj, SHOWN, prefix="rep_")
    pictures(root)
    return arrays, folder


read = functools.partial(bold5000.read, val_images=1)


# -------------------------------------------------------------------------------- the mini world
@pytest.fixture(scope="module")
def worlds():
    return {subj: simulate(subj, 40, 10, 12, trials_per_session=70) for subj in (1, 2)}


def test_mini_world_comes_back(tmp_path, worlds):
    for subj, world in worlds.items():
        bold5000_format.write(tmp_path / "source", subj, SourceData.from_world(world))
    for subj in worlds:
        bold5000.read(
            tmp_path / "source", tmp_path / "out", subj, attributes={"source": "the mini world"}
        )
    for subj, world in worlds.items():
        subject = open_subject(tmp_path / "out", subj)
        np.testing.assert_array_equal(subject.betas, world.scan.betas)
        columns = ["trial", "image", "session", "repeat", "split"]
        pd.testing.assert_frame_equal(
            subject.trials[columns], world.scan.trials[columns], check_dtype=False
        )
        assert subject.trials["run"].eq(-1).all()  # 70 trials are no runs of 37
        np.testing.assert_array_equal(subject.images(world.image_ids), world.images)
        regions = world.scan.voxels.select_dtypes("bool").rename(
            columns={"LO": "LOC"}
        )  # the format's name of it
        pd.testing.assert_frame_equal(subject.voxels[regions.columns], regions)
        assert (
            subject.attributes["source"] == "the mini world"
            and subject.protocol == "bold5000-repeated12"
        )
        assert (
            set(subject.labels.columns) == set(world.labels.columns)
            and len(subject.captions)
            == len(set(np.concatenate([w.image_ids for w in worlds.values()]))) * 5
        )


def test_writing_again_with_fewer_sessions_leaves_none_of_the_old(tmp_path, worlds):
    world = worlds[1]
    for trials in (world.scan.trials, world.scan.trials[:100]):
        bold5000_format.write(
            tmp_path,
            1,
            SourceData(world.scan.betas[: len(trials)], trials, world.images, world.image_ids),
        )
        bold5000.read(tmp_path, tmp_path / "out", 1, val_images=0)
        assert len(open_subject(tmp_path / "out", 1).trials) == len(trials)


def test_written_sessions_must_be_those_of_the_files(tmp_path, worlds):
    world = worlds[1]
    with pytest.raises(PerceptError, match="count from 0 without gaps"):
        bold5000_format.write(
            tmp_path,
            1,
            SourceData(
                world.scan.betas,
                world.scan.trials.assign(session=world.scan.trials["session"] + 1),
                world.images,
                world.image_ids,
            ),
        )
    with pytest.raises(PerceptError, match="do not fit"):
        bold5000_format.write(
            tmp_path,
            1,
            SourceData(world.scan.betas[1:], world.scan.trials, world.images, world.image_ids),
        )


# ---------------------------------------------------------------------------- the published layout
def test_volumes(tmp_path):
    betas, loc, rsc = volumes(tmp_path / "source")
    read(tmp_path / "source", tmp_path / "out", 2)
    subject = open_subject(tmp_path / "out", 2)
    trials = subject.trials
    at = [(1, 1, 1), (0, 1, 2), (3, 0, 1)]
    at = sorted(at, key=lambda p: p[0] + GRID[0] * (p[1] + GRID[1] * p[2]))  # x fastest
    np.testing.assert_array_equal(subject.betas, np.stack([betas[p] for p in at], axis=1))
    assert subject.voxels["LOC"].tolist() == [bool(loc[p]) for p in at] and subject.voxels[
        "RSC"
    ].tolist() == [bool(rsc[p]) for p in at]
    np.testing.assert_array_equal(subject.voxels[["x", "y", "z"]], 2.0 * np.array(at))
    order = sorted(range(6), key=lambda i: NAMES[i].rsplit(".", 1)[0])
    assert trials["image"].tolist() == [order.index(i) for i in SHOWN]
    assert trials["session"].tolist() == [0] * 5 + [1] * 4 and trials["repeat"].tolist() == [
        0,
        0,
        0,
        1,
        0,
        0,
        1,
        0,
        2,
    ]
    assert [s == "test" for s in trials["split"]] == [i in (0, 1) for i in SHOWN] and (
        trials["split"] == "val"
    ).sum() == 1
    assert (
        subject.protocol == "bold5000-repeated2"
        and subject.attributes["units"] == "percent signal change"
    )
    labels = subject.labels.set_index("name")
    assert (
        labels.loc["coralreef3", "source"] == "Scene"
        and labels.loc["n02948072_4353", "source"] == "ImageNet"
    )
    colours = subject.images(np.array([order.index(i) for i in range(6)]))[:, 5, 5, 0].astype(int)
    assert np.abs(colours - 40 * np.arange(6)).max() <= 4  # JPEG


def test_rois_and_the_brain(tmp_path):
    betas, loc, _ = volumes(tmp_path / "source")
    read(tmp_path / "source", tmp_path / "out", 2, rois="LOC")
    np.testing.assert_array_equal(
        open_subject(tmp_path / "out", 2).betas, betas.transpose(3, 2, 1, 0)[:, loc.T != 0]
    )
    read(tmp_path / "source", tmp_path / "out", 2, rois="brain")
    subject = open_subject(tmp_path / "out", 2)
    np.testing.assert_array_equal(
        subject.betas, betas.transpose(3, 2, 1, 0).reshape(len(SHOWN), -1)
    )
    assert subject.voxels["LOC"].sum() == 2
    with pytest.raises(PerceptError, match="no region FFA"):
        read(tmp_path / "source", tmp_path / "out", 2, rois="LOC,FFA")


def test_runs_scaled_integers_and_voxels_without_values(tmp_path):
    rng = np.random.default_rng(0)
    stored = rng.integers(-3000, 3000, (*GRID, 74), dtype=np.int16)
    image = nibabel.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(0.5, 2)
    nibabel.save(image, tmp_path / f"CSI3_{BETAS}_ses-01.nii.gz")
    floats = rng.standard_normal((*GRID, 37)).astype(np.float32)
    floats[2, 2, 2] = np.nan
    nifti(tmp_path / f"CSI3_{BETAS}_ses-02.nii", floats)
    nifti(tmp_path / "CSI3_brainmask.nii.gz", np.ones(GRID, np.uint8))
    pictures(tmp_path)
    shown(tmp_path, 3, (list(range(6)) * 19)[:111])
    (tmp_path / "splits.csv").write_text(
        "image,split\n0,test\n1,train\n2,train\n3,val\n4,train\n5,exclude\n"
    )
    with pytest.warns(UserWarning, match="1 voxels of CSI3 have no value"):
        read(tmp_path, tmp_path / "out", 3)
    subject = open_subject(tmp_path / "out", 3)
    stored_as = np.delete(
        stored.reshape(-1, 74, order="F").T * 0.5 + 2,
        np.ravel_multi_index((2, 2, 2), GRID, order="F"),
        axis=1,
    )
    np.testing.assert_array_equal(subject.betas[:74], stored_as)
    assert subject.trials["run"].tolist() == [0] * 37 + [1] * 37 + [0] * 37


def test_matrices(tmp_path):
    arrays, _ = matrices(tmp_path / "source")
    with pytest.warns(UserWarning, match="do not tell sessions"):
        read(tmp_path / "source", tmp_path / "out", 1)
    subject = open_subject(tmp_path / "out", 1)
    np.testing.assert_array_equal(
        subject.betas,
        np.concatenate(
            [arrays[k] for k in ("LHEarlyVis", "RHEarlyVis", "LHLOC", "RHLOC", "LHPPA", "RHPPA")],
            axis=1,
        ),
    )
    assert subject.voxels["LOC"].tolist() == [False] * 6 + [True] * 6 + [False] * 6
    assert (
        subject.trials["session"].eq(0).all() and subject.trials["split"].eq("test").sum() == 5
    )  # rep_ names are the same images
    read(tmp_path / "source", tmp_path / "out", 1, rois="PPA", sessions="5,4")
    subject = open_subject(tmp_path / "out", 1)
    assert subject.betas.shape == (9, 6) and subject.trials["session"].tolist() == [0] * 5 + [1] * 4


def test_ids_and_the_test_set_agree_between_subjects(tmp_path):
    """Subject 4 saw image 1 only once; the others saw it again, so it is a test image for
    subject 4 as well.
    """
    volumes(tmp_path)
    volumes(tmp_path, subj=4)
    shown(tmp_path, 4, [5, 1, 2, 0, 3, 4, 2, 2, 0])
    for subj in (2, 4):
        read(tmp_path, tmp_path / "out", subj)
    splits = [
        open_subject(tmp_path / "out", subj).trials.set_index("image")["split"] for subj in (2, 4)
    ]
    for table in splits:
        assert sorted(table.index[table == "test"].unique()) == sorted(
            splits[0].index[splits[0] == "test"].unique()
        )


# -------------------------------------------------------------------------------- errors
def cut(path, keep=0.9):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def transposed_mask(root):
    nifti(root / "sub-CSI2" / "sub-CSI2_mask-LHLO.nii.gz", np.ones(GRID[::-1], np.uint8))


def without_picture(root):
    next(root.rglob("coralreef3.jpg")).unlink()


def hide_first_session(root):
    (root / f"CSI2_{BETAS}_ses-01.nii.gz").unlink()


def hide_last_session(root):
    (root / "deeper" / f"CSI2_{BETAS}_ses-02.nii.gz").unlink()


def three_dimensions(root):
    nifti(root / f"CSI2_{BETAS}_ses-01.nii.gz", np.ones(GRID, np.float32))


def no_masks(root):
    (root / "CSI2_brainmask.nii.gz").unlink()
    for path in (root / "sub-CSI2").iterdir():
        path.unlink()


def empty_masks(root):
    for path in (root / "sub-CSI2").iterdir():
        nifti(path, np.zeros(GRID, np.uint8))


def twin(root):
    folder = root / "BOLD5000_Stimuli" / "Scene_Stimuli" / "Presented_Stimuli"
    (folder / "COCO" / "coralreef3.png").write_bytes(
        (folder / "Scene" / "coralreef3.jpg").read_bytes()
    )


def both_sides(root):
    (root / "splits.csv").write_text("image,split\n0,train\n0,test\n")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (hide_first_session, "Session 1 of CSI2 .* is missing"),
        (hide_last_session, "5 trials of CSI2.* names 9.*session is missing"),
        (
            lambda root: cut(root / f"CSI2_{BETAS}_ses-01.nii.gz"),
            "ses-01.nii.gz is damaged or cut off",
        ),
        (
            lambda root: (root / f"CSI2_{BETAS}_ses-01.nii.gz").write_bytes(b"no"),
            "ses-01.nii.gz is damaged .*not a gzip file",
        ),
        (lambda root: (root / "CSI2_imgnames.txt").unlink(), "CSI2_imgnames.txt .* is missing"),
        (without_picture, "names coralreef3.jpg in line 3"),
        (transposed_mask, "axes in this order"),
        (three_dimensions, r"must be \(x, y, z, trials\)"),
        (no_masks, "neither masks of regions"),
        (empty_masks, "hold no voxel"),
        (twin, "same name"),
        (both_sides, "one row an image"),
        (
            lambda root: next(root.rglob("airport1.jpg")).write_bytes(b"no"),
            "airport1.jpg cannot be decoded",
        ),
    ],
)
def test_errors_of_volumes(tmp_path, spoil, words):
    volumes(tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(PerceptError, match=words):
        read(tmp_path / "source", tmp_path / "out", 2)
    assert not (tmp_path / "out" / "subj02").exists()


def test_a_session_file_cut_off_late_leaves_no_subject(tmp_path):
    volumes(tmp_path)
    path = tmp_path / f"CSI2_{BETAS}_ses-01.nii.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-40]))  # a whole gzip stream, one trial too short
    with pytest.raises(PerceptError, match="cut off at trial 4 of 5"):
        read(tmp_path, tmp_path / "out", 2)
    assert not list((tmp_path / "out").glob("*subj02*"))


def test_errors_of_matrices(tmp_path):
    arrays, folder = matrices(tmp_path)
    path = folder / f"CSI1_{BETAS}_allses_RHLOC.npy"
    with pytest.raises(PerceptError, match="add up to 9"):
        read(tmp_path, tmp_path / "out", 1, sessions="5,5")
    with pytest.raises(PerceptError, match="needs the volumes"):
        read(tmp_path, tmp_path / "out", 1, rois="brain")
    with pytest.raises(PerceptError, match="no region RSC"):
        read(tmp_path, tmp_path / "out", 1, rois="RSC")
    np.save(path, arrays["RHLOC"].T)
    with pytest.raises(PerceptError, match=r"RHLOC.npy has shape \(3, 9\).*axes in this order"):
        read(tmp_path, tmp_path / "out", 1)
    np.save(path, arrays["RHLOC"])
    cut(path)
    with pytest.raises(PerceptError, match="RHLOC.npy is damaged or cut off"):
        read(tmp_path, tmp_path / "out", 1)
    np.save(path, arrays["RHLOC"][0])
    with pytest.raises(PerceptError, match=r"must be \(trials, voxels\)"):
        read(tmp_path, tmp_path / "out", 1)


def test_errors_of_the_source(tmp_path):
    with pytest.raises(PerceptError, match="nowhere"):
        read(tmp_path / "nowhere", tmp_path / "out", 1)
    with pytest.raises(PerceptError, match="subjects 1 to 4"):
        read(tmp_path, tmp_path / "out", 5)
    with pytest.raises(PerceptError, match="no images below"):
        read(tmp_path, tmp_path / "out", 1)
    pictures(tmp_path)
    with pytest.raises(PerceptError, match="no betas of CSI1"):
        read(tmp_path, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_a_session_damaged_within_is_found_by_its_sum(tmp_path):
    volumes(tmp_path / "source")
    path = sorted((tmp_path / "source").rglob("CSI2_*_ses-*.nii.gz"))[0]
    content = bytearray(path.read_bytes())
    content[-8] ^= 255  # of the CRC
    path.write_bytes(content)
    with pytest.raises(PerceptError, match="damaged or cut off.*CRC"):
        read(tmp_path / "source", tmp_path / "out", 2)


def test_a_list_that_is_no_text(tmp_path):
    volumes(tmp_path / "source")
    next((tmp_path / "source").rglob("CSI2_imgnames.txt")).write_bytes(b"\xff\xfe\x80")
    with pytest.raises(PerceptError, match="CSI2_imgnames.txt is no text"):
        read(tmp_path / "source", tmp_path / "out", 2)

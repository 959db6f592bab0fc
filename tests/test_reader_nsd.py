"""src.readers.nsd: the mini world through `write` and back, a tree made with plain libraries, and
what is refused.
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
import scipy.io

from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.miniworld.formats import SourceData
from src.miniworld.formats import nsd as nsd_format
from src.readers import nsd
from src.readers.nsd_voxels import LABEL_NAMES
from src.utils import PerceptError

GRID, V = (4, 5, 6), "betas_fithrf_GLMdenoise_RR"
MINI = {"protocol": "mini", "image_size": 0}


def quantised(betas):
    return np.rint(betas * 300).astype(np.int16).astype(np.float32) / np.float32(300)


# -------------------------------------------------------------------------------- the mini world
@pytest.fixture(scope="module")
def worlds():
    return {s: simulate(s, 40, 10, 12, trials_per_session=60) for s in (1, 2)}


@pytest.mark.parametrize("file_format", ["hdf5", "nii.gz"])
def test_the_mini_world_comes_back(worlds, tmp_path, file_format):
    for s, world in worlds.items():
        nsd_format.write(
            tmp_path / "nsd",
            s,
            dataclasses.replace(SourceData.from_world(world), betas=quantised(world.scan.betas)),
            file_format=file_format,
        )
    for s, world in worlds.items():
        nsd.read(tmp_path / "nsd", tmp_path / "out", s, **MINI)
        subject, trials = open_subject(tmp_path / "out", s), world.scan.trials
        np.testing.assert_array_equal(subject.betas, quantised(world.scan.betas))
        pd.testing.assert_frame_equal(
            subject.trials, trials[subject.trials.columns], check_dtype=False
        )
        np.testing.assert_array_equal(subject.images(world.image_ids), world.images)
        areas = world.scan.voxels.select_dtypes("bool").columns
        np.testing.assert_array_equal(subject.voxels[areas], world.scan.voxels[areas])
        np.testing.assert_allclose(
            subject.voxels["noise_ceiling"], world.scan.voxels["noise_ceiling"], rtol=1e-4
        )
        assert set(subject.captions["image"]) >= set(world.image_ids) and subject.labels is not None
        assert subject.protocol == "mini" and subject.attributes["units"] == "percent signal change"
        affine = np.array(json.loads(subject.attributes["affine"]))
        np.testing.assert_allclose(
            subject.voxels[["i", "j", "k"]] @ affine[:3, :3].T + affine[:3, 3],
            subject.voxels[["x", "y", "z"]],
        )
        assert (subject.voxels["flat_sessions"] == 0).all()


def test_the_design_alone_says_the_same(worlds, tmp_path):
    world = worlds[2]
    for s in (1, 2):
        w = worlds[s]
        nsd_format.write(
            tmp_path / "nsd",
            s,
            SourceData(quantised(w.scan.betas), w.scan.trials, w.images, w.image_ids),
        )
    (tmp_path / "nsd/nsddata/ppdata/subj02/behav/responses.tsv").unlink()
    nsd.read(tmp_path / "nsd", tmp_path / "out", 2, **MINI)
    trials = open_subject(tmp_path / "out", 2).trials
    columns = ["trial", "image", "session", "repeat", "split"]
    pd.testing.assert_frame_equal(trials[columns], world.scan.trials[columns], check_dtype=False)
    assert (trials["run"] == -1).all()


# ----------------------------------------------------------------- NSD's layout by plain libraries
def tree(root, subj=1, sessions=2, trials=10, fmt="hdf5", grid=GRID, dtype=np.int16, seed=0):
    """A tree as the fact sheet has it; returns betas (trials, x, y, z) as stored, nsdgeneral,
    image73k (from 0) of each trial.
    """
    rng = np.random.default_rng(seed)
    n = sessions * trials
    stored = rng.integers(-3000, 3000, (n, *grid)).astype(dtype)
    general = rng.integers(-1, 2, grid).astype(np.int16)
    visual = rng.integers(-1, 8, grid).astype(np.int16)
    ids = rng.permutation(40)[:12]  # 12 images, of which the first 4 are shared
    order = rng.integers(1, 13, (1, n))
    order[0, :12] = np.arange(1, 13)
    subject = root / f"nsddata/ppdata/subj{subj:02d}"
    betas = root / f"nsddata_betas/ppdata/subj{subj:02d}/func1pt8mm/{V}"
    affine = np.diag([1.8, 1.8, 1.8, 1])
    for folder in (
        subject / "func1pt8mm/roi",
        subject / "behav",
        betas,
        root / "nsddata/experiments/nsd",
        root / "nsddata_stimuli/stimuli/nsd",
        root / f"nsddata/freesurfer/subj{subj:02d}/label",
    ):
        folder.mkdir(parents=True, exist_ok=True)
    for name, volume in (
        ("nsdgeneral", general),
        ("prf-visualrois", visual),
        ("floc-faces", (visual > 5).astype(np.int16) * 2),
        ("lh.floc-faces", visual),
    ):
        nibabel.save(nibabel.Nifti1Image(volume, affine), subject / f"func1pt8mm/roi/{name}.nii.gz")
    (root / f"nsddata/freesurfer/subj{subj:02d}/label/floc-faces.mgz.ctab").write_text(
        "0 Unknown\n1 OFA\n2 FFA-1\n3 FFA-2\n"
    )
    for s in range(sessions):
        part = stored[s * trials : (s + 1) * trials]
        if fmt == "hdf5":
            with h5py.File(betas / f"betas_session{s + 1:02d}.hdf5", "w") as file:
                file.create_dataset(
                    "betas", data=part.transpose(0, 3, 2, 1), chunks=(trials, 1, 1, 1)
                )
        else:
            nibabel.save(
                nibabel.Nifti1Image(np.moveaxis(part, 0, -1), affine),
                betas / f"betas_session{s + 1:02d}.nii.gz",
            )
    ncsnr = np.full(grid, 0.5, np.float32)
    nibabel.save(nibabel.Nifti1Image(ncsnr, affine), betas / "ncsnr.nii.gz")
    subjectim = np.tile(ids + 1, (8, 1))
    scipy.io.savemat(
        root / "nsddata/experiments/nsd/nsd_expdesign.mat",
        {"masterordering": order, "subjectim": subjectim, "sharedix": ids[None, :4] + 1},
    )
    seen = ids[order[0] - 1]
    table = pd.DataFrame(
        {
            "SUBJECT": subj,
            "SESSION": np.arange(n) // trials + 1,
            "RUN": np.arange(n) % trials // 5 + 1,
            "73KID": seen + 1,
        }
    )
    table["10KID"] = np.where(np.isin(seen, ids[:4]), 1, 1001)
    table.to_csv(subject / "behav/responses.tsv", sep="\t", index=False)
    with h5py.File(root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5", "w") as file:
        file["imgBrick"] = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    return stored, general, seen


OWN = {"protocol": "mine", "val_images": 1, "image_size": 0}


@pytest.mark.parametrize("fmt", ["hdf5", "nii.gz"])
@pytest.mark.parametrize("without", ["", "responses.tsv", "nsd_expdesign.mat"])
def test_the_published_layout(tmp_path, fmt, without):
    stored, general, seen = tree(tmp_path, fmt=fmt)
    for path in tmp_path.rglob(without) if without else ():
        path.unlink()
    nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    subject = open_subject(tmp_path / "out", 1)
    np.testing.assert_array_equal(
        subject.betas, stored[:, general > 0].astype(np.float32) / np.float32(300)
    )
    assert (
        subject.trials["image"].tolist() == seen.tolist()
        and subject.trials["session"].tolist() == [0] * 10 + [1] * 10
    )
    assert subject.trials["run"].tolist() == (
        [-1] * 20 if without == "responses.tsv" else [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5
    )
    test = subject.image_ids("test")
    assert (
        len(test) == 4
        and not set(test) & set(subject.image_ids("train"))
        and len(subject.image_ids("val")) == 1
    )
    with h5py.File(tmp_path / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        np.testing.assert_array_equal(
            subject.images(np.unique(seen)), file["imgBrick"][:][np.unique(seen)]
        )
    voxels = subject.voxels
    np.testing.assert_array_equal(voxels[["i", "j", "k"]], np.argwhere(general > 0))
    np.testing.assert_allclose(voxels[["x", "y", "z"]], 1.8 * np.argwhere(general > 0))
    visual = nibabel.load(
        tmp_path / "nsddata/ppdata/subj01/func1pt8mm/roi/prf-visualrois.nii.gz"
    ).get_fdata()[general > 0]
    np.testing.assert_array_equal(voxels["V2d"], visual == 4)  # documented, without a ctab
    np.testing.assert_array_equal(voxels["FFA-1"], visual > 5)
    assert "OFA" not in voxels and voxels["nsdgeneral"].all()
    np.testing.assert_allclose(voxels["noise_ceiling"], 0.2)


def test_regions_masks_sessions_and_float_betas(tmp_path):
    stored, general, _ = tree(tmp_path, dtype=np.float32)
    nsd.read(
        tmp_path, tmp_path / "out", 1, roi="prf-visualrois", rois="V1v, FFA-1", sessions="2", **OWN
    )
    visual = nibabel.load(
        tmp_path / "nsddata/ppdata/subj01/func1pt8mm/roi/prf-visualrois.nii.gz"
    ).get_fdata()
    subject = open_subject(tmp_path / "out", 1)
    np.testing.assert_array_equal(subject.betas, stored[10:, np.isin(visual, (1, 6, 7))])
    assert subject.protocol == "mine+sessions-2" and subject.trials["trial"].tolist() == list(
        range(10, 20)
    )
    mask = np.zeros(GRID, np.uint8)
    mask[1:3, 2, 3:5] = 1
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / "mine.nii.gz")
    nsd.read(tmp_path, tmp_path / "own", 1, roi=str(tmp_path / "mine.nii.gz"), **OWN)
    np.testing.assert_array_equal(open_subject(tmp_path / "own", 1).betas, stored[:, mask > 0])


def test_other_axis_orders_of_hdf5(tmp_path):
    stored, general, _ = tree(tmp_path)
    for n, axes in enumerate([(0, 1, 2, 3), (1, 2, 3, 0)]):
        with h5py.File(
            tmp_path / f"nsddata_betas/ppdata/subj01/func1pt8mm/{V}/betas_session0{n + 1}.hdf5", "w"
        ) as file:
            file["betas"] = stored[n * 10 : (n + 1) * 10].transpose(axes)
    nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    np.testing.assert_array_equal(
        open_subject(tmp_path / "out", 1).betas,
        stored[:, general > 0].astype(np.float32) / np.float32(300),
    )


def test_the_anatomical_roi_selects_voxels(tmp_path):
    stored, _, _ = tree(tmp_path)
    labels = np.random.default_rng(3).integers(-1, 3, GRID).astype(np.int16)
    transform = np.stack(
        np.meshgrid(*(np.arange(1, n + 1) for n in GRID), indexing="ij"), -1
    ).astype(np.float32)
    for name, array in (
        ("anat/roi/prf-visualrois", labels),
        ("transforms/anat0pt8-to-func1pt8", transform),
    ):
        path = tmp_path / f"nsddata/ppdata/subj01/{name}.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    nsd.read(tmp_path, tmp_path / "out", 1, roi="anat:prf-visualrois", **OWN)
    np.testing.assert_array_equal(
        open_subject(tmp_path / "out", 1).betas,
        stored[:, labels > 0].astype(np.float32) / np.float32(300),
    )


def test_flat_voxels_are_counted_and_zero(tmp_path):
    stored, general, _ = tree(tmp_path)
    places = np.argwhere(general > 0)
    for n in (0, 1):
        with h5py.File(
            tmp_path / f"nsddata_betas/ppdata/subj01/func1pt8mm/{V}/betas_session0{n + 1}.hdf5",
            "r+",
        ) as file:
            for place in places[: 2 - n]:
                file["betas"][(slice(None), *place[::-1])] = 77
    with pytest.warns(UserWarning, match="1 of .* do not vary in any session"):
        nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    subject = open_subject(tmp_path / "out", 1)
    assert subject.voxels["flat_sessions"].tolist()[:3] == [2, 1, 0]
    assert (
        (subject.betas[:, 0] == 0).all()
        and (subject.betas[:10, 1] == 0).all()
        and (subject.betas[10:, 1] != 0).any()
    )


def test_runs_of_63_and_62_trials_when_only_the_design_is_there(tmp_path):
    tree(tmp_path, sessions=1, trials=750, grid=(2, 3, 4))
    (tmp_path / "nsddata/ppdata/subj01/behav/responses.tsv").unlink()
    nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    assert (
        open_subject(tmp_path / "out", 1).trials["run"].value_counts(sort=False).tolist()
        == [63, 62] * 6
    )


def test_memory_does_not_grow_with_the_sessions(tmp_path):
    tree(tmp_path, sessions=8, trials=750, grid=(10, 11, 12))
    edit_responses(
        tmp_path,
        lambda t: t.__setitem__("RUN", np.tile(np.repeat(np.arange(12), [63, 62] * 6) + 1, 8)),
    )
    peaks = {}
    for sessions in ("1", "1-2", "1-8"):
        tracemalloc.start()
        nsd.read(tmp_path, tmp_path / "out", 1, sessions=sessions, **OWN)
        peaks[sessions] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    session = 2 * 750 * len(open_subject(tmp_path / "out", 1).voxels)
    assert peaks["1-8"] < peaks["1-2"] + 2 * session, (
        peaks,
        session,
    )  # six more sessions would be six


def test_captions_of_coco(tmp_path):
    _, _, seen = tree(tmp_path)
    info = pd.DataFrame(
        {
            "nsdId": np.arange(40),
            "cocoId": np.arange(40) + 500,
            "cocoSplit": ["train2017", "val2017"] * 20,
        }
    )
    info.to_csv(tmp_path / "nsddata/experiments/nsd/nsd_stim_info_merged.csv")
    (tmp_path / "annotations").mkdir()
    for n, split in enumerate(("train", "val")):
        notes = [
            {"image_id": 500 + i, "id": 10 * i + k, "caption": f"{i} {k}\n"}
            for i in range(n, 40, 2)
            for k in reversed(range(6))
        ]
        (tmp_path / f"annotations/captions_{split}2017.json").write_text(
            json.dumps({"annotations": notes})
        )
    nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    captions = open_subject(tmp_path / "out", 1).captions
    image = int(seen[0])
    assert captions[captions["image"] == image]["caption"].tolist() == [
        f"{image} {k}" for k in range(5)
    ]
    assert set(captions["image"]) == set(seen.tolist())


# -------------------------------------------------------------------------------- refused
def edit_responses(root, change):
    path = root / "nsddata/ppdata/subj01/behav/responses.tsv"
    table = pd.read_csv(path, sep="\t")
    change(table)
    table.to_csv(path, sep="\t", index=False)


def beta_file(root, session=1, fmt="hdf5"):
    return root / f"nsddata_betas/ppdata/subj01/func1pt8mm/{V}/betas_session{session:02d}.{fmt}"


def cut(path, keep):
    path.write_bytes(
        path.read_bytes()[:keep] if keep > 0 else path.read_bytes()[: len(path.read_bytes()) + keep]
    )


def turned(root):
    with h5py.File(beta_file(root), "r+") as file:
        array = file["betas"][:].transpose(0, 2, 3, 1)
        del file["betas"]
        file["betas"] = array


def leak(root):
    pd.DataFrame({"image": np.arange(40), "split": "train"}).to_csv(
        root / "splits.csv", index=False
    )


REFUSED = [
    (lambda r: beta_file(r, 2).unlink(), {}, "betas_session02.hdf5.*missing"),
    (lambda r: cut(beta_file(r), 900), {}, "session01.hdf5 is damaged"),
    (lambda r: None, {"protocol": "nsd-1000"}, "betas_session03.hdf5.*missing"),
    (lambda r: None, {"protocol": "nsd-983"}, "protocol"),
    (lambda r: None, {"image_size": -1}, "image_size is -1"),
    (lambda r: None, {"sessions": "1-3"}, "sessions 1 to 2"),
    (lambda r: None, {"sessions": "a"}, "1-10"),
    (lambda r: None, {"rois": "V9"}, "no region V9"),
    (lambda r: None, {"roi": "nothing"}, "nothing.nii.gz: choose one of floc-faces"),
    (lambda r: None, {"space": "MNI"}, "space"),
    (turned, {}, "does not fit"),
    (lambda r: edit_responses(r, lambda t: t.__setitem__("SUBJECT", 2)), {}, "is of subject 2"),
    (
        lambda r: edit_responses(r, lambda t: t.loc.__setitem__((13, "73KID"), 99)),
        {},
        "Trial 13 .*session 2.*73KID 99",
    ),
    (
        lambda r: edit_responses(r, lambda t: t.drop(index=19, inplace=True)),
        {},
        "10 trials, responses.tsv has 9",
    ),
    (
        lambda r: [p.unlink() for n in ("responses.tsv", "nsd_expdesign.mat") for p in r.rglob(n)],
        {},
        "Neither",
    ),
    (
        lambda r: (r / "nsddata/experiments/nsd/nsd_expdesign.mat").write_bytes(b"x"),
        {},
        "nsd_expdesign.mat is damaged",
    ),
    (
        lambda r: cut(r / "nsddata/experiments/nsd/nsd_expdesign.mat", -60),
        {},
        "nsd_expdesign.mat is damaged",
    ),
    (
        lambda r: (r / "nsddata/ppdata/subj01/behav/responses.tsv").write_bytes(b""),
        {},
        "responses.tsv is empty .0 bytes.",
    ),
    (
        lambda r: edit_responses(r, lambda t: t.loc.__setitem__((13, "73KID"), np.nan)),
        {},
        "Column 73KID of .*responses.tsv .*whole numbers",
    ),
    (
        lambda r: (r / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5").unlink(),
        {},
        "stimuli.* is missing",
    ),
    (leak, {}, "shared test images"),
]


@pytest.mark.parametrize(("spoil", "options", "words"), REFUSED)
def test_refused_in_one_sentence(tmp_path, spoil, options, words):
    tree(tmp_path)
    spoil(tmp_path)
    with pytest.raises(PerceptError, match=words):
        nsd.read(tmp_path, tmp_path / "out", 1, **(OWN | options))
    assert not (tmp_path / "out/subj01").exists()


def test_a_session_with_other_runs_than_the_design(tmp_path):
    tree(tmp_path, sessions=1, trials=750, grid=(2, 3, 4))
    with pytest.raises(PerceptError, match="Trial 5 .*run 2 in responses.tsv and 1"):
        nsd.read(tmp_path, tmp_path / "out", 1, **OWN)


@pytest.mark.parametrize("keep", [-4, -60, 600])
def test_a_truncated_nifti(tmp_path, keep):
    tree(tmp_path, fmt="nii.gz")
    cut(beta_file(tmp_path, 2, "nii.gz"), keep)
    with pytest.raises(PerceptError, match="session02.nii.gz is damaged.* cut off"):
        nsd.read(tmp_path, tmp_path / "out", 1, **OWN)


def test_a_nifti_of_several_members_is_one_stream(tmp_path):
    stored, general, _ = tree(tmp_path, fmt="nii.gz")
    path = beta_file(tmp_path, 1, "nii.gz")
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(b"".join(gzip.compress(raw[i : i + 700]) for i in range(0, len(raw), 700)))
    nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    np.testing.assert_array_equal(
        open_subject(tmp_path / "out", 1).betas[:10],
        stored[:10, general > 0].astype(np.float32) / np.float32(300),
    )


def test_a_grid_whose_axes_cannot_be_told_apart_has_the_documented_order(tmp_path):
    stored, general, _ = tree(tmp_path, grid=(4, 4, 4))
    nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    np.testing.assert_array_equal(
        open_subject(tmp_path / "out", 1).betas,
        stored[:, general > 0].astype(np.float32) / np.float32(300),
    )


def test_halves_of_a_roi_file_keep_its_labels(tmp_path):
    _, general, _ = tree(tmp_path)
    folder = tmp_path / "nsddata/ppdata/subj01/func1pt8mm/roi"
    visual, left = (
        nibabel.load(folder / "prf-visualrois.nii.gz").get_fdata(),
        np.arange(GRID[0])[:, None, None] < 2,
    )
    for side, here in (("lh", left), ("rh", ~left)):
        nibabel.save(
            nibabel.Nifti1Image(np.where(here, visual, -1).astype(np.int16), np.eye(4)),
            folder / f"{side}.prf-visualrois.nii.gz",
        )
    (folder / "prf-visualrois.nii.gz").unlink()
    nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    voxels = open_subject(tmp_path / "out", 1).voxels
    for side, here in (("lh", left), ("rh", ~left)):
        names = [f"{side}.{name}" for name in LABEL_NAMES["prf-visualrois"]]
        expected = {name: ((visual == n) & here)[general > 0] for n, name in enumerate(names, 1)}
        assert (
            [name for name in names if name in voxels]
            == [name for name in names if expected[name].any()]
            != []
        )
        for name in set(names) & set(voxels):
            np.testing.assert_array_equal(voxels[name], expected[name])


def test_the_sentence_about_missing_sessions_names_an_option_that_works(tmp_path):
    tree(tmp_path, sessions=3)
    beta_file(tmp_path, 3).unlink()
    with pytest.raises(
        PerceptError, match='session03.hdf5 is missing.*of 40 sessions 2 are there.*sessions="1-2"'
    ):
        nsd.read(tmp_path, tmp_path / "out", 1, val_images=1)
    assert (
        len(
            open_subject(
                nsd.read(tmp_path, tmp_path / "out", 1, val_images=1, sessions="1-2").parent, 1
            ).trials
        )
        == 20
    )
    beta_file(tmp_path, 1).unlink()
    with pytest.raises(PerceptError, match='sessions="2"'):
        nsd.read(tmp_path, tmp_path / "out", 1)
    beta_file(tmp_path, 2).unlink()
    with pytest.raises(PerceptError, match="fetch the betas of this subject"):
        nsd.read(tmp_path, tmp_path / "out", 1)


def test_a_failed_reading_leaves_the_subject_as_it_was(tmp_path):
    tree(tmp_path, fmt="nii.gz")
    nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    cut(beta_file(tmp_path, 2, "nii.gz"), -60)
    with pytest.raises(PerceptError, match="cut off"):
        nsd.read(tmp_path, tmp_path / "out", 1, **OWN)
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before


def test_not_a_number(tmp_path):
    _, general, _ = tree(tmp_path, dtype=np.float32)
    with h5py.File(beta_file(tmp_path, 2), "r+") as file:
        file["betas"][(3, *np.argwhere(general > 0)[5][::-1])] = np.nan
    with pytest.raises(PerceptError, match="trial 13 .*voxel 5 is nan"):
        nsd.read(tmp_path, tmp_path / "out", 1, **OWN)


def test_write_refuses_what_does_not_fit(worlds, tmp_path):
    world = worlds[1]
    arrays = (world.scan.betas, world.scan.trials, world.images, world.image_ids)
    with pytest.raises(PerceptError, match="no room"):
        nsd_format.write(tmp_path, 1, SourceData(*arrays), grid=(2, 3, 4))
    with pytest.raises(PerceptError, match="auto"):
        nsd_format.write(tmp_path, 1, SourceData(*arrays), file_format="auto")
    with pytest.raises(PerceptError, match="109"):
        nsd_format.write(tmp_path, 1, SourceData(world.scan.betas + 100, *arrays[1:]))

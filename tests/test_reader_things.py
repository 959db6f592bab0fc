"""src.readers.things: the published files written with plain h5py and pandas and read, in each
layout, and every refusal.
"""

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from src import miniworld
from src.data import files as data_files
from src.data.subject import open_subject
from src.miniworld.formats import SourceData
from src.miniworld.formats import things as things_format
from src.readers import things
from src.readers.common import load_images
from src.utils import PerceptError

V = 9
STIMULI = [  # trial_type, session, run, stimulus
    ("train", 1, 1, "dog_12s.jpg"),
    ("test", 1, 1, "cat_14s.jpg"),
    ("train", 1, 2, "bat1_01b.jpg"),
    ("train", 2, 1, "cat_02s.jpg"),
    ("test", 2, 1, "cat_14s.jpg"),
    ("train", 2, 2, "panda_12s.jpg"),
    ("train", 2, 2, "spatula_12s.jpg"),
    ("train", 2, 2, "mango_03s.jpg"),
]
T = len(STIMULI)
NAMES = sorted({row[3] for row in STIMULI})
REGIONS = {
    "V1": [0, 3],
    "hV4": [],
    "LO1 (prf)": [4],
    "lFFA": [5],
    "rFFA": [7],
    "glasser-TE1p": [8],
    "IT": [5, 7],
}


def concept(name):
    return name.rpartition("_")[0]


def write_h5(path, betas, *, pickled=True, **storage):
    """A frame in PyTables' fixed format, labels of its float columns pickled as in the published
    files.
    """
    with h5py.File(path, "w") as file:
        group = file.create_group("ResponseData")
        group.attrs["pandas_type"] = np.bytes_(b"frame")
        if pickled:
            items = group.create_dataset("block0_items", (1,), h5py.vlen_dtype(np.uint8))
            items[0] = np.frombuffer(b"\x80\x04not to be loaded", np.uint8)
        group["axis1"] = np.arange(len(betas))
        group["block1_items"], group["block1_values"] = (
            np.array([b"voxel_id"]),
            np.arange(len(betas))[:, None],
        )
        group.create_dataset("block0_values", data=betas, **storage)


def make(
    root, subj=1, stimuli=STIMULI, place="betas_csv", names=things.FIGSHARE, nested=True, **storage
):
    betas = np.random.default_rng(subj).standard_normal((V, len(stimuli)))  # float64, as published
    code = f"{subj:02d}"
    folder = root / place.format(code)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name.format(code) for name in names]
    write_h5(paths[0], betas, **storage)
    seen = pd.DataFrame(stimuli, columns=["trial_type", "session", "run", "stimulus"])
    seen.insert(3, "subject_id", subj)
    seen.to_csv(paths[1], index=False)
    voxels = pd.DataFrame(
        {
            "voxel_id": np.arange(V),
            "subject_id": subj,
            "voxel_x": np.arange(V) + 1,
            "voxel_y": 39,
            "voxel_z": np.arange(V) + 33,
        }
    )
    voxels["nc_singletrial"], voxels["nc_testset"], voxels["prf-size"] = (
        np.linspace(0, 20, V),
        30.0,
        0,
    )
    for name, members in REGIONS.items():
        voxels[name] = np.isin(np.arange(V), members).astype(int)
    voxels.to_csv(paths[2], index=False)
    rng = np.random.default_rng(0)
    for name in sorted({row[3] for row in stimuli} | set(NAMES)):
        target = root / "images" / (concept(name) if nested else "") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(target)
    return betas


def read(root, subj=1, **options):
    things.read(root, root / "out", subj, **{"val_images": 1, **options})
    return open_subject(root / "out", subj)


@pytest.mark.parametrize(
    "storage", [{}, {"chunks": (2, T), "compression": "gzip"}, {"chunks": (4, 3)}]
)
@pytest.mark.parametrize("block", [64 << 20, 150])  # in one block, and a voxel or two at a time
def test_published_files(tmp_path, monkeypatch, storage, block):
    for module in (things, data_files):
        monkeypatch.setattr(module, "BLOCK_BYTES", block)
    betas = make(tmp_path, **storage)
    subject = read(tmp_path)
    voxels = subject.voxels
    assert voxels["voxel_id"].tolist() == [0, 3, 4, 5, 7]  # all visual regions, not Glasser's
    np.testing.assert_array_equal(subject.betas, betas[[0, 3, 4, 5, 7]].T.astype(np.float32))
    assert (
        voxels["lFFA"].dtype == bool
        and voxels["lFFA"].sum() == 1
        and voxels["x"].tolist() == [1, 4, 5, 6, 8]
    )
    np.testing.assert_allclose(voxels["noise_ceiling"], np.linspace(0, 0.2, V)[[0, 3, 4, 5, 7]])
    trials = subject.trials
    assert trials["image"].tolist() == [NAMES.index(row[3]) for row in STIMULI] and trials[
        "trial"
    ].tolist() == list(range(T))
    assert trials["session"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1] and trials["run"].tolist() == [
        0,
        0,
        1,
        0,
        0,
        1,
        1,
        1,
    ]
    assert trials["repeat"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert (
        trials["split"].value_counts().to_dict() == {"train": 5, "test": 2, "val": 1}
        and subject.protocol == "things-1"
    )
    labels = subject.labels.set_index("image")
    assert labels["name"].to_dict() == dict(enumerate(NAMES)) and labels.loc[0, "concept"] == "bat1"
    assert subject.attributes["normalisation"] == "none"


@pytest.mark.parametrize(
    ("rois", "expected"),
    [
        ("all", range(V)),
        ("V1, hV4", [0, 3]),
        ("FFA", [5, 7]),
        ("rFFA,LO1 (prf)", [4, 7]),
        ("glasser-TE1p", [8]),
    ],
)
def test_regions(tmp_path, rois, expected):
    betas = make(tmp_path)
    subject = read(tmp_path, rois=rois)
    assert (
        subject.voxels["voxel_id"].tolist() == list(expected) and subject.attributes["rois"] == rois
    )
    np.testing.assert_array_equal(subject.betas, betas[list(expected)].T.astype(np.float32))


def test_images(tmp_path):
    make(tmp_path, nested=False)
    subject = read(tmp_path, image_size=4)
    assert subject.images(range(len(NAMES))).shape == (len(NAMES), 4, 4, 3)  # cut to squares
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(PerceptError, match="osf.io"):
        read(tmp_path)
    things.read(
        tmp_path / "betas_csv",
        tmp_path / "raw",
        1,
        images_path=str(tmp_path / "elsewhere"),
        image_size=0,
        val_images=0,
    )
    with Image.open(tmp_path / "elsewhere" / NAMES[3]) as image:
        np.testing.assert_array_equal(
            open_subject(tmp_path / "raw", 1).images([3])[0], np.array(image)
        )
    (tmp_path / "elsewhere" / NAMES[3]).unlink()
    with pytest.raises(PerceptError, match=f"{NAMES[3]} is missing .1 of"):
        read(tmp_path, images_path=str(tmp_path / "elsewhere"))


def test_zero_shot(tmp_path):
    make(tmp_path)
    subject = read(tmp_path, zero_shot=True)
    splits = subject.trials["split"]
    assert splits[3] == "exclude" and (splits == "exclude").sum() == 1  # another image of a cat
    assert splits.isin(["train", "val"]).sum() == 5 and subject.protocol == "things-1-zeroshot"


def test_openneuro_names(tmp_path):
    betas = make(
        tmp_path, 2, place="derivatives/ICA-betas/sub-{}/voxel-metadata", names=things.OPENNEURO
    )
    np.testing.assert_array_equal(read(tmp_path, 2, rois="all").betas, betas.T.astype(np.float32))


def test_other_subjects_images_are_numbered_together(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "both")
    other = [("train", 1, 1, name) for name in ("ant_01b.jpg", "bee_01b.jpg", "dog_12s.jpg")] + [
        ("test", 1, 1, "cat_14s.jpg")
    ]
    make(tmp_path / "both", 2, stimuli=other)
    for subj in (1, 2):
        things.read(tmp_path / "both", tmp_path / "out", subj, val_images=1)
    first, second = (open_subject(tmp_path / "out", subj) for subj in (1, 2))
    assert first.image_ids("test").tolist() == second.image_ids("test").tolist()
    assert sorted(first.labels["name"]) == sorted({*NAMES, "ant_01b.jpg", "bee_01b.jpg"})
    with pytest.raises(PerceptError, match="another dataset name"):
        things.read(tmp_path / "one", tmp_path / "out", 1, val_images=1)


def spoil(folder, what, betas):
    h5, stimuli, voxels = (folder / name.format("01") for name in things.FIGSHARE)
    seen, about = pd.read_csv(stimuli), pd.read_csv(voxels)
    if what == "missing":
        voxels.unlink()
    elif what == "truncated":
        h5.write_bytes(h5.read_bytes()[:-40])
    elif what == "turned":
        with h5py.File(h5, "r+") as file:
            del file["ResponseData/block0_values"]
            file["ResponseData/block0_values"] = betas.T
    elif what == "no key":
        with h5py.File(h5, "w") as file:
            file["betas"] = betas
    elif what == "voxels":
        about.iloc[:-1].to_csv(voxels, index=False)
    elif what == "voxel_id":
        about.assign(voxel_id=about["voxel_id"] + 1).to_csv(voxels, index=False)
    elif what == "sessions":
        seen[seen["session"] == 1].to_csv(stimuli, index=False)
    elif what == "subject":
        seen.assign(subject_id=3).to_csv(stimuli, index=False)
    elif what == "column":
        seen.drop(columns="run").to_csv(stimuli, index=False)
    elif what == "type":
        seen.assign(trial_type="catch").to_csv(stimuli, index=False)
    elif what == "sides":
        seen.assign(stimulus=seen["stimulus"].replace("dog_12s.jpg", "cat_14s.jpg")).to_csv(
            stimuli, index=False
        )
    elif what == "empty":
        stimuli.write_text("")
    elif what == "nan":
        write_h5(h5, np.where(np.arange(V)[:, None] == 3, np.nan, betas))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "voxel metadata of subject 1.* is missing"),
        ("truncated", "damaged or cut off"),
        ("turned", "trials x voxels"),
        ("no key", "ResponseData/block0_values"),
        ("voxels", r"\(9, 8\), the metadata tell"),
        ("voxel_id", "voxel_id of"),
        ("sessions", r"\(9, 8\), the metadata tell .* \(9, 3\)"),
        ("subject", "of subject 3, not of subject 1"),
        ("column", "lacks the columns .'run'"),
        ("type", "type catch"),
        ("sides", r"Image 2 is in train .* and test"),
        ("empty", "StimulusMetadata.csv is empty"),
        ("nan", "is nan"),
    ],
)
def test_refusals(tmp_path, what, words):
    spoil(tmp_path / "betas_csv", what, make(tmp_path))
    with pytest.raises(PerceptError, match=words):
        read(tmp_path, val_images=0)
    assert not (tmp_path / "out" / "subj01").exists()


def test_wrong_options(tmp_path):
    make(tmp_path)
    with pytest.raises(PerceptError, match="fetch subject 3"):
        read(tmp_path, 3)
    with pytest.raises(PerceptError, match="no region V9: it has .*LO1"):
        read(tmp_path, rois="V1,V9")
    with pytest.raises(PerceptError, match="no voxels of hV4"):
        read(tmp_path, rois="hV4")


# -------------------------------------------------------------------------------- the mini world
@pytest.fixture(scope="module")
def world():
    return {subj: miniworld.simulate(subj, 40, 10, 12, trials_per_session=62) for subj in (1, 2)}


def test_mini_world_two_subjects(tmp_path, world):
    for subj, e in world.items():
        things_format.write(tmp_path / "source", subj, SourceData.from_world(e))
        things.read(tmp_path / "source", tmp_path / "out", subj, attributes={"units": "simulated"})
    for subj, e in world.items():
        subject = open_subject(tmp_path / "out", subj)
        np.testing.assert_array_equal(subject.betas, e.scan.betas)
        pd.testing.assert_frame_equal(
            subject.trials, e.scan.trials[list(subject.trials)], check_dtype=False
        )
        np.testing.assert_array_equal(subject.images(e.image_ids), e.images)
        pd.testing.assert_frame_equal(subject.voxels[list(e.scan.voxels)], e.scan.voxels)
        assert subject.attributes["units"] == "simulated" and subject.protocol == "things-12"
        assert set(e.image_ids) <= set(subject.captions["image"])
        labels = subject.labels.set_index("image").loc[e.image_ids]
        assert (
            labels["concept"].tolist()
            == labels["kind"].tolist()
            == e.labels.set_index("image").loc[e.image_ids, "kind"].tolist()
        )
    zero = things.read(tmp_path / "source", tmp_path / "zero", 1, zero_shot=True)
    kinds = world[1].labels.set_index("image")["kind"]
    trials = pd.read_parquet(zero / "trials.parquet").assign(kind=lambda t: t["image"].map(kinds))
    tested = set(trials.loc[trials["split"] == "test", "kind"])
    assert (trials["split"] == "exclude").any() and not tested & set(
        trials.loc[trials["split"].isin(["train", "val"]), "kind"]
    )


def test_write_refuses(tmp_path, world):
    e = world[1]
    with pytest.raises(PerceptError, match="do not fit each other"):
        things_format.write(
            tmp_path, 1, SourceData(e.scan.betas[1:], e.scan.trials, e.images, e.image_ids)
        )
    with pytest.raises(PerceptError, match="lacks the columns .'session'"):
        things_format.write(
            tmp_path,
            1,
            SourceData(e.scan.betas, e.scan.trials.drop(columns="session"), e.images, e.image_ids),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        (
            "session",
            lambda s: s.where(s != 2, 3),
            "Session 2 of subject 1 is missing in .*StimulusMetadata",
        ),
        (
            "session",
            lambda s: "ses-" + s.astype(str),
            "Column session of .* must hold whole numbers",
        ),
        ("run", lambda s: s.where(s.index != 1), "Column run of .* must hold whole numbers"),
    ],
)
def test_sessions_and_runs_that_cannot_be(tmp_path, column, change, words):
    make(tmp_path / "source")
    path = tmp_path / "source" / "betas_csv" / "sub-01_StimulusMetadata.csv"
    table = pd.read_csv(path)
    table["session"] = 1 + np.arange(len(table)) * 3 // len(table)
    table[column] = change(table[column])
    table.to_csv(path, index=False)
    with pytest.raises(PerceptError, match=words):
        things.read(tmp_path / "source", tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_a_voxel_id_in_the_block_of_the_betas(tmp_path):
    make(tmp_path / "source")
    things.read(tmp_path / "source", tmp_path / "two", 1, val_images=1, rois="all")
    with h5py.File(tmp_path / "source" / "betas_csv" / "sub-01_ResponseData.h5", "r+") as file:
        group = file["ResponseData"]
        blocks = {name: group[name][:] for name in group if name.endswith("_values")}
        betas = next(b for b in blocks.values() if np.issubdtype(b.dtype, np.floating))
        ids = next(b for b in blocks.values() if np.issubdtype(b.dtype, np.integer))
        for name in blocks:
            del group[name]
        group["block0_values"] = np.concatenate(
            [ids.reshape(-1, 1).astype(betas.dtype), betas], axis=1
        )
    things.read(tmp_path / "source", tmp_path / "one", 1, val_images=1, rois="all")
    assert np.array_equal(
        open_subject(tmp_path / "one", 1).betas, open_subject(tmp_path / "two", 1).betas
    )


def test_many_pictures_keep_their_order(tmp_path):
    files = []
    for number in range(40):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((9, 5 + number, 3), number, np.uint8)).save(files[-1])
    blocks = list(load_images(files, "Image", 8))
    assert [int(block[0, 0, 0, 0]) for block in blocks] == list(range(40)) and blocks[4].shape == (
        1,
        8,
        8,
        3,
    )
    files[30].write_bytes(files[30].read_bytes()[:40])
    made = load_images(files, "Image", 8)
    assert all(next(made).shape[0] == 1 for _ in range(30))
    with pytest.raises(PerceptError, match="Image .*30.png cannot be decoded"):
        next(made)


def test_without_labels_each_image_is_its_own_concept_also_where_its_name_is_a_number(tmp_path):
    trials = pd.DataFrame(
        {
            "trial": range(6),
            "image": [7, 8, 9, 7, 8, 9],
            "session": 0,
            "run": 0,
            "repeat": [0] * 3 + [1] * 3,
            "split": ["train", "train", "test"] * 2,
        }
    )
    images = np.random.default_rng(0).integers(0, 255, (3, 5, 5, 3), dtype=np.uint8)
    things_format.write(
        tmp_path, 1, SourceData(np.eye(6, 4, dtype=np.float32), trials, images, np.array([7, 8, 9]))
    )
    things.read(tmp_path, tmp_path / "out", 1, rois="all", val_images=0)
    np.testing.assert_array_equal(open_subject(tmp_path / "out", 1).images([7, 8, 9]), images)

"""src.readers.god: BData files written with plain h5py from the published description, the mini
world, and every error.
"""

import functools

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.miniworld.formats import SourceData
from src.miniworld.formats import god as god_format
from src.readers import god
from src.utils import PerceptError

TRAIN = ["n01518878_10042", "n01518878_5958", "n01664990_65", "n02068974_106"]
TEST = ["n01443537_22563", "n02950256_22949"]
KIND = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
SHOWN = [*TRAIN, TEST[0], TEST[1], TEST[0], TEST[1], TEST[1], TEST[0]]
VC, V1 = [1, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 0]


def number(name):
    """n01518878_5958 -> 1518878.005958."""
    category, index = name[1:].split("_")
    return float(f"{int(category)}.{int(index):06d}")


def bdata(path, columns, labels, old=False, vmap=None):
    """A file with six voxels and some labels, {key: (samples,)}; a label of None is left out."""
    labels = {key: values for key, values in labels.items() if values is not None}
    dataset = np.column_stack([columns, *labels.values()]).astype(np.float64)
    width, voxels = dataset.shape[1], columns.shape[1]
    flags = {
        "VoxelData": [1] * voxels,
        "ROI_VC": VC,
        "ROI_V1": V1,
        "voxel_x": np.arange(6) * 3.0,
        "voxel_y": np.arange(6) - 50.0,
        "voxel_z": [9.0] * 6,
    }
    value = np.full((len(flags) + len(labels), width), np.nan)
    for row, flag in enumerate(flags.values()):
        value[row, :voxels] = np.where(np.isin(flag, 0), np.nan, flag) if row in (1, 2) else flag
    for row in range(len(labels)):
        value[len(flags) + row, voxels + row] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    group, name = ("metaData", "dataSet") if old else ("metadata", "dataset")
    keys = np.array([*flags, *labels], dtype="S")
    with h5py.File(path, "w") as file:
        file[name], file[f"{group}/key"], file[f"{group}/value"], file[f"{group}/description"] = (
            dataset,
            keys,
            value,
            keys,
        )
        for key, label in (vmap or {}).items():
            file[f"vmap/stimulus_name/{key}"] = label


def pictures(root, names=(*TRAIN, *TEST)):
    for at, name in enumerate(names):
        path = root / "images" / ("test" if name in TEST else "training") / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (40 * at, 20, 30)).save(path)


def subject_file(root, subj=3, old=False, vmap=None, **labels):
    betas = np.random.default_rng(subj).standard_normal((10, 6))
    standard = {
        "DataType": KIND,
        "Session": [1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
        "Run": [1, 2, 3, 3, 4, 4, 5, 6, 7, 7],
        "stimulus_id": [number(n) for n in SHOWN],
    }
    bdata(root / "data" / f"Subject{subj}.h5", betas, standard | labels, old, vmap)
    pictures(root)
    return betas


read = functools.partial(god.read, val_images=1)


# -------------------------------------------------------------------------------- the mini world
def test_mini_world_comes_back(tmp_path):
    worlds = {subj: simulate(subj, 40, 10, 12, trials_per_session=70) for subj in (1, 2)}
    for subj, world in worlds.items():
        god_format.write(tmp_path / "source", subj, SourceData.from_world(world))
    for subj in worlds:
        god.read(
            tmp_path / "source", tmp_path / "out", subj, attributes={"source": "the mini world"}
        )
    for subj, world in worlds.items():
        subject = open_subject(tmp_path / "out", subj)
        np.testing.assert_array_equal(subject.betas, world.scan.betas)
        pd.testing.assert_frame_equal(
            subject.trials, world.scan.trials[subject.trials.columns], check_dtype=False
        )
        np.testing.assert_array_equal(subject.images(world.image_ids), world.images)
        known = world.scan.voxels.drop(columns="noise_ceiling")
        pd.testing.assert_frame_equal(subject.voxels[known.columns], known)
        assert (
            subject.voxels["VC"].all()
            and subject.protocol == "god-12"
            and subject.attributes["source"] == "the mini world"
        )
        assert (
            set(subject.labels.columns) == set(world.labels.columns)
            and subject.captions["image"].isin(world.image_ids).any()
        )


def test_write_refuses_what_does_not_fit(tmp_path):
    images, trials = (
        np.zeros((1, 4, 4, 3), np.uint8),
        pd.DataFrame({"trial": [0], "image": [5], "session": 0, "run": 0, "split": "train"}),
    )
    with pytest.raises(PerceptError, match="do not fit"):
        god_format.write(tmp_path, 1, SourceData(np.zeros((2, 3)), trials, images, np.array([5])))
    unnamed = SourceData(
        np.zeros((1, 3)), trials.assign(image=2_000_000), images, np.array([2_000_000])
    )
    with pytest.raises(PerceptError, match="Image id 2000000 cannot be written"):
        god_format.write(tmp_path, 1, unnamed)
    with pytest.raises(PerceptError, match="subjects 1 to 5"):
        god_format.write(tmp_path, 6, SourceData(np.zeros((1, 3)), trials, images, np.array([5])))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- the published layout
def check(subject, betas, rows=8, columns=(0, 1, 2, 4)):
    np.testing.assert_array_equal(subject.betas, betas[:rows, list(columns)].astype(np.float32))
    assert subject.trials["image"].tolist() == [
        int(n[1:9]) * 10**6 + int(n[10:]) for n in SHOWN[:rows]
    ]


@pytest.mark.parametrize("old", [False, True])
def test_published_file(tmp_path, old):
    betas = subject_file(tmp_path / "source", old=old)
    read(tmp_path / "source", tmp_path / "out", 3)
    subject = open_subject(tmp_path / "out", 3)
    trials = subject.trials
    check(subject, betas)
    assert trials["session"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and trials["run"].tolist() == [
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        1,
    ]
    assert trials["repeat"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1] and trials[
        "trial"
    ].tolist() == list(range(8))
    assert (
        sorted(trials["split"][:4]) == ["train", "train", "train", "val"]
        and trials["split"][4:].eq("test").all()
    )
    assert subject.voxels["V1"].tolist() == [True, False, False, False] and subject.voxels[
        "x"
    ].tolist() == [0, 3, 6, 12]
    assert subject.protocol == "god-2" and subject.attributes["rois"] == "VC"
    labels = subject.labels.set_index("image")
    assert labels.loc[1443537022563].tolist() == ["n01443537_22563", "n01443537"]
    colours = subject.images(np.array([god.parse_image_name(n) for n in (*TRAIN, *TEST)]))[
        :, 5, 5, 0
    ].astype(int)
    assert np.abs(colours - 40 * np.arange(6)).max() <= 4  # JPEG


def test_rois(tmp_path):
    betas = subject_file(tmp_path / "source")
    read(tmp_path / "source", tmp_path / "out", 3, rois="V1", image_size=8)
    subject = open_subject(tmp_path / "out", 3)
    check(subject, betas, columns=(0, 3))
    assert subject.images(subject.trials["image"][:1].to_numpy()).shape[1:3] == (8, 8)
    with pytest.raises(PerceptError, match="no region hV4"):
        read(tmp_path / "source", tmp_path / "out", 3, rois="V1,hV4")


def test_imagery_of_pictures_and_of_categories(tmp_path):
    categories = [number(n) for n in SHOWN[:8]] + [2950256.0, 1443537.0]
    for root, ids in ((tmp_path / "a", None), (tmp_path / "b", categories)):
        betas = subject_file(root, **({"stimulus_id": ids} if ids else {}))
        read(root, tmp_path / "out", 3, imagery=True)
        subject = open_subject(tmp_path / "out", 3)
        check(subject, betas, rows=10)
        assert subject.trials["split"][8:].eq("exclude").all() and subject.trials["repeat"][
            8:
        ].tolist() == [2, 2]
    subject_file(tmp_path / "c", stimulus_id=[*categories[:9], 7777777.0])
    with pytest.raises(PerceptError, match="Trial 9 imagines a category"):
        read(tmp_path / "c", tmp_path / "out", 3, imagery=True)
    read(tmp_path / "c", tmp_path / "out", 3)


def test_the_other_names_of_pictures(tmp_path):
    label = subject_file(tmp_path / "label", stimulus_id=None, Label=[number(n) for n in SHOWN])
    names = {float(i + 1): n for i, n in enumerate([*TRAIN, *TEST])}
    codes = [next(k for k, v in names.items() if v == n) for n in SHOWN]
    vmap = subject_file(tmp_path / "vmap", vmap=names, stimulus_id=None, stimulus_name=codes)
    index = subject_file(
        tmp_path / "index", stimulus_id=None, image_index=[1, 2, 3, 4, 1, 2, 1, 2, 2, 1]
    )
    for kind, names_of_kind in (("Training", TRAIN), ("Test", TEST)):
        table = "".join(f"{n}\t{number(n)}\t9\t{i + 1}\n" for i, n in enumerate(names_of_kind))
        (tmp_path / "index" / f"stimulus_ImageNet{kind}.tsv").write_text(table)
    for root, betas in (("label", label), ("vmap", vmap), ("index", index)):
        read(tmp_path / root, tmp_path / root / "out", 3)
        check(open_subject(tmp_path / root / "out", 3), betas)


def test_every_published_kind_of_number_survives():
    """Six decimals through float64, also where the last ones are zeros and where the file has
    printed them with fewer.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 10**7, 5000) * 10**6 + rng.integers(1, 10**6, 5000)
    written = np.array([float(f"{i // 10**6}.{i % 10**6:06d}") for i in ids])
    np.testing.assert_array_equal(
        god.convert_stimulus_ids(written, np.ones(5000, int), "here"), ids
    )
    assert (
        god.parse_image_name("n02950256_22949.JPEG") == 2950256022949
        and god.format_image_name(2950256022949) == "n02950256_22949"
    )
    assert god.format_image_name(god.parse_image_name("n00000000_100003")) == "n00000000_100003"


def test_deep_image_reconstruction(tmp_path):
    rng = np.random.default_rng(1)
    parts = {"Training": TRAIN * 2, "Test": TEST * 3}
    betas = {}
    for part, shown in parts.items():
        betas[part] = rng.standard_normal((len(shown), 6))
        half = np.arange(len(shown)) >= len(shown) // 2
        labels = {"Session": 1 + half, "Run": 1 + half, "stimulus_id": [number(n) for n in shown]}
        bdata(tmp_path / f"sub-02_perceptionNaturalImage{part}_original_VC.h5", betas[part], labels)
    pictures(tmp_path)
    read(tmp_path, tmp_path / "out", 2)
    subject = open_subject(tmp_path / "out", 2)
    np.testing.assert_array_equal(
        subject.betas, np.concatenate(list(betas.values()))[:, [0, 1, 2, 4]].astype(np.float32)
    )
    assert (
        subject.trials["session"].tolist() == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 3
        and subject.protocol == "deeprecon-2"
    )
    assert subject.trials["split"][8:].eq("test").all() and subject.trials["repeat"].tolist() == [
        0
    ] * 4 + [1] * 4 + [0, 0, 1, 1, 2, 2]
    (tmp_path / "sub-02_perceptionNaturalImageTest_original_VC.h5").unlink()
    with pytest.raises(PerceptError, match="Test_original_VC.h5 is missing .* fetch both"):
        read(tmp_path, tmp_path / "out", 2)


@pytest.mark.parametrize("floats", [False, True])
def test_pictures_of_mind_vis(tmp_path, floats):
    subject_file(tmp_path)
    for path in (tmp_path / "images").rglob("*.JPEG"):
        path.unlink()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 5, 5, 3), dtype=np.uint8)
    stored = pixels / 255 if floats else pixels
    np.savez_compressed(
        tmp_path / "images_256.npz", train_images=stored[:5], test_images=stored[5:]
    )
    for file, names in (
        ("imagenet_training_label.csv", [*TRAIN[::-1], "n09999999_1"]),
        ("imageID_test.csv", TEST),
    ):
        (tmp_path / file).write_text("".join(f'{number(n)},"{n}.JPEG"\n' for n in names))
    read(tmp_path, tmp_path / "out", 3)
    images = open_subject(tmp_path / "out", 3).images(
        np.array([god.parse_image_name(n) for n in (*TRAIN[::-1], *TEST)])
    )
    np.testing.assert_array_equal(images, pixels[[0, 1, 2, 3, 5, 6]])
    (tmp_path / "imageID_test.csv").unlink()
    with pytest.raises(PerceptError, match="needs imagenet_testing_label.csv"):
        read(tmp_path, tmp_path / "out", 3)
    (tmp_path / "imageID_test.csv").write_text("")
    (tmp_path / "imageID_test.csv").write_text(f'1,"{TEST[0]}.JPEG"\n')
    with pytest.raises(PerceptError, match=f"{TEST[1]} is not in the lists"):
        read(tmp_path, tmp_path / "out", 3)
    (tmp_path / "imageID_test.csv").write_text("".join(f'1,"{n}.JPEG"\n' for n in TEST))
    (tmp_path / "images_256.npz").write_bytes((tmp_path / "images_256.npz").read_bytes()[:-200])
    with pytest.raises(PerceptError, match="images_256.npz is damaged"):
        read(tmp_path, tmp_path / "again", 3)


def test_without_sessions(tmp_path):
    subject_file(tmp_path, Session=None)
    with pytest.warns(UserWarning, match="does not tell sessions"):
        read(tmp_path, tmp_path / "out", 3)
    trials = open_subject(tmp_path / "out", 3).trials
    assert trials["session"].eq(0).all() and trials["run"].tolist() == [0, 1, 2, 2, 3, 3, 4, 5]


# -------------------------------------------------------------------------------- errors
def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def turned(path):
    with h5py.File(path, "r+") as file:
        stored = file["dataset"][:7].T
        del file["dataset"]
        file["dataset"] = stored


def emptied(path):
    with h5py.File(path, "r+") as file:
        file["metadata/value"][1:3] = np.nan


def not_finite(path):
    with h5py.File(path, "r+") as file:
        file["dataset"][3, 1] = np.nan


@pytest.mark.parametrize(
    "spoil, words",
    [
        (cut, "Subject3.h5 is damaged or cut off"),
        (
            lambda path: path.write_bytes(b"no"),
            "Subject3.h5 is damaged .*of another kind",
        ),
        (turned, "axes in this order"),
        (emptied, "no voxels of VC"),
        (not_finite, "beta of trial 3"),
        (lambda path: path.unlink(), "neither Subject3.h5 nor"),
    ],
)
def test_errors_of_the_file(tmp_path, spoil, words):
    subject_file(tmp_path / "source")
    spoil(tmp_path / "source" / "data" / "Subject3.h5")
    with pytest.raises(PerceptError, match=words):
        read(tmp_path / "source", tmp_path / "out", 3)
    assert not (tmp_path / "out" / "subj03").exists()


@pytest.mark.parametrize(
    "labels, words",
    [
        ({"DataType": [*KIND[:9], 4]}, "Sample 9 .* has DataType 4"),
        (
            {"stimulus_id": [number(TEST[0]), *(number(n) for n in SHOWN[1:])]},
            "is in train .* and test",
        ),
        (
            {"stimulus_id": np.array([number(n) for n in SHOWN], np.float32)},
            "six decimals in float64",
        ),
        ({"stimulus_id": [np.nan] * 10}, "six decimals"),
        ({"stimulus_id": None}, "names no images"),
        (
            {"stimulus_id": None, "image_index": [1.0] * 10},
            "stimulus_ImageNetTraining.tsv .* is missing",
        ),
        (
            {"stimulus_id": [123.000456, *(number(n) for n in SHOWN[1:])]},
            "n00000123_456.JPEG .* is missing",
        ),
    ],
)
def test_errors_of_labels(tmp_path, labels, words):
    subject_file(tmp_path, **labels)
    with pytest.raises(PerceptError, match=words):
        god.read(tmp_path, tmp_path / "out", 3, val_images=0)
    assert not (tmp_path / "out" / "subj03").exists()


def test_an_index_that_no_table_names(tmp_path):
    subject_file(tmp_path, stimulus_id=None, image_index=[1, 2, 3, 44, 1, 2, 1, 2, 2, 1])
    for kind, names in (("Training", TRAIN), ("Test", TEST)):
        (tmp_path / f"stimulus_ImageNet{kind}.tsv").write_text(
            "".join(f"{n}\t{number(n)}\t9\t{i + 1}\n" for i, n in enumerate(names))
        )
    with pytest.raises(PerceptError, match="Sample 3 has 44"):
        read(tmp_path, tmp_path / "out", 3)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(PerceptError, match="nowhere"):
        read(tmp_path / "nowhere", tmp_path / "out", 1)
    with pytest.raises(PerceptError, match="no name of an ImageNet image"):
        god.parse_image_name("cat.jpg")
    assert not (tmp_path / "out").exists()


def test_numbers_of_pictures_need_float64(tmp_path):
    subject_file(tmp_path)
    with h5py.File(next(tmp_path.rglob("Subject3.h5")), "r+") as file:
        small = file["dataset"][:].astype(np.float32)
        del file["dataset"]
        file["dataset"] = small
    with pytest.raises(PerceptError, match="Subject3.h5 is stored as float32, which cannot hold"):
        god.read(tmp_path, tmp_path / "out", 3)

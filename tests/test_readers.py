"""src.readers: each format written with plain libraries (tarfile, numpy, scipy) and read; what
`write` writes is read back.
"""

import dataclasses
import inspect
import io
import json
import tarfile

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
from PIL import Image

from src import miniworld
from src.data.layout import number_repeats
from src.data.subject import open_subject
from src.miniworld.formats import WRITERS, SourceData
from src.miniworld.formats import digits69 as digits69_format
from src.miniworld.formats import mindeye as mindeye_format
from src.miniworld.formats import npz as npz_format
from src.readers import READERS, digits69, mindeye, npz, parse_options, read_source
from src.utils import PerceptError

V = 6


@pytest.mark.parametrize("name", sorted(READERS))
def test_every_reader_reads_and_writes(name):
    reader = READERS[name]
    assert list(inspect.signature(reader.read).parameters)[:3] == ["source", "dataset", "subj"]
    options = list(inspect.signature(reader.read).parameters.values())[3:]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in options)
    assert callable(WRITERS[name])


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_missing_source_is_a_clear_error(name, tmp_path):
    with pytest.raises(PerceptError, match="nowhere"):
        READERS[name].read(tmp_path / "nowhere.x", tmp_path / "out", 1)
    assert not list(tmp_path.glob("out/*"))


# -------------------------------------------------------------------------------- MindEye shards
def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path, samples):
    """Plain tar of [(key, {extension: bytes})]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for key, fields in samples:
            for extension, content in fields.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


def make_shards(root, change=None, n=6, subj=1):
    """Three repeats an image; image 12 has two (its third row is a copy of the second); two train
    shards, one val, one test.
    """
    rng = np.random.default_rng(0)
    betas = rng.standard_normal((n, 3, V)).astype(np.float16)
    betas[2, 2] = betas[2, 1]
    trial = rng.permutation(3 * n).reshape(n, 3)
    trial[2, 2] = trial[2, 1]
    images = rng.integers(0, 256, (n, 5, 4, 3), dtype=np.uint8)
    samples = []
    for i in range(n):
        fields = {
            "png": png(images[i]),
            "nsdgeneral.npy": npy(betas[i]),
            "trial.npy": npy(trial[i]),
            "coco73k.npy": npy(np.array([10 + i])),
            "num_uniques.npy": npy(np.array([2 if i == 2 else 3])),
        }
        samples.append((f"{i:05d}", change(i, fields) if change else fields))
    layout = root / "webdataset_avg_split"
    name = f"subj{subj:02d}"
    tar(layout / "train" / f"train_{name}_0.tar", samples[:2])
    tar(layout / "train" / f"train_{name}_1.tar", samples[2:3])
    tar(layout / "val" / f"val_{name}_0.tar", samples[3:4])
    tar(layout / "test" / f"test_{name}_0.tar", samples[4:])
    (layout / f"metadata_{name}.json").write_text(
        json.dumps({"totals": {"train": 3, "val": 1, "test": 2}})
    )
    return betas, trial, images


def test_mindeye_published_layout(tmp_path):
    betas, trial, images = make_shards(tmp_path / "source")
    folder = mindeye.read(tmp_path / "source", tmp_path / "out", 1, trials_per_session=5)
    subject = open_subject(tmp_path / "out", 1)
    assert folder == subject.path
    trials = subject.trials
    assert len(trials) == 17 and subject.betas.dtype == np.float16  # the copy is no trial
    assert subject.image_ids("train").tolist() == [10, 11, 12]
    assert (subject.image_ids("val").tolist(), subject.image_ids("test").tolist()) == (
        [13],
        [14, 15],
    )
    for row, found in trials.iterrows():
        i, r = np.argwhere(trial == found["trial"])[0]
        assert (found["image"], found["session"], found["run"]) == (10 + i, found["trial"] // 5, -1)
        assert found["repeat"] == (np.unique(trial[i]) < found["trial"]).sum()
        np.testing.assert_array_equal(subject.betas[row], betas[i, r])
    np.testing.assert_array_equal(subject.images(np.arange(10, 16)), images)
    assert subject.protocol == "nsd-2" and subject.test_set.startswith("2-")
    assert subject.captions is None and subject.labels is None
    mindeye.read(
        tmp_path / "source" / "webdataset_avg_split", tmp_path / "out", 1, val="train", protocol="x"
    )
    both = open_subject(tmp_path / "out", 1)
    assert both.image_ids("train").tolist() == [10, 11, 12, 13] and len(both.image_ids("val")) == 0
    assert both.protocol == "x" and both.test_set == subject.test_set


def test_mindeye_distinct_repeats_wherever_the_copy_lies(tmp_path):
    a, b = np.ones(V, np.float32), np.zeros(V, np.float32)
    arrays = {0: [a, b, a], 1: [a, a, b], 2: [a, b, b]}

    def change(i, fields):
        if i not in arrays:
            return fields | {"nsdgeneral.npy": npy(np.eye(3, V, dtype=np.float32) + i)}
        return fields | {
            "nsdgeneral.npy": npy(np.stack(arrays[i])),
            "num_uniques.npy": npy(np.int64(2)),
        }

    make_shards(tmp_path, change)
    mindeye.read(tmp_path, tmp_path / "out", 1)
    subject = open_subject(tmp_path / "out", 1)
    for image in (10, 11, 12):
        rows = subject.betas[subject.trials.index[subject.trials["image"] == image]]
        assert sorted(rows[:, 0]) == [0, 1]


def test_mindeye_without_trial_numbers_warns(tmp_path):
    make_shards(
        tmp_path,
        lambda i, f: (
            {k: v for k, v in f.items() if k != "trial.npy"}
            | ({"trial.npy": npy(np.arange(2))} if i else {})
        ),
    )
    with pytest.warns(UserWarning, match="one session"):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    trials = open_subject(tmp_path / "out", 1).trials
    assert trials["session"].eq(0).all() and trials["trial"].tolist() == list(range(17))
    assert trials[trials["image"] == 11]["repeat"].tolist() == [0, 1, 2]


def test_mindeye_early_layout_one_trial_a_sample(tmp_path):
    def single(i, fields):
        image = {0: 10, 1: 10, 2: 11}.get(i, 10 + i)
        one = {
            "nsdgeneral.npy": npy(np.arange(V, dtype=np.float32) + i),
            "trial.npy": npy(np.array([7 - i])),
        }
        return {
            "png": png(np.full((4, 4, 3), image, np.uint8)),
            "coco73k.npy": npy(np.array([image])),
        } | one

    make_shards(tmp_path, single)
    with pytest.raises(
        PerceptError, match="announces 4 .*hold 3: fetch the shards that are missing"
    ):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    next(tmp_path.rglob("metadata_subj01.json")).unlink()
    with pytest.warns(UserWarning, match="whether all shards are there"):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    subject = open_subject(tmp_path / "out", 1)
    ten = subject.trials[subject.trials["image"] == 10]
    assert dict(zip(ten["trial"], ten["repeat"], strict=True)) == {7: 1, 6: 0}
    assert subject.betas[ten.index[ten["repeat"] == 0][0], 0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nsdgeneral.npy": None}, r"00001.*train_subj01_0.tar has no nsdgeneral.npy"),
        ({"coco73k.npy": None}, "00001.*has no coco73k.npy"),
        ({"png": None}, "00001.*has no image"),
        ({"png": b"xx"}, "00001.*cannot be decoded"),
        (
            {"nsdgeneral.npy": npy(np.zeros((3, V)))[:-5]},
            "nsdgeneral.npy of Sample 00001.*cannot be read",
        ),
        (
            {"nsdgeneral.npy": npy(np.array([{}, 1, 2], dtype=object))},
            "00001.*cannot be read.*more than plain arrays",
        ),
        ({"nsdgeneral.npy": npy(np.ones((3, V + 1), np.float16))}, "00001.*must be alike"),
        ({"nsdgeneral.npy": npy(np.full((3, V), np.nan, np.float16))}, "beta of trial"),
        (
            {"nsdgeneral.npy": npy(np.zeros((V, 3), np.float16))},
            "00001.*first axis must be that of the repeats",
        ),
        ({"num_uniques.npy": npy(np.array([4]))}, "00001.* is 4, with 3"),
        ({"coco73k.npy": npy(np.array([1, 2, 3]))}, "00001.*must name one"),
        ({"coco73k.npy": npy(np.array([14]))}, "Image 14 is in (test.*train|train.*test)"),
        ({"png": png(np.zeros((9, 9, 3), np.uint8))}, "image of Sample 00001.*must be alike"),
    ],
)
def test_mindeye_bad_samples_are_named(tmp_path, change, message):
    def spoil(i, fields):
        return {k: v for k, v in (fields | change).items() if v is not None} if i == 1 else fields

    make_shards(tmp_path, spoil)
    with pytest.raises(PerceptError, match=message):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    assert not (tmp_path / "out" / "subj01").exists()


def test_mindeye_transposed_betas_are_refused_in_every_sample(tmp_path):
    make_shards(
        tmp_path,
        lambda i, f: f | {"nsdgeneral.npy": npy(np.load(io.BytesIO(f["nsdgeneral.npy"])).T.copy())},
    )
    with pytest.raises(PerceptError, match="first axis must be that of the repeats"):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    make_shards(
        tmp_path,
        lambda i, f: (
            {k: v for k, v in f.items() if k not in ("trial.npy", "num_uniques.npy")}
            | {"nsdgeneral.npy": npy(np.zeros((V, 3)))}
        ),
    )
    with pytest.raises(PerceptError, match="first axis must be that of the repeats"):
        mindeye.read(tmp_path, tmp_path / "out", 1)


def test_mindeye_arrays_in_fortran_order_and_double_precision(tmp_path):
    make_shards(tmp_path / "c")
    make_shards(
        tmp_path / "f",
        lambda i, f: (
            f
            | {
                "nsdgeneral.npy": npy(
                    np.asfortranarray(np.load(io.BytesIO(f["nsdgeneral.npy"])).astype(np.float64))
                )
            }
        ),
    )
    read = [
        open_subject(mindeye.read(tmp_path / name, tmp_path / f"out-{name}", 1).parent, 1)
        for name in "cf"
    ]
    np.testing.assert_array_equal(read[0].betas, read[1].betas)
    assert [s.betas.dtype for s in read] == [np.float16, np.float32]


def test_mindeye_a_failed_reading_leaves_the_subject_as_it_was(tmp_path):
    make_shards(tmp_path)
    mindeye.read(tmp_path, tmp_path / "out", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    metadata = tmp_path / "webdataset_avg_split" / "metadata_subj01.json"
    metadata.write_text(metadata.read_text()[:-9])
    with pytest.raises(PerceptError, match="metadata_subj01.json .*cannot be read"):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    make_shards(
        tmp_path,
        lambda i, f: (
            f | ({"nsdgeneral.npy": npy(np.full((3, V), np.inf, np.float16))} if i == 5 else {})
        ),
    )
    with pytest.raises(PerceptError, match="is inf"):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before


def test_mindeye_truncation_anywhere_is_noticed(tmp_path):
    make_shards(tmp_path)
    path = tmp_path / "webdataset_avg_split" / "train" / "train_subj01_0.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as file:
        end = file.getmembers()[-1]
        end = end.offset_data + -(-end.size // 512) * 512
    for length in (0, 100, *range(512, end + 1, 256), end + 512):
        path.write_bytes(whole[:length])
        with pytest.raises(
            PerceptError, match=r"train_subj01_0.tar is (damaged or )?cut off (at|after) sample"
        ):
            mindeye.read(tmp_path, tmp_path / "out", 1)
    path.write_bytes(whole[: end + 1024])
    mindeye.read(tmp_path, tmp_path / "out", 1)
    path.write_bytes(whole[:2000])
    with pytest.raises(PerceptError, match="at sample 00000"):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    assert len(open_subject(tmp_path / "out", 1).trials) == 17  # the earlier result is intact


def test_mindeye_missing_shards_and_options(tmp_path):
    make_shards(tmp_path)
    with pytest.raises(PerceptError, match="train_subj02_0.tar is missing"):
        mindeye.read(tmp_path, tmp_path / "out", 2)
    (tmp_path / "webdataset_avg_split" / "train" / "train_subj01_0.tar").unlink()
    with pytest.raises(PerceptError, match="train_subj01_0.tar is missing"):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    with pytest.raises(PerceptError, match="val or train"):
        mindeye.read(tmp_path, tmp_path / "out", 1, val="test")


def make_arrays(volume=()):
    rng = np.random.default_rng(4)
    ids = np.array([3, 14, 15, 92, 65, 35])
    image = rng.permutation(np.repeat(ids, 3)[:-1])  # one image has two repeats
    trials = pd.DataFrame(
        {"trial": np.arange(17), "image": image, "session": np.arange(17) // 6, "run": 0}
    )
    trials["repeat"] = number_repeats(trials)
    trials["split"] = trials["image"].map(
        dict(zip(ids, ["train"] * 4 + ["val", "test"], strict=True))
    )
    betas = rng.standard_normal((17, *(volume or (V,)))).astype(np.float32)
    return betas, trials, rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), ids


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_mindeye_writes_what_it_reads(tmp_path, image_format):
    betas, trials, images, ids = make_arrays()
    tables = {
        "voxels": pd.DataFrame({"V1": np.arange(V) < 3, "x": np.arange(V) * 1.5}),
        "captions": pd.DataFrame(
            {"image": np.repeat(ids, 2), "caption": [f"text {i}" for i in range(12)]}
        ),
        "labels": pd.DataFrame({"image": ids, "kind": list("abcdef")}),
    }
    options = {"samples_per_shard": 3, "image_format": image_format}
    mindeye_format.write(tmp_path, 3, SourceData(betas, trials, images, ids, **tables), **options)
    names = sorted(p.name for p in tmp_path.glob("webdataset_avg_split/*/*.tar"))
    assert names == [
        "test_subj03_0.tar",
        "train_subj03_0.tar",
        "train_subj03_1.tar",
        "val_subj03_0.tar",
    ]
    mindeye.read(
        tmp_path, tmp_path / "out", 3, trials_per_session=6, attributes={"units": "percent"}
    )
    subject = open_subject(tmp_path / "out", 3)
    order = subject.trials["trial"].to_numpy()
    np.testing.assert_array_equal(subject.betas, betas[order])
    expected = trials.loc[order].reset_index(drop=True).assign(run=-1)
    pd.testing.assert_frame_equal(subject.trials, expected[list(subject.trials)], check_dtype=False)
    difference = np.abs(subject.images(ids).astype(int) - images)
    assert difference.max() == 0 if image_format == "png" else 0 < difference.mean() < 60
    pd.testing.assert_frame_equal(subject.voxels, tables["voxels"])
    assert subject.labels.set_index("image").loc[92, "kind"] == "d" and len(subject.captions) == 12
    assert subject.attributes["units"] == "percent"
    mindeye_format.write(
        tmp_path, 3, SourceData(betas, trials, images, ids)
    )  # fewer shards than before: none of the old ones stays
    assert not (tmp_path / "webdataset_avg_split" / "train" / "train_subj03_1.tar").exists()


def test_mindeye_written_members_are_the_published_ones(tmp_path):
    betas, trials, images, ids = make_arrays()
    mindeye_format.write(tmp_path, 1, SourceData(betas, trials, images, ids), repeats=3)
    with tarfile.open(tmp_path / "webdataset_avg_split" / "train" / "train_subj01_0.tar") as file:
        names = file.getnames()
        uniques = [
            np.load(io.BytesIO(file.extractfile(n).read())) for n in names if "num_uniques" in n
        ]
        arrays = [
            np.load(io.BytesIO(file.extractfile(n).read())) for n in names if "nsdgeneral" in n
        ]
    extensions = {"png", "nsdgeneral.npy", "trial.npy", "coco73k.npy", "num_uniques.npy"}
    assert {n.split(".", 1)[1] for n in names} == extensions and len(names) == 5 * 4
    assert {a.shape for a in arrays} == {(3, V)}
    assert {int(u[0]) for u in uniques} <= {2, 3}
    totals = json.loads((tmp_path / "webdataset_avg_split" / "metadata_subj01.json").read_text())[
        "totals"
    ]
    assert totals == {"train": 4, "val": 1, "test": 1}


def test_mindeye_whole_brain_and_two_subjects(tmp_path):
    betas, trials, images, ids = make_arrays((2, 3, 4))
    mindeye_format.write(tmp_path, 1, SourceData(betas, trials, images, ids))
    mindeye_format.write(tmp_path, 2, SourceData(betas[:, 0, 0] * 2, trials, images, ids))
    mindeye.read(tmp_path, tmp_path / "out", 1, betas="wholebrain_3d")
    mindeye.read(tmp_path, tmp_path / "out", 2)
    one, two = open_subject(tmp_path / "out", 1), open_subject(tmp_path / "out", 2)
    assert one.volume_shape == (2, 3, 4) and two.volume_shape is None
    np.testing.assert_array_equal(one.betas, betas[one.trials["trial"]].reshape(17, -1))
    np.testing.assert_array_equal(two.betas, betas[two.trials["trial"], 0, 0] * 2)
    with pytest.raises(PerceptError, match="no wholebrain_3d.npy"):
        mindeye.read(tmp_path, tmp_path / "out", 2, betas="wholebrain_3d")


def test_mindeye_write_refusals(tmp_path):
    betas, trials, images, ids = make_arrays()
    with pytest.raises(PerceptError, match="16 betas, 17 trials"):
        mindeye_format.write(tmp_path, 1, SourceData(betas[:-1], trials, images, ids))
    with pytest.raises(PerceptError, match="Image 35 of the trials"):
        mindeye_format.write(tmp_path, 1, SourceData(betas, trials, images[:-1], ids[:-1]))
    with pytest.raises(PerceptError, match="png or jpg"):
        mindeye_format.write(
            tmp_path, 1, SourceData(betas, trials, images, ids), image_format="gif"
        )


def test_mindeye_the_release_that_is_there_is_read(tmp_path):
    betas, trials, images, ids = make_arrays()
    mindeye_format.write(
        tmp_path, 1, SourceData(betas, trials, images, ids), layout="webdataset_avg_new"
    )
    mindeye.read(tmp_path, tmp_path / "out", 1, trials_per_session=6)
    subject = open_subject(tmp_path / "out", 1)
    assert subject.protocol == "nsd-1000" and subject.attributes["layout"] == "webdataset_avg_new"
    np.testing.assert_array_equal(subject.betas, betas[subject.trials["trial"]])
    mindeye_format.write(tmp_path, 1, SourceData(betas + 1, trials, images, ids))
    with pytest.raises(
        PerceptError, match="holds the releases webdataset_avg_split, webdataset_avg_new.*name one"
    ):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    mindeye.read(tmp_path, tmp_path / "out", 1, layout="webdataset_avg_split")
    mindeye.read(tmp_path / "webdataset_avg_new", tmp_path / "other", 1)
    one, other = open_subject(tmp_path / "out", 1), open_subject(tmp_path / "other", 1)
    np.testing.assert_array_equal(one.betas, betas[one.trials["trial"]] + 1)
    np.testing.assert_array_equal(other.betas, betas[other.trials["trial"]])
    assert (one.protocol, one.attributes["source"]) == (
        "nsd-1",
        "MindEye webdataset_avg_split",
    ) and other.protocol == "nsd-1000"
    other_subject = {"layout": "webdataset_avg_split", "subj": 2}
    for options, message in (
        ({"layout": "webdataset"}, "holds webdataset/"),
        ({"layout": "wds"}, "layout is 'wds'"),
        (other_subject, "subj02_0.tar"),
    ):
        with pytest.raises(PerceptError, match=message):
            mindeye.read(**{"source": tmp_path, "dataset": tmp_path / "out", "subj": 1} | options)
    with pytest.raises(PerceptError, match="layout='wds' one of"):
        mindeye_format.write(tmp_path, 1, SourceData(betas, trials, images, ids), layout="wds")


@pytest.mark.parametrize("volume", [(), (2, 3, 4)])
def test_mindeye_early_release_there_and_back(tmp_path, volume):
    betas, trials, images, ids = make_arrays(volume)
    mindeye_format.write(
        tmp_path,
        1,
        SourceData(betas, trials, images, ids),
        layout="webdataset",
        samples_per_shard=5,
    )
    root = tmp_path / "webdataset"
    assert sorted(p.name for p in root.glob("*/*.tar")) == [
        f"train_subj01_{n}.tar" for n in range(3)
    ] + ["val_subj01_0.tar"]
    with tarfile.open(root / "val" / "val_subj01_0.tar") as file:
        shapes = {
            np.load(io.BytesIO(file.extractfile(n).read())).shape
            for n in file.getnames()
            if "nsdgeneral" in n
        }
        assert shapes == {(int(np.prod(volume)) if volume else V,)} and len(file.getnames()) == len(
            trials[trials["split"] == "test"]
        ) * (6 if volume else 5)
    name = "wholebrain_3d" if volume else "nsdgeneral"
    mindeye.read(tmp_path, tmp_path / "out", 1, trials_per_session=6, betas=name)
    subject = open_subject(tmp_path / "out", 1)
    expected = trials.loc[subject.trials["trial"]].reset_index(drop=True).assign(run=-1)
    pd.testing.assert_frame_equal(subject.trials, expected[list(subject.trials)], check_dtype=False)
    np.testing.assert_array_equal(subject.betas, betas[subject.trials["trial"]].reshape(17, -1))
    np.testing.assert_array_equal(subject.images(ids), images)
    assert subject.protocol == "nsd-early-1" and subject.attributes.get("volume_shape") == (
        ",".join(map(str, volume)) or None
    )


def make_early(root, coco=True, held_out=(16, 17)):
    """Eight trials of the images 11 to 17 (trials 0 and 5 show image 11); the last two are in the
    val shard.
    """
    image = np.array([11, 12, 13, 14, 15, 11, *held_out])
    betas = np.random.default_rng(1).standard_normal((8, V)).astype(np.float32)
    samples = []
    for trial in range(8):
        fields = {
            "jpg": png(np.full((4, 4, 3), image[trial], np.uint8)),
            "nsdgeneral.npy": npy(betas[trial]),
            "trial.npy": npy(np.int64(trial)),
        }
        samples.append(
            (f"{trial:05d}", fields | ({"coco73k.npy": npy(image[trial])} if coco else {}))
        )
    tar(root / "webdataset" / "train" / "train_subj01_0.tar", samples[3:6])
    tar(root / "webdataset" / "train" / "train_subj01_1.tar", samples[:3])
    tar(root / "webdataset" / "val" / "val_subj01_0.tar", samples[6:])
    return image, betas


@pytest.mark.filterwarnings("ignore:.*metadata_subj01.json is missing")
def test_mindeye_early_release_held_out_trials_are_the_test_set(tmp_path):
    image, betas = make_early(tmp_path)
    mindeye.read(tmp_path, tmp_path / "out", 1, val_images=2, seed=3)
    subject = open_subject(tmp_path / "out", 1)
    np.testing.assert_array_equal(subject.trials["image"], image[subject.trials["trial"]])
    np.testing.assert_array_equal(subject.betas, betas[subject.trials["trial"]])
    assert (
        subject.image_ids("test").tolist() == [16, 17]
        and len(subject.image_ids("val")) == 2
        and len(subject.image_ids("train")) == 3
    )
    assert dict(zip(subject.trials["trial"], subject.trials["repeat"], strict=True)) == {
        t: int(t == 5) for t in range(8)
    }
    make_early(tmp_path, held_out=(12, 17))
    with pytest.raises(PerceptError, match="Image 12 is in.*splits.csv"):
        mindeye.read(tmp_path, tmp_path / "out", 1, val_images=0)
    (tmp_path / "webdataset" / "splits.csv").write_text(
        "image,split\n11,train\n12,test\n13,val\n17,test\n"
    )
    mindeye.read(tmp_path, tmp_path / "out", 1)
    settled = open_subject(tmp_path / "out", 1)
    assert [settled.image_ids(split).tolist() for split in ("train", "val", "test", "exclude")] == [
        [11],
        [13],
        [12, 17],
        [14, 15],
    ]


@pytest.mark.filterwarnings("ignore:.*metadata_subj01.json is missing")
def test_mindeye_images_of_trials_come_from_the_table_where_shards_lack_them(tmp_path):
    image, betas = make_early(tmp_path, coco=False)
    with pytest.raises(PerceptError, match="no coco73k.npy"):
        mindeye.read(tmp_path, tmp_path / "out", 1, val_images=1)
    with h5py.File(tmp_path / "COCO_73k_subj_indices.hdf5", "w") as file:
        file["subj01"] = image
    mindeye.read(tmp_path, tmp_path / "out", 1, val_images=1)
    trials = open_subject(tmp_path / "out", 1).trials
    np.testing.assert_array_equal(trials["image"], image[trials["trial"]])
    with h5py.File(tmp_path / "COCO_73k_subj_indices.hdf5", "r+") as file:
        file["subj01"][4] = 3
    make_early(tmp_path)
    with pytest.warns(UserWarning, match="Trial 4 shows image 15 in the shards, but 3 in COCO_73k"):
        mindeye.read(tmp_path, tmp_path / "out", 1, val_images=1)
    (tmp_path / "COCO_73k_subj_indices.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(PerceptError, match="COCO_73k_subj_indices.hdf5 .*cannot be read"):
        mindeye.read(tmp_path, tmp_path / "out", 1, val_images=1)


@pytest.mark.parametrize("dtype", [object, str])
@pytest.mark.parametrize("above", [True, False])
def test_mindeye_captions_from_the_curated_annotations(tmp_path, dtype, above):
    make_shards(tmp_path)
    folder = tmp_path if above else tmp_path / "webdataset_avg_split"
    texts = np.array([[f"text {i}", f" again {i} ", ""] for i in range(16)], dtype=dtype)
    np.save(folder / "COCO_73k_annots_curated.npy", texts, allow_pickle=True)
    mindeye.read(tmp_path, tmp_path / "out", 1)
    captions = open_subject(tmp_path / "out", 1).captions
    assert captions["image"].tolist() == np.repeat(np.arange(10, 16), 2).tolist() and captions[
        "caption"
    ].tolist()[:3] == ["text 10", "again 10", "text 11"]
    np.save(folder / "COCO_73k_annots_curated.npy", texts[:15], allow_pickle=True)
    with pytest.raises(PerceptError, match="a row of captions for each image up to 15"):
        mindeye.read(tmp_path, tmp_path / "out", 1)
    pd.DataFrame({"image": [10], "caption": ["ours"]}).to_parquet(
        tmp_path / "webdataset_avg_split" / "captions.parquet"
    )
    mindeye.read(tmp_path, tmp_path / "new", 1)
    assert open_subject(tmp_path / "new", 1).captions["caption"].tolist() == ["ours"]


# -------------------------------------------------------------------------------- digits69
def make_digits(path, n=40, n_test=4):
    """Synthetic stand-in: image i has pixel (row 2 + i // 28, column i mod 28) lit."""
    rng = np.random.default_rng(0)
    images = np.zeros((n, 28, 28), np.uint8)
    images[np.arange(n), 2 + np.arange(n) // 28, np.arange(n) % 28] = 255
    labels = np.tile([1, 2], n // 2)
    betas = rng.standard_normal((n, V))
    digits69_format.write(path, betas, images, labels, n_test)
    return betas, images, labels


def test_digits69_is_written_column_by_column_and_read_upright(tmp_path):
    betas, images, labels = make_digits(tmp_path / "d.mat")
    content = scipy.io.loadmat(tmp_path / "d.mat")
    assert content["stimTrn"].shape == (36, 784) and content["labelTest"].shape == (4, 1)
    np.testing.assert_array_equal(content["stimTrn"][5].reshape(28, 28, order="F"), images[5])
    digits69.read(tmp_path / "d.mat", tmp_path / "out", 1, val=6)
    subject = open_subject(tmp_path / "out", 1)
    np.testing.assert_array_equal(subject.betas, betas.astype(np.float32))
    np.testing.assert_array_equal(
        subject.images(np.arange(40)), np.repeat(images[..., None], 3, -1)
    )
    assert (
        subject.image_ids("test").tolist() == [36, 37, 38, 39]
        and len(subject.image_ids("val")) == 6
    )
    assert (
        subject.protocol == "digits69-official"
        and "Donders" in subject.attributes["acknowledgement"]
    )
    assert subject.labels["digit"].tolist() == [{1: "six", 2: "nine"}[d] for d in labels]


def test_digits69_folds_are_stratified_and_cover_everything(tmp_path):
    _, _, labels = make_digits(tmp_path / "d.mat")
    seen = []
    for fold in range(1, 6):
        digits69.read(tmp_path / "d.mat", tmp_path / "out", split=f"fold-{fold}-of-5", val=4)
        subject = open_subject(tmp_path / "out", 1)
        test, val = subject.image_ids("test"), subject.image_ids("val")
        assert subject.protocol == f"digits69-5fold-{fold}"
        assert np.bincount(labels[test]).tolist() == [0, 4, 4] and np.bincount(
            labels[val]
        ).tolist() == [
            0,
            2,
            2,
        ]
        assert len(subject.all_images) == 40
        seen += test.tolist()
    assert sorted(seen) == list(range(40))
    digits69.read(tmp_path / "d.mat", tmp_path / "out", split="fold-5-of-5", val=0)
    again = open_subject(tmp_path / "out", 1)
    assert again.image_ids("test").tolist() == test.tolist() and len(again.image_ids("val")) == 0
    digits69.read(tmp_path / "d.mat", tmp_path / "out", split="fold-5-of-5", seed=1)
    assert open_subject(tmp_path / "out", 1).test_set != again.test_set


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "fold-0-of-10"}, "fold-0-of-10"),
        ({"split": "fold-11-of-10"}, "folds counted from 1"),
        ({"split": "random"}, "official"),
        ({"val": 36}, "val is 36"),
        ({"subj": 2}, "one subject"),
    ],
)
def test_digits69_bad_options(tmp_path, options, message):
    make_digits(tmp_path / "d.mat")
    with pytest.raises(PerceptError, match=message):
        digits69.read(tmp_path / "d.mat", tmp_path / "out", **options)


def test_digits69_other_files(tmp_path):
    with pytest.raises(PerceptError, match="absent: request .*Donders Repository"):
        digits69.read(tmp_path / "digit69_28x28.mat", tmp_path / "out")
    (tmp_path / "bad.mat").write_bytes(b"no MATLAB file at all" * 20)
    with pytest.raises(PerceptError, match="bad.mat is damaged or cut off, or of another kind"):
        digits69.read(tmp_path / "bad.mat", tmp_path / "out")
    scipy.io.savemat(tmp_path / "other.mat", {"x": 1})
    with pytest.raises(PerceptError, match="lacks .*fmriTrn"):
        digits69.read(tmp_path / "other.mat", tmp_path / "out")


def test_digits69_the_real_file(digits69_path, tmp_path):
    digits69.read(digits69_path, tmp_path / "out", 1)
    subject = open_subject(tmp_path / "out", 1)
    assert subject.betas.shape == (100, 3092)
    assert [len(subject.image_ids(s)) for s in ("train", "val", "test")] == [80, 10, 10]
    digit = subject.labels.set_index("image")["digit"]
    assert digit[subject.image_ids("test")].tolist() == ["six"] * 5 + ["nine"] * 5
    assert digit[subject.image_ids("val")].value_counts().to_dict() == {"six": 5, "nine": 5}
    # upright: a six is wider below, where its loop is, and a nine above; transposed, both would be
    # wider below
    images = subject.images(np.arange(100))[..., 0].astype(float)
    is_six = (digit[np.arange(100)] == "six").to_numpy()

    def width(part):
        weight = part.sum(1) / part.sum((1, 2))[:, None]
        return np.sqrt((weight * (np.arange(28) - (weight @ np.arange(28))[:, None]) ** 2).sum(1))

    wider_below = width(images[:, 15:]) - width(images[:, :13])
    assert wider_below[is_six].mean() > 0.5 and wider_below[~is_six].mean() < -0.5
    folds = [
        digits69.split_images(
            np.where(is_six, 1, 2), np.zeros(100, bool), f"fold-{k}-of-10", 10, 42
        )
        for k in (3, 4)
    ]
    assert [name for _, name in folds] == ["digits69-10fold-3", "digits69-10fold-4"]
    assert not np.any((folds[0][0] == "test") & (folds[1][0] == "test"))


# -------------------------------------------------------------------------------- npz
def test_npz_with_everything(tmp_path):
    betas, trials, images, ids = make_arrays()
    index = pd.Index(ids).get_indexer(trials["image"])
    columns = {key: trials[key].to_numpy() for key in ("session", "run", "repeat", "trial")}
    extra = {
        "split": trials["split"].to_numpy().astype(str),
        "image_ids": ids,
        "captions": np.array([f"c{i}" for i in ids]),
        "labels": np.array(list("ababab")),
        "roi_V1": np.arange(V) < 2,
        "xyz": np.ones((V, 3)),
        "units": "percent",
        "normalisation": "none",
        "protocol": "mine",
    }
    npz_format.write(tmp_path / "a.npz", betas, images, image_index=index, **columns, **extra)
    npz.read(tmp_path / "a.npz", tmp_path / "out", 4)
    subject = open_subject(tmp_path / "out", 4)
    np.testing.assert_array_equal(subject.betas, betas)
    pd.testing.assert_frame_equal(subject.trials, trials[list(subject.trials)], check_dtype=False)
    np.testing.assert_array_equal(subject.images(ids), images)
    assert subject.protocol == "mine" and subject.attributes["units"] == "percent"
    assert (
        list(subject.voxels) == ["voxel", "V1", "x", "y", "z"] and subject.voxels["V1"].sum() == 2
    )
    assert subject.captions.set_index("image").loc[92, "caption"] == "c92"
    assert subject.labels.set_index("image").loc[92, "label"] == "b"


def test_npz_defaults_split_by_image(tmp_path):
    rng = np.random.default_rng(0)
    index = np.tile(np.arange(20), 3)
    np.savez(
        tmp_path / "b.npz",
        betas=rng.standard_normal((60, V)),
        image_index=index,
        images=rng.integers(0, 256, (20, 4, 4), dtype=np.uint8),
    )
    npz.read(tmp_path / "b.npz", tmp_path / "out")
    subject = open_subject(tmp_path / "out", 1)
    assert [len(subject.image_ids(s)) for s in ("train", "val", "test")] == [16, 2, 2]
    assert (
        subject.protocol == "b-random-seed42"
        and subject.trials["repeat"].tolist() == [0] * 20 + [1] * 20 + [2] * 20
    )
    npz.read(tmp_path / "b.npz", tmp_path / "out", seed=7, test=0.25)
    other = open_subject(tmp_path / "out", 1)
    assert other.protocol == "b-random-seed7" and len(other.image_ids("test")) == 5
    images = subject.images([3])
    assert images.shape == (1, 4, 4, 3) and (images[..., 0] == images[..., 2]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": None}, r"lacks the arrays \['betas'\]"),
        ({"subject": np.zeros(3)}, r"unknown \['subject'\]"),
        ({"betas": np.zeros(5)}, r"must be \(trials, voxels\)"),
        ({"images": np.full((6, 4, 4, 3), -0.5)}, "from -0.5 to -0.5: pixels must be"),
        ({"images": np.zeros((6, 3, 4, 4), np.uint8)}, r"have shape \(6, 3, 4, 4\)"),
        ({"image_index": None}, "no image_index"),
        ({"image_index": np.zeros(3, int)}, r"must be \(12,\)"),
        ({"image_index": np.full(12, 6)}, "is 6 in row 0"),
        ({"image_index": np.zeros(12)}, "must hold integers"),
        ({"split": np.array(["train", "test"] * 6)}, "both|is in"),
        ({"split": np.array(["dev"] * 12)}, "dev"),
        ({"xyz": np.zeros((3, 3))}, "xyz"),
        ({"roi_V1": np.zeros(3)}, "roi_V1"),
        ({"captions": np.array(["a", None] * 3, dtype=object)}, "cannot be read"),
        ({"betas": np.full((12, V), np.nan)}, "trial 0 .*voxel 0 is nan"),
    ],
)
def test_npz_refusals(tmp_path, change, message):
    arrays = {
        "betas": np.ones((12, V)),
        "images": np.arange(6 * 48, dtype=np.uint16).astype(np.uint8).reshape(6, 4, 4, 3),
        "image_index": np.repeat(np.arange(6), 2),
    } | change
    np.savez(tmp_path / "c.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(PerceptError, match=message):
        npz.read(tmp_path / "c.npz", tmp_path / "out")
    assert not (tmp_path / "out" / "subj01").exists()


def test_npz_damaged(tmp_path):
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(PerceptError, match="cannot be read"):
        npz.read(tmp_path / "d.npz", tmp_path / "out")
    np.save(tmp_path / "e.npy", np.zeros(3))
    with pytest.raises(PerceptError, match="one bare array"):
        npz.read(tmp_path / "e.npy", tmp_path / "out")


# ------------------------------------------------------- the mini world, whatever it is written as
PLAYED = (
    "mindeye",
    "mindeye2",
    "nsd",
    "algonauts",
    "bold5000",
    "god",
    "things",
    "bids",
    "laion_fmri",
)


@pytest.fixture(scope="module")
def mini():
    return miniworld.simulate(1, 40, 10, 12, trials_per_session=62)


@pytest.mark.parametrize("name", PLAYED)
def test_every_format_gives_the_same_mini_world(name, mini, tmp_path):
    """As notebook 00 writes and reads it: betas by trial or, where a format holds means, by image;
    images, splits, sessions.
    """
    trials, betas = (
        mini.scan.trials,
        np.round(mini.scan.betas * 300) / np.float32(300),
    )  # NSD stores integers
    WRITERS[name](
        tmp_path / "source",
        1,
        dataclasses.replace(SourceData.from_world(mini), betas=betas),
    )
    attributes = {
        "source": "mini world",
        "units": "simulated",
        "normalisation": "none",
        "protocol": "mini-12",
    }
    read_source(
        name,
        tmp_path / "source",
        tmp_path / "prepared",
        1,
        seed=1,
        trials_per_session=62,
        attributes=attributes,
    )
    subject = open_subject(tmp_path / "prepared", 1)
    assert subject.protocol == "mini-12" and subject.attributes["source"] == "mini world"
    for split in ("train", "val", "test"):
        ids = np.unique(trials.loc[trials.split == split, "image"])
        np.testing.assert_array_equal(subject.image_ids(split), ids)
        np.testing.assert_array_equal(
            subject.images(ids), mini.images[np.searchsorted(mini.image_ids, ids)]
        )
        want = np.stack([betas[(trials.image == i).to_numpy()].mean(0) for i in ids])
        np.testing.assert_allclose(subject.get_mean_betas(split)[0], want, atol=2e-6)
    if name != "algonauts":  # which holds the mean of an image's repeats
        mine = subject.trials.set_index("trial").loc[trials.trial]
        np.testing.assert_array_equal(mine.image, trials.image)
        np.testing.assert_array_equal(mine.session, trials.session)
        np.testing.assert_array_equal(mine.repeat, trials.repeat)
        np.testing.assert_allclose(
            subject.betas[np.argsort(subject.trials.trial.to_numpy())], betas, atol=1e-6
        )
    assert (
        {"V1", "hV4"} <= set(subject.voxels.columns)
        and (subject.captions is not None)
        and (subject.labels is not None)
    )


@pytest.mark.parametrize(
    "text, said",
    [
        ("{voxel: 1}", "voxel"),
        ("[1]", "name: value"),
        ("{seed: 1", "not YAML"),
        ("{val_images: many}", "type of its default"),
        ("{val_images: true}", "type of its default"),
        ("{val_images: 010}", "type of its default"),
        ("{val_images: 1:30}", "type of its default"),
        ("{val_images: .inf}", "type of its default"),
        ("{roi: a, roi: b}", "'roi' twice"),
        ("{seed: -1}", "choose 0 to 4294967295"),
    ],
)
def test_options_of_a_reader_are_checked(text, said):
    with pytest.raises(PerceptError, match=said):
        parse_options("nsd", text)
    assert parse_options("nsd", "{roi: streams}", seed=3, folds="no such option") == {
        "seed": 3,
        "roi": "streams",
    }
    with pytest.raises(PerceptError, match="There is no reader of 'nds'"):
        parse_options("nds", "")

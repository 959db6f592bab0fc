"""src.readers.mindeye2: what `write` writes is read back, and files made with tarfile, numpy and
h5py from the layout's description are read.
"""

import dataclasses
import inspect
import io
import shutil
import tarfile

import h5py
import numpy as np
import pandas as pd
import pytest

from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.miniworld.formats import SourceData
from src.miniworld.formats import mindeye2 as mindeye2_format
from src.readers import mindeye2
from src.utils import PerceptError

V, SESSION = 5, 4  # voxels, trials a session


# ------------------------------------------------------------------ the mini world, there and back
@pytest.fixture(scope="module")
def worlds():
    return {subject: simulate(subject, 40, 10, 12, trials_per_session=31) for subject in (1, 2)}


@pytest.fixture(scope="module")
def published(worlds, tmp_path_factory):
    """Both subjects in one source."""
    source = tmp_path_factory.mktemp("mindeye2")
    for subject, world in worlds.items():
        mindeye2_format.write(source, subject, SourceData.from_world(world))
    return source


def check_same(subject, world, kept):
    """The prepared subject is the mini world's, without the trials that were not kept."""
    expected = world.scan.trials[kept].sort_values("trial")
    columns = ["trial", "image", "session", "run", "split"]
    pd.testing.assert_frame_equal(
        subject.trials[columns], expected[columns].reset_index(drop=True), check_dtype=False
    )
    np.testing.assert_array_equal(subject.betas, world.scan.betas[expected.index])
    shown = subject.all_images
    np.testing.assert_array_equal(
        subject.images(shown), world.images[pd.Index(world.image_ids).get_indexer(shown)]
    )


@pytest.mark.parametrize("number", [1, 2])
def test_the_mini_world_there_and_back(worlds, published, tmp_path, number):
    world = worlds[number]
    for subj in (1, 2):  # two subjects in one dataset
        mindeye2.read(published, tmp_path / "out", subj)
    subject = open_subject(tmp_path / "out", number)
    check_same(subject, world, np.ones(len(world.scan.trials), bool))
    pd.testing.assert_series_equal(
        subject.trials["repeat"],
        world.scan.trials.sort_values("trial")["repeat"].reset_index(drop=True),
        check_dtype=False,
    )
    pd.testing.assert_frame_equal(subject.voxels, world.scan.voxels)
    assert [len(subject.image_ids(split)) for split in ("train", "val", "test")] == [40, 10, 12]
    assert (
        subject.protocol == "nsd-1000"
        and subject.betas.dtype == np.float32
        and subject.attributes["sessions"] == 6
    )
    assert set(subject.captions["image"]) >= set(world.image_ids) and set(
        subject.labels["image"]
    ) >= set(world.image_ids)


def test_the_first_sessions_alone_leave_the_test_set_whole(worlds, published, tmp_path):
    whole, trials = worlds[1], worlds[1].scan.trials
    mindeye2.read(published, tmp_path / "out", 1, sessions=2)
    subject = open_subject(tmp_path / "out", 1)
    check_same(subject, whole, ((trials["split"] == "test") | (trials["session"] < 2)).to_numpy())
    assert subject.attributes["sessions"] == 2 and len(subject.image_ids("test")) == 12
    training = subject.trials[subject.trials["split"] != "test"]
    assert (
        training["session"].max() == 1
        and (
            training.groupby("image")["repeat"].max() + 1 == training.groupby("image").size()
        ).all()
    )


def test_the_older_test_split_ends_three_sessions_earlier(worlds, published, tmp_path):
    whole, trials = worlds[1], worlds[1].scan.trials
    mindeye2.read(published, tmp_path / "out", 1, protocol="nsd-982")
    subject = open_subject(tmp_path / "out", 1)
    last = trials["session"].max()
    check_same(
        subject, whole, ((trials["split"] != "test") | (trials["session"] <= last - 3)).to_numpy()
    )
    assert subject.protocol == "nsd-982"
    assert (
        subject.trials.loc[subject.trials["split"] == "test", "session"].max()
        <= last - 3
        < subject.trials["session"].max()
    )


def test_half_precision_betas_stay_so(worlds, tmp_path):
    world = worlds[1]
    half = world.scan.betas.astype(np.float16)
    mindeye2_format.write(tmp_path, 1, SourceData.from_world(world))
    mindeye2_format.write(
        tmp_path, 1, dataclasses.replace(SourceData.from_world(world), betas=half)
    )
    assert [path.name for path in tmp_path.glob("betas*")] == ["betas_subj01.hdf5"]
    mindeye2.read(tmp_path, tmp_path / "out", 1, image_size=16)
    subject = open_subject(tmp_path / "out", 1)
    assert (
        subject.betas.dtype == np.float16
        and "test trials included" in subject.attributes["normalisation"]
    )
    np.testing.assert_array_equal(subject.betas, half[np.argsort(world.scan.trials["trial"])])
    assert subject.images(subject.all_images[:1]).shape == (1, 16, 16, 3)


def test_written_samples_are_the_published_ones(worlds, published):
    trials = worlds[1].scan.trials.sort_values("trial").reset_index(drop=True)
    with tarfile.open(published / "wds" / "subj01" / "train" / "1.tar") as file:
        members = {
            name: np.load(io.BytesIO(file.extractfile(name).read())) for name in file.getnames()
        }
    expected = trials[(trials["session"] == 1) & (trials["split"] != "test")]
    behav = np.concatenate(
        [array for name, array in members.items() if name.endswith(".behav.npy")]
    )
    np.testing.assert_array_equal(behav[:, 5], expected["trial"])
    np.testing.assert_array_equal(behav[:, 2], np.full(len(expected), 2))
    assert list(members)[:4] == [
        f"sample000000000.{name}.npy"
        for name in ("behav", "past_behav", "future_behav", "olds_behav")
    ]
    for number, (_, row) in enumerate(expected.iterrows()):
        past, future, olds = (
            members[f"sample{number:09d}.{name}.npy"]
            for name in ("past_behav", "future_behav", "olds_behav")
        )
        assert (past.shape, future.shape, olds.shape) == (
            (15, 17),
            (15, 17),
            (3, 17),
        ) and past.dtype == np.float64
        before = np.arange(row["trial"] - 1, row["trial"] - 16, -1)
        np.testing.assert_array_equal(
            past[:, 5], np.where(trials["session"].reindex(before).to_numpy() == 1, before, -1)
        )
        after = np.arange(row["trial"] + 1, row["trial"] + 16)
        np.testing.assert_array_equal(
            future[:, 5], np.where(trials["session"].reindex(after).to_numpy() == 1, after, -1)
        )
        again = trials[(trials["image"] == row["image"]) & (trials["trial"] != row["trial"])][
            "trial"
        ].tolist()
        assert olds[:, 5].tolist() == (again + [-1] * 3)[:3]


def test_writing_a_subject_again_replaces_only_that_subject(worlds, published, tmp_path):
    world = worlds[2]
    fewer = (world.scan.trials["session"] < 2).to_numpy()
    mindeye2_format.write(tmp_path, 1, SourceData.from_world(worlds[1]))
    mindeye2_format.write(tmp_path, 2, SourceData.from_world(world))
    mindeye2_format.write(
        tmp_path,
        2,
        dataclasses.replace(
            SourceData.from_world(world),
            betas=world.scan.betas[fewer],
            trials=world.scan.trials[fewer].reset_index(drop=True),
        ),
    )
    assert (
        len(list((tmp_path / "wds/subj02/train").glob("*.tar"))) == 2
        and len(list((tmp_path / "wds/subj01/train").glob("*.tar"))) == 6
    )
    for subj in (1, 2):
        mindeye2.read(tmp_path, tmp_path / "out", subj)
    check_same(
        open_subject(tmp_path / "out", 1), worlds[1], np.ones(len(worlds[1].scan.trials), bool)
    )
    check_same(open_subject(tmp_path / "out", 2), world, fewer)


def test_write_refusals(worlds, tmp_path):
    world = worlds[1]
    trials, given = world.scan.trials, (world.images, world.image_ids)
    with pytest.raises(PerceptError, match="do not fit each other"):
        mindeye2_format.write(tmp_path, 1, SourceData(world.scan.betas[1:], trials, *given))
    with pytest.raises(PerceptError, match="is not among the images"):
        mindeye2_format.write(
            tmp_path, 1, SourceData(world.scan.betas, trials, given[0][1:], given[1][1:])
        )
    with pytest.raises(PerceptError, match="count from 0, each once"):
        mindeye2_format.write(
            tmp_path, 1, SourceData(world.scan.betas, trials.assign(trial=3), *given)
        )
    assert not list(tmp_path.iterdir())


# --------------------------------------------------- files made from the description of the layout
def add_trials(path, behav):
    """A tar of trials: behav (n, 17), and a member that no reader may decode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(behav):
            buffer = io.BytesIO()
            np.save(buffer, row[None])
            for name, content in (("behav", buffer.getvalue()), ("past_behav", b"never decoded")):
                info = tarfile.TarInfo(f"sample{number:09d}.{name}.npy")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def plain(tmp_path):
    """Five sessions of four trials of subject 2: the images 10, 11, 12 are shared, 20 to 29 are
    not.

    Returns folder, betas, images and behav.
    """
    rng, source = np.random.default_rng(3), tmp_path / "source"
    image = np.array(
        [20, 10, 21, 22, 20, 11, 23, 10, 24, 12, 21, 25, 26, 10, 24, 27, 28, 12, 29, 20]
    )
    behav = np.full((20, 17), -1.0)
    behav[:, 0], behav[:, 1], behav[:, 2], behav[:, 5] = (
        image,
        2,
        np.arange(20) // SESSION + 1,
        np.arange(20),
    )
    behav[:, 3], behav[:, 16] = 1 + np.arange(20) % SESSION // 2, image < 20
    test = image < 20
    for session in range(5):
        add_trials(
            source / f"wds/subj02/train/{session}.tar",
            behav[~test & (np.arange(20) // SESSION == session)],
        )
    add_trials(source / "wds/subj02/new_test/0.tar", behav[test][::-1])
    add_trials(source / "wds/subj02/test/0.tar", behav[test & (np.arange(20) < 2 * SESSION)])
    betas = rng.standard_normal((20, V)).astype(np.float32)
    images = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    with h5py.File(source / "betas_all_subj02_fp32_renorm.hdf5", "w") as file:
        file["betas"] = betas
    with h5py.File(source / "coco_images_224_float16.hdf5", "w") as file:
        file.create_dataset(
            "images",
            data=(images / 255).astype(np.float16).transpose(0, 3, 1, 2),
            chunks=(1, 3, 8, 8),
            compression="gzip",
        )
    with h5py.File(source / "COCO_73k_subj_indices.hdf5", "w") as file:
        file["subj01"], file["subj02"] = np.zeros(3, int), image
    with h5py.File(source / "brain_region_masks.hdf5", "w") as file:
        file["subj02/V1"], file["subj02/nsd_general"], file["subj02/V2"] = (
            np.arange(V) < 2,
            np.ones(V, bool),
            np.zeros(V, bool),
        )
    np.save(source / "shared1000.npy", np.isin(np.arange(30), [10, 11, 12]))
    return source, betas, images, behav


def test_the_published_layout(plain, tmp_path):
    source, betas, images, behav = plain
    folder = mindeye2.read(source, tmp_path / "out", 2, val_images=3)
    subject = open_subject(tmp_path / "out", 2)
    assert folder == subject.path
    np.testing.assert_array_equal(subject.betas, betas)
    trials = subject.trials
    np.testing.assert_array_equal(trials["image"], behav[:, 0])
    np.testing.assert_array_equal(trials["session"], behav[:, 2] - 1)
    np.testing.assert_array_equal(trials["run"], behav[:, 3] - 1)
    assert trials.loc[trials["image"] == 10, "repeat"].tolist() == [0, 1, 2]
    assert (
        subject.image_ids("test").tolist() == [10, 11, 12]
        and len(subject.image_ids("val")) == 3
        and len(subject.image_ids("train")) == 7
    )
    np.testing.assert_array_equal(subject.images(subject.all_images), images[subject.all_images])
    assert list(subject.voxels) == ["V1", "nsd_general"] and subject.voxels["V1"].sum() == 2
    assert (
        subject.attributes["sessions"] == 5
        and "MindEye2" in subject.attributes["source"]
        and subject.captions is None
    )
    mindeye2.read(source, tmp_path / "out", 2, protocol="nsd-982", val_images=0, sessions=1)
    older = open_subject(tmp_path / "out", 2)
    assert older.trials["trial"].tolist() == [0, 1, 2, 3, 5, 7] and older.image_ids(
        "test"
    ).tolist() == [10, 11]
    np.testing.assert_array_equal(older.betas, betas[[0, 1, 2, 3, 5, 7]])


def test_only_the_needed_files_must_be_there(plain, tmp_path):
    source, betas, *_ = plain
    for name in (
        "COCO_73k_subj_indices.hdf5",
        "brain_region_masks.hdf5",
        "shared1000.npy",
        "wds/subj02/test/0.tar",
    ):
        (source / name).unlink()
    mindeye2.read(source, tmp_path / "out", 2, val_images=0, attributes={"units": "percent"})
    subject = open_subject(tmp_path / "out", 2)
    np.testing.assert_array_equal(subject.betas, betas)
    assert subject.attributes["units"] == "percent" and list(subject.voxels) == ["voxel"]
    (source / "wds/subj02/train/4.tar").unlink()
    (source / "wds/subj02/train/2.tar").rename(source / "wds/subj02/train/4.tar")
    with pytest.raises(
        PerceptError, match=r"train/2.tar \(training trials of session 3 of subject 2\) is missing"
    ):
        mindeye2.read(source, tmp_path / "out", 2)
    (source / "wds/subj02/train/4.tar").unlink()
    (source / "wds/subj02/train/3.tar").unlink()
    with pytest.raises(
        PerceptError, match="Session 3 of subject 2 has test trials but no training tar"
    ):
        mindeye2.read(source, tmp_path / "out", 2, val_images=0)
    mindeye2.read(source, tmp_path / "out", 2, val_images=0, sessions=2)


def test_every_value_survives_half_precision(tmp_path):
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    trials = pd.DataFrame(
        {
            "trial": [0, 1, 2],
            "image": [9, 90_000, 950_000],
            "session": 0,
            "run": -1,
            "repeat": 0,
            "split": ["train", "train", "test"],
        }
    )
    mindeye2_format.write(
        tmp_path,
        8,
        SourceData(
            np.arange(6, dtype=np.float32).reshape(3, 2),
            trials,
            np.concatenate([values, values[:, ::-1], values[:, :, ::-1]]),
            trials["image"].to_numpy(),
        ),
    )
    mindeye2.read(tmp_path, tmp_path / "out", 8)
    subject = open_subject(tmp_path / "out", 8)
    np.testing.assert_array_equal(
        subject.images([9, 950_000, 90_000]),
        np.concatenate([values, values[:, :, ::-1], values[:, ::-1]]),
    )
    assert subject.trials["run"].tolist() == [-1] * 3


# -------------------------------------------------------------------------------- errors
def replace(source, name, key, change):
    with h5py.File(source / name, "r+") as file:
        array = file[key][()]
        del file[key]
        if (changed := change(array)) is not None:
            file[key] = changed


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def spoil_trial(source, behav, column, value):
    wrong = behav[[0, 2, 3]].copy()
    wrong[1, column] = value
    add_trials(source / "wds/subj02/train/0.tar", wrong)


BETAS, PICTURES, INDICES, MASKS = (
    "betas_all_subj02_fp32_renorm.hdf5",
    "coco_images_224_float16.hdf5",
    "COCO_73k_subj_indices.hdf5",
    "brain_region_masks.hdf5",
)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda s, b: (s / BETAS).unlink(),
            r"betas_all_subj02_fp32_renorm.hdf5 \(betas of subject 2\) is missing",
        ),
        (lambda s, b: (s / PICTURES).unlink(), "coco_images_224_float16.hdf5 .* is missing"),
        (
            lambda s, b: (s / "wds/subj02/new_test/0.tar").unlink(),
            "new_test/0.tar .*nsd-1000.* is missing",
        ),
        (lambda s, b: cut(s / BETAS), "betas_all_subj02.* is damaged or cut off"),
        (lambda s, b: cut(s / PICTURES), "coco_images.* is damaged or cut off"),
        (lambda s, b: cut(s / INDICES), "COCO_73k.* is damaged or cut off"),
        (lambda s, b: cut(s / "wds/subj02/train/1.tar", 0.1), "train/1.tar is .*cut off"),
        (
            lambda s, b: replace(s, BETAS, "betas", lambda a: a.T),
            r"are \(5, 20\): they must be \(trials, voxels\)",
        ),
        (lambda s, b: replace(s, BETAS, "betas", lambda a: None), "no dataset betas"),
        (
            lambda s, b: replace(
                s, BETAS, "betas", lambda a: np.where(np.arange(20)[:, None] == 6, np.nan, a)
            ),
            "beta of trial 6 .* is nan",
        ),
        (
            lambda s, b: replace(s, PICTURES, "images", lambda a: a.transpose(0, 2, 3, 1)),
            r"floats \(images, 3, height, width\)",
        ),
        (lambda s, b: replace(s, PICTURES, "images", lambda a: a * 255), r"must be in \[0, 1\]"),
        (lambda s, b: replace(s, PICTURES, "images", lambda a: a[:29]), "a row for each up to 29"),
        (
            lambda s, b: replace(
                s, INDICES, "subj02", lambda a: np.where(np.arange(20) == 6, 29, a)
            ),
            "Trial 6 shows image 23 in the tars, another",
        ),
        (
            lambda s, b: replace(s, INDICES, "subj02", lambda a: a[:15]),
            "Trial 15 is in the tars, but .* has 15 trials",
        ),
        (
            lambda s, b: replace(s, MASKS, "subj02/V1", lambda a: a[1:]),
            r"mask of V1 has shape \(4,\), there are 5 voxels",
        ),
        (
            lambda s, b: np.save(s / "shared1000.npy", np.isin(np.arange(30), [10, 11])),
            "Trial 9 is in split test, of which .*shared1000.npy says otherwise",
        ),
        (lambda s, b: cut(s / "shared1000.npy", 0.9), "shared1000.npy is damaged or cut off"),
        (lambda s, b: cut(s / "shared1000.npy", 0), "shared1000.npy is empty"),
        (
            lambda s, b: (s / "wds/subj02/train/4.tar").unlink(),
            "Trial 16 and 2 more .* in no training tar: .*the first 4 sessions",
        ),
        (
            lambda s, b: shutil.copy(s / "wds/subj02/train/1.tar", s / "wds/subj02/train/2.tar"),
            "Trial 4 is twice in the tars",
        ),
        (lambda s, b: spoil_trial(s, b, 1, 5), "sample000000001.* is of subject 5, not 2"),
        (lambda s, b: spoil_trial(s, b, 2, 0), "sample000000001.* session 0"),
        (
            lambda s, b: spoil_trial(s, b, 0, np.nan),
            r"behav.npy of Sample sample000000001.* must be \(1, 17\)",
        ),
        (
            lambda s, b: (s / "image_ids.csv").write_text("coco,image\n10,5\n"),
            "Trial 0 shows image 20, which .*image_ids.csv does not name",
        ),
        (
            lambda s, b: (s / "image_ids.csv").write_text("coco,image\n10,5\n10,6\n"),
            "image_ids.csv needs the columns coco and image",
        ),
    ],
)
def test_what_is_wrong_is_named(plain, tmp_path, spoil, message):
    source, *_, behav = plain
    spoil(source, behav)
    with pytest.raises(PerceptError, match=message):
        mindeye2.read(source, tmp_path / "out", 2, val_images=2)
    assert not (tmp_path / "out" / "subj02").exists()


def test_an_image_on_both_sides_and_a_trial_twice(plain, tmp_path):
    source, *_, behav = plain
    for name in (INDICES, "shared1000.npy"):
        (source / name).unlink()
    spoil_trial(source, behav, 0, 10)
    with pytest.raises(PerceptError, match="Image 10 is in (test.*train|train.*test)"):
        mindeye2.read(source, tmp_path / "out", 2, val_images=0)
    spoil_trial(source, behav, 5, 0)
    with pytest.raises(PerceptError, match="Trial 0 is twice in the tars"):
        mindeye2.read(source, tmp_path / "out", 2, val_images=0)


def test_betas_with_swapped_axes_are_refused_even_where_nothing_tells_the_voxels(plain, tmp_path):
    source = plain[0]
    for name in (INDICES, MASKS, "shared1000.npy"):
        (source / name).unlink()
    replace(source, BETAS, "betas", lambda a: np.zeros((100, 20), np.float32))
    with pytest.raises(PerceptError, match=r"are \(100, 20\): they must be \(trials, voxels\)"):
        mindeye2.read(source, tmp_path / "out", 2, val_images=2)


def test_behaviour_that_is_not_used_may_be_missing(plain, tmp_path):
    source, betas, _, behav = plain
    spoil_trial(source, behav, 9, np.nan)  # no reaction time
    mindeye2.read(source, tmp_path / "out", 2, val_images=2)
    np.testing.assert_array_equal(open_subject(tmp_path / "out", 2).betas, betas)


def test_missing_source_subject_and_options(plain, tmp_path):
    source = plain[0]
    for options, message in (
        ({"source": tmp_path / "nowhere"}, "nowhere"),
        ({"subj": 3}, "tars of subject 3"),
        ({"protocol": "nsd-515"}, "nsd-1000, nsd-982"),
        ({"sessions": -1}, "not negative"),
        ({"sessions": 6}, "session 6 of subject 2.* is missing"),
        ({"val_images": 9}, "val_images is 9"),
    ):
        with pytest.raises(PerceptError, match=message):
            mindeye2.read(**{"source": source, "dataset": tmp_path / "out", "subj": 2} | options)
    assert not (tmp_path / "out").exists()


def test_contract_of_a_reader():
    parameters = list(inspect.signature(mindeye2.read).parameters.values())
    assert [p.name for p in parameters[:3]] == ["source", "dataset", "subj"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[3:])
    assert "naturalscenesdataset.org" in mindeye2.TERMS

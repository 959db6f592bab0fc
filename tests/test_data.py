"""src.data: writing and reading the prepared layout, and its checks."""

import errno
import pickle
import shutil
from collections import namedtuple

import h5py
import numpy as np
import pandas as pd
import pytest

from src import data, utils
from src.data.images import ImageStore, write_images
from src.data.layout import check_trials, write_image_table, write_subject
from src.data.subject import open_subject
from src.data.targets import cache_targets
from src.utils import PerceptError
from tests.toy_data import ATTRIBUTES, N_VOXELS, make_trials, make_world, prepare


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_written_subject_is_read(tmp_path, dtype):
    betas, trials, images, ids = prepare(tmp_path, dtype)
    subject = open_subject(tmp_path, 1)
    assert isinstance(subject.betas, np.memmap) and not subject.betas.flags.writeable
    assert subject.betas.dtype == (np.float16 if dtype == np.float16 else np.float32)
    np.testing.assert_array_equal(subject.betas, betas.astype(subject.betas.dtype))
    pd.testing.assert_frame_equal(
        subject.trials, trials[list(data.TRIAL_COLUMNS)], check_dtype=False
    )
    order = np.array([5, 0, 3, 3])
    np.testing.assert_array_equal(subject.images(ids[order]), images[order])
    assert (
        subject.attributes.items()
        >= {**ATTRIBUTES, "n_trials": len(betas), "n_voxels": N_VOXELS}.items()
    )
    assert subject.protocol == "toy" and subject.captions is None and subject.labels is None
    assert len(subject.voxels) == N_VOXELS and subject.sessions.tolist() == [0, 1]
    subject.verify()


def test_betas_are_contiguous_and_uncompressed(world):
    with h5py.File(world.folder / "subj01" / "betas.h5") as file:
        stored = file["betas"]
        assert stored.chunks is None and stored.compression is None
        offset = stored.id.get_offset()
    raw = np.fromfile(
        world.folder / "subj01" / "betas.h5", np.float32, world.betas.size, offset=offset
    )
    np.testing.assert_array_equal(raw.reshape(world.betas.shape), world.betas)


def test_blocks_are_the_same_as_one_array(world):
    blocks = (world.betas[i : i + 5] for i in range(0, len(world.betas), 5))
    write_subject(world.folder / "subj02", blocks, world.trials, None, ATTRIBUTES)
    rewritten = open_subject(world.folder, 2)
    np.testing.assert_array_equal(rewritten.betas, world.betas)
    assert rewritten.attributes["checksum"] == world.subject.attributes["checksum"]


def test_volumes_are_kept_and_seen_flat(tmp_path):
    trials = make_trials()
    volumes = np.random.default_rng(0).standard_normal((len(trials), 2, 3, 4)).astype(np.float32)
    write_images(
        tmp_path / "images.h5", np.zeros((12, 2, 2, 3), np.uint8), np.unique(trials["image"])
    )
    write_subject(tmp_path / "subj01", volumes, trials, None, ATTRIBUTES)
    subject = open_subject(tmp_path, 1)
    assert subject.volume_shape == (2, 3, 4)
    np.testing.assert_array_equal(subject.betas, volumes.reshape(len(trials), -1))


def test_subject_can_be_pickled_without_its_betas(world):
    _ = world.subject.betas, world.subject.images(world.ids[:1])
    stored = pickle.dumps(world.subject)
    np.testing.assert_array_equal(pickle.loads(stored).betas, world.betas)
    assert "betas" not in world.subject.__getstate__()


def test_dataset_names_hang_on_home(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "HOME", tmp_path)
    prepare(tmp_path / "data" / "toy")
    assert (
        open_subject("toy", 1).folder
        == tmp_path / "data" / "toy"
        == open_subject("data/toy", 1).folder
    )
    assert open_subject(tmp_path / "data" / "toy", 1).subj == 1


def test_image_on_both_sides_is_refused_by_name():
    trials = make_trials()
    check_trials(trials)
    row = trials.index[trials["split"] == "train"][0]
    trials.loc[row, "split"] = "test"
    with pytest.raises(
        PerceptError, match=rf"Image {trials.loc[row, 'image']} is in .*test.*train|train.*test"
    ):
        check_trials(trials)
    trials.loc[row, "split"] = "exclude"
    check_trials(trials)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.drop(columns="session"), r"lacks the columns \['session'\]"),
        (lambda t: t.assign(split="dev"), r"\['dev'\]"),
        (lambda t: t.assign(trial=0), "Trial 0 is twice"),
        (lambda t: t.assign(repeat=0), "repeat 0 twice"),
        (lambda t: t.assign(session=0.5), "session .* whole numbers"),
    ],
)
def test_bad_tables_of_trials(spoil, message):
    with pytest.raises(PerceptError, match=message):
        check_trials(spoil(make_trials()))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_first_bad_beta_is_named(world, value):
    betas, trials = world.betas.copy(), world.trials.assign(trial=world.trials["trial"] + 1000)
    betas[9, 4] = betas[20, 1] = value
    blocks = (betas[i : i + 4] for i in range(0, len(betas), 4))
    with pytest.raises(PerceptError, match=r"trial 1009 \(row 9\), voxel 4"):
        write_subject(world.folder / "subj01", blocks, trials, None, ATTRIBUTES)
    np.testing.assert_array_equal(
        open_subject(world.folder, 1).betas, world.betas
    )  # the earlier one is intact
    assert sorted(p.name for p in world.folder.iterdir()) == ["images.h5", "subj01"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": np.zeros((5, N_VOXELS))}, "5 rows of betas where 36"),
        ({"betas": np.zeros((40, N_VOXELS))}, "more than the 36 rows"),
        ({"betas": np.zeros((36, N_VOXELS, 2))}, r"\(trials, voxels\)"),
        ({"betas": np.zeros((36, N_VOXELS), complex)}, "must be numbers"),
        ({"betas": [np.zeros((18, N_VOXELS)), np.zeros((18, N_VOXELS + 1))]}, "Row 18"),
        ({"voxels": pd.DataFrame({"V1": [True] * 3})}, "table of voxels has 3"),
        ({"attributes": {"source": "x"}}, "protocol"),
        ({"attributes": {**ATTRIBUTES, "list": [1]}}, "list"),
    ],
)
def test_arrays_and_tables_that_do_not_fit_are_refused(world, change, message):
    call = {
        "betas": world.betas,
        "trials": world.trials,
        "voxels": None,
        "attributes": ATTRIBUTES,
    } | change
    with pytest.raises(PerceptError, match=message):
        write_subject(world.folder / "subj01", **call)
    world.subject.verify()
    np.testing.assert_array_equal(open_subject(world.folder, 1).betas, world.betas)


def test_full_disk_before_and_during_the_write(world, monkeypatch):
    def failing():
        yield world.betas[:4]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(PerceptError, match="filled up"):
        write_subject(world.folder / "subj01", failing(), world.trials, None, ATTRIBUTES)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(PerceptError, match="No space for"):
        write_subject(world.folder / "subj01", world.betas, world.trials, None, ATTRIBUTES)
    with pytest.raises(PerceptError, match="No space for"):
        write_images(world.folder / "images.h5", world.images[:1], [7])
    with pytest.raises(PerceptError, match="No space for"):
        cache_targets(world.folder, "x", {}, world.ids, lambda x: x[:, 0, 0], (3,))
    monkeypatch.undo()
    np.testing.assert_array_equal(open_subject(world.folder, 1).betas, world.betas)
    np.testing.assert_array_equal(open_subject(world.folder, 1).images(world.ids), world.images)
    assert not list(world.folder.glob(".*"))


def test_other_errors_of_the_system_pass(world):
    def failing():
        raise PermissionError("no")
        yield

    with pytest.raises(PermissionError):
        write_subject(world.folder / "subj01", failing(), world.trials, None, ATTRIBUTES)


def test_missing_and_damaged_files(world):
    with pytest.raises(PerceptError, match="Subject 2 .* not prepared, .*betas.h5 is missing"):
        open_subject(world.folder, 2)
    path = world.folder / "subj01" / "betas.h5"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(PerceptError, match="damaged|cut off"):
        open_subject(world.folder, 1)
    path.write_bytes(content[:-100] + bytes(100))
    with pytest.raises(PerceptError, match="damaged"):
        open_subject(world.folder, 1)
    start = content.index(world.betas[7].tobytes())
    path.write_bytes(content[:start] + bytes(4) + content[start + 4 :])
    with pytest.raises(PerceptError, match="checksum"):
        open_subject(world.folder, 1).verify()
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=world.betas, chunks=True, compression="gzip")
    with pytest.raises(PerceptError, match="compressed"):
        open_subject(world.folder, 1)
    path.write_bytes(content)
    world.trials.iloc[:-1].to_parquet(path.with_name("trials.parquet"))
    with pytest.raises(PerceptError, match="prepare the data again"):
        open_subject(world.folder, 1)
    (world.folder / "images.h5").unlink()
    with pytest.raises(PerceptError, match="images.h5 is missing"):
        open_subject(world.folder, 1)


def test_images_of_several_subjects_share_a_file(tmp_path):
    path, rng = tmp_path / "images.h5", np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    write_images(path, iter([images[:1], images[1:4]]), [9, 3, 5, 1])
    write_images(path, images[[2, 4, 0, 5]], [5, 11, 9, 2])
    store = ImageStore(path)
    np.testing.assert_array_equal(store.rows([2, 9, 3, 5, 1, 11]), images[[5, 0, 1, 2, 3, 4]])
    write_images(path, images[:2], [9, 3])  # nothing new
    assert len(ImageStore(path).image_ids) == 6
    with pytest.raises(PerceptError, match="Image 9 is already"):
        write_images(path, 255 - images[:1], [9])
    with pytest.warns(UserWarning, match="1 images were stored already"):
        write_images(path, np.clip(images[:1].astype(int) + 1, 0, 255).astype(np.uint8), [9])
    np.testing.assert_array_equal(ImageStore(path).rows([9]), images[:1])
    with pytest.raises(PerceptError, match="Image 77 is not in"):
        store.rows([9, 77])


@pytest.mark.parametrize(
    ("images", "ids", "message"),
    [
        (np.zeros((2, 4, 4, 3)), [1, 2], "uint8"),
        (np.zeros((2, 4, 4), np.uint8), [1, 2], "uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), [1, 1], "unique"),
        (np.zeros((2, 4, 4, 3), np.uint8), [1, 2, 3], "2 images for 3"),
        (np.zeros((2, 4, 4, 3), np.uint8), [1], "more images than"),
        (np.zeros((2, 5, 4, 3), np.uint8), [1, 2], "5 x 4 do not fit the 4 x 4"),
    ],
)
def test_bad_images(tmp_path, images, ids, message):
    first = np.full((1, 4, 4, 3), 9, np.uint8)
    write_images(tmp_path / "images.h5", first, [50])
    with pytest.raises(PerceptError, match=message):
        write_images(tmp_path / "images.h5", images, ids)
    np.testing.assert_array_equal(ImageStore(tmp_path / "images.h5").rows([50]), first)


def test_tables_about_images_are_merged(tmp_path):
    write_image_table(
        tmp_path / "captions.parquet",
        pd.DataFrame({"image": [4, 4, 1], "caption": ["a", "b", "c"]}),
    )
    write_image_table(
        tmp_path / "captions.parquet", pd.DataFrame({"image": [1, 2], "caption": ["d", "e"]})
    )
    table = pd.read_parquet(tmp_path / "captions.parquet")
    assert list(zip(table["image"], table["caption"], strict=True)) == [
        (1, "d"),
        (2, "e"),
        (4, "a"),
        (4, "b"),
    ]
    with pytest.raises(PerceptError, match="no column image"):
        write_image_table(tmp_path / "captions.parquet", pd.DataFrame({"caption": ["a"]}))

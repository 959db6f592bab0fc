"""src.data: the prepared layout, its checks, normalisation, batches and cached targets, on a
handful of synthetic trials.
"""

import errno
import pickle
import shutil
import warnings
from collections import namedtuple

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from src import data
from src.data import layout
from src.data.batches import BrainDataset
from src.data.draws import choose_repeats
from src.data.images import ImageStore, write_images
from src.data.layout import check_trials, write_image_table, write_subject
from src.data.normaliser import Normaliser, compute_moments
from src.data.reliability import estimate_noise_ceiling
from src.data.splits import (
    cluster_images,
    make_training_split,
    open_all_sessions,
    open_training_split,
)
from src.data.subject import open_subject
from src.data.targets import cache_augmented_targets, cache_targets
from src.utils import PerceptError

ATTRIBUTES = {"source": "test", "units": "a.u.", "normalisation": "none", "protocol": "toy"}
V = 7


def make_trials(n_images=12, repeats=3, sessions=2, seed=0):
    """Every image `repeats` times in random order; ids 100, 103, 106...; the last three images
    test, the three before val.
    """
    rng = np.random.default_rng(seed)
    image = 100 + 3 * rng.permutation(np.repeat(np.arange(n_images), repeats))
    trials = pd.DataFrame({"trial": np.arange(len(image)), "image": image})
    trials["session"] = trials["trial"] * sessions // len(trials)
    trials["run"] = 0
    trials["repeat"] = data.number_repeats(trials)
    position = (trials["image"] - 100) // 3
    trials["split"] = np.select(
        [position >= n_images - 3, position >= n_images - 6], ["test", "val"], "train"
    )
    return trials


def prepare(folder, dtype=np.float32, subj=1, **options):
    trials = make_trials(**options)
    rng = np.random.default_rng(1)
    betas = (
        rng.standard_normal((len(trials), V)) * 3 + 5 * trials["session"].to_numpy()[:, None]
    ).astype(dtype)
    ids = np.unique(trials["image"])
    images = rng.integers(0, 256, (len(ids), 4, 6, 3), dtype=np.uint8)
    if not (folder / "images.h5").exists():
        write_images(folder / "images.h5", images, ids)
    write_subject(folder / f"subj{subj:02d}", betas, trials, None, ATTRIBUTES)
    return betas, trials, images, ids


@pytest.fixture
def world(tmp_path):
    betas, trials, images, ids = prepare(tmp_path)
    return namedtuple("World", "folder betas trials images ids subject")(
        tmp_path, betas, trials, images, ids, open_subject(tmp_path, 1)
    )


# -------------------------------------------------------------------------------- layout
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_written_is_read(tmp_path, dtype):
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
        subject.attributes.items() >= {**ATTRIBUTES, "n_trials": len(betas), "n_voxels": V}.items()
    )
    assert subject.protocol == "toy" and subject.captions is None and subject.labels is None
    assert len(subject.voxels) == V and subject.sessions.tolist() == [0, 1]
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
    two = open_subject(world.folder, 2)
    np.testing.assert_array_equal(two.betas, world.betas)
    assert two.attributes["checksum"] == world.subject.attributes["checksum"]


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
    monkeypatch.setattr(layout, "HOME", tmp_path)
    prepare(tmp_path / "data" / "toy")
    assert (
        open_subject("toy", 1).folder
        == tmp_path / "data" / "toy"
        == open_subject("data/toy", 1).folder
    )
    assert open_subject(tmp_path / "data" / "toy", 1).subj == 1


# -------------------------------------------------------------------------------- refusals
def test_image_on_both_sides_is_refused_by_name():
    trials = make_trials()
    check_trials(trials)
    at = trials.index[trials["split"] == "train"][0]
    trials.loc[at, "split"] = "test"
    with pytest.raises(
        PerceptError, match=rf"Image {trials.loc[at, 'image']} is in .*test.*train|train.*test"
    ):
        check_trials(trials)
    trials.loc[at, "split"] = "exclude"
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
        ({"betas": np.zeros((5, V))}, "5 rows of betas where 36"),
        ({"betas": np.zeros((40, V))}, "more than the 36 rows"),
        ({"betas": np.zeros((36, V, 2))}, r"\(trials, voxels\)"),
        ({"betas": np.zeros((36, V), complex)}, "must be numbers"),
        ({"betas": [np.zeros((18, V)), np.zeros((18, V + 1))]}, "Row 18"),
        ({"voxels": pd.DataFrame({"V1": [True] * 3})}, "table of voxels has 3"),
        ({"attributes": {"source": "x"}}, "protocol"),
        ({"attributes": {**ATTRIBUTES, "list": [1]}}, "list"),
    ],
)
def test_what_does_not_fit_is_refused(world, change, message):
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
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(PerceptError, match="damaged|cut off"):
        open_subject(world.folder, 1)
    path.write_bytes(whole[:-100] + bytes(100))
    with pytest.raises(PerceptError, match="damaged"):
        open_subject(world.folder, 1)
    at = whole.index(world.betas[7].tobytes())
    path.write_bytes(whole[:at] + bytes(4) + whole[at + 4 :])
    with pytest.raises(PerceptError, match="checksum"):
        open_subject(world.folder, 1).verify()
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=world.betas, chunks=True, compression="gzip")
    with pytest.raises(PerceptError, match="compressed"):
        open_subject(world.folder, 1)
    path.write_bytes(whole)
    world.trials.iloc[:-1].to_parquet(path.with_name("trials.parquet"))
    with pytest.raises(PerceptError, match="prepare the data again"):
        open_subject(world.folder, 1)
    (world.folder / "images.h5").unlink()
    with pytest.raises(PerceptError, match="images.h5 is missing"):
        open_subject(world.folder, 1)


# -------------------------------------------------------------------------------- images and tables
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


# ---------------------------------------------------------------------------- what a subject gives
def test_image_ids_and_test_set(world):
    subject = world.subject
    assert subject.image_ids("test").tolist() == [127, 130, 133]
    assert subject.all_images.tolist() == world.ids.tolist()
    assert subject.test_set.startswith("3-") and len(subject.test_set) == 10
    other = world.trials.assign(image=world.trials["image"] + 1)
    write_images(world.folder / "images.h5", world.images, world.ids + 1)
    write_subject(world.folder / "subj02", world.betas, other, None, ATTRIBUTES)
    assert open_subject(world.folder, 2).test_set != subject.test_set
    with pytest.raises(PerceptError, match="no split 'dev'"):
        subject.image_ids("dev")


@pytest.mark.parametrize("repeats", [None, 1, 2])
def test_averaged_against_a_loop(world, repeats):
    voxels, ids = world.subject.get_mean_betas("val", repeats)
    assert voxels.dtype == np.float32
    for row, image in zip(voxels, ids, strict=True):
        mine = world.trials[world.trials["image"] == image].sort_values("repeat").index[:repeats]
        np.testing.assert_allclose(row, world.betas[mine].mean(0), rtol=1e-5, atol=1e-6)


def test_averaged_warns_of_too_few_repeats_and_trials_of(world):
    with pytest.warns(UserWarning, match="3 of 3 test images have fewer than 5"):
        five, _ = world.subject.get_mean_betas("test", 5)
    np.testing.assert_array_equal(five, world.subject.get_mean_betas("test")[0])
    with pytest.raises(PerceptError, match="at least 1"):
        world.subject.get_mean_betas("test", 0)
    normaliser = Normaliser.fit(world.subject)
    voxels, ids = world.subject.get_trials("test", normaliser)
    rows = world.trials.index[world.trials["split"] == "test"]
    assert ids.tolist() == world.trials.loc[rows, "image"].tolist()
    expected = normaliser.apply(world.betas[rows], world.trials.loc[rows, "session"])
    np.testing.assert_array_equal(voxels, expected)


def test_noise_ceiling_recovers_what_was_simulated(tmp_path):
    rng = np.random.default_rng(3)
    trials = make_trials(n_images=600, sessions=3)
    signal_share = np.array([0.0, 0.1, 0.3, 0.6, 0.9])
    image = ((trials["image"] - 100) // 3).to_numpy()
    signal = rng.standard_normal((600, 5))[image] * np.sqrt(signal_share)
    betas = 4 * (signal + rng.standard_normal((len(trials), 5)) * np.sqrt(1 - signal_share)) + 10
    betas = np.concatenate([betas, np.full((len(betas), 1), 2.0)], 1)  # and a constant voxel
    write_images(
        tmp_path / "images.h5", np.zeros((600, 1, 1, 3), np.uint8), np.unique(trials["image"])
    )
    write_subject(tmp_path / "subj01", betas, trials, None, ATTRIBUTES)
    subject = open_subject(tmp_path, 1)
    with pytest.warns(UserWarning, match="1 of 6 voxels"):
        one, three = estimate_noise_ceiling(subject), estimate_noise_ceiling(subject, repeats=3)
    np.testing.assert_allclose(one["noise_ceiling"][:5], signal_share, atol=0.06)
    ncsnr = one["ncsnr"].to_numpy()
    np.testing.assert_allclose(
        three["noise_ceiling_percent"], 100 * ncsnr**2 / (ncsnr**2 + 1 / 3), rtol=1e-6
    )
    assert one.iloc[5].tolist() == [0, 0, 0]
    with pytest.raises(PerceptError, match="at least 1"):
        estimate_noise_ceiling(subject, 0)


def test_noise_ceiling_by_the_published_recipe(world):
    """With three repeats of every training image: noise variance = mean over images of the variance
    over repeats (ddof 1).
    """
    x, ids = world.subject.get_trials("train", Normaliser.fit(world.subject))
    noise = np.mean([x[ids == i].var(0, ddof=1) for i in np.unique(ids)], axis=0)
    ncsnr = np.sqrt(np.maximum(1 - noise, 0)) / np.sqrt(noise)
    np.testing.assert_allclose(
        estimate_noise_ceiling(world.subject)["ncsnr"], ncsnr, rtol=1e-4, atol=1e-5
    )


def test_noise_ceiling_needs_repeats(tmp_path):
    prepare(tmp_path, repeats=1)
    with pytest.raises(PerceptError, match="shown twice"):
        estimate_noise_ceiling(open_subject(tmp_path, 1))


# -------------------------------------------------------------------------------- normalisation
@pytest.mark.parametrize("by_session", [True, False])
def test_normaliser_against_numpy_on_training_trials_only(world, by_session):
    normaliser = Normaliser.fit(world.subject, by_session)
    out = normaliser.apply(world.betas, world.trials["session"])
    train, session = (
        (world.trials["split"] == "train").to_numpy(),
        world.trials["session"].to_numpy(),
    )
    for s in (0, 1):
        mine = train & (session == s) if by_session else train
        x = world.betas[mine].astype(np.float64)
        here = session == s
        np.testing.assert_allclose(
            out[here], (world.betas[here] - x.mean(0)) / x.std(0), rtol=1e-4, atol=1e-5
        )
    changed = world.betas.copy()
    changed[~train] = 1e4
    write_subject(world.folder / "subj02", changed, world.trials, None, ATTRIBUTES)
    other = Normaliser.fit(open_subject(world.folder, 2), by_session)
    np.testing.assert_array_equal(other.mean, normaliser.mean)
    np.testing.assert_array_equal(other.std, normaliser.std)


def test_moments_are_exact_far_from_zero_and_in_half_precision():
    rng = np.random.default_rng(0)
    betas = (20_000 + 16 * rng.integers(-4, 5, (700, 3))).astype(np.float16)
    mean, std = compute_moments(betas, np.arange(700))
    np.testing.assert_allclose(mean, betas.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, betas.astype(np.float64).std(0), rtol=1e-9)


@pytest.mark.parametrize("by_session", [True, False])
def test_normaliser_is_saved_and_loaded(world, tmp_path, by_session):
    normaliser = Normaliser.fit(world.subject, by_session)
    normaliser.save(tmp_path / "n.safetensors")
    loaded = Normaliser.load(tmp_path / "n.safetensors")
    sessions = world.trials["session"].to_numpy()
    np.testing.assert_array_equal(
        loaded.apply(world.betas, sessions), normaliser.apply(world.betas, sessions)
    )
    assert (loaded.sessions is None) is not by_session
    with pytest.raises(PerceptError, match="missing"):
        Normaliser.load(tmp_path / "absent.safetensors")
    (tmp_path / "bad").write_bytes(b"not safetensors")
    with pytest.raises(PerceptError, match="no safetensors"):
        Normaliser.load(tmp_path / "bad")


def test_normaliser_refusals(world):
    normaliser = Normaliser.fit(world.subject)
    with pytest.raises(PerceptError, match=r"\(trials, 7\) voxels"):
        normaliser.apply(np.zeros((2, V + 1)), [0, 0])
    with pytest.raises(PerceptError, match="session 9.*by_session=False"):
        normaliser.apply(np.zeros((1, V)), [9])
    trials = world.trials.copy()
    trials.loc[trials["split"] == "test", "session"] = 5
    write_subject(world.folder / "subj02", world.betas, trials, None, ATTRIBUTES)
    subject = open_subject(world.folder, 2)
    with pytest.warns(UserWarning, match=r"Sessions \[5\].*with all training trials"):
        by_session = Normaliser.fit(subject)
    together, rows = Normaliser.fit(subject, by_session=False), subject.rows_by_image("test")[0]
    np.testing.assert_array_equal(
        subject.get_betas(rows, by_session), subject.get_betas(rows, together)
    )  # nothing of the test trials themselves
    write_subject(
        world.folder / "subj02", world.betas, trials.assign(split="test"), None, ATTRIBUTES
    )
    with pytest.raises(PerceptError, match="no training trials"):
        Normaliser.fit(open_subject(world.folder, 2))


def test_constant_voxels_are_counted_and_become_zero(world):
    betas = world.betas.copy()
    betas[:, 2], betas[:, 5] = 0.1, 0
    write_subject(world.folder / "subj02", betas, world.trials, None, ATTRIBUTES)
    subject = open_subject(world.folder, 2)
    with pytest.warns(UserWarning, match="2 of 7 voxels"):
        normaliser = Normaliser.fit(subject)
    out = normaliser.apply(betas, world.trials["session"])
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:, [2, 5]], 0, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Normaliser.fit(world.subject)


# ---------------------------------------------------------------------------- principal components
def pictured(world, betas, trials=None):
    """Those betas as subject 2 of the same images, and a normaliser of three components."""
    write_subject(
        world.folder / "subj02", betas, world.trials if trials is None else trials, None, ATTRIBUTES
    )
    subject = open_subject(world.folder, 2)
    return subject, Normaliser.fit(subject, n_components=3)


@pytest.mark.parametrize("by_session", [True, False])
def test_components_are_those_of_an_svd_of_the_z_scored_training_trials(world, by_session):
    plain, normaliser = (
        Normaliser.fit(world.subject, by_session),
        Normaliser.fit(world.subject, by_session, n_components=3),
    )
    z, _ = world.subject.get_trials("train", plain)
    left, _, _ = np.linalg.svd(z.astype(np.float64), full_matrices=False)
    scores, ids = world.subject.get_trials("train", normaliser)
    assert (
        scores.shape == (len(z), 3)
        and scores.dtype == np.float32
        and normaliser.n_features == world.subject.n_features(normaliser) == 3
    )
    for k in range(3):
        expected = (
            left[:, k] * np.sqrt(len(z)) * np.sign(left[:, k] @ scores[:, k])
        )  # of unit variance
        np.testing.assert_allclose(scores[:, k], expected, atol=2e-4)
    np.testing.assert_allclose(scores.std(0), 1, rtol=1e-5)
    assert (
        plain.n_features == world.subject.n_features() == V
        and Normaliser.fit(world.subject).components is None
    )


def test_components_keep_nearly_the_most_variance_where_the_spectrum_is_flat(tmp_path):
    rng, trials = np.random.default_rng(5), make_trials(n_images=200)
    betas = (rng.standard_normal((600, 30)) * np.arange(60, 30, -1) / 60) @ rng.standard_normal(
        (30, 400)
    ) + 3 * rng.standard_normal((600, 400))
    write_images(
        tmp_path / "images.h5", np.zeros((200, 1, 1, 3), np.uint8), np.unique(trials["image"])
    )
    write_subject(tmp_path / "subj01", betas, trials, None, ATTRIBUTES)
    subject = open_subject(tmp_path, 1)
    z, _ = subject.get_trials("train", Normaliser.fit(subject))
    most = (np.linalg.svd(z, compute_uv=False)[:20] ** 2).sum()
    axes, _ = np.linalg.qr(Normaliser.fit(subject, n_components=20).components)
    assert ((z @ axes) ** 2).sum() > 0.9995 * most


def test_test_and_validation_trials_do_not_move_the_components(world):
    train = (world.trials["split"] == "train").to_numpy()
    _, one = pictured(world, world.betas)
    _, other = pictured(world, np.where(train[:, None], world.betas, 1e3 * world.betas[::-1]))
    np.testing.assert_array_equal(one.components, other.components)


def test_averaging_and_projecting_commute(world):
    subject, normaliser = pictured(world, world.betas)
    plain, _ = subject.get_mean_betas("val", normaliser=Normaliser.fit(subject))
    found, _ = subject.get_mean_betas("val", normaliser=normaliser)
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found, plain @ normaliser.components, atol=1e-5)
    for repeats, shape in (("mean", (2, 3)), ("random", (2, 3)), ("all", (2, 3, 3))):
        assert (
            BrainDataset(subject, "train", {}, normaliser, repeats)
            .__getitems__([0, 1])["voxels"]
            .shape
            == shape
        )


def test_components_are_saved_with_the_normaliser(world, tmp_path):
    subject, normaliser = pictured(world, world.betas)
    normaliser.save(tmp_path / "n.safetensors")
    loaded = Normaliser.load(tmp_path / "n.safetensors")
    assert loaded.n_features == 3
    np.testing.assert_array_equal(
        subject.get_mean_betas("test", normaliser=loaded)[0],
        subject.get_mean_betas("test", normaliser=normaliser)[0],
    )


@pytest.mark.filterwarnings("ignore:.*do not vary")
def test_components_refusals(world):
    for k in (V + 1, -1):
        with pytest.raises(
            PerceptError, match=f"n_components is {k}: choose 0 for all voxels, or at most 7"
        ):
            Normaliser.fit(world.subject, n_components=k)
    betas = world.betas.copy()
    betas[:, 2:] = betas[:, :1]
    with pytest.raises(
        PerceptError, match="n_components is 3, but the training trials vary in 2 dimensions only"
    ):
        pictured(world, betas)
    with pytest.raises(PerceptError, match="vary in 0 dimensions"):
        pictured(world, np.zeros_like(betas))
    with pytest.raises(PerceptError, match="noise ceiling is of voxels"):
        estimate_noise_ceiling(
            world.subject, normaliser=Normaliser.fit(world.subject, n_components=2)
        )


# -------------------------------------------------------------------------------- regions
FLAGS = {"V1": [0, 2], "V2": [2, 5], "FFA": [6], "PPA": []}


@pytest.fixture
def regions(world):
    """Subject 2: the same betas with regions, two of which share a voxel and one of which has none."""
    table = pd.DataFrame(
        {name: np.isin(np.arange(V), columns) for name, columns in FLAGS.items()}
        | {"x": np.arange(V)}
    )
    write_subject(world.folder / "subj02", world.betas, world.trials, table, ATTRIBUTES)
    return open_subject(world.folder, 2)


@pytest.mark.parametrize(
    ("rois", "columns"), [("V1", [0, 2]), ("V2, V1", [0, 2, 5]), ("FFA,V1,V1", [0, 2, 6])]
)
def test_regions_select_their_own_voxels_and_no_others(world, regions, tmp_path, rois, columns):
    everything, chosen = Normaliser.fit(world.subject), Normaliser.fit(regions, rois=rois)
    chosen.save(tmp_path / "n.safetensors")
    loaded = Normaliser.load(tmp_path / "n.safetensors")
    sessions = world.trials["session"].to_numpy()
    for normaliser in (chosen, loaded):
        np.testing.assert_array_equal(
            normaliser.apply(world.betas, sessions),
            everything.apply(world.betas, sessions)[:, columns],
        )
        assert (
            normaliser.columns.tolist() == columns
            and normaliser.n_features == regions.n_features(normaliser) == len(columns)
        )
    assert loaded.rois == tuple(dict.fromkeys(name.strip() for name in rois.split(",")))
    np.testing.assert_array_equal(
        regions.get_mean_betas("test", normaliser=loaded)[0],
        world.subject.get_mean_betas("test", normaliser=everything)[0][:, columns],
    )
    assert BrainDataset(regions, "train", {}, loaded, "all").__getitems__([1, 0])[
        "voxels"
    ].shape == (2, 3, len(columns))
    with pytest.raises(
        PerceptError, match=r"\(trials, 7\) voxels"
    ):  # whole rows, not the selected voxels
        loaded.apply(world.betas[:, columns], sessions)
    ceiling = estimate_noise_ceiling(world.subject).iloc[columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(estimate_noise_ceiling(regions, normaliser=loaded), ceiling)


def test_components_are_of_the_regions_alone(world, regions, tmp_path):
    normaliser = Normaliser.fit(regions, rois="V1,V2", n_components=2)
    assert normaliser.components.shape == (3, 2) and normaliser.n_features == 2
    z = Normaliser.fit(regions, rois="V1,V2").apply(world.betas, world.trials["session"])
    np.testing.assert_allclose(
        normaliser.apply(world.betas, world.trials["session"]), z @ normaliser.components, atol=1e-6
    )
    with pytest.raises(PerceptError, match="at most 3"):
        Normaliser.fit(regions, rois="V1,V2", n_components=4)
    normaliser.save(tmp_path / "n.safetensors")
    np.testing.assert_array_equal(
        regions.get_mean_betas("test", normaliser=Normaliser.load(tmp_path / "n.safetensors"))[0],
        regions.get_mean_betas("test", normaliser=normaliser)[0],
    )


def test_regions_that_are_missing_are_named(world, regions):
    with pytest.warns(UserWarning, match="no region hV4, PPA: 'V1' is what is taken"):
        assert Normaliser.fit(regions, rois="hV4,V1,PPA").columns.tolist() == FLAGS["V1"]
    with pytest.raises(PerceptError, match="none of the regions 'hV4,x': it has V1, V2, FFA"):
        Normaliser.fit(regions, rois="hV4,x")
    with pytest.raises(PerceptError, match="no named region"):
        Normaliser.fit(world.subject, rois="V1")


@pytest.mark.parametrize(
    ("rois", "columns"),
    [
        ("-", range(V)),
        ("!V1", [1, 3, 4, 5, 6]),
        ("!V1,!FFA", [1, 3, 4, 5]),
        ("V1,V2,!V2", [0]),
        ("-,!V2", [0, 1, 3, 4, 6]),
        ("early", [0, 2, 5]),
        ("early,FFA", [0, 2, 5, 6]),
    ],
)
def test_sets_of_regions(world, regions, monkeypatch, rois, columns):
    monkeypatch.setitem(data.ROI_SETS, "early", ("V1", "V2"))
    found, names = regions.select_rois(rois)
    assert found.tolist() == list(columns) and "early" not in names
    normaliser = Normaliser.fit(regions, rois=rois)
    assert normaliser.n_features == len(columns)
    assert (
        normaliser.columns is None if rois == "-" else normaliser.columns.tolist() == list(columns)
    )


def test_published_sets_are_those_of_the_report():
    assert {name: len(regions) for name, regions in data.ROI_SETS.items()} == {
        "set1": 10,
        "set2": 12,
        "set3": 7,
    }
    assert not set(data.ROI_SETS["set3"]) & set(data.ROI_SETS["set1"] + data.ROI_SETS["set2"])
    assert set(data.ROI_SETS["set1"]) & set(data.ROI_SETS["set2"]) == {"FFA-1", "FFA-2", "PPA"}


def test_sets_of_regions_that_cannot_be_taken(world, regions):
    with pytest.raises(PerceptError, match="none of the regions '!V9'"):
        regions.select_rois(
            "!V9"
        )  # all voxels would be another selection than the one that was asked for
    with pytest.raises(PerceptError, match="none of the regions 'V9,!V1'"):
        regions.select_rois("V9,!V1")
    with pytest.raises(PerceptError, match="no voxel in 'V1,!V1'"):
        regions.select_rois("V1,!V1")
    with pytest.raises(PerceptError, match="none of the regions 'set3'"):
        regions.select_rois("set3")
    with pytest.warns(UserWarning, match="no region V9: 'V2,!V1' is what is taken"):
        assert regions.select_rois("V2,!V1,!V9")[0].tolist() == [5]


def test_masked_regions_keep_their_places(world, regions, tmp_path):
    masked, chosen = (
        Normaliser.fit(regions, rois="V1,V2", masked=True),
        Normaliser.fit(regions, rois="V1,V2"),
    )
    masked.save(tmp_path / "n.safetensors")
    sessions = world.trials["session"].to_numpy()
    for normaliser in (masked, Normaliser.load(tmp_path / "n.safetensors")):
        whole = normaliser.apply(world.betas, sessions)
        assert normaliser.n_features == V == whole.shape[1] and normaliser.rois == ("V1", "V2")
        np.testing.assert_array_equal(whole[:, [0, 2, 5]], chosen.apply(world.betas, sessions))
        assert not whole[:, [1, 3, 4, 6]].any()
    assert regions.get_mean_betas("test", normaliser=masked)[0].shape[1] == V
    with pytest.raises(PerceptError, match="masked"):
        Normaliser.fit(regions, rois="V1,V2", masked=True, n_components=2)


def test_a_bag_is_a_seeded_share_of_the_training_images(world):
    ids, val, test = (world.subject.image_ids(split) for split in ("train", "val", "test"))
    bag = world.subject.bootstrap_split(0.7, seed=3)
    assert len(bag.image_ids("train")) == round(0.7 * len(ids))
    np.testing.assert_array_equal(np.union1d(bag.image_ids("train"), bag.image_ids("val")), ids)
    np.testing.assert_array_equal(
        bag.image_ids("exclude"), val
    )  # in no bag, and nobody's own validation either
    np.testing.assert_array_equal(bag.image_ids("test"), test)
    assert bag.test_set == world.subject.test_set
    np.testing.assert_array_equal(
        bag.image_ids("train"), world.subject.bootstrap_split(0.7, seed=3).image_ids("train")
    )
    assert any(
        set(world.subject.bootstrap_split(0.7, seed=s).image_ids("train"))
        != set(bag.image_ids("train"))
        for s in range(4, 9)
    )
    np.testing.assert_array_equal(world.subject.bootstrap_split(1.0, seed=3).image_ids("val"), val)
    for share in (0.0, 0.01, 1.2):
        with pytest.raises(PerceptError, match="leaves nothing"):
            world.subject.bootstrap_split(share, seed=0)


def test_latents_that_others_computed(tmp_path):
    latents = np.random.default_rng(0).standard_normal((5, 1, 4, 2, 2)).astype(np.float32)
    np.save(tmp_path / "fMRI_VAE.npy", latents)
    file = data.LatentFile(tmp_path / "fMRI_VAE.npy", (4, 2, 2))
    np.testing.assert_array_equal(file.rows([3, 0]), latents[[3, 0], 0])
    for wrong in (5, -1):
        with pytest.raises(PerceptError, match=f"has 5 rows, none for image {wrong}"):
            file.rows([0, wrong])
    with pytest.raises(PerceptError, match="another autoencoder"):
        data.LatentFile(tmp_path / "fMRI_VAE.npy", (4, 64, 64))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("objects.npy", "absent.npy"):
        with pytest.raises(PerceptError, match="no array of latents"):
            data.LatentFile(tmp_path / name, (4, 2, 2))


def test_a_limited_subject_keeps_a_seeded_draw_of_training_images(world):
    ids = world.subject.image_ids("train")
    kept = world.subject.subsample_train(2, seed=1)
    assert len(kept.image_ids("train")) == 2 and set(kept.image_ids("train")) < set(ids)
    for split in ("val", "test"):
        np.testing.assert_array_equal(kept.image_ids(split), world.subject.image_ids(split))
    assert kept.test_set == world.subject.test_set and (
        kept.trials["split"] == "exclude"
    ).sum() == 3 * (len(ids) - 2)
    np.testing.assert_array_equal(
        kept.image_ids("train"), world.subject.subsample_train(2, seed=1).image_ids("train")
    )
    assert any(
        set(world.subject.subsample_train(2, seed=s).image_ids("train"))
        != set(kept.image_ids("train"))
        for s in range(2, 9)
    )
    np.testing.assert_array_equal(world.subject.subsample_train(999).image_ids("train"), ids)
    with pytest.raises(PerceptError, match="n_train is 0"):
        world.subject.subsample_train(0)


@pytest.fixture
def longitudinal(tmp_path):
    """40 images in three repeats over six sessions (3, 4 ... 8), of which the first has test trials
    alone; three test images, three of validation.
    """
    trials = make_trials(n_images=40, sessions=6)
    trials["session"] += 3
    trials = trials[(trials["session"] > 3) | (trials["split"] == "test")].reset_index(drop=True)
    trials["repeat"] = data.number_repeats(trials)
    rng = np.random.default_rng(0)
    write_images(
        tmp_path / "images.h5",
        rng.integers(0, 255, (40, 4, 4, 3), dtype=np.uint8),
        100 + 3 * np.arange(40),
    )
    betas = rng.standard_normal((len(trials), V)) + 10 * trials["session"].to_numpy()[:, None]
    write_subject(tmp_path / "subj01", betas, trials, None, ATTRIBUTES)
    return open_subject(tmp_path, 1)


def test_first_sessions_train_alone_and_the_test_set_stays(longitudinal):
    subject = longitudinal.select_first_sessions(2)
    before, after = longitudinal.trials, subject.trials
    seen = after[after["split"].isin(["train", "val"])]
    assert (
        set(seen["session"]) == {4, 5}
        and len(seen)
        == (before["session"].isin([4, 5]) & before["split"].isin(["train", "val"])).sum()
    )
    pd.testing.assert_frame_equal(
        after[after["split"] == "test"], before[before["split"] == "test"]
    )
    assert (subject.test_set, subject.protocol) == (longitudinal.test_set, "toy") and (
        before["split"] != "exclude"
    ).all()
    for split in ("train", "val"):
        shown = before.loc[
            before["session"].isin([4, 5]) & (before["split"] == split), "image"
        ].unique()
        assert set(subject.image_ids(split)) == set(shown) and 0 < len(shown) <= len(
            longitudinal.image_ids(split)
        )
    assert len(subject.image_ids("train")) < len(
        longitudinal.image_ids("train")
    )  # some were first shown later
    check_trials(subject.trials)
    assert longitudinal.select_first_sessions(0) is longitudinal
    pd.testing.assert_frame_equal(
        longitudinal.select_first_sessions(5).trials, before
    )  # all of them, which is the subject as it is
    sizes = [len(longitudinal.select_first_sessions(n).get_trials("train")[0]) for n in range(1, 6)]
    assert sizes == sorted(set(sizes))


def test_everything_reads_the_first_sessions(longitudinal):
    subject = longitudinal.select_first_sessions(2)
    betas, sessions = longitudinal.betas, longitudinal.trials["session"].to_numpy()
    with pytest.warns(
        UserWarning, match=r"Sessions \[3, 7, 8\] have fewer than two .* with all training trials"
    ):  # there is no test trial in 6
        normaliser = Normaliser.fit(subject)
    mine = (longitudinal.trials["split"] == "train").to_numpy() & np.isin(sessions, [4, 5])
    np.testing.assert_allclose(
        normaliser.mean[[0, 3, 4]],
        np.tile(betas[mine].mean(0, dtype=np.float64), (3, 1)),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        normaliser.mean[1], betas[mine & (sessions == 4)].mean(0, dtype=np.float64), rtol=1e-5
    )
    for split in ("train", "val"):
        rows = subject.rows_by_image(split)
        assert all(np.isin(sessions[r], [4, 5]).all() and len(r) for r in rows) and len(
            rows
        ) == len(subject.image_ids(split))
        voxels, ids = subject.get_mean_betas(split)
        image = longitudinal.trials["image"].to_numpy()
        np.testing.assert_allclose(
            voxels[0], betas[np.isin(sessions, [4, 5]) & (image == ids[0])].mean(0), rtol=1e-5
        )
    assert subject.get_mean_betas("test", normaliser=normaliser)[0].shape == (3, V) and np.isfinite(
        estimate_noise_ceiling(subject, normaliser=normaliser)
    ).all(axis=None)
    expected = longitudinal.images(subject.image_ids("train")).mean(0)
    np.testing.assert_allclose(subject.mean_image("train"), expected)
    assert np.abs(longitudinal.mean_image("train") - expected).max() > 1
    epochs = BrainDataset(subject, "train", {}, normaliser, "all")
    assert (
        len(epochs) == len(subject.image_ids("train"))
        and epochs.__getitems__(range(len(epochs)))["voxels"].abs().max() < 10
    )


def test_sessions_that_cannot_be_chosen(longitudinal):
    for n in (6, -1):
        with pytest.raises(
            PerceptError,
            match=f"num_sessions is {n}, but Subject 1 of .* has 5 sessions with training trials",
        ):
            longitudinal.select_first_sessions(n)
    late = (longitudinal.trials["split"] == "val") & (longitudinal.trials["session"] < 6)
    longitudinal.trials = longitudinal.trials.assign(
        split=longitudinal.trials["split"].mask(late, "exclude")
    )
    with pytest.raises(PerceptError, match="first 2 of the 5 sessions .* show no validation image"):
        longitudinal.select_first_sessions(2)


def test_a_run_remembers_its_sessions(longitudinal, tmp_path):
    subject = make_training_split(longitudinal, "images", tmp_path / "logs", Kinds, num_sessions=2)
    pd.testing.assert_frame_equal(subject.trials, longitudinal.select_first_sessions(2).trials)
    pd.testing.assert_frame_equal(
        open_training_split(tmp_path, 1, tmp_path / "logs").trials, subject.trials
    )
    pictured = open_all_sessions(
        tmp_path, 1, subject
    )  # a brain of two sessions, and the pictures of all
    assert set(pictured.image_ids("train")) > set(subject.image_ids("train")) and set(
        pictured.image_ids("train")
    ) == set(longitudinal.image_ids("train"))
    with pytest.raises(PerceptError, match="num_sessions is 9"):
        make_training_split(longitudinal, "images", tmp_path / "logs", Kinds, num_sessions=9)
    pd.testing.assert_frame_equal(
        open_training_split(tmp_path, 1, tmp_path / "logs").trials, subject.trials
    )  # as it was
    assert make_training_split(longitudinal, "images", tmp_path / "logs", Kinds) is longitudinal
    pd.testing.assert_frame_equal(
        open_training_split(tmp_path, 1, tmp_path / "logs").trials, longitudinal.trials
    )


# ------------------------------------------------------------------------------ clusters of images
class Kinds:
    """Frozen features of 120 images in 8 kinds, as a pretrained model gives them; counts the images
    it was asked for.
    """

    target_shape, name = (5,), "kinds"

    def __init__(self):
        self.asked = 0

    def fingerprint(self):
        return {"name": self.name}

    def encode_pixels(self, images):
        self.asked += len(images)
        centres = np.random.default_rng(0).standard_normal((8, 5))
        return (
            centres[images[:, 0, 0, 0] % 8] * 10 + images[:, 0, 0, 1:3].mean(1, keepdims=True) / 255
        )


@pytest.fixture
def kinds(tmp_path):
    """120 images of 8 kinds (the first number of an image modulo 8): 24 of them test, 12 val, the
    rest train, in three repeats.
    """
    trials, rng = make_trials(n_images=120), np.random.default_rng(0)
    position = (trials["image"] - 100) // 3
    trials["split"] = np.select([position < 24, position < 36], ["test", "val"], "train")
    images = rng.integers(0, 255, (120, 1, 1, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(120)
    write_images(tmp_path / "images.h5", images, np.unique(trials["image"]))
    write_subject(tmp_path / "subj01", rng.standard_normal((360, V)), trials, None, ATTRIBUTES)
    return open_subject(tmp_path, 1)


def test_no_training_image_of_a_held_out_cluster_remains_and_the_test_set_stays(kinds, tmp_path):
    subject = make_training_split(kinds, "cluster-held-out", tmp_path / "logs", Kinds, n_clusters=8)
    held = subject.clusters.groupby("cluster")["held_out"].agg(["min", "max"])
    assert (held["min"] == held["max"]).all() and held[
        "max"
    ].sum() == 2  # whole clusters, a quarter of them
    kind = (subject.clusters["image"] - 100) // 3 % 8
    assert (subject.clusters.groupby("cluster")["image"].nunique() == 15).all() and (
        kind.groupby(subject.clusters["cluster"]).nunique() == 1
    ).all()
    for split in ("train", "val"):
        assert not subject.in_excluded_clusters(subject.image_ids(split)).any()
        assert (
            set(kinds.image_ids(split)) - set(subject.image_ids(split))
            == {i for i in kinds.image_ids(split) if subject.in_excluded_clusters([i])[0]}
            != set()
        )
    assert (subject.test_set, subject.image_ids("test").tolist()) == (
        kinds.test_set,
        kinds.image_ids("test").tolist(),
    )
    assert (
        subject.in_excluded_clusters(subject.image_ids("test")).sum() == 6
        and subject.protocol == "toy+cluster-held-out"
    )
    check_trials(subject.trials)
    assert (
        len(subject.trials) == len(kinds.trials)
        and kinds.clusters is None
        and kinds.protocol == "toy"
        and not kinds.in_excluded_clusters([100]).any()
    )
    assert (subject.trials["split"] == "exclude").sum() == 3 * (
        len(kinds.all_images) - len(subject.all_images)
    )


def test_normaliser_and_batches_never_see_what_is_held_out(kinds, tmp_path):
    subject = make_training_split(kinds, "cluster-held-out", tmp_path / "logs", Kinds, n_clusters=8)
    gone = (
        kinds.trials["image"]
        .isin(subject.clusters["image"][subject.clusters["held_out"]])
        .to_numpy()
    )
    betas = np.where(gone[:, None], np.float32(1e3), kinds.betas)
    write_subject(tmp_path / "subj02", betas, kinds.trials, None, ATTRIBUTES)
    other = open_subject(tmp_path, 2).exclude_clusters(subject.clusters)
    one, two = (Normaliser.fit(s, n_components=3) for s in (subject, other))
    np.testing.assert_array_equal(one.mean, two.mean)
    np.testing.assert_array_equal(one.components, two.components)
    assert not np.isin(
        BrainDataset(subject, "train+val").image_ids,
        subject.clusters["image"][subject.clusters["held_out"]],
    ).any()


def test_clusters_are_found_once_and_reopened_from_the_run(kinds, tmp_path):
    encoder = Kinds()
    first = make_training_split(
        kinds, "cluster-held-out", tmp_path / "logs", lambda: encoder, n_clusters=8
    )
    (file,) = tmp_path.glob("clusters-*.parquet")
    made = file.stat().st_mtime_ns
    again = make_training_split(
        kinds, "cluster-held-out", tmp_path / "more", lambda: encoder, n_clusters=8
    )
    pd.testing.assert_frame_equal(again.clusters, first.clusters)
    assert file.stat().st_mtime_ns == made and encoder.asked == 120
    assert (
        file.stem.startswith("clusters-")
        and first.clusters.attrs["n_clusters"] == 8
        and first.clusters.attrs["fingerprint"] == {"name": "kinds"}
    )
    opened = open_training_split(tmp_path, 1, tmp_path / "logs")
    pd.testing.assert_frame_equal(opened.trials, first.trials)
    assert (
        opened.protocol == first.protocol
        and pickle.loads(pickle.dumps(opened)).clusters is not None
    )
    file.unlink()
    pd.testing.assert_frame_equal(
        make_training_split(
            kinds, "cluster-held-out", tmp_path / "logs", lambda: encoder, n_clusters=8
        ).clusters,
        first.clusters,
    )
    ids, features = kinds.all_images, np.random.default_rng(0).standard_normal((120, 5))
    for n, made_by in ((8, {"name": "other"}), (9, {"name": "other"}), (9, {"name": "kinds"})):
        cluster_images(kinds, features, made_by, n)
    assert len(list(tmp_path.glob("clusters-*.parquet"))) == 4 and len(ids) == 120


def test_a_plain_training_forgets_the_clusters_of_an_earlier_one(kinds, tmp_path):
    make_training_split(kinds, "cluster-held-out", tmp_path / "logs", Kinds, n_clusters=8)
    assert make_training_split(kinds, "images", tmp_path / "logs", Kinds) is kinds
    assert open_training_split(tmp_path, 1, tmp_path / "logs").clusters is None


def test_clusters_do_not_depend_on_the_sessions(kinds, tmp_path):
    whole = make_training_split(kinds, "cluster-held-out", tmp_path / "whole", Kinds, n_clusters=8)
    both = make_training_split(
        kinds, "cluster-held-out", tmp_path / "both", Kinds, n_clusters=8, num_sessions=1
    )
    pd.testing.assert_frame_equal(both.clusters, whole.clusters)
    pd.testing.assert_frame_equal(both.trials, whole.select_first_sessions(1).trials)
    opened = open_training_split(tmp_path, 1, tmp_path / "both")
    pd.testing.assert_frame_equal(opened.trials, both.trials)
    assert (
        opened.protocol == "toy+cluster-held-out"
        and not opened.in_excluded_clusters(opened.image_ids("train")).any()
    )
    pictured = open_all_sessions(tmp_path, 1, opened)
    assert not pictured.in_excluded_clusters(pictured.image_ids("train")).any()


def test_cluster_refusals(kinds, tmp_path):
    with pytest.raises(
        PerceptError, match="split is 'image': choose one of images, cluster-held-out"
    ):
        make_training_split(kinds, "image", tmp_path / "logs", Kinds)
    with pytest.raises(PerceptError, match="119 features of 120 images"):
        cluster_images(kinds, np.zeros((119, 5)), {})
    for n in (3, 121):
        with pytest.raises(
            PerceptError, match=f"{n} clusters: .* choose 4 clusters to one an image"
        ):
            cluster_images(kinds, np.zeros((120, 5)), {}, n)
    with (
        pytest.raises(PerceptError, match="No quarter of the 4 clusters"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # fewer points than clusters
        cluster_images(kinds, np.ones((120, 5)), {}, 4)
    subject = make_training_split(kinds, "cluster-held-out", tmp_path / "logs", Kinds, n_clusters=8)
    with pytest.raises(PerceptError, match="Image 7 is not in the table of clusters"):
        subject.in_excluded_clusters([7])
    with pytest.raises(PerceptError, match="no train image is left"):
        kinds.exclude_clusters(subject.clusters.assign(held_out=True))
    write_subject(
        tmp_path / "subj01",
        kinds.betas,
        kinds.trials.assign(split=kinds.trials["split"].replace({"val": "test", "test": "val"})),
        None,
        ATTRIBUTES,
    )
    with pytest.raises(PerceptError, match="is of other test images than"):
        open_training_split(tmp_path, 1, tmp_path / "logs")
    with pytest.raises(PerceptError, match="There is no run at .*absent"):
        open_training_split(tmp_path, 1, tmp_path / "absent")


# -------------------------------------------------------------------------------- torch dataset
def test_repeats_are_uniform_and_pure():
    ids, counts = np.arange(3000), np.full(3000, 3)
    chosen = choose_repeats(42, 5, ids, counts)
    np.testing.assert_array_equal(
        chosen[[7, 2000]], choose_repeats(42, 5, ids[[7, 2000]], counts[:2])
    )
    assert np.all(np.abs(np.bincount(chosen, minlength=3) - 1000) < 120)
    for other in (choose_repeats(42, 6, ids, counts), choose_repeats(43, 5, ids, counts)):
        assert (
            abs((other == chosen).mean() - 1 / 3) < 0.05
        )  # independent of the first, not a shift of it
    epochs = np.stack([choose_repeats(42, e, ids, counts) for e in range(60)])
    assert all(len(np.unique(column)) == 3 for column in epochs.T)


def test_random_repeat_is_a_trial_of_that_image(world):
    normaliser = Normaliser.fit(world.subject)
    dataset = BrainDataset(world.subject, "train", {}, normaliser, "random", seed=3)
    everything, trial_ids = world.subject.get_trials("train", normaliser)
    seen = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        batch = dataset.__getitems__([3, 0, 5, 0])
        assert batch["image"].tolist() == dataset.image_ids[[3, 0, 5, 0]].tolist()
        for voxels, image in zip(batch["voxels"].numpy(), batch["image"].tolist(), strict=True):
            matches = (everything[trial_ids == image] == voxels).all(1)
            assert matches.sum() == 1
        seen.append(batch["voxels"][0].numpy())
        torch.testing.assert_close(batch["voxels"][0], dataset[3]["voxels"], rtol=0, atol=0)
    assert len(np.unique(np.stack(seen), axis=0)) == 3


def test_mean_and_all(world):
    uneven = world.trials[
        ~((world.trials["image"] == 103) & (world.trials["repeat"] == 2))
    ].reset_index(drop=True)
    keep = ~((world.trials["image"] == 103) & (world.trials["repeat"] == 2)).to_numpy()
    write_subject(world.folder / "subj02", world.betas[keep], uneven, None, ATTRIBUTES)
    subject = open_subject(world.folder, 2)
    normaliser = Normaliser.fit(subject)
    average, ids = subject.get_mean_betas("train", normaliser=normaliser)
    mean = BrainDataset(subject, "train", {}, normaliser, "mean").__getitems__(range(len(ids)))
    np.testing.assert_allclose(mean["voxels"], average, rtol=1e-6)
    batch = BrainDataset(subject, "train", {}, normaliser, "all").__getitems__([1, 0])
    assert batch["voxels"].shape == (2, 3, V) and batch["image"].tolist() == [103, 100]
    torch.testing.assert_close(
        batch["voxels"][0, 2], batch["voxels"][0, 0], rtol=0, atol=0
    )  # cycled
    torch.testing.assert_close(batch["voxels"][0, :2].mean(0), mean["voxels"][1])
    torch.testing.assert_close(batch["voxels"][1].mean(0), mean["voxels"][0])


def test_each_trial_is_a_sample_with_its_own_image_and_target(world):
    normaliser = Normaliser.fit(world.subject)
    everything, ids = world.subject.get_trials("train", normaliser)
    cached = cache_targets(
        world.folder, "first", {}, world.ids, lambda x: x[:, 0, 0] / 255, (3,), "float32"
    )
    dataset = BrainDataset(
        world.subject, "train", {"first": cached}, normaliser, "each", pixels=True
    )
    assert len(dataset) == len(everything) == 3 * len(world.subject.image_ids("train"))
    batch = dataset.__getitems__(range(len(dataset)))
    assert sorted(map(tuple, batch["voxels"].numpy())) == sorted(
        map(tuple, everything)
    )  # every trial, once
    for voxels, image in zip(batch["voxels"].numpy(), batch["image"].tolist(), strict=True):
        assert (everything[ids == image] == voxels).all(1).sum() == 1
    torch.testing.assert_close(batch["first"], batch["pixels"][:, :, 0, 0].float() / 255)
    dataset.set_epoch(3)
    torch.testing.assert_close(
        dataset.__getitems__([4])["voxels"], batch["voxels"][4:5], rtol=0, atol=0
    )


def test_targets_follow_their_images_in_a_loader(world):
    ids = world.subject.image_ids("train")
    cached = cache_targets(
        world.folder, "first", {}, world.ids, lambda x: x[:, 0, 0] / 255, (3,), "float32"
    )
    targets = {"plain": np.stack([ids, -ids], 1), "cached": cached}
    dataset = BrainDataset(world.subject, "train", targets, None, "mean")
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        dataset, batch_size=4, shuffle=True, generator=generator, collate_fn=lambda batch: batch
    )
    batches = list(loader)
    assert sorted(sum((b["image"].tolist() for b in batches), [])) == ids.tolist()
    for batch in batches:
        assert (
            batch["voxels"].dtype == batch["plain"].dtype == batch["cached"].dtype == torch.float32
        )
        torch.testing.assert_close(batch["plain"][:, 0], batch["image"].float())
        expected = world.subject.images(batch["image"].numpy())[:, 0, 0] / 255
        np.testing.assert_allclose(batch["cached"], expected, rtol=1e-6)


def test_dataset_refusals(world):
    with pytest.raises(PerceptError, match="one of"):
        BrainDataset(world.subject, "train", {}, None, "some")
    with pytest.raises(PerceptError, match="Target x has 2 rows for the 6 images"):
        BrainDataset(world.subject, "train", {"x": np.zeros((2, 3))}, None)
    with pytest.raises(PerceptError, match="cannot be called voxels"):
        BrainDataset(world.subject, "train", {"voxels": np.zeros((6, 3))}, None)
    few = cache_targets(world.folder, "few", {}, world.ids[:2], lambda x: x[:, 0, 0], (3,))
    with pytest.raises(PerceptError, match="lacks the targets of 4 images"):
        BrainDataset(world.subject, "train", {"x": few}, None)
    with pytest.raises(PerceptError, match="no trials in split exclude"):
        BrainDataset(world.subject, "exclude", {}, None)
    with pytest.raises(IndexError):
        BrainDataset(world.subject, "train")[6]


# -------------------------------------------------------------------------------- cached targets
class Encoder:
    """Flattened pixels of an image, counting what it was asked; stops after `limit` images."""

    def __init__(self, limit=10**9):
        self.asked, self.limit = 0, limit

    def __call__(self, images):
        if self.asked + len(images) > self.limit:
            raise RuntimeError("interrupted")
        self.asked += len(images)
        return images.reshape(len(images), 4, 18).astype(np.float32)


def test_targets_are_computed_once_and_extended(world):
    encoder = Encoder()
    call = {"fingerprint": {"model": "a"}, "encode": encoder, "shape": (4, 18), "batch_size": 2}
    targets = cache_targets(world.folder, "pixels", image_ids=world.ids[:5], **call)
    assert (encoder.asked, len(targets), targets.dtype) == (5, 5, np.float16)
    again = cache_targets(world.folder, "pixels", image_ids=world.ids[3:], **call)
    assert encoder.asked == 12
    order = np.array([11, 2, 2, 7, 0])
    np.testing.assert_array_equal(
        again.rows(world.ids[order]), world.images[order].reshape(5, 4, 18)
    )
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(again)).rows(world.ids[:1]), again.rows(world.ids[:1])
    )
    cache_targets(world.folder, "pixels", image_ids=world.ids, **call)
    assert encoder.asked == 12
    other = cache_targets(
        world.folder, "pixels", image_ids=world.ids[:1], **{**call, "fingerprint": {"model": "b"}}
    )
    assert encoder.asked == 13 and other.folder != again.folder
    with pytest.raises(PerceptError, match="lacks the targets of 1 images"):
        again.rows([5])


def test_last_digits_of_golden_features_do_not_matter_and_others_do(world):
    encoder, golden = Encoder(), [0.1234, -2.0]
    call = {"encode": encoder, "image_ids": world.ids, "shape": (4, 18)}
    first = cache_targets(world.folder, "pixels", {"model": "a", "golden": golden}, **call)
    other = cache_targets(
        world.folder, "pixels", {"model": "a", "golden": [0.1235, -2.001]}, **call
    )  # as another device gives them
    assert other.folder == first.folder and encoder.asked == 12
    with pytest.raises(PerceptError, match="no longer gives the same features: delete it"):
        cache_targets(world.folder, "pixels", {"model": "a", "golden": [0.5, -2.0]}, **call)


def test_categories_are_joined_columns_of_the_labels(tmp_path):
    subject = data.Subject.__new__(data.Subject)
    subject.folder = tmp_path
    with pytest.raises(PerceptError, match="whose images have no labels: leave this empty"):
        subject.categories([1], "scene")
    pd.DataFrame({"image": [3, 1], "scene": ["sea", "wood"], "kind": ["fish", "tree"]}).to_parquet(
        tmp_path / "labels.parquet"
    )
    assert subject.categories([1, 3], "scene, kind").tolist() == ["wood tree", "sea fish"]
    with pytest.raises(PerceptError, match="labels have no column size: choose among scene, kind"):
        subject.categories([1], "scene,size")


def test_interrupted_targets_go_on(world):
    call = {"fingerprint": {}, "image_ids": world.ids, "shape": (4, 18), "batch_size": 1}
    with pytest.raises(RuntimeError):
        cache_targets(world.folder, "pixels", encode=Encoder(limit=10), **call)
    encoder = Encoder()
    targets = cache_targets(world.folder, "pixels", encode=encoder, **call)
    assert encoder.asked == 4  # 8 were safe
    np.testing.assert_array_equal(targets.rows(world.ids), world.images.reshape(12, 4, 18))
    assert (
        not list(targets.folder.glob("*.partial"))
        and not (targets.folder / "progress.json").exists()
    )


def test_targets_of_changed_pixels_are_made_again(world):
    call = {"fingerprint": {}, "image_ids": world.ids, "shape": (4, 18)}
    cache_targets(world.folder, "pixels", encode=Encoder(), **call)
    changed = world.images.copy()
    changed[3] = 255 - changed[3]
    (world.folder / "images.h5").unlink()
    write_images(world.folder / "images.h5", changed, world.ids)
    encoder = Encoder()
    targets = cache_targets(world.folder, "pixels", encode=encoder, **call)
    assert encoder.asked == 1
    np.testing.assert_array_equal(targets.rows(world.ids), changed.reshape(12, 4, 18))


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda x: x.reshape(len(x), -1), "shape"),
        (lambda x: np.full((len(x), 4, 18), 1e5), "image 100 is not finite in float16"),
        (lambda x: np.full((len(x), 4, 18), np.nan), "not finite"),
    ],
)
def test_bad_targets(world, encode, message):
    with pytest.raises(PerceptError, match=message):
        cache_targets(world.folder, "pixels", {}, world.ids, encode, (4, 18))
    with pytest.raises(PerceptError, match="Image 1 is not in"):
        cache_targets(world.folder, "pixels", {}, [1], Encoder(), (4, 18))


# --------------------------------------------------------------------- seeds, views, joined splits
def test_seeds_depend_on_seed_epoch_and_image_alone(world):
    dataset = BrainDataset(world.subject, "train", seed=3)
    seeds = dataset.__getitems__([0, 1, 2])["seed"]
    assert (
        torch.equal(dataset.__getitems__([2, 0])["seed"], seeds[[2, 0]])
        and len(seeds.unique()) == 3
        and (seeds >= 0).all()
    )
    dataset.set_epoch(1)
    assert not (dataset.__getitems__([0, 1, 2])["seed"] == seeds).any()


def test_pixels_are_those_of_the_images(world):
    batch = BrainDataset(world.subject, "train", pixels=True).__getitems__([1, 0])
    assert batch["pixels"].dtype == torch.uint8
    np.testing.assert_array_equal(
        batch["pixels"].permute(0, 2, 3, 1).numpy(), world.subject.images(batch["image"].numpy())
    )


def test_a_batch_may_show_one_number_of_repeat(world):
    dataset = BrainDataset(world.subject, "train", repeats="batch", seed=1)
    table = np.stack(world.subject.rows_by_image("train"))
    shown = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        voxels = dataset.__getitems__([2, 0, 1])["voxels"].numpy()
        fits = [
            r
            for r in range(table.shape[1])
            if np.array_equal(voxels, world.subject.get_betas(table[[2, 0, 1], r]))
        ]
        assert len(fits) == 1
        shown |= set(fits)
    assert shown == set(range(table.shape[1]))


def test_splits_can_be_joined(world):
    both = BrainDataset(world.subject, "train+val")
    ids = np.union1d(world.subject.image_ids("train"), world.subject.image_ids("val"))
    np.testing.assert_array_equal(both.image_ids, ids)
    with pytest.raises(PerceptError, match="There is no split 'tset'"):
        world.subject.image_ids("train+tset")


def test_views_are_made_once_and_shown_in_turn(world):
    calls = []

    def encode(images, seed):
        calls.append(seed)
        return images[:, 0, 0].astype(np.float32) / 255 + np.random.default_rng(seed).random()

    options = {
        "fingerprint": {},
        "image_ids": world.ids,
        "encode": encode,
        "shape": (3,),
        "views": 3,
        "dtype": "float32",
    }
    views = cache_augmented_targets(world.folder, "colour", **options)
    assert len(calls) == 3 == len(set(calls))
    again = cache_augmented_targets(world.folder, "colour", **options)
    assert len(calls) == 3
    versions = np.stack([v.rows(world.ids) for v in again.versions])  # (versions, images, 3)
    dataset, shown = BrainDataset(world.subject, "train", {"colour": views}, seed=5), set()
    at = [int(np.flatnonzero(world.ids == image)[0]) for image in dataset.image_ids]
    for epoch in range(12):
        dataset.set_epoch(epoch)
        rows = dataset.__getitems__(range(len(dataset)))["colour"].numpy()
        chosen = [
            int(np.flatnonzero((versions[:, i] == row).all(1))[0])
            for i, row in zip(at, rows, strict=True)
        ]
        shown |= set(chosen)
        np.testing.assert_array_equal(rows[:1], dataset.__getitems__([0])["colour"].numpy())
    assert shown == {0, 1, 2}
    with pytest.raises(PerceptError, match="choose at least 1"):
        cache_augmented_targets(world.folder, "colour", **options | {"views": 0})


# ----------------------------------------------------------------------------- neighbouring trials
def test_neighbours_are_of_the_same_session_and_of_no_later_split(world):
    normaliser = Normaliser.fit(world.subject)
    together, alone = world.subject.with_adjacent_trials(2, 1), world.subject
    table, rank = alone.trials, {"train": 0, "val": 1, "test": 2}
    rows = np.arange(len(table))
    read, own = together.get_betas(rows, normaliser), alone.get_betas(rows, normaliser)
    assert read.shape == (len(rows), 4, V)
    seen = 0
    for row in rows:
        for position, step in enumerate((0, -1, -2, 1)):
            other = row + step
            there = (
                0 <= other < len(rows)
                and table["session"][other] == table["session"][row]
                and rank[table["split"][other]] <= rank[table["split"][row]]
            )
            np.testing.assert_array_equal(
                read[row, position], own[other] if there else np.zeros(V, np.float32)
            )
            seen += there and step != 0
    assert 0 < seen < 3 * len(rows)


def test_neighbours_are_averaged_over_repeats_like_the_trial_itself(world):
    together = world.subject.with_adjacent_trials(1, 0)
    voxels, ids = together.get_mean_betas("test")
    plain, same = world.subject.get_mean_betas("test")
    assert voxels.shape == (len(ids), 2, V) and np.array_equal(ids, same)
    np.testing.assert_allclose(voxels[:, 0], plain, rtol=1e-6)
    assert BrainDataset(together, "train").__getitems__([0, 1])["voxels"].shape == (2, 2, V)
    assert world.subject.with_adjacent_trials(0, 0).get_betas(np.arange(2)).shape == (2, V)
    with pytest.raises(PerceptError, match="seq_past is -1"):
        world.subject.with_adjacent_trials(-1, 0)

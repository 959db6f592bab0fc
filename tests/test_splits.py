"""src.data.splits: the first sessions, and clusters of images held out of training."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest

from src import data
from src.data.batches import BrainDataset
from src.data.images import write_images
from src.data.layout import check_trials, write_subject
from src.data.normaliser import Normaliser
from src.data.reliability import estimate_noise_ceiling
from src.data.splits import (
    cluster_images,
    open_all_sessions,
    open_training_split,
    record_training_split,
    select_training_split,
)
from src.data.subject import open_subject
from src.utils import PerceptError
from tests.toy_data import ATTRIBUTES, N_VOXELS, make_trials


def make_training_split(subject, split, logs, encoder, **options):
    """What a training is given, recorded as one does that begins."""
    selected = select_training_split(subject, split, encoder, **options)
    logs.mkdir(exist_ok=True)
    record_training_split(selected, logs)
    return selected


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
    betas = (
        rng.standard_normal((len(trials), N_VOXELS)) + 10 * trials["session"].to_numpy()[:, None]
    )
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
        expected = before.loc[
            before["session"].isin([4, 5]) & (before["split"] == split), "image"
        ].unique()
        assert set(subject.image_ids(split)) == set(expected) and 0 < len(expected) <= len(
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
    is_fitted = (longitudinal.trials["split"] == "train").to_numpy() & np.isin(sessions, [4, 5])
    np.testing.assert_allclose(
        normaliser.mean[[0, 3, 4]],
        np.tile(betas[is_fitted].mean(0, dtype=np.float64), (3, 1)),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        normaliser.mean[1], betas[is_fitted & (sessions == 4)].mean(0, dtype=np.float64), rtol=1e-5
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
    assert subject.get_mean_betas("test", normaliser=normaliser)[0].shape == (
        3,
        N_VOXELS,
    ) and np.isfinite(estimate_noise_ceiling(subject, normaliser=normaliser)).all(axis=None)
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
    subject = make_training_split(
        longitudinal, "images", tmp_path / "logs", CategoryEncoder, num_sessions=2
    )
    pd.testing.assert_frame_equal(subject.trials, longitudinal.select_first_sessions(2).trials)
    pd.testing.assert_frame_equal(
        open_training_split(tmp_path, 1, tmp_path / "logs").trials, subject.trials
    )
    write_with_components = open_all_sessions(
        tmp_path, 1, subject
    )  # a brain of two sessions, and the pictures of all
    assert set(write_with_components.image_ids("train")) > set(subject.image_ids("train")) and set(
        write_with_components.image_ids("train")
    ) == set(longitudinal.image_ids("train"))
    with pytest.raises(PerceptError, match="num_sessions is 9"):
        make_training_split(
            longitudinal, "images", tmp_path / "logs", CategoryEncoder, num_sessions=9
        )
    pd.testing.assert_frame_equal(
        open_training_split(tmp_path, 1, tmp_path / "logs").trials, subject.trials
    )  # as it was
    assert (
        make_training_split(longitudinal, "images", tmp_path / "logs", CategoryEncoder)
        is longitudinal
    )
    pd.testing.assert_frame_equal(
        open_training_split(tmp_path, 1, tmp_path / "logs").trials, longitudinal.trials
    )


class CategoryEncoder:
    """Frozen features of 120 images in 8 kinds, as a pretrained model gives them; counts the images
    it was asked for.
    """

    target_shape, name = (5,), "categories"

    def __init__(self):
        self.n_encoded = 0

    def fingerprint(self):
        return {"name": self.name}

    def encode_pixels(self, images):
        self.n_encoded += len(images)
        centres = np.random.default_rng(0).standard_normal((8, 5))
        return (
            centres[images[:, 0, 0, 0] % 8] * 10 + images[:, 0, 0, 1:3].mean(1, keepdims=True) / 255
        )


@pytest.fixture
def categories(tmp_path):
    """120 images of 8 kinds (the first number of an image modulo 8): 24 of them test, 12 val, the
    rest train, in three repeats.
    """
    trials, rng = make_trials(n_images=120), np.random.default_rng(0)
    position = (trials["image"] - 100) // 3
    trials["split"] = np.select([position < 24, position < 36], ["test", "val"], "train")
    images = rng.integers(0, 255, (120, 1, 1, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(120)
    write_images(tmp_path / "images.h5", images, np.unique(trials["image"]))
    write_subject(
        tmp_path / "subj01", rng.standard_normal((360, N_VOXELS)), trials, None, ATTRIBUTES
    )
    return open_subject(tmp_path, 1)


def test_no_training_image_of_a_held_out_cluster_remains_and_the_test_set_stays(
    categories, tmp_path
):
    subject = make_training_split(
        categories, "cluster-held-out", tmp_path / "logs", CategoryEncoder, n_clusters=8
    )
    flags = subject.clusters.groupby("cluster")["held_out"].agg(["min", "max"])
    assert (flags["min"] == flags["max"]).all() and flags[
        "max"
    ].sum() == 2  # whole clusters, a quarter of them
    category = (subject.clusters["image"] - 100) // 3 % 8
    assert (subject.clusters.groupby("cluster")["image"].nunique() == 15).all() and (
        category.groupby(subject.clusters["cluster"]).nunique() == 1
    ).all()
    for split in ("train", "val"):
        assert not subject.in_excluded_clusters(subject.image_ids(split)).any()
        assert (
            set(categories.image_ids(split)) - set(subject.image_ids(split))
            == {i for i in categories.image_ids(split) if subject.in_excluded_clusters([i])[0]}
            != set()
        )
    assert (subject.test_set, subject.image_ids("test").tolist()) == (
        categories.test_set,
        categories.image_ids("test").tolist(),
    )
    assert (
        subject.in_excluded_clusters(subject.image_ids("test")).sum() == 6
        and subject.protocol == "toy+cluster-held-out"
    )
    check_trials(subject.trials)
    assert (
        len(subject.trials) == len(categories.trials)
        and categories.clusters is None
        and categories.protocol == "toy"
        and not categories.in_excluded_clusters([100]).any()
    )
    assert (subject.trials["split"] == "exclude").sum() == 3 * (
        len(categories.all_images) - len(subject.all_images)
    )


def test_normaliser_and_batches_never_see_what_is_held_out(categories, tmp_path):
    subject = make_training_split(
        categories, "cluster-held-out", tmp_path / "logs", CategoryEncoder, n_clusters=8
    )
    is_excluded = (
        categories.trials["image"]
        .isin(subject.clusters["image"][subject.clusters["held_out"]])
        .to_numpy()
    )
    betas = np.where(is_excluded[:, None], np.float32(1e3), categories.betas)
    write_subject(tmp_path / "subj02", betas, categories.trials, None, ATTRIBUTES)
    other = open_subject(tmp_path, 2).exclude_clusters(subject.clusters)
    original, altered = (Normaliser.fit(s, n_components=3) for s in (subject, other))
    np.testing.assert_array_equal(original.mean, altered.mean)
    np.testing.assert_array_equal(original.components, altered.components)
    assert not np.isin(
        BrainDataset(subject, "train+val").image_ids,
        subject.clusters["image"][subject.clusters["held_out"]],
    ).any()


def test_clusters_are_found_once_and_reopened_from_the_run(categories, tmp_path):
    encoder = CategoryEncoder()
    first = make_training_split(
        categories, "cluster-held-out", tmp_path / "logs", lambda: encoder, n_clusters=8
    )
    (file,) = tmp_path.glob("clusters-*.parquet")
    modified = file.stat().st_mtime_ns
    second = make_training_split(
        categories, "cluster-held-out", tmp_path / "more", lambda: encoder, n_clusters=8
    )
    pd.testing.assert_frame_equal(second.clusters, first.clusters)
    assert file.stat().st_mtime_ns == modified and encoder.n_encoded == 120
    assert (
        file.stem.startswith("clusters-")
        and first.clusters.attrs["n_clusters"] == 8
        and first.clusters.attrs["fingerprint"] == {"name": "categories"}
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
            categories, "cluster-held-out", tmp_path / "logs", lambda: encoder, n_clusters=8
        ).clusters,
        first.clusters,
    )
    ids, features = categories.all_images, np.random.default_rng(0).standard_normal((120, 5))
    for n, made_by in ((8, {"name": "other"}), (9, {"name": "other"}), (9, {"name": "categories"})):
        cluster_images(categories, features, made_by, n)
    assert len(list(tmp_path.glob("clusters-*.parquet"))) == 4 and len(ids) == 120


def test_a_plain_training_forgets_the_clusters_of_an_earlier_one(categories, tmp_path):
    make_training_split(
        categories, "cluster-held-out", tmp_path / "logs", CategoryEncoder, n_clusters=8
    )
    assert (
        make_training_split(categories, "images", tmp_path / "logs", CategoryEncoder) is categories
    )
    assert open_training_split(tmp_path, 1, tmp_path / "logs").clusters is None


def test_clusters_do_not_depend_on_the_sessions(categories, tmp_path):
    all_sessions = make_training_split(
        categories, "cluster-held-out", tmp_path / "whole", CategoryEncoder, n_clusters=8
    )
    first_session = make_training_split(
        categories,
        "cluster-held-out",
        tmp_path / "both",
        CategoryEncoder,
        n_clusters=8,
        num_sessions=1,
    )
    pd.testing.assert_frame_equal(first_session.clusters, all_sessions.clusters)
    pd.testing.assert_frame_equal(
        first_session.trials, all_sessions.select_first_sessions(1).trials
    )
    opened = open_training_split(tmp_path, 1, tmp_path / "both")
    pd.testing.assert_frame_equal(opened.trials, first_session.trials)
    assert (
        opened.protocol == "toy+cluster-held-out"
        and not opened.in_excluded_clusters(opened.image_ids("train")).any()
    )
    write_with_components = open_all_sessions(tmp_path, 1, opened)
    assert not write_with_components.in_excluded_clusters(
        write_with_components.image_ids("train")
    ).any()


def test_cluster_refusals(categories, tmp_path):
    with pytest.raises(
        PerceptError, match="split is 'image': choose one of images, cluster-held-out"
    ):
        make_training_split(categories, "image", tmp_path / "logs", CategoryEncoder)
    with pytest.raises(PerceptError, match="119 features of 120 images"):
        cluster_images(categories, np.zeros((119, 5)), {})
    for n in (3, 121):
        with pytest.raises(
            PerceptError, match=f"{n} clusters: .* choose 4 clusters to one an image"
        ):
            cluster_images(categories, np.zeros((120, 5)), {}, n)
    with (
        pytest.raises(PerceptError, match="No quarter of the 4 clusters"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # fewer points than clusters
        cluster_images(categories, np.ones((120, 5)), {}, 4)
    subject = make_training_split(
        categories, "cluster-held-out", tmp_path / "logs", CategoryEncoder, n_clusters=8
    )
    with pytest.raises(PerceptError, match="Image 7 is not in the table of clusters"):
        subject.in_excluded_clusters([7])
    with pytest.raises(PerceptError, match="no train image is left"):
        categories.exclude_clusters(subject.clusters.assign(held_out=True))
    write_subject(
        tmp_path / "subj01",
        categories.betas,
        categories.trials.assign(
            split=categories.trials["split"].replace({"val": "test", "test": "val"})
        ),
        None,
        ATTRIBUTES,
    )
    with pytest.raises(PerceptError, match="is of other test images than"):
        open_training_split(tmp_path, 1, tmp_path / "logs")
    with pytest.raises(PerceptError, match="There is no run at .*absent"):
        open_training_split(tmp_path, 1, tmp_path / "absent")

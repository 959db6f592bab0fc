"""src.data.subject: what a subject gives, and subsets of it."""

import numpy as np
import pandas as pd
import pytest

from src import data
from src.data.batches import BrainDataset
from src.data.images import write_images
from src.data.layout import write_subject
from src.data.normaliser import Normaliser
from src.data.subject import open_subject
from src.utils import PerceptError
from tests.toy_data import ATTRIBUTES, N_VOXELS, add_regions, make_world


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


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
def test_mean_betas_against_a_loop(world, repeats):
    voxels, ids = world.subject.get_mean_betas("val", repeats)
    assert voxels.dtype == np.float32
    for row, image in zip(voxels, ids, strict=True):
        rows = world.trials[world.trials["image"] == image].sort_values("repeat").index[:repeats]
        np.testing.assert_allclose(row, world.betas[rows].mean(0), rtol=1e-5, atol=1e-6)


def test_mean_betas_warn_of_too_few_repeats_and_single_trials_are_normalised(world):
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


@pytest.fixture
def regions(world):
    return add_regions(world)


@pytest.mark.parametrize(
    ("rois", "columns"),
    [
        ("-", range(N_VOXELS)),
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
    selected, names = regions.select_rois(rois)
    assert selected.tolist() == list(columns) and "early" not in names
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


def test_bootstrap_split_is_a_seeded_share_of_the_training_images(world):
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


def test_subsample_keeps_a_seeded_draw_of_training_images(world):
    ids = world.subject.image_ids("train")
    limited = world.subject.subsample_train(2, seed=1)
    assert len(limited.image_ids("train")) == 2 and set(limited.image_ids("train")) < set(ids)
    for split in ("val", "test"):
        np.testing.assert_array_equal(limited.image_ids(split), world.subject.image_ids(split))
    assert limited.test_set == world.subject.test_set and (
        limited.trials["split"] == "exclude"
    ).sum() == 3 * (len(ids) - 2)
    np.testing.assert_array_equal(
        limited.image_ids("train"), world.subject.subsample_train(2, seed=1).image_ids("train")
    )
    assert any(
        set(world.subject.subsample_train(2, seed=s).image_ids("train"))
        != set(limited.image_ids("train"))
        for s in range(2, 9)
    )
    np.testing.assert_array_equal(world.subject.subsample_train(999).image_ids("train"), ids)
    with pytest.raises(PerceptError, match="n_train is 0"):
        world.subject.subsample_train(0)


def test_neighbours_are_of_the_same_session_and_of_no_later_split(world):
    normaliser = Normaliser.fit(world.subject)
    together, alone = world.subject.with_adjacent_trials(2, 1), world.subject
    table, rank = alone.trials, {"train": 0, "val": 1, "test": 2}
    rows = np.arange(len(table))
    betas, single = together.get_betas(rows, normaliser), alone.get_betas(rows, normaliser)
    assert betas.shape == (len(rows), 4, N_VOXELS)
    n_visible = 0
    for row in rows:
        for position, step in enumerate((0, -1, -2, 1)):
            adjacent = row + step
            is_visible = (
                0 <= adjacent < len(rows)
                and table["session"][adjacent] == table["session"][row]
                and rank[table["split"][adjacent]] <= rank[table["split"][row]]
            )
            np.testing.assert_array_equal(
                betas[row, position],
                single[adjacent] if is_visible else np.zeros(N_VOXELS, np.float32),
            )
            n_visible += is_visible and step != 0
    assert 0 < n_visible < 3 * len(rows)


def test_neighbours_are_averaged_over_repeats_like_the_trial_itself(world):
    together = world.subject.with_adjacent_trials(1, 0)
    voxels, ids = together.get_mean_betas("test")
    plain, same = world.subject.get_mean_betas("test")
    assert voxels.shape == (len(ids), 2, N_VOXELS) and np.array_equal(ids, same)
    np.testing.assert_allclose(voxels[:, 0], plain, rtol=1e-6)
    assert BrainDataset(together, "train").__getitems__([0, 1])["voxels"].shape == (2, 2, N_VOXELS)
    assert world.subject.with_adjacent_trials(0, 0).get_betas(np.arange(2)).shape == (2, N_VOXELS)
    with pytest.raises(PerceptError, match="seq_past is -1"):
        world.subject.with_adjacent_trials(-1, 0)

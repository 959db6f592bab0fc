"""Folds of a small data set: by picture, by label, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from src.small_data.folds import (
    LEAVE_ONE_OUT,
    find_labels,
    group_equal_images,
    parse_penalties,
    parse_voxel_counts,
    split_into_folds,
)
from src.utils import PerceptError


@pytest.mark.parametrize(
    "labels", [None, np.tile(["a", "b"], 10), np.array(["rare"] + ["often"] * 19)]
)
def test_every_image_is_a_test_image_once_with_and_without_labels(labels):
    folds = split_into_folds(np.arange(20), labels, 5)
    tested = np.concatenate([test for _, test in folds])
    assert sorted(tested) == list(range(20))
    for train, test in folds:
        assert sorted([*train, *test]) == list(range(20))


def test_folds_are_stratified_where_every_label_has_enough_images():
    labels = np.tile(["a", "b"], 10)
    folds = split_into_folds(np.arange(20), labels, 5)
    assert all((labels[test] == "a").sum() == 2 for _, test in folds)


def test_rare_labels_are_spread_as_evenly_as_they_can_be():
    labels = np.array(["a"] * 3 + ["b"] * 17)
    folds = split_into_folds(np.arange(20), labels, 5)
    assert sorted((labels[test] == "a").sum() for _, test in folds) == [0, 0, 1, 1, 1]
    assert all(len(test) == 4 for _, test in folds)


def test_the_same_picture_under_two_ids_stays_on_one_side():
    images = np.random.default_rng(0).integers(0, 255, (12, 3, 3, 3), dtype=np.uint8)
    images[7] = images[11] = images[2]
    groups = group_equal_images(images)
    assert groups[[2, 7, 11]].tolist() == [2, 2, 2] and len(np.unique(groups)) == 10
    for folds in (5, LEAVE_ONE_OUT):
        splits = split_into_folds(groups, None, folds)
        assert all(not set(groups[train]) & set(groups[test]) for train, test in splits)
        assert sorted(np.concatenate([test for _, test in splits])) == list(range(12))
    assert len(splits) == 10


def test_leaving_one_image_out_has_as_many_folds_as_images():
    splits = split_into_folds(np.arange(7), np.array(list("aaabbbb")), LEAVE_ONE_OUT)
    assert len(splits) == 7 and all(len(test) == 1 for _, test in splits)


@pytest.mark.parametrize("folds", [30, 1, -1])
def test_numbers_of_folds_that_make_no_sense_are_refused(folds):
    with pytest.raises(PerceptError, match=f"folds is {folds} for 20 pictures"):
        split_into_folds(np.arange(20), None, folds)


def subject_with(labels, tmp_path):
    """What `find_labels` needs of a subject."""

    def categories(ids, column):
        return labels.set_index("image").loc[ids][column].astype(str).to_numpy()

    return SimpleNamespace(labels=labels, folder=tmp_path, categories=categories)


def test_labels_are_found_by_image_and_not_by_place(tmp_path):
    table = pd.DataFrame({"image": [3, 1, 2], "label": ["c", "a", "b"]})
    subject = subject_with(table, tmp_path)
    assert find_labels(subject, np.array([1, 2, 3])).tolist() == ["a", "b", "c"]


def test_labels_that_lack_an_image_are_refused_and_none_is_none(tmp_path):
    table = pd.DataFrame({"image": [1, 2], "label": ["a", "b"]})
    with pytest.raises(PerceptError, match="no label for 1 of 3 images"):
        find_labels(subject_with(table, tmp_path), np.array([1, 2, 3]))
    assert find_labels(subject_with(None, tmp_path), np.array([1])) is None
    same = pd.DataFrame({"image": [1, 2], "label": ["a", "a"]})
    assert find_labels(subject_with(same, tmp_path), np.array([1, 2])) is None


def test_voxel_counts_beyond_the_data_become_all_voxels():
    assert parse_voxel_counts("400, 800,1600", 900) == [400, 800, 900]
    assert parse_voxel_counts("400,800", 60) == [60]
    with pytest.raises(PerceptError, match="numbers of voxels"):
        parse_voxel_counts("400,many", 900)


@pytest.mark.parametrize("text", ["", "100,many", "100,-1", "0", "inf"])
def test_penalties_are_numbers_above_zero(text):
    assert parse_penalties("100, 3e2") == [100.0, 300.0]
    with pytest.raises(PerceptError, match="alphas is"):
        parse_penalties(text)

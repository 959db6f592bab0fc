"""Folds of a small data set, and the rows that belong to each image."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from src.evaluation.folds import find_labels, parse_voxel_counts, split_into_folds
from src.utils import PerceptError


def test_every_image_is_a_test_image_once_with_and_without_labels():
    for labels in (None, np.tile(["a", "b"], 10), np.array(["rare"] + ["often"] * 19)):
        folds = split_into_folds(20, labels, 5)
        tested = np.concatenate([test for _, test in folds])
        assert sorted(tested) == list(range(20))
        assert all(not set(train) & set(test) for train, test in folds)


def test_folds_are_stratified_where_every_label_has_enough_images():
    labels = np.tile(["a", "b"], 10)
    assert all((labels[test] == "a").sum() == 2 for _, test in split_into_folds(20, labels, 5))


def test_more_folds_than_images_are_refused():
    with pytest.raises(PerceptError, match="folds is 30 for 20 images"):
        split_into_folds(20, None, 30)


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


def test_voxel_counts_beyond_the_data_are_left_out_or_refused():
    assert parse_voxel_counts("400, 800,1600", 900) == [400, 800]
    with pytest.raises(PerceptError, match="the data have 60 voxels"):
        parse_voxel_counts("400,800", 60)
    with pytest.raises(PerceptError, match="numbers of voxels"):
        parse_voxel_counts("400,many", 900)

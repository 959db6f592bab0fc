"""src.readers.volumes: against coordinates worked out by hand."""

import nibabel
import numpy as np
import pytest

from src.readers.volumes import load_anat_roi, map_volume
from src.utils import PerceptError


def grid(shape):
    """The transform of a grid onto itself: coordinates from 1."""
    return np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in shape), indexing="ij"), -1).astype(
        np.float32
    )


@pytest.mark.parametrize("interpolation", ["nearest", "linear", "cubic", "wta"])
def test_the_identity_keeps_everything_the_first_slabs_too(interpolation):
    volume = np.random.default_rng(0).integers(0, 4, (4, 5, 6)).astype(np.int16)
    np.testing.assert_allclose(
        map_volume(volume, grid(volume.shape), interpolation), volume, atol=1e-5
    )


def test_shifted_and_missing_coordinates():
    volume = np.arange(24.0).reshape(2, 3, 4)
    transform = np.array(
        [
            [1, 1, 1],
            [2, 3, 4],
            [1.5, 1, 1],
            [9999, 9999, 9999],
            [0.9, 1, 1],
            [2, 3, 4.1],
            [np.nan, 1, 1],
        ]
    ).reshape(7, 1, 1, 3)
    np.testing.assert_allclose(
        map_volume(volume, transform, "linear", -5).ravel(), [0, 23, 6, -5, -5, -5, -5]
    )


def test_the_winner_takes_all_where_nearest_would_not():
    volume = np.zeros((3, 3, 1), np.int16)
    volume[0], volume[1, 1] = (
        7,
        9,
    )  # at 0.55 of the way from 7 to 9 along a line whose neighbours are 0
    point = np.array([1.55, 2.0, 1.0]).reshape(1, 1, 1, 3)
    assert map_volume(volume, point, "wta").item() == 9
    near = np.array([1.55, 1.7, 1.0]).reshape(1, 1, 1, 3)  # shares: 7 .45, 9 .55*.7=.385, 0 .165
    assert (
        map_volume(volume, near, "wta").item() == 7
        and map_volume(volume, near, "nearest").item() == 9
    )


def test_the_anatomical_roi_of_a_subject(tmp_path):
    labels = np.random.default_rng(1).integers(-1, 8, (6, 7, 8)).astype(np.int16)
    transform = grid((6, 7, 8))[::2, ::2, ::2]
    for name, array in (
        ("anat/roi/prf-visualrois", labels),
        ("transforms/anat0pt8-to-func1pt8", transform),
    ):
        path = tmp_path / "nsddata/ppdata/subj03" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    np.testing.assert_array_equal(load_anat_roi(tmp_path, 3), labels[::2, ::2, ::2])
    with pytest.raises(PerceptError, match="subj04.*missing"):
        load_anat_roi(tmp_path, 4)
    with pytest.raises(PerceptError, match="func1pt8mm"):
        load_anat_roi(tmp_path, 3, space="MNI")


@pytest.mark.parametrize(("shape", "how"), [((4, 4), "nearest"), ((4, 4, 4), "bicubic")])
def test_refused(shape, how):
    with pytest.raises(PerceptError):
        map_volume(np.zeros(shape), grid((4, 4, 4)), how)

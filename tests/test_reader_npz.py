"""src.readers.npz: what test_readers.py leaves: damaged files, ids that occur twice, very few
images.
"""

import numpy as np
import pytest

from src.data.subject import open_subject
from src.readers import npz
from src.utils import PerceptError


def arrays(n=8):
    rng = np.random.default_rng(0)
    return {
        "betas": rng.standard_normal((n, 30)).astype(np.float32),
        "images": rng.integers(0, 256, (n, 9, 9, 3), dtype=np.uint8),
    }


@pytest.mark.parametrize("place", [60, 100, 600, -400, -20])
def test_a_damaged_file_is_one_sentence(tmp_path, place):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    start = place % len(content)
    content[start : start + 16] = b"\xff" * 16
    path.write_bytes(content)
    with pytest.raises(PerceptError, match=r"mine.npz is damaged or cut off"):
        npz.read(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_id_of_two_images_is_named(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(), image_ids=np.array([1, 2, 3, 4, 5, 6, 7, 7]))
    with pytest.raises(PerceptError, match="image_ids of .*mine.npz has 7 2 times"):
        npz.read(tmp_path / "mine.npz", tmp_path / "out")


def test_few_images_leave_one_for_each_split(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(4))
    npz.read(tmp_path / "mine.npz", tmp_path / "out")
    assert open_subject(tmp_path / "out", 1).trials["split"].value_counts().to_dict() == {
        "train": 2,
        "val": 1,
        "test": 1,
    }


@pytest.mark.parametrize(
    ("convert", "single"),
    [
        (lambda grey: grey[..., None], True),
        (lambda grey: grey[..., None] / 255, True),
        (lambda grey: (grey / 255).astype(np.float32), True),
        (lambda grey: grey.astype(np.int64), True),
        (lambda grey: grey.astype(np.float32), True),
        (lambda grey: np.stack([grey, 255 - grey, grey], -1) / 255, False),
    ],
)
def test_pixels_of_any_number_type_and_channels_come_out_the_same(tmp_path, convert, single):
    grey = np.random.default_rng(0).integers(0, 256, (8, 5, 7), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", betas=arrays()["betas"], images=convert(grey))
    npz.read(tmp_path / "mine.npz", tmp_path / "out")
    images = open_subject(tmp_path / "out", 1).images(np.arange(8))
    assert (images[..., 0] == grey).all()
    assert (images[..., 1] == (grey if single else 255 - grey)).all()


def test_zeros_and_ones_are_black_and_white(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2, (8, 5, 7), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", betas=arrays()["betas"], images=pixels)
    with pytest.warns(UserWarning, match="only 0 and 1"):
        npz.read(tmp_path / "mine.npz", tmp_path / "out")
    images = open_subject(tmp_path / "out", 1).images(np.arange(8))
    assert (images[..., 2] == 255 * pixels).all()
    np.savez(tmp_path / "mine.npz", betas=arrays()["betas"], images=pixels.astype(bool))
    npz.read(tmp_path / "mine.npz", tmp_path / "other")
    assert (open_subject(tmp_path / "other", 1).images(np.arange(8)) == images).all()


def test_pixels_that_are_not_finite_are_refused(tmp_path):
    images = np.full((8, 4, 4), np.nan)
    np.savez(tmp_path / "mine.npz", betas=arrays()["betas"], images=images)
    with pytest.raises(PerceptError, match="from nan to nan"):
        npz.read(tmp_path / "mine.npz", tmp_path / "out")

"""src.data.targets: computed once, extended, resumed, and refused where they do not fit."""

import pickle

import numpy as np
import pytest

from src import data
from src.data.images import write_images
from src.data.targets import cache_targets
from src.utils import PerceptError
from tests.toy_data import make_world


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


class Encoder:
    """Flattened pixels of an image, counting what it was asked; stops after `limit` images."""

    def __init__(self, limit=10**9):
        self.n_encoded, self.limit = 0, limit

    def __call__(self, images):
        if self.n_encoded + len(images) > self.limit:
            raise RuntimeError("interrupted")
        self.n_encoded += len(images)
        return images.reshape(len(images), 4, 18).astype(np.float32)


def test_targets_are_computed_once_and_extended(world):
    encoder = Encoder()
    call = {"fingerprint": {"model": "a"}, "encode": encoder, "shape": (4, 18), "batch_size": 2}
    targets = cache_targets(world.folder, "pixels", image_ids=world.ids[:5], **call)
    assert (encoder.n_encoded, len(targets), targets.dtype) == (5, 5, np.float16)
    extended = cache_targets(world.folder, "pixels", image_ids=world.ids[3:], **call)
    assert encoder.n_encoded == 12
    order = np.array([11, 2, 2, 7, 0])
    np.testing.assert_array_equal(
        extended.rows(world.ids[order]), world.images[order].reshape(5, 4, 18)
    )
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(extended)).rows(world.ids[:1]), extended.rows(world.ids[:1])
    )
    cache_targets(world.folder, "pixels", image_ids=world.ids, **call)
    assert encoder.n_encoded == 12
    other = cache_targets(
        world.folder, "pixels", image_ids=world.ids[:1], **{**call, "fingerprint": {"model": "b"}}
    )
    assert encoder.n_encoded == 13 and other.folder != extended.folder
    with pytest.raises(PerceptError, match="lacks the targets of 1 images"):
        extended.rows([5])


def test_last_digits_of_golden_features_do_not_matter_and_others_do(world):
    encoder, golden = Encoder(), [0.1234, -2.0]
    call = {"encode": encoder, "image_ids": world.ids, "shape": (4, 18)}
    first = cache_targets(world.folder, "pixels", {"model": "a", "golden": golden}, **call)
    other = cache_targets(
        world.folder, "pixels", {"model": "a", "golden": [0.1235, -2.001]}, **call
    )  # as another device gives them
    assert other.folder == first.folder and encoder.n_encoded == 12
    with pytest.raises(PerceptError, match="no longer gives the same features: delete it"):
        cache_targets(world.folder, "pixels", {"model": "a", "golden": [0.5, -2.0]}, **call)


def test_interrupted_targets_go_on(world):
    call = {"fingerprint": {}, "image_ids": world.ids, "shape": (4, 18), "batch_size": 1}
    with pytest.raises(RuntimeError):
        cache_targets(world.folder, "pixels", encode=Encoder(limit=10), **call)
    encoder = Encoder()
    targets = cache_targets(world.folder, "pixels", encode=encoder, **call)
    assert encoder.n_encoded == 4  # 8 were safe
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
    assert encoder.n_encoded == 1
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


def test_latents_that_others_computed(tmp_path):
    latents = np.random.default_rng(0).standard_normal((5, 1, 4, 2, 2)).astype(np.float32)
    np.save(tmp_path / "fMRI_VAE.npy", latents)
    file = data.LatentFile(tmp_path / "fMRI_VAE.npy", (4, 2, 2))
    np.testing.assert_array_equal(file.rows([3, 0]), latents[[3, 0], 0])
    for absent_id in (5, -1):
        with pytest.raises(PerceptError, match=f"has 5 rows, none for image {absent_id}"):
            file.rows([0, absent_id])
    with pytest.raises(PerceptError, match="another autoencoder"):
        data.LatentFile(tmp_path / "fMRI_VAE.npy", (4, 64, 64))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("objects.npy", "absent.npy"):
        with pytest.raises(PerceptError, match="no array of latents"):
            data.LatentFile(tmp_path / name, (4, 2, 2))

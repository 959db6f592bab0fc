"""From prepared data to kernel decoders on disk, and what measures of likeness are stored with."""

import numpy as np
import pandas as pd
import pytest
import torch

from src.data import Normaliser
from src.decoding import find_decoders, load_decoder
from src.evaluation.likeness import (
    DIRECTIONS,
    HeldOutTokens,
    compare_embeddings,
    load_held_out,
)
from src.networks import KernelRidge, RidgeBaseline
from src.parameters import list_decoders
from src.pipeline.dryrun.needs import estimate_kernel_memory
from src.training import describe_closed_form, estimate_repeat_noise, fit_closed_form
from src.utils import PerceptError
from tests.toy_data import make_world


class Targets:
    """Targets (images, 2, 3) of any image ids, as a cache gives them."""

    shape = (2, 3)

    def rows(self, ids):
        return np.stack([np.random.default_rng(i).normal(size=self.shape) for i in ids])


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def test_repeat_noise_is_the_pooled_covariance_within_images(world):
    subject = world.subject
    normaliser = Normaliser.fit(subject)
    noise = estimate_repeat_noise(subject, normaliser)
    voxels, ids = subject.get_trials("train", normaliser)
    frame = pd.DataFrame(voxels.astype(float))
    residuals = (frame - frame.groupby(ids).transform("mean")).to_numpy()
    freedom = len(ids) - len(np.unique(ids))
    expected = residuals.T @ residuals / freedom
    np.testing.assert_allclose(noise.covariance.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert noise.averaged == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["ridge", "kernel"])
def test_a_closed_form_is_read_again_as_it_was_fitted(world, tmp_path, name):
    subject, path = world.subject, tmp_path / f"high_level_{name}.safetensors"
    normaliser = Normaliser.fit(subject)
    parameters = {"ridge_folds": 2, "seed": 1, "kernel": "rbf"}
    config = {"tokens": [2, 3]}
    solved = fit_closed_form(name, path, subject, normaliser, Targets(), config, parameters, (2, 3))
    again, stored = load_decoder(path)
    voxels = torch.from_numpy(subject.get_mean_betas("val", normaliser=normaliser)[0])
    torch.testing.assert_close(again(voxels), solved(voxels))
    assert isinstance(again, RidgeBaseline if name == "ridge" else KernelRidge)
    assert set(stored["data"]) == {subject.key} and stored["tokens"] == [2, 3]
    assert ("rbf on 7 weighted voxels" in describe_closed_form(solved)) == (name == "kernel")


def test_without_repeats_the_kernel_says_that_voxels_are_as_they_are():
    class ShownOnce:
        """A subject whose images were shown once each."""

        def rows_by_image(self, split):
            return [np.array([row]) for row in range(5)]

    assert estimate_repeat_noise(ShownOnce(), None) is None
    rng = np.random.default_rng(0)
    voxels, targets = rng.normal(size=(20, 4)), rng.normal(size=(20, 3))
    solved = KernelRidge.fit(voxels, targets, None, device="cpu")
    assert "voxels as they are (no image was shown twice)" in describe_closed_form(solved)


def test_decoders_by_name(tmp_path):
    assert list_decoders("all") == ["network", "ridge", "kernel"]
    assert list_decoders("both") == ["network", "ridge"]
    assert list_decoders("kernel") == ["kernel"]
    with pytest.raises(PerceptError, match="choose one of network, ridge, kernel, both, all"):
        list_decoders("svm")
    files = find_decoders(tmp_path / "a", tmp_path / "b", "best")
    assert files["network"] == (
        tmp_path / "a/high_level/best.safetensors",
        tmp_path / "b/low_level/best.safetensors",
    )
    assert files["kernel"][1] == tmp_path / "a/low_level_kernel.safetensors"
    with pytest.raises(PerceptError, match="choose one of ridge, kernel"):
        fit_closed_form("svm", "", None, None, None, {}, {})


def test_held_out_tokens_are_read_as_they_were_written(tmp_path):
    assert load_held_out(tmp_path, ["kernel"]) is None
    tokens = torch.randn(12, 2, 3).half().float()
    held_out = HeldOutTokens(np.arange(12), {"kernel": tokens + 1}, tokens, tokens.mean(0))
    held_out.save(tmp_path)
    again = load_held_out(tmp_path, ["kernel"])
    torch.testing.assert_close(again.true_tokens, tokens)
    torch.testing.assert_close(again.projected["kernel"], (tokens + 1).half().float())
    with pytest.raises(PerceptError, match="projected_ridge"):
        load_held_out(tmp_path, ["ridge"])
    brain, clip = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    together = compare_embeddings(brain, clip, again, "kernel")
    assert set(together) == {(m, d) for m in ("centred cosine", "CSLS") for d in DIRECTIONS}
    # a brain is compared alike whichever other brains are asked about
    other = compare_embeddings(torch.cat([brain[:1], brain[1:] + 3]), clip, again, "kernel")
    for measure in ("centred cosine", "CSLS"):
        key = measure, "image_from_brain"
        torch.testing.assert_close(together[key][0], other[key][0])


def test_memory_of_the_kernel_grows_with_images_squared():
    sizes = type("Sizes", (), {})()
    sizes.models = type("Models", (), {"tokens": 257, "dim": 768, "latent": (4, 64, 64)})()
    sizes.data = type("Data", (), {"train_images": 9000})()
    of_tokens = estimate_kernel_memory("01_train_high_level", sizes, 15724)
    assert 24e9 < of_tokens < 48e9  # targets and coefficients of 257 x 768 tokens, in host memory
    assert estimate_kernel_memory("02_train_autoencoder", sizes, 15724) < 12e9

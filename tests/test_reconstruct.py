"""From checkpoints to images: decoders rebuilt from their file alone, and reconstructions that do not depend on the batch."""

import numpy as np
import pytest
import torch

from src import reconstruct
from src.models import RidgeBaseline
from src.pretrained import Clipper, VersatileDiffusion
from src.utils import PerceptError, save_checkpoint

TOKENS = (17, 128)
CONFIG = {
    "model": {
        "name": "BrainDiffusionPrior",
        "kwargs": {"image_embed_dim": 128, "timesteps": 10},
        "voxel2clip": {"name": "BrainNetwork", "kwargs": {"in_dim": 20, "out_dim": 17 * 128, "clip_size": 128, "h": 16, "n_blocks": 1, "projector_dim": 16}},
        "net": {"name": "VersatileDiffusionPriorNetwork", "kwargs": {"dim": 128, "depth": 1, "dim_head": 16, "heads": 2, "num_tokens": 17}},
    },
    "tokens": list(TOKENS),
}


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return reconstruct.build_decoder(CONFIG["model"]).eval()


@pytest.fixture
def voxels():
    return np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)


def test_a_checkpoint_rebuilds_its_decoder(tmp_path, decoder, voxels):
    save_checkpoint(tmp_path / "last.safetensors", decoder.state_dict(), CONFIG)
    again, config = reconstruct.load_decoder(tmp_path / "last.safetensors")
    assert config == CONFIG and not again.training
    x = torch.from_numpy(voxels)
    torch.testing.assert_close(again.voxel2clip(x), decoder.voxel2clip(x))


def test_a_checkpoint_that_does_not_fit_is_refused_by_key(tmp_path, decoder):
    state = decoder.state_dict()
    state["net.extra"] = torch.zeros(1)
    del state["net.null_image_embed"]
    save_checkpoint(tmp_path / "last.safetensors", state, CONFIG)
    with pytest.raises(PerceptError, match=r"net\.null_image_embed(.|\n)*net\.extra"):
        reconstruct.load_decoder(tmp_path / "last.safetensors")
    with pytest.raises(PerceptError, match="No checkpoint at"):
        reconstruct.load_decoder(tmp_path / "none.safetensors")


def test_tokens_have_a_cls_of_length_one_and_the_prior_can_be_left_out(decoder, voxels):
    tokens, projected = reconstruct.predict_tokens(decoder, voxels, TOKENS, n_samples=2)
    assert tokens.shape == (5, 2, *TOKENS) and projected.shape == (5, *TOKENS)
    torch.testing.assert_close(tokens[:, :, 0].norm(dim=-1), torch.ones(5, 2), rtol=1e-4, atol=1e-4)
    backbone = decoder.voxel2clip(torch.from_numpy(voxels))[0].view(5, *TOKENS)
    plain, _ = reconstruct.predict_tokens(decoder, voxels, TOKENS, use_prior=False)
    torch.testing.assert_close(plain[:, 0], backbone / decoder.image_embed_scale, rtol=1e-4, atol=1e-4)
    same, _ = reconstruct.predict_tokens(decoder, voxels, TOKENS, n_samples=2)
    torch.testing.assert_close(tokens, same)


def test_samples_of_the_prior_belong_to_their_image_and_not_to_the_batch(decoder, voxels):
    ids = np.array([3, 14, 15, 92, 65])
    options = {"n_samples": 2, "image_ids": ids}
    together, _ = reconstruct.predict_tokens(decoder, voxels, TOKENS, **options)
    apart, _ = reconstruct.predict_tokens(decoder, voxels, TOKENS, batch_size=2, **options)
    turned, _ = reconstruct.predict_tokens(decoder, voxels[::-1].copy(), TOKENS, n_samples=2, image_ids=ids[::-1])
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(turned.flip(0), together, rtol=1e-3, atol=1e-4)
    alike = np.repeat(voxels[:1], 5, 0)
    own, _ = reconstruct.predict_tokens(decoder, alike, TOKENS, **options)
    same, _ = reconstruct.predict_tokens(decoder, alike, TOKENS, same=True, **options)
    assert not torch.allclose(own[0], own[1], atol=1e-3)
    torch.testing.assert_close(same[0], same[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(same[:, 0], same[:, 1], atol=1e-3)  # samples of one image still differ


def test_ridge_is_a_decoder_like_any_other(voxels):
    ridge = RidgeBaseline(20, TOKENS)
    ridge.bias.data.fill_(1.0)
    tokens, projected = reconstruct.predict_tokens(ridge, voxels, TOKENS)
    assert tokens.shape == (5, 1, *TOKENS) and torch.equal(projected, torch.ones(5, *TOKENS))
    latents = reconstruct.predict_latents(RidgeBaseline(20, (4, 16, 16)), voxels, (4, 16, 16), batch_size=2)
    assert latents.shape == (5, 4, 16, 16)


def test_noise_is_a_function_of_seed_image_and_sample():
    ids = np.array([7, 8])
    noise = reconstruct.latent_noise(ids, (4, 8, 8))
    assert torch.equal(noise[1], reconstruct.latent_noise(ids[1:], (4, 8, 8))[0])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise, reconstruct.latent_noise(ids, (4, 8, 8), sample=1))
    same = reconstruct.latent_noise(ids, (4, 8, 8), same=True)
    assert torch.equal(same[0], same[1])


def test_reconstructions_do_not_depend_on_the_batch():
    diffusion = VersatileDiffusion("mini")
    tokens = torch.nn.functional.normalize(torch.randn(3, 1, *TOKENS, generator=torch.Generator().manual_seed(0)), dim=-1)
    ids = np.arange(3)
    options = {"num_inference_steps": 2, "strength": 1.0}
    together = reconstruct.generate_images(diffusion, tokens, ids, batch_size=3, **options)
    alone = reconstruct.generate_images(diffusion, tokens, ids, batch_size=1, **options)
    assert together.shape == (3, 1, 3, 32, 32)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_the_candidate_nearest_to_the_brains_prediction_is_picked():
    clipper = Clipper("mini")
    candidates = torch.rand(4, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([2, 0, 1, 2])
    projected = torch.stack([clipper.embed_image(candidates[i, w][None])[0] for i, w in enumerate(wanted)])
    chosen, index = reconstruct.pick_best(clipper, projected, candidates)
    assert torch.equal(index, wanted) and torch.equal(chosen, candidates[torch.arange(4), wanted])

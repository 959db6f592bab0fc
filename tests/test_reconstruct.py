"""From checkpoints to images: decoders rebuilt from their file alone, and reconstructions that do
not depend on the batch.
"""

import numpy as np
import pytest
import torch

from src.decoding import checkpoints, generate, predict, reconstructions, selection
from src.networks.linear import RidgeBaseline
from src.networks.rebuild import build_decoder
from src.pretrained.clip import Clipper
from src.pretrained.generators import VersatileDiffusion
from src.utils import PerceptError, save_checkpoint

TOKENS = (17, 128)
CONFIG = {
    "model": {
        "name": "BrainDiffusionPrior",
        "kwargs": {"image_embed_dim": 128, "timesteps": 10},
        "voxel2clip": {
            "name": "BrainNetwork",
            "kwargs": {
                "in_dim": 20,
                "out_dim": 17 * 128,
                "clip_size": 128,
                "h": 16,
                "n_blocks": 1,
                "projector_dim": 16,
            },
        },
        "net": {
            "name": "VersatileDiffusionPriorNetwork",
            "kwargs": {"dim": 128, "depth": 1, "dim_head": 16, "heads": 2, "num_tokens": 17},
        },
    },
    "tokens": list(TOKENS),
}


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return build_decoder(CONFIG["model"]).eval()


@pytest.fixture
def voxels():
    return np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)


def test_a_checkpoint_rebuilds_its_decoder(tmp_path, decoder, voxels):
    save_checkpoint(tmp_path / "last.safetensors", decoder.state_dict(), CONFIG)
    repeated, config = checkpoints.load_decoder(tmp_path / "last.safetensors")
    assert config == CONFIG and not repeated.training
    x = torch.from_numpy(voxels)
    torch.testing.assert_close(repeated.voxel2clip(x), decoder.voxel2clip(x))


def test_a_checkpoint_that_does_not_fit_is_refused_by_key(tmp_path, decoder):
    state = decoder.state_dict()
    state["net.extra"] = torch.zeros(1)
    del state["net.null_image_embed"]
    save_checkpoint(tmp_path / "last.safetensors", state, CONFIG)
    with pytest.raises(PerceptError, match=r"net\.null_image_embed(.|\n)*net\.extra"):
        checkpoints.load_decoder(tmp_path / "last.safetensors")
    with pytest.raises(PerceptError, match="No checkpoint at"):
        checkpoints.load_decoder(tmp_path / "none.safetensors")


def sample_tokens(decoder, voxels, shape, image_ids=None, batch_size=100, **sampling):
    sampling = predict.PriorSampling(**sampling)
    return predict.predict_tokens(decoder, voxels, shape, sampling, image_ids, batch_size)


def test_tokens_have_a_cls_of_length_one_and_the_prior_can_be_left_out(decoder, voxels):
    tokens, projected = sample_tokens(decoder, voxels, TOKENS, n_samples=2)
    assert tokens.shape == (5, 2, *TOKENS) and projected.shape == (5, *TOKENS)
    torch.testing.assert_close(tokens[:, :, 0].norm(dim=-1), torch.ones(5, 2), rtol=1e-4, atol=1e-4)
    backbone = decoder.voxel2clip(torch.from_numpy(voxels))[0].view(5, *TOKENS)
    plain, _ = sample_tokens(decoder, voxels, TOKENS, use_prior=False)
    torch.testing.assert_close(
        plain[:, 0], backbone / decoder.image_embed_scale, rtol=1e-4, atol=1e-4
    )
    same, _ = sample_tokens(decoder, voxels, TOKENS, n_samples=2)
    torch.testing.assert_close(tokens, same)


def test_samples_of_the_prior_belong_to_their_image_and_not_to_the_batch(decoder, voxels):
    ids = np.array([3, 14, 15, 92, 65])
    options = {"n_samples": 2, "image_ids": ids}
    together, _ = sample_tokens(decoder, voxels, TOKENS, **options)
    apart, _ = sample_tokens(decoder, voxels, TOKENS, batch_size=2, **options)
    rotated, _ = sample_tokens(
        decoder, voxels[::-1].copy(), TOKENS, n_samples=2, image_ids=ids[::-1]
    )
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rotated.flip(0), together, rtol=1e-3, atol=1e-4)
    repeated_rows = np.repeat(voxels[:1], 5, 0)
    local, _ = sample_tokens(decoder, repeated_rows, TOKENS, **options)
    same, _ = sample_tokens(decoder, repeated_rows, TOKENS, shared_noise=True, **options)
    assert not torch.allclose(local[0], local[1], atol=1e-3)
    torch.testing.assert_close(same[0], same[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(
        same[:, 0], same[:, 1], atol=1e-3
    )  # samples of one image still differ


def test_ridge_is_a_decoder_like_any_other(voxels):
    ridge = RidgeBaseline(20, TOKENS)
    ridge.bias.data.fill_(1.0)
    tokens, projected = sample_tokens(ridge, voxels, TOKENS)
    assert tokens.shape == (5, 1, *TOKENS) and torch.equal(projected, torch.ones(5, *TOKENS))
    latents = predict.predict_latents(
        RidgeBaseline(20, (4, 16, 16)), voxels, (4, 16, 16), batch_size=2
    )
    assert latents.shape == (5, 4, 16, 16)


def test_noise_is_a_function_of_seed_image_and_sample():
    ids = np.array([7, 8])
    noise = generate.draw_latent_noise(ids, (4, 8, 8))
    assert torch.equal(noise[1], generate.draw_latent_noise(ids[1:], (4, 8, 8))[0])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(
        noise, generate.draw_latent_noise(ids, (4, 8, 8), sample=1)
    )
    same = generate.draw_latent_noise(ids, (4, 8, 8), shared_noise=True)
    assert torch.equal(same[0], same[1])


@pytest.mark.slow(reason="generates many images")
def test_reconstructions_do_not_depend_on_the_batch():
    diffusion = VersatileDiffusion("mini")
    tokens = torch.nn.functional.normalize(
        torch.randn(3, 1, *TOKENS, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    ids = np.arange(3)
    options = {"num_inference_steps": 2, "strength": 1.0}
    together = generate.generate_images(diffusion, tokens, ids, batch_size=3, **options)
    alone = generate.generate_images(diffusion, tokens, ids, batch_size=1, **options)
    assert together.shape == (3, 1, 3, 32, 32)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_the_candidate_nearest_to_the_brains_prediction_is_picked():
    clipper = Clipper("mini")
    candidates = torch.rand(4, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([2, 0, 1, 2])
    projected = torch.stack(
        [clipper.embed_image(candidates[i, w][None])[0] for i, w in enumerate(expected)]
    )
    chosen, index = selection.select_best(clipper, projected, candidates)
    assert torch.equal(index, expected) and torch.equal(
        chosen, candidates[torch.arange(4), expected]
    )


# ------------------------------------------------------- samples together, one embedding, resuming
def test_samples_are_made_in_one_batch_as_they_would_be_one_by_one():
    diffusion, ids = VersatileDiffusion("mini"), np.array([4, 9])
    tokens = torch.nn.functional.normalize(
        torch.randn(2, 3, *TOKENS, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    latents = torch.randn(2, *diffusion.latent_shape, generator=torch.Generator().manual_seed(1))
    together = generate.generate_images(
        diffusion, tokens, ids, latents, strength=0.7, num_inference_steps=4, batch_size=4
    )
    assert together.shape == (2, 3, 3, 32, 32)
    for s in range(3):
        noise = generate.draw_latent_noise(ids, diffusion.latent_shape, 42, s)
        alone = diffusion.generate(tokens[:, s], noise, latents, 0.7, num_inference_steps=4)
        torch.testing.assert_close(together[:, s], alone, atol=1e-4, rtol=1e-4)
    shared = generate.generate_images(
        diffusion, tokens[:, :1], ids, latents, strength=0.7, num_inference_steps=4, n_samples=2
    )
    torch.testing.assert_close(shared[:, 0], together[:, 0], atol=1e-4, rtol=1e-4)
    assert shared.shape == (2, 2, 3, 32, 32) and not torch.allclose(shared[:, 0], shared[:, 1])


@pytest.mark.parametrize(
    ("strength", "steps"),
    [(0.0, 0), (0.04, 0), (0.06, 1), (0.5, 10), (0.85, 17), (0.99, 19), (1.0, 20)],
)
def test_strength_is_the_share_of_the_steps(strength, steps):
    diffusion, calls = VersatileDiffusion("mini"), []
    diffusion.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens, latents = (
        torch.zeros(1, 1, *TOKENS),
        torch.randn(1, *diffusion.latent_shape, generator=torch.Generator().manual_seed(1)),
    )
    outputs = generate.generate_images(diffusion, tokens, np.arange(1), latents, strength=strength)
    assert len(calls) == steps
    assert steps or torch.equal(outputs[:, 0], diffusion.decode(latents))


def test_one_embedding_goes_to_image_variations_and_keeps_its_length(voxels):
    config = CONFIG["model"] | {
        "voxel2clip": {
            "name": "BrainNetwork",
            "kwargs": {
                "in_dim": 20,
                "out_dim": 128,
                "clip_size": 128,
                "h": 16,
                "n_blocks": 1,
                "projector_dim": 16,
            },
        },
        "net": {
            "name": "DiffusionPriorNetwork",
            "kwargs": {
                "dim": 128,
                "depth": 1,
                "dim_head": 16,
                "heads": 2,
                "num_timesteps": 10,
                "max_text_len": 3,
            },
        },
    }
    decoder = build_decoder(config).eval()
    tokens, projected = sample_tokens(decoder, voxels, (1, 128), n_samples=2)
    assert tokens.shape == (5, 2, 1, 128) and projected.shape == (5, 1, 128)
    assert (
        tokens.norm(dim=-1) - 1
    ).abs().min() > 1e-3  # not normalised, as the generator was trained
    diffusion = generate.load_generator(1, "mini")
    assert (
        type(diffusion).__name__ == "ImageVariation"
        and type(generate.load_generator(17, "mini")).__name__ == "VersatileDiffusion"
    )
    candidates = generate.generate_images(diffusion, tokens, np.arange(5), num_inference_steps=2)
    chosen, index = selection.select_best(Clipper("mini", hidden=False), projected, candidates)
    assert chosen.shape == (5, 3, 32, 32) and set(index.tolist()) <= {0, 1}


def test_an_interrupted_reconstruction_goes_on_where_it_stopped(tmp_path):
    outputs = []

    def make(rows):
        if len(outputs) == 2:
            outputs.append("stopped")
            raise KeyboardInterrupt
        outputs.append((rows.start, rows.stop))
        return {"image": torch.arange(rows.start, rows.stop)}

    with pytest.raises(KeyboardInterrupt):
        reconstructions.compute_in_chunks(make, 7, 2, tmp_path, {"seed": 1})
    results = reconstructions.compute_in_chunks(make, 7, 2, tmp_path, {"seed": 1})
    assert results["image"].tolist() == list(range(7)) and outputs == [
        (0, 2),
        (2, 4),
        "stopped",
        (4, 6),
        (6, 7),
    ]
    reconstructions.compute_in_chunks(make, 7, 2, tmp_path, {"seed": 2})
    assert len(outputs) == 9  # made of something else: nothing is taken over

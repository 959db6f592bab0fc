"""The refinement: diffusers' own SDXL pipeline at tiny size with the published settings, and the
miniature.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from src import pretrained, utils
from src.decoding import refine
from src.decoding.refine import Refinement
from src.pretrained import refiner, unclip
from src.utils import PerceptError


def tiny_sdxl():
    """A random SDXL of the real classes and parts: two text encoders, two cross-attending levels,
    six numbers of sizes.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(
        pretrained.MINI_MODELS / "stable_diffusion" / "tokenizer"
    )
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
    }
    text = {
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
        **ids,
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        sample_size=16,
        scaling_factor=0.13025,
    )
    return StableDiffusionXLImg2ImgPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=16, **text)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=24, projection_dim=20, **text)
        ),
        scheduler=EulerDiscreteScheduler(
            **unclip.SCHEDULER, timestep_spacing="leading", steps_offset=1
        ),
        add_watermarker=False,
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl().save_pretrained(folder)
    loaded = refiner.load_refiner(str(folder))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def seen(pipeline, monkeypatch):
    """What the network is called with, step by step."""
    calls, forward = [], pipeline.unet.forward

    def noted(x, t, **options):
        scheduler = pipeline.scheduler
        calls.append(
            {"t": float(t), "sigma": float(scheduler.sigmas[scheduler.step_index]), "batch": len(x)}
            | options["added_cond_kwargs"]
        )
        return forward(x, t, **options)

    monkeypatch.setattr(pipeline.unet, "forward", noted)
    return calls


SMALL = Refinement(size=16)
CAPTIONS, IDS = (
    ["a red ball on a sandy beach", "a cup in a room", "a green tree"],
    np.array([7, 3, 11]),
)


def test_the_published_settings_reach_sdxl(pipeline, seen):
    pictures = torch.rand(3, 3, 24, 24)
    outputs = refine.refine_images(pipeline, CAPTIONS, pictures, IDS, SMALL)
    assert (
        outputs.shape == pictures.shape
        and 0 <= float(outputs.min())
        and float(outputs.max()) <= 1
        and float((outputs - pictures).abs().mean()) > 0.01
    )
    assert [call["t"] for call in seen] == unclip.compute_euler_timesteps(25)[13:] and len(
        seen
    ) == 12
    assert seen[0]["sigma"] == pytest.approx(1.5092, abs=1e-4) and seen[0]["batch"] == 6  # guidance
    assert seen[0]["time_ids"].tolist() == [[16, 16, 0, 0, 1024, 1024]] * 6
    assert (Refinement.steps, Refinement.run, refine.SIZE) == (25, 12, 768)


def test_noise_is_each_pictures_own_and_captions_count(pipeline):
    torch.manual_seed(1)
    pictures = torch.rand(3, 3, 16, 16)
    together = refine.refine_images(pipeline, CAPTIONS, pictures, IDS, SMALL, batch_size=3)
    alone = refine.refine_images(
        pipeline, CAPTIONS[1:2], pictures[1:2], IDS[1:2], SMALL, batch_size=1
    )
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)
    for changed in (
        refine.refine_images(pipeline, ["a green tree"], pictures[1:2], IDS[1:2], SMALL),
        refine.refine_images(pipeline, CAPTIONS[1:2], pictures[1:2], IDS[1:2], SMALL, seed=43),
        refine.refine_images(
            pipeline,
            CAPTIONS[1:2],
            pictures[1:2],
            IDS[1:2],
            Refinement(size=16, negative_prompt=""),
        ),
    ):
        assert float((changed - alone).abs().max()) > 1e-3


def test_few_steps_stay_near_and_all_steps_leave_the_picture(pipeline, seen):
    pictures = torch.rand(1, 3, 16, 16)
    for run in (1, 5):
        seen.clear()
        refinement = Refinement(steps=5, run=run, size=16)
        refine.refine_images(pipeline, CAPTIONS[:1], pictures, IDS[:1], refinement)
        assert [call["t"] for call in seen] == unclip.compute_euler_timesteps(5)[5 - run :]


def test_the_miniature_repaints_after_its_caption():
    pipeline = refiner.load_refiner("mini")
    pipeline.set_progress_bar_config(disable=True)
    flat = torch.full((2, 3, 32, 32), 0.5)
    outputs = refine.refine_images(
        pipeline,
        ["a red ball on a sandy beach", "a blue cup in a room"],
        flat,
        IDS[:2],
        batch_size=1,
    )
    assert outputs.shape == flat.shape and float((outputs - flat).abs().mean()) > 0.02
    repeated = refine.refine_images(
        pipeline,
        ["a red ball on a sandy beach", "a blue cup in a room"],
        flat,
        IDS[:2],
        batch_size=2,
    )
    torch.testing.assert_close(outputs, repeated, rtol=1e-3, atol=1e-3)


def test_refusals(pipeline, tmp_path, monkeypatch):
    pictures = torch.rand(2, 3, 16, 16)
    with pytest.raises(PerceptError, match="3 captions for 2 images"):
        refine.refine_images(pipeline, CAPTIONS, pictures, IDS[:2])
    with pytest.raises(PerceptError, match="0 of 25 steps"):
        refine.refine_images(pipeline, CAPTIONS[:2], pictures, IDS[:2], Refinement(run=0))
    monkeypatch.setattr(utils, "HOME", tmp_path)
    with pytest.raises(PerceptError, match="download refiner"):
        refiner.load_refiner("hub")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"none")
    with pytest.raises(PerceptError, match="cannot be read as an SDXL model"):
        refiner.load_refiner(str(broken), base=str(tmp_path))
    with pytest.raises(PerceptError, match="Could not load"):
        refiner.load_refiner(str(tmp_path / "absent"))

"""The diffusion models' networks, what conditions them, and their sampling.

Diffusion predicts v, with timesteps drawn towards high noise. Latents and tokens are computed once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import (
    UNetFlatConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPModel

from src import miniworld

from . import data
from .autoencoder import build_vae
from .clip import compute_image_tokens, load_trained_clip, tokenize
from .data import DIM, get_device, load_descriptions, load_images, to_pixels
from .training import load_averaged

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
WIDTHS, HEADS = (64, 96, 96), 4
TEXT_FLOWS = ("text", "stable")
STARTING_FLOWS = {  # the flow whose weights another begins with
    "robust": "image",
    "text": "image",
    "variation": "image",
    "stable": "text",
}
LATENT_SIDE = miniworld.IMAGE_SIZE // 2
CONDITION_MAPS = ("attn2.to_k.weight", "attn2.to_v.weight")  # the weights that read the condition


# ----------------------------------------------------------------------------------------- networks
def build_unet(**options: Any) -> UNet2DConditionModel:
    """An untrained network of a flow; `options` are added to its configuration."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=DIM,
        attention_head_dim=HEADS,
        **options,
    )


def build_text_unet() -> UNetFlatConditionModel:
    """The text flow's network.

    Only its cross-attention blocks are ever run, on the image flow's convolutions.
    """
    return UNetFlatConditionModel(
        sample_size=1,
        in_channels=32,
        out_channels=32,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlockFlat", "CrossAttnDownBlockFlat", "CrossAttnDownBlockFlat"),
        up_block_types=("CrossAttnUpBlockFlat", "CrossAttnUpBlockFlat", "UpBlockFlat"),
        cross_attention_dim=DIM,
        attention_head_dim=HEADS,
    )


# --------------------------------------------------------------------------------------- conditions
class FlowData(NamedTuple):
    """What a flow learns from.

    Latents (images, 4, height, width), conditions (images, [captions,] tokens, dim) as the
    pipelines will feed them, and the scale of the latents.
    """

    latents: np.ndarray
    condition: np.ndarray
    scale: float


@torch.no_grad()
def load_flow_data(flow: str, name: str) -> FlowData:
    """Latents and conditions of a set of images, computed once.

    Args:
        flow: one of the diffusion stages.
        name: of one of `IMAGE_SETS`.
    """
    flow = "image" if flow == "robust" else flow
    path = data.WORK / f"cache_{flow}_{name}.npz"
    if path.exists():
        stored = np.load(path)
        return FlowData(stored["latents"], stored["condition"], float(stored["scale"]))
    clip = load_trained_clip().to(get_device())
    vae = load_averaged("vae", build_vae()).to(get_device())
    images, latents, conditions = load_images(name), [], []
    for start in range(0, len(images), 500):
        x = to_pixels(images[start : start + 500]).to(get_device())
        mode = vae.encode(2 * x - 1).latent_dist.mode()
        latents.append(mode.half().cpu().numpy())
        if flow not in TEXT_FLOWS:
            conditions.append(_compute_image_condition(clip, x, flow).half().cpu().numpy())
    if flow in TEXT_FLOWS:
        conditions = _compute_text_conditions(clip, name, flow)
    all_latents, all_conditions = np.concatenate(latents), np.concatenate(conditions)
    scale = 1.0 / float(all_latents.astype(np.float32).std())
    np.savez(path, latents=all_latents, condition=all_conditions, scale=scale)
    return FlowData(all_latents, all_conditions, scale)


def _compute_image_condition(clip: CLIPModel, x: Tensor, flow: str) -> Tensor:
    """All tokens over the class token's norm ("image"), or the class token alone ("variation")."""
    tokens = compute_image_tokens(clip, x)
    if flow == "image":
        return tokens / tokens[:, :1].norm(dim=-1, keepdim=True)
    return tokens[:, :1]


def _compute_text_conditions(clip: CLIPModel, name: str, flow: str) -> list[np.ndarray]:
    """Text tokens of the three captions of an image that name its scene.

    Returns:
        Parts of (images, 3, tokens, dim).
    """
    captions = []
    for five in load_descriptions(name)[0]:
        captions += [five[k] for k in (0, 1, 3)]
    parts = []
    for start in range(0, len(captions), 600):
        tokens = compute_text_tokens(clip, captions[start : start + 600], flow)
        part = tokens.half().cpu().numpy()
        parts.append(part.reshape(-1, 3, *part.shape[1:]))
    return parts


@torch.no_grad()
def compute_text_tokens(clip: CLIPModel, captions: list[str], flow: str) -> Tensor:
    """Condition of a text-guided pipeline (captions, tokens, dim).

    Versatile Diffusion ("text"): every projected hidden state over the norm of the pooled one;
    Stable Diffusion ("stable"): the hidden states.
    """
    ids = tokenize(captions)
    encoded = clip.text_model(input_ids=ids.to(next(clip.parameters()).device))
    if flow == "stable":
        return encoded.last_hidden_state
    pooled = clip.text_projection(encoded.pooler_output)[:, None]
    return clip.text_projection(encoded.last_hidden_state) / pooled.norm(dim=-1, keepdim=True)


def build_null_condition(flow: str) -> Tensor:
    """What the pipelines pass for "no condition", (1, 1 or tokens, dim).

    Zeros for images, the tokens of an empty sentence for text.
    """
    if flow not in TEXT_FLOWS:
        return torch.zeros(1, 1, DIM)
    return compute_text_tokens(load_trained_clip(), [""], flow)


def compute_condition_scale(condition: np.ndarray) -> float:
    """Factor that brings tokens to unit variance.

    Tokens over the class token's norm are tiny: the network is trained on scaled tokens, and the
    factor is folded into its weights on export.
    """
    return 1.0 / float(condition[:2000].astype(np.float32).std())


def fold_scale(unet: nn.Module, factor: float) -> nn.Module:
    """Fold the factor of the condition into the weights that read it.

    So the pipelines need not know of it.
    """
    for name, parameter in unet.named_parameters():
        if name.endswith(CONDITION_MAPS):
            parameter.data.mul_(factor)
    return unet


def load_finished_flow(flow: str) -> UNet2DConditionModel:
    """A trained flow in half precision, the factor of its condition folded in."""
    unet = load_averaged(flow, build_unet())
    factor = compute_condition_scale(load_flow_data(flow, "train").condition)
    return fold_scale(unet, factor).half()


# ---------------------------------------------------------------------------------------- sampling
def draw_timesteps(n: int, device: torch.device | None = None) -> Tensor:
    """Random timesteps, more of them towards high noise, where conditioning is learnt."""
    share = 1 - torch.rand(n, device=device) ** 1.6
    return (1000 * share).long().clamp(0, 999)


@torch.no_grad()
def sample_latents(
    unet: nn.Module, condition: Tensor, null: Tensor, guidance: float = 3.5, steps: int = 20
) -> Tensor:
    """Latents (batch, 4, height, width) from pure noise, as the pipelines sample them.

    Args:
        unet: the network.
        condition: (batch, tokens, dim).
        null: condition that stands for none.
        guidance: scale of classifier-free guidance.
        steps: of UniPC.
    """
    options: dict[str, Any] = {
        "final_sigmas_type": "sigma_min",
        "timestep_spacing": "linspace",
    }
    config = DDIMScheduler(**SCHEDULE).config
    scheduler = UniPCMultistepScheduler.from_config(config, **options)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(3)
    shape = (len(condition), 4, LATENT_SIDE, LATENT_SIDE)
    latents = torch.randn(shape, generator=generator).to(condition.device)
    conditions = torch.cat([null.expand_as(condition), condition])
    for t in scheduler.timesteps:
        inputs = torch.cat([latents, latents])
        predicted = unet(inputs, t, encoder_hidden_states=conditions).sample.float()
        unconditional, conditional = predicted.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(guided, t, latents).prev_sample
    return latents

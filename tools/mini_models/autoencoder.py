"""The VAE: images to latents of 4 x 16 x 16 and back."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from src import miniworld

from .data import draw_indices, get_device, load_images, to_pixels
from .training import Options, train


def build_vae() -> AutoencoderKL:
    """An untrained VAE of the diffusers library."""
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=miniworld.IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def compute_edge_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the images' gradients along both axes."""
    errors = (torch.diff(y, dim=d) - torch.diff(x, dim=d) for d in (2, 3))
    return sum(error.abs().mean() for error in errors)


def train_vae(options: Options, rank: int = 0) -> None:
    """Train the VAE on squared, absolute and edge errors and a small KL term."""
    images, check_pixels = load_images("train"), to_pixels(load_images("check"))
    vae = build_vae().to(get_device())

    def compute_loss(rng: np.random.Generator, batch_size: int) -> Tensor:
        index = draw_indices(rng, len(images), batch_size)
        x = 2 * to_pixels(images[index]).to(get_device()) - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / x[0].numel()
        edges = compute_edge_loss(x, y)
        squared, absolute = F.mse_loss(y.float(), x), F.l1_loss(y.float(), x)
        return squared * 4 + absolute + 0.5 * edges + 1e-3 * kl

    def evaluate(model: nn.Module) -> dict[str, float]:
        x = check_pixels.to(get_device())
        latents = model.encode(2 * x - 1).latent_dist.mode()
        y = model.decode(latents).sample / 2 + 0.5
        errors = (y.clamp(0, 1) - x) ** 2
        errors = errors.mean(dim=(1, 2, 3))
        psnr = -10 * torch.log10(errors)
        return {"psnr": round(float(psnr.mean()), 3)}

    train("vae", vae, compute_loss, evaluate, options, lr=2e-3, batch_size=64, rank=rank)

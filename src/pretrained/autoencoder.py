"""The frozen image autoencoder: images to latents and back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
)
from torch import Tensor

from src.pretrained.base import FrozenModel, load_pretrained, locate_model, resize_images


class LatentAutoencoder(FrozenModel):
    """The frozen VAE of a diffusion model; latents are the posterior's mode times the scaling
    factor.

    Args:
        weights: "hub", "mini" or a folder.
        name: the model whose VAE it is (the published low-level branch uses that of image
            variations).
        image_size: side to which images are resized (bilinear, antialiased) before encoding; 0: the
            VAE's own (512 where it does not say).
        device: torch device.
    """

    def __init__(
        self,
        weights: str = "hub",
        name: str = "versatile_diffusion",
        image_size: int = 0,
        device: str = "cpu",
    ):
        super().__init__(name, weights, device)
        self.model = (
            load_pretrained(AutoencoderKL, self.place, subfolder="vae")
            .float()
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )
        self.config = self.model.config
        self.image_size = image_size or (self.config.sample_size if weights == "mini" else 512)
        self.factor = 2 ** (len(self.config.block_out_channels) - 1)
        self.scale = float(self.config.scaling_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        side = self.image_size // self.factor
        return (self.config.latent_channels, side, side)

    def _options(self) -> dict[str, Any]:
        return {"image_size": self.image_size}

    @property
    def target_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of a latent."""
        return self.latent_shape

    def _encode(self, images: Tensor) -> Tensor:
        return self.encode(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> scaled latents (batch, channels, h, w)."""
        parts = []
        for some in images.split(self._batch_size):
            x = resize_images(some.to(self.device), self.image_size)
            parts.append(self.model.encode(2 * x - 1).latent_dist.mode() * self.scale)
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (batch, channels, h, w) -> images (batch, 3, height, width) clamped to [0,
        1].
        """
        parts = [
            self.model.decode(some.to(self.device) / self.scale).sample
            for some in latents.split(self._batch_size)
        ]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    @property
    def _batch_size(self) -> int:
        """Images that the network sees at a time: 4 of 512 pixels a side, each of whose activations
        take half a gigabyte.
        """
        return max(1, 2**20 // self.image_size**2)


def make_untrained_vae(weights: str = "hub", name: str = "stable_diffusion") -> Any:
    """The VAE of a diffusion model without its weights, for planning: the folder's own, or as those
    of the hub are.
    """
    if weights != "hub":
        return AutoencoderKL.from_config(
            AutoencoderKL.load_config(locate_model(name, weights), subfolder="vae")
        )
    widths = (128, 256, 512, 512)
    types = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(block_out_channels=widths, layers_per_block=2, sample_size=512, **types)

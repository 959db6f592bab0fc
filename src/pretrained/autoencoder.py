"""The frozen image autoencoder: images to latents and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.pretrained.base import FrozenModel, freeze, load_frozen, locate_model, resize_images


class LatentAutoencoder(FrozenModel):
    """The frozen VAE of a diffusion model.

    Latents are the mode of the posterior times the scaling factor.

    Args:
        weights: "hub", "mini" or a folder.
        name: the model whose VAE it is (the published low-level branch uses that of image
            variations).
        image_size: side to which images are resized (bilinear, antialiased) before encoding; 0: the
            VAE's own (512 where it does not say).
        device: torch device.

    Attributes:
        factor: pixels a side for each location of the latent.
        scale: the scaling factor.
    """

    def __init__(
        self,
        weights: str = "hub",
        name: str = "versatile_diffusion",
        image_size: int = 0,
        device: str = "cpu",
    ):
        from diffusers import AutoencoderKL

        super().__init__(name, weights, device)
        model = load_frozen(AutoencoderKL, self.location, subfolder="vae")
        self.model: Any = freeze(model.float(), self.device)
        self.config = self.model.config
        default_size = self.config.sample_size if weights == "mini" else 512
        self.image_size = image_size or default_size
        self.factor = 2 ** (len(self.config.block_out_channels) - 1)
        self.scale = float(self.config.scaling_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        side = self.image_size // self.factor
        return (self.config.latent_channels, side, side)

    def get_options(self) -> dict[str, Any]:
        """Side of the images."""
        return {"image_size": self.image_size}

    @property
    def target_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of a latent."""
        return self.latent_shape

    def _encode(self, images: Tensor) -> Tensor:
        return self.encode(images)

    def ignore_autocast(self) -> torch.autocast:
        """A context in which the precision of a training around it does not count."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> scaled latents (batch, channels, h, w)."""
        latents = []
        with self.ignore_autocast():
            for part in images.split(self._batch_size):
                x = resize_images(part.to(self.device), self.image_size)
                posterior = self.model.encode(2 * x - 1).latent_dist
                latents.append(posterior.mode() * self.scale)
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (batch, channels, h, w) -> images (batch, 3, height, width) in [0, 1]."""
        images = []
        with self.ignore_autocast():
            for part in latents.split(self._batch_size):
                images.append(self.model.decode(part.to(self.device) / self.scale).sample)
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    @property
    def _batch_size(self) -> int:
        """Images that the network sees at a time: 4 of 512 pixels a side.

        The activations of such an image take half a gigabyte.
        """
        return max(1, 2**20 // self.image_size**2)


def make_untrained_vae(weights: str = "hub", name: str = "stable_diffusion") -> Any:
    """The VAE of a diffusion model without its weights, for planning.

    Its config is the folder's; for "hub", the one that the models there have.
    """
    from diffusers import AutoencoderKL

    if weights != "hub":
        config = AutoencoderKL.load_config(locate_model(name, weights), subfolder="vae")
        return AutoencoderKL.from_config(config)
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )

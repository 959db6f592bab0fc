"""Images and tokens as vague as a decoder's, for the models that have to read what it writes."""

from __future__ import annotations

import kornia.augmentation as K
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src import pretrained

from . import data
from .data import SEED, draw_per_image, load_images, split_images, to_pixels

# log10 of the variance of the noise on latents: the estimate has .85 to .43 of their variance.
LATENT_NOISE = (0.0, 1.7)


class NoisyTokenEstimator:
    """Tokens as a decoder would guess them: the best linear estimate from a noisy view of them.

    The less certain the view, the more the estimate shrinks towards the mean image, fine detail
    first. The robust flow is trained on such tokens too, at all levels of certainty, so that it
    paints an object where the tokens only hint at one. (Noise on the condition in training is what
    unCLIP and cascaded diffusion models do; the filter makes the noise look like a regression's
    error.)

    Args:
        tokens: (images, tokens, dim), of which the first 6000 give mean and covariance.
    """

    def __init__(self, tokens: np.ndarray):
        rows = torch.from_numpy(tokens[:6000].astype(np.float32)).flatten(1)
        self.mean = rows.mean(0)
        covariance = torch.cov((rows - self.mean).T)
        self.variance, self.axes = torch.linalg.eigh(covariance)
        self.variance = self.variance.clamp_min(0)

    def __call__(self, tokens: Tensor, noise: Tensor, sample: bool = False) -> Tensor:
        """Estimate tokens from a view under noise.

        Args:
            tokens: (batch, tokens, dim).
            noise: variance of the noise (batch,), of the order of the tokens' own.
            sample: return a draw from what the view leaves open, not the mean.
        """
        components = (tokens.flatten(1) - self.mean) @ self.axes  # (batch, principal components)
        noise = noise[:, None]
        view = components + noise.sqrt() * torch.randn_like(components)
        estimate = view * self.variance / (self.variance + noise)
        if sample:
            remaining = self.variance * noise / (self.variance + noise)
            estimate = estimate + remaining.sqrt() * torch.randn_like(components)
        return (estimate @ self.axes.T + self.mean).view_as(tokens)


def draw_log_uniform(n: int, limits: tuple[float, float]) -> Tensor:
    """n values whose log10 is uniform between two limits."""
    return 10 ** torch.empty(n).uniform_(*limits)


def load_degraded_images(name: str, count: int = 12_000) -> np.ndarray:
    """The first images of a set, decoded from latents as vague as a decoder's guess; made once.

    Args:
        name: of one of `IMAGE_SETS`.
        count: number of images, at most.

    Returns:
        uint8 (images, height, width, 3).
    """
    path = data.WORK / f"degraded_{name}.npy"
    if not path.exists():
        vae = pretrained.LatentAutoencoder("mini", "stable_diffusion")
        images = load_images(name)[:count]
        reference = np.array_split(load_images("train")[:6000], 24)
        latents = torch.cat([vae.encode(to_pixels(part)) for part in reference])
        estimate = NoisyTokenEstimator(latents.numpy())
        torch.manual_seed(SEED + len(images))
        parts = []
        for part in split_images(images, 250):
            latents = vae.encode(to_pixels(part))
            latents = estimate(latents, draw_log_uniform(len(part), LATENT_NOISE))
            pixels = (255 * vae.decode(latents)).round().byte()
            parts.append(pixels.permute(0, 2, 3, 1).numpy())
        np.save(path, np.concatenate(parts))
    return np.load(path, mmap_mode="r")


def wash_out(x: Tensor) -> Tensor:
    """Blur images, draw them towards their mean colour and add smooth noise, each to a degree.

    Args:
        x: (batch, 3, height, width) in [0, 1].
    """
    n = len(x)
    blur = K.RandomGaussianBlur((9, 9), (0.7, 2.5), p=1.0)
    x = blur(x)
    mean_colour = x.mean((2, 3), keepdim=True)
    x = torch.lerp(x, mean_colour, draw_per_image(n, 0, 0.6))
    noise = torch.randn(n, 3, 8, 8)
    noise = F.interpolate(noise, x.shape[-2:], mode="bilinear")
    degree = 0.1 * torch.rand(n, 1, 1, 1)
    return (x + degree * noise).clamp(0, 1)

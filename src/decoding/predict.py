"""From voxels to predicted tokens and latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import models
from src.utils import PerceptError


@dataclass(frozen=True)
class PriorSampling:
    """How tokens are drawn from the diffusion prior.

    Attributes:
        n_samples: samples an image.
        use_prior: sample the prior; otherwise the backbone's output stands for the tokens, which
            it must have been trained to regress, as one sample.
        timesteps: sampling steps; 0: all of the prior's schedule.
        seed: of the noise, which is drawn for each image by itself.
        shared_noise: the same noise for all images, as published.
        solver: as `BrainDiffusionPrior.sample`.
    """

    n_samples: int = 1
    use_prior: bool = True
    timesteps: int = 0
    seed: int = 42
    shared_noise: bool = False
    solver: str = "published"


@torch.no_grad()
def predict_tokens(
    decoder: nn.Module,
    voxels: np.ndarray,
    token_shape: tuple[int, int],
    sampling: PriorSampling | None = None,
    image_ids: np.ndarray | None = None,
    batch_size: int = 100,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Predict CLIP tokens from voxels.

    Args:
        decoder: a `BrainDiffusionPrior` with its voxel2clip, a `MindEye2`, a `PerceptDecoder`, or a
            ridge baseline.
        voxels: (images, voxels), normalised; (images, trials, voxels) for a MindEye2 that reads
            neighbouring trials.
        token_shape: (tokens, dim).
        sampling: of the prior.
        image_ids: (images,), from which the noise is drawn; by default the position in `voxels`.
        batch_size: images at a time.
        device: torch device.

    Returns:
        Tokens (images, samples, tokens, dim) and the projected tokens for retrieval (images,
        tokens, dim). Where there are several tokens an image, samples of the prior are divided by
        the norm of the CLS token, as published; one embedding alone, regressions and MindEye2's
        tokens, which have no CLS token, are left as they are: a mean is shorter than what it is the
        mean of.
    """
    sampling = sampling or PriorSampling()
    ids = np.arange(len(voxels)) if image_ids is None else image_ids
    predicted, projected = [], []
    for start in range(0, len(voxels), batch_size):
        batch = slice(start, start + batch_size)
        x = torch.as_tensor(voxels[batch], dtype=torch.float32, device=device)
        tokens, projection = _predict_batch(decoder, x, token_shape, sampling, ids[batch])
        predicted.append(tokens.cpu())
        projected.append(projection.cpu())
    return torch.cat(predicted), torch.cat(projected)


def _predict_batch(
    decoder: nn.Module,
    x: Tensor,
    token_shape: tuple[int, int],
    sampling: PriorSampling,
    image_ids: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """Tokens (images, samples, tokens, dim) and projected tokens (images, tokens, dim)."""
    if isinstance(decoder, models.PerceptDecoder):  # a posterior mean, and no prior
        mean = decoder.predict_tokens(x).view(len(x), 1, *token_shape)
        return mean, mean[:, 0]
    is_mindeye2 = isinstance(decoder, models.MindEye2)
    prior: Any = decoder.diffusion_prior if is_mindeye2 else decoder
    network: Any = decoder if is_mindeye2 else getattr(decoder, "voxel2clip", None)
    if network is None:
        tokens = decoder(x).view(len(x), 1, *token_shape)
        return tokens, tokens[:, 0]
    backbone, projection = network.predict_tokens(x)
    projection = projection.view(len(x), *token_shape)
    if prior is None:
        return backbone[:, None], projection
    if not sampling.use_prior:
        return backbone[:, None] / prior.image_embed_scale, projection
    samples = _sample_prior(prior, backbone, sampling, image_ids)
    tokens = samples.view(len(x), sampling.n_samples, *token_shape)
    if token_shape[0] > 1 and not is_mindeye2:
        tokens = tokens / (tokens[:, :, :1].norm(dim=-1, keepdim=True) + 1e-6)
    return tokens, projection


def _sample_prior(
    prior: Any, backbone: Tensor, sampling: PriorSampling, image_ids: np.ndarray
) -> Tensor:
    """Samples (images * samples, tokens, dim) given the backbone's tokens (images, tokens, dim)."""
    generators = []
    for image in image_ids:
        seed = sampling.seed
        if not sampling.shared_noise:
            seed = derive_image_seed(sampling.seed, int(image))
        generators.append(torch.Generator().manual_seed(seed))
    return prior.sample(
        backbone.repeat_interleave(sampling.n_samples, 0),
        timesteps=sampling.timesteps or prior.noise_scheduler.num_timesteps,
        generator=generators,
        solver=sampling.solver,
    )


def derive_image_seed(seed: int, image: int) -> int:
    """A seed for one image, different from that of other images."""
    return int(np.random.SeedSequence([seed, image]).generate_state(1, np.uint32)[0])


@torch.no_grad()
def predict_latents(
    decoder: nn.Module,
    voxels: np.ndarray,
    shape: tuple[int, int, int],
    batch_size: int = 100,
    device: str = "cpu",
) -> Tensor:
    """Predict scaled VAE latents (images, channels, h, w) from normalised voxels (images, voxels);
    of a MindEye2 those of its blurry branch, of a `PerceptDecoder` those beside its tokens.
    """
    parts = []
    for start in range(0, len(voxels), batch_size):
        batch = voxels[start : start + batch_size]
        x = torch.as_tensor(batch, dtype=torch.float32, device=device)
        if isinstance(decoder, models.PerceptDecoder):
            parts.append(decoder.predict_latents(x).cpu())
            continue
        out = decoder(x)
        if isinstance(decoder, models.MindEye2):
            out = out[2]
        if isinstance(out, tuple):
            out = out[0]  # beside the latent stand the contrastive maps
        parts.append(out.view(len(out), *shape).cpu())
    return torch.cat(parts)


def predicts_both_levels(decoder: nn.Module | None) -> bool:
    """Whether one network predicts tokens and latents, so that it is its own low level."""
    if isinstance(decoder, models.MindEye2):
        return bool(decoder.backbone.blurry_recon)
    return isinstance(decoder, models.PerceptDecoder) and decoder.latent_components > 0


def compute_repeat_agreement(predictions: Sequence[Tensor]) -> Tensor:
    """Agreement of the predictions from single repeats, (images,): mean correlation over every two
    repeats.

    Args:
        predictions: one (images, features...) a repeat. The mean over images is taken off first, so
            that only what differs between images counts.
    """
    if len(predictions) < 2:
        raise PerceptError("Agreement between repeats needs at least two of them.")
    standardised = []
    for prediction in predictions:
        x = prediction.flatten(1).float()
        x = x - x.mean(0)
        standardised.append(F.normalize(x - x.mean(1, keepdim=True), dim=1))
    correlations = [(a * b).sum(1) for a, b in combinations(standardised, 2)]
    return torch.stack(correlations).mean(0)

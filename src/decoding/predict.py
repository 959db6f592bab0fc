"""From voxels to predicted tokens and latents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import models
from src.utils import PerceptError


@torch.no_grad()
def predict_tokens(
    decoder: nn.Module,
    voxels: np.ndarray,
    token_shape: tuple[int, int],
    n_samples: int = 1,
    use_prior: bool = True,
    timesteps: int = 0,
    seed: int = 42,
    batch_size: int = 100,
    device: str = "cpu",
    image_ids: np.ndarray | None = None,
    same: bool = False,
    solver: str = "published",
) -> tuple[Tensor, Tensor]:
    """Predict CLIP tokens from voxels.

    Args:
        decoder: a `BrainDiffusionPrior` with its voxel2clip, a `MindEye2`, or a ridge baseline.
        voxels: (images, voxels), normalised; (images, trials, voxels) for a MindEye2 that reads
            neighbouring trials.
        token_shape: (tokens, dim).
        n_samples: samples of the prior an image.
        use_prior: sample the prior; otherwise the backbone's own output, which then must have been
            trained to regress the tokens, and one sample.
        timesteps: sampling steps of the prior; 0: all of its schedule.
        seed: of the prior's noise, which is drawn for each image by itself.
        batch_size: images at a time.
        device: torch device.
        image_ids: (images,), from which the noise is drawn; by default the position in `voxels`.
        same: the same noise for all images, as published.
        solver: of the prior, as `BrainDiffusionPrior.sample`.

    Returns:
        Tokens (images, samples, tokens, dim) and the projected tokens for retrieval (images,
        tokens, dim). Where there are several tokens an image, samples of the prior are divided by
        the norm of the CLS token, as published; one embedding alone, regressions and MindEye2's
        tokens, which have
        no CLS token, are left as they are: a mean is shorter than what it is the mean of.
    """
    found, projected = [], []
    whole = isinstance(decoder, models.MindEye2)
    prior: Any = decoder.diffusion_prior if isinstance(decoder, models.MindEye2) else decoder
    network: Any = decoder if whole else getattr(decoder, "voxel2clip", None)
    ids = np.arange(len(voxels)) if image_ids is None else image_ids
    for start in range(0, len(voxels), batch_size):
        x = torch.as_tensor(voxels[start : start + batch_size], dtype=torch.float32, device=device)
        if network is None:
            tokens = decoder(x).view(len(x), 1, *token_shape)
            projected.append(tokens[:, 0].cpu())
        else:
            backbone, projection = network.predict_tokens(x)
            tokens = backbone[:, None] / (1.0 if prior is None else prior.image_embed_scale)
            if use_prior and prior is not None:
                mine = ids[start : start + batch_size]
                generator = [
                    torch.Generator(device).manual_seed(seed if same else _seed(seed, int(image)))
                    for image in mine
                ]
                steps = timesteps or prior.noise_scheduler.num_timesteps
                repeated = backbone.repeat_interleave(
                    n_samples, 0
                )  # (images * samples, tokens, dim)
                tokens = prior.sample(
                    repeated, timesteps=steps, generator=generator, solver=solver
                ).view(len(x), n_samples, *token_shape)
                if token_shape[0] > 1 and not whole:
                    tokens = tokens / (tokens[:, :, :1].norm(dim=-1, keepdim=True) + 1e-6)
            projected.append(projection.view(len(x), *token_shape).cpu())
        found.append(tokens.cpu())
    return torch.cat(found), torch.cat(projected)


def _seed(seed: int, image: int) -> int:
    """A seed of its own for each image."""
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
    of a MindEye2 those of its blurry branch.
    """
    parts = []
    for start in range(0, len(voxels), batch_size):
        out = decoder(
            torch.as_tensor(voxels[start : start + batch_size], dtype=torch.float32, device=device)
        )
        out = out[2] if isinstance(decoder, models.MindEye2) else out
        out = (
            out[0] if isinstance(out, tuple) else out
        )  # beside the latent stand the contrastive maps
        parts.append(out.view(len(out), *shape).cpu())
    return torch.cat(parts)


def compute_repeat_agreement(predictions: Sequence[Tensor]) -> Tensor:
    """How alike the predictions from single repeats are, (images,): mean correlation over every two
    repeats.

    Args:
        predictions: one (images, features...) a repeat. The mean over images is taken off first, so
            that only what differs between images counts.
    """
    if len(predictions) < 2:
        raise PerceptError("Agreement between repeats needs at least two of them.")
    rows = []
    for prediction in predictions:
        x = prediction.flatten(1).float()
        x = x - x.mean(0)
        rows.append(F.normalize(x - x.mean(1, keepdim=True), dim=1))
    return torch.stack([(a * b).sum(1) for a, b in combinations(rows, 2)]).mean(0)

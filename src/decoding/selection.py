"""Several samples of an image: choosing one by what the brain predicted, and their spread."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from src.pretrained.clip import Clipper, PatchClip

EMBEDDED = 64  # candidates that CLIP sees at a time


def _split_images(candidates: Tensor) -> list[slice]:
    """Blocks of images (images, samples, ...) whose embeddings are in memory together: some whole
    batches of CLIP, so that the blocks do not change what it computes.
    """
    images, samples = candidates.shape[:2]
    size = math.lcm(EMBEDDED, samples) // samples
    size *= max(1, 16 * EMBEDDED // (size * samples))
    return [slice(start, start + size) for start in range(0, images, size)]


def _embed_candidates(clipper: Clipper | PatchClip, candidates: Tensor) -> Tensor:
    """Unit vectors of CLIP tokens (images, samples, features) of candidate images."""
    images, samples = candidates.shape[:2]
    parts = []
    for part in candidates.flatten(0, 1).split(EMBEDDED):
        parts.append(clipper.embed_image(part).flatten(1).cpu())
    return F.normalize(torch.cat(parts), dim=-1).unflatten(0, (images, samples))


def select_best(
    clipper: Clipper | PatchClip, projected: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """Second-order selection: of each image's candidates, the one whose CLIP tokens are nearest to
    those the brain predicted.

    Args:
        clipper: CLIP with the tokens that the brain predicts: hidden ones, or its final embedding.
        projected: brain-predicted tokens (images, tokens, dim).
        candidates: (images, samples, 3, height, width).

    Returns:
        The chosen images (images, 3, height, width) and their index (images,).

    Source: MindEye, section 2.4 (there called second-order selection). The images that were shown
    play no part.
    """
    images, samples = candidates.shape[:2]
    if samples == 1:
        return candidates[:, 0], torch.zeros(images, dtype=torch.long)
    scores = []
    for at in _split_images(candidates):
        brain = F.normalize(projected[at].flatten(1), dim=-1)[:, None]  # (images, 1, features)
        scores.append((_embed_candidates(clipper, candidates[at]) * brain).sum(-1))
    best = torch.cat(scores).nan_to_num(-2.0).argmax(1)  # of (images, samples)
    return candidates[torch.arange(images), best], best


@torch.no_grad()
def compute_sample_spread(clipper: Clipper | PatchClip, candidates: Tensor) -> Tensor:
    """How far apart the samples of an image are, (images,): mean distance (1 - cosine) of the CLIP
    tokens of every two of them.

    Args:
        clipper: CLIP, whichever the selection uses.
        candidates: (images, samples, 3, height, width), at least two samples.
    """
    samples = candidates.shape[1]
    sums = [_embed_candidates(clipper, candidates[at]).sum(1) for at in _split_images(candidates)]
    total = torch.cat(sums)  # (images, features)
    # the squared norm of a sum of unit vectors holds the cosines of all pairs, each twice
    return 1 - (total.square().sum(-1) - samples) / (samples * (samples - 1))

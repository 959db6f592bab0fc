"""Several samples of an image: choosing one by what the brain predicted, and their spread."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from src.pretrained.clip import Clipper, PatchClip


def _embed_candidates(clipper: Clipper | PatchClip, candidates: Tensor) -> Tensor:
    """Unit vectors of CLIP tokens (images, samples, features) of candidate images."""
    images, samples = candidates.shape[:2]
    parts = []
    for part in candidates.flatten(0, 1).split(64):
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
    brain = F.normalize(projected.flatten(1), dim=-1)[:, None]  # (images, 1, features)
    scores = (_embed_candidates(clipper, candidates) * brain).sum(-1)  # (images, samples)
    best = scores.nan_to_num(-2.0).argmax(1)
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
    total = _embed_candidates(clipper, candidates).sum(1)  # (images, features)
    # the squared norm of a sum of unit vectors holds the cosines of all pairs, each twice
    return 1 - (total.square().sum(-1) - samples) / (samples * (samples - 1))

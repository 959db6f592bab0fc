"""Losses of the high and the low level: MixCo, SoftCLIP and their relatives, as short pure
functions.

- Predictions and targets are (batch, dim), L2-normalised by the caller; what is random comes from
  torch's CPU generator, so that a seed gives the published draws.
- Where the published code has a defect, ours is the default and the faithful behaviour stands
  behind `faithful=True`.
- Similarities are divided by temperatures of .004 and less, which half precision does not survive:
  under mixed precision they are computed in single precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from kornia.filters import median_blur, sobel
from torch import Tensor

from src.utils import PerceptError


def _exact(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute outside of mixed precision; half precision becomes single, double stays."""

    def given(x: Any) -> Any:
        return (
            x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x
        )

    @wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Tensor:
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(
                *map(given, args), **{name: given(value) for name, value in kwargs.items()}
            )

    return computed


def mixco(
    voxels: Tensor, beta: float = 0.15, s_thresh: float = 0.5, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mix the voxels of about half of a batch with those of other samples.

    Args:
        voxels: (batch, ...), left as it is.
        beta: both parameters of the Beta distribution that the weights are drawn from.
        s_thresh: share of the samples that are mixed.
        groups: (batch,), e.g. subjects; where given, a sample is mixed with one of its own group.
            The partners are numbers of rows of the whole batch: MindEye2 counts them within each
            subject and so points the labels of all but the first subject at wrong images.

    Returns:
        Mixed voxels (batch, ...), perm (batch,), betas (batch,) with 1 where nothing was mixed, and
        select (batch,) Boolean.

    Source: MixCo (Kim et al. 2020, arXiv 2010.06300), as in MindEye, section 2.2.
    """
    batch = len(voxels)
    perm = torch.randperm(batch) if groups is None else _within_groups(groups.cpu())
    betas = torch.distributions.Beta(beta, beta).sample([batch]).to(voxels.device, voxels.dtype)
    select = (torch.rand(batch) <= s_thresh).to(voxels.device)
    perm = perm.to(voxels.device)
    weight = betas.view(-1, *[1] * (voxels.ndim - 1))  # (batch, 1, ...)
    mixed = torch.where(
        select.view_as(weight), weight * voxels + (1 - weight) * voxels[perm], voxels
    )
    return mixed, perm, torch.where(select, betas, torch.ones_like(betas)), select


def _within_groups(groups: Tensor) -> Tensor:
    """A permutation (batch,) that keeps every row in its group (batch,)."""
    perm = torch.arange(len(groups))
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        perm[rows] = rows[torch.randperm(len(rows))]
    return perm


def _mixed_labels(perm: Tensor, betas: Tensor, faithful: bool) -> Tensor:
    """Target matrix (batch, batch): betas on the diagonal, the rest of each row at its partner's
    column.
    """
    rows = torch.arange(len(perm), device=perm.device)
    labels = torch.diag(betas)
    if faithful:  # overwrites the diagonal where a sample is its own partner
        labels[rows, perm] = 1 - betas
        return labels
    return labels.index_put((rows, perm), 1 - betas, accumulate=True)


@_exact
def mixco_nce(
    preds: Tensor,
    targs: Tensor,
    temp: float = 0.1,
    perm: Tensor | None = None,
    betas: Tensor | None = None,
    select: Tensor | None = None,
    bidirectional: bool = True,
    faithful: bool = False,
) -> Tensor:
    """(Bi)MixCo: cross-entropy between similarities and mixed labels; without `perm`, plain
    (symmetric) InfoNCE.

    Args:
        preds: predictions (batch, dim), L2-normalised.
        targs: targets (batch, dim), L2-normalised.
        temp: temperature.
        perm: partners (batch,) from `mixco`.
        betas: weights (batch,) from `mixco`.
        select: which samples were mixed (batch,); not needed, as betas are 1 elsewhere.
        bidirectional: average over rows and columns.
        faithful: the published label matrix, in which a sample that is its own partner loses its
            own weight.

    Returns:
        Scalar.

    Raises:
        PerceptError: if only one of perm and betas is given.
    """
    if (perm is None) != (betas is None):
        raise PerceptError(
            "mixco_nce needs both perm and betas of mixco, or neither: pass the missing one."
        )
    logits = preds @ targs.T / temp  # (batch, batch)
    if perm is None or betas is None:
        labels = torch.eye(len(preds), device=preds.device, dtype=logits.dtype)
    else:
        labels = _mixed_labels(perm, betas.to(logits.dtype), faithful)
    loss = -(logits.log_softmax(-1) * labels).sum(-1).mean()
    if not bidirectional:
        return loss
    return (loss - (logits.T.log_softmax(-1) * labels.T).sum(-1).mean()) / 2


def info_nce(preds: Tensor, targs: Tensor, temp: float = 0.1) -> Tensor:
    """InfoNCE from brain to image alone: predictions (batch, dim) find their targets (batch, dim),
    both L2-normalised -> scalar.

    Source: van den Oord et al. 2018, arXiv 1807.03748; the early combined system took it in this
    direction.
    """
    return mixco_nce(preds, targs, temp, bidirectional=False)


LOSS_FORMS: dict[
    str, Callable[[Any, Any, float], Any]
] = {  # of the combined system: (mse, nce, alpha) -> loss
    "run": lambda mse, nce, alpha: alpha * mse + (1 - alpha) * nce,  # what its code ran
    "stated": lambda mse, nce, alpha: alpha * mse + nce,  # what its documentation said
}
ALPHA_SCHEDULES: dict[
    str, Callable[[float, float, float], float]
] = {  # (first, last, share of the epochs that is over) -> alpha
    "constant": lambda first, last, share: first,
    "linear": lambda first, last, share: first + (last - first) * share,
}


def combined_loss(mse: Tensor, nce: Tensor, alpha: float, form: str = "run") -> Tensor:
    """The prior's squared error and the contrastive loss (scalars) as one; `form` is a key of
    LOSS_FORMS.

    Raises:
        PerceptError: for an unknown form.
    """
    if form not in LOSS_FORMS:
        raise PerceptError(
            f"There is no form '{form}' of the combined loss: choose one of"
            f" {', '.join(LOSS_FORMS)}."
        )
    return LOSS_FORMS[form](mse, nce, alpha)


def compute_alpha(
    epoch: int, epochs: int, schedule: str = "constant", first: float = 0.01, last: float = 0.05
) -> float:
    """Weight of the squared error in an epoch (counted from 0) out of `epochs`; `schedule` is a key
    of ALPHA_SCHEDULES.

    Raises:
        PerceptError: for an unknown schedule.
    """
    if schedule not in ALPHA_SCHEDULES:
        raise PerceptError(
            f"There is no schedule '{schedule}' of alpha: choose one of"
            f" {', '.join(ALPHA_SCHEDULES)}."
        )
    return ALPHA_SCHEDULES[schedule](first, last, epoch / max(1, epochs - 1))


def _soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    return -(logits.log_softmax(-1) * target_logits.softmax(-1)).sum(-1).mean()


@_exact
def soft_clip_loss(preds: Tensor, targs: Tensor, temp: float = 0.125) -> Tensor:
    """SoftCLIP: similarities of predictions to targets (batch, dim) should be as those of the
    targets among themselves.

    Source: MindEye, equation 3; after Gao et al. 2023.
    """
    among, across = targs @ targs.T / temp, preds @ targs.T / temp  # (batch, batch)
    return (_soft_cross_entropy(across, among) + _soft_cross_entropy(across.T, among)) / 2


@_exact
def soft_cont_loss(
    student: Tensor, teacher: Tensor, teacher_aug: Tensor, temp: float = 0.125
) -> Tensor:
    """Soft contrastive loss of the low level: the student's similarities to augmented teacher
    features should be the teacher's.

    Args:
        student: (locations, dim), L2-normalised.
        teacher: features of the clean image, (locations, dim), L2-normalised.
        teacher_aug: features of the augmented image, (locations, dim), L2-normalised.
        temp: temperature.

    Source: MindEye, section 2.5.
    """
    wanted, given = (
        teacher @ teacher_aug.T / temp,
        student @ teacher_aug.T / temp,
    )  # (locations, locations)
    return (_soft_cross_entropy(given, wanted) + _soft_cross_entropy(given.T, wanted.T)) / 2


@_exact
def sobel_loss(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference of edges: those of `images` and those of median-filtered `targets`,
    both (batch, 3, height, width) in [0, 1].

    Source: MindEye (arXiv 2305.18274), its script for the autoencoder.
    """
    return F.l1_loss(sobel(images), sobel(median_blur(targets, (3, 3))))


def cosine_anneal(start: float, end: float, steps: int) -> list[float]:
    """`steps` values from start to end along half a cosine (the temperatures of SoftCLIP over its
    epochs).
    """
    if steps < 2:
        return [start] * steps
    return [
        end + (start - end) / 2 * (1 + math.cos(math.pi * k / (steps - 1))) for k in range(steps)
    ]


def normalize_locations(maps: Tensor, like: Tensor | None = None) -> Tensor:
    """Local embeddings of a batch as unit rows, for `soft_cont_loss`.

    Args:
        maps: (batch, locations, dim), the locations a square row by row.
        like: other embeddings (batch, locations, dim); where they have fewer locations, `maps` are
            averaged over neighbours to as many.

    Returns:
        (batch * locations, dim), in single precision.
    """
    if like is not None and like.shape[1] < maps.shape[1]:
        side, fewer = math.isqrt(maps.shape[1]), math.isqrt(like.shape[1])
        maps = F.adaptive_avg_pool2d(maps.mT.unflatten(2, (side, side)), fewer).flatten(2).mT
    return F.normalize(maps.flatten(0, 1).float(), dim=-1)


@_exact
def cosine_similarity(brain: Tensor, image: Tensor) -> Tensor:
    """Dot products (brains, images) of embeddings (brains, features) and (images, features)."""
    return brain @ image.T


@_exact
def l2_normalize(x: Tensor) -> Tensor:
    """Flatten all but the batch axis and L2-normalise: (batch, ...) -> (batch, features)."""
    return F.normalize(x.flatten(1), dim=-1)

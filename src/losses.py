"""Losses of the high and the low level, as short pure functions: MixCo, SoftCLIP and others.

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
from torch import Tensor

from src.utils import PerceptError


def _exact(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute outside of mixed precision; half precision becomes single, double stays."""

    @wraps(function)
    def compute(*args: Any, **kwargs: Any) -> Tensor:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        exact_kwargs = {name: _raise_precision(value) for name, value in kwargs.items()}
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*map(_raise_precision, args), **exact_kwargs)

    return compute


def _raise_precision(x: Any) -> Any:
    """Tensors of half precision in single; anything else as it is."""
    if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def mixco(
    voxels: Tensor, beta: float = 0.15, s_thresh: float = 0.5, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mix the voxels of about half of a batch with those of other samples.

    Args:
        voxels: (batch, ...), left as it is.
        beta: both parameters of the Beta distribution that the weights are drawn from.
        s_thresh: share of the samples that are mixed.
        groups: (batch,), e.g. subjects; a sample is then mixed with one of the same group.
            `perm` indexes rows of the whole batch: MindEye2 counts within each subject and so
            points the labels of all but the first subject at wrong images.

    Returns:
        Mixed voxels (batch, ...), perm (batch,), betas (batch,) with 1 where nothing was mixed, and
        select (batch,) Boolean.

    Source: MixCo (Kim et al. 2020, arXiv 2010.06300), as in MindEye, section 2.2.
    """
    batch = len(voxels)
    perm = torch.randperm(batch) if groups is None else _permute_within_groups(groups.cpu())
    betas = torch.distributions.Beta(beta, beta).sample([batch]).to(voxels.dtype)
    select = torch.rand(batch) <= s_thresh
    betas, select = _send(betas, voxels.device), _send(select, voxels.device)
    perm = _send(perm, voxels.device)
    trailing = [1] * (voxels.ndim - 1)
    weight = betas.view(-1, *trailing)  # (batch, 1, ...)
    blended = weight * voxels + (1 - weight) * voxels[perm]
    mixed = torch.where(select.view_as(weight), blended, voxels)
    betas = torch.where(select, betas, torch.ones_like(betas))
    return mixed, perm, betas, select


def _send(x: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on a device; a GPU is not waited for."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def _permute_within_groups(groups: Tensor) -> Tensor:
    """A permutation (batch,) that keeps every row in its group (batch,)."""
    perm = torch.arange(len(groups))
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        perm[rows] = rows[torch.randperm(len(rows))]
    return perm


def _mix_labels(perm: Tensor, betas: Tensor, faithful: bool) -> Tensor:
    """Target matrix (batch, batch): betas on the diagonal, 1 - beta in the partner's column."""
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
    """(Bi)MixCo: cross-entropy between similarities and mixed labels.

    Without `perm` it is plain (symmetric) InfoNCE.

    Args:
        preds: predictions (batch, dim), L2-normalised.
        targs: targets (batch, dim), L2-normalised.
        temp: temperature.
        perm: partners (batch,) from `mixco`.
        betas: weights (batch,) from `mixco`.
        select: which samples were mixed (batch,); not needed, as betas are 1 elsewhere.
        bidirectional: average over rows and columns.
        faithful: the published label matrix, in which a sample that is mixed with itself loses
            its weight.

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
        labels = _mix_labels(perm, betas.to(logits.dtype), faithful)
    loss = -_mean_log_likelihood(logits, labels)
    if not bidirectional:
        return loss
    return (loss - _mean_log_likelihood(logits.T, labels.T)) / 2


def _mean_log_likelihood(logits: Tensor, weights: Tensor) -> Tensor:
    """Mean over rows of the log-softmax of logits (rows, columns), weighted over columns."""
    return (logits.log_softmax(-1) * weights).sum(-1).mean()


def info_nce(preds: Tensor, targs: Tensor, temp: float = 0.1) -> Tensor:
    """InfoNCE from brain to image alone, the direction of the early combined system.

    Args:
        preds: predictions (batch, dim), L2-normalised.
        targs: targets (batch, dim), L2-normalised.
        temp: temperature.

    Returns:
        Scalar.

    Source: van den Oord et al. 2018, arXiv 1807.03748.
    """
    return mixco_nce(preds, targs, temp, bidirectional=False)


# of the combined system: (mse, nce, alpha) -> loss
LOSS_FORMS: dict[str, Callable[[Any, Any, float], Any]] = {
    "run": lambda mse, nce, alpha: alpha * mse + (1 - alpha) * nce,  # what its code ran
    "stated": lambda mse, nce, alpha: alpha * mse + nce,  # what its documentation said
}

# (first, last, share of the epochs that is over) -> alpha
ALPHA_SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda first, last, share: first,
    "linear": lambda first, last, share: first + (last - first) * share,
}


def combined_loss(mse: Tensor, nce: Tensor, alpha: float, form: str = "run") -> Tensor:
    """The prior's squared error and the contrastive loss as one.

    Args:
        mse: squared error, scalar.
        nce: contrastive loss, scalar.
        alpha: weight of the squared error.
        form: key of LOSS_FORMS.

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
    """Weight of the squared error in an epoch.

    Args:
        epoch: counted from 0.
        epochs: number of epochs.
        schedule: key of ALPHA_SCHEDULES.
        first: weight in the first epoch.
        last: weight in the last epoch, for a schedule that changes it.

    Raises:
        PerceptError: for an unknown schedule.
    """
    if schedule not in ALPHA_SCHEDULES:
        raise PerceptError(
            f"There is no schedule '{schedule}' of alpha: choose one of"
            f" {', '.join(ALPHA_SCHEDULES)}."
        )
    share = epoch / max(1, epochs - 1)
    return ALPHA_SCHEDULES[schedule](first, last, share)


def _soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Cross-entropy of two distributions over columns, the mean over rows."""
    return -_mean_log_likelihood(logits, target_logits.softmax(-1))


@_exact
def soft_clip_loss(preds: Tensor, targs: Tensor, temp: float = 0.125) -> Tensor:
    """SoftCLIP: predictions should be as similar to the targets as the targets to one another.

    Args:
        preds: predictions (batch, dim), L2-normalised.
        targs: targets (batch, dim), L2-normalised.
        temp: temperature.

    Source: MindEye, equation 3; after Gao et al. 2023.
    """
    targets_to_targets = targs @ targs.T / temp  # (batch, batch)
    preds_to_targets = preds @ targs.T / temp  # (batch, batch)
    forward = _soft_cross_entropy(preds_to_targets, targets_to_targets)
    return (forward + _soft_cross_entropy(preds_to_targets.T, targets_to_targets)) / 2


@_exact
def soft_cont_loss(
    student: Tensor, teacher: Tensor, teacher_aug: Tensor, temp: float = 0.125
) -> Tensor:
    """Soft contrastive loss of the low level.

    The student should be as similar to augmented teacher features as the teacher is.

    Args:
        student: (locations, dim), L2-normalised.
        teacher: features of the clean image, (locations, dim), L2-normalised.
        teacher_aug: features of the augmented image, (locations, dim), L2-normalised.
        temp: temperature.

    Source: MindEye, section 2.5.
    """
    teacher_to_aug = teacher @ teacher_aug.T / temp  # (locations, locations)
    student_to_aug = student @ teacher_aug.T / temp  # (locations, locations)
    forward = _soft_cross_entropy(student_to_aug, teacher_to_aug)
    return (forward + _soft_cross_entropy(student_to_aug.T, teacher_to_aug.T)) / 2


@_exact
def sobel_loss(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference of edges: of images, and of median-filtered targets.

    Args:
        images: (batch, 3, height, width) in [0, 1].
        targets: same shape.

    Source: MindEye (arXiv 2305.18274), its script for the autoencoder.
    """
    from kornia.filters import median_blur, sobel

    edges = sobel(median_blur(targets, (3, 3)))
    return F.l1_loss(sobel(images), edges)


def cosine_anneal(start: float, end: float, steps: int) -> list[float]:
    """`steps` values from start to end along half a cosine.

    The temperatures of SoftCLIP over its epochs follow it.
    """
    if steps < 2:
        return [start] * steps
    angles = [math.pi * k / (steps - 1) for k in range(steps)]
    return [end + (start - end) / 2 * (1 + math.cos(angle)) for angle in angles]


def normalize_locations(maps: Tensor, reference: Tensor | None = None) -> Tensor:
    """Local embeddings of a batch as rows of norm 1, for `soft_cont_loss`.

    Args:
        maps: (batch, locations, dim), the locations a square row by row.
        reference: other embeddings (batch, locations, dim); if they have fewer locations, `maps`
            are averaged over neighbours to as many.

    Returns:
        (batch * locations, dim), in single precision.
    """
    if reference is not None and reference.shape[1] < maps.shape[1]:
        side, target_side = math.isqrt(maps.shape[1]), math.isqrt(reference.shape[1])
        grid = maps.mT.unflatten(2, (side, side))  # (batch, dim, h, w)
        maps = F.adaptive_avg_pool2d(grid, target_side).flatten(2).mT
    return F.normalize(maps.flatten(0, 1).float(), dim=-1)


@_exact
def cosine_similarity(brain: Tensor, image: Tensor) -> Tensor:
    """Cosine similarities (brains, images) of L2-normalised embeddings.

    Args:
        brain: (brains, features), L2-normalised.
        image: (images, features), L2-normalised.
    """
    return brain @ image.T


@_exact
def l2_normalize(x: Tensor) -> Tensor:
    """Flatten all but the batch axis and L2-normalise: (batch, ...) -> (batch, features)."""
    return F.normalize(x.flatten(1), dim=-1)

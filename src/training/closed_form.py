"""Decoders that are solved, not trained: the ridge baseline and the kernel decoder of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.data.normaliser import Normaliser
from src.data.subject import Subject
from src.data.targets import LatentFile, TargetCache
from src.networks.kernels import KernelRidge
from src.networks.linear import RidgeBaseline
from src.training.kernel import describe_kernel, fit_kernel_decoder
from src.training.ridge import describe_ridge, fit_ridge_baseline
from src.utils import PerceptError

CLOSED_FORMS = ("ridge", "kernel")


def fit_closed_form(
    name: str,
    path: str | Path,
    subject: Subject,
    normaliser: Normaliser,
    targets: TargetCache | LatentFile,
    config: dict[str, Any],
    parameters: Mapping[str, Any],
    target_shape: Sequence[int] | None = None,
) -> RidgeBaseline | KernelRidge:
    """Fit one of CLOSED_FORMS to the training images, repeats averaged, and write its checkpoint.

    Args:
        name: "ridge" or "kernel".
        path: of the checkpoint (.safetensors).
        subject: with its training split.
        normaliser: of its voxels.
        targets: frozen targets of the training images.
        config: stored with it; its entry "model" becomes the decoder's, "data" the subject's.
        parameters: of the notebook: `ridge_folds` and `seed` of the ridge, `kernel` of the kernel.
        target_shape: of one target, e.g. (tokens, dim); by default as `targets` has it.

    Raises:
        PerceptError: for another name.
    """
    if name == "ridge":
        folds, seed = parameters["ridge_folds"], parameters["seed"]
        return fit_ridge_baseline(
            path, subject, normaliser, targets, config, target_shape, folds, seed
        )
    if name == "kernel":
        kernel = parameters["kernel"]
        return fit_kernel_decoder(path, subject, normaliser, targets, config, target_shape, kernel)
    raise PerceptError(f"'{name}' has no closed form: choose one of {', '.join(CLOSED_FORMS)}.")


def describe_closed_form(decoder: RidgeBaseline | KernelRidge) -> str:
    """One line about what was fitted."""
    if isinstance(decoder, KernelRidge):
        return describe_kernel(decoder)
    return describe_ridge(decoder)

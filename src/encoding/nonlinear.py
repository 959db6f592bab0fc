"""Fitting the nonlinear readouts of encoding models: a kernel, and a small network."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.encoding.readouts import KernelReadout, LinearReadout, MLPReadout
from src.networks.linear import himalaya_backend
from src.utils import progress, seeded

KERNEL_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean diagonal of the kernel

EPOCHS = 15

BATCH = 128

MAX_RATE = 3e-4

Folds = Sequence[tuple[np.ndarray, np.ndarray]]  # rows to fit, rows to predict


def fit_kernel_readout(
    x: np.ndarray, y: np.ndarray, penalty_folds: Folds, folds: Folds, device: str = "cpu"
) -> tuple[KernelReadout, np.ndarray, np.ndarray]:
    """Kernel ridge with a penalty for each voxel, chosen by cross-validation through himalaya.

    Args:
        x: (images, components).
        y: (images, voxels).
        penalty_folds: of the choice of the penalties.
        folds: of the out-of-fold predictions.
        device: torch device.

    Returns:
        The readout, the penalties (voxels,) and the out-of-fold predictions (images, voxels).
    """
    from himalaya.kernel_ridge import KernelRidgeCV

    readout = KernelReadout(x.shape[1], y.shape[1], len(x)).to(device)
    readout.set_inputs(torch.as_tensor(x, device=device))
    kernel = readout.compare()
    candidates = kernel.diagonal().mean().item() * np.asarray(KERNEL_PENALTIES)
    outputs = torch.as_tensor(y, device=device)
    readout.bias.copy_(outputs.mean(0))
    solver_params = {"n_alphas_batch": 1, "n_targets_batch": 4096}
    with himalaya_backend("torch_cuda" if device.startswith("cuda") else "torch"):
        search = KernelRidgeCV(
            alphas=candidates.astype(np.float32),
            kernel="precomputed",
            cv=list(penalty_folds),
            solver_params=solver_params,
        )
        search.fit(kernel, outputs - readout.bias)
        chosen = torch.as_tensor(search.best_alphas_).float().to(device).expand(y.shape[1])
    penalties = chosen.cpu().numpy()
    predicted = np.empty_like(y)
    for fitted, left_out in folds:
        rows = torch.as_tensor(fitted, device=device)
        held_out = torch.as_tensor(left_out, device=device)
        mean = outputs[rows].mean(0)
        dual = _solve_dual(kernel[rows][:, rows], outputs[rows] - mean, penalties)
        predicted[left_out] = (kernel[held_out][:, rows] @ dual + mean).cpu().numpy()
    readout.dual.copy_(_solve_dual(kernel, outputs - readout.bias, penalties))
    return readout.cpu(), penalties, predicted


def _solve_dual(kernel: Tensor, outputs: Tensor, penalties: np.ndarray) -> Tensor:
    """(kernel + penalty I)^-1 outputs, (images, voxels), each voxel with its own penalty."""
    dual = torch.empty_like(outputs)
    identity = torch.eye(len(kernel), device=kernel.device)
    for penalty in np.unique(penalties):
        columns = torch.as_tensor(np.flatnonzero(penalties == penalty), device=kernel.device)
        factor = torch.linalg.cholesky(kernel + float(penalty) * identity)
        dual[:, columns] = torch.cholesky_solve(outputs[:, columns], factor)
    return dual


def fit_mlp_readout(
    x: np.ndarray, y: np.ndarray, linear: LinearReadout, seed: int = 0, device: str = "cpu"
) -> MLPReadout:
    """Train a hidden layer on what a fitted linear map leaves; that map stays as it is.

    AdamW with one cycle of the learning rate, a fixed number of epochs.

    Args:
        x: (images, components).
        y: (images, voxels).
        linear: fitted to the same images.
        seed: of weights, order and dropout.
        device: torch device.

    Returns:
        The readout in eval mode.
    """
    with seeded(seed):
        readout = MLPReadout(x.shape[1], y.shape[1])
        readout.linear = copy.deepcopy(linear)
        readout = readout.to(device).train()
        inputs, outputs = (torch.as_tensor(rows, device=device) for rows in (x, y))
        optimiser = torch.optim.AdamW(readout.parameters(), weight_decay=0.05)
        steps = EPOCHS * -(-len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, MAX_RATE, total_steps=steps)
        for _ in progress(range(EPOCHS), "training the readout"):
            for rows in torch.randperm(len(x)).to(device).split(BATCH):
                loss = F.mse_loss(readout(inputs[rows]), outputs[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return readout.cpu().eval()

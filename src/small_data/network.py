"""A small network for small data: several seeds trained side by side, their outputs averaged."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.small_data.decoders import Setting
from src.small_data.examples import Problem

STEPS_AN_EPOCH = 24  # at most; larger data are read in larger batches


class _Layers(nn.Module):
    """A linear layer of each of several networks: (networks, batch, in) -> (.., batch, out).

    It begins as `nn.Linear` does.
    """

    def __init__(self, networks: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(networks, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(networks, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class _Hidden(nn.Module):
    """A hidden layer of each of several networks: linear, LayerNorm, GELU, dropout."""

    def __init__(self, networks: int, in_dim: int, width: int, dropout: float):
        super().__init__()
        self.linear = _Layers(networks, in_dim, width)
        self.gain = nn.Parameter(torch.ones(networks, 1, width))
        self.shift = nn.Parameter(torch.zeros(networks, 1, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x = F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift
        dropped: Tensor = self.dropout(F.gelu(x))
        return dropped


def build_networks(
    networks: int, in_dim: int, width: int, out_dim: int, dropout: float
) -> nn.Sequential:
    """Networks of two hidden layers: (networks, batch, in_dim) -> (networks, batch, out_dim)."""
    return nn.Sequential(
        _Hidden(networks, in_dim, width, dropout),
        _Hidden(networks, width, width, dropout),
        _Layers(networks, width, out_dim),
    )


def predict_network(problem: Problem, setting: Setting) -> np.ndarray:
    """Mean output of networks that differ in their random start and in what they see when.

    They predict the principal components of the training targets, divided by one common standard
    deviation, so that large components count for more. Voxels get fresh noise in every step.

    Args:
        problem: what to learn from, and what to decode.
        setting: `networks`, their number; `voxels`; `width`; `dropout`;
            `noise`, standard deviation of what is added to z-scored voxels; `epochs`; `batch_size`;
            `max_lr`; `seed`.

    Returns:
        (test images, targets).
    """
    axes = problem.fit_axes()
    coordinates = axes.transform(problem.train.targets)
    sd = coordinates.std() + 1e-9
    voxels, tests = (
        torch.from_numpy(np.ascontiguousarray(rows[:, : setting["voxels"]]))
        for rows in (problem.train.voxels, problem.test_voxels)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting["seed"])
        outputs = train_networks(voxels, torch.from_numpy(coordinates / sd).float(), tests, setting)
    predicted: np.ndarray = axes.inverse_transform(outputs.mean(0).numpy() * sd)
    return predicted.astype(np.float32)


def train_networks(voxels: Tensor, targets: Tensor, tests: Tensor, setting: Setting) -> Tensor:
    """Outputs of all networks for the test images.

    Args:
        voxels: (images, voxels).
        targets: (images, components).
        tests: (test images, voxels).
        setting: as in `predict_network`.

    Returns:
        (networks, test images, components).
    """
    count = setting["networks"]
    model = build_networks(
        count, voxels.shape[1], setting["width"], targets.shape[1], setting["dropout"]
    )
    rows = draw_rows(len(voxels), setting)  # (steps, networks, batch)
    optimiser = torch.optim.AdamW(
        model.parameters(), setting["max_lr"], weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, setting["max_lr"], len(rows))
    for batch in rows:
        inputs = voxels[batch]
        inputs = inputs + setting["noise"] * torch.randn_like(inputs)
        errors = model(inputs) - targets[batch]
        optimiser.zero_grad()
        errors.square().mean((1, 2)).sum().backward()  # each network has a loss of its own
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        outputs: Tensor = model(tests.expand(count, -1, -1))
    return outputs


def draw_rows(n_images: int, setting: Setting) -> Tensor:
    """Which images each step of each network reads: int64 (steps, networks, batch)."""
    batch_size = min(n_images, max(setting["batch_size"], n_images // STEPS_AN_EPOCH))
    n_batches = n_images // batch_size
    orders = torch.rand(setting["epochs"], setting["networks"], n_images).argsort(-1)
    used = orders[..., : n_batches * batch_size]
    split = used.unflatten(-1, (n_batches, batch_size))  # (epochs, networks, batches, batch)
    return split.transpose(1, 2).flatten(0, 1)

"""Maps from the components of features to voxels: linear, by a kernel, by a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.networks.kernels import compute_arc_cosine_kernel
from src.utils import PerceptError


class LinearReadout(nn.Module):
    """Voxels as a linear map of all components: x @ weight + bias.

    Args:
        n_components: of all feature spaces together.
        n_voxels: that are predicted.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, n_components: int, n_voxels: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(n_components, n_voxels))
        self.register_buffer("bias", torch.zeros(n_voxels))

    def forward(self, x: Tensor) -> Tensor:
        """(n, components) -> (n, voxels)."""
        return x @ self.weight + self.bias


class KernelReadout(nn.Module):
    """Voxels by similarity to training images: k(x, inputs) @ dual + bias.

    The kernel is the arc-cosine kernel of order 1 (`compute_arc_cosine_kernel`), that of an
    infinitely wide layer of rectified linear units; components are first brought to a mean square
    of 1.

    Args:
        n_components: of all feature spaces together.
        n_voxels: that are predicted.
        n_images: training images.
    """

    inputs: Tensor
    dual: Tensor
    bias: Tensor
    scale: Tensor

    def __init__(self, n_components: int, n_voxels: int, n_images: int):
        super().__init__()
        self.register_buffer("inputs", torch.zeros(n_images, n_components))
        self.register_buffer("dual", torch.zeros(n_images, n_voxels))
        self.register_buffer("bias", torch.zeros(n_voxels))
        self.register_buffer("scale", torch.ones(()))

    def set_inputs(self, x: Tensor) -> None:
        """Take the components (images, components) of the training images."""
        self.scale.copy_(x.square().mean().rsqrt())
        self.inputs.copy_(x * self.scale)

    def compare(self) -> Tensor:
        """Kernel of the training images with each other, (images, images)."""
        return compute_arc_cosine_kernel(self.inputs, self.inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, components) -> (n, voxels)."""
        kernel = compute_arc_cosine_kernel(x * self.scale, self.inputs)
        return kernel @ self.dual + self.bias


class MLPReadout(nn.Module):
    """Voxels by a linear map, to which a hidden layer adds what is not linear.

    Args:
        n_components: of all feature spaces together.
        n_voxels: that are predicted.
        width: of the hidden layer.
        dropout: of the components and of the hidden layer.
    """

    def __init__(self, n_components: int, n_voxels: int, width: int = 1024, dropout: float = 0.3):
        super().__init__()
        self.linear = LinearReadout(n_components, n_voxels)
        self.normalise = nn.LayerNorm(n_components)
        self.hidden = nn.Linear(n_components, width)
        self.output = nn.Linear(width, n_voxels)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, components) -> (n, voxels)."""
        hidden = nn.functional.gelu(self.hidden(self.dropout(self.normalise(x))))
        return self.linear(x) + self.output(self.dropout(hidden))


READOUTS: dict[str, type[nn.Module]] = {
    "linear": LinearReadout,
    "kernel": KernelReadout,
    "mlp": MLPReadout,
}


def check_readout(name: str) -> None:
    """Refuse a readout that does not exist.

    Raises:
        PerceptError: naming those that do.
    """
    if name not in READOUTS:
        raise PerceptError(
            f"There is no readout '{name}' of an encoding model: choose one of"
            f" {', '.join(READOUTS)}."
        )

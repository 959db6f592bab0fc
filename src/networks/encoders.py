"""Networks from voxels to CLIP embeddings: MindEye's residual MLP and its relatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from src.networks.base import Network, flatten_voxels
from src.utils import PerceptError


class Encoder(Network):
    """Base class of the networks from voxels to CLIP embeddings."""

    clip_size: int

    def predict_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone and projected tokens, (batch, tokens, dim) each, of voxels (batch, ...).

        Without a projector both are the same.
        """
        output = self(x)
        backbone, projected = output if isinstance(output, tuple) else (output, output)
        shape = (len(x), -1, self.clip_size)
        return backbone.view(shape), projected.view(shape)


class BrainNetwork(Encoder):
    """Residual MLP from voxels to CLIP tokens (voxel2clip).

    Args:
        in_dim: number of voxels.
        out_dim: tokens * dim, e.g. 257 * 768 or 768.
        clip_size: dim of a token.
        h: width.
        n_blocks: residual blocks.
        norm_type: "ln" (LayerNorm, GELU) or "bn" (BatchNorm, ReLU; the combined system).
        act_first: activation before the norm.
        use_projector: add the token-wise head on which the contrastive losses act.
        projector_dim: its width.

    Source: MindEye (arXiv 2305.18274), appendix A.3.
    """

    def __init__(
        self,
        in_dim: int = 15724,
        out_dim: int = 257 * 768,
        clip_size: int = 768,
        h: int = 4096,
        n_blocks: int = 4,
        norm_type: str = "ln",
        act_first: bool = False,
        use_projector: bool = True,
        projector_dim: int = 2048,
    ):
        super().__init__()
        if norm_type not in NORMS:
            raise PerceptError(
                f"norm_type '{norm_type}' is unknown: choose one of {', '.join(NORMS)}."
            )
        norm, activation = NORMS[norm_type]

        def block(width_in: int, dropout: float) -> nn.Sequential:
            linear, layers = nn.Linear(width_in, h), [norm(h), activation()]
            if act_first:
                layers.reverse()
            return nn.Sequential(linear, *layers, nn.Dropout(dropout))

        self.clip_size = clip_size
        self.lin0 = block(in_dim, 0.5)
        self.mlp = nn.ModuleList(block(h, 0.15) for _ in range(n_blocks))
        self.lin1 = nn.Linear(h, out_dim)
        self.projector = None
        if use_projector:
            self.projector = make_projector(clip_size, projector_dim)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Voxels (batch, voxels), or a volume (batch, X, Y, Z), to tokens.

        Returns:
            backbone (batch, tokens * dim), and with a projector also its output (batch, tokens,
            dim).

        Raises:
            PerceptError: if the number of voxels is not in_dim.
        """
        batch = x.shape[0]
        x = self.lin0(flatten_voxels(x, self.lin0[0]))  # (batch, h)
        for layer in self.mlp:
            x = layer(x) + x
        x = self.lin1(x)  # (batch, tokens * dim)
        if self.projector is None:
            return x
        return x, self.projector(x.view(batch, -1, self.clip_size))  # (batch, tokens, dim)


# norm_type -> (norm, activation)
NORMS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], nn.Module]]] = {
    "ln": (nn.LayerNorm, nn.GELU),
    "bn": (nn.BatchNorm1d, nn.ReLU),
}


def make_projector(dim: int, width: int) -> nn.Sequential:
    """The token-wise head of the contrastive losses, (..., dim) -> (..., dim)."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.GELU(),
        nn.Linear(dim, width),
        nn.LayerNorm(width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.LayerNorm(width),
        nn.GELU(),
        nn.Linear(width, dim),
    )


class _Mixing(nn.Module):
    """A residual self-attention over the locations of a feature map, (batch, locations, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class VolumeEncoder(Encoder):
    """3-D convolutions from a whole volume to a CLIP embedding, then attention over locations.

    Args:
        dims: (x, y, z) of the volume; NSD's func1pt8mm of subject 1 has (81, 104, 83).
        out_dim: tokens * dim.
        clip_size: dim of a token.
        channels: of the convolutions, each followed by BatchNorm and ReLU.
        strides: of the convolutions.
        kernel: of the convolutions.
        padding: of the convolutions.
        dilation: of the convolutions.
        attention_width: width of the attention's tokens, 0 for no attention.
        heads: of the attention.
        average_output: average over the locations before the last linear map, instead of one
            weight for each location.

    Raises:
        PerceptError: for channels and strides of different number, or a volume that is too small
            for them.

    The sizes are those of the published configuration. Nothing else of this network is documented,
    so what stands between the convolutions is our choice.
    """

    def __init__(
        self,
        dims: Sequence[int],
        out_dim: int = 768,
        clip_size: int = 768,
        channels: Sequence[int] = (64, 128, 256, 64),
        strides: Sequence[int] = (1, 2, 3, 3),
        kernel: int = 3,
        padding: int = 1,
        dilation: int = 1,
        attention_width: int = 64,
        heads: int = 4,
        average_output: bool = False,
    ):
        super().__init__()
        if len(channels) != len(strides) or not len(channels):
            raise PerceptError(
                "A volume encoder needs one stride a convolution, but has channels"
                f" {list(channels)} and strides {list(strides)}."
            )
        layers: list[nn.Module] = []
        sides = [int(side) for side in dims]
        reach = dilation * (kernel - 1)
        width_in = 1
        for width, stride in zip(channels, strides, strict=True):
            layers.append(nn.Conv3d(width_in, width, kernel, stride, padding, dilation))
            layers += [nn.BatchNorm3d(width), nn.ReLU(True)]
            sides = [(side + 2 * padding - reach - 1) // stride + 1 for side in sides]
            width_in = width
        if min(sides) < 1:
            raise PerceptError(
                f"A volume of {list(dims)} voxels is too small for {len(channels)} convolutions"
                f" with strides {list(strides)}."
            )
        self.dims = tuple(dims)
        self.clip_size = clip_size
        self.average_output = average_output
        self.convolutions = nn.Sequential(*layers)
        width = attention_width or channels[-1]
        self.mixing: nn.Module = nn.Identity()
        if attention_width:
            self.mixing = nn.Sequential(nn.Linear(channels[-1], width), _Mixing(width, heads))
        features = width if average_output else width * math.prod(sides)
        self.lin1 = nn.Linear(features, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Predict embeddings (batch, tokens * dim).

        Args:
            x: volumes (batch, x, y, z), or flattened as the data keep them (batch, x * y * z).

        Raises:
            PerceptError: for volumes of another size.
        """
        if x[0].numel() != math.prod(self.dims):
            raise PerceptError(
                f"The network reads volumes of {self.dims} voxels but was given {x[0].numel()}"
                " voxels: give it the volumes that it was made for."
            )
        x = self.convolutions(x.reshape(len(x), 1, *self.dims))  # (batch, channels, x, y, z)
        x = self.mixing(x.flatten(2).transpose(1, 2))  # (batch, locations, width)
        x = x.mean(1) if self.average_output else x.flatten(1)
        return self.lin1(x)


# voxel2clip of the combined system by its parameter `arch`: network, and what sets it apart
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "brainnet": (
        "BrainNetwork",
        {"norm_type": "bn", "act_first": True, "use_projector": False},
    ),
    "3dconv": ("VolumeEncoder", {"channels": [64, 128, 256, 64], "attention_width": 64}),
    "3dconv-simple": (
        "VolumeEncoder",
        {"channels": [64, 128, 256, 128], "attention_width": 0, "average_output": True},
    ),
}

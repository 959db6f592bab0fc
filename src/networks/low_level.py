"""Networks from voxels to latents of an image autoencoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from src.networks.base import Network, flatten_voxels
from src.utils import PerceptError


@dataclass(frozen=True)
class UpsMode:
    """How much of a latent's size the upsampler of the low-level network makes.

    Attributes:
        channels: of the feature map that it starts from.
        factor: by which it enlarges height and width.
        widths: of its levels as published, the finest first.
    """

    channels: int
    factor: int
    widths: tuple[int, ...]


UPS_MODES = {
    "4x": UpsMode(64, 4, (64, 128, 256)),
    "8x": UpsMode(256, 8, (64, 128, 256, 256)),
    "16x": UpsMode(512, 16, (64, 128, 256, 256, 512)),
}


def make_upsampler(in_channels: int, out_channels: int, widths: Sequence[int]) -> nn.Module:
    """diffusers' VAE decoder with one layer a level: feature map -> latent, the finest width first.

    The library is imported here, because it takes seconds and few programs need it.
    """
    with torch.device("cpu"):  # a caller on "meta" must not move what the import creates
        from diffusers.models.autoencoders.vae import Decoder
    return Decoder(
        in_channels=in_channels,
        out_channels=out_channels,
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=1,
    )


class Voxel2StableDiffusionModel(Network):
    """Low-level network: voxels to the scaled latent of a frozen autoencoder.

    Args:
        in_dim: number of voxels.
        h: width of the residual MLP.
        n_blocks: residual blocks.
        use_cont: add the head whose maps the contrastive loss compares with a teacher's. The
            published head expects the 64 channels of "4x" and fails in the other modes; ours takes
            the mode's channels.
        ups_mode: how much of the latent's size the upsampler makes: "4x", "8x" or "16x".
        latent_size: height and width of the latent.
        block_out_channels: widths of the upsampler, by default the published ones of the mode.
        latent_channels: channels of the latent.
        dropout: of the residual blocks; .25 in MindEye, .3 in the ROI project, which has the same
            network at h = 2048.

    Raises:
        PerceptError: for an unknown mode, or widths or a latent size that do not fit it.

    Source: MindEye, section 2.5 and appendix A.5.
    """

    def __init__(
        self,
        in_dim: int = 15724,
        h: int = 4096,
        n_blocks: int = 4,
        use_cont: bool = False,
        ups_mode: str = "4x",
        latent_size: int = 64,
        block_out_channels: Sequence[int] | None = None,
        latent_channels: int = 4,
        dropout: float = 0.25,
    ):
        super().__init__()
        if ups_mode not in UPS_MODES:
            raise PerceptError(
                f"ups_mode '{ups_mode}' is unknown: choose one of {', '.join(UPS_MODES)}."
            )
        mode = UPS_MODES[ups_mode]
        channels, factor = mode.channels, mode.factor
        widths = tuple(block_out_channels or mode.widths)
        if 2 ** (len(widths) - 1) != factor or latent_size % factor:
            raise PerceptError(
                f"ups_mode '{ups_mode}' needs {int(math.log2(factor)) + 1} block_out_channels and a"
                f" latent_size divisible by {factor}."
            )
        if any(width % 32 for width in widths):
            raise PerceptError(
                f"block_out_channels {list(widths)} do not divide into 32 groups: use multiples"
                " of 32."
            )
        self.channels = channels
        self.side = latent_size // factor

        def block(width_in: int, dropout: float) -> nn.Sequential:
            linear = nn.Linear(width_in, h, bias=False)
            return nn.Sequential(linear, nn.LayerNorm(h), nn.SiLU(), nn.Dropout(dropout))

        self.lin0 = block(in_dim, 0.5)
        self.mlp = nn.ModuleList(block(h, dropout) for _ in range(n_blocks))
        self.lin1 = nn.Linear(h, channels * self.side**2, bias=False)
        self.norm = nn.GroupNorm(1, channels)
        self.upsampler = make_upsampler(channels, latent_channels, widths)
        self.maps_projector: nn.Module = nn.Identity()
        if use_cont:
            self.maps_projector = make_maps_projector(channels)
        self.use_cont = use_cont

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Voxels (batch, voxels) -> latent (batch, channels, h, w).

        With use_cont also maps (batch, locations, 512).
        """
        batch = len(x)
        x = self.lin0(flatten_voxels(x, self.lin0[0]))  # (batch, h)
        for layer in self.mlp:
            x = layer(x) + x
        x = self.lin1(x).view(batch, self.channels, self.side, self.side)
        x = self.norm(x)  # (batch, channels, side, side)
        latent = self.upsampler(x)
        if not self.use_cont:
            return latent
        maps = self.maps_projector(x).flatten(2).transpose(1, 2)  # (batch, locations, 512)
        return latent, maps


def make_maps_projector(channels: int, width: int = 512) -> nn.Sequential:
    """Head of the low level's contrastive loss: (batch, channels, h, w) -> (batch, width, h, w)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        nn.GroupNorm(1, width),
        nn.ReLU(True),
        nn.Conv2d(width, width, 1, bias=False),
        nn.GroupNorm(1, width),
        nn.ReLU(True),
        nn.Conv2d(width, width, 1),
    )


@dataclass(frozen=True)
class BasicSize:
    """Layers of a basic encoder.

    Attributes:
        hidden: widths of the hidden linear layers.
        doublings: transposed convolutions after the last linear layer.
    """

    hidden: tuple[int, ...]
    doublings: int


BASIC_SIZES = {"2048": BasicSize((2048, 2048), 1), "512": BasicSize((512,), 2)}  # by width


class BasicEncoder(Network):
    """Small encoder from voxels to the latent of a frozen autoencoder, without norms or dropout.

    Linear layers, then transposed convolutions that each double height and width; GELU between all
    of them and none at the end.

    Args:
        in_dim: number of voxels.
        size: "2048" (the published code as it is now) or "512" (an earlier one, whose images its
            authors show).
        latent_size: height and width of the latent.
        latent_channels: its channels.
        factor: what the last layer's output is multiplied by. The published encoder gives latents
            as the autoencoder has them; with the autoencoder's scaling factor here, `forward` gives
            scaled ones all the same.

    State dict: mlp.0, mlp.2 (and mlp.4 of "2048"), upsampler.0 (and upsampler.2 of "512"), each
    with weight and bias.

    Raises:
        PerceptError: for an unknown size, or a latent size that it cannot make.

    Source: FMRI2IMG (github.com/aaalgo/fmri2img), its basic autoencoder.
    """

    def __init__(
        self,
        in_dim: int = 4660,
        size: str = "2048",
        latent_size: int = 16,
        latent_channels: int = 4,
        factor: float = 1.0,
    ):
        super().__init__()
        if size not in BASIC_SIZES:
            raise PerceptError(
                f"The basic encoder has no size '{size}': choose one of {', '.join(BASIC_SIZES)}."
            )
        doublings = BASIC_SIZES[size].doublings
        if latent_size % 2**doublings or latent_size < 1:
            raise PerceptError(
                f"A basic encoder of size '{size}' makes latents whose side is a multiple of"
                f" {2**doublings}, not {latent_size}: choose the other size."
            )
        self.factor = factor
        self.side = latent_size // 2**doublings
        widths = [in_dim, *BASIC_SIZES[size].hidden, 16 * self.side**2]
        linear = [nn.Linear(width_in, width) for width_in, width in pairwise(widths)]
        self.mlp = _alternate_with_gelu(linear)
        channels = [16] * doublings + [latent_channels]
        doubling = [
            nn.ConvTranspose2d(width_in, width, kernel_size=4, stride=2, padding=1)
            for width_in, width in pairwise(channels)
        ]
        self.upsampler = _alternate_with_gelu(doubling)[:-1]

    def forward(self, x: Tensor) -> Tensor:
        """Voxels (batch, voxels) -> latent (batch, channels, h, w)."""
        x = self.mlp(flatten_voxels(x, self.mlp[0]))  # (batch, 16 * side * side)
        return self.factor * self.upsampler(x.view(len(x), 16, self.side, self.side))


def _alternate_with_gelu(layers: Sequence[nn.Module]) -> nn.Sequential:
    """The layers in a row, a GELU after each."""
    modules: list[nn.Module] = []
    for layer in layers:
        modules += [layer, nn.GELU()]
    return nn.Sequential(*modules)

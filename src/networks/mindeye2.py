"""MindEye2's networks: a ridge per subject and a shared backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from src.networks.base import Network
from src.networks.encoders import make_projector
from src.networks.low_level import make_maps_projector, make_upsampler
from src.utils import PerceptError


class RidgeRegression(Network):
    """One linear layer a subject, from its voxels into the space that all subjects share.

    The name is the published one. It is no ridge solver: its penalty is the optimizer's weight
    decay.

    Args:
        input_sizes: voxels of each subject, in the order of the run's subjects.
        out_features: width h of the shared space.

    Source: MindEye2 (arXiv 2403.11207), section 2.1.
    """

    def __init__(self, input_sizes: Sequence[int] = (15724,), out_features: int = 4096):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(voxels, out_features) for voxels in input_sizes)

    def forward(self, x: Tensor, subject_index: int | Tensor = 0) -> Tensor:
        """Voxels to the shared space.

        Args:
            x: (batch, time, voxels), or (batch, voxels) for one trial; with several subjects in a
                batch, filled up to the most voxels.
            subject_index: position of the subject in `input_sizes`, of the batch or of each sample
                (batch,).

        Returns:
            (batch, time, h).

        Raises:
            PerceptError: if one subject's voxels are not as many as its layer was made for.
        """
        x = x[:, None] if x.ndim == 2 else x
        if not isinstance(subject_index, Tensor):
            layer = cast(nn.Linear, self.linears[subject_index])
            if x.shape[-1] != layer.in_features:
                raise PerceptError(
                    f"Subject {subject_index} of this network has {layer.in_features} voxels, not"
                    f" {x.shape[-1]}: use the subject that it was made for."
                )
            return layer(x)
        # the rows of each subject one after the other; on the host, which need not wait for a GPU
        subject_index = subject_index.cpu()
        order = subject_index.argsort(stable=True)
        numbers, counts = subject_index.unique(return_counts=True)
        parts = x[_send_rows(order, x.device)].split(counts.tolist())
        outputs = []
        for number, part in zip(numbers.tolist(), parts, strict=True):
            layer = cast(nn.Linear, self.linears[number])
            outputs.append(layer(part[..., : layer.in_features].contiguous()))
        return torch.cat(outputs)[_send_rows(order.argsort(), x.device)]


def _send_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Numbers of rows on a device; a GPU is not waited for."""
    if device.type == "cuda":
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)


def _mixer_block(width: int, drop: float) -> nn.Sequential:
    mlp = nn.Sequential(
        nn.Linear(width, width),
        nn.GELU(),
        nn.Dropout(drop),
        nn.Linear(width, width),
    )
    return nn.Sequential(nn.LayerNorm(width), mlp)


class MixerBrainNetwork(Network):
    """MindEye2's backbone as published: from the shared space to CLIP's patch tokens.

    A second branch predicts the latent of a blurry image.

    With one token (`seq_len` 1: every released configuration) the mixer adds one number to its
    input, whatever its widest matrices hold. The second branch of a block normalises an axis of
    length 1 and has a residual connection of its own, so `mixer_blocks1` never reaches the output
    (docs/mindeye2.md derives it). `folded` computes that number and skips the rest; the weights
    stay in the state dict. The published code applies dropout to that number, this class does not.

    Args:
        h: width of the shared space.
        out_dim: tokens * dim.
        seq_len: number of trials read together: one, and past and future ones.
        n_blocks: pairs of mixer blocks.
        clip_size: dim of a token.
        blurry_recon: add the branch for the blurry image.
        drop: dropout in the mixer blocks.
        clip_scale: 0 skips the head of the contrastive loss, whose weights stay, as published.
        latent_size: height and width of the blurry image's latent, a multiple of 4.
        folded: with one token, compute the number that the mixer adds instead of the mixer.

    Raises:
        PerceptError: for tokens that do not fit out_dim, or a latent size that the upsampler cannot
            make.

    Source: MindEye2 (arXiv 2403.11207), sections 2.1 and 2.4.
    """

    def __init__(
        self,
        h: int = 4096,
        out_dim: int = 256 * 1664,
        seq_len: int = 1,
        n_blocks: int = 4,
        clip_size: int = 1664,
        blurry_recon: bool = True,
        drop: float = 0.15,
        clip_scale: float = 1.0,
        latent_size: int = 28,
        folded: bool = True,
    ):
        super().__init__()
        if out_dim % clip_size or latent_size % 4:
            raise PerceptError(
                f"A backbone needs an out_dim ({out_dim}) of whole tokens ({clip_size}) and a"
                f" latent_size ({latent_size}) divisible by 4."
            )
        self.seq_len = seq_len
        self.clip_size = clip_size
        self.blurry_recon = blurry_recon
        self.clip_scale = clip_scale
        self.folded = folded
        self.mixer_blocks1 = nn.ModuleList(_mixer_block(h, drop) for _ in range(n_blocks))
        self.mixer_blocks2 = nn.ModuleList(_mixer_block(seq_len, drop) for _ in range(n_blocks))
        self.backbone_linear = nn.Linear(h * seq_len, out_dim)
        self.clip_proj = make_projector(clip_size, clip_size)
        if blurry_recon:
            self.side = latent_size // 4
            self.blin1 = nn.Linear(h * seq_len, 64 * self.side**2)
            self.bdropout = nn.Dropout(0.3)
            self.bnorm = nn.GroupNorm(1, 64)
            self.bupsampler = make_upsampler(64, 4, (32, 64, 128))
            self.b_maps_projector = make_maps_projector(64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Shared space (batch, seq_len, h) to tokens.

        Returns:
            backbone (batch, tokens, dim), the prior's condition.
            clip (batch, tokens, dim), for the contrastive loss and retrieval; a single 0 where
                clip_scale is 0.
            blurry: scaled latent (batch, 4, h, w), and maps (batch, locations, 512) for its
                contrastive loss; two 0, as published, without that branch.

        Raises:
            PerceptError: if the trials are not `seq_len`.
        """
        if x.shape[1] != self.seq_len:
            raise PerceptError(
                f"The backbone reads {self.seq_len} trials together but was given {x.shape[1]}: use"
                " as many past and future trials as in training."
            )
        x = self._mix(x).flatten(1)  # (batch, seq_len * h)
        backbone = self.backbone_linear(x).view(len(x), -1, self.clip_size)  # (batch, tokens, dim)
        clip = self.clip_proj(backbone) if self.clip_scale else x.new_zeros(1)
        blurry: Any = self._predict_blurry(x) if self.blurry_recon else x.new_zeros(2, 1)
        return backbone, clip, blurry

    def _mix(self, x: Tensor) -> Tensor:
        """(batch, seq_len, h) -> the same shape."""
        if self.folded and self.seq_len == 1:
            return x + self._compute_mixer_constant()
        # The published defect: each branch has a residual of its own, instead of one for both.
        first, second = x, x.transpose(1, 2)
        for along_width, along_time in zip(self.mixer_blocks1, self.mixer_blocks2, strict=True):
            first = along_width(x) + first
            second = along_time(first.transpose(1, 2)) + second  # (batch, h, seq_len)
            x = second.transpose(1, 2)
        return x

    def _compute_mixer_constant(self) -> Tensor:
        """The number that the mixer adds to one token.

        It is the second branch's answer to its norm's bias: a norm over one number lets nothing
        else pass.
        """
        total = self.backbone_linear.weight.new_zeros(1)
        for norm, (enter, gelu, _, leave) in cast(Any, self.mixer_blocks2):
            total = total + leave(gelu(enter(0 * norm.weight + norm.bias)))
        return total

    def unused_parameters(self) -> list[nn.Parameter]:
        """Weights that cannot reach the output; they stay for the checkpoint, not to be trained."""
        parameters = self._unused_mixer_parameters()
        if not self.clip_scale:
            parameters += self.clip_proj.parameters()
        return parameters

    def _unused_mixer_parameters(self) -> list[nn.Parameter]:
        if self.folded and self.seq_len == 1:
            return list(self.mixer_blocks1.parameters())
        return []

    def _predict_blurry(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latent (batch, 4, h, w) and maps (batch, locations, 512), from x (batch, seq_len * h).

        In single precision, as half precision is known to blow up here.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = self.bdropout(self.blin1(x.to(self.blin1.weight.dtype)))
            x = self.bnorm(x.view(len(x), 64, self.side, self.side))
            latent = self.bupsampler(x)
            maps = self.b_maps_projector(x).flatten(2).transpose(1, 2)
            return latent, maps


class ResidualBrainNetwork(MixerBrainNetwork):
    """The backbone with a mixer as it was probably meant: each block is added to its input.

    The keys of the state dict are those of `MixerBrainNetwork`. With one token there is nothing to
    mix along time: the mixer is a residual MLP of `mixer_blocks1`, and `mixer_blocks2` is unused.
    """

    def _mix(self, x: Tensor) -> Tensor:
        for along_width, along_time in zip(self.mixer_blocks1, self.mixer_blocks2, strict=True):
            x = x + along_width(x)
            if self.seq_len > 1:
                x = x + along_time(x.transpose(1, 2)).transpose(1, 2)
        return x

    def _unused_mixer_parameters(self) -> list[nn.Parameter]:
        if self.seq_len == 1:
            return list(self.mixer_blocks2.parameters())
        return []


class MindEye2(nn.Module):
    """The whole of MindEye2 under its published names: `ridge`, `backbone`, `diffusion_prior`.

    Args:
        ridge: `RidgeRegression`, from each subject's voxels to the shared space.
        backbone: `MixerBrainNetwork` or `ResidualBrainNetwork`, from there to tokens; its
            `unused_parameters` are not trained.
        diffusion_prior: `src.prior.BrainDiffusionPrior`, or None for a model without one.
    """

    def __init__(
        self, ridge: nn.Module, backbone: nn.Module, diffusion_prior: nn.Module | None = None
    ):
        super().__init__()
        self.ridge = ridge
        self.backbone = cast(MixerBrainNetwork, backbone)
        self.diffusion_prior = diffusion_prior
        for parameter in self.backbone.unused_parameters():
            parameter.requires_grad_(False)

    @property
    def config(self) -> dict[str, Any]:
        """How it was made, of which `build_decoder` makes it again; "net" is that of its prior."""
        prior: Any = getattr(self.diffusion_prior, "config", {})
        return {
            "name": "MindEye2",
            "kwargs": prior.get("kwargs", {}),
            "ridge": self.ridge.config,
            "backbone": self.backbone.config,
            "net": prior.get("net"),
        }

    def forward(
        self, voxels: Tensor, subject_index: int | Tensor = 0
    ) -> tuple[Tensor, Tensor, Any]:
        """Voxels as `RidgeRegression` takes them -> backbone, clip, blurry of the backbone."""
        return self.backbone(self.ridge(voxels, subject_index))

    def predict_tokens(self, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone and projected tokens of the first subject's voxels, (batch, tokens, dim) each.

        Without the head of the contrastive loss both are the same.
        """
        backbone, clip, _ = self(voxels)
        projected = clip if clip.ndim == 3 else backbone
        return backbone, projected

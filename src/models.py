"""Networks that train, under the names and state-dict keys of the published systems.

- BrainNetwork (voxels -> CLIP tokens), the prior networks, MindEye2's networks for several
  subjects, the low-level networks (voxels -> latents), the ridge baseline, and the maps from one
  frozen model's tokens to another's.
- Every network keeps `config` = {"name", "kwargs"}; `build(config)` makes it again, so a checkpoint
  can rebuild its model. `published_state` brings the keys of files that others released to those of
  today.
- The prior's transformer follows the semantics of dalle2-pytorch (multi-query attention with cosine
  logits, one relative position bias for all layers, a null key), written anew; what does not change
  over the steps of sampling is kept.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from himalaya.backend import get_backend, set_backend
from himalaya.ridge import RidgeCV
from sklearn.model_selection import GroupKFold, KFold
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.utils import PerceptError, progress


class Network(nn.Module):
    """A module that remembers how it was made: `config` = {"name": its class, "kwargs": all
    arguments, defaults included}.
    """

    config: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Network:
        """Note the arguments before `__init__` sees them."""
        network = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(network, *args, **kwargs)
        bound.apply_defaults()
        made_of = {name: value for name, value in bound.arguments.items() if name != "self"}
        network.__dict__["config"] = {"name": cls.__name__, "kwargs": made_of}
        return network


def _flat_voxels(x: Tensor, first: nn.Module) -> Tensor:
    """Voxels (batch, ...) as (batch, voxels), refused when they are not as many as the layer
    `first` was made for.
    """
    x, expected = x.flatten(1), first.in_features
    if x.shape[1] != expected:
        raise PerceptError(
            f"The network reads {expected} voxels but was given {x.shape[1]}: use the subject and"
            " the voxels that it was made for."
        )
    return x


# ---------------------------------------------------------------------------------- voxels -> CLIP
class Encoder(Network):
    """What the networks from voxels to CLIP share: `tokens`."""

    clip_size: int

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels (batch, ...) to backbone and projected tokens, (batch, tokens, dim) each; without
        a projector both are the same.
        """
        out = self(x)
        backbone, projected = out if isinstance(out, tuple) else (out, out)
        return backbone.view(len(x), -1, self.clip_size), projected.view(len(x), -1, self.clip_size)


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
            pair = [activation(), norm(h)] if act_first else [norm(h), activation()]
            return nn.Sequential(nn.Linear(width_in, h), *pair, nn.Dropout(dropout))

        self.clip_size = clip_size
        self.lin0 = block(in_dim, 0.5)
        self.mlp = nn.ModuleList(block(h, 0.15) for _ in range(n_blocks))
        self.lin1 = nn.Linear(h, out_dim)
        self.projector = _projector(clip_size, projector_dim) if use_projector else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Voxels (batch, voxels), or a volume (batch, X, Y, Z), to tokens.

        Returns:
            backbone (batch, tokens * dim), and with a projector also its output (batch, tokens,
            dim).

        Raises:
            PerceptError: if the number of voxels is not in_dim.
        """
        batch = x.shape[0]
        x = self.lin0(_flat_voxels(x, self.lin0[0]))  # (batch, h)
        for layer in self.mlp:
            x = layer(x) + x
        x = self.lin1(x)  # (batch, tokens * dim)
        if self.projector is None:
            return x
        return x, self.projector(x.view(batch, -1, self.clip_size))  # (batch, tokens, dim)


NORMS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], nn.Module]]] = {
    "ln": (nn.LayerNorm, nn.GELU),
    "bn": (nn.BatchNorm1d, nn.ReLU),
}


def _projector(dim: int, width: int) -> nn.Sequential:
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


# --------------------------------------------------------------------------- whole volumes -> CLIP
class _Mixing(nn.Module):
    """Every place of a feature map looks at all others: one residual self-attention over (batch,
    places, width).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class VolumeEncoder(Encoder):
    """3-D convolutions from a whole volume to a CLIP embedding, with an attention over the places
    that are left (or none).

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
        average_output: average over the places before the last linear map, instead of one weight
            for each place.

    Raises:
        PerceptError: for channels and strides of different number, or a volume that is too small
            for them.

    The figures are those of the published configuration; what stands between them is ours, as
    nothing else of this network is documented.
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
        places, layers = [int(side) for side in dims], []
        for before, width, stride in zip((1, *channels), channels, strides, strict=False):
            layers += [
                nn.Conv3d(before, width, kernel, stride, padding, dilation),
                nn.BatchNorm3d(width),
                nn.ReLU(True),
            ]
            places = [
                (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side in places
            ]
        if min(places) < 1:
            raise PerceptError(
                f"A volume of {list(dims)} voxels is too small for {len(channels)} convolutions"
                f" with strides {list(strides)}."
            )
        self.dims, self.clip_size, self.average_output = tuple(dims), clip_size, average_output
        self.convolutions = nn.Sequential(*layers)
        width = attention_width or channels[-1]
        self.mixing = (
            nn.Sequential(nn.Linear(channels[-1], width), _Mixing(width, heads))
            if attention_width
            else nn.Identity()
        )
        self.lin1 = nn.Linear(width if average_output else width * math.prod(places), out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Volumes (batch, x, y, z), or flattened as the data keep them (batch, x * y * z), to
        (batch, tokens * dim).
        """
        if x[0].numel() != math.prod(self.dims):
            raise PerceptError(
                f"The network reads volumes of {self.dims} voxels but was given {x[0].numel()}"
                " voxels: give it the volumes that it was made for."
            )
        x = self.convolutions(x.reshape(len(x), 1, *self.dims))  # (batch, channels, x, y, z)
        x = self.mixing(x.flatten(2).transpose(1, 2))  # (batch, places, width)
        return self.lin1(x.mean(1) if self.average_output else x.flatten(1))


ENCODERS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # voxel2clip of the combined system, by its parameter `arch`: network, what sets it apart
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


# ------------------------------------------------------------------------- the prior's transformer
class GainNorm(nn.Module):
    """LayerNorm with a gain and no bias; `stable` first divides by the signed maximum. eps is 1e-5
    in single, 1e-3 in lower precision.

    Training takes the fused kernel. Without gradient the operations stand in the published order:
    sampling repeats the network, each time on what it gave before, and so blows one unit of
    rounding up to 3e-4; like this, samples are the published ones to the bit.
    """

    def __init__(self, dim: int, stable: bool = False):
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))
        self.stable = stable

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        if self.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        eps = 1e-5 if x.dtype in (torch.float32, torch.float64) else 1e-3
        x = x.to(self.g.dtype)
        if torch.is_grad_enabled():
            return F.layer_norm(x, self.g.shape, weight=self.g, eps=eps)
        return (
            (x - x.mean(-1, keepdim=True))
            * (x.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
            * self.g
        )


class Rotary(nn.Module):
    """Rotary position embedding of interleaved pairs on the first `dim` features (Su et al. 2021)."""

    def __init__(self, dim: int):
        super().__init__()
        self.freqs = nn.Parameter(
            1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim), requires_grad=False
        )

    def table(self, n: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine (n, dim), each frequency twice."""
        angle = (
            torch.arange(n, device=self.freqs.device, dtype=self.freqs.dtype)[:, None] * self.freqs
        ).repeat_interleave(2, -1)
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x (..., n, features) with its first pairs turned by position."""
        cos, sin = table
        width = cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(
            -2
        )  # (a, b) -> (-b, a)
        turned = turned * cos + partner * sin
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


class RelativePositionBias(nn.Module):
    """One bias a head and distance bucket, shared by all the layers; column 0 is the null key, so
    real key m stands at column m + 1.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.relative_attention_bias = nn.Embedding(buckets, heads)

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of each distance: exact up to half the buckets, then logarithmic; the future is
        distance 0.
        """
        distance, exact = distance.clamp(min=0), self.buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(
            self.max_distance / exact
        )
        large = (exact + (ratio * (self.buckets - exact)).long()).clamp(max=self.buckets - 1)
        return torch.where(distance < exact, distance, large)

    def forward(self, n: int) -> Tensor:
        """Bias (heads, n, n + 1)."""
        device = self.relative_attention_bias.weight.device
        distance = (
            torch.arange(n, device=device)[:, None] - torch.arange(n + 1, device=device)[None, :]
        )
        return self.relative_attention_bias(self.bucket(distance)).permute(2, 0, 1)


class Attention(nn.Module):
    """Multi-query attention with L2-normalised queries and keys (logits 16 * cosine), a learned
    null key and value, and rotary positions.
    """

    def __init__(self, dim: int, dim_head: int, heads: int, rotary_emb: Rotary):
        super().__init__()
        self.heads = heads
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.norm = GainNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.rotary_emb = rotary_emb
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim, bias=False), GainNorm(dim))

    def forward(
        self, x: Tensor, bias: Tensor, table: tuple[Tensor, Tensor], last: int | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x: (batch, n, dim).
            bias: (heads, n, n + 1), the causal mask in it.
            table: cosine and sine (n, width) of the rotary embedding.
            last: compute only that many last positions.

        Returns:
            (batch, last or n, dim).
        """
        batch, n, _ = x.shape
        asked = last or n
        x = self.norm(x)
        q = (
            self.to_q(x[:, -asked:]).view(batch, asked, self.heads, -1).transpose(1, 2)
        )  # (batch, heads, asked, dim_head)
        k, v = self.to_kv(x).chunk(
            2, -1
        )  # (batch, n, dim_head) each: one head of keys and values for all queries
        q, k = Rotary.rotate(q, (table[0][-asked:], table[1][-asked:])), Rotary.rotate(k, table)
        null_k, null_v = (null.to(k.dtype).expand(batch, 1, -1) for null in self.null_kv)
        k, v = torch.cat((null_k, k), 1), torch.cat((null_v, v), 1)  # (batch, n + 1, dim_head)
        q, k = F.normalize(q, dim=-1).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        attend = _attend_fused if torch.is_grad_enabled() else _attend
        return self.to_out(
            attend(q, k, v, bias[:, -asked:].to(v.dtype)).transpose(1, 2).reshape(batch, asked, -1)
        )


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Multi-query attention in the published order of operations (see GainNorm).

    q (batch, heads, rows, dim_head), k and v (batch, columns, dim_head), bias (heads, rows,
    columns) -> (batch, heads, rows, dim_head).
    """
    logits = torch.einsum("bhid,bjd->bhij", 4 * q, 4 * k) + bias
    return torch.einsum(
        "bhij,bjd->bhid",
        logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype),
        v,
    )


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same in one kernel that keeps no logits; as there is one head of keys, the heads are laid
    along the query axis, without copies.
    """
    batch, heads, asked, width = q.shape
    mask = bias.reshape(1, 1, heads * asked, -1)
    out = F.scaled_dot_product_attention(
        q.reshape(batch, 1, heads * asked, width),
        k[:, None],
        v[:, None],
        attn_mask=mask,
        scale=16.0,
    )
    return out.view(q.shape)


class SwiGLU(nn.Module):
    """First half times SiLU of the second half."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2 * width) -> (..., width)."""
        x, gate = x.chunk(2, dim=-1)
        return x * F.silu(gate)


def _feed_forward(dim: int, mult: int = 4, normformer: bool = False) -> nn.Sequential:
    inner = mult * dim
    norm = GainNorm(inner) if normformer else nn.Identity()
    return nn.Sequential(
        GainNorm(dim),
        nn.Linear(dim, 2 * inner, bias=False),
        SwiGLU(),
        norm,
        nn.Dropout(0.0),
        nn.Linear(inner, dim, bias=False),
    )


class _Layer(nn.ModuleList):
    """Attention and feed-forward block, each with its residual; a list, as the published keys are
    layers.L.0 and layers.L.1.
    """

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding, which all layers share."""
        return cast(Attention, self[0]).rotary_emb

    def forward(
        self, x: Tensor, bias: Tensor, table: tuple[Tensor, Tensor], last: int | None = None
    ) -> Tensor:
        """As `Attention.forward`."""
        attention, feed_forward = self
        x = attention(x, bias, table, last) + (x[:, -last:] if last else x)
        return feed_forward(x) + x


class CausalTransformer(nn.Module):
    """The prior's transformer (causal or not): attention and SwiGLU blocks with residuals, a stable
    norm and a projection.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        causal: bool = True,
        normformer: bool = False,
    ):
        super().__init__()
        self.causal = causal
        self.rel_pos_bias = RelativePositionBias(heads)
        rotary = Rotary(min(32, dim_head))
        self.layers = nn.ModuleList(
            _Layer(
                [Attention(dim, dim_head, heads, rotary), _feed_forward(dim, normformer=normformer)]
            )
            for _ in range(depth)
        )
        self.norm = GainNorm(dim, stable=True)
        self.project_out = nn.Linear(dim, dim, bias=False)
        # compute activations again on the way back instead of keeping them: less memory, a third
        # more time
        self.checkpointing = False
        self._keeping = False
        self._kept: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def kept_positions(self) -> Iterator[None]:
        """Within this context the weights stay as they are, so bias and rotary table are computed
        once (the steps of sampling).
        """
        self._keeping = True
        try:
            yield
        finally:
            self._keeping, self._kept = False, {}

    def _positions(self, n: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Bias (heads, n, n + 1), with the causal mask in it, and rotary table."""
        if n in self._kept:
            return self._kept[n]
        bias, table = self.rel_pos_bias(n), cast(_Layer, self.layers[0]).rotary.table(n)
        if self.causal:
            future = torch.ones(n, n + 1, dtype=torch.bool, device=bias.device).triu(2)
            bias = bias.masked_fill(future, -torch.finfo(bias.dtype).max)
        if self._keeping:
            self._kept[n] = bias, table
        return bias, table

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """(batch, n, dim) -> (batch, n, dim), or only the `last` positions, whose neighbours the
        last layer then leaves out.
        """
        bias, table = self._positions(x.shape[1])
        for i, layer in enumerate(self.layers):
            asked = last if i == len(self.layers) - 1 else None
            if self.checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(layer, x, bias, table, asked, use_reentrant=False))
            else:
                x = layer(x, bias, table, asked)
        return self.project_out(self.norm(x))


class SinusoidalTime(nn.Module):
    """Sine and cosine of a timestep (batch,) -> (batch, dim), sines first."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """(batch,) -> (batch, dim)."""
        half = self.dim // 2
        freqs = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
        angle = t.float()[:, None] * freqs
        return torch.cat((angle.sin(), angle.cos()), -1)


class _TimeMLP(nn.Module):
    """Two SiLU layers of twice the width, then a linear one, under the published keys."""

    def __init__(self, dim: int):
        super().__init__()
        layer = lambda a, b: nn.Sequential(nn.Linear(a, b), nn.SiLU())  # noqa: E731
        self.net = nn.Sequential(
            layer(dim, 2 * dim), layer(2 * dim, 2 * dim), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(next(self.parameters()).dtype))


def _keep(batch: int, drop_prob: float | Tensor, device: torch.device) -> Tensor:
    """Which samples keep a condition (batch,); no random number is drawn for probabilities 0 and 1,
    as published, or where it is decided already.
    """
    if isinstance(drop_prob, Tensor):
        return ~drop_prob
    if drop_prob in (0.0, 1.0):
        return torch.full((batch,), drop_prob == 0.0, device=device)
    return torch.rand(batch, device=device) < 1 - drop_prob


class Denoiser(Network):
    """What the prior networks share, and `src.prior` relies on: guidance, and a context for the
    steps of sampling.
    """

    causal_transformer: CausalTransformer

    def forward_with_cond_scale(self, *args: Any, cond_scale: float = 1.0, **kwargs: Any) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022): unless the scale is 1, a second pass with
        both conditions dropped.
        """
        given = self(*args, **kwargs)
        if cond_scale == 1.0:
            return given
        without = self(*args, **kwargs, brain_cond_drop_prob=1.0, image_cond_drop_prob=1.0)
        return without + (given - without) * cond_scale

    def kept_positions(self) -> Any:
        """Context in which what only depends on positions and weights is computed once."""
        return self.causal_transformer.kept_positions()


class VersatileDiffusionPriorNetwork(Denoiser):
    """Prior network for all CLIP tokens (257 x 768): [brain tokens, time, noisy image tokens] ->
    image tokens.

    Args:
        dim: dim of a token.
        depth: layers.
        dim_head: width of a head.
        heads: heads.
        num_tokens: tokens an image.
        causal: causal attention.
        learned_query_mode: "none", "pos_emb" (added to the image tokens), "token" (appended) or
            "all_pos_emb" (added to all tokens).

    Source: MindEye, section 2.3 and appendix A.4.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 12,
        num_tokens: int = 257,
        causal: bool = False,
        learned_query_mode: str = "pos_emb",
    ):
        super().__init__()
        lengths = {
            "none": 0,
            "pos_emb": num_tokens,
            "token": num_tokens,
            "all_pos_emb": 2 * num_tokens + 1,
        }
        if learned_query_mode not in lengths:
            raise PerceptError(
                f"learned_query_mode '{learned_query_mode}' is unknown: choose one of"
                f" {', '.join(lengths)}."
            )
        self.num_tokens, self.mode = num_tokens, learned_query_mode
        if lengths[learned_query_mode]:
            self.learned_query = nn.Parameter(
                torch.randn(lengths[learned_query_mode], dim) * dim**-0.5
            )
        self.null_brain_embeds = nn.Parameter(torch.randn(num_tokens, dim))
        self.null_image_embed = nn.Parameter(torch.randn(num_tokens, dim))
        self.to_time_embeds = nn.Sequential(nn.Sequential(SinusoidalTime(dim), _TimeMLP(dim)))
        self.causal_transformer = CausalTransformer(dim, depth, dim_head, heads, causal)

    def forward(
        self,
        image_embed: Tensor,
        timesteps: Tensor,
        brain_embed: Tensor | None = None,
        text_embed: Tensor | None = None,
        brain_cond_drop_prob: float | Tensor = 0.0,
        image_cond_drop_prob: float | Tensor = 0.0,
    ) -> Tensor:
        """Denoise tokens.

        Args:
            image_embed: noisy tokens (batch, tokens, dim).
            timesteps: (batch,).
            brain_embed: condition (batch, tokens, dim); `text_embed` is another name for it.
            text_embed: see brain_embed.
            brain_cond_drop_prob: probability of putting the learned null tokens in its place, a
                sample; or where to do so, Boolean (batch,).
            image_cond_drop_prob: the same for the noisy tokens.

        Returns:
            (batch, tokens, dim).

        Raises:
            PerceptError: if there is no condition, or the tokens are not as many as the network was
                made for.
        """
        brain_embed = text_embed if brain_embed is None else brain_embed
        if brain_embed is None:
            raise PerceptError(
                "The prior network needs brain_embed (or text_embed): pass the tokens predicted"
                " from the brain."
            )
        batch, (tokens_each, dim) = len(image_embed), self.null_image_embed.shape
        for name, given in (("image_embed", image_embed), ("brain_embed", brain_embed)):
            if given.shape[0] != batch or given[0].numel() != tokens_each * dim:
                raise PerceptError(
                    f"The prior network needs {name} of shape ({batch}, {tokens_each}, {dim}), not"
                    f" {tuple(given.shape)}."
                )
        image, brain = (
            image_embed.reshape(batch, -1, dim),
            brain_embed.reshape(batch, -1, dim),
        )  # (batch, tokens, dim)
        keep_brain = _keep(batch, brain_cond_drop_prob, image.device)[:, None, None]
        keep_image = _keep(batch, image_cond_drop_prob, image.device)[:, None, None]
        brain = torch.where(keep_brain, brain, self.null_brain_embeds.to(brain.dtype))
        image = torch.where(keep_image, image, self.null_image_embed.to(image.dtype))
        time = self.to_time_embeds(timesteps)[:, None].to(image.dtype)  # (batch, 1, dim)
        if self.mode == "pos_emb":
            image = image + self.learned_query
        parts = [brain, time, image]
        if self.mode == "token":
            parts.append(self.learned_query.expand(batch, -1, -1))
        tokens = torch.cat(parts, 1)  # (batch, 2 * tokens + 1 [+ tokens], dim)
        if self.mode == "all_pos_emb":
            tokens = tokens + self.learned_query
        return self.causal_transformer(tokens, last=self.num_tokens)


class PriorNetwork(VersatileDiffusionPriorNetwork):
    """MindEye2's prior network: MindEye's at other sizes, [brain tokens, time, noisy image tokens]
    -> image tokens.

    Args:
        dim: dim of a token.
        depth: layers.
        dim_head: width of a head.
        heads: heads; 0: dim // dim_head, as published (14 for 768, whose inner width then is 728).
        num_tokens: tokens an image.
        causal: causal attention.
        learned_query_mode: as `VersatileDiffusionPriorNetwork`.

    Source: MindEye2 (arXiv 2403.11207), appendix A.5.
    """

    def __init__(
        self,
        dim: int = 1664,
        depth: int = 6,
        dim_head: int = 52,
        heads: int = 0,
        num_tokens: int = 256,
        causal: bool = False,
        learned_query_mode: str = "pos_emb",
    ):
        super().__init__(
            dim, depth, dim_head, heads or dim // dim_head, num_tokens, causal, learned_query_mode
        )


class DiffusionPriorNetwork(Denoiser):
    """Prior network for one CLIP embedding (1 x 768), as LAION's text -> image prior: [text slots,
    condition, time, image, query] -> image.

    Args:
        dim: dim of the embedding.
        depth: layers.
        dim_head: width of a head.
        heads: heads.
        num_timesteps: noise levels; each has a row in the time table.
        max_text_len: slots for text encodings, all filled with learned null encodings here.
        normformer: a further norm inside the feed-forward blocks.

    Source: Ramesh et al. 2022; the configuration of nousr/conditioned-prior.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        dim_head: int = 64,
        heads: int = 12,
        num_timesteps: int = 1000,
        max_text_len: int = 256,
        normformer: bool = True,
    ):
        super().__init__()
        self.learned_query = nn.Parameter(torch.randn(dim))
        self.null_text_encodings = nn.Parameter(torch.randn(1, max_text_len, dim))
        self.null_text_embeds = nn.Parameter(torch.randn(1, 1, dim))
        self.null_image_embed = nn.Parameter(torch.randn(1, dim))
        self.to_time_embeds = nn.Sequential(nn.Embedding(num_timesteps, dim))
        self.causal_transformer = CausalTransformer(
            dim, depth, dim_head, heads, causal=True, normformer=normformer
        )

    def forward(
        self,
        image_embed: Tensor,
        timesteps: Tensor,
        text_embed: Tensor,
        brain_cond_drop_prob: float | Tensor = 0.0,
        image_cond_drop_prob: float | Tensor = 0.0,
    ) -> Tensor:
        """Denoise embeddings (batch, dim) or (batch, 1, dim) at timesteps (batch,), given
        text_embed of the same shape -> same shape.
        """
        batch, dim, shape = len(image_embed), self.learned_query.shape[0], image_embed.shape
        image, text = image_embed.reshape(batch, 1, dim), text_embed.reshape(batch, 1, dim)
        keep_text = _keep(batch, brain_cond_drop_prob, image.device)[:, None, None]
        keep_image = _keep(batch, image_cond_drop_prob, image.device)[:, None, None]
        text = torch.where(keep_text, text, self.null_text_embeds)
        image = torch.where(keep_image, image, self.null_image_embed[None])
        time = self.to_time_embeds(timesteps)[:, None]  # (batch, 1, dim)
        slots, query = (
            self.null_text_encodings.expand(batch, -1, -1),
            self.learned_query.expand(batch, 1, -1),
        )
        tokens = torch.cat((slots, text, time, image, query), 1)  # (batch, max_text_len + 4, dim)
        return self.causal_transformer(tokens, last=1).view(shape)


# -------------------------------------------------------------- MindEye2: several subjects -> CLIP
class RidgeRegression(Network):
    """One linear layer a subject, from its voxels into the space that all subjects share.

    The name is the published one: it is no ridge solver, its penalty is the optimizer's weight
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
        out, rows = [], []
        for number in subject_index.unique().tolist():
            layer = cast(nn.Linear, self.linears[number])
            rows.append((subject_index == number).nonzero()[:, 0])
            out.append(layer(x[rows[-1], :, : layer.in_features]))
        return torch.cat(out)[torch.cat(rows).argsort()]


def _mixer_block(width: int, drop: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Dropout(drop), nn.Linear(width, width)
        ),
    )


class MixerBrainNetwork(Network):
    """MindEye2's backbone as published: from the shared space to CLIP's patch tokens, and beside it
    to a blurry picture.

    With one token (`seq_len` 1: every released configuration) the mixer adds one number to its
    input, whatever its widest matrices hold: the second branch normalises an axis of length 1 and
    keeps a residual of its own, so `mixer_blocks1` never reaches the output (docs/mindeye2.md
    derives it). `folded` computes that number and skips the rest; the weights stay in the state
    dict. Unlike the published code, no dropout falls upon that number.

    Args:
        h: width of the shared space.
        out_dim: tokens * dim.
        seq_len: trials that are read together, the past and the future ones with it.
        n_blocks: pairs of mixer blocks.
        clip_size: dim of a token.
        blurry_recon: add the branch for the blurry picture.
        drop: dropout in the mixer blocks.
        clip_scale: 0 leaves out the head of the contrastive loss (its weights are there all the
            same, as published).
        latent_size: height and width of the blurry picture's latent, a multiple of 4.
        folded: with one token, compute what the mixer amounts to instead of the mixer.

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
        self.seq_len, self.clip_size, self.blurry_recon, self.clip_scale, self.folded = (
            seq_len,
            clip_size,
            blurry_recon,
            clip_scale,
            folded,
        )
        self.mixer_blocks1 = nn.ModuleList(_mixer_block(h, drop) for _ in range(n_blocks))
        self.mixer_blocks2 = nn.ModuleList(_mixer_block(seq_len, drop) for _ in range(n_blocks))
        self.backbone_linear = nn.Linear(h * seq_len, out_dim)
        self.clip_proj = _projector(clip_size, clip_size)
        if blurry_recon:
            self.side = latent_size // 4
            self.blin1 = nn.Linear(h * seq_len, 64 * self.side**2)
            self.bdropout = nn.Dropout(0.3)
            self.bnorm = nn.GroupNorm(1, 64)
            widths = (32, 64, 128)
            self.bupsampler = Decoder(
                64,
                4,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=widths,
                layers_per_block=1,
            )
            self.b_maps_projector = _maps_projector(64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Shared space (batch, seq_len, h) to tokens.

        Returns:
            backbone (batch, tokens, dim), the prior's condition; clip (batch, tokens, dim), for the
            contrastive loss and retrieval (a single 0 where clip_scale is 0); blurry: scaled latent
            (batch, 4, h, w) and maps (batch, locations, 512) for its contrastive loss (two 0, as
            published, without the branch).

        Raises:
            PerceptError: if the trials are not `seq_len`.
        """
        if x.shape[1] != self.seq_len:
            raise PerceptError(
                f"The backbone reads {self.seq_len} trials together but was given {x.shape[1]}: use"
                " as many past and future trials as in training."
            )
        x = self._mixed(x).flatten(1)  # (batch, seq_len * h)
        backbone = self.backbone_linear(x).view(len(x), -1, self.clip_size)  # (batch, tokens, dim)
        clip = self.clip_proj(backbone) if self.clip_scale else x.new_zeros(1)
        return backbone, clip, self._blurry(x) if self.blurry_recon else x.new_zeros(2, 1)

    def _mixed(self, x: Tensor) -> Tensor:
        """(batch, seq_len, h) -> the same shape."""
        if self.folded and self.seq_len == 1:
            return x + self._constant()
        first, second = (
            x,
            x.transpose(1, 2),
        )  # each branch keeps a residual of its own: this is what is wrong with it
        for along_width, along_time in zip(self.mixer_blocks1, self.mixer_blocks2, strict=True):
            first = along_width(x) + first
            second = along_time(first.transpose(1, 2)) + second  # (batch, h, seq_len)
            x = second.transpose(1, 2)
        return x

    def _constant(self) -> Tensor:
        """What the mixer adds to one token: the second branch's answer to its norm's bias, which is
        all that a norm over one number lets pass.
        """
        total = self.backbone_linear.weight.new_zeros(1)
        for norm, (enter, gelu, _, leave) in cast(Any, self.mixer_blocks2):
            total = total + leave(gelu(enter(0 * norm.weight + norm.bias)))
        return total

    def dead_parameters(self) -> list[nn.Parameter]:
        """Weights that cannot reach the output and are only kept for the checkpoint: nothing to
        optimise.
        """
        return self._idle_mixer() + ([] if self.clip_scale else list(self.clip_proj.parameters()))

    def _idle_mixer(self) -> list[nn.Parameter]:
        return list(self.mixer_blocks1.parameters()) if self.folded and self.seq_len == 1 else []

    def _blurry(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In single precision, as half precision is known to blow up here."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.bdropout(self.blin1(x.to(self.blin1.weight.dtype)))
            x = self.bnorm(x.view(len(x), 64, self.side, self.side))
            return self.bupsampler(x), self.b_maps_projector(x).flatten(2).transpose(
                1, 2
            )  # (batch, 4, h, w), (batch, locations, 512)


class ResidualBrainNetwork(MixerBrainNetwork):
    """The backbone with a mixer as it was probably meant, under the same keys: each block is added
    to what came before it.

    With one token there is nothing to mix along time: what is left is a residual MLP of
    `mixer_blocks1`, and `mixer_blocks2` is idle.
    """

    def _mixed(self, x: Tensor) -> Tensor:
        for along_width, along_time in zip(self.mixer_blocks1, self.mixer_blocks2, strict=True):
            x = x + along_width(x)
            if self.seq_len > 1:
                x = x + along_time(x.transpose(1, 2)).transpose(1, 2)
        return x

    def _idle_mixer(self) -> list[nn.Parameter]:
        return list(self.mixer_blocks2.parameters()) if self.seq_len == 1 else []


class MindEye2(nn.Module):
    """The whole of MindEye2 under its published names: `ridge`, `backbone`, `diffusion_prior`.

    Args:
        ridge: `RidgeRegression`, from each subject's voxels to the shared space.
        backbone: `MixerBrainNetwork` or `ResidualBrainNetwork`, from there to tokens; those of its
            weights that cannot reach the output are not trained.
        diffusion_prior: `src.prior.BrainDiffusionPrior`, or None for a model without one.
    """

    def __init__(
        self, ridge: nn.Module, backbone: nn.Module, diffusion_prior: nn.Module | None = None
    ):
        super().__init__()
        self.ridge, self.backbone, self.diffusion_prior = (
            ridge,
            cast(MixerBrainNetwork, backbone),
            diffusion_prior,
        )
        for parameter in self.backbone.dead_parameters():
            parameter.requires_grad_(False)

    def forward(
        self, voxels: Tensor, subject_index: int | Tensor = 0
    ) -> tuple[Tensor, Tensor, Any]:
        """Voxels as `RidgeRegression` takes them -> backbone, clip, blurry, as `MixerBrainNetwork`
        gives them.
        """
        return self.backbone(self.ridge(voxels, subject_index))

    def tokens(self, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone and projected tokens, (batch, tokens, dim) each, of the first subject's voxels."""
        backbone, clip, _ = self(voxels)
        return backbone, clip if clip.ndim == 3 else backbone


class CaptionConverter(Network):
    """Tokens of one image encoder as those of another: one linear map along the tokens, then one
    along the features.

    Args:
        tokens_in: tokens that are given.
        tokens_out: tokens that are wanted.
        dim_in: dim of a token that is given.
        dim_out: dim of a token that is wanted.

    Source: MindEye2 (arXiv 2403.11207), appendix A.6 (from CLIP bigG to the image tokens of GIT).
    """

    def __init__(
        self, tokens_in: int = 256, tokens_out: int = 257, dim_in: int = 1664, dim_out: int = 1024
    ):
        super().__init__()
        self.linear1 = nn.Linear(tokens_in, tokens_out)
        self.linear2 = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens_in, dim_in) -> (batch, tokens_out, dim_out)."""
        return self.linear2(self.linear1(x.transpose(1, 2)).transpose(1, 2))


# ------------------------------------------------------------------------------- voxels -> latents
UPS_MODES = {
    "4x": (64, 4, (64, 128, 256)),
    "8x": (256, 8, (64, 128, 256, 256)),
    "16x": (512, 16, (64, 128, 256, 256, 512)),
}


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
        channels, factor, widths = UPS_MODES[ups_mode]
        widths = tuple(block_out_channels or widths)
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
        self.channels, self.side = channels, latent_size // factor

        def block(width_in: int, dropout: float) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(width_in, h, bias=False), nn.LayerNorm(h), nn.SiLU(), nn.Dropout(dropout)
            )

        self.lin0 = block(in_dim, 0.5)
        self.mlp = nn.ModuleList(block(h, dropout) for _ in range(n_blocks))
        self.lin1 = nn.Linear(h, channels * self.side**2, bias=False)
        self.norm = nn.GroupNorm(1, channels)
        self.upsampler = Decoder(
            in_channels=channels,
            out_channels=latent_channels,
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=1,
        )
        self.maps_projector = _maps_projector(channels) if use_cont else nn.Identity()
        self.use_cont = use_cont

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Voxels (batch, voxels) -> latent (batch, channels, h, w), with use_cont also maps (batch,
        locations, 512).
        """
        batch = len(x)
        x = self.lin0(_flat_voxels(x, self.lin0[0]))  # (batch, h)
        for layer in self.mlp:
            x = layer(x) + x
        x = self.norm(
            self.lin1(x).view(batch, self.channels, self.side, self.side)
        )  # (batch, channels, side, side)
        latent = self.upsampler(x)
        if not self.use_cont:
            return latent
        return latent, self.maps_projector(x).flatten(2).transpose(1, 2)  # (batch, locations, 512)


def _maps_projector(channels: int, width: int = 512) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        nn.GroupNorm(1, width),
        nn.ReLU(True),
        nn.Conv2d(width, width, 1, bias=False),
        nn.GroupNorm(1, width),
        nn.ReLU(True),
        nn.Conv2d(width, width, 1),
    )


BASIC_SIZES = {
    "2048": ((2048, 2048), 1),
    "512": ((512,), 2),
}  # by width: hidden layers, and transposed convolutions after the last linear one


class BasicEncoder(Network):
    """Small encoder from voxels to the latent of a frozen autoencoder, without norms or dropout.

    Linear layers, then transposed convolutions that each double height and width; GELU between all
    of them and none at the end.

    Args:
        in_dim: number of voxels.
        size: "2048" (the published code as it is now) or "512" (an earlier one, whose pictures its
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
        widths, doublings = BASIC_SIZES[size]
        if latent_size % 2**doublings or latent_size < 1:
            raise PerceptError(
                f"A basic encoder of size '{size}' makes latents whose side is a multiple of"
                f" {2**doublings}, not {latent_size}: choose the other size."
            )
        self.factor, self.side = factor, latent_size // 2**doublings
        channels = [16] * doublings + [latent_channels]
        linear = [nn.Linear(a, b) for a, b in pairwise([in_dim, *widths, 16 * self.side**2])]
        self.mlp = nn.Sequential(*(layer for each in linear for layer in (each, nn.GELU())))
        doubling = [
            nn.ConvTranspose2d(a, b, kernel_size=4, stride=2, padding=1)
            for a, b in pairwise(channels)
        ]
        self.upsampler = nn.Sequential(
            *(layer for each in doubling for layer in (each, nn.GELU()))
        )[:-1]

    def forward(self, x: Tensor) -> Tensor:
        """Voxels (batch, voxels) -> latent (batch, channels, h, w)."""
        x = self.mlp(_flat_voxels(x, self.mlp[0]))  # (batch, 16 * side * side)
        return self.factor * self.upsampler(x.view(len(x), 16, self.side, self.side))


# ---------------------------------------------------------------------------------------- baseline
ALPHAS = tuple(float(alpha) for alpha in np.logspace(1, 6, 11))


class RidgeBaseline(Network):
    """One linear map from voxels to targets of any shape, with a penalty a target chosen by
    cross-validation.

    Args:
        in_dim: number of voxels.
        target_shape: shape of the target of one image.

    The state dict holds weight (voxels, targets), bias (targets,) and alphas (targets,), the
    penalties that were chosen.
    """

    alphas: Tensor

    def __init__(self, in_dim: int, target_shape: Sequence[int]):
        super().__init__()
        self.target_shape = tuple(target_shape)
        size = math.prod(self.target_shape)
        self.weight = nn.Parameter(torch.zeros(in_dim, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("alphas", torch.zeros(size))

    def forward(self, voxels: Tensor) -> Tensor:
        """(batch, voxels), or (batch, trials, voxels), -> (batch, *target_shape)."""
        voxels = voxels.flatten(1)
        if voxels.shape[-1] != len(self.weight):
            raise PerceptError(
                f"The ridge baseline reads {len(self.weight)} voxels but was given"
                f" {voxels.shape[-1]}: use the subject that it was fitted on."
            )
        return (voxels @ self.weight + self.bias).view(len(voxels), *self.target_shape)

    @classmethod
    def fit(
        cls,
        voxels: np.ndarray,
        targets: np.ndarray,
        alphas: Sequence[float] = ALPHAS,
        cv: int = 5,
        groups: np.ndarray | None = None,
        seed: int = 0,
        backend: str = "auto",
        chunk: int = 4096,
    ) -> RidgeBaseline:
        """Fit on training images only.

        Args:
            voxels: (images, voxels), normalised.
            targets: (images, ...).
            alphas: candidate penalties.
            cv: folds within these images.
            groups: (images,) labels; rows of one group stay in one fold (image ids, when the rows
                are trials).
            seed: of the folds.
            backend: himalaya's "numpy", "torch" or "torch_cuda"; "auto": torch, on a GPU where
                there is one.
            chunk: targets solved at a time, which bounds the memory.

        Returns:
            The fitted module, its `alphas` (targets,) being the chosen penalties.

        Raises:
            PerceptError: if voxels and targets do not match, hold non-finite values, or are too few
                for the folds.

        Source: Hoerl & Kennard 1970; solved by himalaya (Dupré la Tour et al. 2022).
        """
        x, y = (
            np.asarray(voxels, np.float32),
            np.asarray(targets, np.float32).reshape(len(targets), -1),
        )  # (images, voxels), (images, targets)
        splits = _folds(x, y, cv, groups, seed)
        batches = {
            "n_targets_batch": chunk,
            "n_targets_batch_refit": chunk,
            "n_alphas_batch": 1,
            "warn": False,
        }  # as quick, with half the memory
        with _himalaya_backend(backend):
            solver = RidgeCV(
                alphas=np.asarray(alphas, np.float32),
                cv=splits,
                fit_intercept=True,
                solver_params=batches,
            )
            solver.fit(x, y)
            weight, bias, best = (
                torch.as_tensor(value).float().cpu()
                for value in (solver.coef_, solver.intercept_, solver.best_alphas_)
            )
        made = cls(x.shape[1], targets.shape[1:])
        made.load_state_dict({"weight": weight, "bias": bias, "alphas": best.expand(y.shape[1])})
        return made


def _folds(
    x: np.ndarray, y: np.ndarray, cv: int, groups: np.ndarray | None, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Shuffled folds over rows, or over groups of rows; x (rows, voxels) and y (rows, targets) are
    checked on the way.
    """
    if len(x) != len(y) or (groups is not None and len(groups) != len(x)):
        raise PerceptError(
            f"A ridge needs one row of voxels a target, but there are {len(x)} and {len(y)} (groups"
            " too must match): pass matching rows."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise PerceptError(
            "Voxels or targets for the ridge hold values that are not finite: clean or drop these"
            " rows first."
        )
    independent = len(x) if groups is None else len(np.unique(groups))
    if independent < cv:
        raise PerceptError(
            f"{independent} independent rows do not make {cv} folds: give more, or lower cv."
        )
    splitter = (
        KFold(cv, shuffle=True, random_state=seed)
        if groups is None
        else GroupKFold(cv, shuffle=True, random_state=seed)
    )
    return list(splitter.split(x, y, groups))


@contextmanager
def _himalaya_backend(name: str) -> Iterator[None]:
    """Set himalaya's global backend, and set the former one back."""
    if name == "auto":
        name = "torch_cuda" if torch.cuda.is_available() else "torch"
    before = get_backend().name
    try:
        set_backend(name)
        yield
    finally:
        set_backend(before)


# --------------------------------------------------------- tokens of one frozen model -> another's
class TokenMap(Network):
    """Image tokens of one frozen model as another model would give them: a linear map of the class
    token, and one that all patches share.

    The grid of patches is resampled (bilinear) to that of the other model. Fitted on images alone:
    no brain data are needed to say with BLIP what tokens of CLIP show, true or predicted ones.

    Args:
        shape_in: (tokens, dim) of the tokens that are given: the class token, then a square grid of
            patches row by row.
        shape_out: (tokens, dim) of those that are wanted.

    Raises:
        PerceptError: if the patches of either are no square.

    The state dict holds the two maps, `alphas` (class token, patches), the penalties that were
    chosen, and `r2`, the explained share of the variance on the images by which they were chosen.
    """

    alphas: Tensor
    r2: Tensor

    def __init__(self, shape_in: Sequence[int], shape_out: Sequence[int]):
        super().__init__()
        self.shape_in, self.shape_out = tuple(shape_in), tuple(shape_out)
        self.sides = tuple(math.isqrt(max(0, tokens - 1)) for tokens in (shape_in[0], shape_out[0]))
        for side, (tokens, _) in zip(self.sides, (self.shape_in, self.shape_out), strict=True):
            if side < 1 or side**2 + 1 != tokens:
                raise PerceptError(
                    f"{tokens} tokens are not a class token and a square grid of patches: give the"
                    " tokens of a vision transformer."
                )
        self.token, self.patch = (nn.Linear(shape_in[1], shape_out[1]) for _ in range(2))
        self.register_buffer("alphas", torch.zeros(2))
        self.register_buffer("r2", torch.zeros(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, dim) of the one model -> (batch, tokens, dim) of the other."""
        if tokens.shape[1:] != self.shape_in:
            raise PerceptError(
                f"The map reads tokens (batch, {', '.join(map(str, self.shape_in))}) but was given"
                f" {tuple(tokens.shape)}: use those it was fitted on."
            )
        token, patches = self._parts(tokens)
        return torch.cat([self.token(token), self.patch(patches)], dim=1)

    def _parts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens (batch, tokens, dim) the class token (batch, 1, dim), and the patches on the
        grid that is wanted (batch, patches, dim).
        """
        token, patches = tokens[:, :1], tokens[:, 1:]
        here, there = self.sides
        if here != there:
            grid = patches.transpose(1, 2).unflatten(2, (here, here))  # (batch, dim, h, w)
            patches = (
                F.interpolate(grid, (there, there), mode="bilinear").flatten(2).transpose(1, 2)
            )
        return token, patches

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        source: Any,
        target: Any,
        image_ids: Sequence[int] | np.ndarray | None = None,
        alphas: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        held_out: float = 0.1,
        seed: int = 0,
        batch_size: int = 64,
        device: str = "cpu",
    ) -> TokenMap:
        """Ridge regression in closed form, over all images and places; a block of images is in
        memory at a time.

        Args:
            source: tokens to map from, (images, tokens, dim), or an object whose `rows(image_ids)`
                gives them (`data.Targets`).
            target: tokens to map to, likewise.
            image_ids: (images,) training images, none of them twice; needed where `rows` gives the
                tokens.
            alphas: candidate penalties, in units of the mean variance of the tokens that are given.
            held_out: share of these images on which the penalty is chosen; then it is fitted on all
                of them.
            seed: of that choice.
            batch_size: images in a block.
            device: torch device.

        Returns:
            The fitted module.

        Raises:
            PerceptError: if there are too few images, or their tokens are no class token and square
                grid, or not finite.

        Source: Hoerl & Kennard 1970.
        """
        ids = np.arange(len(source)) if image_ids is None else np.asarray(image_ids)
        count = round(held_out * len(ids))
        if len(ids) < 10 or not 0 < count < len(ids):
            raise PerceptError(
                f"{len(ids)} images of which {count} are held out are too few to fit a map of"
                " tokens: give at least 10, and hold some of them out."
            )
        first, wanted = (_token_rows(tokens, ids[:1]) for tokens in (source, target))
        made = cls(first.shape[1:], wanted.shape[1:]).to(device)
        sums = [
            made._moments(source, target, np.array_split(part, math.ceil(len(part) / batch_size)))
            for part in np.split(np.random.default_rng(seed).permutation(ids), [count])
        ]
        for i, (linear, held, rest) in enumerate(zip((made.token, made.patch), *sums, strict=True)):
            scores = [held.r2(*rest.ridge(alpha)) for alpha in alphas]
            best = int(np.argmax(scores))
            weight, bias = (rest + held).ridge(alphas[best])
            linear.weight.copy_(weight.T)
            linear.bias.copy_(bias)
            made.alphas[i], made.r2[i] = alphas[best], scores[best]
        return made.cpu().eval()

    def _moments(
        self, source: Any, target: Any, blocks: Sequence[np.ndarray]
    ) -> tuple[_Moments, _Moments]:
        """Sums over blocks of images: of their class tokens, and of their patches."""
        of_token, of_patches = _Moments(), _Moments()
        for block in progress(blocks, "fitting the map of tokens"):
            x, y = (
                _token_rows(tokens, block).to(self.alphas.device) for tokens in (source, target)
            )
            if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
                raise PerceptError(
                    "The tokens to map from or to hold values that are not finite: make them again."
                )
            token, patches = self._parts(x)
            of_token.add(token.flatten(0, 1), y[:, :1].flatten(0, 1))
            of_patches.add(patches.flatten(0, 1), y[:, 1:].flatten(0, 1))
        return of_token, of_patches


def _token_rows(tokens: Any, image_ids: np.ndarray) -> Tensor:
    """Tokens (images, tokens, dim) of some images, from an array or from what gives rows by image."""
    return torch.as_tensor(
        np.asarray(tokens.rows(image_ids) if hasattr(tokens, "rows") else tokens[image_ids])
    ).float()


class _Moments:
    """Sums over rows from which a ridge regression is solved and scored: of 1, x, y, xx', xy' and
    y^2, in double precision.
    """

    def __init__(self, parts: Sequence[Any] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)):
        self.parts = list(parts)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (rows, dim_in) and y (rows, dim_out)."""
        new = (
            len(x),
            x.double().sum(0),
            y.double().sum(0),
            (x.T @ x).double(),
            (x.T @ y).double(),
            y.double().square().sum(),
        )
        self.parts = [old + more for old, more in zip(self.parts, new, strict=True)]

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments([a + b for a, b in zip(self.parts, other.parts, strict=True)])

    def ridge(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Weight (dim_in, dim_out) and bias (dim_out,), the penalty being in units of the mean
        variance of x.
        """
        n, x, y, xx, xy, _ = self.parts
        centred = xx / n - torch.outer(x, x) / n**2
        penalty = (
            alpha * centred.diagonal().mean() * torch.eye(len(x), dtype=x.dtype, device=x.device)
        )
        weight = torch.linalg.solve(centred + penalty, xy / n - torch.outer(x, y) / n**2)
        return weight, (y - x @ weight) / n

    def r2(self, weight: Tensor, bias: Tensor) -> float:
        """Share of the variance of y that a map explains."""
        n, x, y, xx, xy, yy = self.parts
        cross = (weight * xy).sum() + bias @ y
        square = (weight * (xx @ weight)).sum() + 2 * (x @ weight) @ bias + n * bias @ bias
        return float(1 - (yy - 2 * cross + square) / (yy - y @ y / n))


# ---------------------------------------------------------------------------------------- registry
MODELS: dict[str, type[Network]] = {
    cls.__name__: cls
    for cls in (
        BrainNetwork,
        VolumeEncoder,
        VersatileDiffusionPriorNetwork,
        DiffusionPriorNetwork,
        PriorNetwork,
        RidgeRegression,
        MixerBrainNetwork,
        ResidualBrainNetwork,
        CaptionConverter,
        Voxel2StableDiffusionModel,
        BasicEncoder,
        RidgeBaseline,
        TokenMap,
    )
}


def build(config: dict[str, Any]) -> Network:
    """Make a network from {"name": key of MODELS, "kwargs": arguments}, such as the `config` that
    every network keeps.

    Raises:
        PerceptError: for an unknown name or argument.
    """
    name = config.get("name", "")
    if name not in MODELS:
        raise PerceptError(f"No network is called '{name}': choose one of {', '.join(MODELS)}.")
    try:
        inspect.signature(MODELS[name]).bind(**config.get("kwargs", {}))
    except TypeError as error:
        raise PerceptError(
            f"{name} cannot be built from its config: {error}; correct the kwargs."
        ) from error
    return MODELS[name](**config.get("kwargs", {}))


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def published_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict under today's keys; the values are untouched, and nothing else is
    forgiven.

    - the attention of an autoencoder's middle block was called query, key, value, proj_attn before
      diffusers 0.15;
    - weights saved under data parallelism carry the prefix "module.";
    - the scalar `temp` of early voxel2clip networks was never used, and is dropped.
    """
    renamed = {}
    for key, value in state.items():
        key = re.sub(
            r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.",
            lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.",
            key.removeprefix("module."),
        )
        if key not in ("temp", "voxel2clip.temp"):
            renamed[key] = value
    return renamed

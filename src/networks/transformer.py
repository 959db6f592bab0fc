"""Parts of the prior's transformers: attention, norms, positions, time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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

    def assign_buckets(self, distance: Tensor) -> Tensor:
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
        return self.relative_attention_bias(self.assign_buckets(distance)).permute(2, 0, 1)


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
    def cache_positions(self) -> Iterator[None]:
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


class TimeMLP(nn.Module):
    """Two SiLU layers of twice the width, then a linear one, under the published keys."""

    def __init__(self, dim: int):
        super().__init__()
        layer = lambda a, b: nn.Sequential(nn.Linear(a, b), nn.SiLU())  # noqa: E731
        self.net = nn.Sequential(
            layer(dim, 2 * dim), layer(2 * dim, 2 * dim), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(next(self.parameters()).dtype))

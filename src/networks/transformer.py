"""Parts of the prior's transformers: attention, norms, positions, time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RotaryTable = tuple[Tensor, Tensor]  # cosine and sine (n, width) of the rotary embedding


class GainNorm(nn.Module):
    """LayerNorm with a gain and no bias; `stable` first divides by the signed maximum.

    eps is 1e-5 in single, 1e-3 in lower precision. Training takes the fused kernel. Without
    gradient the operations stand in the published order, so that samples are the published ones to
    the bit: sampling applies the network to its own output, step after step, and turns one unit of
    rounding into 3e-4.
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
        centred = x - x.mean(-1, keepdim=True)
        inverse_std = (x.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
        return centred * inverse_std * self.g


class Rotary(nn.Module):
    """Rotary position embedding of interleaved pairs (Su et al. 2021).

    It acts on the first `dim` features.
    """

    def __init__(self, dim: int):
        super().__init__()
        freqs = 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def compute_table(self, n: int) -> RotaryTable:
        """Cosine and sine (n, dim) of all positions, each frequency twice."""
        freqs = self.freqs
        positions = torch.arange(n, device=freqs.device, dtype=freqs.dtype)
        angle = (positions[:, None] * freqs).repeat_interleave(2, -1)
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(x: Tensor, table: RotaryTable) -> Tensor:
        """x (..., n, features), its first pairs rotated by an angle that grows with position."""
        cos, sin = table
        width = cos.shape[-1]
        pairs, rest = x[..., :width], x[..., width:]
        first, second = pairs[..., ::2], pairs[..., 1::2]
        partners = torch.stack((-second, first), -1).flatten(-2)  # (a, b) -> (-b, a)
        rotated = pairs * cos + partners * sin
        if not rest.shape[-1]:
            return rotated
        return torch.cat((rotated, rest), -1)


class RelativePositionBias(nn.Module):
    """One bias for each head and distance bucket, shared by all layers.

    Column 0 is the null key, so real key m is column m + 1.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.buckets = buckets
        self.max_distance = max_distance
        self.relative_attention_bias = nn.Embedding(buckets, heads)

    def assign_buckets(self, distance: Tensor) -> Tensor:
        """Bucket of each distance: exact up to half the buckets, then logarithmic.

        The future counts as distance 0.
        """
        distance = distance.clamp(min=0)
        exact = self.buckets // 2
        log_distance = torch.log(distance.clamp(min=1).float() / exact)
        ratio = log_distance / math.log(self.max_distance / exact)
        large = exact + (ratio * (self.buckets - exact)).long()
        return torch.where(distance < exact, distance, large.clamp(max=self.buckets - 1))

    def forward(self, n: int) -> Tensor:
        """Bias (heads, n, n + 1)."""
        device = self.relative_attention_bias.weight.device
        queries = torch.arange(n, device=device)[:, None]
        keys = torch.arange(n + 1, device=device)[None, :]
        distance = queries - keys
        return self.relative_attention_bias(self.assign_buckets(distance)).permute(2, 0, 1)


class Attention(nn.Module):
    """Multi-query attention with rotary positions, and a learned null key and value.

    Queries and keys are L2-normalised, so that the logits are 16 * cosine.
    """

    def __init__(self, dim: int, dim_head: int, heads: int, rotary_emb: Rotary):
        super().__init__()
        self.heads = heads
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.norm = GainNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.rotary_emb = rotary_emb
        to_dim = nn.Linear(heads * dim_head, dim, bias=False)
        self.to_out = nn.Sequential(to_dim, GainNorm(dim))

    def forward(
        self, x: Tensor, bias: Tensor, table: RotaryTable, last: int | None = None
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
        rows = last or n
        x = self.norm(x)
        q = self.to_q(x[:, -rows:])
        q = q.view(batch, rows, self.heads, -1).transpose(1, 2)  # (batch, heads, rows, dim_head)
        # one head of keys and values for all queries, (batch, n, dim_head) each
        k, v = self.to_kv(x).chunk(2, -1)
        cos, sin = table
        q = Rotary.rotate(q, (cos[-rows:], sin[-rows:]))
        k = Rotary.rotate(k, table)
        null_k, null_v = self.null_kv.to(k.dtype)
        k = torch.cat((null_k.expand(batch, 1, -1), k), 1)  # (batch, n + 1, dim_head)
        v = torch.cat((null_v.expand(batch, 1, -1), v), 1)
        q = F.normalize(q, dim=-1).to(v.dtype)
        k = F.normalize(k, dim=-1).to(v.dtype)
        # the order of operations decides over the last digits, which no GPU shares with another
        is_fused = torch.is_grad_enabled() or q.device.type == "cuda"
        attend = _attend_fused if is_fused else _attend
        bias = bias[:, -rows:].to(v.dtype)
        heads = attend(q, k, v, bias)
        return self.to_out(heads.transpose(1, 2).reshape(batch, rows, -1))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Multi-query attention in the published order of operations (see GainNorm).

    q (batch, heads, rows, dim_head), k and v (batch, columns, dim_head), bias (heads, rows,
    columns) -> (batch, heads, rows, dim_head).
    """
    logits = torch.einsum("bhid,bjd->bhij", 4 * q, 4 * k) + bias
    precision = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.softmax(-1, dtype=precision).to(v.dtype)
    return torch.einsum("bhij,bjd->bhid", weights, v)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`_attend` in one kernel that stores no logits.

    As there is one head of keys, the heads are laid along the query axis, without copies. On a GPU
    heads are filled up with zeros to a width that kernels take in half precision (52 to 56), which
    changes no result: else the logits would be stored. On the CPU no kernel takes a bias that is
    learnt, and they are.
    """
    batch, heads, rows, width = q.shape
    missing = -width % 8 if q.device.type == "cuda" else 0
    if missing:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    queries = q.reshape(batch, 1, heads * rows, width + missing)
    mask = bias.reshape(1, 1, heads * rows, -1)
    attended = F.scaled_dot_product_attention(
        queries, k[:, None], v[:, None], attn_mask=mask, scale=16.0
    )
    return attended.view(q.shape)[..., :width]


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
    """Attention and feed-forward block, each with its residual.

    It is a list because the published keys are layers.L.0 and layers.L.1.
    """

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding, which all layers share."""
        return cast(Attention, self[0]).rotary_emb

    def forward(
        self, x: Tensor, bias: Tensor, table: RotaryTable, last: int | None = None
    ) -> Tensor:
        """As `Attention.forward`."""
        attention, feed_forward = self
        residual = x[:, -last:] if last else x
        x = attention(x, bias, table, last) + residual
        return feed_forward(x) + x


class CausalTransformer(nn.Module):
    """The prior's transformer, causal or not.

    Attention and SwiGLU blocks with residuals, then a stable norm and a projection.

    Args:
        dim: dim of a token.
        depth: layers.
        dim_head: width of a head.
        heads: heads.
        causal: causal attention.
        normformer: a further norm inside the feed-forward blocks.

    Attributes:
        checkpointing: compute activations again on the way back instead of storing them: less
            memory, a third more time.
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
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = Attention(dim, dim_head, heads, rotary)
            feed_forward = _feed_forward(dim, normformer=normformer)
            self.layers.append(_Layer([attention, feed_forward]))
        self.norm = GainNorm(dim, stable=True)
        self.project_out = nn.Linear(dim, dim, bias=False)
        self.checkpointing = False
        self._caching = False
        self._positions: dict[int, tuple[Tensor, RotaryTable]] = {}  # by length

    @contextmanager
    def cache_positions(self) -> Iterator[None]:
        """Context in which bias and rotary table are computed once: the steps of sampling.

        The weights must not change within it.
        """
        self._caching = True
        try:
            yield
        finally:
            self._caching = False
            self._positions = {}

    def _compute_positions(self, n: int) -> tuple[Tensor, RotaryTable]:
        """Bias (heads, n, n + 1), with the causal mask in it, and rotary table."""
        if n in self._positions:
            return self._positions[n]
        bias = self.rel_pos_bias(n)
        table = cast(_Layer, self.layers[0]).rotary.compute_table(n)
        if self.causal:
            everywhere = torch.ones(n, n + 1, dtype=torch.bool, device=bias.device)
            bias = bias.masked_fill(everywhere.triu(2), -torch.finfo(bias.dtype).max)
        if self._caching:
            self._positions[n] = bias, table
        return bias, table

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """(batch, n, dim) -> (batch, n, dim), or only the `last` positions.

        The last layer then computes nothing for the others.
        """
        bias, table = self._compute_positions(x.shape[1])
        *inner, final = self.layers
        for layer in inner:
            x = self._run_layer(layer, x, bias, table)
        x = self._run_layer(final, x, bias, table, last)
        return self.project_out(self.norm(x))

    def _run_layer(self, layer: nn.Module, x: Tensor, *context: Any) -> Tensor:
        """One layer, whose activations are stored unless `checkpointing` is set."""
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, x, *context, use_reentrant=False))
        return layer(x, *context)


class SinusoidalTime(nn.Module):
    """Sine and cosine of a timestep (batch,) -> (batch, dim), sines first."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """(batch,) -> (batch, dim)."""
        half = self.dim // 2
        steps = torch.arange(half, device=t.device)
        freqs = torch.exp(steps * (-math.log(10000) / (half - 1)))
        angle = t.float()[:, None] * freqs
        return torch.cat((angle.sin(), angle.cos()), -1)


class TimeMLP(nn.Module):
    """Two SiLU layers of twice the width, then a linear one, under the published keys."""

    def __init__(self, dim: int):
        super().__init__()
        enter = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU())
        inner = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.SiLU())
        self.net = nn.Sequential(enter, inner, nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), in the precision of the weights."""
        return self.net(x.to(next(self.parameters()).dtype))

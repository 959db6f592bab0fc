"""Percept's own decoder: voxels to the principal components of tokens and latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from src.networks.base import Network, flatten_voxels
from src.utils import PerceptError

# The linear path learns at a tenth of the rate: under Adam, whose steps do not depend on the size
# of a gradient, a map that is multiplied by .1 moves a tenth as far.
SKIP_SCALE = 0.1

LATENT_SHARE = 0.5  # variance of all latent components together, of that of the token components


class _ResidualBlock(nn.Module):
    """x + MLP(x), of one layer."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.layer = _make_layer(width, width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.layer(x)
        return x + residual


def _make_layer(n_inputs: int, n_outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_inputs, n_outputs), nn.LayerNorm(n_outputs), nn.GELU(), nn.Dropout(dropout)
    )


class PerceptDecoder(Network):
    """A plain MLP from voxels to components of tokens and of latents, and the way back to both.

    What it is trained to by squared error is the posterior mean of the components. The last layer
    and a linear path beside the MLP begin at zero. The bases of the components are buffers, so that
    a checkpoint predicts tokens and latents by itself: `set_bases` fills them.

    Args:
        in_dim: number of voxels.
        token_shape: (tokens, dim).
        token_components: components of the tokens, from which they are put together.
        latent_shape: (channels, height, width) of a latent; () for a decoder of tokens alone.
        latent_components: components of the latents.
        h: width of the hidden layers.
        n_blocks: residual blocks.
        dropout: probability.
    """

    token_mean: Tensor
    token_basis: Tensor
    token_variance: Tensor
    latent_mean: Tensor
    latent_basis: Tensor
    latent_weight: Tensor

    def __init__(
        self,
        in_dim: int,
        token_shape: Sequence[int],
        token_components: int = 400,
        latent_shape: Sequence[int] = (),
        latent_components: int = 0,
        h: int = 1024,
        n_blocks: int = 2,
        dropout: float = 0.1,
    ):
        super().__init__()
        if bool(latent_components) != bool(latent_shape):
            raise PerceptError(
                f"{latent_components} components of latents of shape {tuple(latent_shape)} were"
                " asked for: give both, or neither for a decoder of tokens alone."
            )
        self.token_shape, self.latent_shape = tuple(token_shape), tuple(latent_shape)
        self.token_components, self.latent_components = token_components, latent_components
        self.input = _make_layer(in_dim, h, dropout)
        self.blocks = nn.ModuleList(_ResidualBlock(h, dropout) for _ in range(n_blocks))
        self.head = nn.Linear(h, self.n_outputs)
        self.skip = nn.Linear(in_dim, self.n_outputs, bias=False)
        for parameter in (self.head.weight, self.head.bias, self.skip.weight):
            nn.init.zeros_(parameter)
        n_tokens = math.prod(self.token_shape)
        n_latents = math.prod(self.latent_shape) if self.latent_shape else 0
        self.register_buffer("token_mean", torch.zeros(n_tokens))
        self.register_buffer("token_basis", torch.zeros(token_components, n_tokens))
        self.register_buffer("token_variance", torch.ones(()))
        self.register_buffer("latent_mean", torch.zeros(n_latents))
        self.register_buffer("latent_basis", torch.zeros(latent_components, n_latents))
        self.register_buffer("latent_weight", torch.ones(()))

    @property
    def n_outputs(self) -> int:
        """Components of tokens and latents together."""
        return self.token_components + self.latent_components

    @torch.no_grad()
    def set_bases(
        self,
        tokens: tuple[Tensor, Tensor, Tensor],
        latents: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Take over what components mean.

        Args:
            tokens: mean (numbers,), components (components, numbers) and their variances
                (components,).
            latents: likewise; their components are given half of the variance of the tokens'.

        Raises:
            PerceptError: if there are others than the decoder has outputs for.
        """
        mean, components, variances = tokens
        self._check_basis("token", components, self.token_basis)
        self.token_mean.copy_(mean)
        self.token_basis.copy_(components)
        self.token_variance.fill_(float(variances.sum()))
        if latents is None:
            return
        mean, components, variances = latents
        self._check_basis("latent", components, self.latent_basis)
        self.latent_mean.copy_(mean)
        self.latent_basis.copy_(components)
        share = LATENT_SHARE * float(self.token_variance) / float(variances.sum())
        self.latent_weight.fill_(math.sqrt(share))

    def _check_basis(self, name: str, components: Tensor, buffer: Tensor) -> None:
        if components.shape != buffer.shape:
            raise PerceptError(
                f"The decoder has room for {tuple(buffer.shape)} {name} components and was given"
                f" {tuple(components.shape)}: build it for those."
            )

    def forward(self, voxels: Tensor) -> Tensor:
        """(batch, voxels), or (batch, trials, voxels), -> components (batch, outputs)."""
        voxels = flatten_voxels(voxels, self.skip)
        x = self.input(voxels)
        for block in self.blocks:
            x = block(x)
        components: Tensor = self.head(x) + SKIP_SCALE * self.skip(voxels)
        return components

    def encode_targets(self, tokens: Tensor, latents: Tensor | None = None) -> Tensor:
        """Components (batch, outputs) of tokens (batch, ...) and latents (batch, ...)."""
        parts = [(tokens.flatten(1) - self.token_mean) @ self.token_basis.T]
        if latents is not None and self.latent_components:
            centred = latents.flatten(1) - self.latent_mean
            parts.append(self.latent_weight * (centred @ self.latent_basis.T))
        return torch.cat(parts, 1)

    def compute_loss(self, components: Tensor, target: Tensor) -> Tensor:
        """Squared error of components (batch, outputs), summed over them, in units of the variance
        of the tokens' components.
        """
        return (components - target).square().sum(1).mean() / self.token_variance

    def decode_tokens(self, components: Tensor) -> Tensor:
        """Components (batch, outputs) -> tokens (batch, tokens, dim)."""
        flat = self.token_mean + components[:, : self.token_components] @ self.token_basis
        return flat.view(len(flat), *self.token_shape)

    def decode_latents(self, components: Tensor) -> Tensor:
        """Components (batch, outputs) -> latents (batch, channels, height, width).

        Raises:
            PerceptError: for a decoder of tokens alone.
        """
        if not self.latent_components:
            raise PerceptError(
                "This decoder predicts tokens alone: train it with latent_components, or take the"
                " latents of another run (autoencoder_name)."
            )
        weighted = components[:, self.token_components :] / self.latent_weight
        flat = self.latent_mean + weighted @ self.latent_basis
        return flat.view(len(flat), *self.latent_shape)

    def predict_tokens(self, voxels: Tensor) -> Tensor:
        """(batch, voxels) -> tokens (batch, tokens, dim), the posterior mean."""
        return self.decode_tokens(self(voxels))

    def predict_latents(self, voxels: Tensor) -> Tensor:
        """(batch, voxels) -> latents (batch, channels, height, width), the posterior mean."""
        return self.decode_latents(self(voxels))

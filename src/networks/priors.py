"""Denoising networks of the diffusion prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.networks.base import Network
from src.networks.transformer import CausalTransformer, SinusoidalTime, TimeMLP
from src.utils import PerceptError


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

    def cache_positions(self) -> Any:
        """Context in which what only depends on positions and weights is computed once."""
        return self.causal_transformer.cache_positions()


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
        self.to_time_embeds = nn.Sequential(nn.Sequential(SinusoidalTime(dim), TimeMLP(dim)))
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

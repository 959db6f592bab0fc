"""Denoising networks of the diffusion prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from src.networks.base import Network
from src.networks.transformer import CausalTransformer, SinusoidalTime, TimeMLP
from src.utils import PerceptError


def _draw_keep_mask(batch: int, drop_prob: float | Tensor, device: torch.device) -> Tensor:
    """Which samples keep a condition, Boolean (batch, 1, 1).

    No random number is drawn for the probabilities 0 and 1, as published, nor where `drop_prob`
    says already which samples (batch,) lose it.
    """
    if isinstance(drop_prob, Tensor):
        keep = ~drop_prob
    elif drop_prob in (0.0, 1.0):
        keep = torch.full((batch,), drop_prob == 0.0, device=device)
    else:
        keep = torch.rand(batch, device=device) < 1 - drop_prob
    return keep[:, None, None]


class Denoiser(Network):
    """Base class of the prior networks, with what `src.prior` needs for sampling."""

    causal_transformer: CausalTransformer

    def forward_with_cond_scale(self, *args: Any, cond_scale: float = 1.0, **kwargs: Any) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022).

        Unless the scale is 1, it takes a second pass with both conditions dropped.
        """
        conditional = self(*args, **kwargs)
        if cond_scale == 1.0:
            return conditional
        null = self(*args, **kwargs, brain_cond_drop_prob=1.0, image_cond_drop_prob=1.0)
        return null + (conditional - null) * cond_scale

    def cache_positions(self) -> Any:
        """Context in which the transformer's position biases are computed once."""
        return self.causal_transformer.cache_positions()


class VersatileDiffusionPriorNetwork(Denoiser):
    """Prior network for all CLIP tokens (257 x 768).

    It reads [brain tokens, time, noisy image tokens] and predicts the image tokens.

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
        length = lengths[learned_query_mode]
        if length:
            self.learned_query = nn.Parameter(torch.randn(length, dim) * dim**-0.5)
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
            brain_cond_drop_prob: probability, for each sample, of replacing the condition by the
                learned null tokens; or which samples to do so for, Boolean (batch,).
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
        batch = len(image_embed)
        image = self._as_tokens("image_embed", image_embed, batch)  # (batch, tokens, dim)
        brain = self._as_tokens("brain_embed", brain_embed, batch)
        keep_brain = _draw_keep_mask(batch, brain_cond_drop_prob, image.device)
        keep_image = _draw_keep_mask(batch, image_cond_drop_prob, image.device)
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

    def _as_tokens(self, name: str, embed: Tensor, batch: int) -> Tensor:
        """An input in the shape (batch, tokens, dim), refused where it is not as many numbers."""
        tokens, dim = self.null_image_embed.shape
        if embed.shape[0] != batch or embed[0].numel() != tokens * dim:
            raise PerceptError(
                f"The prior network needs {name} of shape ({batch}, {tokens}, {dim}), not"
                f" {tuple(embed.shape)}."
            )
        return embed.reshape(batch, -1, dim)


class PriorNetwork(VersatileDiffusionPriorNetwork):
    """MindEye2's prior network: MindEye's at other sizes.

    Args:
        dim: dim of a token.
        depth: layers.
        dim_head: width of a head.
        heads: heads; 0: dim // dim_head, as published (14 for 768, whose inner width then is 728).
        num_tokens: tokens an image.
        causal: causal attention.
        learned_query_mode: as `VersatileDiffusionPriorNetwork`.

    Raises:
        PerceptError: where no head fits.

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
        heads = heads or dim // dim_head
        if heads < 1:
            raise PerceptError(
                f"A head of the prior is {dim_head} wide, which is more than the {dim} of a token:"
                f" choose prior_dim_head at most {dim}, or prior_heads at least 1."
            )
        super().__init__(dim, depth, dim_head, heads, num_tokens, causal, learned_query_mode)


class DiffusionPriorNetwork(Denoiser):
    """Prior network for one CLIP embedding (1 x 768), as LAION's text -> image prior.

    It reads [text slots, condition, time, noisy image, query] and predicts the image embedding.

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
        """Denoise embeddings.

        Args:
            image_embed: noisy embeddings (batch, dim) or (batch, 1, dim).
            timesteps: (batch,).
            text_embed: condition, same shape.
            brain_cond_drop_prob: as `VersatileDiffusionPriorNetwork.forward`.
            image_cond_drop_prob: as there.

        Returns:
            The shape of image_embed.
        """
        batch, dim = len(image_embed), self.learned_query.shape[0]
        image = image_embed.reshape(batch, 1, dim)
        text = text_embed.reshape(batch, 1, dim)
        keep_text = _draw_keep_mask(batch, brain_cond_drop_prob, image.device)
        keep_image = _draw_keep_mask(batch, image_cond_drop_prob, image.device)
        text = torch.where(keep_text, text, self.null_text_embeds)
        image = torch.where(keep_image, image, self.null_image_embed[None])
        time = self.to_time_embeds(timesteps)[:, None]  # (batch, 1, dim)
        slots = self.null_text_encodings.expand(batch, -1, -1)
        query = self.learned_query.expand(batch, 1, -1)
        tokens = torch.cat((slots, text, time, image, query), 1)  # (batch, max_text_len + 4, dim)
        return self.causal_transformer(tokens, last=1).view(image_embed.shape)

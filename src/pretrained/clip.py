"""Frozen CLIP image and text encoders."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from src.pretrained.base import (
    FrozenModel,
    load_pretrained,
    locate_model,
    normalise_for_clip,
    tokenize_captions,
)
from src.utils import PerceptError

CLIP_VARIANTS = {
    "ViT-L/14": "clip",
    "ViT-B/32": "clip-ViT-B-32",
    "RN50": "RN50",
    "RN50x64": "RN50x64",
}  # the ResNets through OpenAI's own package

PATCH_VARIANTS = {
    "bigG": "clip-bigG",
    "ViT-L/14": "clip",
    "ViT-B/32": "clip-ViT-B-32",
}  # of which MindEye2 takes the patches


class _ResNetClip(nn.Module):
    """A CLIP of OpenAI's own package: the convolutional variants, which transformers does not have.

    Args:
        variant: "RN50" or "RN50x64".
        weights: "hub" (downloaded and checked by the package) or a folder with <variant>.pt, as
            OpenAI gives it or a plain state dict.
    """

    def __init__(self, variant: str, weights: str):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package minds the age of its own imports
            import clip

        self.place = variant if weights == "hub" else str(Path(weights) / f"{variant}.pt")
        if weights != "hub" and not Path(self.place).is_file():
            raise PerceptError(
                f"There is no {self.place}: put OpenAI's file there, or set weights to 'hub'."
            )
        try:
            model, _ = clip.load(self.place, device="cpu", jit=False)
        except (OSError, RuntimeError, KeyError) as error:
            raise PerceptError(
                f"CLIP {variant} could not be loaded from '{self.place}':"
                f" {str(error).splitlines()[0]} Check connection or file."
            ) from error
        self.model, self.tokenize = model.float(), clip.tokenize
        self.size, self.dim = (
            self.model.visual.input_resolution,
            self.model.text_projection.shape[1],
        )

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, size, size) -> (batch, dim)."""
        return self.model.encode_image(pixel_values)

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (batch, dim)."""
        return self.model.encode_text(
            self.tokenize(list(captions), truncate=True).to(self.model.logit_scale.device)
        )


class _VisionClip(nn.Module):
    """A CLIP with a vision transformer, of transformers; the text half is loaded when it is first
    needed.
    """

    def __init__(self, place: str):
        super().__init__()
        self.place, self.model = place, load_pretrained(CLIPVisionModelWithProjection, place).float()
        self.config = self.model.config
        self.size, self.dim = self.config.image_size, self.config.projection_dim
        self._text: tuple[Any, Any] | None = None

    def embed_tokens(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, size, size) -> projected tokens of the last layer (batch,
        tokens, dim), CLS first.
        """
        vision = self.model.vision_model
        last = vision(pixel_values=pixel_values).last_hidden_state  # (batch, tokens, width)
        return self.model.visual_projection(vision.post_layernorm(last))

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, size, size) -> patches of the last layer, not projected
        (batch, patches, width).
        """
        vision = self.model.vision_model
        return vision.post_layernorm(vision(pixel_values=pixel_values).last_hidden_state)[:, 1:]

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, size, size) -> (batch, dim)."""
        vision = self.model.vision_model
        return self.model.visual_projection(
            vision.post_layernorm(vision(pixel_values=pixel_values).last_hidden_state[:, 0])
        )

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (batch, dim)."""
        if self._text is None:
            model = (
                load_pretrained(CLIPTextModelWithProjection, self.place)
                .float()
                .eval()
                .requires_grad_(False)
                .to(self.model.device)
            )
            self._text = load_pretrained(CLIPTokenizer, self.place), model
        tokenizer, model = self._text
        return model(input_ids=tokenize_captions(tokenizer, captions, model)).text_embeds


class Clipper(FrozenModel):
    """CLIP as these systems use it.

    Args:
        weights: "hub", "mini" or a folder, which holds `clip/`, `clip-ViT-B-32/`, `RN50.pt` or
            `RN50x64.pt`.
        hidden: all projected tokens of the last layer (batch, tokens, dim), as Versatile Diffusion
            reads them, else the final embedding (batch, dim).
        norm_embs: divide by the L2 norm of the CLS token (hidden) or of the embedding.
        device: torch device.
        variant: key of CLIP_VARIANTS; the ResNets have no hidden tokens, and of the miniature there
            is one only.
        clamp_embs: limit the embedding to [-1.5, 1.5] before it is normalised, as the early systems
            could.

    Raises:
        PerceptError: for an unknown variant, one that cannot be had, or missing files.

    Source: MindEye (arXiv 2305.18274), section 2; specs of Versatile Diffusion's image encoder.
    """

    def __init__(
        self,
        weights: str = "hub",
        hidden: bool = True,
        norm_embs: bool = True,
        device: str = "cpu",
        variant: str = "ViT-L/14",
        clamp_embs: bool = False,
    ):
        if variant not in CLIP_VARIANTS:
            raise PerceptError(
                f"There is no CLIP variant '{variant}': choose one of {', '.join(CLIP_VARIANTS)}."
            )
        resnet = variant.startswith("RN")
        if resnet and hidden:
            raise PerceptError(
                f"CLIP {variant} is a ResNet without hidden tokens: set hidden to False, or choose"
                " a ViT."
            )
        if weights == "mini" and variant != "ViT-L/14":
            raise PerceptError(
                f"The mini world has one miniature of CLIP and none of {variant}: leave"
                " clip_variant at ViT-L/14, or use real weights."
            )
        self.name, self.weights, self.device, self.variant = (
            CLIP_VARIANTS[variant],
            weights,
            torch.device(device),
            variant,
        )
        self.hidden, self.norm_embs, self.clamp_embs = hidden, norm_embs, clamp_embs
        network = (
            _ResNetClip(variant, weights) if resnet else _VisionClip(locate_model(self.name, weights))
        )
        self.model: Any = network.eval().requires_grad_(False).to(self.device)
        self.place, self.config = network.place, getattr(network, "config", None)
        self.size, self.dim = network.size, network.dim
        self.n_tokens = (
            (self.size // self.config.patch_size) ** 2 + 1
            if hidden and self.config is not None
            else 1
        )

    def _options(self) -> dict[str, Any]:
        more = {"variant": self.variant} if self.variant != "ViT-L/14" else {}
        return (
            {"hidden": self.hidden, "norm_embs": self.norm_embs}
            | more
            | ({"clamp_embs": True} if self.clamp_embs else {})
        )

    @property
    def target_shape(self) -> tuple[int, ...]:
        """(tokens, dim) or (dim,)."""
        return (self.n_tokens, self.dim) if self.hidden else (self.dim,)

    def _encode(self, images: Tensor) -> Tensor:
        return self.embed_image(images)

    def preprocess(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> pixel values (batch, 3, size, size): bicubic
        without antialiasing, as published, centre crop.
        """
        batch, _, height, width = images.shape
        if (height, width) != (self.size, self.size):
            scale = self.size / min(height, width)
            target = (round(height * scale), round(width * scale))
            images = F.interpolate(images, target, mode="bicubic", antialias=False)
            top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
            images = images[..., top : top + self.size, left : left + self.size]
        return normalise_for_clip(images)

    @torch.no_grad()
    def embed_image(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, tokens, dim) if hidden, else (batch, dim)."""
        x = self.preprocess(images.to(self.device))
        embeds = (
            self.model.embed_tokens(x) if self.hidden else self.model.embed_image(x)[:, None]
        )  # (batch, tokens, dim)
        if self.clamp_embs:
            embeds = embeds.clamp(-1.5, 1.5)
        if self.norm_embs:
            embeds = embeds / embeds[:, :1].norm(dim=-1, keepdim=True)
        return embeds if self.hidden else embeds[:, 0]

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> final text embeddings (batch, dim), L2-normalised if norm_embs."""
        embeds = self.model.embed_text(captions)
        return F.normalize(embeds, dim=-1) if self.norm_embs else embeds


class PatchClip(FrozenModel):
    """CLIP's patch tokens as MindEye2 predicts them: the last layer's, normalised, without the
    class token and not projected.

    Args:
        weights: "hub", "mini" or a folder that holds `clip-bigG/`, `clip/` or `clip-ViT-B-32/`.
        variant: key of PATCH_VARIANTS: "bigG" (256 x 1664, what the unCLIP decoder reads) or
            "ViT-B/32" (49 x 768, low compute). The miniature has one CLIP (16 x 128), which stands
            for each of them.
        device: torch device.
        squeezed: the published defect: pictures in [0, 1] were treated as if they lay in [-1, 1],
            so that CLIP saw them in [.5, 1]. Released networks predict the tokens of such pictures.
        patches: patch tokens that are kept, a square number; 0: all. Fewer are the means of
            neighbouring patches.

    Raises:
        PerceptError: for an unknown variant, patches that form no such square, or missing files.

    Source: MindEye2 (arXiv 2403.11207), section 2.2; its embedder resizes bicubically with
    antialiasing, without a crop.
    """

    def __init__(
        self,
        weights: str = "hub",
        variant: str = "bigG",
        device: str = "cpu",
        squeezed: bool = False,
        patches: int = 0,
    ):
        if variant not in PATCH_VARIANTS:
            raise PerceptError(
                f"There are no patch tokens of a CLIP '{variant}': choose one of"
                f" {', '.join(PATCH_VARIANTS)}."
            )
        super().__init__("clip" if weights == "mini" else PATCH_VARIANTS[variant], weights, device)
        self.variant, self.squeezed = variant, squeezed
        self.model: Any = _VisionClip(self.place).eval().requires_grad_(False).to(self.device)
        self.config, self.size, self.dim = (
            self.model.config,
            self.model.size,
            self.model.config.hidden_size,
        )
        self.side = self.size // self.config.patch_size
        self.kept = math.isqrt(patches) if patches else self.side
        if self.kept**2 != (patches or self.side**2) or self.side % self.kept:
            raise PerceptError(
                f"{patches} tokens cannot be made of CLIP's {self.side} x {self.side} patches: give"
                f" the square of a divisor of {self.side}, or 0 for all."
            )

    def _options(self) -> dict[str, Any]:
        more = {"patches": self.kept**2} if self.kept < self.side else {}
        return (
            {"patch_tokens": True, "variant": self.variant}
            | more
            | ({"squeezed": True} if self.squeezed else {})
        )

    @property
    def target_shape(self) -> tuple[int, int]:
        """(tokens, dim)."""
        return self.kept**2, self.dim

    def _encode(self, images: Tensor) -> Tensor:
        return self.embed_image(images)

    @torch.no_grad()
    def embed_image(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, tokens, dim)."""
        x = images.to(self.device)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        tokens = self.model.embed_patches(normalise_for_clip((x + 1) / 2 if self.squeezed else x))
        if self.kept == self.side:
            return tokens
        grid = tokens.mT.unflatten(2, (self.side, self.side))  # (batch, dim, h, w)
        return F.adaptive_avg_pool2d(grid, self.kept).flatten(2).mT

"""Frozen CLIP image and text encoders."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.files.foreign import shorten
from src.pretrained.base import (
    LOAD_ERRORS,
    FrozenModel,
    crop_center,
    explain_loading,
    freeze,
    load_frozen,
    locate_model,
    normalise_for_clip,
    prefer_cache,
    tokenize_captions,
)
from src.pretrained.clip_variants import CLIP_VARIANTS, PATCH_VARIANTS
from src.safe_pickle import is_torchscript, load_plain_torch_file
from src.utils import PerceptError, check_weights

# keys of the part of a CLIP's file that is not loaded
TEXT_KEYS = r"(?:text_model|text_projection)\..*|logit_scale"
VISION_KEYS = r"(?:vision_model|visual_projection)\..*|logit_scale"


class _ResNetClip(nn.Module):
    """A CLIP of OpenAI's own package: the convolutional variants, which transformers does not have.

    Args:
        variant: "RN50" or "RN50x64".
        weights: "hub" (downloaded and checked by the package) or a folder with <variant>.pt, as
            OpenAI gives it or a plain state dict.

    Raises:
        PerceptError: if the file is missing or cannot be loaded.
    """

    def __init__(self, variant: str, weights: str):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package imports what is deprecated
            import clip

        self.location = variant
        if weights != "hub":
            self.location = str(Path(weights) / f"{variant}.pt")
            if not Path(self.location).is_file():
                raise PerceptError(
                    f"There is no {self.location}: put OpenAI's file there, or set weights to"
                    " 'hub'."
                )
        model: Any = self._load_file(variant) if weights != "hub" else self._download(variant)
        self.model = model.float()
        self.tokenize = clip.tokenize
        self.size = self.model.visual.input_resolution
        self.dim = self.model.text_projection.shape[1]

    def _download(self, variant: str) -> nn.Module:
        """OpenAI's network from its cache or server; the package compares its checksum."""
        import clip

        try:
            return clip.load(variant, device="cpu", jit=False)[0]
        except LOAD_ERRORS as error:
            raise PerceptError(
                f"CLIP {variant} could not be loaded from OpenAI's server ({shorten(error)}): check"
                " the connection, or set weights to a folder that holds its file."
            ) from error

    def _load_file(self, variant: str) -> nn.Module:
        """The network of a file: OpenAI's own TorchScript archive, known by its checksum, as it is
        a program; or a plain state dict.
        """
        import clip.model

        path = self.location
        if is_torchscript(path):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != clip.clip._MODELS[variant].split("/")[-2]:
                raise PerceptError(
                    f"{path} is a TorchScript archive, a program that would run while it is loaded,"
                    f" and not OpenAI's file of {variant} (sha256 {digest[:12]}): put OpenAI's file"
                    " there, or one with the weights alone."
                )
            return clip.load(path, device="cpu", jit=False)[0]
        state = load_plain_torch_file(path, "put OpenAI's file there again")
        try:
            model = clip.model.build_model(dict(state))
            expected = model.state_dict()
        except LOAD_ERRORS as error:
            raise PerceptError(
                f"{path} holds no weights of CLIP {variant} ({shorten(error)}): put OpenAI's file"
                " there."
            ) from error
        weights = {key: value for key, value in state.items() if key in expected}
        check_weights(weights, expected, path)
        return model

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, size, size) -> (batch, dim)."""
        return self.model.encode_image(pixel_values)

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (batch, dim)."""
        ids = self.tokenize(list(captions), truncate=True)
        return self.model.encode_text(ids.to(self.model.logit_scale.device))


class _VisionClip(nn.Module):
    """A CLIP with a vision transformer, of transformers.

    The text half is loaded when it is first needed.

    Args:
        location: hub id or folder.
    """

    def __init__(self, location: str):
        from transformers import CLIPVisionModelWithProjection

        super().__init__()
        self.location = location
        config = _read_config("vision", location)
        model = load_frozen(
            CLIPVisionModelWithProjection, location, config=config, unused=TEXT_KEYS
        )
        self.model = model.float()
        self.config = self.model.config
        self.size = self.config.image_size
        self.dim = self.config.projection_dim
        self._text: tuple[Any, Any] | None = None

    def embed_tokens(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, size, size) -> projected tokens of the last layer.

        They are (batch, tokens, dim), CLS first.
        """
        vision = self.model.vision_model
        hidden = vision(pixel_values=pixel_values).last_hidden_state  # (batch, tokens, width)
        return self.model.visual_projection(vision.post_layernorm(hidden))

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, size, size) -> patches (batch, patches, width).

        They are those of the last layer, not projected.
        """
        vision = self.model.vision_model
        hidden = vision(pixel_values=pixel_values).last_hidden_state
        return vision.post_layernorm(hidden)[:, 1:]

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, size, size) -> (batch, dim)."""
        vision = self.model.vision_model
        hidden = vision(pixel_values=pixel_values).last_hidden_state[:, 0]
        return self.model.visual_projection(vision.post_layernorm(hidden))

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (batch, dim)."""
        tokenizer, model = self._load_text()
        return model(input_ids=tokenize_captions(tokenizer, captions, model)).text_embeds

    def _load_text(self) -> tuple[Any, Any]:
        """Tokenizer and text model, loaded once."""
        if self._text is None:
            from transformers import CLIPTextModelWithProjection, CLIPTokenizer

            model = load_frozen(
                CLIPTextModelWithProjection,
                self.location,
                config=_read_config("text", self.location),
                unused=VISION_KEYS,
            )
            model = freeze(model.float(), self.model.device)
            self._text = load_frozen(CLIPTokenizer, self.location), model
        return self._text


def _read_config(part: str, location: str) -> Any:
    """The config of CLIP's vision or text part, with the projection that the whole CLIP has.

    LAION's configs give 512 in their parts and the true one at their top, where transformers does
    not look when a part is loaded alone (its issue 25622).
    """
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    config_class = {"vision": CLIPVisionConfig, "text": CLIPTextConfig}[part]
    config = load_frozen(config_class, location)
    with explain_loading("CLIP's config", location):
        # without the defaults of the class
        whole_config, _ = prefer_cache(CLIPConfig.get_config_dict, location)
    if f"{part}_config" in whole_config and "projection_dim" in whole_config:
        config.projection_dim = whole_config["projection_dim"]
    return config


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
        self.name = CLIP_VARIANTS[variant]
        self.weights = weights
        self.device = torch.device(device)
        self.variant = variant
        self.hidden = hidden
        self.norm_embs = norm_embs
        self.clamp_embs = clamp_embs
        network: Any
        if resnet:
            network = _ResNetClip(variant, weights)
        else:
            network = _VisionClip(locate_model(self.name, weights))
        self.model: Any = freeze(network, self.device)
        self.location = network.location
        self.config = getattr(network, "config", None)
        self.size = network.size
        self.dim = network.dim
        self.n_tokens = 1
        if hidden and self.config is not None:
            self.n_tokens = (self.size // self.config.patch_size) ** 2 + 1

    def get_options(self) -> dict[str, Any]:
        """Which embedding it gives; what is at its default and came later is left out."""
        options: dict[str, Any] = {"hidden": self.hidden, "norm_embs": self.norm_embs}
        if self.variant != "ViT-L/14":
            options["variant"] = self.variant
        if self.clamp_embs:
            options["clamp_embs"] = True
        return options

    @property
    def target_shape(self) -> tuple[int, ...]:
        """(tokens, dim) or (dim,)."""
        return (self.n_tokens, self.dim) if self.hidden else (self.dim,)

    def _encode(self, images: Tensor) -> Tensor:
        return self.embed_image(images)

    def preprocess(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> pixel values (batch, 3, size, size).

        Resized (bicubic without antialiasing, as published), centre crop, normalised.
        """
        height, width = images.shape[-2:]
        if (height, width) != (self.size, self.size):
            scale = self.size / min(height, width)
            target = (round(height * scale), round(width * scale))
            images = F.interpolate(images, target, mode="bicubic", antialias=False)
            images = crop_center(images, self.size)
        return normalise_for_clip(images)

    @torch.no_grad()
    def embed_image(self, images: Tensor) -> Tensor:
        """Embeddings (batch, tokens, dim) if hidden, else (batch, dim).

        Args:
            images: (batch, 3, height, width) in [0, 1].
        """
        x = self.preprocess(images.to(self.device))
        if self.hidden:
            embeds = self.model.embed_tokens(x)  # (batch, tokens, dim)
        else:
            embeds = self.model.embed_image(x)[:, None]  # (batch, 1, dim)
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
    """CLIP's patch tokens as MindEye2 predicts them.

    They are those of the last layer, normalised, without the class token and not projected.

    Args:
        weights: "hub", "mini" or a folder that holds `clip-bigG/`, `clip/` or `clip-ViT-B-32/`.
        variant: key of PATCH_VARIANTS: "bigG" (256 x 1664, what the unCLIP decoder reads) or
            "ViT-B/32" (49 x 768, low compute). The miniature has one CLIP (16 x 128), which stands
            for each of them.
        device: torch device.
        squeezed: the published defect: images in [0, 1] were treated as if they lay in [-1, 1],
            so that CLIP saw them in [.5, 1]. Released networks predict the tokens of such images.
        patches: number of patch tokens to give, a square; 0: all. Fewer are the means of
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
        name = "clip" if weights == "mini" else PATCH_VARIANTS[variant]
        super().__init__(name, weights, device)
        self.variant = variant
        self.squeezed = squeezed
        self.model: Any = freeze(_VisionClip(self.location), self.device)
        self.config = self.model.config
        self.size = self.model.size
        self.dim = self.config.hidden_size
        self.full_side = self.size // self.config.patch_size
        self.side = math.isqrt(patches) if patches else self.full_side
        is_square = self.side**2 == (patches or self.full_side**2)
        if not is_square or self.full_side % self.side:
            raise PerceptError(
                f"{patches} tokens cannot be made of CLIP's {self.full_side} x {self.full_side}"
                f" patches: give the square of a divisor of {self.full_side}, or 0 for all."
            )

    def get_options(self) -> dict[str, Any]:
        """Which tokens it gives; what is at its default and came later is left out."""
        options: dict[str, Any] = {"patch_tokens": True, "variant": self.variant}
        if self.side < self.full_side:
            options["patches"] = self.side**2
        if self.squeezed:
            options["squeezed"] = True
        return options

    @property
    def target_shape(self) -> tuple[int, int]:
        """(tokens, dim)."""
        return self.side**2, self.dim

    def _encode(self, images: Tensor) -> Tensor:
        return self.embed_image(images)

    @torch.no_grad()
    def embed_image(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, tokens, dim)."""
        x = images.to(self.device)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        if self.squeezed:
            x = (x + 1) / 2
        tokens = self.model.embed_patches(normalise_for_clip(x))
        if self.side == self.full_side:
            return tokens
        grid = tokens.mT.unflatten(2, (self.full_side, self.full_side))  # (batch, dim, h, w)
        return F.adaptive_avg_pool2d(grid, self.side).flatten(2).mT

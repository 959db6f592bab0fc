"""Frozen captioners: BLIP on images, GIT on predicted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipProcessor,
    GitForCausalLM,
    GitProcessor,
)
from transformers.modeling_outputs import BaseModelOutput

from src.pretrained.base import FrozenModel, load_pretrained
from src.utils import PerceptError, progress

# tokens of a caption, the one that begins it counted: the library's default when the ROI project
# was published (today's is one more)
MAX_LENGTH = 20


class Captioner(FrozenModel):
    """BLIP, which writes a sentence about a picture; nothing but the picture tells it what to
    write.

    Writing is the library's default: greedy (no beams, no sampling), up to `MAX_LENGTH` tokens.
    Targets, for the cache, are the hidden states of the vision model, from which `caption_tokens`
    writes as well: they can be predicted from elsewhere (`models.TokenMap`).

    Args:
        weights: "hub", "mini" or a folder that holds `blip/`.
        device: torch device.
        dtype: half precision on a GPU by default, as published.

    Source: Li et al. 2022 (arXiv 2201.12086).
    """

    def __init__(self, weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None):
        super().__init__("blip", weights, device)
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.model: Any = (
            load_pretrained(BlipForConditionalGeneration, self.place, dtype=self.dtype)
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )
        self.processor: Any = load_pretrained(BlipProcessor, self.place)
        self.config = self.model.config
        self.size = int(self.config.vision_config.image_size)

    @property
    def target_shape(self) -> tuple[int, int]:
        """(tokens, dim) of the vision model: the class token, then the patches row by row."""
        vision = self.config.vision_config
        return (self.size // vision.patch_size) ** 2 + 1, vision.hidden_size

    def _encode(self, images: Tensor) -> Tensor:
        return self.embed_image(images)

    def preprocess(self, images: Tensor, published_pixels: bool = False) -> Tensor:
        """Images as BLIP takes them.

        Args:
            images: (batch, 3, height, width) in [0, 1].
            published_pixels: the ROI project's defect: values 0 to 255 as they are, where BLIP was
                trained on values brought to [0, 1] and then freed of the mean and spread of its
                training images.

        Returns:
            Pixel values (batch, 3, size, size), resized (bicubic, antialiased, not cropped).
        """
        x = images.to(self.device, torch.float32)
        if x.shape[-2:] != (self.size, self.size):
            for size in (
                (x.shape[-2], self.size),
                (self.size, self.size),
            ):  # the library limits values after each of the two directions
                x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        if published_pixels:
            return (255 * x).round()
        own = self.processor.image_processor
        mean, std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (own.image_mean, own.image_std)
        )
        return (x - mean) / std

    @torch.no_grad()
    def embed_image(self, images: Tensor, published_pixels: bool = False) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> last hidden states of the vision model (batch,
        tokens, dim); `preprocess` tells of the defect.
        """
        return self.model.vision_model(
            pixel_values=self.preprocess(images, published_pixels).to(self.dtype)
        ).last_hidden_state

    def caption(
        self, images: Tensor, published_pixels: bool = False, batch_size: int = 32, **options: Any
    ) -> list[str]:
        """Write a caption for each image.

        Args:
            images: (images, 3, height, width) in [0, 1].
            published_pixels: see `preprocess`.
            batch_size: images at a time.
            options: of the library's `generate`, e.g. num_beams=3.

        Returns:
            One caption an image, in small letters, as BLIP writes.
        """
        parts = progress(images.split(batch_size), "captions")
        return [
            text
            for some in parts
            for text in self._write(self.embed_image(some, published_pixels), options)
        ]

    def caption_tokens(self, tokens: Tensor, batch_size: int = 32, **options: Any) -> list[str]:
        """Write captions from hidden states of the vision model, those of `embed_image` or
        predicted ones.

        Args:
            tokens: (images, tokens, dim), as `target_shape` says.
            batch_size: images at a time.
            options: as for `caption`.

        Raises:
            PerceptError: for tokens of another shape.
        """
        if tokens.shape[1:] != self.target_shape:
            raise PerceptError(
                f"This BLIP writes from tokens (images, {', '.join(map(str, self.target_shape))}),"
                f" not {tuple(tokens.shape)}: map them first."
            )
        return [
            text
            for some in progress(tokens.split(batch_size), "captions")
            for text in self._write(some, options)
        ]

    @torch.no_grad()
    def _write(self, tokens: Tensor, options: dict[str, Any]) -> list[str]:
        """Captions of one batch; what the library's own `generate` does once it has the hidden
        states.
        """
        text, tokens = self.config.text_config, tokens.to(self.device, self.dtype)
        ids = self.model.text_decoder.generate(
            input_ids=torch.full((len(tokens), 1), text.bos_token_id, device=self.device),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(
                tokens.shape[:2], dtype=torch.long, device=self.device
            ),
            **{"max_length": MAX_LENGTH} | options,
        )
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


class PrecomputedTokens(nn.Module):
    """Stands where GIT has its image encoder: what it is called with, (batch, 1, tokens, dim), are
    the hidden states already.
    """

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """(batch, 1, tokens, dim) -> hidden states (batch, tokens, dim); of rank 4, because GIT
        takes nothing else for one image.
        """
        return BaseModelOutput(last_hidden_state=pixel_values[:, 0])


class BrainCaptioner(FrozenModel):
    """GIT, which writes a sentence after the tokens of its image encoder, be they a picture's or
    predicted from a brain's.

    Writing is greedy (no beams, no sampling), up to `MAX_LENGTH` tokens. Targets, for the cache,
    are the hidden states of the image encoder, which `models.CaptionConverter` learns to predict
    from other tokens.

    Args:
        weights: "hub", "mini" or a folder that holds `git/`.
        device: torch device; the published low-compute runs keep this model on the CPU, beside a
            GPU for all else.
        dtype: half precision on a GPU by default, as published.

    Source: Wang et al. 2022 (arXiv 2205.14100); MindEye2 (arXiv 2403.11207), section 2.5.
    """

    def __init__(self, weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None):
        super().__init__("git", weights, device)
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.model: Any = (
            load_pretrained(GitForCausalLM, self.place, dtype=self.dtype)
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )
        self.processor: Any = load_pretrained(GitProcessor, self.place)
        self.config = self.model.config
        self.size = int(self.config.vision_config.image_size)
        self.encoder, self.model.git.image_encoder = self.model.git.image_encoder, PrecomputedTokens()

    @property
    def target_shape(self) -> tuple[int, int]:
        """(tokens, dim) of the image encoder: the class token, then the patches row by row."""
        vision = self.config.vision_config
        return (self.size // vision.patch_size) ** 2 + 1, vision.hidden_size

    def _encode(self, images: Tensor) -> Tensor:
        return self.embed_image(images)

    def preprocess(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> pixel values (batch, 3, size, size): bicubic,
        antialiased, centre crop, CLIP's mean and spread.
        """
        x, (height, width) = images.to(self.device, torch.float32), images.shape[-2:]
        if (height, width) != (self.size, self.size):
            short = min(height, width)
            target = int(height * self.size / short), int(width * self.size / short)
            for size in (
                (height, target[1]),
                target,
            ):  # the library limits values after each of the two directions
                x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
            top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
            x = x[..., top : top + self.size, left : left + self.size]
        own = self.processor.image_processor
        mean, std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (own.image_mean, own.image_std)
        )
        return (x - mean) / std

    @torch.no_grad()
    def embed_image(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> last hidden states of the image encoder (batch,
        tokens, dim).
        """
        return self.encoder(pixel_values=self.preprocess(images).to(self.dtype)).last_hidden_state

    def caption(self, images: Tensor, batch_size: int = 4, **options: Any) -> list[str]:
        """Write a caption for each image.

        Args:
            images: (images, 3, height, width) in [0, 1].
            batch_size: images at a time; 4 as the low-compute runs write.
            options: of the library's `generate`, e.g. num_beams=3.

        Returns:
            One caption an image, in small letters, as GIT writes.
        """
        return [
            text
            for some in progress(images.split(batch_size), "captions")
            for text in self._write(self.embed_image(some), options)
        ]

    def caption_tokens(self, tokens: Tensor, batch_size: int = 4, **options: Any) -> list[str]:
        """Write captions from hidden states of the image encoder, those of `embed_image` or
        predicted ones.

        Args:
            tokens: (images, tokens, dim), as `target_shape` says.
            batch_size: images at a time.
            options: as for `caption`.

        Raises:
            PerceptError: for tokens of another shape, or that are not finite.
        """
        if tokens.shape[1:] != self.target_shape:
            raise PerceptError(
                f"This GIT writes from tokens (images, {', '.join(map(str, self.target_shape))}),"
                f" not {tuple(tokens.shape)}: convert them first."
            )
        if not torch.isfinite(tokens).all():
            raise PerceptError(
                "The tokens to write captions from hold values that are not finite: make them"
                " again."
            )
        return [
            text
            for some in progress(tokens.split(batch_size), "captions")
            for text in self._write(some, options)
        ]

    @torch.no_grad()
    def _write(self, tokens: Tensor, options: dict[str, Any]) -> list[str]:
        """Captions of one batch: the library's own `generate`, from the visual projection onward."""
        ids = self.model.generate(
            pixel_values=tokens.to(self.device, self.dtype)[:, None],
            **{"max_length": MAX_LENGTH, "do_sample": False} | options,
        )
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


def strip_word(captions: Sequence[str], word: str = "blurry ") -> list[str]:
    """Captions with a substring left out ("" for none): what BLIP says of a decoder's picture, as
    the ROI project did, lest the generator paints it blurry.
    """
    return [caption.replace(word, "") for caption in captions]

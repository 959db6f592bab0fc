"""Frozen captioners: BLIP on images, GIT on predicted tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.pretrained.base import (
    FrozenModel,
    choose_dtype,
    crop_center,
    freeze,
    load_frozen,
    normalise_colours,
)
from src.utils import PerceptError, progress

# tokens of a caption, with the one that begins it: the library's default when the ROI project was
# published (today's is one more)
MAX_LENGTH = 20


class _TokenCaptioner(FrozenModel):
    """A captioner that writes from the hidden states of its image encoder.

    Writing is greedy (no beams, no sampling), up to `MAX_LENGTH` tokens. The hidden states are the
    targets for the cache; they can be predicted from elsewhere.

    Args:
        name: of the model, as `locate_model` knows it.
        model_class: of transformers.
        processor_class: of transformers.
        weights: "hub", "mini" or a folder that holds the model.
        device: torch device.
        dtype: half precision on a GPU by default, as published.
    """

    title = ""  # what messages call it
    advice = ""  # what to do with tokens of another shape

    def __init__(
        self,
        name: str,
        model_class: Any,
        processor_class: Any,
        weights: str,
        device: str,
        dtype: torch.dtype | None,
    ):
        super().__init__(name, weights, device)
        self.dtype = choose_dtype(dtype, self.device)
        model = load_frozen(model_class, self.location, dtype=self.dtype)
        self.model: Any = freeze(model, self.device)
        self.processor: Any = load_frozen(processor_class, self.location)
        self.config = self.model.config
        self.size = int(self.config.vision_config.image_size)

    @property
    def target_shape(self) -> tuple[int, int]:
        """(tokens, dim) of the image encoder: the class token, then the patches row by row."""
        vision = self.config.vision_config
        return (self.size // vision.patch_size) ** 2 + 1, vision.hidden_size

    def _encode(self, images: Tensor) -> Tensor:
        return self.embed_image(images)

    def embed_image(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> hidden states (batch, tokens, dim)."""
        raise NotImplementedError

    def _normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] less the mean of the model's training images, over their spread."""
        statistics = self.processor.image_processor
        return normalise_colours(images, statistics.image_mean, statistics.image_std)

    def caption_tokens(self, tokens: Tensor, batch_size: int = 32, **options: Any) -> list[str]:
        """Write captions from hidden states of the image encoder, true or predicted ones.

        Args:
            tokens: (images, tokens, dim), as `target_shape` says.
            batch_size: images at a time.
            options: as for `caption`.

        Raises:
            PerceptError: for tokens of another shape.
        """
        if tokens.shape[1:] != self.target_shape:
            raise PerceptError(
                f"This {self.title} writes from tokens (images,"
                f" {', '.join(map(str, self.target_shape))}), not {tuple(tokens.shape)}:"
                f" {self.advice} first."
            )
        return self._write_batches(progress(tokens.split(batch_size), "captions"), options)

    def _write_batches(self, batches: Iterable[Tensor], options: dict[str, Any]) -> list[str]:
        """Captions from batches of hidden states (batch, tokens, dim)."""
        captions: list[str] = []
        for tokens in batches:
            ids = self._generate(tokens, options)
            texts = self.processor.batch_decode(ids, skip_special_tokens=True)
            captions += [text.strip() for text in texts]
        return captions

    def _generate(self, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        """Token ids (batch, positions) of captions from hidden states (batch, tokens, dim)."""
        raise NotImplementedError


class Captioner(_TokenCaptioner):
    """BLIP, which writes a sentence about an image, without a prompt.

    `models.TokenMap` learns to predict its hidden states from other tokens.

    Args:
        weights: "hub", "mini" or a folder that holds `blip/`.
        device: torch device.
        dtype: half precision on a GPU by default, as published.

    Source: Li et al. 2022 (arXiv 2201.12086).
    """

    title, advice = "BLIP", "map them"

    def __init__(self, weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None):
        from transformers import BlipForConditionalGeneration, BlipProcessor

        classes = (BlipForConditionalGeneration, BlipProcessor)
        super().__init__("blip", *classes, weights, device, dtype)

    def preprocess(self, images: Tensor, published_pixels: bool = False) -> Tensor:
        """Images as BLIP takes them.

        Args:
            images: (batch, 3, height, width) in [0, 1].
            published_pixels: the ROI project's defect: values from 0 to 255, where BLIP was trained
                on values in [0, 1], normalised by mean and spread of its training images.

        Returns:
            Pixel values (batch, 3, size, size), resized (bicubic, antialiased, not cropped).
        """
        x = images.to(self.device, torch.float32)
        if x.shape[-2:] != (self.size, self.size):
            x = _resize_bicubic(x, self.size, self.size)
        if published_pixels:
            return (255 * x).round()
        return self._normalise(x)

    @torch.no_grad()
    def embed_image(self, images: Tensor, published_pixels: bool = False) -> Tensor:
        """Last hidden states (batch, tokens, dim) of the vision model.

        The arguments are those of `preprocess`.
        """
        pixels = self.preprocess(images, published_pixels).to(self.dtype)
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

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
        batches = (self.embed_image(part, published_pixels) for part in parts)
        return self._write_batches(batches, options)

    @torch.no_grad()
    def _generate(self, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        """What the library's own `generate` does once it has the hidden states."""
        text = self.config.text_config
        tokens = tokens.to(self.device, self.dtype)
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=self.device)
        return self.model.text_decoder.generate(
            input_ids=torch.full((len(tokens), 1), text.bos_token_id, device=self.device),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            encoder_hidden_states=tokens,
            encoder_attention_mask=mask,
            **{"max_length": MAX_LENGTH, **options},
        )


class PrecomputedTokens(nn.Module):
    """Takes the place of GIT's image encoder: its input is the hidden states already."""

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """(batch, 1, tokens, dim) -> hidden states (batch, tokens, dim).

        The input has rank 4 because GIT takes nothing else for one image.
        """
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=pixel_values[:, 0])


class BrainCaptioner(_TokenCaptioner):
    """GIT, which writes a sentence from tokens of its image encoder, an image's or predicted ones.

    `models.CaptionConverter` learns to predict these tokens from those that a brain decoder gives.

    Args:
        weights: "hub", "mini" or a folder that holds `git/`.
        device: torch device; the published low-compute runs put this model on the CPU, beside a
            GPU for all else.
        dtype: half precision on a GPU by default, as published.

    Source: Wang et al. 2022 (arXiv 2205.14100); MindEye2 (arXiv 2403.11207), section 2.5.
    """

    title, advice = "GIT", "convert them"

    def __init__(self, weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None):
        from transformers import GitForCausalLM, GitProcessor

        super().__init__("git", GitForCausalLM, GitProcessor, weights, device, dtype)
        self.encoder = self.model.git.image_encoder
        self.model.git.image_encoder = PrecomputedTokens()

    def preprocess(self, images: Tensor) -> Tensor:
        """Images as GIT takes them.

        Args:
            images: (batch, 3, height, width) in [0, 1].

        Returns:
            Pixel values (batch, 3, size, size): resized (bicubic, antialiased), centre crop,
            normalised by mean and spread of CLIP's training images.
        """
        x = images.to(self.device, torch.float32)
        height, width = images.shape[-2:]
        if (height, width) != (self.size, self.size):
            short = min(height, width)
            target_height = int(height * self.size / short)
            target_width = int(width * self.size / short)
            x = _resize_bicubic(x, target_height, target_width)
            x = crop_center(x, self.size)
        return self._normalise(x)

    @torch.no_grad()
    def embed_image(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> last hidden states (batch, tokens, dim)."""
        return self.encoder(pixel_values=self.preprocess(images).to(self.dtype)).last_hidden_state

    def caption(self, images: Tensor, batch_size: int = 4, **options: Any) -> list[str]:
        """Write a caption for each image.

        Args:
            images: (images, 3, height, width) in [0, 1].
            batch_size: images at a time; 4 as in the published low-compute runs.
            options: of the library's `generate`, e.g. num_beams=3.

        Returns:
            One caption an image, in small letters, as GIT writes.
        """
        parts = progress(images.split(batch_size), "captions")
        return self._write_batches((self.embed_image(part) for part in parts), options)

    def caption_tokens(self, tokens: Tensor, batch_size: int = 4, **options: Any) -> list[str]:
        """Write captions from hidden states of the image encoder, true or predicted ones.

        Args:
            tokens: (images, tokens, dim), as `target_shape` says.
            batch_size: images at a time.
            options: as for `caption`.

        Raises:
            PerceptError: for tokens of another shape, or that are not finite.
        """
        right_shape = tokens.shape[1:] == self.target_shape
        if right_shape and not torch.isfinite(tokens).all():
            raise PerceptError(
                "The tokens to write captions from hold values that are not finite: make them"
                " again."
            )
        return super().caption_tokens(tokens, batch_size, **options)

    @torch.no_grad()
    def _generate(self, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        """The library's own `generate`, from the visual projection onward."""
        return self.model.generate(
            pixel_values=tokens.to(self.device, self.dtype)[:, None],
            **{"max_length": MAX_LENGTH, "do_sample": False, **options},
        )


def _resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Resize as the library's processors do: the width first, values limited after each direction.

    Images are (batch, 3, height, width) in [0, 1], antialiased.
    """
    for size in ((images.shape[-2], width), (height, width)):
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return images


def strip_word(captions: Sequence[str], word: str = "blurry ") -> list[str]:
    """Captions with a substring left out ("" for none).

    BLIP calls a decoder's images blurry. The ROI project left the word out, so that the generator
    does not paint a blurry image.
    """
    return [caption.replace(word, "") for caption in captions]

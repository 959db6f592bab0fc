"""Frozen image generators: Versatile Diffusion, image variations, Stable Diffusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.pipelines.deprecated import (
    VersatileDiffusionDualGuidedPipeline,
    VersatileDiffusionPipeline,
)
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import (
    UNetFlatConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from src.pretrained.autoencoder import LatentAutoencoder
from src.pretrained.base import load_pretrained, locate_model, normalise_for_clip, tokenize_captions
from src.utils import PerceptError

# The miniature's file holds the transformer blocks alone, all that is ever run; low_cpu_mem_usage
# would leave the rest without memory.
TEXT_UNET = {"subfolder": "text_unet", "low_cpu_mem_usage": False}


def replace_transformer_blocks(taker: nn.Module, donor: nn.Module) -> None:
    """Put the transformer blocks of one flow's network in the place of another's: all by which
    Versatile Diffusion's flows differ in use.
    """
    for name, module in list(donor.named_modules()):
        if isinstance(module, Transformer2DModel):
            taker.set_submodule(name, module)


@contextmanager
def cache_condition(unet: nn.Module) -> Iterator[None]:
    """Within this context the keys and values of a condition are computed once, and found again at
    every step that passes the same tensor.
    """
    layers = [
        module
        for name, module in unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]
    try:
        for layer in layers:
            layer.forward = _remembering(layer.forward)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _remembering(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    last: list[tuple[Tensor, Tensor]] = []

    def found(x: Tensor) -> Tensor:
        if not last or last[0][0] is not x:
            last[:] = [(x, compute(x))]
        return last[0][1]

    return found


class ImageGenerator(LatentAutoencoder):
    """A frozen latent diffusion model that turns a condition (and optionally a low-level latent)
    into an image.

    The four kinds differ in the network and in what conditions it; sampling and img2img are the
    same for all.

    Args:
        weights: "hub", "mini" or a folder.
        device: torch device.
        dtype: of the diffusion network; half precision on a GPU by default, as published.
    """

    model_name, unet_folder = "", "unet"
    guidance = 3.5  # what the published systems use

    def __init__(self, weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None):
        super().__init__(weights, self.model_name, device=device)
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.unet = self._network().eval().requires_grad_(False).to(self.device)
        # "sigma_min" ends the schedule where the library did when the systems were published; its
        # present default ends at zero noise.
        options = {
            "subfolder": "scheduler",
            "final_sigmas_type": "sigma_min",
            "timestep_spacing": "linspace",
        }
        self.scheduler = load_pretrained(UniPCMultistepScheduler, self.place, **options)

    def _network(self) -> nn.Module:
        return load_pretrained(
            UNet2DConditionModel, self.place, subfolder=self.unet_folder, torch_dtype=self.dtype
        )

    def get_null_condition(self, condition: Tensor) -> Tensor:
        """The condition that stands for none in classifier-free guidance, same shape as
        `condition`: zeros.
        """
        return torch.zeros_like(condition)

    @torch.no_grad()
    def generate(
        self,
        condition: Tensor,
        noise: Tensor,
        init_latents: Tensor | None = None,
        strength: float = 1.0,
        guidance_scale: float = 0.0,
        num_inference_steps: int = 20,
    ) -> Tensor:
        """Generate images.

        Args:
            condition: (batch, tokens, dim), what the class says conditions it.
            noise: (batch, channels, h, w), standard normal; the only source of randomness.
            init_latents: scaled latents (batch, channels, h, w) to start from (img2img).
            strength: share of the steps that are run; 1 ignores init_latents, 0 returns them
                decoded.
            guidance_scale: classifier-free guidance against `null`; 0: what is published for this
                generator, 1: none, at half the cost.
            num_inference_steps: UniPC steps of the whole schedule.

        Returns:
            Images (batch, 3, height, width) in [0, 1].
        """
        if init_latents is None:
            strength = 1.0
        steps = min(int(num_inference_steps * strength), num_inference_steps)
        if steps == 0 and init_latents is not None:
            return self.decode(init_latents)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        timesteps = self.scheduler.timesteps[num_inference_steps - steps :]
        self.scheduler.set_begin_index(num_inference_steps - steps)
        latents = noise.to(self.device, self.dtype) * self.scheduler.init_noise_sigma
        if strength < 1.0 and init_latents is not None:
            latents = self.scheduler.add_noise(
                init_latents.to(latents), latents, timesteps[:1].expand(len(latents))
            )
        condition = condition.to(self.device, self.dtype)
        guidance_scale = guidance_scale or self.guidance
        guided = guidance_scale != 1.0
        both = (
            torch.cat([self.get_null_condition(condition), condition]) if guided else condition
        )  # (2 * batch, tokens, dim)
        with cache_condition(self.unet):
            for t in timesteps:
                x = self.scheduler.scale_model_input(
                    torch.cat([latents, latents]) if guided else latents, t
                )
                pred = self.unet(x, t, encoder_hidden_states=both).sample
                if guided:
                    without, given = pred.chunk(2)
                    pred = without + guidance_scale * (given - without)
                latents = self.scheduler.step(pred, t, latents).prev_sample
        return self.decode(latents.float())

    @torch.no_grad()
    def encode_published_start(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Where the published img2img starts: not at the predicted latents, but at those of their
        picture, after a detour.

        The picture is normalised by CLIP's mean and spread before it is encoded, where the
        autoencoder was trained on [-1, 1], and a latent is drawn from the posterior instead of its
        mode.

        Args:
            latents: scaled latents (batch, channels, h, w).
            noise: for the draw, same shape.

        Returns:
            Scaled latents, same shape.
        """
        parts = []
        for some, draw in zip(
            latents.split(self._batch_size), noise.split(self._batch_size), strict=True
        ):
            picture = (
                self.model.decode(some.to(self.device) / self.scale).sample / 2 + 0.5
            )  # not clamped, as published
            posterior = self.model.encode(normalise_for_clip(picture)).latent_dist
            parts.append((posterior.mean + posterior.std * draw.to(self.device)) * self.scale)
        return torch.cat(parts)


class VersatileDiffusion(ImageGenerator):
    """Versatile Diffusion's image flow: all projected CLIP tokens, divided by the norm of the CLS
    token -> image.

    Source: arXiv 2211.08332; used as MindEye does (UniPC order 2, 20 steps, guidance 3.5, null
    condition of zeros).
    """

    model_name, unet_folder = "versatile_diffusion", "image_unet"


class ImageVariation(ImageGenerator):
    """Stable Diffusion image variations: one CLIP image embedding (batch, 1, dim), not normalised
    -> image (MindEye's 1x768 models).
    """

    model_name = "image_variation"
    guidance = 7.5


class TextGenerator(ImageGenerator):
    """A generator that is guided by sentences; its null condition is that of an empty sentence."""

    encoder_class: Any = CLIPTextModelWithProjection

    def __init__(self, weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None):
        super().__init__(weights, device, dtype)
        self.tokenizer = load_pretrained(CLIPTokenizer, self.place, subfolder="tokenizer")
        encoder = load_pretrained(self.encoder_class, self.place, subfolder="text_encoder")
        self.text_encoder = encoder.float().eval().requires_grad_(False).to(self.device)
        self._empty = self.embed_text([""])

    def get_null_condition(self, condition: Tensor) -> Tensor:
        """The condition of an empty sentence, as often as `condition` has rows."""
        return self._empty.to(condition).expand_as(condition)

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> the condition that `generate` takes, (captions, tokens, dim)."""
        return self._condition(
            self.text_encoder(input_ids=tokenize_captions(self.tokenizer, captions, self.text_encoder))
        )

    def _condition(self, encoded: Any) -> Tensor:
        raise NotImplementedError


class VersatileDiffusionText(TextGenerator):
    """Versatile Diffusion's text flow: every projected hidden state of the sentence over the norm
    of the pooled one -> image.

    The image flow's network with the transformer blocks of the text flow in the place of its own,
    as the library's text-to-image pipeline puts it together.

    Source: arXiv 2211.08332.
    """

    model_name = "versatile_diffusion"

    def _network(self) -> nn.Module:
        unet = load_pretrained(
            UNet2DConditionModel, self.place, subfolder="image_unet", torch_dtype=self.dtype
        )
        replace_transformer_blocks(
            unet, load_pretrained(UNetFlatConditionModel, self.place, torch_dtype=self.dtype, **TEXT_UNET)
        )
        return unet

    def _condition(self, encoded: Any) -> Tensor:
        tokens = self.text_encoder.text_projection(encoded.last_hidden_state)
        return tokens / encoded.text_embeds[:, None].norm(dim=-1, keepdim=True)


class StableDiffusion(TextGenerator):
    """Stable Diffusion 1: the text encoder's hidden states -> image (the ROI project's generator).

    Source: Rombach et al. 2022, arXiv 2112.10752.
    """

    model_name, encoder_class = "stable_diffusion", CLIPTextModel

    def _condition(self, encoded: Any) -> Tensor:
        return encoded.last_hidden_state


def load_versatile_pipeline(
    weights: str = "hub",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    dual: bool = False,
) -> Any:
    """The library's `VersatileDiffusionPipeline` (`.image_variation`, `.text_to_image`).

    With `dual` its `VersatileDiffusionDualGuidedPipeline`: an image and a sentence together, mixed
    by `text_to_image_strength`. Put together from its parts, because the library no longer finds
    the class of the text network by the name in the saved pipeline.
    """
    place = locate_model("versatile_diffusion", weights)
    parts: dict[str, tuple[type, dict[str, Any]]] = {
        "tokenizer": (CLIPTokenizer, {}),
        "image_feature_extractor": (CLIPImageProcessor, {}),
        "text_encoder": (CLIPTextModelWithProjection, {"dtype": dtype}),
        "image_encoder": (CLIPVisionModelWithProjection, {"dtype": dtype}),
        "image_unet": (UNet2DConditionModel, {"torch_dtype": dtype}),
        "text_unet": (UNetFlatConditionModel, {"torch_dtype": dtype} | TEXT_UNET),
        "vae": (AutoencoderKL, {"torch_dtype": dtype}),
        "scheduler": (UniPCMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
    }
    loaded = {
        name: load_pretrained(cls, place, **{"subfolder": name} | options)
        for name, (cls, options) in parts.items()
    }
    pipeline: Any = (VersatileDiffusionDualGuidedPipeline if dual else VersatileDiffusionPipeline)(
        **loaded
    )
    for module in pipeline.image_unet.modules():
        if isinstance(
            module, DualTransformer2DModel
        ):  # the blocks around it now pass an argument that it was never taught
            module.forward = partial(_without_mask, module.forward)  # type: ignore[method-assign]
    return pipeline.to(device)


def _without_mask(
    forward: Any, *args: Any, encoder_attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    if encoder_attention_mask is not None:
        raise PerceptError(
            "Versatile Diffusion's dual attention takes no attention mask on its condition: pass"
            " none."
        )
    return forward(*args, **kwargs)


def load_image_variation_pipeline(
    weights: str = "hub", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The library's `StableDiffusionImageVariationPipeline`, which is conditioned on one CLIP
    embedding (the 1x768 model's generator).
    """
    return load_pretrained(
        StableDiffusionImageVariationPipeline, locate_model("image_variation", weights), dtype=dtype
    ).to(device)


def load_stable_diffusion_pipeline(
    weights: str = "hub", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The library's `StableDiffusionImg2ImgPipeline`, which repaints an image after a sentence (the
    ROI project's last step).
    """
    return load_pretrained(
        StableDiffusionImg2ImgPipeline, locate_model("stable_diffusion", weights), dtype=dtype
    ).to(device)

"""Frozen image generators: Versatile Diffusion, image variations, Stable Diffusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from src.pretrained.autoencoder import LatentAutoencoder
from src.pretrained.base import (
    choose_dtype,
    explain_loading,
    freeze,
    load_frozen,
    locate_model,
    normalise_for_clip,
    tokenize_captions,
)
from src.utils import PerceptError

# the last version that was tested and has Versatile Diffusion's classes
LAST_DIFFUSERS = "0.42.1"

# The miniature's file holds the transformer blocks alone, all that is ever run; low_cpu_mem_usage
# would leave the rest without memory.
TEXT_UNET = {
    "subfolder": "text_unet",
    "low_cpu_mem_usage": False,
    "unfilled": r"(?!.*\.attentions\.).*",
}


def replace_transformer_blocks(unet: nn.Module, source: nn.Module) -> None:
    """Put the transformer blocks of one flow's network in the place of another's.

    Versatile Diffusion's flows differ in nothing else in use.

    Args:
        unet: whose blocks are replaced.
        source: whose blocks it gets.
    """
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for name, module in list(source.named_modules()):
        if isinstance(module, Transformer2DModel):
            unet.set_submodule(name, module)


@contextmanager
def cache_condition(unet: nn.Module) -> Iterator[None]:
    """Context in which keys and values of a condition are computed once.

    Every further step that passes the same tensor gets the stored ones.
    """
    layers = []
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layers.append(module)
    try:
        for layer in layers:
            layer.forward = _remember_last(layer.forward)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _remember_last(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, which returns its last output again for its last input."""
    last: list[tuple[Tensor, Tensor]] = []

    def compute_once(x: Tensor) -> Tensor:
        if not last or last[0][0] is not x:
            last[:] = [(x, compute(x))]
        return last[0][1]

    return compute_once


class ImageGenerator(LatentAutoencoder):
    """A frozen latent diffusion model: a condition, and optionally a low-level latent, to an image.

    Its four kinds differ in the network and in what conditions it; sampling and img2img are the
    same for all.

    Args:
        weights: "hub", "mini" or a folder.
        device: torch device.
        dtype: of the diffusion network; half precision on a GPU by default, as published.

    Attributes:
        model_name: the pretrained model, as `locate_model` knows it.
        unet_folder: its folder of the network.
        guidance: scale of classifier-free guidance that the published systems use.
    """

    model_name, unet_folder = "", "unet"
    guidance = 3.5

    def __init__(self, weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None):
        from diffusers import UniPCMultistepScheduler

        super().__init__(weights, self.model_name, device=device)
        self.dtype = choose_dtype(dtype, self.device)
        self.unet: Any = freeze(self._load_unet(), self.device)
        # "sigma_min" ends the schedule where the library did when the systems were published; its
        # present default ends at zero noise.
        self.scheduler: Any = load_frozen(
            UniPCMultistepScheduler,
            self.location,
            subfolder="scheduler",
            final_sigmas_type="sigma_min",
            timestep_spacing="linspace",
        )

    def _load_unet(self) -> nn.Module:
        return self._load_unet_from(self.unet_folder)

    def _load_unet_from(self, folder: str) -> Any:
        from diffusers import UNet2DConditionModel

        return load_frozen(
            UNet2DConditionModel, self.location, subfolder=folder, torch_dtype=self.dtype
        )

    def get_null_condition(self, condition: Tensor) -> Tensor:
        """The condition that stands for none in classifier-free guidance: zeros, same shape."""
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
            guidance_scale: classifier-free guidance against the null condition; 0: what is
                published for this generator, 1: none, at half the cost.
            num_inference_steps: UniPC steps of the whole schedule.

        Returns:
            Images (batch, 3, height, width) in [0, 1].
        """
        if init_latents is None:
            strength = 1.0
        steps = min(int(num_inference_steps * strength), num_inference_steps)
        if steps == 0 and init_latents is not None:
            return self.decode(init_latents)
        first = num_inference_steps - steps
        self.scheduler.set_timesteps(num_inference_steps)  # on the CPU, where it reads them
        timesteps = self.scheduler.timesteps[first:]
        self.scheduler.set_begin_index(first)
        latents = noise.to(self.device, self.dtype) * self.scheduler.init_noise_sigma
        if strength < 1.0 and init_latents is not None:
            start = timesteps[:1].expand(len(latents))
            latents = self.scheduler.add_noise(init_latents.to(latents), latents, start)
        condition = condition.to(self.device, self.dtype)
        latents = self._denoise(latents, timesteps, condition, guidance_scale or self.guidance)
        return self.decode(latents.float())

    def _denoise(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, guidance_scale: float
    ) -> Tensor:
        """Steps of the scheduler, with classifier-free guidance unless its scale is 1."""
        guided = guidance_scale != 1.0
        if guided:  # (2 * batch, tokens, dim)
            condition = torch.cat([self.get_null_condition(condition), condition])
        with cache_condition(self.unet):
            for t, t_on_device in zip(timesteps, timesteps.to(self.device), strict=True):
                x = torch.cat([latents, latents]) if guided else latents
                x = self.scheduler.scale_model_input(x, t)
                pred = self.unet(x, t_on_device, encoder_hidden_states=condition).sample
                if guided:
                    null, conditional = pred.chunk(2)
                    pred = null + guidance_scale * (conditional - null)
                latents = self.scheduler.step(pred, t, latents).prev_sample
        return latents

    @torch.no_grad()
    def encode_published_start(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Where the published img2img starts: at the latents of the decoded image.

        The predicted latents are decoded and encoded again. Before that the image is normalised by
        CLIP's mean and spread, where the autoencoder was trained on [-1, 1], and a latent is drawn
        from the posterior instead of its mode.

        Args:
            latents: scaled latents (batch, channels, h, w).
            noise: for the draw, same shape.

        Returns:
            Scaled latents, same shape.
        """
        starts = []
        batches = zip(latents.split(self._batch_size), noise.split(self._batch_size), strict=True)
        for part, draw in batches:
            decoded = self.model.decode(part.to(self.device) / self.scale).sample
            image = decoded / 2 + 0.5  # not clamped, as published
            posterior = self.model.encode(normalise_for_clip(image)).latent_dist
            sample = posterior.mean + posterior.std * draw.to(self.device)
            starts.append(sample * self.scale)
        return torch.cat(starts)


class VersatileDiffusion(ImageGenerator):
    """Versatile Diffusion's image flow, conditioned on all projected CLIP tokens.

    The tokens are divided by the norm of the CLS token.

    Source: arXiv 2211.08332; used as MindEye does (UniPC order 2, 20 steps, guidance 3.5, null
    condition of zeros).
    """

    model_name, unet_folder = "versatile_diffusion", "image_unet"


class ImageVariation(ImageGenerator):
    """Stable Diffusion image variations, conditioned on one CLIP image embedding (batch, 1, dim).

    The embedding is not normalised. MindEye's 1x768 models use it.
    """

    model_name = "image_variation"
    guidance = 7.5


class TextGenerator(ImageGenerator):
    """A generator that is guided by sentences; its null condition is that of an empty sentence.

    Attributes:
        encoder_class: of transformers.
    """

    encoder_class = "CLIPTextModelWithProjection"

    def __init__(self, weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None):
        import transformers

        super().__init__(weights, device, dtype)
        self.tokenizer = load_frozen(
            transformers.CLIPTokenizer, self.location, subfolder="tokenizer"
        )
        encoder_class = getattr(transformers, self.encoder_class)
        encoder = load_frozen(encoder_class, self.location, subfolder="text_encoder")
        self.text_encoder: Any = freeze(encoder.float(), self.device)
        self._empty = self.embed_text([""])

    def get_null_condition(self, condition: Tensor) -> Tensor:
        """The condition of an empty sentence, as often as `condition` has rows."""
        return self._empty.to(condition).expand_as(condition)

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> the condition that `generate` takes, (captions, tokens, dim)."""
        ids = tokenize_captions(self.tokenizer, captions, self.text_encoder)
        return self._get_condition(self.text_encoder(input_ids=ids))

    def _get_condition(self, encoded: Any) -> Tensor:
        """The condition (captions, tokens, dim) in the output of the text encoder."""
        raise NotImplementedError


class VersatileDiffusionText(TextGenerator):
    """Versatile Diffusion's text flow, conditioned on every projected hidden state of a sentence.

    The hidden states are divided by the norm of the pooled one. The network is that of the image
    flow with the transformer blocks of the text flow in the place of its own, as the library's
    text-to-image pipeline assembles it.

    Source: arXiv 2211.08332.
    """

    model_name = "versatile_diffusion"

    def _load_unet(self) -> nn.Module:
        network_class = _find_flat_unet()
        unet = self._load_unet_from("image_unet")
        source = load_frozen(network_class, self.location, torch_dtype=self.dtype, **TEXT_UNET)
        replace_transformer_blocks(unet, source)
        return unet

    def _get_condition(self, encoded: Any) -> Tensor:
        tokens = self.text_encoder.text_projection(encoded.last_hidden_state)
        return tokens / encoded.text_embeds[:, None].norm(dim=-1, keepdim=True)


def _find_flat_unet() -> Any:
    """The class of Versatile Diffusion's text network, which diffusers holds as deprecated.

    Raises:
        PerceptError: where it is no longer there.
    """
    try:
        from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import (
            UNetFlatConditionModel,
        )
    except ImportError as error:
        raise PerceptError(
            "This version of diffusers has no UNetFlatConditionModel any more, which Versatile"
            f" Diffusion's text flow needs: install diffusers {LAST_DIFFUSERS}."
        ) from error
    return UNetFlatConditionModel


class StableDiffusion(TextGenerator):
    """Stable Diffusion 1, conditioned on the text encoder's hidden states.

    It is the ROI project's generator.

    Source: Rombach et al. 2022, arXiv 2112.10752.
    """

    model_name, encoder_class = "stable_diffusion", "CLIPTextModel"

    def _get_condition(self, encoded: Any) -> Tensor:
        return encoded.last_hidden_state


def load_stable_diffusion_pipeline(
    weights: str = "hub", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The library's `StableDiffusionImg2ImgPipeline`, the ROI project's last step.

    It repaints an image after a sentence. The published pipeline paints what its safety checker
    suspects black, which would be scored as a reconstruction; here there is none.
    """
    import diffusers
    import transformers

    location = locate_model("stable_diffusion", weights)
    half = {"torch_dtype": dtype}
    with explain_loading("the scheduler's config", location, "scheduler"):
        config = diffusers.DDIMScheduler.load_config(location, subfolder="scheduler")
        scheduler_class = getattr(diffusers, config["_class_name"])
    pipeline: Any = diffusers.StableDiffusionImg2ImgPipeline(
        vae=load_frozen(diffusers.AutoencoderKL, location, subfolder="vae", **half),
        text_encoder=load_frozen(
            transformers.CLIPTextModel, location, subfolder="text_encoder", dtype=dtype
        ),
        tokenizer=load_frozen(transformers.CLIPTokenizer, location, subfolder="tokenizer"),
        unet=load_frozen(diffusers.UNet2DConditionModel, location, subfolder="unet", **half),
        scheduler=load_frozen(scheduler_class, location, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(device)

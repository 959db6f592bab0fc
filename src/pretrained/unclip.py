"""MindEye2's decoder of images: an SDXL unCLIP network, which paints from CLIP's patch tokens,
sampled as published.

- Its classes are diffusers': `UNet2DConditionModel` with a projection of the vector of sizes,
  `AutoencoderKL`, `EulerDiscreteScheduler`. The released checkpoint has the keys of Stability's
  generative-models; `convert_unclip_checkpoint` rewrites it once.
- All randomness is drawn from the noise that a picture begins with, row by row, so that it does not
  depend on the batch it was made in.
- The sampler is Euler's method over the legacy DDPM discretisation (Karras et al. 2022, arXiv
  2206.00364, algorithm 2 without churn): of the 1000 timesteps so many, evenly spaced from the last
  and rounded down; the step after the last goes to no noise.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from src.pretrained.autoencoder import LatentAutoencoder
from src.pretrained.base import load_pretrained
from src.pretrained.generators import ImageGenerator, cache_condition
from src.safe_pickle import load_torch_file
from src.utils import HOME, PerceptError, load_strictly

CHECKPOINT = "unclip6_epoch0_step110000.ckpt"

STEPS = 38  # published

UNET: dict[
    str,
    Any,
    # SDXL's network, but for what conditions it: bigG's patch tokens, and a vector of size and crop
    # alone
] = {
    "sample_size": 96,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 1664,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 1024,
}

VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "sample_size": 768,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def compute_euler_timesteps(steps: int) -> list[int]:
    """The timesteps of the legacy DDPM discretisation, from noise to image: `steps` of 999 ... 0,
    evenly spaced from the last and rounded down.
    """
    return np.linspace(999, 0, steps, endpoint=False).astype(int).tolist()


def embed_size_and_crop(size: tuple[int, int], crop: tuple[int, int], dim: int) -> Tensor:
    """SDXL's vector of original size and crop: sinusoidal embeddings of four numbers side by side,
    (1, dim).

    Args:
        size: (height, width) in pixels of the picture before it was cut.
        crop: (top, left) in pixels of what was cut out.
        dim: of the vector, a multiple of eight.

    Source: Podell et al. 2023 (SDXL), arXiv 2307.01952, section 2.2.
    """
    return get_timestep_embedding(
        torch.tensor([*size, *crop]), dim // 4, flip_sin_to_cos=True, downscale_freq_shift=0
    ).flatten()[None]


@torch.no_grad()
def denoise(
    unet: nn.Module,
    scheduler: Any,
    latents: Tensor,
    condition: Tensor,
    null: Tensor,
    vector: Tensor,
    guidance: float = 5.0,
    first: int = 0,
) -> Tensor:
    """Euler steps with classifier-free guidance, down to no noise.

    Args:
        unet: the network, with a projection of its vector.
        scheduler: an `EulerDiscreteScheduler` with its timesteps set.
        latents: (batch, channels, h, w) under noise as strong as the sigma of the first step.
        condition: (batch, tokens, dim).
        null: what stands for no condition, same shape.
        vector: (1, dim), see `embed_size_and_crop`.
        guidance: scale; 1 for none, at half the cost.
        first: index of the timestep to begin with.

    Returns:
        Latents (batch, channels, h, w), float32.
    """
    guided = guidance != 1.0
    both = torch.cat([null, condition]) if guided else condition  # (2 * batch, tokens, dim)
    vectors = vector.to(both).expand(len(both), -1)
    scheduler.set_begin_index(first)
    latents = latents.float()  # the sum of the steps stays in full precision
    with cache_condition(unet):
        for t in scheduler.timesteps[first:]:
            x = scheduler.scale_model_input(latents, t).to(both)
            predicted = unet(
                torch.cat([x, x]) if guided else x,
                t,
                encoder_hidden_states=both,
                class_labels=vectors,
            ).sample.float()
            if guided:
                without, given = predicted.chunk(2)
                predicted = without + guidance * (given - without)
            latents = scheduler.step(predicted, t, latents).prev_sample
    return latents


def _own_noise(rows: Tensor, shape: tuple[int, ...], purpose: str) -> Tensor:
    """Standard normal draws (batch, *shape), each from a seed made of its row of `rows` and of what
    it is for.
    """
    draws = []
    for row in rows.detach().to("cpu", torch.float32):
        seed = zlib.crc32(row.contiguous().numpy().tobytes(), zlib.crc32(purpose.encode()))
        draws.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(draws)


class UnclipDecoder(ImageGenerator):
    """SDXL unCLIP: CLIP's patch tokens, before its projection and without the class token -> image.

    Args:
        weights: "mini", a folder that holds `unclip/`, or "hub": then data/unclip/, which is made
            of the released checkpoint in data/mindeye2_models/ when it is first asked for.
        device: torch device.
        dtype: of the network; half precision on a GPU by default, as published. The autoencoder is
            in full precision.
        squeezed: the tokens are of images squeezed to [.5, 1], as the published networks predict
            them: what the autoencoder decodes, x in [-1, 1], becomes .8 x + .2 clipped to [0, 1]:
            the published correction, by which black comes out at .2 (the inverse would be x).
        offset_noise: standard deviation of the noise that all channels and places of a picture
            share at its beginning; .04 as published.

    Raises:
        PerceptError: if the weights are missing.

    Source: MindEye2 (arXiv 2403.11207), section 2.4.
    """

    model_name = "unclip"
    guidance = 5.0

    def __init__(
        self,
        weights: str = "hub",
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        squeezed: bool = False,
        offset_noise: float = 0.04,
    ):
        place = str(_released().parent) if weights == "hub" else weights
        LatentAutoencoder.__init__(
            self, place, self.model_name, device=device
        )  # not the other generators': they sample by UniPC
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        unet: Any = self._network().eval().requires_grad_(False).to(self.device)
        self.scheduler: Any = load_pretrained(
            EulerDiscreteScheduler, self.place, subfolder="scheduler", final_sigmas_type="zero"
        )
        self.squeezed, self.offset_noise = squeezed, offset_noise
        self.unet, self.network = unet, unet.config
        self.image_size = self.network.sample_size * self.factor
        self.vector = embed_size_and_crop(
            (self.image_size,) * 2, (0, 0), self.network.projection_class_embeddings_input_dim
        )

    def _options(self) -> dict[str, Any]:
        return super()._options() | ({"squeezed": True} if self.squeezed else {})

    def get_null_condition(self, condition: Tensor, noise: Tensor | None = None) -> Tensor:
        """What stands for no condition: standard normal noise of the tokens' shape, drawn anew for
        each image, as published.

        Args:
            condition: (batch, tokens, dim).
            noise: (batch, ...), each row of which is the seed of its image's; by default the
                condition is.
        """
        return _own_noise(
            condition if noise is None else noise, tuple(condition.shape[1:]), "null"
        ).to(condition)

    @torch.no_grad()
    def generate(
        self,
        condition: Tensor,
        noise: Tensor,
        init_latents: Tensor | None = None,
        strength: float = 1.0,
        guidance_scale: float = 0.0,
        num_inference_steps: int = STEPS,
    ) -> Tensor:
        """Generate images.

        Args:
            condition: (batch, tokens, dim).
            noise: (batch, channels, h, w), standard normal; the only source of randomness.
            init_latents: scaled latents (batch, channels, h, w) to start from (img2img, which is
                not published for this decoder).
            strength: share of the steps that are run; 1 ignores init_latents, 0 returns them
                decoded.
            guidance_scale: classifier-free guidance against `null`; 0: 5, as published, 1: none, at
                half the cost.
            num_inference_steps: of the whole schedule.

        Returns:
            Images (batch, 3, height, width) in [0, 1].

        Raises:
            PerceptError: for tokens of another dim than the network reads.
        """
        if condition.shape[-1] != (dim := self.network.cross_attention_dim):
            raise PerceptError(
                f"This unCLIP decoder paints from tokens of dim {dim}, not {condition.shape[-1]}:"
                " take the tokens of its own CLIP."
            )
        first = (
            num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
            if init_latents is not None
            else 0
        )
        if init_latents is not None and first == num_inference_steps:
            return self._corrected(self.decode(init_latents))
        self.scheduler.set_timesteps(
            timesteps=compute_euler_timesteps(num_inference_steps), device=self.device
        )
        begin = (
            _own_noise(noise, tuple(noise.shape[1:]), "begin")
            if not first or init_latents is None
            else init_latents.float().cpu()
        )
        shared = self.offset_noise * _own_noise(noise, (1, 1, 1), "offset")
        latents = begin + self.scheduler.sigmas[first] * (noise.float().cpu() + shared)
        given, null = (
            condition.to(self.device, self.dtype),
            self.get_null_condition(condition, noise).to(self.device, self.dtype),
        )
        latents = denoise(
            self.unet,
            self.scheduler,
            latents.to(self.device),
            given,
            null,
            self.vector,
            guidance_scale or self.guidance,
            first,
        )
        return self._corrected(self.decode(latents))

    def _corrected(self, images: Tensor) -> Tensor:
        return (0.8 * (2 * images - 1) + 0.2).clamp(0, 1) if self.squeezed else images


def convert_unclip_weights(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The released weights under diffusers' keys; averaged ones are taken where the file has them.

    Args:
        state: with the keys of Stability's generative-models: model.diffusion_model.*,
            first_stage_model.*, perhaps model_ema.*; what belongs to the conditioner (a CLIP) and
            the denoiser is left.

    Returns:
        State dicts of `UNet2DConditionModel(**UNET)` and of `AutoencoderKL(**VAE)`.

    Raises:
        PerceptError: if the file lacks either part, or parts of them.
    """
    kept = {
        part: [key for key in state if key.startswith(part)]
        for part in ("model.diffusion_model.", "first_stage_model.", "model_ema.diffusion_model")
    }
    network, first_stage, averaged = kept.values()
    if not network or not first_stage:
        raise PerceptError(
            f"These weights are of no unCLIP network (their keys begin with {sorted(state)[:3]}):"
            f" take {CHECKPOINT} as it was released."
        )
    try:
        unet = {key: state[_averaged_name(key)] if averaged else state[key] for key in network}
        made = (
            convert_ldm_unet_checkpoint(unet, UNET),
            convert_ldm_vae_checkpoint({key: state[key] for key in first_stage}, VAE),
        )
    except KeyError as error:
        raise PerceptError(
            f"The unCLIP weights lack {error.args[0]}: take {CHECKPOINT} as it was released."
        ) from error
    return made


def _averaged_name(key: str) -> str:
    """Where the moving average of a weight lies: its name within the wrapper, without the dots."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def convert_unclip_checkpoint(path: str | Path, folder: str | Path) -> None:
    """Rewrite the released checkpoint as `UnclipDecoder` reads it: folder/unet (half precision),
    folder/vae, folder/scheduler.

    Nothing but tensors is read of the file, and only those that are asked for.

    Args:
        path: the .ckpt file.
        folder: is made, and holds everything or nothing.

    Raises:
        PerceptError: if the file is missing, damaged or of another model, or the folder exists.
    """
    if (folder := Path(folder)).exists():
        raise PerceptError(f"{folder} exists already: remove it to convert {path} again.")
    content = load_torch_file(path)
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    parts = convert_unclip_weights(
        {key: value for key, value in content.items() if isinstance(value, Tensor)}
    )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for name, cls, config, state in zip(
            ("unet", "vae"), (UNet2DConditionModel, AutoencoderKL), (UNET, VAE), parts, strict=True
        ):
            dtype = torch.float16 if name == "unet" else torch.float32
            with torch.device("meta"):
                model: Any = cls(**config)
            model.to_empty(device="cpu").to(dtype)
            load_strictly(model, state, str(path))
            model.save_pretrained(temporary / name)
        scheduler: Any = EulerDiscreteScheduler(**SCHEDULER)
        scheduler.save_pretrained(temporary / "scheduler")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _released() -> Path:
    """The folder of the released decoder, which is made when it is first asked for."""
    folder, source = HOME / "data" / "unclip", HOME / "data" / "mindeye2_models" / CHECKPOINT
    if not folder.is_dir():
        if not source.exists():
            raise PerceptError(
                f"The unCLIP decoder is neither at {folder} nor at {source}: run 'python run.py"
                " download unclip', or set weights to a folder."
            )
        convert_unclip_checkpoint(source, folder)
    return folder

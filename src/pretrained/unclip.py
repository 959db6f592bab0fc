"""MindEye2's decoder of images: an SDXL unCLIP network, conditioned on CLIP's patch tokens.

- Its classes are diffusers': `UNet2DConditionModel` with a projection of the vector of sizes,
  `AutoencoderKL`, `EulerDiscreteScheduler`. The released checkpoint has the keys of Stability's
  generative-models; `convert_unclip_checkpoint` rewrites it once.
- All randomness is drawn from the noise that an image starts from, row by row, so that it does not
  depend on the other images of the batch.
- The sampler is Euler's method over the legacy DDPM discretisation (Karras et al. 2022, arXiv
  2206.00364, algorithm 2 without churn): of the 1000 timesteps as many as there are steps, evenly
  spaced from the last and rounded down; the last step goes to no noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src import utils
from src.files.ownership import lock_folder, replace_folder
from src.pretrained.autoencoder import LatentAutoencoder
from src.pretrained.base import choose_dtype, freeze, load_frozen
from src.pretrained.generators import ImageGenerator, cache_condition
from src.safe_pickle import load_torch_file
from src.utils import PerceptError, load_strictly

CHECKPOINT = "unclip6_epoch0_step110000.ckpt"

STEPS = 38  # published

# SDXL's network but for its conditions: bigG's patch tokens, and a vector of size and crop alone
UNET: dict[str, Any] = {
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
    """The timesteps of the legacy DDPM discretisation, from noise to image.

    They are `steps` of 999 ... 0, evenly spaced from the last and rounded down.
    """
    return np.linspace(999, 0, steps, endpoint=False).astype(int).tolist()


def embed_size_and_crop(size: tuple[int, int], crop: tuple[int, int], dim: int) -> Tensor:
    """SDXL's vector of original size and crop, (1, dim).

    It is the sinusoidal embeddings of four numbers side by side.

    Args:
        size: (height, width) in pixels of the image before it was cropped.
        crop: (top, left) in pixels of the crop.
        dim: of the vector, a multiple of eight.

    Source: Podell et al. 2023 (SDXL), arXiv 2307.01952, section 2.2.
    """
    from diffusers.models.embeddings import get_timestep_embedding

    numbers = torch.tensor([*size, *crop])
    embeddings = get_timestep_embedding(
        numbers, dim // 4, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    return embeddings.flatten()[None]


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
        latents: (batch, channels, h, w) with noise of the first step's sigma.
        condition: (batch, tokens, dim).
        null: what stands for no condition, same shape.
        vector: (1, dim), see `embed_size_and_crop`.
        guidance: scale; 1 for none, at half the cost.
        first: index of the first timestep.

    Returns:
        Latents (batch, channels, h, w), float32.
    """
    guided = guidance != 1.0
    if guided:
        condition = torch.cat([null, condition])  # (2 * batch, tokens, dim)
    vectors = vector.to(condition).expand(len(condition), -1)
    scheduler.set_begin_index(first)
    latents = latents.float()  # the sum of the steps stays in full precision
    with cache_condition(unet):
        for t in scheduler.timesteps[first:]:
            x = scheduler.scale_model_input(latents, t).to(condition)
            if guided:
                x = torch.cat([x, x])
            output = unet(x, t, encoder_hidden_states=condition, class_labels=vectors)
            predicted = output.sample.float()
            if guided:
                null_pred, conditional_pred = predicted.chunk(2)
                predicted = null_pred + guidance * (conditional_pred - null_pred)
            latents = scheduler.step(predicted, t, latents).prev_sample
    return latents


def _draw_noise(rows: Tensor, shape: tuple[int, ...], purpose: str) -> Tensor:
    """Standard normal draws (batch, *shape), each seeded by its row of `rows` and the purpose."""
    purpose_seed = zlib.crc32(purpose.encode())
    draws = []
    for row in rows.detach().to("cpu", torch.float32):
        seed = zlib.crc32(row.contiguous().numpy().tobytes(), purpose_seed)
        source = torch.Generator().manual_seed(seed)
        draws.append(torch.randn(shape, generator=source))
    return torch.stack(draws)


class UnclipDecoder(ImageGenerator):
    """SDXL unCLIP, conditioned on CLIP's patch tokens before its projection.

    Args:
        weights: "mini", a folder that holds `unclip/`, or "hub": then data/unclip/, which is made
            of the released checkpoint in data/mindeye2_models/ when it is first needed.
        device: torch device.
        dtype: of the network; half precision on a GPU by default, as published. The autoencoder is
            in full precision.
        squeezed: the tokens are of images squeezed to [.5, 1], as the published networks predict
            them: what the autoencoder decodes, x in [-1, 1], becomes .8 x + .2 clipped to [0, 1].
            That is the published correction, by which black comes out at .2 (the inverse would be
            x).
        offset_noise: standard deviation of the starting noise that all channels and locations of an
            image share; .04 as published.

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
        from diffusers import EulerDiscreteScheduler

        if weights == "hub":
            weights = str(_make_released_folder().parent)
        # not ImageGenerator.__init__: the other generators sample by UniPC
        LatentAutoencoder.__init__(self, weights, self.model_name, device=device)
        self.dtype = choose_dtype(dtype, self.device)
        self.unet = freeze(self._load_unet(), self.device)
        self.scheduler = load_frozen(
            EulerDiscreteScheduler,
            self.location,
            subfolder="scheduler",
            final_sigmas_type="zero",
        )
        self.squeezed = squeezed
        self.offset_noise = offset_noise
        self.network = self.unet.config
        self.image_size = self.network.sample_size * self.factor
        size = (self.image_size, self.image_size)
        dim = self.network.projection_class_embeddings_input_dim
        self.vector = embed_size_and_crop(size, (0, 0), dim)

    def get_options(self) -> dict[str, Any]:
        """Side of the images, and `squeezed` where it is set."""
        options = super().get_options()
        return options | {"squeezed": True} if self.squeezed else options

    def get_null_condition(self, condition: Tensor, noise: Tensor | None = None) -> Tensor:
        """What stands for no condition: standard normal noise, drawn anew for each image.

        The published code does so too.

        Args:
            condition: (batch, tokens, dim).
            noise: (batch, ...), each row of which is the seed of its image's; by default the
                condition is.
        """
        seeds = condition if noise is None else noise
        return _draw_noise(seeds, tuple(condition.shape[1:]), "null").to(condition)

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
            guidance_scale: classifier-free guidance against the null condition; 0: 5, as
                published, 1: none, at half the cost.
            num_inference_steps: of the whole schedule.

        Returns:
            Images (batch, 3, height, width) in [0, 1].

        Raises:
            PerceptError: for tokens of another dim than the network reads.
        """
        dim = self.network.cross_attention_dim
        if condition.shape[-1] != dim:
            raise PerceptError(
                f"This unCLIP decoder paints from tokens of dim {dim}, not {condition.shape[-1]}:"
                " take the tokens of its own CLIP."
            )
        first = 0
        if init_latents is not None:
            steps = min(int(num_inference_steps * strength), num_inference_steps)
            first = num_inference_steps - steps
            if not steps:
                return self._correct(self.decode(init_latents))
        timesteps = compute_euler_timesteps(num_inference_steps)
        self.scheduler.set_timesteps(timesteps=timesteps, device=self.device)
        if first and init_latents is not None:
            start = init_latents.float().cpu()
        else:
            start = _draw_noise(noise, tuple(noise.shape[1:]), "begin")
        shared = self.offset_noise * _draw_noise(noise, (1, 1, 1), "offset")
        latents = start + self.scheduler.sigmas[first] * (noise.float().cpu() + shared)
        null = self.get_null_condition(condition, noise)
        latents = denoise(
            self.unet,
            self.scheduler,
            latents.to(self.device),
            condition.to(self.device, self.dtype),
            null.to(self.device, self.dtype),
            self.vector,
            guidance_scale or self.guidance,
            first,
        )
        return self._correct(self.decode(latents))

    def _correct(self, images: Tensor) -> Tensor:
        """The published correction of images of squeezed tokens; others stay as they are."""
        if not self.squeezed:
            return images
        return (0.8 * (2 * images - 1) + 0.2).clamp(0, 1)


def convert_unclip_weights(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The released weights under diffusers' keys; moving averages where the file has them.

    Args:
        state: with the keys of Stability's generative-models: model.diffusion_model.*,
            first_stage_model.*, perhaps model_ema.*; what belongs to the conditioner (a CLIP) and
            the denoiser is ignored.

    Returns:
        State dicts of `UNet2DConditionModel(**UNET)` and of `AutoencoderKL(**VAE)`.

    Raises:
        PerceptError: if the file lacks either part, or parts of them.
    """
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    unet_keys = [key for key in state if key.startswith("model.diffusion_model.")]
    vae_keys = [key for key in state if key.startswith("first_stage_model.")]
    has_averages = any(key.startswith("model_ema.diffusion_model") for key in state)
    if not unet_keys or not vae_keys:
        raise PerceptError(
            f"These weights are of no unCLIP network (their keys begin with {sorted(state)[:3]}):"
            f" take {CHECKPOINT} as it was released."
        )
    try:
        unet = {}
        for key in unet_keys:
            unet[key] = state[_name_average(key)] if has_averages else state[key]
        vae = {key: state[key] for key in vae_keys}
        return convert_ldm_unet_checkpoint(unet, UNET), convert_ldm_vae_checkpoint(vae, VAE)
    except KeyError as error:
        raise PerceptError(
            f"The unCLIP weights lack {error.args[0]}: take {CHECKPOINT} as it was released."
        ) from error


def _name_average(key: str) -> str:
    """The key of a weight's moving average: its name within the wrapper, without the dots."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def convert_unclip_checkpoint(path: str | Path, folder: str | Path) -> None:
    """Rewrite the released checkpoint as `UnclipDecoder` reads it.

    That is folder/unet (half precision), folder/vae, folder/scheduler. Only tensors are read from
    the file, and only those that are needed.

    Args:
        path: the .ckpt file.
        folder: is made, and holds everything or nothing.

    Raises:
        PerceptError: if the file is missing, damaged or of another model, or the folder exists.
    """
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    folder = Path(folder)
    if folder.exists():
        raise PerceptError(f"{folder} exists already: remove it to convert {path} again.")
    content = load_torch_file(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {}
    if isinstance(state, Mapping):
        tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    unet_state, vae_state = convert_unclip_weights(tensors)
    with replace_folder(folder) as temporary:
        unet = _build_on_cpu(UNet2DConditionModel, UNET, torch.float16)
        load_strictly(unet, unet_state, str(path))
        unet.save_pretrained(temporary / "unet")
        vae = _build_on_cpu(AutoencoderKL, VAE, torch.float32)
        load_strictly(vae, vae_state, str(path))
        vae.save_pretrained(temporary / "vae")
        scheduler: Any = EulerDiscreteScheduler(**SCHEDULER)
        scheduler.save_pretrained(temporary / "scheduler")


def _build_on_cpu(cls: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A network with weights that are not initialised."""
    with torch.device("meta"):
        network = cls(**config)
    return network.to_empty(device="cpu").to(dtype)


def _make_released_folder() -> Path:
    """The folder of the released decoder, which is made when it is first needed."""
    folder = utils.HOME / "data" / "unclip"
    source = utils.HOME / "data" / "mindeye2_models" / CHECKPOINT
    if not folder.is_dir():
        if not source.exists():
            raise PerceptError(
                f"The unCLIP decoder is neither at {folder} nor at {source}: run 'python run.py"
                " download unclip', or set weights to a folder."
            )
        with lock_folder(folder, "converting the unCLIP decoder", wait=True, as_sibling=True):
            if not folder.is_dir():
                convert_unclip_checkpoint(source, folder)
    return folder

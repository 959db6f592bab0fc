"""What is frozen: CLIP, the latent autoencoder, four diffusion models, BLIP and the mini world's
judge, each behind one small class.

- Real and miniature weights are loaded by the same code; only the place differs: `weights` is
  "hub", "mini" or a folder that holds the models under the names of `HUB`.
- Images are float tensors (batch, 3, height, width) in [0, 1] everywhere; tokens are (batch,
  tokens, dim) with the CLS token first.
- Every class has a `fingerprint()`: model, revision, versions, and the features of one fixed image,
  which tell silent drift of a library.
- Versatile Diffusion's image flow is run on its image network alone. The published code runs the
  dual-guided network with a mix ratio of 0 for the text, which computes the text attention and then
  multiplies it by zero: same result, a third of the work saved.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
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
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    GitForCausalLM,
    GitProcessor,
    ResNetForImageClassification,
)
from transformers.modeling_outputs import BaseModelOutput

from src.utils import HOME, ROOT, PerceptError, load_strictly, progress, same_features

HUB = {
    "clip": "openai/clip-vit-large-patch14",
    "clip-ViT-B-32": "openai/clip-vit-base-patch32",
    "clip-bigG": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "versatile_diffusion": "shi-labs/versatile-diffusion",
    "image_variation": "lambdalabs/sd-image-variations-diffusers",
    # where the withdrawn runwayml/stable-diffusion-v1-5 lives on
    "stable_diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "blip": "Salesforce/blip-image-captioning-large",
    "git": "microsoft/git-large-coco",
}
REVISIONS = {HUB["image_variation"]: "v2.0"}  # others: what their authors have last given
MINI_ONLY = ("judge", "teacher", "unclip")
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
MINI = ROOT / "data" / "mini_models"
# The miniature's file holds the transformer blocks alone, all that is ever run; low_cpu_mem_usage
# would leave the rest without memory.
TEXT_UNET = {"subfolder": "text_unet", "low_cpu_mem_usage": False}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def locate(name: str, weights: str) -> str:
    """Where a pretrained model lies: a hub id for "hub", else a folder.

    Raises:
        PerceptError: if the folder is missing.
    """
    if name not in (*HUB, *MINI_ONLY):
        raise PerceptError(
            f"No pretrained model is called '{name}': choose one of"
            f" {', '.join((*HUB, *MINI_ONLY))}."
        )
    if weights == "hub":
        if name in MINI_ONLY:
            raise PerceptError(
                f"The '{name}' exists for the mini world alone: set weights to 'mini' or to a"
                " folder that holds it."
            )
        return HUB[name]
    folder = (MINI if weights == "mini" else Path(weights)) / name
    if not folder.is_dir():
        hint = (
            "restore data/mini_models from git"
            if weights == "mini"
            else "set weights to 'hub', 'mini' or a folder that holds it"
        )
        raise PerceptError(f"The pretrained model '{name}' is not at {folder}: {hint}.")
    return str(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars and their reports of weights that another part of the
    same file holds.
    """
    libraries = (transformers.logging, diffusers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        transformers.logging.enable_progress_bar()
        diffusers.utils.logging.enable_progress_bar()


def _load(cls: Any, place: str, **options: Any) -> Any:
    """`from_pretrained` with a plain sentence when a file is missing or the hub cannot be reached."""
    try:
        with _quiet():
            return cls.from_pretrained(
                place, **({"revision": REVISIONS[place]} if place in REVISIONS else {}), **options
            )
    except (OSError, ValueError) as error:
        part = f" ({options['subfolder']})" if "subfolder" in options else ""
        raise PerceptError(
            f"Could not load {cls.__name__} from '{place}'{part}: {str(error).splitlines()[0]}"
            " Check the connection to the hub, or set weights to 'mini' or to a folder that holds"
            " the model."
        ) from error


def _resized(images: Tensor, side: int) -> Tensor:
    """Images (batch, 3, height, width) -> (batch, 3, side, side); those that have that size stay as
    they are.
    """
    return (
        images
        if images.shape[-2:] == (side, side)
        else F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    )


def _token_ids(tokenizer: Any, captions: Sequence[str], model: Any) -> Tensor:
    """Token ids (captions, positions) of sentences, filled up to the positions that the text model
    has, where it lives.
    """
    length = model.config.max_position_embeddings
    ids = tokenizer(
        list(captions),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids.to(model.device)


def take_transformers(taker: nn.Module, donor: nn.Module) -> None:
    """Put the transformer blocks of one flow's network in the place of another's: all by which
    Versatile Diffusion's flows differ in use.
    """
    for name, module in list(donor.named_modules()):
        if isinstance(module, Transformer2DModel):
            taker.set_submodule(name, module)


def clip_normalise(images: Tensor) -> Tensor:
    """(batch, 3, height, width) in [0, 1], with the mean and spread of CLIP's training images taken
    out.
    """
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (CLIP_MEAN, CLIP_STD)
    )
    return (images - mean) / std


@contextmanager
def constant_condition(unet: nn.Module) -> Iterator[None]:
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


def fixed_image(size: int = 224) -> Tensor:
    """One image that never changes, (1, 3, size, size): smooth waves of three frequencies, for
    comparing features between versions.
    """
    axis = torch.linspace(0, 1, size)
    waves = [
        torch.sin(2 * torch.pi * (f * axis[None, :] + g * axis[:, None]))
        for f, g in ((1, 2), (3, 1), (2, 5))
    ]
    return (torch.stack(waves)[None] + 1) / 2


class Frozen:
    """What the frozen models share: a place, a device, and a fingerprint."""

    def __init__(self, name: str, weights: str, device: str):
        self.name, self.weights, self.device = name, weights, torch.device(device)
        self.place = locate(name, weights)

    def _options(self) -> dict[str, Any]:
        return {}

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of what `encode_pixels` gives for one image."""
        raise NotImplementedError

    def encode_pixels(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (batch, height, width, 3) -> targets (batch, *target_shape) float32, in the
        form that the cache of targets asks for.
        """
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        return self._encode(x).float().cpu().numpy()

    def _encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def golden_features(self) -> list[float]:
        """Eight numbers from the features of `fixed_image`, rounded to four decimals."""
        flat = self._encode(fixed_image()).float().flatten().cpu()
        return [round(float(v), 4) for v in flat[:: max(1, len(flat) // 8)][:8]]

    def fingerprint(self) -> dict[str, Any]:
        """Model, revision, options, library versions and golden features, for the cache of targets
        and for provenance.

        Raises:
            PerceptError: if the folder records golden features and these differ: a library computes
                something else than it did.
        """
        golden = self.golden_features()
        recorded = Path(self.place) / "golden_features.json"
        key = json.dumps([type(self).__name__, self._options()], sort_keys=True)
        if recorded.exists() and key in (known := json.loads(recorded.read_text())):
            if not same_features(known[key], golden):
                worst = max(abs(a - b) for a, b in zip(golden, known[key], strict=True))
                raise PerceptError(
                    f"{type(self).__name__} of '{self.place}' no longer gives the features recorded"
                    f" with it (largest difference {worst:.3g}): a library has changed what it"
                    " computes; install the versions of requirements.lock."
                )
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "diffusers": diffusers.__version__,
        }
        place = f"mini:{self.name}" if self.weights == "mini" else self.place
        return {
            "model": place,
            "revision": self._revision(),
            **self._options(),
            "golden": golden,
            "versions": versions,
        }

    def _revision(self) -> str:
        if not Path(self.place).is_dir():
            return str(getattr(getattr(self, "config", None), "_commit_hash", "") or "main")
        digest = hashlib.sha256()
        for file in sorted(Path(self.place).rglob("*.safetensors")):
            digest.update(
                file.read_bytes()
                if self.weights == "mini"
                else f"{file.name}{file.stat().st_size}".encode()
            )
        return digest.hexdigest()[:12]


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
        self.place, self.model = place, _load(CLIPVisionModelWithProjection, place).float()
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
                _load(CLIPTextModelWithProjection, self.place)
                .float()
                .eval()
                .requires_grad_(False)
                .to(self.model.device)
            )
            self._text = _load(CLIPTokenizer, self.place), model
        tokenizer, model = self._text
        return model(input_ids=_token_ids(tokenizer, captions, model)).text_embeds


class Clipper(Frozen):
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
            _ResNetClip(variant, weights) if resnet else _VisionClip(locate(self.name, weights))
        )
        self.model: Any = network.eval().requires_grad_(False).to(self.device)
        self.place, self.config = network.place, getattr(network, "config", None)
        self.size, self.dim = network.size, network.dim
        self.tokens = (
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
        return (self.tokens, self.dim) if self.hidden else (self.dim,)

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
        return clip_normalise(images)

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


class PatchClip(Frozen):
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
        tokens = self.model.embed_patches(clip_normalise((x + 1) / 2 if self.squeezed else x))
        if self.kept == self.side:
            return tokens
        grid = tokens.mT.unflatten(2, (self.side, self.side))  # (batch, dim, h, w)
        return F.adaptive_avg_pool2d(grid, self.kept).flatten(2).mT


class LatentAutoencoder(Frozen):
    """The frozen VAE of a diffusion model; latents are the posterior's mode times the scaling
    factor.

    Args:
        weights: "hub", "mini" or a folder.
        name: the model whose VAE it is (the published low-level branch uses that of image
            variations).
        image_size: side to which images are resized (bilinear, antialiased) before encoding; 0: the
            VAE's own (512 where it does not say).
        device: torch device.
    """

    def __init__(
        self,
        weights: str = "hub",
        name: str = "versatile_diffusion",
        image_size: int = 0,
        device: str = "cpu",
    ):
        super().__init__(name, weights, device)
        self.model = (
            _load(AutoencoderKL, self.place, subfolder="vae")
            .float()
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )
        self.config = self.model.config
        self.image_size = image_size or (self.config.sample_size if weights == "mini" else 512)
        self.factor = 2 ** (len(self.config.block_out_channels) - 1)
        self.scale = float(self.config.scaling_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        side = self.image_size // self.factor
        return (self.config.latent_channels, side, side)

    def _options(self) -> dict[str, Any]:
        return {"image_size": self.image_size}

    @property
    def target_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of a latent."""
        return self.latent_shape

    def _encode(self, images: Tensor) -> Tensor:
        return self.encode(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> scaled latents (batch, channels, h, w)."""
        parts = []
        for some in images.split(self._at_once):
            x = _resized(some.to(self.device), self.image_size)
            parts.append(self.model.encode(2 * x - 1).latent_dist.mode() * self.scale)
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (batch, channels, h, w) -> images (batch, 3, height, width) clamped to [0,
        1].
        """
        parts = [
            self.model.decode(some.to(self.device) / self.scale).sample
            for some in latents.split(self._at_once)
        ]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    @property
    def _at_once(self) -> int:
        """Images that the network sees at a time: 4 of 512 pixels a side, each of whose activations
        take half a gigabyte.
        """
        return max(1, 2**20 // self.image_size**2)


def untrained_vae(weights: str = "hub", name: str = "stable_diffusion") -> Any:
    """The VAE of a diffusion model without its weights, for planning: the folder's own, or as those
    of the hub are.
    """
    if weights != "hub":
        return AutoencoderKL.from_config(
            AutoencoderKL.load_config(locate(name, weights), subfolder="vae")
        )
    widths = (128, 256, 512, 512)
    types = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return AutoencoderKL(block_out_channels=widths, layers_per_block=2, sample_size=512, **types)


def judge_input(images: Tensor) -> Tensor:
    """Images (batch, 3, 32, 32) in [0, 1] as the judge takes them, in training as in use: 64 pixels
    a side, in [-1, 1].
    """
    return 2 * F.interpolate(images, (64, 64), mode="bilinear") - 1


class Judge:
    """The classifier that says what a picture of the mini world shows: scene, kind and colour of
    the main object.

    It was trained on images of its own, and nothing was ever trained towards it or conditioned on
    it, so that it judges reconstructions from outside. There is one for the mini world alone:
    photographs have no such small set of answers.

    Args:
        weights: "mini" or a folder that holds `judge/`.
        device: torch device.
    """

    def __init__(self, weights: str = "mini", device: str = "cpu"):
        self.device = torch.device(device)
        self.model = (
            _load(ResNetForImageClassification, locate("judge", weights))
            .float()
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )
        self.answers: dict[str, list[str]] = {}  # by question, in the order of the logits
        for i in range(self.model.config.num_labels):
            question, answer = self.model.config.id2label[i].split(": ")
            self.answers.setdefault(question, []).append(answer)

    @property
    def chance(self) -> dict[str, float]:
        """Share of right answers by guessing, by question."""
        return {question: 1 / len(answers) for question, answers in self.answers.items()}

    @torch.no_grad()
    def ask(self, images: Tensor, batch_size: int = 250) -> dict[str, np.ndarray]:
        """(images, 3, 32, 32) in [0, 1] -> answers (images,) by question."""
        starts = range(0, len(images), batch_size)
        parts = [
            self.model(judge_input(images[i : i + batch_size].float().to(self.device))).logits
            for i in starts
        ]
        by_question = (
            torch.cat(parts).cpu().split([len(answers) for answers in self.answers.values()], dim=1)
        )
        return {
            q: np.array(names)[logits.argmax(1)]
            for (q, names), logits in zip(self.answers.items(), by_question, strict=True)
        }


# ---------------------------------------------------------------------------------------- captions
# tokens of a caption, the one that begins it counted: the library's default when the ROI project
# was published (today's is one more)
MAX_LENGTH = 20


class Captioner(Frozen):
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
            _load(BlipForConditionalGeneration, self.place, dtype=self.dtype)
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )
        self.processor: Any = _load(BlipProcessor, self.place)
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


class GivenTokens(nn.Module):
    """Stands where GIT has its image encoder: what it is called with, (batch, 1, tokens, dim), are
    the hidden states already.
    """

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """(batch, 1, tokens, dim) -> hidden states (batch, tokens, dim); of rank 4, because GIT
        takes nothing else for one image.
        """
        return BaseModelOutput(last_hidden_state=pixel_values[:, 0])


class BrainCaptioner(Frozen):
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
            _load(GitForCausalLM, self.place, dtype=self.dtype)
            .eval()
            .requires_grad_(False)
            .to(self.device)
        )
        self.processor: Any = _load(GitProcessor, self.place)
        self.config = self.model.config
        self.size = int(self.config.vision_config.image_size)
        self.encoder, self.model.git.image_encoder = self.model.git.image_encoder, GivenTokens()

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


def without(captions: Sequence[str], word: str = "blurry ") -> list[str]:
    """Captions with a substring left out ("" for none): what BLIP says of a decoder's picture, as
    the ROI project did, lest the generator paints it blurry.
    """
    return [caption.replace(word, "") for caption in captions]


# ------------------------------------------------------------------------- the low level's teacher
class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # (batch, h, w, dim)
        return x + self.pwconv2(F.gelu(self.pwconv1(y))).permute(0, 3, 1, 2)


class ConvNeXtMaps(nn.Module):
    """ConvNeXt without layer scale, and the head that makes VICRegL's local embeddings of its last
    feature map.

    Args:
        dims: widths of the four stages.
        depths: their blocks.
        maps: widths of the head; the last is that of an embedding.

    Source: Liu et al. 2022 (arXiv 2201.03545); Bardes et al. 2022 (arXiv 2210.01571). The defaults
    are the released XL network.
    """

    def __init__(
        self,
        dims: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 3, 27, 3),
        maps: Sequence[int] = (512, 512, 512),
    ):
        super().__init__()
        narrow = [
            nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), _ChannelNorm(dims[0], eps=1e-6))
        ]
        narrow += [
            nn.Sequential(_ChannelNorm(a, eps=1e-6), nn.Conv2d(a, b, 2, stride=2))
            for a, b in zip(dims, dims[1:], strict=False)
        ]
        backbone = {
            "downsample_layers": nn.ModuleList(narrow),
            "stages": nn.ModuleList(
                nn.Sequential(*[_ConvNeXtBlock(dim) for _ in range(depth)])
                for dim, depth in zip(dims, depths, strict=True)
            ),
            "norm": nn.LayerNorm(dims[-1], eps=1e-6),
        }
        self.backbone = nn.ModuleDict(backbone)
        self.maps_projector = nn.Sequential(
            nn.Linear(dims[-1], maps[0]),
            nn.LayerNorm(maps[0]),
            nn.ReLU(),
            nn.Linear(maps[0], maps[1]),
            nn.LayerNorm(maps[1]),
            nn.ReLU(),
            nn.Linear(maps[1], maps[2], bias=False),
        )
        self.width: int = maps[2]

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, height, width) -> local embeddings (batch, height / 32 *
        width / 32, maps).
        """
        for narrow, stage in zip(
            self.backbone["downsample_layers"], self.backbone["stages"], strict=True
        ):  # type: ignore[call-overload]
            x = stage(narrow(x))
        return self.maps_projector(self.backbone["norm"](x.flatten(2).transpose(1, 2)))


TEACHER_FILE = "convnext_xlarge_alpha0.75_fullckpt.pth"
TEACHER_MEAN, TEACHER_STD = (
    (0.485, 0.456, 0.406),
    (0.228, 0.224, 0.225),
)  # .228 for ImageNet's .229: a slip of the published code, kept with its weights


class Teacher(Frozen):
    """The network whose local embeddings the low level's contrastive loss compares with: VICRegL's
    ConvNeXt-XL, or its miniature.

    Args:
        weights: "mini", or a folder that holds `teacher/`, with the authors' file in it, or "hub":
            then that file is looked for in data/teacher/, as it lies on no hub.
        device: torch device.

    Source: MindEye (arXiv 2305.18274), section 2.5; Bardes et al. 2022.
    """

    def __init__(self, weights: str = "hub", device: str = "cpu"):
        self.name, self.weights, self.device = "teacher", weights, torch.device(device)
        self.place = (
            str(HOME / "data" / "teacher") if weights == "hub" else locate("teacher", weights)
        )
        described = Path(self.place) / "config.json"
        config = json.loads(described.read_text()) if described.exists() else {}
        self.image_size = int(config.pop("image_size", 512))
        self.model = ConvNeXtMaps(**config)
        load_strictly(self.model, self._state(), self.place)
        self.model.eval().requires_grad_(False).to(self.device)
        self.dim = self.model.width

    def _state(self) -> dict[str, Tensor]:
        if (ours := Path(self.place) / "model.safetensors").exists():
            return {key: value.float() for key, value in load_file(ours).items()}
        path = Path(self.place) / TEACHER_FILE
        if not path.exists():
            raise PerceptError(
                f"The teacher of the low level is not at {path}: put VICRegL's file there (its"
                " authors give it), or set use_cont to False."
            )
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state = {
            key.removeprefix("module."): value
            for key, value in content.get("model", content).items()
        }
        return {
            key: value
            for key, value in state.items()
            if key.startswith(("backbone.", "maps_projector."))
        }  # the file has VICRegL's other heads too

    @property
    def target_shape(self) -> tuple[int, int]:
        """(locations, dim)."""
        return (self.image_size // 32) ** 2, self.dim

    def _options(self) -> dict[str, Any]:
        return {"image_size": self.image_size}

    def _encode(self, images: Tensor) -> Tensor:
        return self.maps(images)

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> local embeddings (batch, locations, dim), row by
        row from the upper left.
        """
        x = _resized(images.to(self.device), self.image_size)
        mean, std = (
            torch.tensor(values, device=x.device).view(1, 3, 1, 1)
            for values in (TEACHER_MEAN, TEACHER_STD)
        )
        return self.model((x - mean) / std)


class Generator(LatentAutoencoder):
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
        self.scheduler = _load(UniPCMultistepScheduler, self.place, **options)

    def _network(self) -> nn.Module:
        return _load(
            UNet2DConditionModel, self.place, subfolder=self.unet_folder, torch_dtype=self.dtype
        )

    def null(self, condition: Tensor) -> Tensor:
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
            torch.cat([self.null(condition), condition]) if guided else condition
        )  # (2 * batch, tokens, dim)
        with constant_condition(self.unet):
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
    def published_start(self, latents: Tensor, noise: Tensor) -> Tensor:
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
            latents.split(self._at_once), noise.split(self._at_once), strict=True
        ):
            picture = (
                self.model.decode(some.to(self.device) / self.scale).sample / 2 + 0.5
            )  # not clamped, as published
            posterior = self.model.encode(clip_normalise(picture)).latent_dist
            parts.append((posterior.mean + posterior.std * draw.to(self.device)) * self.scale)
        return torch.cat(parts)


class VersatileDiffusion(Generator):
    """Versatile Diffusion's image flow: all projected CLIP tokens, divided by the norm of the CLS
    token -> image.

    Source: arXiv 2211.08332; used as MindEye does (UniPC order 2, 20 steps, guidance 3.5, null
    condition of zeros).
    """

    model_name, unet_folder = "versatile_diffusion", "image_unet"


class ImageVariation(Generator):
    """Stable Diffusion image variations: one CLIP image embedding (batch, 1, dim), not normalised
    -> image (MindEye's 1x768 models).
    """

    model_name = "image_variation"
    guidance = 7.5


class TextGenerator(Generator):
    """A generator that is guided by sentences; its null condition is that of an empty sentence."""

    encoder_class: Any = CLIPTextModelWithProjection

    def __init__(self, weights: str = "hub", device: str = "cpu", dtype: torch.dtype | None = None):
        super().__init__(weights, device, dtype)
        self.tokenizer = _load(CLIPTokenizer, self.place, subfolder="tokenizer")
        encoder = _load(self.encoder_class, self.place, subfolder="text_encoder")
        self.text_encoder = encoder.float().eval().requires_grad_(False).to(self.device)
        self._empty = self.embed_text([""])

    def null(self, condition: Tensor) -> Tensor:
        """The condition of an empty sentence, as often as `condition` has rows."""
        return self._empty.to(condition).expand_as(condition)

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Captions -> the condition that `generate` takes, (captions, tokens, dim)."""
        return self._condition(
            self.text_encoder(input_ids=_token_ids(self.tokenizer, captions, self.text_encoder))
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
        unet = _load(
            UNet2DConditionModel, self.place, subfolder="image_unet", torch_dtype=self.dtype
        )
        take_transformers(
            unet, _load(UNetFlatConditionModel, self.place, torch_dtype=self.dtype, **TEXT_UNET)
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


# -------------------------------------------------------------------- the libraries' own pipelines
def versatile_pipeline(
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
    place = locate("versatile_diffusion", weights)
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
        name: _load(cls, place, **{"subfolder": name} | options)
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


def image_variation_pipeline(
    weights: str = "hub", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The library's `StableDiffusionImageVariationPipeline`, which is conditioned on one CLIP
    embedding (the 1x768 model's generator).
    """
    return _load(
        StableDiffusionImageVariationPipeline, locate("image_variation", weights), dtype=dtype
    ).to(device)


def stable_diffusion_pipeline(
    weights: str = "hub", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """The library's `StableDiffusionImg2ImgPipeline`, which repaints an image after a sentence (the
    ROI project's last step).
    """
    return _load(
        StableDiffusionImg2ImgPipeline, locate("stable_diffusion", weights), dtype=dtype
    ).to(device)

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from src.utils import ROOT, PerceptError, same_features

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

MINI_MODELS = ROOT / "data" / "mini_models"

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def locate_model(name: str, weights: str) -> str:
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
    folder = (MINI_MODELS if weights == "mini" else Path(weights)) / name
    if not folder.is_dir():
        hint = (
            "restore data/mini_models from git"
            if weights == "mini"
            else "set weights to 'hub', 'mini' or a folder that holds it"
        )
        raise PerceptError(f"The pretrained model '{name}' is not at {folder}: {hint}.")
    return str(folder)


@contextmanager
def silence_libraries() -> Iterator[None]:
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


def load_pretrained(cls: Any, place: str, **options: Any) -> Any:
    """`from_pretrained` with a plain sentence when a file is missing or the hub cannot be reached."""
    try:
        with silence_libraries():
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


def resize_images(images: Tensor, side: int) -> Tensor:
    """Images (batch, 3, height, width) -> (batch, 3, side, side); those that have that size stay as
    they are.
    """
    return (
        images
        if images.shape[-2:] == (side, side)
        else F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    )


def tokenize_captions(tokenizer: Any, captions: Sequence[str], model: Any) -> Tensor:
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


def normalise_for_clip(images: Tensor) -> Tensor:
    """(batch, 3, height, width) in [0, 1], with the mean and spread of CLIP's training images taken
    out.
    """
    mean, std = (
        torch.tensor(values, device=images.device).view(1, 3, 1, 1)
        for values in (CLIP_MEAN, CLIP_STD)
    )
    return (images - mean) / std


def make_fixed_image(size: int = 224) -> Tensor:
    """One image that never changes, (1, 3, size, size): smooth waves of three frequencies, for
    comparing features between versions.
    """
    axis = torch.linspace(0, 1, size)
    waves = [
        torch.sin(2 * torch.pi * (f * axis[None, :] + g * axis[:, None]))
        for f, g in ((1, 2), (3, 1), (2, 5))
    ]
    return (torch.stack(waves)[None] + 1) / 2


class FrozenModel:
    """What the frozen models share: a place, a device, and a fingerprint."""

    def __init__(self, name: str, weights: str, device: str):
        self.name, self.weights, self.device = name, weights, torch.device(device)
        self.place = locate_model(name, weights)

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

    def compute_golden_features(self) -> list[float]:
        """Eight numbers from the features of `make_fixed_image`, rounded to four decimals."""
        flat = self._encode(make_fixed_image()).float().flatten().cpu()
        return [round(float(v), 4) for v in flat[:: max(1, len(flat) // 8)][:8]]

    def fingerprint(self) -> dict[str, Any]:
        """Model, revision, options, library versions and golden features, for the cache of targets
        and for provenance.

        Raises:
            PerceptError: if the folder records golden features and these differ: a library computes
                something else than it did.
        """
        golden = self.compute_golden_features()
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

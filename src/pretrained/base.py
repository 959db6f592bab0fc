"""What the frozen models share: where they lie, how they are loaded, and a fingerprint.

- Real and miniature weights are loaded by the same code; only the place differs: `weights` is
  "hub", "mini" or a folder that holds the models under the names of `HUB`.
- Images are float tensors (batch, 3, height, width) in [0, 1] everywhere; tokens are (batch,
  tokens, dim) with the CLS token first.
- Every class has a `fingerprint()`: model, revision, versions, and the features of one fixed image,
  which reveal that a library computes something else than it did.
- Versatile Diffusion's image flow is run on its image network alone. The published code runs the
  dual-guided network with a mix ratio of 0 for the text, which computes the text attention and then
  multiplies it by zero: same result, a third of the work saved.
- diffusers and transformers take seconds to import, so they are imported where they are used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from src import utils
from src.files.foreign import READ_ERRORS, shorten
from src.pretrained.shared_weights import REMEDY, complete_model
from src.pretrained.strict import is_network, load_whole
from src.safe_pickle import UnpicklingError
from src.utils import ROOT, PerceptError, is_out_of_memory, read_json, same_features, write_json

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

REVISIONS = {HUB["image_variation"]: "v2.0"}  # of the others the latest

MINI_ONLY = ("judge", "teacher", "unclip")

MINI_MODELS = ROOT / "data" / "mini_models"

# what the libraries raise over files that are missing, damaged or of something else
LOAD_ERRORS = (*READ_ERRORS, SafetensorError, UnpicklingError)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def locate_model(name: str, weights: str) -> str:
    """Where a pretrained model lies: a hub id for "hub", else a folder.

    Raises:
        PerceptError: for an unknown name, a model that is not on the hub, or a missing folder.
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
        hint = "set weights to 'hub', 'mini' or a folder that holds it"
        if weights == "mini":
            hint = "restore data/mini_models from git"
        raise PerceptError(f"The pretrained model '{name}' is not at {folder}: {hint}.")
    if weights == "mini":
        folder = complete_model(folder, utils.HOME / "data" / ".mini_models")
    return str(folder)


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Context without the progress bars and warnings of transformers and diffusers.

    They report weights as missing that another part of the same file holds.
    """
    import diffusers
    import transformers

    libraries = (transformers.logging, diffusers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def load_frozen(cls: Any, location: str, **options: Any) -> Any:
    """`cls.from_pretrained`, with a plain sentence where that fails; of a network all weights.

    Args:
        cls: a class of transformers or diffusers.
        location: hub id or folder, of `locate_model`.
        options: of `from_pretrained`; of a network also those of `load_whole`.

    Raises:
        PerceptError: when a file is missing, damaged or holds more than tensors, the hub cannot be
            reached, or the weights are not those of the network (`load_whole`).
    """
    if location in REVISIONS:
        options = {"revision": REVISIONS[location], **options}
    load = partial(load_whole, cls) if is_network(cls) else cls.from_pretrained
    with explain_loading(cls.__name__, location, options.get("subfolder", "")):
        return prefer_cache(load, location, **options)


def prefer_cache(load: Callable[..., Any], location: str, **options: Any) -> Any:
    """`load(location, **options)`, of a hub id without asking the hub where its files are here.

    The libraries ask it for each file otherwise, and again and again where there is no network.
    """
    if not Path(location).exists():
        try:
            return load(location, local_files_only=True, **options)
        except OSError:  # not all of its files are here
            pass
    return load(location, **options)


@contextmanager
def explain_loading(name: str, location: str, subfolder: str = "") -> Iterator[None]:
    """Context in which the libraries are silent, and say in a plain sentence why loading fails.

    Args:
        name: of what is loaded.
        location: hub id or folder.
        subfolder: of that.
    """
    try:
        with silence_libraries():
            yield
    except LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise
        part = f" ({subfolder})" if subfolder else ""
        raise PerceptError(
            f"Could not load {name} from '{location}'{part}: {shorten(error)}. Check the"
            " connection to the hub, or set weights to 'mini' or to a folder that holds the model."
        ) from error


def freeze(network: Any, device: torch.device) -> Any:
    """The network in eval mode and without gradients, on the device."""
    return network.eval().requires_grad_(False).to(device)


def choose_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype that was asked for; by default half precision on a GPU, as published."""
    if dtype is not None:
        return dtype
    return torch.float16 if device.type == "cuda" else torch.float32


def resize_images(images: Tensor, side: int) -> Tensor:
    """Images (batch, 3, height, width) -> (batch, 3, side, side), bilinear, antialiased.

    Images that have that size stay as they are.
    """
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def crop_center(images: Tensor, side: int) -> Tensor:
    """The central square (batch, 3, side, side) of images (batch, 3, height, width)."""
    height, width = images.shape[-2:]
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def normalise_colours(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (batch, 3, height, width) less the mean of each colour, over its spread."""
    shape = (1, 3, 1, 1)
    means = torch.tensor(mean, device=images.device).view(shape)
    spreads = torch.tensor(std, device=images.device).view(shape)
    return (images - means) / spreads


def normalise_for_clip(images: Tensor) -> Tensor:
    """Images (batch, 3, height, width) in [0, 1], normalised as CLIP's training images were."""
    return normalise_colours(images, CLIP_MEAN, CLIP_STD)


def tokenize_captions(tokenizer: Any, captions: Sequence[str], model: Any) -> Tensor:
    """Token ids (captions, positions) of sentences, on the device of the text model.

    They are padded to the number of positions that the model has.
    """
    batch = tokenizer(
        list(captions),
        padding="max_length",
        max_length=model.config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    return batch.input_ids.to(model.device)


def make_fixed_image(size: int = 224) -> Tensor:
    """One image that never changes, (1, 3, size, size), to compare features between versions.

    It shows smooth waves of three frequencies.
    """
    axis = torch.linspace(0, 1, size)
    waves = []
    for across, down in ((1, 2), (3, 1), (2, 5)):
        phase = across * axis[None, :] + down * axis[:, None]
        waves.append(torch.sin(2 * torch.pi * phase))
    return (torch.stack(waves)[None] + 1) / 2


class FrozenModel:
    """Base class of the frozen models: a location, a device, and a fingerprint.

    Args:
        name: of the model, as `locate_model` knows it.
        weights: "hub", "mini" or a folder.
        device: torch device.
    """

    def __init__(self, name: str, weights: str, device: str):
        self.name = name
        self.weights = weights
        self.device = torch.device(device)
        self.location = locate_model(name, weights)

    def get_options(self) -> dict[str, Any]:
        """What its features depend on beside the weights."""
        return {}

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of what `encode_pixels` gives for one image."""
        raise NotImplementedError

    def encode_pixels(self, images: np.ndarray) -> np.ndarray:
        """uint8 images (batch, height, width, 3) -> targets (batch, *target_shape) float32.

        This is the form in which the cache of targets calls a frozen model.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        return self._encode(pixels.float() / 255).float().cpu().numpy()

    def _encode(self, images: Tensor) -> Tensor:
        """Images (batch, 3, height, width) in [0, 1] -> targets (batch, *target_shape)."""
        raise NotImplementedError

    def compute_golden_features(self) -> list[float]:
        """Eight numbers from the features of `make_fixed_image`, rounded to four decimals."""
        flat = self._encode(make_fixed_image()).float().flatten().cpu()
        step = max(1, len(flat) // 8)
        return [round(float(value), 4) for value in flat[::step][:8]]

    def fingerprint(self) -> dict[str, Any]:
        """Model, revision, options, library versions and golden features.

        It identifies cached targets, and records where results come from.

        The golden features of a miniature are recorded with it; those of any other model are stored
        in data/golden_features/ when it is used first here.

        Raises:
            PerceptError: if the golden features differ from those that are recorded: a library
                computes something else than it did.
        """
        import diffusers
        import transformers

        golden = self.compute_golden_features()
        self._check_golden_features(golden)
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "diffusers": diffusers.__version__,
        }
        return {
            "model": f"mini:{self.name}" if self.weights == "mini" else self.location,
            "revision": self._read_revision(),
            **self.get_options(),
            "golden": golden,
            "versions": versions,
        }

    def _check_golden_features(self, golden: list[float]) -> None:
        """Refuse features that differ from those that are recorded of the model."""
        parts = [type(self).__name__, self.get_options()]
        path = Path(self.location) / "golden_features.json"
        remedy = REMEDY
        if not path.exists():
            parts += [self._read_revision(), self.device.type, str(getattr(self, "dtype", ""))]
            name = re.sub(r"[^\w.-]+", "--", self.location).strip("-")
            path = utils.HOME / "data" / "golden_features" / f"{name}.json"
            remedy = "remove it"
        key = json.dumps(parts, sort_keys=True)
        stored = read_json(path, keys=(), remedy=remedy) if path.exists() else {}
        recorded = stored.get(key)
        if recorded is None and remedy != REMEDY:
            write_json(path, stored | {key: golden})
        if recorded is None or same_features(recorded, golden):
            return
        worst = max(abs(a - b) for a, b in zip(golden, recorded, strict=True))
        raise PerceptError(
            f"{type(self).__name__} of '{self.location}' no longer gives the features recorded"
            f" in {path} (largest difference {worst:.3g}): a library has changed what it"
            " computes; install the versions of requirements.lock."
        )

    def _read_revision(self) -> str:
        """The hub's commit, or a hash of the files in the folder.

        Large files count by name and size, the miniatures by their content.
        """
        folder = Path(self.location)
        if not folder.is_dir():
            commit = getattr(getattr(self, "config", None), "_commit_hash", "")
            return str(commit or "main")
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*.safetensors")):
            if self.weights == "mini":
                digest.update(file.read_bytes())
            else:
                digest.update(f"{file.name}{file.stat().st_size}".encode())
        return digest.hexdigest()[:12]

"""Sizes of data and frozen models, read where they are, else known or published."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.data.layout import subject_folder
from src.data.subject import open_subject
from src.miniworld.cortex import N_VOXELS
from src.miniworld.images import IMAGE_SIZE
from src.pretrained.base import MINI_MODELS
from src.pretrained.clip_variants import CLIP_VARIANTS, PATCH_VARIANTS, find_patch_variant
from src.utils import PerceptError

FLOAT_BYTES, HALF_BYTES = 4.0, 2.0

# voxels of each subject's nsdgeneral at func1pt8mm
NSD_VOXELS = {
    1: 15724,
    2: 14278,
    3: 15226,
    4: 13153,
    5: 13039,
    6: 17907,
    7: 12682,
    8: 14386,
}

NSD_VOLUME = (81, 104, 83)  # of subject 1

ALL_SESSIONS = 40  # of a subject who has done all of them, in NSD as in the mini world

CLIP_SIZES = {
    "ViT-L/14": (257, 768),
    "ViT-B/32": (50, 512),
    "RN50": (1, 1024),
    "RN50x64": (1, 1024),
}  # (tokens, dim)

PATCH_SIZES = {
    "bigG": (256, 1664),
    "ViT-L/14": (256, 1024),
    "ViT-B/32": (49, 768),
}  # of MindEye2's targets

# in single precision
CLIP_BYTES = {
    "bigG": 7.4e9,
    "ViT-L/14": 1.22e9,
    "ViT-B/32": 0.35e9,
    "RN50": 0.41e9,
    "RN50x64": 2.5e9,
}
VAE_BYTES, TEACHER_BYTES = 0.34e9, 1.4e9


@dataclass(frozen=True)
class Dataset:
    """A data set as it is published or drawn, for subjects whose data are not prepared yet.

    Attributes:
        name: in words.
        voxels: by subject.
        train_images, all_images, test_images: numbers of images of a subject.
        trials: of a subject.
        side: of an image, in pixels.
    """

    name: str
    voxels: Mapping[int, int]
    train_images: int
    all_images: int
    test_images: int
    trials: int
    side: int


NSD = Dataset("NSD", NSD_VOXELS, 8559, 9841, 982, 27750, 256)

MINI = Dataset("the mini world", N_VOXELS, 5000, 5600, 300, 16800, IMAGE_SIZE)


@dataclass(frozen=True)
class DataSizes:
    """Sizes of a subject's data.

    Attributes:
        voxels: number of voxels.
        train_images, train_trials: images to train on, and their trials.
        all_images, test_images: numbers of images.
        betas_bytes: of all betas.
        image_bytes: of one image.
    """

    voxels: int
    train_images: int
    train_trials: int
    all_images: int
    test_images: int
    betas_bytes: int
    image_bytes: int


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the frozen models.

    Attributes:
        tokens, dim: of an image's CLIP embedding.
        latent: shape (channels, height, width) of an image's latent.
        frozen_bytes: of "CLIP", "autoencoder" and "teacher", in single precision.
    """

    tokens: int
    dim: int
    latent: tuple[int, int, int]
    frozen_bytes: dict[str, float]

    @property
    def embedding_bytes(self) -> float:
        """Of an image's embedding, in half precision."""
        return HALF_BYTES * self.tokens * self.dim

    @property
    def latent_bytes(self) -> float:
        """Of an image's latent, in half precision."""
        return HALF_BYTES * math.prod(self.latent)

    @property
    def map_bytes(self) -> float:
        """Of the teacher's maps of an image, in half precision."""
        return HALF_BYTES * 512 * (self.latent[1] // 4) ** 2


@dataclass(frozen=True)
class Sizes:
    """Sizes of data and frozen models."""

    data: DataSizes
    models: ModelSizes


def find_sizes(parameters: Mapping[str, Any]) -> Sizes:
    """Sizes of data and frozen models, read where they are, else known or published."""
    dataset, subj = parameters["dataset"], parameters["subj"]
    sessions = int(parameters.get("num_sessions", 0))
    if subject_folder(dataset, subj).exists():
        data = _measure_data(dataset, subj, sessions)
    else:
        data = _expect_data(MINI if dataset == "mini" else NSD, int(subj), sessions)
    return Sizes(data, _find_model_sizes(parameters))


def _measure_data(dataset: str, subj: int, sessions: int) -> DataSizes:
    """Sizes of prepared data."""
    subject = open_subject(dataset, subj).select_first_sessions(sessions)
    image = subject.images(subject.all_images[:1])
    return DataSizes(
        voxels=math.prod(subject.betas.shape[1:]),
        train_images=len(subject.image_ids("train")),
        train_trials=int((subject.trials["split"] == "train").sum()),
        all_images=len(subject.all_images),
        test_images=len(subject.image_ids("test")),
        betas_bytes=subject.betas.size * subject.betas.dtype.itemsize,
        image_bytes=image.nbytes,
    )


def _expect_data(dataset: Dataset, subj: int, sessions: int) -> DataSizes:
    """Sizes of data that are not prepared yet."""
    if subj not in NSD_VOXELS:
        raise PerceptError(f"There is no subject {subj} in {dataset.name}: choose one of 1 to 8.")
    voxels = dataset.voxels[subj]
    all_trials = dataset.trials * dataset.train_images // dataset.all_images
    session_trials = all_trials * sessions // ALL_SESSIONS
    # in few sessions hardly an image comes twice
    train_images = min(dataset.train_images, session_trials or dataset.train_images)
    return DataSizes(
        voxels=voxels,
        train_images=train_images,
        train_trials=session_trials or all_trials,
        all_images=dataset.all_images,
        test_images=dataset.test_images,
        betas_bytes=4 * dataset.trials * voxels,
        image_bytes=3 * dataset.side**2,
    )


def count_inputs(parameters: Mapping[str, Any], data: DataSizes) -> int:
    """How many numbers a network takes for a trial: components, or voxels."""
    return parameters.get("n_components") or count_voxels(parameters, data)


def count_voxels(parameters: Mapping[str, Any], data: DataSizes) -> int:
    """Voxels of the ROIs that a stage names, else all."""
    return _count_roi_voxels(parameters) or data.voxels


def _count_roi_voxels(parameters: Mapping[str, Any]) -> int:
    """Voxels of the ROIs, 0 where none are named or the data are not there yet."""
    rois = parameters.get("rois", "")
    if rois.strip() in ("", "-") or ";" in rois:
        return 0
    dataset, subj = parameters["dataset"], parameters["subj"]
    if not subject_folder(dataset, subj).exists():
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training names the regions that are missing
        columns, *_ = open_subject(dataset, subj).select_rois(rois)
    return len(columns)


def find_volume(parameters: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the volume that a subject's voxels lie in."""
    dataset, subj = parameters["dataset"], parameters["subj"]
    if not subject_folder(dataset, subj).exists():
        return NSD_VOLUME
    return open_subject(dataset, subj).volume_shape or NSD_VOLUME


def _find_model_sizes(parameters: Mapping[str, Any]) -> ModelSizes:
    """Sizes of the frozen models that a stage uses."""
    variant = parameters.get("clip_variant", "ViT-L/14")
    is_mindeye2 = "clip_seq_dim" in parameters  # no class token, no projection
    if is_mindeye2:
        size = parameters["clip_seq_dim"], parameters.get("clip_emb_dim", 0)
        variant = find_patch_variant(variant, *size)
        (tokens, dim), latent = PATCH_SIZES[variant], (4, 28, 28)
    else:
        (tokens, dim), latent = CLIP_SIZES[variant], (4, 64, 64)
    frozen_bytes = {
        "CLIP": CLIP_BYTES[variant],
        "autoencoder": VAE_BYTES,
        "teacher": TEACHER_BYTES,
    }
    sizes = ModelSizes(tokens, dim, latent, frozen_bytes)
    weights = parameters.get("weights", "hub")
    if weights != "hub":
        sizes = _read_local_models(sizes, weights, variant, is_mindeye2)
    tokens = parameters.get("clip_seq_dim") or sizes.tokens
    if not parameters.get("hidden", True):
        tokens = 1
    return replace(sizes, tokens=tokens)


def _read_local_models(
    sizes: ModelSizes, weights: str, variant: str, is_mindeye2: bool
) -> ModelSizes:
    """Sizes of pretrained models in a folder, from their config files."""
    variants = PATCH_VARIANTS if is_mindeye2 else CLIP_VARIANTS
    if weights == "mini":
        folder, clip = MINI_MODELS, "clip"
    else:
        folder, clip = Path(weights), variants[variant]
    folders = {"CLIP": clip, "autoencoder": "versatile_diffusion/vae", "teacher": "teacher"}
    frozen_bytes, configs = dict(sizes.frozen_bytes), {}
    for name, subfolder in folders.items():
        config = folder / subfolder / "config.json"
        if config.exists():
            configs[name] = json.loads(config.read_text())
            files = config.parent.glob("*.safetensors")
            # half precision on disk, single in use
            frozen_bytes[name] = 2.0 * sum(path.stat().st_size for path in files)
    sizes = replace(sizes, frozen_bytes=frozen_bytes)
    if "CLIP" in configs:
        tokens, dim = _read_clip_size(configs["CLIP"], sizes.dim, is_mindeye2)
        sizes = replace(sizes, tokens=tokens, dim=dim)
    if "autoencoder" in configs:
        config = configs["autoencoder"]
        side = config["sample_size"] // 2 ** (len(config["block_out_channels"]) - 1)
        sizes = replace(sizes, latent=(config["latent_channels"], side, side))
    return sizes


def _read_clip_size(config: Mapping[str, Any], dim: int, is_mindeye2: bool) -> tuple[int, int]:
    """Tokens of an image and their width, from CLIP's config; `dim` where it names none."""
    vision = config.get("vision_config", config)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    if is_mindeye2:
        return patches, vision["hidden_size"]
    return patches + 1, config.get("projection_dim", vision.get("projection_dim", dim))

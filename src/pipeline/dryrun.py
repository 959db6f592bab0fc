"""What a stage will need, told before it starts: parameters, memory and disk, from a notebook's
parameters alone.

- Nothing is loaded or downloaded. Sizes come from the prepared data and the pretrained models'
  config files where these are there, else from what is known of the mini world, and published of
  NSD, CLIP and the autoencoder.
- Memory is told of trainings, disk also of the stages that write data and pictures.
- Activations are not guessed: the step is traced with tensors that have shapes and no memory, and
  what autograd keeps is followed through the backward pass, in which activations are freed and
  gradients appear.
- Memory is that of the process: its base (interpreter and libraries, as large as they are here
  now), weights, optimizer state, the peak of that trace, frozen models, and the files that are
  mapped while training.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from src.data.layout import subject_folder
from src.data.subject import open_subject
from src.decoding.configs import (
    basic_config,
    combined_config,
    high_level_config,
    low_level_config,
    mindeye2_config,
)
from src.decoding.voting import VOTES, parse_voters
from src.losses import combined_loss, info_nce, l2_normalize, soft_clip_loss
from src.miniworld.cortex import N_VOXELS
from src.miniworld.images import IMAGE_SIZE
from src.networks.released import build_decoder
from src.parameters import find_recipe_files, read_recipe
from src.pretrained.autoencoder import make_untrained_vae
from src.pretrained.base import HUB, MINI_MODELS, locate_model
from src.pretrained.clip import CLIP_VARIANTS, PATCH_VARIANTS
from src.prior import BrainDiffusionPrior
from src.utils import HOME, PerceptError, mixed_precision, resolve, to_device

NSD_VOXELS = {
    1: 15724,
    2: 14278,
    3: 15226,
    4: 13153,
    5: 13039,
    6: 17907,
    7: 12682,
    8: 14386,
}  # nsdgeneral, func1pt8mm

NSD_VOLUME = (81, 104, 83)  # of subject 1

NSD_IMAGES, NSD_TRIALS, NSD_SIDE, NSD_TEST = {"train": 8559, "all": 9841}, 27750, 256, 982

MINI_IMAGES, MINI_TRIALS, MINI_TEST = {"train": 5000, "all": 5600}, 16800, 300

CLIP_SIZES = {
    "ViT-L/14": (257, 768),
    "ViT-B/32": (50, 512),
    "RN50": (1, 1024),
    "RN50x64": (1, 1024),
}  # (tokens, dim)

ALL_SESSIONS = 40  # of a subject who has done all of them, in NSD as in the mini world

PATCH_SIZES = {
    "bigG": (256, 1664),
    "ViT-L/14": (256, 1024),
    "ViT-B/32": (49, 768),
}  # of MindEye2's targets

CLIP_BYTES = {
    "bigG": 7.4e9,
    "ViT-L/14": 1.22e9,
    "ViT-B/32": 0.35e9,
    "RN50": 0.41e9,
    "RN50x64": 2.5e9,
}  # in single precision

INDEX = ("config.json", "model_index.json")  # one of these is among a model's files

VAE_BYTES, TEACHER_BYTES = 0.34e9, 1.4e9


@dataclass(frozen=True)
class Sizes:
    """What the data and the frozen models are like."""

    voxels: int
    train_images: int
    train_trials: int
    all_images: int
    test_images: int
    betas: int  # bytes
    image: int  # bytes of one
    tokens: int
    dim: int
    latent: tuple[int, int, int]
    frozen: dict[str, float]  # bytes by model


@dataclass
class Plan:
    """What a stage needs, in bytes.

    Attributes:
        stage: name of the notebook.
        parameters: trainable ones, by network.
        memory: by what it is for.
        disk: by what it is for.
        warnings: a sentence for each thing that is not there.
    """

    stage: str
    parameters: dict[str, int]
    memory: dict[str, float]
    disk: dict[str, float]
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line an item, and the warnings."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        what = (
            f"will train {sum(self.parameters.values()):,} parameters ({counts})"
            if counts
            else "trains no network"
        )
        lines = [f"{self.stage} {what}"]
        for title, parts in (("memory", self.memory), ("disk", self.disk)):
            detail = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value)
            lines.extend([f"  {title} {_size(sum(parts.values()))}: {detail}"] if parts else [])
        return "\n".join(lines + [f"  warning: {sentence}" for sentence in self.warnings])


def _size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def trace(
    model: nn.Module, loss: Callable[[], Tensor], autocast: torch.dtype | None = None
) -> list[tuple[str, int]]:
    """What autograd keeps in the forward pass, in order: ("activation" or "parameter", bytes), each
    storage once.

    Args:
        model: made of tensors without memory (under a FakeTensorMode, which must be active).
        loss: runs the forward pass.
        autocast: precision of the forward pass, if not single.
    """
    own = {p.untyped_storage()._cdata: p for p in model.parameters()}
    seen: dict[int, Tensor] = {}
    events: list[tuple[str, int]] = []

    def pack(x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata
        if key not in seen:
            seen[key] = x  # held, so that no later storage takes its place
            if key not in own:
                events.append(("activation", x.untyped_storage().nbytes()))
            elif own[key].requires_grad:
                events.append(("parameter", own[key].numel() * own[key].element_size()))
        return x

    context = torch.autocast("cpu", dtype=autocast) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), context:
        loss()
    unseen = [
        p for key, p in own.items() if key not in seen and p.requires_grad
    ]  # not needed on the way back, as the first layer's
    return [("parameter", p.numel() * p.element_size()) for p in unseen] + events


def backward_peak(events: list[tuple[str, int]], step_in_backward: bool) -> int:
    """Largest sum of activations and gradients on the way back through `trace`'s events, in bytes."""
    held = peak = sum(size for kind, size in events if kind == "activation")
    for kind, size in reversed(events):
        if kind == "activation":
            held -= size
            continue
        peak = max(peak, held + size)
        held += 0 if step_in_backward else size
    return max(peak, held)


def training_memory(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module], Tensor],
    precision: str = "no",
    step_in_backward: bool = False,
) -> dict[str, float]:
    """Memory of training a model with AdamW, in bytes: weights, optimizer, activations and
    gradients at their peak.

    Args:
        build: makes the model.
        loss: model -> scalar loss of a batch, made of tensors that it makes itself.
        precision: as `fit`.
        step_in_backward: as `fit`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build()
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        events = trace(model, lambda: loss(model), half)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {
        "weights": weights,
        "optimizer state": 2 * trained,
        "activations and gradients": backward_peak(events, step_in_backward),
    }


def find_sizes(parameters: Mapping[str, Any]) -> Sizes:
    """Sizes of data and frozen models, read where they are, else known or published."""
    p, sessions = parameters, int(parameters.get("num_sessions", 0))
    voxels, train, trials, everything, test, betas, image = _measured(
        p["dataset"], p["subj"], sessions
    ) or _expected(p["dataset"], p["subj"], sessions)
    variant, hidden = p.get("clip_variant", "ViT-L/14"), p.get("hidden", True)
    patches = "clip_seq_dim" in p  # MindEye2: no class token, no projection
    (tokens, dim), latent = (
        (PATCH_SIZES if patches else CLIP_SIZES)[variant],
        (4, 28, 28) if patches else (4, 64, 64),
    )
    frozen = {"CLIP": CLIP_BYTES[variant], "autoencoder": VAE_BYTES, "teacher": TEACHER_BYTES}
    if p.get("weights", "hub") != "hub":
        tokens, dim, latent, frozen = _local(
            p["weights"], variant, (tokens, dim), latent, frozen, patches
        )
    tokens = p.get("clip_seq_dim") or tokens
    return Sizes(
        voxels,
        train,
        trials,
        everything,
        test,
        betas,
        image,
        tokens if hidden else 1,
        dim,
        latent,
        frozen,
    )


def _measured(
    dataset: str, subj: int, sessions: int
) -> tuple[int, int, int, int, int, int, int] | None:
    """Of prepared data: voxels, images to train on and their trials, all images, test images, bytes
    of the betas and of an image.
    """
    if not subject_folder(dataset, subj).exists():
        return None
    subject = open_subject(dataset, subj).select_first_sessions(sessions)
    trials = int((subject.trials["split"] == "train").sum())
    counts = (
        len(subject.image_ids("train")),
        trials,
        len(subject.all_images),
        len(subject.image_ids("test")),
    )
    image = subject.images(subject.all_images[:1])
    return (
        math.prod(subject.betas.shape[1:]),
        *counts,
        subject.betas.size * subject.betas.dtype.itemsize,
        image.nbytes,
    )


def _expected(dataset: str, subj: int, sessions: int) -> tuple[int, int, int, int, int, int, int]:
    """The same of data that are not there yet: the mini world's, or NSD's."""
    mini = dataset == "mini"
    if int(subj) not in NSD_VOXELS:
        raise PerceptError(
            f"There is no subject {subj} in {'the mini world' if mini else 'NSD'}: choose one of 1"
            " to 8."
        )
    voxels = (N_VOXELS if mini else NSD_VOXELS)[int(subj)]
    images, trials, test, side = (
        (MINI_IMAGES, MINI_TRIALS, MINI_TEST, IMAGE_SIZE)
        if mini
        else (NSD_IMAGES, NSD_TRIALS, NSD_TEST, NSD_SIDE)
    )
    shown = trials * images["train"] // images["all"]
    own = min(
        images["train"], shown * sessions // ALL_SESSIONS or images["train"]
    )  # in few sessions hardly an image comes twice
    return (
        voxels,
        own,
        shown * sessions // ALL_SESSIONS or shown,
        images["all"],
        test,
        4 * trials * voxels,
        3 * side**2,
    )


def _local(
    weights: str,
    variant: str,
    clip: tuple[int, int],
    latent: tuple,
    frozen: dict[str, float],
    patches: bool = False,
) -> tuple[int, int, tuple, dict[str, float]]:
    """Sizes of pretrained models in a folder, from their config files."""
    tokens, dim = clip
    folder = MINI_MODELS if weights == "mini" else Path(weights)
    clips = PATCH_VARIANTS if patches else CLIP_VARIANTS
    for name, sub in (
        ("CLIP", "clip" if weights == "mini" else clips[variant]),
        ("autoencoder", "versatile_diffusion/vae"),
        ("teacher", "teacher"),
    ):
        config = folder / sub / "config.json"
        if not config.exists():
            continue
        content, files = (
            json.loads(config.read_text()),
            [path for path in (folder / sub).glob("*.safetensors")],
        )
        frozen = frozen | {
            name: 2.0 * sum(path.stat().st_size for path in files)
        }  # half precision on disk, single in use
        if name == "CLIP":
            vision = content.get("vision_config", content)
            tokens, dim = (
                (vision["image_size"] // vision["patch_size"]) ** 2 + 1,
                content.get("projection_dim", vision.get("projection_dim", dim)),
            )
            tokens, dim = (tokens - 1, vision["hidden_size"]) if patches else (tokens, dim)
        elif name == "autoencoder":
            side = content["sample_size"] // 2 ** (len(content["block_out_channels"]) - 1)
            latent = (content["latent_channels"], side, side)
    return tokens, dim, latent, frozen


def _high_level(
    p: Mapping[str, Any], s: Sizes
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    width = p.get("n_components") or _of_rois(p) or s.voxels
    config = high_level_config(p, width, s.tokens, s.dim)

    def loss(model: nn.Module) -> Tensor:
        assert isinstance(model, BrainDiffusionPrior)
        n, network = p["batch_size"], model.voxel2clip
        target = torch.zeros(n, s.tokens, s.dim)
        backbone, projected = network.predict_tokens(torch.zeros(n, width))  # type: ignore[union-attr, operator]
        total = (
            soft_clip_loss(l2_normalize(projected), l2_normalize(target))
            if p["v2c"]
            else backbone.new_zeros(())
        )
        if p["prior"]:
            drop = torch.zeros(2, n, dtype=torch.bool)
            total = (
                total
                + model.p_losses(
                    target,
                    torch.zeros(n, dtype=torch.long),
                    backbone,
                    torch.zeros_like(target),
                    drop,
                )[0]
            )
        return total + F.mse_loss(backbone, target) if p["mse_mult"] else total

    memory = training_memory(
        lambda: build_decoder(config), loss, p["precision"], p["step_in_backward"]
    )
    with torch.device("meta"):
        model = build_decoder(config)
    counts = {
        name: sum(q.numel() for q in getattr(model, name).parameters())
        for name in ("voxel2clip", "net")
    }
    views = p["cached_views"] if p["use_image_aug"] else 0
    cached = 2.0 * s.tokens * s.dim * (s.all_images + views * s.train_images)
    frozen = {"frozen CLIP": s.frozen["CLIP"], "mapped data": s.betas + cached}
    return counts, memory | frozen, {"cached targets": cached}


def _combined(
    p: Mapping[str, Any], s: Sizes
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    volume = NSD_VOLUME
    if subject_folder(p["dataset"], p["subj"]).exists():
        volume = open_subject(p["dataset"], p["subj"]).volume_shape or volume
    config = combined_config(p, s.voxels, s.dim, volume)
    width = math.prod(volume) if p["voxel_dims"] == 3 else s.voxels

    def build() -> nn.Module:
        model = build_decoder(config)
        model.voxel2clip.requires_grad_(p["combine_models"])  # type: ignore[union-attr, operator]
        return model

    def loss(model: nn.Module) -> Tensor:
        assert isinstance(model, BrainDiffusionPrior)
        n, network = p["batch_size"], model.voxel2clip
        target, drop = torch.zeros(n, 1, s.dim), torch.zeros(2, n, dtype=torch.bool)
        brain, _ = network.predict_tokens(torch.zeros(n, width))  # type: ignore[union-attr, operator]
        mse = model.p_losses(
            target, torch.zeros(n, dtype=torch.long), brain, torch.zeros_like(target), drop
        )[0]
        return (
            combined_loss(mse, info_nce(l2_normalize(brain), l2_normalize(target)), p["alpha"])
            if p["combine_losses"]
            else mse
        )

    memory = training_memory(build, loss, p["precision"])
    with torch.device("meta"):
        model = build()
    counts = {
        name: sum(q.numel() for q in getattr(model, name).parameters())
        for name in ("voxel2clip", "net")
    }
    cached = 2.0 * s.dim * s.all_images
    return (
        counts,
        memory | {"frozen CLIP": s.frozen["CLIP"], "mapped data": s.betas + cached},
        {"cached targets": cached},
    )


def _mindeye2(
    p: Mapping[str, Any], s: Sizes
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    others = (
        [int(number) for number in p["subjects"].split(",") if int(number) != p["subj"]]
        if p["multi_subject"]
        else []
    )
    each = [find_sizes(dict(p) | {"subj": number}) for number in others] or [s]
    widths = [size.voxels for size in each] if others else [_of_rois(p) or s.voxels]
    config = mindeye2_config(
        dict(p) | {"prior": p["prior"] and p["use_prior"]}, widths, s.tokens, s.dim, s.latent[1]
    )
    n, trials = p["batch_size"], 1 + p["seq_past"] + p["seq_future"]

    def build() -> nn.Module:
        model = build_decoder(config)
        if model.diffusion_prior is not None:
            model.diffusion_prior.net.causal_transformer.checkpointing = p["gradient_checkpointing"]  # type: ignore[union-attr, operator]
        return model

    def loss(model: nn.Module) -> Tensor:
        target = torch.zeros(n, s.tokens, s.dim)
        backbone, clip, blurry = model(torch.zeros(n, trials, widths[0]), 0)
        total = backbone.mean() + (
            soft_clip_loss(l2_normalize(clip), l2_normalize(target)) if p["clip_scale"] else 0
        )
        if p["blurry_recon"]:
            total = total + blurry[0].abs().mean() + blurry[1].square().mean()
        if model.diffusion_prior is not None:
            drop = torch.zeros(2, n, dtype=torch.bool)
            total = (
                total
                + model.diffusion_prior.p_losses(  # type: ignore[operator, union-attr]
                    target,
                    torch.zeros(n, dtype=torch.long),
                    backbone,
                    torch.zeros_like(target),
                    drop,
                )[0]
            )  # type: ignore[union-attr, operator]
        return total

    memory = training_memory(build, loss, p["precision"], p["step_in_backward"])
    with torch.device("meta"):
        counts = {
            name: sum(q.numel() for q in part.parameters())
            for name, part in build().named_children()
        }
    images, views = (
        sum(size.all_images for size in each),
        p["cached_views"] if p["blurry_recon"] and p["use_cont"] else 0,
    )
    maps = (
        2.0
        * 512
        * (s.latent[1] // 4) ** 2
        * sum(size.train_images for size in each)
        * (views and 1 + views)
    )
    cached = 2.0 * images * (s.tokens * s.dim + math.prod(s.latent)) + maps
    networks = s.frozen["CLIP"] + s.frozen["autoencoder"] + (s.frozen["teacher"] if views else 0)
    frozen = {"frozen models": networks, "mapped data": sum(size.betas for size in each) + cached}
    return counts, memory | frozen, {"cached targets": cached}


def _low_level(
    p: Mapping[str, Any], s: Sizes
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    width = p.get("n_components") or _of_rois(p) or s.voxels
    config = low_level_config(p, width)

    def loss(model: nn.Module) -> Tensor:
        out = model(torch.zeros(p["batch_size"], width))
        latent, maps = out if isinstance(out, tuple) else (out, None)
        total = F.l1_loss(latent, torch.zeros_like(latent))
        return (
            total
            if maps is None
            else total
            + soft_clip_loss(
                F.normalize(maps.flatten(0, 1), dim=-1), torch.zeros_like(maps.flatten(0, 1))
            )
        )

    memory = training_memory(
        lambda: build_decoder(config), loss, mixed_precision(p["use_mp"], p["precision"])
    )
    with torch.device("meta"):
        counts = {"network": sum(q.numel() for q in build_decoder(config).parameters())}
    cached = 2.0 * math.prod(s.latent) * s.all_images
    places = (s.latent[1] // 4) ** 2
    cached += 2.0 * places * 512 * s.train_images * (1 + p["cached_views"]) if p["use_cont"] else 0
    frozen = {
        "frozen models": s.frozen["autoencoder"] + (s.frozen["teacher"] if p["use_cont"] else 0),
        "mapped data": s.betas + cached,
    }
    return counts, memory | frozen, {"cached targets": cached}


def _basic(
    p: Mapping[str, Any], s: Sizes
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    width = p.get("n_components") or _of_rois(p) or s.voxels
    vae = make_untrained_vae(p["weights"])
    side = p["image_size"] or vae.config.sample_size
    latent_size = side // 2 ** (len(vae.config.block_out_channels) - 1)
    config = basic_config(
        p, width, (vae.config.latent_channels, latent_size), vae.config.scaling_factor
    )
    part = p["batch_size"] // p["gradient_accumulation_steps"]

    def both() -> nn.Module:
        return nn.ModuleDict(
            {
                "encoder": build_decoder(config),
                "vae": make_untrained_vae(p["weights"]).requires_grad_(False),
            }
        )

    def loss(models: nn.Module) -> Tensor:
        picture = models["vae"].decode(models["encoder"](torch.zeros(part, width))).sample  # type: ignore[index]
        return F.mse_loss(picture, torch.zeros(part, 3, side, side))

    memory = training_memory(both, loss, p["precision"])
    with torch.device("meta"):
        counts = {"encoder": sum(q.numel() for q in build_decoder(config).parameters())}
    cached = (
        2.0 * vae.config.latent_channels * latent_size**2 * s.all_images
        if p["latent_mult"] or p["decoder"] == "both"
        else 0.0
    )
    return (
        counts,
        memory | {"mapped data": s.betas + s.image * s.train_images + cached},
        {"cached targets": cached},
    )


def _roi_models(
    p: Mapping[str, Any], s: Sizes
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    counts: dict[str, int] = {}
    memory: dict[str, float] = {}
    for voter in parse_voters(p["voters"], p["rois"], p["bag_seeds"], p["batch_sizes"], p["seed"]):
        width = s.voxels if p["masked"] else _of_rois(dict(p) | {"rois": voter.rois}) or s.voxels
        config = low_level_config(dict(p) | {"latent_size": s.latent[1], "use_cont": False}, width)

        def loss(model: nn.Module, n: int = voter.batch_size, width: int = width) -> Tensor:
            return model(torch.zeros(n, width)).abs().mean()

        needed = training_memory(lambda config=config: build_decoder(config), loss, p["precision"])  # type: ignore[misc]
        memory = max(memory, needed, key=lambda parts: sum(parts.values()))  # one after the other
        with torch.device("meta"):
            counts[f"voter {voter.name}"] = sum(
                q.numel() for q in build_decoder(config).parameters()
            )
    cached = 0.0 if p["latents_file"] else 2.0 * math.prod(s.latent) * s.all_images
    return (
        counts,
        memory | {"frozen models": s.frozen["autoencoder"], "mapped data": s.betas + cached},
        {"cached targets": cached},
    )


def _of_rois(p: Mapping[str, Any]) -> int:
    """Voxels of the regions that are asked for, 0 where none are or the data are not there yet."""
    if (
        p.get("rois", "").strip() in ("", "-")
        or ";" in p["rois"]
        or not subject_folder(p["dataset"], p["subj"]).exists()
    ):
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training names the regions that are missing
        return len(open_subject(p["dataset"], p["subj"]).select_rois(p["rois"])[0])


def _prepare(
    p: Mapping[str, Any], s: Sizes
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    return {}, {}, {"betas": s.betas, "images": float(s.image * s.all_images)}


def _reconstruct(
    p: Mapping[str, Any], s: Sizes
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    n, decoders = p["first_images"] or s.test_images, 1 + (p["decoder"] == "both")
    made = (
        2.0 * 3 * (8 * s.latent[1]) ** 2 if p["weights"] == "hub" else 2.0 * s.image
    )  # bytes of a picture in half precision
    small = 3 * 2.0 * s.image  # seen, mean image, nearest training image
    low_level = decoders if p["img2img_strength"] < 1 else 0
    more = (
        (p["untrained"] and p["decoder"] != "ridge")
        + len([k for k in p["fewer_repeats"].split(",") if k.strip()])
        + p["keep_samples"]
    )
    tokens = (
        4.0 * n * s.tokens * s.dim * (2 * decoders + 1) if p["img2img_strength"] else 0.0
    )  # of the low level alone
    disk = {
        "pictures": n * ((decoders + low_level + more + 2) * made + small),
        "tokens": tokens,
        "published files": n * (2 * made + 4.0 * s.image),
    }
    return {}, {}, disk


def _vote(
    p: Mapping[str, Any], s: Sizes
) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    n, voters = (
        (p["image_to"] or s.test_images) - p["image_from"],
        max(1, p["voters"].count(",") + 1),
    )
    made = (
        2.0 * 3 * (8 * s.latent[1]) ** 2 if p["weights"] == "hub" else 2.0 * s.image
    )  # bytes of a picture in half precision
    rows = (
        voters + len(VOTES) + 5 + (p["decoder"] == "both") + p["untrained"]
    )  # and oracle, latent mean, ceiling, two low-level rows
    return {}, {}, {"pictures": n * (rows * made + 3 * 2.0 * s.image)}


STAGES = {
    "00_prepare_data": _prepare,
    "01_train_high_level": _high_level,
    "02_train_autoencoder": _low_level,
    "02_train_basic_autoencoder": _basic,
    "01_train_combined": _combined,
    "01_train_mindeye2": _mindeye2,
    "03_reconstruct": _reconstruct,
    "02_train_roi_models": _roi_models,
    "03_vote": _vote,
}

TRAININGS = (
    "01_train_high_level",
    "01_train_combined",
    "01_train_mindeye2",
    "02_train_autoencoder",
    "02_train_basic_autoencoder",
    "02_train_roi_models",
)


def plan_stage(stage: str, parameters: Mapping[str, Any]) -> Plan | None:
    """What a stage needs, or None for one that writes little and trains no network.

    Args:
        stage: name of the notebook.
        parameters: its effective parameters, all of them.
    """
    if stage not in STAGES or (stage in TRAININGS and parameters["decoder"] == "ridge"):
        return None
    parameters = {"hidden": _all_tokens(str(parameters.get("recipe", "")))} | dict(
        parameters
    )  # which training alone has as a parameter
    base = _base()
    found = find_sizes(parameters)
    counts, memory, disk = STAGES[stage](parameters, found)
    if counts:
        width = parameters.get("n_components") or _of_rois(parameters) or found.voxels
        fitting = (
            4.0 * found.train_trials * (found.voxels + 2 * width)
            if parameters.get("n_components")
            else 0.0
        )  # over before there is a network
        others = sum(size for name, size in memory.items() if name != "mapped data")
        memory = (
            {"interpreter and libraries": base}
            | memory
            | {"finding components, beyond that": max(0.0, fitting - others)}
        )
        if parameters["decoder"] == "both":  # fitted after the training, in what that has left
            memory["ridge baseline, beyond that"] = max(
                0.0,
                _ridge(stage, found, width)
                - memory["optimizer state"]
                - memory["activations and gradients"],
            )
        weights, every = 4.0 * sum(counts.values()), parameters["ckpt_interval"]
        kept = -(-parameters["num_epochs"] // every) if every and stage.startswith("02") else 0
        # best and last; and the state is written beside the former one before it takes its place
        disk |= {"checkpoints": weights * (2 + kept), "state for resuming": 2 * 3 * weights}
    made = Plan(stage, counts, memory, disk)
    made.warnings.extend([*_absent(stage, parameters), *_missing(made)])
    return made


def _all_tokens(recipe: str) -> bool:
    """Whether a recipe trains on all of CLIP's tokens, not on its one final embedding."""
    if not recipe or find_recipe_files(recipe, "01_train_combined"):
        return not recipe
    return all(
        read_recipe(file).get("hidden", True)
        for file in find_recipe_files(recipe, "01_train_high_level")
    )


def _models(stage: str, p: Mapping[str, Any]) -> list[str]:
    """Names of the pretrained models that a stage loads."""
    patches = (
        PATCH_VARIANTS[p["clip_variant"]]
        if "clip_seq_dim" in p
        else _patches(str(p.get("recipe", "")))
    )
    if patches:
        own, read = ("clip", "clip") if p["weights"] == "mini" else (patches, "clip-bigG")
        decoding = {
            "03_reconstruct": [*dict.fromkeys([own, read]), "image_variation", "unclip"],
            "04_refine": [own, "git"],
        }
        return {"01_train_mindeye2": [own, "image_variation"], **decoding}.get(stage, [])
    clip = CLIP_VARIANTS[p.get("clip_variant", "ViT-L/14")]
    generator = "versatile_diffusion" if p.get("hidden", True) else "image_variation"
    last = (
        [clip, generator] if p.get("img2img_strength", 1) else ["stable_diffusion"]
    )  # of the low level alone
    return {
        "01_train_high_level": [clip],
        "01_train_combined": [clip] + ["image_variation"] * bool(p.get("n_samples_save")),
        "02_train_autoencoder": ["versatile_diffusion"],
        "02_train_basic_autoencoder": ["stable_diffusion"],
        "03_reconstruct": last,
        "02_train_roi_models": ["stable_diffusion"],
        "03_vote": ["clip", "stable_diffusion"] + ["blip"] * (p.get("strength", 0) > 0),
    }.get(stage, [])


def _patches(recipe: str) -> str:
    """The model whose patch tokens a recipe's training predicts, "" where it is none of MindEye2's."""
    files = find_recipe_files(recipe, "01_train_mindeye2") if recipe else []
    variants = [read_recipe(file).get("clip_variant", "") for file in files]
    return PATCH_VARIANTS[next((v for v in reversed(variants) if v), "bigG")] if files else ""


def _absent(stage: str, p: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for data, models and devices that are not there."""
    if (
        stage == "00_prepare_data"
        and p["source"] != "mini"
        and not (
            resolve(p["data_path"]).exists() or subject_folder(p["dataset"], p["subj"]).exists()
        )
    ):
        yield (
            f"There is nothing at {p['data_path']}: set data_path to where the files of"
            f" '{p['source']}' lie (README, Your own fMRI)."
        )
    models = _models(stage, p)
    if models and not to_device("auto").startswith("cuda") and p["weights"] == "hub":
        yield "There is no GPU here: at full size this stage would take weeks."
    for name in models:
        try:
            place = locate_model(name, p["weights"])
        except PerceptError as error:
            if name in HUB:  # others come with a package of their own
                yield str(error)
            continue
        if p["weights"] == "hub" and not any(
            isinstance(
                try_to_load_from_cache(place, file, cache_dir=p.get("vd_cache_dir") or None), str
            )
            for file in INDEX
        ):
            yield f"{place} is not in the hub's cache: it will be downloaded."


def _ridge(stage: str, s: Sizes, width: int) -> float:
    """Bytes of fitting the ridge baseline: voxels, targets and weights, and the copies that
    centring, folds and predictions make of them.
    """
    n, p, t = (
        s.train_images,
        width,
        s.tokens * s.dim if stage.startswith("01") else math.prod(s.latent),
    )
    return 4.0 * (
        6 * n * p + 5 * n * t + 4 * p * t + 4 * p * p
    )  # the numbers of copies are measured


def _base() -> float:
    """Memory of this process with the libraries that a stage imports, before it has a model."""
    for name in (
        "src.training",
        "src.training.augment",
        "src.figures",
        "src.metrics",
        "src.networks.released",
    ):
        importlib.import_module(name)
    return float(psutil.Process(os.getpid()).memory_info().rss)


def _missing(made: Plan) -> Iterator[str]:
    """A sentence for everything that is needed and not there."""
    cuda = to_device("auto").startswith("cuda")
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    own = made.memory.get("interpreter and libraries", 0) + made.memory.get(
        "mapped data", 0
    )  # there already, or given back when others need it
    if (needed := sum(made.memory.values()) - own) > free:
        where = "GPU memory" if cuda else "memory"
        yield (
            f"{_size(needed)} of {where} are needed besides libraries and mapped files, and"
            f" {_size(free)} are free: lower batch_size or h, or set step_in_backward."
        )
    place = HOME if HOME.exists() else HOME.parent
    if (needed := sum(made.disk.values())) > (free := shutil.disk_usage(place).free):
        yield (
            f"{_size(needed)} of disk are needed at {place} and {_size(free)} are free: make room,"
            " or set PERCEPT_HOME to another disk."
        )

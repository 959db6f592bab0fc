"""From voxels to images: rebuild a trained decoder from its checkpoint, predict tokens and latents,
generate, choose.

- A decoder is whatever a checkpoint's config names: the network with its diffusion prior, the
  low-level network, or a ridge baseline; the functions here treat them alike.
- Randomness is drawn per image from (seed, image id, sample), so a reconstruction does not depend
  on the batch it was made in.
- Nothing here sees the images that were shown: selection among samples uses what the brain
  predicted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from src import models
from src.pretrained import (
    Clipper,
    Generator,
    ImageVariation,
    PatchClip,
    VersatileDiffusion,
    constant_condition,
)
from src.published import build_decoder, published_config, read_published
from src.unclip import UnclipDecoder
from src.utils import PerceptError, atomic, load_checkpoint, load_strictly


def high_level_config(
    parameters: Mapping[str, Any], in_dim: int, tokens: int, dim: int
) -> dict[str, Any]:
    """The config of notebook 01's model, from which `build_decoder` makes it.

    Args:
        parameters: of the notebook: hidden, h, n_blocks, use_projector, projector_dim, prior_depth,
            prior_heads, prior_dim_head, timesteps, max_text_len; 0 stands for what the published
            model of that kind has.
        in_dim: voxels.
        tokens: tokens of an image; 1 unless hidden.
        dim: dim of a token.
    """
    p, hidden = parameters, parameters["hidden"]
    net = {
        "dim": dim,
        "depth": p["prior_depth"] or (6 if hidden else 12),
        "dim_head": p["prior_dim_head"],
        "heads": p["prior_heads"],
    }
    steps = p["timesteps"] or (100 if hidden else 1000)
    brain = {
        "in_dim": in_dim,
        "out_dim": tokens * dim,
        "clip_size": dim,
        "h": p["h"],
        "n_blocks": p["n_blocks"],
    }
    networks = {
        True: {
            "name": "VersatileDiffusionPriorNetwork",
            "kwargs": net | {"num_tokens": tokens, "learned_query_mode": "pos_emb"},
        },
        False: {
            "name": "DiffusionPriorNetwork",
            "kwargs": (
                net
                | {
                    "num_timesteps": steps,
                    "max_text_len": p["max_text_len"],
                    "normformer": True,
                }
            ),
        },
    }
    return {
        "name": "BrainDiffusionPrior",
        "kwargs": {
            "image_embed_dim": dim,
            "timesteps": steps,
            "cond_drop_prob": 0.2 if hidden else 0.0,
        },
        "voxel2clip": {
            "name": "BrainNetwork",
            "kwargs": (
                brain | {"use_projector": p["use_projector"], "projector_dim": p["projector_dim"]}
            ),
        },
        "net": networks[hidden],
    }


def combined_config(
    parameters: Mapping[str, Any], in_dim: int, dim: int, volume: Sequence[int] | None = None
) -> dict[str, Any]:
    """The config of the combined model (notebook 01_train_combined), from which `build_decoder`
    makes it.

    Args:
        parameters: of the notebook: arch, h, n_blocks, conv_channels, conv_strides, prior_depth,
            prior_heads, prior_dim_head, timesteps, max_text_len, prior_scale (0: sqrt(dim), as
            published).
        in_dim: voxels.
        dim: of CLIP's final embedding.
        volume: (x, y, z) where the betas are whole volumes.

    Raises:
        PerceptError: for an encoder of volumes without volumes, or channels and strides that are no
            numbers.
    """
    p = parameters
    name, kwargs = models.ENCODERS[p["arch"]]
    if name == "BrainNetwork":
        kwargs = kwargs | {
            "in_dim": in_dim,
            "out_dim": dim,
            "clip_size": dim,
            "h": p["h"],
            "n_blocks": p["n_blocks"],
        }
    elif volume is None:
        raise PerceptError(
            f"arch '{p['arch']}' reads whole volumes, but the betas are (trials, voxels): prepare"
            " betas (trials, x, y, z), or choose brainnet."
        )
    else:
        kwargs = kwargs | {"dims": [int(side) for side in volume], "out_dim": dim, "clip_size": dim}
        given = {key: p[f"conv_{key}"] for key in ("channels", "strides") if p[f"conv_{key}"]}
        kwargs |= {key: _numbers(text, f"conv_{key}") for key, text in given.items()}
    net = {
        "dim": dim,
        "depth": p["prior_depth"],
        "dim_head": p["prior_dim_head"],
        "heads": p["prior_heads"],
        "normformer": True,
    }
    prior = {"image_embed_dim": dim, "timesteps": p["timesteps"], "cond_drop_prob": 0.0} | (
        {"image_embed_scale": p["prior_scale"]} if p["prior_scale"] else {}
    )
    return {
        "name": "BrainDiffusionPrior",
        "kwargs": prior,
        "voxel2clip": {"name": name, "kwargs": kwargs},
        "net": {
            "name": "DiffusionPriorNetwork",
            "kwargs": net | {"num_timesteps": p["timesteps"], "max_text_len": p["max_text_len"]},
        },
    }


PATCHES = {
    "bigG": (256, 1664),
    "ViT-B/32": (49, 768),
}  # (tokens, dim) that released MindEye2 networks predict
BACKBONES = {"mixer": "MixerBrainNetwork", "residual": "ResidualBrainNetwork"}


def mindeye2_config(
    parameters: Mapping[str, Any], voxels: Sequence[int], tokens: int, dim: int, latent: int
) -> dict[str, Any]:
    """The config of MindEye2 (notebook 01_train_mindeye2), from which `build_decoder` makes it.

    Args:
        parameters: of the notebook: hidden_dim, n_blocks, backbone, blurry_recon, clip_scale,
            seq_past, seq_future, prior, prior_depth, prior_dim_head, timesteps, faithful.
        voxels: of each subject.
        tokens: tokens of an image.
        dim: dim of a token.
        latent: height and width of the blurry picture's latent.
    """
    p = parameters
    backbone = {
        "h": p["hidden_dim"],
        "out_dim": tokens * dim,
        "clip_size": dim,
        "seq_len": 1 + p["seq_past"] + p["seq_future"],
        "n_blocks": p["n_blocks"],
        "blurry_recon": p["blurry_recon"],
        "clip_scale": p["clip_scale"],
        "latent_size": latent,
        "folded": "dead_mixer" not in p["faithful"],
    }
    net = {
        "dim": dim,
        "depth": p["prior_depth"],
        "dim_head": p["prior_dim_head"],
        "num_tokens": tokens,
    }
    return {
        "name": "MindEye2",
        "kwargs": {
            "image_embed_dim": dim,
            "timesteps": p["timesteps"],
            "cond_drop_prob": 0.2,
            "image_embed_scale": 1.0,
        },  # tokens as they are, as published
        "ridge": {
            "name": "RidgeRegression",
            "kwargs": {"input_sizes": [int(n) for n in voxels], "out_features": p["hidden_dim"]},
        },
        "backbone": {"name": BACKBONES[p["backbone"]], "kwargs": backbone},
        "net": {"name": "PriorNetwork", "kwargs": net} if p["prior"] else None,
    }


def _numbers(text: str, parameter: str) -> list[int]:
    """Whole numbers that a parameter gives separated by commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise PerceptError(
            f"{parameter} is '{text}': give whole numbers separated by commas, e.g. 64,128,256."
        ) from None


def low_level_config(parameters: Mapping[str, Any], in_dim: int) -> dict[str, Any]:
    """The config of notebook 02's model, from which `build_decoder` makes it.

    Args:
        parameters: of the notebook: h, n_blocks, use_cont, ups_mode, latent_size,
            block_out_channels, and, where it has one, dropout.
        in_dim: voxels.
    """
    kwargs = {
        name: parameters[name]
        for name in ("h", "n_blocks", "use_cont", "ups_mode", "latent_size", "dropout")
        if name in parameters
    }
    if parameters["block_out_channels"]:
        kwargs["block_out_channels"] = _numbers(
            parameters["block_out_channels"], "block_out_channels"
        )
    return {"name": "Voxel2StableDiffusionModel", "kwargs": {"in_dim": in_dim} | kwargs}


def basic_config(
    parameters: Mapping[str, Any], in_dim: int, latent: tuple[int, ...], scale: float
) -> dict[str, Any]:
    """The config of the basic autoencoder's encoder (notebook 02_train_basic_autoencoder), from
    which `build_decoder` makes it.

    Args:
        parameters: of the notebook: encoder, scaled_latents.
        in_dim: voxels.
        latent: (channels, height, width) of the autoencoder's latent.
        scale: its scaling factor.
    """
    factor = 1.0 if parameters["scaled_latents"] else scale
    return {
        "name": "BasicEncoder",
        "kwargs": {
            "in_dim": in_dim,
            "size": parameters["encoder"],
            "latent_size": latent[1],
            "latent_channels": latent[0],
            "factor": factor,
        },
    }


def _is_released(path: str | Path) -> bool:
    """Whether a checkpoint is one that others released (.pth, or a folder that DeepSpeed wrote),
    and not of ours; refused where there is none.
    """
    if not Path(path).exists():
        raise PerceptError(
            f"No checkpoint at {path}: train that stage first (notebooks 01 and 02), or name the"
            " run that has it."
        )
    return Path(path).suffix == ".pth" or Path(path).is_dir()


def load_decoder(path: str | Path, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a trained decoder from one file: of ours (.safetensors), or a released one (.pth, or
    a folder that DeepSpeed wrote).

    Returns:
        The module in eval mode, and the config stored with it (of a released file: read from its
            weights).

    Raises:
        PerceptError: if the file is missing or does not fit the model that it names.
    """
    state, config = _published(path) if _is_released(path) else load_checkpoint(path, device)
    decoder = build_decoder(config["model"])
    load_strictly(decoder, state, str(path))
    return decoder.to(device).eval().requires_grad_(False), config


def decoder_config(path: str | Path) -> dict[str, Any]:
    """The config that comes with a decoder's file, without its weights; as `load_decoder` gives it.

    Raises:
        PerceptError: if the file is missing.
    """
    if _is_released(path):
        return _published(path)[1]
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("config", "{}"))


def find_decoder(folder: str | Path, level: str, checkpoint: str = "last") -> Path:
    """Where a run keeps a decoder: `level`/<checkpoint>.safetensors of ours, or else a released
    file as its authors name it.

    Args:
        folder: train_logs/<run>.
        level: "high_level" or "low_level".
        checkpoint: "last" or "best".
    """
    ours, folder = Path(folder) / level / f"{checkpoint}.safetensors", Path(folder)
    released = folder / f"{checkpoint}.pth" if level == "high_level" else folder / "epoch120.pth"
    if level == "high_level" and not released.exists() and (folder / checkpoint).is_dir():
        released = folder / checkpoint  # of MindEye2 under DeepSpeed
    return released if released.exists() and not ours.exists() else ours


def _published(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and config of a released file, the config as `fit` would have stored it."""
    state = read_published(path)
    model = published_config(state, str(path))
    if model["name"] == "MindEye2":
        kwargs = model["backbone"]["kwargs"]
        variant = next(
            (name for name, (_, dim) in PATCHES.items() if dim == kwargs["clip_size"]), "bigG"
        )
        config = {
            "model": model,
            "tokens": [kwargs["out_dim"] // kwargs["clip_size"], kwargs["clip_size"]],
        }
        return state, config | {
            "clip": {"patch_tokens": True, "variant": variant, "squeezed": True}
        }
    if model["name"] != "BrainDiffusionPrior":
        return state, {"model": model}
    return state, {
        "model": model,
        "tokens": [model["net"]["kwargs"].get("num_tokens", 1), model["kwargs"]["image_embed_dim"]],
    }


@torch.no_grad()
def predict_tokens(
    decoder: nn.Module,
    voxels: np.ndarray,
    token_shape: tuple[int, int],
    n_samples: int = 1,
    use_prior: bool = True,
    timesteps: int = 0,
    seed: int = 42,
    batch_size: int = 100,
    device: str = "cpu",
    image_ids: np.ndarray | None = None,
    same: bool = False,
    solver: str = "published",
) -> tuple[Tensor, Tensor]:
    """Predict CLIP tokens from voxels.

    Args:
        decoder: a `BrainDiffusionPrior` with its voxel2clip, a `MindEye2`, or a ridge baseline.
        voxels: (images, voxels), normalised; (images, trials, voxels) for a MindEye2 that reads
            neighbouring trials.
        token_shape: (tokens, dim).
        n_samples: samples of the prior an image.
        use_prior: sample the prior; otherwise the backbone's own output, which then must have been
            trained to regress the tokens, and one sample.
        timesteps: sampling steps of the prior; 0: all of its schedule.
        seed: of the prior's noise, which is drawn for each image by itself.
        batch_size: images at a time.
        device: torch device.
        image_ids: (images,), from which the noise is drawn; by default the position in `voxels`.
        same: the same noise for all images, as published.
        solver: of the prior, as `BrainDiffusionPrior.sample`.

    Returns:
        Tokens (images, samples, tokens, dim) and the projected tokens for retrieval (images,
        tokens, dim). Where there are several tokens an image, samples of the prior are divided by
        the norm of the CLS token, as published; one embedding alone, regressions and MindEye2's
        tokens, which have
        no CLS token, are left as they are: a mean is shorter than what it is the mean of.
    """
    found, projected = [], []
    whole = isinstance(decoder, models.MindEye2)
    prior: Any = decoder.diffusion_prior if isinstance(decoder, models.MindEye2) else decoder
    network: Any = decoder if whole else getattr(decoder, "voxel2clip", None)
    ids = np.arange(len(voxels)) if image_ids is None else image_ids
    for start in range(0, len(voxels), batch_size):
        x = torch.as_tensor(voxels[start : start + batch_size], dtype=torch.float32, device=device)
        if network is None:
            tokens = decoder(x).view(len(x), 1, *token_shape)
            projected.append(tokens[:, 0].cpu())
        else:
            backbone, projection = network.tokens(x)
            tokens = backbone[:, None] / (1.0 if prior is None else prior.image_embed_scale)
            if use_prior and prior is not None:
                mine = ids[start : start + batch_size]
                generator = [
                    torch.Generator(device).manual_seed(seed if same else _seed(seed, int(image)))
                    for image in mine
                ]
                steps = timesteps or prior.noise_scheduler.num_timesteps
                repeated = backbone.repeat_interleave(
                    n_samples, 0
                )  # (images * samples, tokens, dim)
                tokens = prior.sample(
                    repeated, timesteps=steps, generator=generator, solver=solver
                ).view(len(x), n_samples, *token_shape)
                if token_shape[0] > 1 and not whole:
                    tokens = tokens / (tokens[:, :, :1].norm(dim=-1, keepdim=True) + 1e-6)
            projected.append(projection.view(len(x), *token_shape).cpu())
        found.append(tokens.cpu())
    return torch.cat(found), torch.cat(projected)


def _seed(seed: int, image: int) -> int:
    """A seed of its own for each image."""
    return int(np.random.SeedSequence([seed, image]).generate_state(1, np.uint32)[0])


@torch.no_grad()
def predict_latents(
    decoder: nn.Module,
    voxels: np.ndarray,
    shape: tuple[int, int, int],
    batch_size: int = 100,
    device: str = "cpu",
) -> Tensor:
    """Predict scaled VAE latents (images, channels, h, w) from normalised voxels (images, voxels);
    of a MindEye2 those of its blurry branch.
    """
    parts = []
    for start in range(0, len(voxels), batch_size):
        out = decoder(
            torch.as_tensor(voxels[start : start + batch_size], dtype=torch.float32, device=device)
        )
        out = out[2] if isinstance(decoder, models.MindEye2) else out
        out = (
            out[0] if isinstance(out, tuple) else out
        )  # beside the latent stand the contrastive maps
        parts.append(out.view(len(out), *shape).cpu())
    return torch.cat(parts)


def latent_noise(
    image_ids: np.ndarray,
    shape: tuple[int, int, int],
    seed: int = 42,
    sample: int = 0,
    same: bool = False,
) -> Tensor:
    """Standard normal noise (images, channels, h, w), one draw an image from (seed, image, sample);
    `same`: one for all, as published.
    """
    draws = []
    for image in image_ids:
        rng = np.random.default_rng([seed, sample, 0 if same else int(image)])
        draws.append(torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)))
    return torch.stack(draws)


SAMPLERS = {
    "unipcm": "UniPCMultistepScheduler",
    "pndms": "PNDMScheduler",
}  # of the diffusion library, by the name that the early system gave them


def sampled_by(diffusion: Generator, sampler: str) -> Generator:
    """The generator, sampling from now on by a key of SAMPLERS; it is loaded with "unipcm". "pndms"
    begins at noise alone (no img2img).
    """
    if sampler not in SAMPLERS:
        raise PerceptError(
            f"There is no sampler '{sampler}' for the generator: choose one of"
            f" {', '.join(SAMPLERS)}."
        )
    now: Any = diffusion.scheduler
    if type(now).__name__ != SAMPLERS[sampler]:
        chosen = next(
            kind for kind in now.compatibles if kind.__name__ == SAMPLERS[sampler]
        ).from_config(now.config, skip_prk_steps=True)
        chosen.set_begin_index = lambda start: (
            None
        )  # it has no such thing, and counts its steps itself
        diffusion.scheduler = chosen
    return diffusion


def encoder_for(
    config: Mapping[str, Any], weights: str, device: str = "cpu"
) -> Clipper | PatchClip:
    """The CLIP whose tokens a checkpoint predicts, from the config that it carries."""
    made_for = dict(config.get("clip", {}))
    if made_for.pop("patch_tokens", False):
        return PatchClip(weights, device=device, **made_for)
    hidden = config["tokens"][0] > 1
    return Clipper(
        weights,
        device=device,
        **({"variant": "ViT-L/14", "hidden": hidden, "norm_embs": hidden} | made_for),
    )


def generator_for(
    tokens: int, weights: str, device: str = "cpu", clip: Clipper | PatchClip | None = None
) -> Generator:
    """The generator that the published systems feed with such tokens: one goes to image variations,
    all of them to Versatile Diffusion, and patch tokens alone to MindEye2's unCLIP.
    """
    if isinstance(clip, PatchClip):
        return UnclipDecoder(weights, device=device, squeezed=clip.squeezed)
    return (
        VersatileDiffusion(weights, device=device)
        if tokens > 1
        else ImageVariation(weights, device=device)
    )


def generate_images(
    diffusion: Generator,
    tokens: Tensor,
    image_ids: np.ndarray,
    init_latents: Tensor | None = None,
    strength: float = 1.0,
    seed: int = 42,
    batch_size: int = 50,
    same: bool = False,
    n_samples: int = 0,
    **options: Any,
) -> Tensor:
    """Generate every sample of every image.

    Args:
        diffusion: the frozen generator.
        tokens: (images, samples, tokens, dim).
        image_ids: (images,), from which the noise is drawn.
        init_latents: scaled latents (images, channels, h, w) to start from, or None.
        strength: as `Generator.generate`.
        seed: of the noise.
        batch_size: pictures at a time, images times samples.
        same: the same noise for all images, as published.
        n_samples: pictures an image, where `tokens` has one sample to share; by default as many as
            it has.
        options: guidance_scale, num_inference_steps.

    Returns:
        (images, samples, 3, height, width) in [0, 1].
    """
    images, samples = len(tokens), n_samples or tokens.shape[1]
    condition = tokens.expand(-1, samples, -1, -1).flatten(0, 1)  # (images * samples, tokens, dim)
    noise = torch.stack(
        [latent_noise(image_ids, diffusion.latent_shape, seed, s, same) for s in range(samples)], 1
    ).flatten(0, 1)
    init = None if init_latents is None else init_latents.repeat_interleave(samples, 0)
    made = []
    for start in range(0, len(noise), batch_size):
        rows = slice(start, start + batch_size)
        made.append(
            diffusion.generate(
                condition[rows],
                noise[rows],
                None if init is None else init[rows],
                strength,
                **options,
            ).cpu()
        )
    return torch.cat(made).unflatten(0, (images, samples))


def guided_images(
    pipeline: Any,
    captions: Sequence[str],
    pictures: Tensor,
    image_ids: np.ndarray,
    strength: float = 0.75,
    seed: int = 42,
    batch_size: int = 16,
    **options: Any,
) -> Tensor:
    """Repaint pictures after sentences with the library's `StableDiffusionImg2ImgPipeline`.

    Args:
        pipeline: from `pretrained.stable_diffusion_pipeline`.
        captions: (images,), one sentence a picture.
        pictures: (images, 3, height, width) in [0, 1], from which it begins.
        image_ids: (images,), from which each picture's noise is drawn, whatever batch it is in.
        strength: share of the steps that are run; where that is less than one step, the pictures
            come back as they are.
        seed: of the noise.
        batch_size: pictures at a time.
        options: guidance_scale, num_inference_steps.

    Returns:
        (images, 3, height, width) in [0, 1].

    Source: Meng et al. 2022 (SDEdit), arXiv 2108.01073; as in the 2023 ROI project.
    """
    if int(options.get("num_inference_steps", 50) * strength) < 1:
        return pictures.clone()
    made = []
    for start in range(0, len(captions), batch_size):
        part = slice(start, start + batch_size)
        generator = [
            torch.Generator().manual_seed(_seed(seed, int(image))) for image in image_ids[part]
        ]
        with constant_condition(pipeline.unet):
            out = pipeline(
                prompt=list(captions[part]),
                image=pictures[part].float(),
                strength=strength,
                generator=generator,
                output_type="pt",
                **options,
            ).images
        made.append(out.float().clamp(0, 1).cpu())
    return torch.cat(made)


def pick_best(
    clipper: Clipper | PatchClip, projected: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """Second-order selection: of each image's candidates, the one whose CLIP tokens are nearest to
    those the brain predicted.

    Args:
        clipper: CLIP with the tokens that the brain predicts: hidden ones, or its final embedding.
        projected: brain-predicted tokens (images, tokens, dim).
        candidates: (images, samples, 3, height, width).

    Returns:
        The chosen images (images, 3, height, width) and their index (images,).

    Source: MindEye, section 2.4 (there called second-order selection). The images that were shown
    play no part.
    """
    images, samples = candidates.shape[:2]
    if samples == 1:
        return candidates[:, 0], torch.zeros(images, dtype=torch.long)
    brain = F.normalize(projected.flatten(1), dim=-1)[:, None]  # (images, 1, features)
    embedded = torch.cat(
        [clipper.embed_image(part).flatten(1).cpu() for part in candidates.flatten(0, 1).split(64)]
    )
    scores = (F.normalize(embedded, dim=-1).unflatten(0, (images, samples)) * brain).sum(
        -1
    )  # (images, samples)
    best = scores.nan_to_num(-2.0).argmax(1)
    return candidates[torch.arange(images), best], best


@torch.no_grad()
def sample_spread(clipper: Clipper | PatchClip, candidates: Tensor) -> Tensor:
    """How far apart the samples of an image are, (images,): mean distance (1 - cosine) of the CLIP
    tokens of every two of them.

    Args:
        clipper: CLIP, whichever the selection uses.
        candidates: (images, samples, 3, height, width), at least two samples.
    """
    images, samples = candidates.shape[:2]
    embedded = torch.cat(
        [clipper.embed_image(part).flatten(1).cpu() for part in candidates.flatten(0, 1).split(64)]
    )
    total = (
        F.normalize(embedded, dim=-1).unflatten(0, (images, samples)).sum(1)
    )  # (images, features)
    return 1 - (total.square().sum(-1) - samples) / (
        samples * (samples - 1)
    )  # of all pairs at once


def repeat_agreement(predictions: Sequence[Tensor]) -> Tensor:
    """How alike the predictions from single repeats are, (images,): mean correlation over every two
    repeats.

    Args:
        predictions: one (images, features...) a repeat. The mean over images is taken off first, so
            that only what differs between images counts.
    """
    if len(predictions) < 2:
        raise PerceptError("Agreement between repeats needs at least two of them.")
    rows = []
    for prediction in predictions:
        x = prediction.flatten(1).float()
        x = x - x.mean(0)
        rows.append(F.normalize(x - x.mean(1, keepdim=True), dim=1))
    return torch.stack([(a * b).sum(1) for a, b in combinations(rows, 2)]).mean(0)


def in_chunks(
    make: Callable[[slice], dict[str, Tensor]], n: int, size: int, folder: Path, mark: Any
) -> dict[str, Tensor]:
    """Call `make` for slices of n images and join what it gives; finished slices are kept, so that
    an interrupted call goes on where it stopped.

    Args:
        make: slice of images -> tensors (images, ...) by name.
        n: number of images.
        size: images at a time.
        folder: for the finished slices; delete it when their result is stored.
        mark: whatever the result depends on, as JSON values; slices with another mark are not used.

    Returns:
        Tensors (n, ...) by name.
    """
    key = hashlib.sha256(
        json.dumps([n, size, mark], sort_keys=True, default=str).encode()
    ).hexdigest()[:12]
    parts: list[dict[str, Tensor]] = []
    with tqdm(total=n, desc="reconstructing", unit="image", mininterval=2) as bar:
        for start in range(0, n, size):
            path, rows = (
                folder / f"{key}-{start:06d}.safetensors",
                slice(start, min(start + size, n)),
            )
            if not path.exists():
                made = {name: value.contiguous() for name, value in make(rows).items()}
                with atomic(path) as temporary:
                    save_file(made, temporary)
            parts.append(load_file(path))
            bar.update(rows.stop - rows.start)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def load_reconstructions(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What notebook 03 left in results/<run>/: tensors (images, ...) by name, and what they are of
    (protocol, test_set, main, repeats).

    Pictures are in half precision.

    Raises:
        PerceptError: there is no such file.
    """
    path = Path(folder) / "reconstructions.safetensors"
    if not path.exists():
        raise PerceptError(f"{path} is missing: run notebook 03 for this run first.")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 (the file is no dict)


def load_row(folder: str | Path, row: str, image_ids: np.ndarray) -> Tensor:
    """One row of pictures of another run, of the same test images or of more.

    Args:
        folder: results/<run> of that run.
        row: e.g. "retrieved".
        image_ids: (images,) that are wanted.

    Returns:
        (images, 3, height, width) in [0, 1].

    Raises:
        PerceptError: the run has no reconstructions, no such row, or not all of these images.
    """
    made, _ = load_reconstructions(folder)
    if row not in made:
        raise PerceptError(
            f"{Path(folder).name} has no pictures '{row}': run notebook 05_search_index for it"
            " first."
        )
    place = {image: i for i, image in enumerate(made["image_ids"].tolist())}
    if missing := [image for image in image_ids.tolist() if image not in place]:
        raise PerceptError(
            f"{Path(folder).name} has no test image {missing[0]}: reconstruct both runs with the"
            " same dataset, subj and first_images."
        )
    return made[row][[place[image] for image in image_ids.tolist()]].float()

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from src.decoding.predict import _seed
from src.pretrained.clip import Clipper, PatchClip
from src.pretrained.generators import (
    ImageGenerator,
    ImageVariation,
    VersatileDiffusion,
    cache_condition,
)
from src.pretrained.unclip import UnclipDecoder
from src.utils import PerceptError, atomic


def draw_latent_noise(
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


def set_sampler(diffusion: ImageGenerator, sampler: str) -> ImageGenerator:
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


def load_encoder(
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


def load_generator(
    tokens: int, weights: str, device: str = "cpu", clip: Clipper | PatchClip | None = None
) -> ImageGenerator:
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
    diffusion: ImageGenerator,
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
        strength: as `ImageGenerator.generate`.
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
        [
            draw_latent_noise(image_ids, diffusion.latent_shape, seed, s, same)
            for s in range(samples)
        ],
        1,
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


def repaint_images(
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
        pipeline: from `pretrained.load_stable_diffusion_pipeline`.
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
        with cache_condition(pipeline.unet):
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


def select_best(
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
def compute_sample_spread(clipper: Clipper | PatchClip, candidates: Tensor) -> Tensor:
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


def compute_in_chunks(
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


def load_condition(folder: str | Path, row: str, image_ids: np.ndarray) -> Tensor:
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

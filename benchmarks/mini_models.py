"""What the mini models can do: each generator from its true condition, judged by the independent
classifier, and what it costs.

    python benchmarks/mini_models.py [number of images]

Images show combinations of kind, colour and scene of the test split, with a seed that no training
and no demo uses. Every generator is run from noise alone and from a blurred version of the image
(img2img); "shuffled" is the same images against other images' labels.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src import miniworld, pretrained
from src.decoding import draw_latent_noise
from src.evaluation import bootstrap_mean, derangements

SEED = 11_000

SCENE_CAPTIONS = (0, 1, 3, 4)  # of an image, those that name the scene


def make_images(count: int) -> tuple[Tensor, dict[str, np.ndarray], list[str]]:
    """Images (count, 3, 32, 32) in [0, 1], labels by question, and one caption an image that names
    the scene.
    """
    contents = [miniworld.compose_image(SEED, i, "test") for i in range(count)]
    pixels = np.stack([miniworld.render_image(content, SEED) for content in contents])
    rows = [miniworld.make_label_row(content) for content in contents]
    captions = []
    for i, content in enumerate(contents):
        caption = SCENE_CAPTIONS[i % len(SCENE_CAPTIONS)]
        captions.append(miniworld.write_captions(content)[caption])
    labels = {name: np.array([row[name] for row in rows]) for name in ("scene", "kind", "colour")}
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, labels, captions


def make_conditions(
    images: Tensor, captions: list[str]
) -> dict[str, tuple[pretrained.ImageGenerator, Tensor]]:
    """Each generator with the true condition of every image, (images, tokens, dim)."""
    text, stable = pretrained.VersatileDiffusionText("mini"), pretrained.StableDiffusion("mini")
    return {
        "Versatile Diffusion, image tokens": (
            pretrained.VersatileDiffusion("mini"),
            pretrained.Clipper("mini").embed_image(images),
        ),
        "Versatile Diffusion, text": (text, text.embed_text(captions)),
        "image variation, one embedding": (
            pretrained.ImageVariation("mini"),
            pretrained.Clipper("mini", hidden=False, norm_embs=False).embed_image(images)[:, None],
        ),
        "Stable Diffusion, text": (stable, stable.embed_text(captions)),
    }


def format_row(
    name: str,
    classifier: pretrained.CategoryClassifier,
    images: Tensor,
    labels: dict[str, np.ndarray],
) -> str:
    """One line of the table: share right with its interval, and the share of shuffled answers."""
    cells, answers = [], classifier.classify(images)
    for question, truth in labels.items():
        share = bootstrap_mean((answers[question] == truth).astype(float))
        orders = derangements(len(truth), 5)
        shuffled = np.mean([(answers[question][order] == truth).mean() for order in orders])
        cells.append(f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}], {shuffled:.2f}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main(count: int = 300) -> None:
    """Print the table of the model card."""
    started = time.time()
    for load in (
        pretrained.VersatileDiffusion,
        pretrained.VersatileDiffusionText,
        pretrained.ImageVariation,
        pretrained.StableDiffusion,
        pretrained.Clipper,
        pretrained.CategoryClassifier,
    ):
        load("mini")
    print(f"all mini models loaded in {time.time() - started:.1f} s\n")
    images, labels, captions = make_images(count)
    classifier, vae = pretrained.CategoryClassifier("mini"), pretrained.LatentAutoencoder("mini")
    latents = vae.encode(images)
    error = (vae.decode(latents) - images) ** 2
    psnr = -10 * torch.log10(error.mean((1, 2, 3)))
    print(f"VAE round trip: PSNR {psnr.mean():.1f} dB over {count} images\n")
    print(
        f"| n = {count}: share right [95 % interval], shuffled | "
        + " | ".join(labels)
        + " |\n|---|---|---|---|"
    )
    print(format_row("the images themselves", classifier, images, labels))
    print(format_row("VAE round trip", classifier, vae.decode(latents), labels))
    small = F.avg_pool2d(images, 4)
    blurred = F.interpolate(small, images.shape[-2:], mode="bilinear")
    print(format_row("blurred to 8 x 8, the start of img2img", classifier, blurred, labels))
    start, noise = vae.encode(blurred), draw_latent_noise(np.arange(count), vae.latent_shape)
    for name, (generator, condition) in make_conditions(images, captions).items():
        start_time = time.time()
        generated = generator.generate(condition, noise)
        seconds = time.time() - start_time
        print(format_row(f"{name}, from noise", classifier, generated, labels))
        repainted = generator.generate(condition, noise, start, strength=0.75)
        print(format_row(f"{name}, img2img .75", classifier, repainted, labels))
        print(
            f"{name}: {seconds:.0f} s for {count} images, 20 steps with guidance,"
            f" {torch.get_num_threads()} threads",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""What the mini models can do: each generator from its true condition, judged by the independent
classifier, and what it costs.

    python benchmarks/mini_models.py [number of images]

Images show combinations of kind, colour and scene of the test split, with a seed that no training
and no demo uses. Every generator is run from noise alone and from a blurred version of the image
(img2img); "shuffled" is the same pictures against other images' labels.
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


def seen(count: int) -> tuple[Tensor, dict[str, np.ndarray], list[str]]:
    """Images (count, 3, 32, 32) in [0, 1], labels by question, and one caption an image that names
    the scene.
    """
    drawn = [miniworld.compose_image(SEED, i, "test") for i in range(count)]
    images = np.stack([miniworld.render_image(what, SEED) for what in drawn])
    labels = [miniworld.make_label_row(what) for what in drawn]
    captions = [miniworld.write_captions(what)[(0, 1, 3, 4)[i % 4]] for i, what in enumerate(drawn)]
    by_question = {q: np.array([label[q] for label in labels]) for q in ("scene", "kind", "colour")}
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, by_question, captions


def conditions(
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


def row(
    name: str, judge: pretrained.CategoryClassifier, images: Tensor, labels: dict[str, np.ndarray]
) -> str:
    """One line of the table: share right with its interval, and the shuffled floor."""
    cells, answers = [], judge.classify(images)
    for question, truth in labels.items():
        share = bootstrap_mean((answers[question] == truth).astype(float))
        floor = np.mean(
            [(answers[question][order] == truth).mean() for order in derangements(len(truth), 5)]
        )
        cells.append(f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}], {floor:.2f}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main(count: int = 300) -> None:
    """Print the table of the model card."""
    started = time.time()
    loaded = [
        cls("mini")
        for cls in (
            pretrained.VersatileDiffusion,
            pretrained.VersatileDiffusionText,
            pretrained.ImageVariation,
            pretrained.StableDiffusion,
        )
    ]
    loaded += [pretrained.Clipper("mini"), pretrained.CategoryClassifier("mini")]
    print(f"all mini models loaded in {time.time() - started:.1f} s\n")
    images, labels, captions = seen(count)
    judge, vae = pretrained.CategoryClassifier("mini"), pretrained.LatentAutoencoder("mini")
    latents = vae.encode(images)
    psnr = -10 * torch.log10(((vae.decode(latents) - images) ** 2).mean((1, 2, 3)))
    print(f"VAE round trip: PSNR {psnr.mean():.1f} dB over {count} images\n")
    print(
        f"| n = {count}: share right [95 % interval], shuffled | "
        + " | ".join(labels)
        + " |\n|---|---|---|---|"
    )
    print(row("the images themselves", judge, images, labels))
    print(row("VAE round trip", judge, vae.decode(latents), labels))
    blurred = F.interpolate(F.avg_pool2d(images, 4), images.shape[-2:], mode="bilinear")
    print(row("blurred to 8 x 8, the start of img2img", judge, blurred, labels))
    start, noise = vae.encode(blurred), draw_latent_noise(np.arange(count), vae.latent_shape)
    for name, (generator, condition) in conditions(images, captions).items():
        begun = time.time()
        made = generator.generate(condition, noise)
        spent = time.time() - begun
        print(row(f"{name}, from noise", judge, made, labels))
        print(
            row(
                f"{name}, img2img .75",
                judge,
                generator.generate(condition, noise, start, strength=0.75),
                labels,
            )
        )
        print(
            f"{name}: {spent:.0f} s for {count} images, 20 steps with guidance,"
            f" {torch.get_num_threads()} threads",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

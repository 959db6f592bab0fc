"""What each published behaviour that we do not follow by default is worth: the high level of the
mini recipe trained with and without it.

    python benchmarks/faithful.py [epochs] [seeds]        # about 45 seconds a row and seed on two cores with 12 epochs

Scores are of the 300 validation images, repeats averaged: the share of the variance of CLIP's
tokens that the backbone explains, and retrieval both ways. Every row has the paired differences to
ours with 95 % bootstrap intervals over the images (seeds averaged first).
"""

from __future__ import annotations

import sys

import numpy as np
from mindeye_modes import stage

from src.data import Normaliser, cache_targets, open_subject
from src.decoding import PriorSampling, load_decoder, predict_tokens
from src.evaluation import bootstrap_mean, paired_bootstrap
from src.pretrained import Clipper
from src.retrieval import top1_brain_from_image_each, top1_image_from_brain_each
from src.utils import HOME

ROWS: dict[str, dict[str, object]] = {
    "ours": {},
    "mixco_labels": {"faithful": "mixco_labels"},
    "norm_decay": {"faithful": "norm_decay"},
    "batch_repeats": {"faithful": "batch_repeats"},
    "resampled_epochs": {"faithful": "resampled_epochs"},
    "no direct regression (mse_mult 0)": {"mse_mult": 0.0},
}


def scores(run: str) -> dict[str, np.ndarray]:
    """Of one trained run on the validation images: explained share of each image's tokens, and hits
    both ways, (images,) each.
    """
    subject, clipper, logs = open_subject("mini", 1), Clipper("mini"), HOME / "train_logs" / run
    voxels, ids = subject.get_mean_betas(
        "val", normaliser=Normaliser.load(logs / "normaliser.safetensors")
    )
    cached = cache_targets(
        "mini",
        "clip_tokens",
        clipper.fingerprint(),
        subject.all_images,
        clipper.encode_pixels,
        clipper.target_shape,
    )
    truth = cached.rows(ids).astype(np.float32)
    decoder, config = load_decoder(logs / "high_level" / "last.safetensors")
    tokens, projected = predict_tokens(
        decoder, voxels, tuple(config["tokens"]), PriorSampling(use_prior=False)
    )
    error = ((tokens[:, 0].numpy() - truth) ** 2).mean((1, 2))
    return {
        "token R2": 1 - error / truth.var(),
        "image from brain": top1_image_from_brain_each(projected, truth).astype(float),
        "brain from image": top1_brain_from_image_each(projected, truth).astype(float),
    }


def main(epochs: int = 12, seeds: int = 2) -> None:
    """Print the table."""
    reference: dict[str, np.ndarray] = {}
    print("| behaviour | token R2 | image from brain | brain from image |\n|---|---|---|---|")
    for row, (name, settings) in enumerate(ROWS.items()):
        runs = [f"faithful-{row}-seed{seed}" for seed in range(seeds)]
        for seed, run in enumerate(runs):
            stage(
                "01_train_high_level",
                "mindeye",
                run,
                {"num_epochs": epochs, "seed": seed} | settings,
            )
        every = [scores(run) for run in runs]
        found = {metric: np.mean([one[metric] for one in every], 0) for metric in every[0]}
        reference = reference or found
        cells = []
        for metric, values in found.items():
            change = paired_bootstrap(values, reference[metric])
            cells.append(
                f"{bootstrap_mean(values).value:.3f}, {change.value:+.3f} [{change.low:+.3f},"
                f" {change.high:+.3f}]"
            )
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

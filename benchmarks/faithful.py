"""What each published behaviour that we do not follow by default is worth: the high level of the
mini recipe trained with and without it.

    python benchmarks/faithful.py [epochs] [seeds]

That takes about 45 seconds a row and seed on two cores with 12 epochs. Scores are of the 300
validation images, repeats averaged: the share of the variance of CLIP's tokens that the backbone
explains, and retrieval both ways. Every row has the paired differences to ours with 95 % bootstrap
intervals over the images (seeds averaged first).
"""

from __future__ import annotations

import sys

import numpy as np
from mindeye_modes import run_stage

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


def score_run(run: str) -> dict[str, np.ndarray]:
    """Of one trained run on the validation images: explained share of each image's tokens, and hits
    both ways, (images,) each.
    """
    subject, clipper, logs = open_subject("mini", 1), Clipper("mini"), HOME / "train_logs" / run
    normaliser = Normaliser.load(logs / "normaliser.safetensors")
    voxels, ids = subject.get_mean_betas("val", normaliser=normaliser)
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
    sampling = PriorSampling(use_prior=False)
    tokens, projected = predict_tokens(decoder, voxels, tuple(config["tokens"]), sampling)
    residual = tokens[:, 0].numpy() - truth
    error = (residual**2).mean((1, 2))
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
            run_settings = {"num_epochs": epochs, "seed": seed} | settings
            run_stage("01_train_high_level", "mindeye", run, run_settings)
        run_scores = [score_run(run) for run in runs]
        scores = {}
        for metric in run_scores[0]:
            scores[metric] = np.mean([of_run[metric] for of_run in run_scores], 0)
        reference = reference or scores
        cells = []
        for metric, values in scores.items():
            change = paired_bootstrap(values, reference[metric])
            interval = f"[{change.low:+.3f}, {change.high:+.3f}]"
            cells.append(f"{bootstrap_mean(values).value:.3f}, {change.value:+.3f} {interval}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

"""The mindeye recipe on the mini world in every mode, scored on the test images: what do img2img,
samples, augmentation and the kind of tokens bring?

    python benchmarks/mindeye_modes.py [images] [epochs]

That takes about an hour on two cores with 200 images and the recipe's epochs. It trains what is
missing (train_logs/modes-*), reconstructs with other settings, and prints one table. Shares are the
classifier's; every row also has the paired difference in the classified kind to the first row, with
its 95 % bootstrap interval. The table describes; nothing is chosen by it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from src.data import open_subject
from src.evaluation import bootstrap_mean, paired_bootstrap
from src.metrics import pixcorr
from src.pretrained import CategoryClassifier
from src.retrieval import top1_image_from_brain_each
from src.utils import HOME, ROOT, progress

TRAINING: dict[str, tuple[str, dict[str, object]]] = {  # run -> (recipe, what differs)
    "tokens": ("mindeye", {}),
    "aug4": ("mindeye", {"use_image_aug": True, "cached_views": 4}),
    "aug": ("mindeye", {"use_image_aug": True}),
    "one": ("mindeye_retrieval", {}),
}
MODES: dict[str, tuple[str, dict[str, object]]] = {  # row -> (run, parameters of notebook 03)
    "img2img .85, 1 sample": ("tokens", {"img2img_strength": 0.85}),
    "no img2img, 1 sample": ("tokens", {"img2img_strength": 1.0}),
    "low-level image alone": ("tokens", {"img2img_strength": 0.0}),
    "img2img .85, 16 samples": ("tokens", {"img2img_strength": 0.85, "recons_per_sample": 16}),
    "no img2img, 16 samples": ("tokens", {"img2img_strength": 1.0, "recons_per_sample": 16}),
    "img2img .85, prior, 1 sample": ("tokens", {"img2img_strength": 0.85, "prior": True}),
    "img2img .85, prior, 16 samples": (
        "tokens",
        {"img2img_strength": 0.85, "prior": True, "recons_per_sample": 16},
    ),
    "img2img .85, prior in 10 steps of DPM-Solver++, 1 sample": (
        "tokens",
        {"img2img_strength": 0.85, "prior": True, "prior_solver": "dpm++", "timesteps": 10},
    ),
    "img2img .85, the same noise for all images": (
        "tokens",
        {"img2img_strength": 0.85, "same_seed": True},
    ),
    "img2img .85, begun as published": (
        "tokens",
        {"img2img_strength": 0.85, "faithful_img2img": True},
    ),
    "4 cached augmented views": ("aug4", {"img2img_strength": 0.85}),
    "augmented at every step": ("aug", {"img2img_strength": 0.85}),
    "1x768, no img2img": ("one", {"img2img_strength": 1.0}),
    "1x768, img2img .85": ("one", {"img2img_strength": 0.85}),
}


def run_stage(notebook: str, recipe: str, run: str, settings: dict[str, object]) -> None:
    """Run one notebook of a mini recipe under a name of its own, with the network alone."""
    parameters = {"model_name": run, "decoder": "network"} | settings
    command = [sys.executable, f"notebooks/{notebook}.py"]
    for folder in (recipe, f"{recipe}/mini"):
        command += ["-f", f"recipes/{folder}/{notebook}.yaml"]
    command += [f"--{name}={value}" for name, value in parameters.items()]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"MPLBACKEND": "agg"},
    )
    if done.returncode:
        raise SystemExit(f"{notebook} of {run} failed:\n{done.stderr[-2000:]}")


def train_runs(epochs: dict[str, object]) -> None:
    """Train the high level of every run and the low level of the first, which the others share."""
    for name, (recipe, settings) in progress(TRAINING.items(), "training"):
        run_stage("01_train_high_level", recipe, f"modes-{name}", settings | epochs)
    run_stage("02_train_autoencoder", "mindeye", "modes-tokens", {})


def score_run(results: Path, truth) -> dict[str, np.ndarray]:
    """Scores (images,) of one run of notebook 03, by name."""
    tensors = load_file(results / "reconstructions.safetensors")
    labels = truth.loc[tensors["image_ids"].numpy()]
    scores = {}
    answers = CategoryClassifier("mini").classify(tensors["network"])
    for question, answer in answers.items():
        scores[question] = (answer == labels[question].to_numpy()).astype(float)
    scores["pixcorr"] = pixcorr(tensors["seen"], tensors["network"])
    hits = top1_image_from_brain_each(tensors["projected_network"], tensors["true_tokens"])
    return scores | {"top-1": hits.astype(float)}


def main(images: int = 200, epochs: int = 0) -> None:
    """Print the table."""
    train_runs({"num_epochs": epochs} if epochs else {})
    truth, reference = open_subject("mini", 1).labels.set_index("image"), None
    print(
        "| mode | scene | kind | colour | pixcorr | image from brain, top-1 | kind, difference to"
        " the first row |\n" + "|---" * 7 + "|"
    )
    for name, (run, settings) in MODES.items():
        recipe = TRAINING[run][0]
        parameters = {"first_images": images, "autoencoder_name": "modes-tokens"} | settings
        run_stage("03_reconstruct", recipe, f"modes-{run}", parameters)
        scores = score_run(HOME / "results" / f"modes-{run}", truth)
        if reference is None:
            reference = scores["kind"]
        cells = []
        for mean in map(bootstrap_mean, scores.values()):
            cells.append(f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]")
        change = paired_bootstrap(scores["kind"], reference)
        cells.append(f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

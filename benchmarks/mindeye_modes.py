"""The mindeye recipe on the mini world in every mode, scored on the test images: what do img2img,
samples, augmentation and the kind of tokens bring?

    python benchmarks/mindeye_modes.py [images] [epochs]       # about an hour on two cores with 200 images and the recipe's epochs

Trains what is missing (train_logs/modes-*), reconstructs with other settings, and prints one table.
Shares are the judge's; every row also has the paired difference in the judged kind to the first
row, with its 95 % bootstrap interval. The table describes; nothing is chosen by it.
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
MODES: dict[str, tuple[str, dict[str, object]]] = {  # row -> (run, what notebook 03 is told)
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


def stage(notebook: str, recipe: str, run: str, settings: dict[str, object]) -> None:
    """Run one notebook of a mini recipe under a name of its own, with the network alone."""
    flags = [
        f"--{name}={value}"
        for name, value in ({"model_name": run, "decoder": "network"} | settings).items()
    ]
    files = [
        text
        for folder in (recipe, f"{recipe}/mini")
        for text in ("-f", f"recipes/{folder}/{notebook}.yaml")
    ]
    done = subprocess.run(
        [sys.executable, f"notebooks/{notebook}.py", *files, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"MPLBACKEND": "agg"},
    )
    if done.returncode:
        raise SystemExit(f"{notebook} of {run} failed:\n{done.stderr[-2000:]}")


def train(epochs: dict[str, object]) -> None:
    """Train the high level of every run and the low level of the first, which the others share."""
    for name, (recipe, settings) in progress(TRAINING.items(), "training"):
        stage("01_train_high_level", recipe, f"modes-{name}", settings | epochs)
    stage("02_train_autoencoder", "mindeye", "modes-tokens", {})


def scores(results: Path, truth) -> dict[str, np.ndarray]:
    """Scores (images,) of one run of notebook 03, by name."""
    made = load_file(results / "reconstructions.safetensors")
    table = truth.loc[made["image_ids"].numpy()]
    right = {
        q: (a == table[q].to_numpy()).astype(float)
        for q, a in CategoryClassifier("mini").classify(made["network"]).items()
    }
    found = top1_image_from_brain_each(made["projected_network"], made["true_tokens"]).astype(float)
    return right | {"pixcorr": pixcorr(made["seen"], made["network"]), "top-1": found}


def main(images: int = 200, epochs: int = 0) -> None:
    """Print the table."""
    train({"num_epochs": epochs} if epochs else {})
    truth, reference = open_subject("mini", 1).labels.set_index("image"), None
    print(
        "| mode | scene | kind | colour | pixcorr | image from brain, top-1 | kind, difference to"
        " the first row |\n" + "|---" * 7 + "|"
    )
    for name, (run, settings) in MODES.items():
        recipe, told = (
            TRAINING[run][0],
            {"first_images": images, "autoencoder_name": "modes-tokens"} | settings,
        )
        stage("03_reconstruct", recipe, f"modes-{run}", told)
        found = scores(HOME / "results" / f"modes-{run}", truth)
        reference = found["kind"] if reference is None else reference
        difference = paired_bootstrap(found["kind"], reference)
        cells = [
            f"{s.value:.3f} [{s.low:.3f}, {s.high:.3f}]"
            for s in map(bootstrap_mean, found.values())
        ]
        print(
            f"| {name} | "
            + " | ".join(cells)
            + f" | {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] |",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

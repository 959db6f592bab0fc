"""Does the diffusion prior earn its place? Validation images reconstructed with and without it,
judged by the independent classifier.

    python benchmarks/prior.py [run] [images]        # e.g. mindeye-mini-subj01 300

Every row paints the same images from the same noise without a low-level image; only the tokens
differ. The last column is the paired difference in the judged kind to the backbone's own tokens,
with its 95 % bootstrap interval. Validation images: nothing is chosen on the test set.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from src.data import Normaliser, cache_targets, open_subject
from src.decoding import PriorSampling, generate_images, load_decoder, predict_tokens, select_best
from src.evaluation import bootstrap_mean, paired_bootstrap
from src.pretrained import CategoryClassifier, Clipper, VersatileDiffusion
from src.utils import HOME

SAMPLES = 8


def sample_candidates(
    decoder, voxels: np.ndarray, shape: tuple[int, int]
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokens (images, samples, tokens, dim) by what made them, and the projected tokens for
    choosing among samples.
    """
    backbone, projected = predict_tokens(decoder, voxels, shape, PriorSampling(use_prior=False))
    sampling = PriorSampling(SAMPLES, timesteps=20)
    samples = predict_tokens(decoder, voxels, shape, sampling)[0]
    full = predict_tokens(decoder, voxels, shape)[0]
    last = decoder.noise_scheduler.num_timesteps - 1
    scaled = backbone[:, 0] * decoder.image_embed_scale
    noise = torch.randn(scaled.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        times = torch.full((len(scaled),), last)
        mean = decoder.net(noise, times, scaled)[:, None] / decoder.image_embed_scale
    return {
        "backbone, no prior": backbone,
        "one step of the prior (its mean)": mean,
        "one sample, 20 steps": samples[:, :1],
        "one sample, all steps": full,
        f"mean of {SAMPLES} samples": samples.mean(1, keepdim=True),
        f"best of {SAMPLES} samples by the brain's projection": samples,
    }, projected


def main(run: str = "mindeye-mini-subj01", count: int = 300) -> None:
    """Print the table for one trained run."""
    subject, logs = open_subject("mini", 1), HOME / "train_logs" / run
    clipper, diffusion = Clipper("mini"), VersatileDiffusion("mini")
    classifier = CategoryClassifier("mini")
    normaliser = Normaliser.load(logs / "normaliser.safetensors")
    voxels, ids = subject.get_mean_betas("val", normaliser=normaliser)
    voxels, ids = voxels[:count], ids[:count]
    cached = cache_targets(
        "mini",
        "clip_tokens",
        clipper.fingerprint(),
        subject.all_images,
        clipper.encode_pixels,
        clipper.target_shape,
    )
    truth = torch.from_numpy(cached.rows(ids).astype(np.float32))
    labels = subject.labels.set_index("image").loc[ids]
    decoder, config = load_decoder(logs / "high_level" / "last.safetensors")
    rows, projected = sample_candidates(decoder, voxels, tuple(config["tokens"]))
    print(
        f"run {run}, {len(ids)} validation images\n\n| tokens | R2 | scene | kind | colour | kind,"
        " difference to the backbone |\n|---|---|---|---|---|---|"
    )
    reference = None
    for name, tokens in rows.items():
        samples = generate_images(diffusion, tokens, ids, num_inference_steps=10)
        images, chosen = select_best(clipper, projected, samples)
        error = ((tokens[torch.arange(len(tokens)), chosen] - truth) ** 2).mean()
        cells = [f"{1 - float(error / truth.var()):.2f}"]
        hits = {}
        for question, answers in classifier.classify(images).items():
            hits[question] = (answers == labels[question].to_numpy()).astype(float)
            share = bootstrap_mean(hits[question])
            cells.append(f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]")
        if reference is None:
            reference = hits["kind"]
        change = paired_bootstrap(hits["kind"], reference)
        cells.append(f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))

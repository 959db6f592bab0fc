"""One training step of the full-size model (subject 1, 257x768, prior on): seconds and memory by
phase.

    python benchmarks/full_size_step.py [steps] [batch]
    python benchmarks/full_size_step.py 30 32

On a CPU it runs in fp32 with step_in_backward, and needs 18 GB of free memory and a few minutes. On
a GPU (not run by us) it runs in bf16, and also gives steps a second and the projected time of 240
epochs.

Random weights and random data of the published sizes, through the same `fit` and the same losses as
notebook 01 (BiMixCo phase). Left out is what surrounds a step: reading betas and targets, CLIP of
augmented images, validation, and the checkpoints of an epoch (4 GB each).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import nn

from src.decoding import DecoderSizes, build_decoder_config
from src.losses import l2_normalize, mixco, mixco_nce
from src.models import GainNorm, Rotary
from src.networks import build_decoder
from src.prior import NoiseScheduler
from src.training import Batching, Checkpointing, Execution, Optimisation, fit
from src.utils import count_parameters, peak_memory, to_device

PAPER = {
    "hidden": True,
    "h": 4096,
    "n_blocks": 4,
    "use_projector": True,
    "projector_dim": 2048,
    "prior_depth": 6,
    "prior_heads": 12,
    "prior_dim_head": 64,
    "timesteps": 100,
    "max_text_len": 256,
}
VOXELS, TOKENS, DIM, IMAGES = 15724, 257, 768, 8859
NEEDED_BYTES = 18e9


def make_full_model() -> nn.Module:
    """The published model with cheap random weights: the usual initialisation of a billion
    parameters takes minutes.
    """
    with torch.device("meta"):
        sizes = DecoderSizes((VOXELS,), TOKENS, DIM)
        model = build_decoder(build_decoder_config("01_train_high_level", PAPER, sizes))
    model = model.to_empty(device="cpu")
    model.noise_scheduler = NoiseScheduler(100)
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                is_norm = isinstance(module, (nn.LayerNorm, GainNorm))
                if is_norm and name in ("weight", "g"):
                    p.fill_(1.0)
                elif isinstance(module, Rotary):
                    p.copy_(Rotary(32).freqs)
                else:
                    p.normal_(std=0.02)
    return model


class RandomSamples:
    """As many random samples as the steps need, the same ones in every batch."""

    def __init__(self, samples: int):
        self.samples, self.batches = samples, {}

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int) -> None:
        """Nothing depends on the epoch."""

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        n = len(indices)
        if n not in self.batches:  # not again: drawing 32 images takes as long as a GPU's step
            self.batches[n] = {
                "voxels": torch.randn(n, VOXELS),
                "tokens": torch.randn(n, TOKENS, DIM) / DIM**0.5,
            }
        return self.batches[n] | {"seed": torch.tensor(indices)}


class Clock:
    """Seconds by phase, and the largest resident memory seen so far."""

    def __init__(self, cuda: bool):
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cuda, self.memory = cuda, {}

    def now(self) -> float:
        """Seconds, when the device has done what it was asked to do."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str):
        """Time what stands within."""
        start_time = self.now()
        yield
        self.seconds[name].append(self.now() - start_time)
        self.memory[name] = peak_memory()


def time_steps(model: nn.Module, steps: int, batch: int, clock: Clock) -> list[float]:
    """Seconds of each step."""
    starts, updates, ends_of_updates = [], [], []
    plain = torch.optim.AdamW.step

    def timed(self, *args, **kwargs):
        start_time = clock.now()
        result = plain(self, *args, **kwargs)
        ends_of_updates.append(clock.now())
        updates[-1] += ends_of_updates[-1] - start_time
        return result

    def step(model, batch, epoch):
        starts.append(clock.now())
        updates.append(0.0)
        with clock.phase("voxel2clip, forward"):
            voxels, *mix = mixco(batch["voxels"])
            backbone, projected = model.voxel2clip.predict_tokens(voxels)
            embedding, target = l2_normalize(projected), l2_normalize(batch["tokens"])
            nce = mixco_nce(embedding, target, 0.006, *mix)
        with clock.phase("prior, forward"):
            loss, _ = model(text_embed=backbone, image_embed=batch["tokens"], seeds=batch["seed"])
        starts.append(clock.now())
        return nce + 30 * loss, {}

    torch.optim.AdamW.step = timed
    execution = Execution(precision="bf16") if clock.cuda else Execution(step_in_backward=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            fit(
                model,
                step,
                RandomSamples(steps * batch),
                folder=Path(folder),
                config={},
                batching=Batching(epochs=1, batch_size=batch),
                optimisation=Optimisation(max_lr=3e-4, scheduler="fixed"),
                execution=execution,
                checkpointing=Checkpointing(checkpoints=False, save_every=1e9),
            )
    finally:
        torch.optim.AdamW.step = plain
    ends = [*starts[2::2], ends_of_updates[-1]]  # fit then saves its state
    clock.seconds["update"] = updates
    clock.seconds["backward"] = [
        end - forward - update
        for end, forward, update in zip(ends, starts[1::2], updates, strict=True)
    ]
    return [end - start for end, start in zip(ends, starts[::2], strict=True)]


def main(steps: int = 4, batch: int = 4) -> None:
    """Print seconds and memory."""
    cuda = to_device("auto").startswith("cuda")
    free = psutil.virtual_memory().available
    if not cuda and free < NEEDED_BYTES:
        sys.exit(
            f"This needs {NEEDED_BYTES / 1e9:.0f} GB of free memory and there are {free / 1e9:.1f}:"
            " close what else is running."
        )
    clock = Clock(cuda)
    base = peak_memory()
    model = make_full_model()
    print(
        f"{count_parameters(model):,} parameters, batch {batch}, {torch.get_num_threads()} threads;"
        f" before the model {base / 1e9:.1f} GB"
    )
    seconds = time_steps(model, steps, batch, clock)
    listed = ", ".join(f"{s:.1f}" for s in seconds)
    print(f"seconds of each step, the first of which makes the optimizer's state: {listed}")
    for name, values in clock.seconds.items():
        line = f"{name:>20}: {sum(values[1:]) / len(values[1:]):6.2f} s"
        if name in clock.memory:
            line += f", peak so far {clock.memory[name] / 1e9:.1f} GB"
        print(line)
    mean = sum(seconds[1:]) / len(seconds[1:])
    print(f"{'step':>20}: {mean:6.2f} s, peak memory {peak_memory() / 1e9:.1f} GB")
    if cuda:
        print(
            f"{1 / mean:.2f} steps a second; the steps of 240 epochs of {IMAGES} images alone:"
            f" {240 * (IMAGES // batch) * mean / 3600:.1f} h"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

"""MindEye2 at low compute: one training step as published against ours, what folding the dead mixer
saves, and which GPU fits what.

    python benchmarks/low_compute.py [threads] [steps]   # a few minutes
    python benchmarks/low_compute.py memory

The first measures seconds and memory of a step at batch 4, each way in a process of its own; the
second estimates GPU memory over batch size and precision, as Markdown.

Random weights and data of the published sizes (subject 1, h 1024, 49 x 768 tokens; BiMixCo phase,
prior on, no blurry branch). "published" is our own rendering of what the published code computes:
the mixer in full, attention and norms in single operations, AdamW parameter by parameter.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from src import models
from src.decoding import DecoderSizes, build_decoder_config
from src.losses import l2_normalize, mixco, mixco_nce
from src.networks import build_decoder, transformer
from src.pipeline.dryrun import estimate_training_memory
from src.training import group_parameters

VOXELS = 15724
LATENT = (4, 28, 28)
PARAMETERS = {
    "hidden_dim": 1024,
    "n_blocks": 4,
    "backbone": "mixer",
    "blurry_recon": False,
    "clip_scale": 1.0,
    "seq_past": 0,
    "seq_future": 0,
    "prior": True,
    "prior_depth": 6,
    "prior_dim_head": 52,
    "timesteps": 100,
    "faithful": "",
}


@dataclass(frozen=True)
class Way:
    """How a step is computed.

    Attributes:
        is_published: as the published code does it.
        is_folded: without the dead mixer.
        in_backward: whether each parameter is stepped as its gradient arrives.
        checkpointing: of the prior's activations.
        bf16: precision of the forward pass.
    """

    is_published: bool = False
    is_folded: bool = True
    in_backward: bool = False
    checkpointing: bool = False
    bf16: bool = False


WAYS = {
    "published": Way(is_published=True, is_folded=False),
    "published, mixer folded": Way(is_published=True),
    "ours": Way(),
    "ours, step in backward": Way(in_backward=True),
    "ours, gradient checkpointing": Way(checkpointing=True),
    "ours, bf16": Way(bf16=True),
}


@dataclass(frozen=True)
class Size:
    """Sizes of the network: width, tokens of an image and their width, with the blurry branch."""

    h: int
    tokens: int
    dim: int
    blurry: bool


SIZES = {
    "low compute (h 1024, 49 x 768)": Size(1024, 49, 768, False),
    "full (h 4096, 256 x 1664, blurry branch)": Size(4096, 256, 1664, True),
}

# of the memory table: whether the optimizer's state is on the CPU, and how a step is computed
MEMORY_WAYS = {
    "fp32": (False, Way()),
    "bf16": (False, Way(bf16=True)),
    "bf16, checkpointing": (False, Way(bf16=True, checkpointing=True)),
    "fp32, step in backward": (False, Way(in_backward=True)),
    "bf16, ZeRO-2 offload": (True, Way(bf16=True)),
}

GPUS = (8, 16, 24, 40, 80)  # GB

SPARE = 1.5  # GB of a GPU that are left to libraries


def compute_as_published() -> None:
    """Attention and norms operation by operation, also where a gradient is wanted."""
    transformer._attend_fused = transformer._attend
    inner = models.GainNorm.forward

    def unfused(self: models.GainNorm, x: torch.Tensor) -> torch.Tensor:
        # takes the written-out branch, which autograd follows all the same
        is_grad_enabled = torch.is_grad_enabled
        torch.is_grad_enabled = lambda: False
        try:
            return inner(self, x)
        finally:
            torch.is_grad_enabled = is_grad_enabled

    models.GainNorm.forward = unfused


def build_model(way: Way) -> nn.Module:
    """The network at low compute, with random weights."""
    parameters = PARAMETERS | {"faithful": "" if way.is_folded else "dead_mixer"}
    sizes = DecoderSizes((VOXELS,), 49, 768, LATENT)
    model = build_decoder(build_decoder_config("01_train_mindeye2", parameters, sizes))
    model.diffusion_prior.net.causal_transformer.checkpointing = way.checkpointing
    return model


def make_adamw(parameters: list, way: Way) -> torch.optim.Optimizer:
    """AdamW, fused, or parameter by parameter as published."""
    foreach = False if way.is_published else None
    return torch.optim.AdamW(parameters, lr=1e-5, fused=not way.is_published, foreach=foreach)


def step_in_backward(groups: list[dict], way: Way) -> None:
    """Let each parameter be stepped as soon as its gradient is there."""
    optimizers = {}
    for group in groups:
        for parameter in group["params"]:
            optimizers[parameter] = make_adamw([parameter], way)

    def update(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad(set_to_none=True)

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)


def measure(way_name: str, threads: int, steps: int, batch: int = 4) -> dict[str, float]:
    """Median seconds of a step and its phases, peak memory in GB, with `threads` threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    way = WAYS[way_name]
    if way.is_published:
        compute_as_published()
    model = build_model(way)
    groups = group_parameters(model, 1e-2, "published")
    optimizer = None
    if way.in_backward:
        step_in_backward(groups, way)
    else:
        optimizer = make_adamw(groups, way)
    voxels, tokens = torch.randn(batch, 1, VOXELS), torch.randn(batch, 49, 768)
    rows = []
    for _ in range(steps + 1):
        start_time = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if way.bf16 else nullcontext():
            mixed, *mix = mixco(voxels)
            backbone, clip, _ = model(mixed, 0)
            nce = mixco_nce(l2_normalize(clip), l2_normalize(tokens), 0.006, *mix)
            prior, _ = model.diffusion_prior(text_embed=backbone, image_embed=tokens)
            loss = nce + 30 * prior
        forward_time = time.perf_counter()
        loss.backward()
        backward_time = time.perf_counter()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        end_time = time.perf_counter()
        seconds = [forward_time - start_time, backward_time - forward_time]
        rows.append([*seconds, end_time - backward_time, end_time - start_time])
    medians = torch.tensor(rows[1:]).median(0).values.tolist()  # the first one allocates
    results = dict(zip(("forward", "backward", "AdamW", "step"), medians, strict=True))
    return results | {"GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def compare(threads: int, steps: int) -> None:
    """Every way in a process of its own, in turn; ratios to the published one."""
    results: dict[str, dict[str, float]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    for way in WAYS:
        command = [sys.executable, __file__, "--one", way, str(threads), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        results[way] = json.loads(done.stdout.splitlines()[-1])
        row, base = results[way], results["published"]
        phases = "  ".join(f"{name} {row[name]:.2f} s" for name in ("forward", "backward", "AdamW"))
        print(
            f"{way:32s} step {row['step']:.2f} s ({row['step'] / base['step']:.2f})   {phases}  "
            f" peak {row['GB']:.2f} GB ({row['GB'] / base['GB']:.2f})",
            flush=True,
        )


def estimate_memory(size: Size, batch: int, way: Way) -> dict[str, float]:
    """Estimated bytes of a training step by what they are for, without libraries and the GPU's own
    context.
    """
    parameters = PARAMETERS | {"hidden_dim": size.h, "blurry_recon": size.blurry}
    sizes = DecoderSizes((VOXELS,), size.tokens, size.dim, LATENT)
    config = build_decoder_config("01_train_mindeye2", parameters, sizes)

    def build() -> nn.Module:
        model = build_decoder(config)
        model.diffusion_prior.net.causal_transformer.checkpointing = way.checkpointing
        return model

    def loss(model: nn.Module) -> torch.Tensor:
        target = torch.zeros(batch, size.tokens, size.dim)
        noise, times = torch.zeros_like(target), torch.zeros(batch, dtype=torch.long)
        backbone, clip, blurry = model(torch.zeros(batch, 1, VOXELS), 0)
        drop = torch.zeros(2, batch, dtype=torch.bool)
        total, _ = model.diffusion_prior.p_losses(target, times, backbone, noise, drop)
        total = total + clip.square().mean()
        if size.blurry:
            total = total + (blurry[0].abs().mean() + blurry[1].square().mean())
        return total

    precision = "bf16" if way.bf16 else "no"
    return estimate_training_memory(build, loss, precision, way.in_backward)


def choose_gpu(size: float) -> str:
    """The smallest GPU in GB that holds so many bytes."""
    for gpu in GPUS:
        if size / 1e9 + SPARE <= gpu:
            return str(gpu)
    return f"more than {GPUS[-1]}"


def print_memory() -> None:
    """Markdown: gigabytes by batch size and way, and the smallest GPU that has 1.5 GB to spare."""
    for title, size in SIZES.items():
        print(f"\n| {title} | batch | " + " | ".join(MEMORY_WAYS) + " |")
        print("|---|---|" + "---|" * len(MEMORY_WAYS))
        for batch in (4, 8, 16, 32):
            cells = []
            for is_offloaded, way in MEMORY_WAYS.values():
                parts = estimate_memory(size, batch, way)
                total = sum(parts.values())
                if is_offloaded:
                    total -= parts["optimizer state"]
                cells.append(f"{total / 1e9:.1f} ({choose_gpu(total)})")
            print(f"| | {batch} | " + " | ".join(cells) + " |", flush=True)


def main(first: str = "1", *rest: str) -> None:
    """Compare all ways, measure one (--one), or estimate memory."""
    if first == "--one":
        way, threads, steps = rest
        print(json.dumps(measure(way, int(threads), int(steps))))
    elif first == "memory":
        print_memory()
    else:
        compare(int(first), int(rest[0]) if rest else 5)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""MindEye2 at low compute: one training step as published against ours, what folding the dead mixer
saves, and which GPU fits what.

    python benchmarks/low_compute.py [threads] [steps]   # seconds and memory of a step at batch 4, each way in a process of its own (a few minutes)
    python benchmarks/low_compute.py memory              # estimated GPU memory over batch size and precision, as Markdown

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
SIZES = {
    "low compute (h 1024, 49 x 768)": (1024, 49, 768, False),
    "full (h 4096, 256 x 1664, blurry branch)": (4096, 256, 1664, True),
}
WAYS = {  # what differs
    "published": {"published": True},
    "published, mixer folded": {"published": True, "folded": True},
    "ours": {"folded": True},
    "ours, step in backward": {"folded": True, "in_backward": True},
    "ours, gradient checkpointing": {"folded": True, "checkpointing": True},
    "ours, bf16": {"folded": True, "bf16": True},
}


def as_published() -> None:
    """Attention and norms operation by operation, also where a gradient is wanted."""
    transformer._attend_fused = transformer._attend
    inner = models.GainNorm.forward

    def unfused(self: models.GainNorm, x: torch.Tensor) -> torch.Tensor:
        grad, torch.is_grad_enabled = (
            torch.is_grad_enabled,
            lambda: False,
        )  # takes the written-out branch, which autograd follows all the same
        try:
            return inner(self, x)
        finally:
            torch.is_grad_enabled = grad

    models.GainNorm.forward = unfused


def measure(way: str, threads: int, steps: int, batch: int = 4) -> dict[str, float]:
    """Median seconds of a step and its phases, peak memory in GB, with `threads` threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    told = WAYS[way]
    if told.get("published"):
        as_published()
    model = build_decoder(
        build_decoder_config(
            "01_train_mindeye2",
            PARAMETERS | {"faithful": "" if told.get("folded") else "dead_mixer"},
            DecoderSizes((VOXELS,), 49, 768, LATENT),
        )
    )
    model.diffusion_prior.net.causal_transformer.checkpointing = bool(told.get("checkpointing"))
    groups = group_parameters(model, 1e-2, "published")
    make = lambda which: torch.optim.AdamW(
        which,
        lr=1e-5,
        fused=not told.get("published"),
        foreach=False if told.get("published") else None,
    )  # noqa: E731
    each = (
        {p: make([p]) for group in groups for p in group["params"]}
        if told.get("in_backward")
        else {}
    )
    optimizer = None if each else make(groups)

    def update(p: torch.Tensor) -> None:
        each[p].step()
        each[p].zero_grad(set_to_none=True)

    for p in each:
        p.register_post_accumulate_grad_hook(update)
    voxels, tokens, rows = torch.randn(batch, 1, VOXELS), torch.randn(batch, 49, 768), []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if told.get("bf16") else nullcontext():
            mixed, perm, betas, select = mixco(voxels)
            backbone, clip, _ = model(mixed, 0)
            loss = (
                mixco_nce(l2_normalize(clip), l2_normalize(tokens), 0.006, perm, betas, select)
                + 30 * model.diffusion_prior(text_embed=backbone, image_embed=tokens)[0]
            )
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        rows.append(
            (
                forward - begun,
                backward - forward,
                time.perf_counter() - backward,
                time.perf_counter() - begun,
            )
        )
    medians = torch.tensor(rows[1:]).median(0).values.tolist()  # the first one allocates
    return dict(zip(("forward", "backward", "AdamW", "step"), medians, strict=True)) | {
        "GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    }


def compare(threads: int, steps: int) -> None:
    """Every way in a process of its own, in turn; ratios to the published one."""
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--one", way, str(threads), str(steps)]
        out = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        ).stdout
        found[way] = json.loads(out.splitlines()[-1])
        row, base = found[way], found["published"]
        phases = "  ".join(f"{name} {row[name]:.2f} s" for name in ("forward", "backward", "AdamW"))
        print(
            f"{way:32s} step {row['step']:.2f} s ({row['step'] / base['step']:.2f})   {phases}  "
            f" peak {row['GB']:.2f} GB ({row['GB'] / base['GB']:.2f})",
            flush=True,
        )


def needed(
    h: int,
    tokens: int,
    dim: int,
    blurry: bool,
    batch: int,
    precision: str,
    checkpointing: bool,
    in_backward: bool,
) -> dict[str, float]:
    """Estimated bytes of a training step by what they are for, without libraries and the GPU's own
    context.
    """
    config = build_decoder_config(
        "01_train_mindeye2",
        PARAMETERS | {"hidden_dim": h, "blurry_recon": blurry},
        DecoderSizes((VOXELS,), tokens, dim, LATENT),
    )

    def build() -> nn.Module:
        model = build_decoder(config)
        model.diffusion_prior.net.causal_transformer.checkpointing = checkpointing
        return model

    def loss(model: nn.Module) -> torch.Tensor:
        target = torch.zeros(batch, tokens, dim)
        backbone, clip, out = model(torch.zeros(batch, 1, VOXELS), 0)
        drop = torch.zeros(2, batch, dtype=torch.bool)
        prior = model.diffusion_prior.p_losses(
            target, torch.zeros(batch, dtype=torch.long), backbone, torch.zeros_like(target), drop
        )[0]
        return (
            prior
            + clip.square().mean()
            + (out[0].abs().mean() + out[1].square().mean() if blurry else 0)
        )

    return estimate_training_memory(build, loss, precision, in_backward)


def memory_table() -> None:
    """Markdown: gigabytes by batch size and way, and the smallest of 8, 16, 24, 40 and 80 GB GPUs
    that has 1.5 GB to spare.
    """
    ways = {
        "fp32": ("no", False, False),
        "bf16": ("bf16", False, False),
        "bf16, checkpointing": ("bf16", True, False),
        "fp32, step in backward": ("no", False, True),
        "bf16, ZeRO-2 offload": ("bf16", False, False),
    }
    for title, (h, tokens, dim, blurry) in SIZES.items():
        print(f"\n| {title} | batch | " + " | ".join(ways) + " |\n|---|---|" + "---|" * len(ways))
        for batch in (4, 8, 16, 32):
            cells = []
            for name, (precision, checkpointing, in_backward) in ways.items():
                parts = needed(h, tokens, dim, blurry, batch, precision, checkpointing, in_backward)
                total = sum(parts.values()) - (parts["optimizer state"] if "offload" in name else 0)
                fits = next(
                    (f"{gpu}" for gpu in (8, 16, 24, 40, 80) if total / 1e9 + 1.5 <= gpu),
                    "more than 80",
                )
                cells.append(f"{total / 1e9:.1f} ({fits})")
            print(f"| | {batch} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] == ["--one"]:
        print(json.dumps(measure(given[1], int(given[2]), int(given[3]))))
    elif given[:1] == ["memory"]:
        memory_table()
    else:
        compare(int(given[0]) if given else 1, int(given[1]) if len(given) > 1 else 5)

"""Everything that only a GPU can show, in one command and less than eight minutes on one H200.

    python tools/gpu_check.py                      # all parts
    python tools/gpu_check.py --parts tests,steps  # some of PARTS
    python tools/gpu_check.py --rehearse           # the same at toy size, on any machine

It runs the GPU tests, times training steps and image generators at the published sizes with random
weights, the prior, the metrics, retrieval, ridge and kernel decoders and the scan of an index,
measures memory at two batch sizes each, and trains a mini recipe on the GPU and on the CPU to
compare scores. It prints one table and writes one JSON file with card, versions and commit. A part
whose packages are missing is named, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
VERSIONS = ("torch", "numpy", "transformers", "diffusers", "accelerate", "himalaya")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        part: key of PARTS.
        name: what was measured.
        value: the figure; None where it could not be had.
        unit: of the figure.
        note: a remark, or why there is no figure.
    """

    part: str
    name: str
    value: float | None
    unit: str = ""
    note: str = ""


@dataclass
class Check:
    """What the parts share.

    Attributes:
        device: "cuda", or "cpu" in a rehearsal.
        rehearse: toy sizes.
        deadline: on the clock `time.monotonic`, after which no part begins.
        part: that is running.
        rows: of the table.
    """

    device: str
    rehearse: bool
    deadline: float
    part: str = ""
    rows: list[Row] = field(default_factory=list)

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def choose(self, full: Any, toy: Any) -> Any:
        """A size: the full one, or that of a rehearsal."""
        return toy if self.rehearse else full

    def add(self, name: str, value: float | None, unit: str = "", note: str = "") -> None:
        """Add a row, and print it."""
        row = Row(self.part, name, value, unit, note)
        self.rows.append(row)
        print(format_row(row), flush=True)


def format_row(row: Row) -> str:
    """A line of the table."""
    value = "-" if row.value is None else f"{row.value:.4g}"
    return f"{row.part:<10} {row.name:<52} {value:>10} {row.unit:<10} {row.note}"


# ------------------------------------------------------------------------------------------ timing
def synchronise(device: str) -> None:
    """Wait until the device has done what it was asked to do."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def time_calls(check: Check, function: Callable[[], Any], seconds: float = 4.0) -> float:
    """Median seconds of a call, of as many as fit into some seconds (at most 20, after two that do
    not count).
    """
    durations: list[float] = []
    begin = time.perf_counter()
    for _ in range(check.choose(22, 3)):
        start = time.perf_counter()
        function()
        synchronise(check.device)
        durations.append(time.perf_counter() - start)
        if time.perf_counter() - begin > seconds and len(durations) > 2:
            break
    return statistics.median(durations[2:] or durations)


def read_peak_memory(check: Check) -> float:
    """Peak memory since `free_memory`, in GB; of the GPU, or of the process in a rehearsal."""
    import torch

    if check.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    from src.utils import peak_memory

    return peak_memory("cpu") / 1e9


def free_memory(check: Check) -> None:
    """Give back what the last measurement used."""
    import torch

    gc.collect()
    if check.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def expect_failure(check: Check, name: str) -> Any:
    """A context in which what goes wrong becomes a row, so that the rest goes on."""
    import torch

    try:
        yield
    except ImportError as error:
        check.add(name, None, "", f"not run: {error.name or error} is not installed")
    except torch.OutOfMemoryError:
        check.add(name, None, "", "out of memory")
    except Exception as error:  # noqa: BLE001  a check ends with a table, whatever a part does
        reason = str(error).strip().splitlines() or [""]
        check.add(name, None, "", f"failed: {type(error).__name__}: {reason[-1][:200]}")
    finally:
        free_memory(check)


# ------------------------------------------------------------------------------------------- parts
def run_tests(check: Check) -> None:
    """The GPU tests, on the real one; in a rehearsal a few on the pretended one."""
    importlib.metadata.version("pytest")
    names = ["test_gpu.py", "test_gpu_frozen.py", "test_training.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["-k", "real and not pretended", "--tb=short", *(f"tests/{name}" for name in names)]
    if check.rehearse:
        command = [*command[:-5], "ridge_is_solved and pretended", "tests/test_gpu.py"]
    limit = min(200.0, max(30.0, check.remaining))
    output = run_program(command, limit)
    counts = parse_counts(output.stdout)
    if not counts:
        lines = (output.stdout + output.stderr).strip().splitlines() or [""]
        check.add("GPU tests", None, "", f"failed: exit {output.returncode}: {lines[-1][:200]}")
    for name in ("passed", "failed", "error", "skipped", "xfailed"):
        check.add(f"GPU tests {name}", float(counts.get(name, 0)))
    for line in output.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            check.add(line[:52], None, "", line[52:250])


def run_program(command: list[str], seconds: float, **environment: str) -> Any:
    """A program in a process of its own; its output, also where its time ended."""
    settings = {name: v for name, v in os.environ.items() if not name.startswith("PERCEPT_")}
    settings |= {"MPLBACKEND": "agg"} | environment
    try:
        return subprocess.run(
            command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        return subprocess.CompletedProcess(command, 124, output, f"over {seconds:.0f} s")


def parse_counts(output: str) -> dict[str, int]:
    """Numbers in the last line of pytest, e.g. {"passed": 3}."""
    lines = output.strip().splitlines() or [""]
    parts = lines[-1].replace(",", "").replace("errors", "error").split()
    pairs = zip(parts, parts[1:], strict=False)
    return {word: int(count) for count, word in pairs if count.isdigit()}


def describe_prior(name: str, **network: Any) -> dict[str, Any]:
    """Config of a prior's network."""
    return {"name": name, "kwargs": network}


def describe_mindeye(toy: bool) -> tuple[dict[str, Any], tuple[int, int]]:
    """MindEye's published network (257x768, prior on), and (tokens, dim)."""
    tokens, dim = (5, 32) if toy else (257, 768)
    net = {"dim": dim, "depth": 1 if toy else 6, "dim_head": 32 if toy else 64}
    net |= {"heads": 2 if toy else 12, "num_tokens": tokens, "learned_query_mode": "pos_emb"}
    backbone = {"in_dim": 64 if toy else 15724, "out_dim": tokens * dim, "clip_size": dim}
    backbone |= {"h": 32 if toy else 4096, "n_blocks": 1 if toy else 4, "use_projector": True}
    backbone["projector_dim"] = 32 if toy else 2048
    config = {
        "name": "BrainDiffusionPrior",
        "kwargs": {"image_embed_dim": dim, "timesteps": 6 if toy else 100, "cond_drop_prob": 0.2},
        "net": describe_prior("VersatileDiffusionPriorNetwork", **net),
        "voxel2clip": {"name": "BrainNetwork", "kwargs": backbone},
    }
    return config, (tokens, dim)


def describe_mindeye2(toy: bool, is_low: bool) -> tuple[dict[str, Any], tuple[int, int]]:
    """MindEye2 of one subject, in full or at low compute, and (tokens, dim)."""
    tokens, dim = (49, 768) if is_low else (256, 1664)
    width = 1024 if is_low else 4096
    if toy:
        tokens, dim, width = 4, 16, 16
    net = {"dim": dim, "depth": 1 if toy else 6, "dim_head": 8 if toy else 52}
    backbone = {"h": width, "out_dim": tokens * dim, "clip_size": dim, "blurry_recon": False}
    config = {
        "name": "MindEye2",
        "kwargs": {
            "image_embed_dim": dim,
            "timesteps": 6 if toy else 100,
            "cond_drop_prob": 0.2,
            "image_embed_scale": 1.0,
        },
        "ridge": {
            "name": "RidgeRegression",
            "kwargs": {"input_sizes": [64 if toy else 15724], "out_features": width},
        },
        "backbone": {"name": "MixerBrainNetwork", "kwargs": backbone},
        "net": describe_prior("PriorNetwork", **net, num_tokens=tokens),
    }
    return config, (tokens, dim)


def build_on_device(check: Check, config: dict[str, Any]) -> Any:
    """A network with random weights, made where it is used."""
    import torch

    from src.networks import build_decoder

    with torch.device(check.device):
        return build_decoder(config)


def make_token_step(model: Any, shape: tuple[int, int], voxels: int, batch: int) -> Callable:
    """A function that gives the loss of one batch of random data: contrastive, and the prior's."""
    import torch

    from src.losses import l2_normalize, mixco, mixco_nce

    device = next(model.parameters()).device
    x = torch.randn(batch, voxels, device=device)
    tokens = torch.randn(batch, *shape, device=device) / shape[1] ** 0.5
    seeds = torch.arange(batch)
    prior = getattr(model, "diffusion_prior", model)
    network = getattr(model, "voxel2clip", model)

    def compute_loss() -> Any:
        mixed, *mix = mixco(x)
        backbone, projected = network.predict_tokens(mixed)
        brain, image = l2_normalize(projected), l2_normalize(tokens)
        loss, _ = prior(text_embed=backbone, image_embed=tokens, seeds=seeds)
        return mixco_nce(brain.float(), image, 0.006, *mix) + 30 * loss

    return compute_loss


def make_update(model: Any, compute_loss: Callable[[], Any], device: str) -> Callable[[], None]:
    """A function that makes one training step in bf16."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # slow on CPUs
            loss = compute_loss()
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()

    return update


def time_steps(check: Check) -> None:
    """Training steps at the published sizes, in bf16: seconds, and memory at two batch sizes."""
    toy = check.rehearse
    models = {
        "MindEye 257x768": (describe_mindeye(toy), (32, 64)),
        "MindEye2 at low compute": (describe_mindeye2(toy, is_low=True), (32, 64)),
        "MindEye2 in full": (describe_mindeye2(toy, is_low=False), (8, 16)),
    }
    for name, ((config, shape), batches) in models.items():
        with expect_failure(check, f"step of {name}"):
            model = build_on_device(check, config).train()
            for batch in check.choose(batches, (2, 4)):
                compute_loss = make_token_step(model, shape, 64 if toy else 15724, batch)
                report_step(check, model, compute_loss, f"{name}, batch {batch}")
            del model, compute_loss
    with expect_failure(check, "step of the low level"):
        time_low_level(check)


def report_step(check: Check, model: Any, compute_loss: Callable[[], Any], name: str) -> None:
    """Rows of one model at one batch size."""
    free_memory(check)
    seconds = time_calls(check, make_update(model, compute_loss, check.device))
    check.add(f"step of {name}", 1000 * seconds, "ms")
    check.add(f"memory of {name}", read_peak_memory(check), "GB")


def time_low_level(check: Check) -> None:
    """MindEye's low level, without its teacher."""
    import torch

    size = {"in_dim": 64, "h": 16, "n_blocks": 1, "latent_size": 16} if check.rehearse else {}
    if check.rehearse:
        size["block_out_channels"] = [32, 32, 64]
    config = {"name": "Voxel2StableDiffusionModel", "kwargs": size}
    model = build_on_device(check, config).train()
    for batch in check.choose((16, 32), (2, 4)):
        x = torch.randn(batch, size.get("in_dim", 15724), device=check.device)

        def compute_loss(x: Any = x) -> Any:
            return model(x)[0].float().abs().mean()

        report_step(check, model, compute_loss, f"the low level, batch {batch}")


def time_fit(check: Check) -> None:
    """The same training through `fit`, with everything around a step: feed, flags, history."""
    from src.training import Batching, Checkpointing, Execution, Optimisation, fit

    config, shape = describe_mindeye(check.rehearse)
    voxels, batch = check.choose((15724, 32), (64, 2))
    with tempfile.TemporaryDirectory() as folder, expect_failure(check, "step through fit"):
        model = build_on_device(check, config)
        seconds = []
        for name, steps in (("short", check.choose(5, 2)), ("long", check.choose(45, 6))):
            start = time.perf_counter()
            fit(
                model,
                compute_loss_of_batch,
                RandomBatches(steps * batch, voxels, shape),
                folder=Path(folder) / name,
                config={},
                batching=Batching(1, batch),
                optimisation=Optimisation(1e-4),
                execution=Execution(check.device, "bf16" if check.device == "cuda" else "no"),
                checkpointing=Checkpointing(checkpoints=False, save_every=1e9),
            )
            seconds.append(time.perf_counter() - start)
        added_steps = check.choose(40, 4)
        step = (seconds[1] - seconds[0]) / added_steps
        check.add("step of MindEye 257x768 through fit", 1000 * step, "ms")
        hours = step * 240 * (8859 // batch) / 3600
        check.add("240 epochs of subject 1, checkpoints apart", hours, "h")
        del model


def compute_loss_of_batch(model: Any, batch: dict[str, Any], epoch: int) -> Any:
    """Notebook 01's step in its first phase."""
    from src.losses import l2_normalize, mixco, mixco_nce

    voxels, *mix = mixco(batch["voxels"])
    backbone, projected = model.voxel2clip.predict_tokens(voxels)
    brain, image = l2_normalize(projected), l2_normalize(batch["tokens"])
    loss, _ = model(text_embed=backbone, image_embed=batch["tokens"], seeds=batch["seed"])
    return mixco_nce(brain, image, 0.006, *mix) + 30 * loss, {}


class RandomBatches:
    """As many random samples as are asked for, the same ones in every batch."""

    def __init__(self, samples: int, voxels: int, shape: tuple[int, int]):
        self.samples, self.voxels, self.shape = samples, voxels, shape

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int) -> None:
        """Nothing depends on the epoch."""

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        import torch

        n = len(indices)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(n, *self.shape, generator=generator) / self.shape[1] ** 0.5
        voxels = torch.randn(n, self.voxels, generator=generator)
        return {"voxels": voxels, "tokens": tokens, "seed": torch.tensor(indices)}


def time_prior(check: Check) -> None:
    """Sampling the prior, all 100 steps: seconds an image of 16 samples, by precision."""
    import torch

    config, shape = describe_mindeye(check.rehearse)
    before = torch.get_float32_matmul_precision()
    with expect_failure(check, "prior"):
        prior = build_on_device(check, config).eval()
        for name, matmul in {"fp32": "highest", "TF32": "high", "bf16": "high"}.items():
            torch.set_float32_matmul_precision(matmul)
            for images in check.choose((1, 4), (1, 2)):
                report_prior(check, prior, shape, images, name)
        del prior
    torch.set_float32_matmul_precision(before)


def report_prior(check: Check, prior: Any, shape: tuple[int, int], images: int, name: str) -> None:
    """A row: seconds an image, of so many images at a time."""
    import torch

    samples = check.choose(16, 2)
    condition = torch.randn(images * samples, *shape, device=check.device)

    def sample() -> None:
        with torch.autocast(check.device, torch.bfloat16, enabled=name == "bf16"):
            prior.sample(condition)

    seconds = time_calls(check, sample, seconds=6) / images
    check.add(f"prior in {name}, {images} x {samples} samples", seconds, "s an image")


def write_generators(folder: Path, device: str) -> None:
    """Versatile Diffusion and unCLIP at full size with random weights, as the hub lays them out."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        UNet2DConditionModel,
        UniPCMultistepScheduler,
    )

    from src.pretrained import make_untrained_vae, unclip

    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
    noise["beta_schedule"] = "scaled_linear"
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half()
        unet.save_pretrained(folder / "versatile_diffusion" / "image_unet")
        make_untrained_vae().save_pretrained(folder / "versatile_diffusion" / "vae")
    scheduler = UniPCMultistepScheduler(**noise)
    scheduler.save_pretrained(folder / "versatile_diffusion" / "scheduler")
    with torch.device(device):
        unet = UNet2DConditionModel(**unclip.UNET).half()
        unet.save_pretrained(folder / "unclip" / "unet")
        AutoencoderKL(**unclip.VAE).save_pretrained(folder / "unclip" / "vae")
    EulerDiscreteScheduler(**unclip.SCHEDULER).save_pretrained(folder / "unclip" / "scheduler")


def time_generators(check: Check) -> None:
    """Versatile Diffusion (17 of 20 steps) and unCLIP (38), guided: images a second by batch."""
    from src.pretrained import UnclipDecoder, VersatileDiffusion

    with tempfile.TemporaryDirectory() as folder, expect_failure(check, "generators"):
        weights = "mini"
        if not check.rehearse:
            weights = folder
            write_generators(Path(folder), check.device)
        generators = {
            "Versatile Diffusion": (VersatileDiffusion, (257, 768), 20, (16, 32)),
            "unCLIP": (UnclipDecoder, (256, 1664), 38, (4, 8)),
        }
        for name, (cls, shape, steps, batches) in generators.items():
            with expect_failure(check, name):
                generator = cls(weights, check.device)
                steps = check.choose(steps, 2)
                for batch in check.choose(batches, (1, 2)):
                    report_generator(check, generator, shape[0], steps, batch, name)
                del generator


def report_generator(
    check: Check, generator: Any, tokens: int, steps: int, batch: int, name: str
) -> None:
    """Rows of one generator at one batch size."""
    import torch

    free_memory(check)
    width = generator.unet.config.cross_attention_dim
    condition = torch.randn(batch, tokens, width)
    noise = torch.randn(batch, *generator.latent_shape)
    start = None
    if name == "Versatile Diffusion":
        start = torch.zeros_like(noise)

    def paint() -> None:
        generator.generate(condition, noise, start, 0.85, num_inference_steps=steps)

    seconds = time_calls(check, paint, seconds=12)
    check.add(f"{name}, batch {batch}", batch / seconds, "images/s")
    check.add(f"memory of {name}, batch {batch}", read_peak_memory(check), "GB")


def time_clip(check: Check) -> None:
    """CLIP ViT-L/14 with random weights: images a second by precision."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    size |= {"num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}
    toy = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = CLIPVisionConfig(**check.choose(size, toy | {"num_attention_heads": 2}))
    batch = check.choose(64, 2)
    for name in check.choose(("float32", "float16", "bfloat16"), ("float32", "bfloat16")):
        with expect_failure(check, f"CLIP ViT-L/14 in {name}"), torch.no_grad():
            dtype = getattr(torch, name)
            with torch.device(check.device):
                model = CLIPVisionModelWithProjection(config).eval().to(dtype)
            pixels = torch.randn(batch, 3, 224, 224, device=check.device, dtype=dtype)
            seconds = time_calls(check, lambda m=model, x=pixels: m(pixel_values=x))
            check.add(f"CLIP ViT-L/14 in {name}, batch {batch}", batch / seconds, "images/s")


def time_scores(check: Check) -> None:
    """Metrics and retrieval of 982 images, on the device and on the CPU."""
    import torch

    from src.metrics import METRICS, two_way_identification
    from src.retrieval import top1_brain_from_image, top1_image_from_brain

    n, features, tokens = check.choose((982, 9216, (257, 768)), (20, 32, (5, 16)))
    images, recons = (torch.rand(check.choose(100, 4), 3, 256, 256) for _ in range(2))
    for name in ("pixcorr", "ssim"):
        with expect_failure(check, name):
            start = time.perf_counter()
            METRICS[name].score(images.to(check.device), recons.to(check.device))
            seconds = time.perf_counter() - start
            check.add(f"{name} of {len(images)} images", seconds, "s")
    real, recon = torch.rand(n, features), torch.rand(n, features)
    brain = torch.randn(n, *tokens)
    clip = brain + torch.randn(n, *tokens)
    functions: dict[str, tuple[Callable[..., float], Any, Any]] = {
        f"two-way, {features} features": (two_way_identification, real, recon),
        "image retrieval": (top1_image_from_brain, brain, clip),
        "brain retrieval": (top1_brain_from_image, brain, clip),
    }
    for name, (function, a, b) in functions.items():
        with expect_failure(check, name):
            values = []
            for device in dict.fromkeys((check.device, "cpu")):
                x, y = a.to(device), b.to(device)
                start = time.perf_counter()
                values.append(function(x, y))
                check.add(f"{name}, {n} images, {device}", time.perf_counter() - start, "s")
            check.add(f"{name}: difference from the CPU", abs(values[0] - values[-1]))


def time_ridge(check: Check) -> None:
    """The ridge of subject 1 with 2,048 of its targets: seconds, and how far from the CPU's."""
    import numpy as np
    import torch

    from src.networks import RidgeBaseline

    n, voxels, targets = check.choose((8859, 15724, 2048), (40, 12, 5))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, voxels), dtype=np.float32)
    weights = rng.standard_normal((voxels, targets), dtype=np.float32)
    y = x @ weights + rng.standard_normal((n, targets), dtype=np.float32)
    with expect_failure(check, "ridge"):
        start = time.perf_counter()
        ridge = RidgeBaseline.fit(x, y, cv=3, alphas=(1e2, 1e4, 1e6))
        check.add(f"ridge, {n} images, {targets} targets", time.perf_counter() - start, "s")
        predicted = ridge(torch.from_numpy(x[:64])).detach().numpy()
        error = np.abs(predicted - y[:64]).mean()
        check.add("ridge: error over spread of the targets", float(error / y.std()))


def time_kernel(check: Check) -> None:
    """The kernel decoder of subject 1 with 2,048 of its targets: seconds, and its error."""
    import numpy as np
    import torch

    from src.networks import KernelRidge, RepeatNoise

    n, voxels, targets = check.choose((8859, 15724, 2048), (40, 12, 5))
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((n, 4), dtype=np.float32)
    x = 2 * signal @ rng.standard_normal((4, voxels), dtype=np.float32)
    x += rng.standard_normal((n, voxels), dtype=np.float32) / np.sqrt(3)
    y = np.abs(signal @ rng.standard_normal((4, targets), dtype=np.float32))
    noise = RepeatNoise(torch.eye(voxels), 1 / 3)
    with expect_failure(check, "kernel decoder"):
        start = time.perf_counter()
        decoder = KernelRidge.fit(x, y, noise)
        seconds = time.perf_counter() - start
        check.add(f"kernel decoder, {n} images, {targets} targets", seconds, "s")
        error = np.abs(decoder(torch.from_numpy(x[:64])).numpy() - y[:64]).mean()
        check.add("kernel decoder: error over spread of the targets", float(error / y.std()))


def time_index(check: Check) -> None:
    """The exact scan of an index of a million rows of 768 numbers (.npy, half precision)."""
    import numpy as np

    from src.search.embeddings import Embeddings

    rows, dim, parts = check.choose((1_000_000, 768, 4), (400, 16, 2))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, expect_failure(check, "index"):
        (Path(folder) / "img_emb").mkdir()
        block = rng.standard_normal((rows // parts, dim), dtype=np.float32).astype(np.float16)
        for part in range(parts):
            np.save(Path(folder) / "img_emb" / f"img_emb_{part}.npy", block)
        embeddings = Embeddings(folder)
        queries = rng.standard_normal((16, dim), dtype=np.float32)
        for device in dict.fromkeys((check.device, "cpu")):
            start = time.perf_counter()
            embeddings.search_exact(queries, 16, device=device)
            seconds = time.perf_counter() - start
            check.add(f"scan of {rows:,} rows, 16 queries, {device}", seconds, "s")


def compare_recipe(check: Check) -> None:
    """The mini recipe on the GPU and on the CPU, at the same time: are the scores the same?"""
    flags = {"mini_images": 300, "num_epochs": check.choose(8, 1), "ridge_folds": 2}
    flags |= {"first_images": 40, "num_inference_steps": 4, "plot_umap": False, "shuffles": 1}
    if check.rehearse:
        check.add("mini recipe", None, "", f"not in a rehearsal: {flags}")
        return
    options = [text for name, value in flags.items() for text in ("-p", name, str(value))]
    command = [sys.executable, "run.py", "mindeye", "--mini", *options]
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        for device in ("cuda", "cpu"):
            home = Path(folder) / device
            home.mkdir()
            environment = dict(os.environ) | {"PERCEPT_HOME": str(home), "MPLBACKEND": "agg"}
            environment["OMP_NUM_THREADS"] = "6"
            if device == "cpu":
                environment["CUDA_VISIBLE_DEVICES"] = ""
            log = (home / "log.txt").open("w")
            programs[device] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        scores = {d: wait_for_scores(check, Path(folder) / d, p) for d, p in programs.items()}
    compare_scores(check, scores)


def wait_for_scores(check: Check, home: Path, program: Any) -> dict[str, float]:
    """Scores by name of a recipe that is running; {} where it fails or takes too long."""
    start = time.monotonic()
    try:
        code = program.wait(timeout=max(10.0, check.remaining))
    except subprocess.TimeoutExpired:
        program.kill()
        code = 124
    paths = list(home.glob("results/*/metrics.json"))
    if code or not paths:
        lines = (home / "log.txt").read_text().strip().splitlines() or [""]
        check.add(f"mini recipe, {home.name}", None, "", f"exit {code}: {lines[-1][:200]}")
        return {}
    check.add(f"mini recipe, {home.name}", time.monotonic() - start, "s")
    return {
        record["name"]: record["value"] for record in json.loads(paths[0].read_text())["metrics"]
    }


def compare_scores(check: Check, scores: dict[str, dict[str, float]]) -> None:
    """A row a score: the GPU's, with the CPU's beside it."""
    for name, value in scores["cuda"].items():
        if name in scores["cpu"]:
            check.add(f"score {name}", value, "", f"CPU {scores['cpu'][name]:.4g}")


PARTS: dict[str, Callable[[Check], None]] = {
    "tests": run_tests,
    "steps": time_steps,
    "fit": time_fit,
    "prior": time_prior,
    "generators": time_generators,
    "clip": time_clip,
    "scores": time_scores,
    "ridge": time_ridge,
    "kernel": time_kernel,
    "index": time_index,
    "recipe": compare_recipe,
}


# ----------------------------------------------------------------------------------------- the file
def describe_machine(device: str) -> dict[str, Any]:
    """Card, driver, versions and commit."""
    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine: dict[str, Any] = {"device": device, "card": platform.processor() or "CPU"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["card"] = properties.name
        machine["memory_gb"] = round(properties.total_memory / 1e9, 1)
        machine["capability"] = f"{properties.major}.{properties.minor}"
    machine["driver"] = read_line(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    )
    commit = read_line("git", "rev-parse", "HEAD")
    changed = bool(read_line("git", "status", "--porcelain", "--untracked-files=no"))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"date": date, "commit": commit, "changed": changed, "cpus": os.cpu_count()}
    return about | machine | {"versions": versions}


def read_line(*command: str) -> str:
    """The first line that a program prints; "" where there is no such program."""
    try:
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = output.stdout.splitlines()
    return lines[0].strip() if lines else ""


def ask_driver(columns: str) -> str:
    """What nvidia-smi says of the first card; "" where there is none."""
    return read_line("nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader")


def explain_no_gpu() -> str:
    """Why torch sees no GPU, as far as can be seen."""
    import torch

    driver = ask_driver("name,driver_version")
    reason = "nvidia-smi finds no card"
    if driver:
        reason = f"nvidia-smi finds {driver}, which this torch ({torch.__version__}) cannot use"
    return f"There is no GPU for torch: {reason}. With --rehearse it runs at toy size on the CPU."


def write_results(path: Path, about: dict[str, Any], rows: list[Row]) -> None:
    """One JSON file, written anew after each part so that nothing is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = about | {"rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 where a GPU test failed or a part did, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no part begins")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(arguments)
    names = options.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    sys.path.insert(0, str(ROOT))  # a bare machine has not installed us
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(explain_no_gpu(), file=sys.stderr)
        return 2
    device = "cpu" if options.rehearse else "cuda"
    check = Check(device, options.rehearse, time.monotonic() + 60 * options.minutes)
    about = describe_machine(device)
    card = "".join(c if c.isalnum() else "_" for c in about["card"]).strip("_")
    kind = "rehearsal" if options.rehearse else card
    path = options.output / f"gpu_check-{kind}-{about['date'][:10]}.json"
    print(json.dumps(about, indent=1))
    for name in names:
        run_part(check, name)
        write_results(path, about, check.rows)
    print(f"\n{len(check.rows)} rows in {path}")
    return 1 if has_failures(check.rows) else 0


def run_part(check: Check, name: str) -> None:
    """One part, and how long it took."""
    check.part = name
    if check.remaining < 0:
        check.add(name, None, "", "not run: the time was up (--minutes)")
        return
    start = time.monotonic()
    with expect_failure(check, name):
        PARTS[name](check)
    check.add(f"all of {name}", time.monotonic() - start, "s")


def has_failures(rows: list[Row]) -> bool:
    """Whether a part or a test failed; what could not be run has not."""
    failed = any(row.note.startswith("failed") for row in rows)
    tests = [row for row in rows if row.name in ("GPU tests failed", "GPU tests error")]
    return failed or any(row.value for row in tests)


if __name__ == "__main__":
    sys.exit(main())

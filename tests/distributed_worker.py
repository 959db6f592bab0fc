"""What each process of tests/test_distributed.py does, under torchrun; it writes what it found into
a folder.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from training_options import group_options

from src import losses
from src.decoding.configs import DecoderSizes, build_decoder_config
from src.networks.rebuild import build_decoder
from src.training.loop import fit
from src.training.processes import gather, select_local_rows
from src.training.update import PATIENCE
from src.utils import PerceptError, seeded

torch.set_num_threads(1)
RANK = int(os.environ.get("RANK", 0))
SAMPLES, BATCH, EPOCHS, DIM = 21, 8, 2, 6


class Data:
    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = (
            torch.randn(SAMPLES, 5, generator=generator),
            torch.randn(SAMPLES, DIM, generator=generator),
        )

    def __len__(self):
        return SAMPLES

    def set_epoch(self, epoch):
        pass

    def __getitems__(self, indices):
        return {"x": self.x[indices], "y": self.y[indices]}


class Model(nn.Module):
    """Two parts that a step calls by themselves, and one that it skips in the first epoch."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, DIM))
        self.late = nn.Linear(DIM, DIM)
        self.never = nn.Linear(2, 2)

    def forward(self, x):
        raise AssertionError("the steps call the parts")


def mean_step(model, batch, epoch):
    out = model.backbone(batch["x"])
    out = model.late(out) if epoch else out
    loss = (out - batch["y"]).square().mean()
    return loss, {"first": out[:, 0].mean()}


def contrastive(brain, image):
    scores = F.normalize(brain, dim=-1) @ F.normalize(image, dim=-1).T / 0.1
    right = torch.arange(len(scores))
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def contrastive_step(model, batch, epoch):
    brain = model.backbone(batch["x"])
    local = (brain - batch["y"]).square().mean()
    perm = torch.arange(len(brain)).flip(0)
    rows = gather(perm, rows=True)
    assert rows.sort().values.tolist() == list(range(BATCH)), rows
    return contrastive(gather(brain), gather(batch["y"])) + 0.5 * local, {
        "rows": float(len(gather(brain)))
    }


def local_step(model, batch, epoch):
    return contrastive(model.backbone(batch["x"]), batch["y"]), {}


def noisy_step(model, batch, epoch):
    """Other noise in each process."""
    noise = torch.randn(batch["x"].shape)
    return (model.backbone(batch["x"] + noise) - batch["y"]).square().mean(), {
        "noise": noise.mean()
    }


def nan_in_one_process(model, batch, epoch):
    """The last process has a loss that is infinite, with a gradient that is not."""
    loss, logs = mean_step(model, batch, epoch)
    return spoiled_once(model, loss + float("inf"), loss), logs


def spoiled_once(model, bad, good):
    """The bad loss in the first step of the last process."""
    if RANK != int(os.environ.get("WORLD_SIZE", 1)) - 1 or hasattr(model, "spoiled"):
        return good
    model.spoiled = True
    return bad


def backbone_step(model, batch, epoch):
    return (model.backbone(batch["x"]) - batch["y"]).square().mean(), {}


def early_step(model, batch, epoch):
    """A part that is trained in the first epoch alone."""
    out = model.backbone(batch["x"])
    return ((model.late(out) if epoch == 0 else out) - batch["y"]).square().mean(), {}


def bad_gradient(model, batch, epoch):
    """In one step the last process has a gradient that is not finite, of a loss that is."""
    loss, logs = backbone_step(model, batch, epoch)
    return spoiled_once(model, loss + (model.backbone[0].bias * 0).sum().sqrt(), loss), logs


def often_bad(model, batch, epoch):
    """As many steps without a finite loss as make `fit` go back to its last weights."""
    model.calls = getattr(model, "calls", 0) + 1
    loss, logs = backbone_step(model, batch, epoch)
    return (loss * float("nan") if 3 <= model.calls < 3 + PATIENCE else loss), logs


# ------------------------------------------------------------------------------ MindEye's own step
VOXELS, TOKENS, WIDTH, MIND_BATCH, MIND_SAMPLES = 11, 3, 8, 8, 80  # 10 steps an epoch


def notebook_step():
    """`step` of notebook 01, as it stands there, in both its phases, with prior and direct
    regression.
    """
    text = (
        Path(__file__).resolve().parents[1] / "notebooks" / "01_train_high_level.py"
    ).read_text()
    cells = [cell for cell in text.split("# %%") if "def contrast(" in cell or "def step(" in cell]
    scope = {
        "torch": torch,
        "F": F,
        "mixup_pct": 0.5,
        "num_epochs": EPOCHS,
        "published": set(),
        "v2c": True,
        "prior": True,
        "prior_weight": 30.0,
        "mse_mult": 1.0,
        "dim": WIDTH,
        "losses": losses,
        "targets": SimpleNamespace(get=lambda batch: batch["tokens"]),
        "gather": gather,
        "select_local_rows": select_local_rows,
        "seeded": seeded,
    }
    for cell in cells:
        exec(cell, scope)
    return scope["step"]


class MindData:
    """Voxels and tokens with seeds of their own, as `BrainDataset` gives them."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(4)
        self.voxels = torch.randn(
            MIND_SAMPLES, VOXELS, generator=generator, dtype=torch.float64
        ).to(dtype)
        self.tokens = torch.randn(
            MIND_SAMPLES, TOKENS, WIDTH, generator=generator, dtype=torch.float64
        ).to(dtype)
        self.epoch = 0

    def __len__(self):
        return MIND_SAMPLES

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitems__(self, indices):
        return {
            "voxels": self.voxels[indices],
            "tokens": self.tokens[indices],
            "seed": 1000 * self.epoch + torch.as_tensor(indices),
        }


def mind_eye(folder, dtype):
    """The loss of each of 20 steps in this process, and the weights at the end."""
    torch.manual_seed(0)
    sizes = {
        "h": 16,
        "n_blocks": 1,
        "projector_dim": 16,
        "prior_depth": 2,
        "prior_heads": 2,
        "prior_dim_head": 8,
        "timesteps": 10,
    }
    parameters = sizes | {"hidden": True, "use_projector": True, "max_text_len": 0}
    sizes = DecoderSizes((VOXELS,), TOKENS, WIDTH)
    model = build_decoder(build_decoder_config("01_train_high_level", parameters, sizes))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses, notebook = [], notebook_step()

    def step(model, batch, epoch):
        loss, logs = notebook(model, batch, epoch)
        losses.append(loss.item())
        return loss, logs

    fit(
        model.to(dtype),
        step,
        MindData(dtype),
        folder=folder / f"mind_{dtype}".replace(".", "_"),
        config={},
        **group_options(epochs=EPOCHS, batch_size=MIND_BATCH, max_lr=1e-3, device="cpu"),
    )
    return {"losses": losses, "weights": model.state_dict()}


PLAIN = {
    "mean": mean_step,
    "contrastive": contrastive_step,
    "local": local_step,
    "noisy": noisy_step,
    "inf": nan_in_one_process,
}
STEPS = PLAIN | {
    "backbone": backbone_step,
    "early": early_step,
    "bad gradient": bad_gradient,
    "often bad": often_bad,
}


def train(folder, name, seed=0, do=None, **other):
    model, first = Model(seed), {}

    def step(model, batch, epoch):
        loss, logs = (do or STEPS[name])(model, batch, epoch)
        return loss, logs

    before = torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        if not first:
            first.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        return before(self, *args, **kwargs)

    torch.optim.AdamW.step = watch
    options = {
        "folder": folder / name,
        "config": {},
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "max_lr": 1e-2,
        "device": "cpu",
    } | other
    try:
        history = fit(
            model,
            step,
            Data(),
            validate=lambda m: {"val/loss": float(gather(m.backbone(Data().x)).square().mean())},
            **group_options(**options),
        )
    finally:
        torch.optim.AdamW.step = before
    return {
        "weights": model.state_dict(),
        "gradients": first,
        "history": (
            history.drop(columns=["seconds", "memory", "gpu_memory"], errors="ignore").to_dict(
                "list"
            )
        ),
    }


def refusals(folder):
    results = {}
    for name, model, batch in (
        ("odd", Model(0), 7),
        ("norm", nn.Sequential(nn.Linear(5, DIM), nn.BatchNorm1d(DIM)), BATCH),
    ):
        try:
            fit(
                model,
                mean_step,
                Data(),
                folder=folder / name,
                config={},
                **group_options(epochs=1, batch_size=batch, max_lr=1e-2, device="cpu"),
            )
        except PerceptError as error:
            results[name] = str(error)
    return results


def interrupted(folder):
    """Ctrl-C in one process only stops both after the same step."""
    calls = []

    def step(model, batch, epoch):
        calls.append(1)
        if RANK == 0 and len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return noisy_step(model, batch, epoch)

    try:
        train(folder / "interrupted", "noisy", do=step)
    except KeyboardInterrupt:
        return len(calls)
    return -1


# --------------------------------------------------------------------------------------- DeepSpeed
CASES = {
    "mean": {},
    "early": {},
    "contrastive": {},
    "clip": {"name": "backbone", "clip_grad": 0.05},
    "parts": {"name": "early", "accumulate": 2},
    "inf": {},
    "bad gradient": {},
    "often bad": {"epochs": 12, "save_steps": 1},
    "bf16": {"name": "backbone", "precision": "bf16"},
}


def with_zeros(step):
    """Gradients of zero where a step leaves a part alone: what DeepSpeed makes of it."""

    def changed(model, batch, epoch):
        loss, logs = step(model, batch, epoch)
        return loss + 0 * sum(p.sum() for p in model.parameters()), logs

    return changed


def cases(folder, change=lambda step: step):
    results = {}
    for case, options in CASES.items():
        options = {"name": case} | options
        results[case] = train(folder / case, do=change(STEPS[options["name"]]), **options)
    return results | {"mind_eye": mind_eye(folder, torch.float32)}


def zero_refusals(folder):
    """What does not go together with DeepSpeed."""
    results, config = {}, os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    folder.mkdir()
    (folder / "stage3.json").write_text(
        json.dumps(json.loads(Path(config).read_text()) | {"zero_optimization": {"stage": 3}})
    )
    for name, path, other in (
        ("step_in_backward", config, {"step_in_backward": True}),
        ("stage 3", str(folder / "stage3.json"), {}),
    ):
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = path
        try:
            train(folder, "backbone", **other)
        except PerceptError as error:
            results[name] = str(error)
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = config
    return results


def zero(folder):
    results = cases(folder) | {
        "noisy": train(folder, "noisy"),
        "interrupted after": interrupted(folder),
    }
    if RANK == 0:
        shutil.copytree(folder / "interrupted", folder / "copy")
    results["resumed"] = train(folder / "interrupted", "noisy", seed=5)
    results["refusals"] = zero_refusals(folder / f"refusals{RANK}")
    torch.save(results, folder / f"rank{RANK}.pt")


def main(folder):
    results = {name: train(folder, name, seed=RANK if name == "mean" else 0) for name in PLAIN}
    results["mind_eye"] = mind_eye(folder, torch.float64)
    results["refusals"] = refusals(folder)
    results["interrupted after"] = interrupted(folder)
    results["resumed"] = train(folder / "interrupted", "noisy", seed=5)
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    {"plain": main, "zero": zero}[sys.argv[2]](Path(sys.argv[1]))

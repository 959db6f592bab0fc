"""The basic autoencoder (FMRI2IMG): its encoder, its schedule of training, and its notebooks from
voxels to a scored page at toy size.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_options import group_options

from src.data.normaliser import Normaliser
from src.data.subject import open_subject
from src.decoding.checkpoints import load_decoder
from src.decoding.configs import DecoderSizes, build_decoder_config
from src.networks.low_level import BASIC_SIZES, BasicEncoder
from src.networks.rebuild import build_decoder
from src.parameters import NOTEBOOKS, parse_parameters, read_parameters_cell
from src.training.loop import fit
from src.training.optim import SCHEDULERS
from src.utils import PerceptError, count_parameters

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------- the encoder
@pytest.mark.parametrize(("size", "weights"), [("2048", 15_841_284), ("512", 2_522_900)])
def test_encoders_have_the_published_numbers_of_weights(size, weights):
    with torch.device("meta"):
        encoder = BasicEncoder(4660, size)
        assert count_parameters(encoder) == weights and encoder(torch.zeros(3, 4660)).shape == (
            3,
            4,
            16,
            16,
        )


def test_the_encoder_is_linear_layers_with_gelu_and_transposed_convolutions():
    for size in BASIC_SIZES:
        encoder = BasicEncoder(11, size, latent_size=8, factor=0.5)
        w, x = encoder.state_dict(), torch.randn(2, 11)
        y = x
        for key in [
            k.removesuffix(".weight") for k in w if k.startswith("mlp") and k.endswith("weight")
        ]:
            y = nn.functional.gelu(y @ w[f"{key}.weight"].T + w[f"{key}.bias"])
        y = y.view(2, 16, 8 // 2 ** BASIC_SIZES[size].doublings, -1)
        ups = [
            k.removesuffix(".weight")
            for k in w
            if k.startswith("upsampler") and k.endswith("weight")
        ]
        for key in ups:
            y = nn.functional.conv_transpose2d(
                y, w[f"{key}.weight"], w[f"{key}.bias"], stride=2, padding=1
            )
            y = y if key == ups[-1] else nn.functional.gelu(y)
        torch.testing.assert_close(encoder(x), 0.5 * y)


def test_what_the_encoder_refuses():
    with pytest.raises(PerceptError, match="no size '1024': choose one of 2048, 512"):
        BasicEncoder(10, "1024")
    with pytest.raises(PerceptError, match="multiple of 4, not 6"):
        BasicEncoder(10, "512", latent_size=6)
    with pytest.raises(PerceptError, match="reads 10 voxels but was given 9"):
        BasicEncoder(10, latent_size=4)(torch.zeros(1, 9))


def test_unscaled_latents_are_scaled_by_the_encoder_itself():
    sizes = DecoderSizes((10,), latent=(4, 16, 16), latent_scale=0.25)
    scaled, published = (
        build_decoder_config(
            "02_train_basic_autoencoder", {"encoder": "512", "scaled_latents": x}, sizes
        )
        for x in (True, False)
    )
    first, second = build_decoder(scaled), build_decoder(published)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 10)
    torch.testing.assert_close(second(x), 0.25 * first(x))


# -------------------------------------------------------------------------- what fit learnt for it
class Pairs:
    """Voxels and targets of a linear world."""

    def __init__(self, n: int = 24):
        self.x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
        self.y = self.x @ torch.arange(10.0).view(5, 2)

    def __len__(self):
        return len(self.x)

    def __getitems__(self, at):
        return {"x": self.x[at], "y": self.y[at]}

    def set_epoch(self, epoch):
        pass


def square(model, batch, epoch):
    loss = (model(batch["x"]) - batch["y"]).square().mean()
    return loss, {"rows": len(batch["x"])}


@pytest.fixture
def linear():
    torch.manual_seed(3)
    return nn.Linear(5, 2)


def trained(model, folder, **options):
    model = copy.deepcopy(model)
    options = {
        "epochs": 3,
        "batch_size": 8,
        "max_lr": 1e-2,
        "scheduler": "fixed",
        "device": "cpu",
    } | options
    history = fit(model, square, Pairs(), folder=folder, config={}, **group_options(**options))
    return model, history


def test_a_batch_in_parts_trains_as_the_whole_batch(linear, tmp_path):
    full, recorded = trained(linear, tmp_path / "whole")
    parts, also = trained(linear, tmp_path / "parts", accumulate=4)
    for a, b in zip(full.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (
        recorded["train/rows"].iloc[0] == 8 and also["train/rows"].iloc[0] == 2
    )  # four parts of two
    np.testing.assert_allclose(recorded["train/loss"], also["train/loss"], rtol=1e-5)
    with pytest.raises(
        PerceptError, match="batch_size of 8 cannot be worked through in 3 equal parts"
    ):
        trained(linear, tmp_path / "three", accumulate=3)
    with pytest.raises(PerceptError, match="step_in_backward does not go together with accumulate"):
        trained(linear, tmp_path / "both", accumulate=2, step_in_backward=True)


def test_betas_and_eps_reach_the_optimizer(linear, tmp_path):
    reference = copy.deepcopy(linear)
    options = {"lr": 1e-2, "betas": (0.5, 0.7), "eps": 0.1, "weight_decay": 0.3}
    groups = [{"params": [reference.weight]}, {"params": [reference.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **options)
    data = Pairs(8)
    for _ in range(4):
        optimizer.zero_grad()
        square(reference, data.__getitems__(range(8)), 0)[0].backward()
        optimizer.step()
    model = copy.deepcopy(linear)
    inputs = {
        "betas": (0.5, 0.7),
        "eps": 0.1,
        "weight_decay": 0.3,
        "scheduler": "fixed",
        "device": "cpu",
    }
    fit(
        model,
        square,
        data,
        folder=tmp_path,
        config={},
        **group_options(epochs=4, batch_size=8, max_lr=1e-2, **inputs),
    )
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_warm_up_rises_to_the_peak_and_stays(linear, tmp_path):
    optimizer, rates = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3), []
    scheduler = SCHEDULERS["warmup"](optimizer, 1e-3, 5, 4, 4)
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates[:6], np.array([1, 2, 3, 4, 5, 5]) * 1e-3 / 5)
    assert rates[-1] == pytest.approx(1e-3)
    with pytest.raises(PerceptError, match="'fixed' has no warmup_steps"):
        trained(linear, tmp_path, warmup_steps=3)
    _, history = trained(linear, tmp_path / "warm", scheduler="warmup", warmup_steps=5)
    assert history["train/lr"].tolist() == pytest.approx(
        [1e-2 / 2, 1e-2, 1e-2]
    )  # of the last of three steps an epoch


def test_runs_of_before_these_settings_can_be_resumed(linear, tmp_path):
    trained(linear, tmp_path)
    stored = torch.load(tmp_path / "state.pt", weights_only=True)["identity"]["fit"]
    assert not {"warmup_steps", "betas", "eps", "accumulate"} & set(stored)
    with pytest.raises(PerceptError, match="eps was 'not there', now it is 0.5"):
        trained(linear, tmp_path, eps=0.5)


# ---------------------------------------------------------------------------------- its parameters
def test_every_published_parameter_has_a_named_counterpart():
    page = (ROOT / "docs" / "basic_ae.md").read_text()
    names = (
        "N_TRAIN SUBJECT ANAT_SPACE FUNC_SPACE VISUAL_ROI_INPUT NSD_ROOT BATCH_SIZE"
        " DATALOADER_NUM_WORKERS GRADIENT_ACCUMULATION_STEPS ADAM_BETA1 ADAM_BETA2 ADAM_EPSILON"
        " ADAM_WEIGHT_DECAY LR_SCHEDULER WARMUP_STEPS SCALE_LR REPORT_TO MIXED_PRECISION VISUAL_DIM"
        " DIM SIGMA_THRESHOLD EDGE_THRESHOLD TRAIN_TIMESTEPS ENCODE_DIM VISUAL_ROI_PATH"
    )
    rows = {
        name: line
        for line in page.splitlines()
        if line.startswith("| `")
        for name in line.split("|")[1].replace("`", "").replace(",", " ").split()
    }
    assert not set(names.split()) - set(rows)
    known = {
        name
        for stage in ("00_prepare_data", "02_train_basic_autoencoder")
        for name in parse_parameters(read_parameters_cell(NOTEBOOKS / f"{stage}.ipynb"), stage)
    }
    current = {
        word
        for name in names.split()
        for word in rows[name].split("|")[2].replace("`", " ").replace(",", " ").split()
        if "_" in word and word.islower()
    }
    assert {
        "n_train",
        "batch_size",
        "warmup_steps",
        "scale_lr",
        "adam_epsilon",
    } <= current and not current - known


# ------------------------------------------------------------------- from nothing to a scored page
def launch(home: Path, *command: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PERCEPT_")} | {
        "PERCEPT_HOME": str(home),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow(reason="executes notebooks")
def test_the_mini_recipe_and_a_users_own_file(tmp_path):
    recipe_file = tmp_path / "my.yaml"
    recipe_file.write_text(
        "num_epochs: 2\nmini_images: 300\nfirst_images: 30\nshuffles: 1\nn_train: 200\nrois:"
        " V1,hV4\ngallery_images: 8\nlatent_mult: 0.1\n"
    )
    done = launch(
        tmp_path,
        "run.py",
        "basic_ae",
        "--mini",
        "-f",
        str(recipe_file),
        "-p",
        "encoder",
        "512",
        "-p",
        "scaled_latents",
        "False",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    logs, results = (tmp_path / kind / "basic_ae-mini-subj01" for kind in ("train_logs", "results"))
    encoder, config = load_decoder(logs / "low_level" / "best.safetensors")
    normaliser, subject = (
        Normaliser.load(logs / "normaliser.safetensors"),
        open_subject(tmp_path / "data" / "mini", 1),
    )
    columns = np.flatnonzero(subject.voxels["V1"] | subject.voxels["hV4"])
    assert normaliser.rois == ("V1", "hV4") and normaliser.columns.tolist() == columns.tolist()
    assert (
        config["model"]["kwargs"]["in_dim"] == len(columns)
        and config["model"]["kwargs"]["size"] == "512"
        and config["training"]["n_train"] == 200
    )
    assert config["model"]["kwargs"]["factor"] == pytest.approx(
        0.4117, abs=1e-3
    )  # unscaled latents, as published
    outputs = load_file(results / "reconstructions.safetensors")
    assert {
        "network",
        "ridge",
        "untrained",
        "repeats_1",
        "repeats_2",
        "mean_image",
        "nearest_train",
        "ceiling",
        "seen",
        "latents_network",
    } <= set(outputs)
    assert not {
        name
        for name in outputs
        if name.startswith(("tokens", "projected", "true", "samples", "spread"))
    } and outputs["network"].shape == (30, 3, 32, 32)
    voxels, _ = subject.get_mean_betas("test", normaliser=normaliser)
    with torch.no_grad():
        latents = encoder(torch.from_numpy(voxels[:30])).flatten(1)
    torch.testing.assert_close(outputs["latents_network"], latents, atol=1e-4, rtol=1e-3)
    stored = json.loads((results / "metrics.json").read_text())
    for record in stored["metrics"]:
        assert {"mean_image", "nearest_train", "untrained"} <= set(
            record["floors"]
        ) and np.isfinite(record["ceiling"]["value"])
    scores = pd.read_parquet(results / "scores.parquet")
    ceiling, system = (
        scores[(scores.metric == "pixcorr") & (scores.row == row)].value.mean()
        for row in ("ceiling", "system")
    )
    assert ceiling > 0.95 > system
    assert (
        (results / "figures" / "training_images_not_scored.png").exists()
        and (results / "contact_sheet.png").exists()
        and (results / "report.html").exists()
    )
    assert "raining images not scored" in (results / "report.html").read_text()
    history = pd.read_csv(logs / "low_level" / "history.csv")
    assert {"train/loss_pixels", "train/loss_latents", "val/r2"} <= set(history) and np.isfinite(
        history["val/loss"]
    ).all()
    compared = launch(tmp_path, "notebooks/07_compare.py")
    assert (
        compared.returncode == 0 and (tmp_path / "results" / "compare" / "comparison.csv").exists()
    ), compared.stderr

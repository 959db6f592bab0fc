"""What a training will need: the trace against a count by hand, the peak against a measured
process, and the command line.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from src import parameters, utils
from src.pipeline import dryrun
from src.pipeline.needs import walk_stages
from src.pipeline.recipes import list_recipes, list_stages
from src.pipeline.runs import print_plan
from src.pipeline.sweep import Sweep, print_point_plan
from src.utils import PerceptError

ROOT = Path(__file__).resolve().parents[1]
HIGH = {
    "dataset": "absent",
    "subj": 1,
    "weights": "hub",
    "decoder": "network",
    "hidden": True,
    "clip_variant": "ViT-L/14",
    "use_image_aug": False,
    "cached_views": 0,
    "batch_size": 4,
    "num_epochs": 240,
    "ckpt_interval": 5,
    "h": 4096,
    "n_blocks": 4,
    "use_projector": True,
    "projector_dim": 2048,
    "prior_depth": 0,
    "prior_heads": 12,
    "prior_dim_head": 64,
    "timesteps": 0,
    "max_text_len": 256,
    "prior": True,
    "v2c": True,
    "mse_mult": 0.0,
    "precision": "no",
    "step_in_backward": False,
}


def test_the_trace_is_what_autograd_keeps():
    batch, weights = 7, (11 * 5 + 5 * 3) * 4

    def build():
        return nn.Sequential(nn.Linear(11, 5, bias=False), nn.GELU(), nn.Linear(5, 3, bias=False))

    estimate = dryrun.estimate_training_memory(
        build, lambda model: model(torch.zeros(batch, 11)).square().sum()
    )
    assert estimate["weights"] == weights and estimate["optimizer state"] == 2 * weights
    # kept: the input, the input of GELU, its output, and the output for the square; on the way back
    # the gradients join while these go
    kept_bytes = 4 * batch * (11 + 5 + 5 + 3)
    assert estimate["activations and gradients"] == max(
        kept_bytes, 4 * batch * (11 + 5 + 5) + 4 * 15, 4 * batch * 11 + weights
    )


def test_gradients_join_while_activations_go():
    events = [("activation", 3), ("parameter", 100), ("activation", 7), ("parameter", 10)]
    # backward: 10 held; 20 with the last weight's gradient; 7 go; the first weight's joins what is
    # left
    assert dryrun.find_backward_peak(events, step_in_backward=False) == 3 + 10 + 100
    assert dryrun.find_backward_peak(events, step_in_backward=True) == 3 + 100


def measured(step_in_backward: bool) -> dict:
    """Peak memory of a real training beyond its base, and what was predicted for it."""
    script = f"""
        import json, tempfile
        import torch
        from src import utils
        from src.pipeline import dryrun
        from src.models import BrainNetwork
        from src.training import Batching, Checkpointing, Execution, Optimisation, fit
        torch.set_num_threads(1)
        def build():
            return BrainNetwork(
                in_dim=2000, out_dim=24_000, clip_size=96, h=2048, n_blocks=4, use_projector=False
            )
        def loss(model):
            return model(torch.zeros(64, 2000)).square().mean()
        class Data:
            def __len__(self): return 192
            def set_epoch(self, epoch): pass
            def __getitems__(self, rows): return {{"x": torch.randn(len(rows), 2000)}}
        in_backward = {step_in_backward}
        predicted = dryrun.estimate_training_memory(build, loss, step_in_backward=in_backward)
        dryrun.measure_base_memory()
        base = utils.peak_memory()
        with tempfile.TemporaryDirectory() as folder:
            fit(
                build(),
                lambda model, batch, epoch: (model(batch["x"]).square().mean(), {{}}),
                Data(),
                folder=folder,
                config={{}},
                batching=Batching(1, 64),
                optimisation=Optimisation(1e-3),
                execution=Execution("cpu", step_in_backward=in_backward),
                checkpointing=Checkpointing(save_every=1e9, checkpoints=False),
            )
        measured = utils.peak_memory() - base
        print(json.dumps({{"predicted": sum(predicted.values()), "measured": measured}}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow(reason="measures trainings in processes of their own")
@pytest.mark.parametrize("step_in_backward", [False, True])
def test_prediction_is_within_15_percent_of_a_measured_training(step_in_backward):
    estimate = measured(step_in_backward)
    assert estimate["measured"] > 5e8
    assert estimate["predicted"] == pytest.approx(estimate["measured"], rel=0.15), estimate


def test_the_full_model_is_what_is_published():
    plan = dryrun.plan_stage("01_train_high_level", HIGH)
    assert sum(plan.parameters.values()) == 1_003_635_088
    assert plan.memory["weights"] == pytest.approx(4.01e9, rel=0.01) and plan.memory[
        "optimizer state"
    ] == pytest.approx(8.03e9, rel=0.01)
    early = dryrun.plan_stage("01_train_high_level", HIGH | {"step_in_backward": True})
    assert (
        early.memory["activations and gradients"]
        < 0.85 * plan.memory["activations and gradients"]
        > 0.85 * 4.01e9
    )
    assert plan.disk["cached targets"] == pytest.approx(257 * 768 * 2 * 9841)


def test_networks_are_as_wide_as_the_components():
    full, few = (
        dryrun.plan_stage("01_train_high_level", HIGH | {"n_components": k}) for k in (0, 30)
    )
    assert full.parameters["voxel2clip"] - few.parameters["voxel2clip"] == (15724 - 30) * 4096
    assert (
        full.parameters["net"] == few.parameters["net"]
        and not full.memory["finding components, beyond that"]
    )
    small = HIGH | {
        "h": 64,
        "n_blocks": 1,
        "projector_dim": 64,
        "prior": False,
        "clip_variant": "ViT-B/32",
        "hidden": False,
        "batch_size": 2,
        "n_components": 30,
    }
    plan = dryrun.plan_stage("01_train_high_level", small).memory
    trials = (
        27750 * 8559 // 9841
    )  # the voxels of the training trials in single precision are more than that network needs
    network_bytes = sum(
        plan[name]
        for name in ("weights", "optimizer state", "activations and gradients", "frozen CLIP")
    )
    assert plan["finding components, beyond that"] == pytest.approx(
        4 * trials * (15724 + 60) - network_bytes, rel=1e-6
    )


def test_what_is_not_there_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("memory", (), {"available": 4e9}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("disk", (), {"free": 1e9}))
    warnings = dryrun.plan_stage("01_train_high_level", HIGH).warnings
    assert (
        len(warnings) == 4
        and "no GPU here" in warnings[0]
        and "clip-vit-large-patch14 is not in the hub's cache" in warnings[1]
    )
    assert (
        "besides libraries and mapped files, and 4.0 GB are free" in warnings[2]
        and "set PERCEPT_HOME" in warnings[3]
    )
    source = {"dataset": "absent", "subj": 1, "source": "mindeye", "data_path": "data/nowhere"}
    assert (
        "There is nothing at data/nowhere"
        in dryrun.plan_stage("00_prepare_data", source).warnings[0]
    )
    assert (
        "'clip' is not at nowhere"
        in dryrun.plan_stage("01_train_high_level", HIGH | {"weights": "nowhere"}).warnings[0]
    )
    with pytest.raises(PerceptError, match="no subject 9 in NSD: choose one of 1 to 8"):
        dryrun.plan_stage("01_train_high_level", HIGH | {"subj": 9})


def test_preparing_the_data_of_mindeye2_needs_no_models():
    """The stage has no parameter that says where these come from."""
    source = {"dataset": "absent", "subj": 1, "source": "mindeye2", "data_path": "data/nowhere"}
    plan = dryrun.plan_stage("00_prepare_data", source | {"recipe": "mindeye2"})
    assert plan.disk["betas"] == 4 * 27750 * 15724
    assert not [sentence for sentence in plan.warnings if "cache" in sentence]


def test_the_mini_world_is_known_before_it_is_drawn():
    plan = dryrun.plan_stage(
        "01_train_high_level",
        HIGH
        | {
            "dataset": "mini",
            "weights": "mini",
            "h": 1024,
            "n_blocks": 2,
            "projector_dim": 256,
        },
    )
    assert plan.memory["mapped data"] == 4 * 16800 * 1572 + 2 * 17 * 128 * 5600
    assert plan.parameters["voxel2clip"] < 10e6
    disk = dryrun.plan_stage(
        "00_prepare_data", {"dataset": "mini", "subj": 1, "source": "mini", "data_path": ""}
    ).disk
    assert disk == {"betas": 4 * 16800 * 1572, "images": 5600 * 32 * 32 * 3}


def test_images_take_the_disk_that_is_told(tmp_path):
    settings = {
        "dataset": "mini",
        "subj": 1,
        "weights": "mini",
        "decoder": "both",
        "first_images": 0,
        "img2img_strength": 0.85,
        "recons_per_sample": 1,
    }
    settings |= {"untrained": False, "fewer_repeats": "", "keep_samples": 0}
    disk = dryrun.plan_stage("03_reconstruct", settings).disk
    assert (
        disk["images"] == 300 * 3 * 32 * 32 * 2 * 9
        # in half precision, both decoders and low levels, ceiling, autoencoder; seen, mean image,
        # nearest
    )
    assert "memory" not in str(
        dryrun.plan_stage("03_reconstruct", settings)
    ) and "trains no network" in str(dryrun.plan_stage("03_reconstruct", settings))
    assert (
        dryrun.plan_stage("03_reconstruct", settings | {"img2img_strength": 1.0}).disk["images"]
        == disk["images"] * 7 / 9
    )
    more = dryrun.plan_stage(
        "03_reconstruct", settings | {"untrained": True, "fewer_repeats": "1,2", "keep_samples": 4}
    ).disk
    assert more["images"] == disk["images"] * (9 + 1 + 2 + 4) / 9
    for recipe, tokens in (
        ("mindeye/mini", 17),
        ("combined", 1),
        ("mindeye_retrieval/mini", 1),
    ):  # the recipe's training says how many
        assert (
            dryrun.plan_stage("03_reconstruct", settings | {"recipe": recipe}).disk["tokens"]
            == disk["tokens"] * tokens / 17
        )
    full = dryrun.plan_stage(
        "03_reconstruct", settings | {"dataset": "absent", "weights": "hub", "decoder": "network"}
    ).disk
    assert full["published files"] == 982 * 4 * 3 * (512**2 + 256**2)


@pytest.mark.slow(reason="starts the command line")
def test_the_command_line_tells_and_writes_nothing(tmp_path):
    environment = os.environ | {"PERCEPT_HOME": str(tmp_path / "home")}
    command = [
        sys.executable,
        "run.py",
        "mindeye",
        "--dry-run",
        "-p",
        "subj",
        "5",
        "-p",
        "batch_size",
        "4",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"{936_582_144 + 56_055_184:,} parameters" in done.stdout
        and "02_train_autoencoder will train" in done.stdout
    )
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        ("mindeye2_small", 119_953_240),
        ("mindeye2", 2_227_294_844),
        ("mindeye2_pretrain", 2_575_262_332),
    ],
)
def test_plan_of_mindeye2_counts_as_published(recipe, count):
    declared = parameters.parse_parameters(
        parameters.read_parameters_cell(parameters.NOTEBOOKS / "01_train_mindeye2.ipynb"),
        "01_train_mindeye2",
    )
    values = {name: p.default for name, p in declared.items()}
    for file in parameters.find_recipe_files(recipe, "01_train_mindeye2"):
        values |= parameters.read_recipe(file)
    plan = dryrun.plan_stage("01_train_mindeye2", values | {"dataset": "absent"})
    assert sum(plan.parameters.values()) == count
    assert plan.memory["weights"] == pytest.approx(4 * count, rel=1e-3)
    if recipe == "mindeye2_small":
        all_sessions = dryrun.plan_stage(
            "01_train_mindeye2", values | {"dataset": "absent", "num_sessions": 0}
        )
        assert (
            plan.memory["ridge baseline, beyond that"]
            < all_sessions.memory["ridge baseline, beyond that"]
        )


RECIPES = [
    f"{folder.name}{overlay}"
    for folder in list_recipes()
    for overlay in ("", "/mini")
    if not overlay or (folder / "mini").is_dir()
]


@pytest.mark.slow(reason="traces a training step of every stage of every recipe")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_and_every_range_of_stages_has_a_plan(recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(utils, "HOME", tmp_path)
    stages = list_stages(recipe.partition("/")[0])
    print_plan(recipe, {})
    shown = capsys.readouterr().out
    assert all(stage in shown for stage in stages)
    for stage in stages:
        print_plan(recipe, {}, first=stage, last=stage)
        assert stage in capsys.readouterr().out


@pytest.mark.slow(reason="traces a training step of the first point of every sweep")
@pytest.mark.parametrize("grid", sorted((ROOT / "launch" / "sweeps").glob("*.yaml")))
def test_every_sweep_has_a_plan(grid, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(utils, "HOME", tmp_path)
    print_point_plan(Sweep(str(grid)))
    assert "memory" in capsys.readouterr().out


def test_what_mindeye2_caches_and_rewrites_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "HOME", tmp_path)
    values = dict(walk_stages("mindeye2_small", list_stages("mindeye2_small"), {}))
    disk = dryrun.plan_stage("03_reconstruct", values["03_reconstruct"]).disk
    assert disk["tokens that the decoder reads"] == pytest.approx(8.4e9, rel=0.02)
    assert disk["unCLIP decoder, rewritten"] == 5.5e9
    plan = dryrun.plan_stage("04_refine", values["04_refine"])
    assert plan.disk["tokens of the captioner"] == pytest.approx(5.2e9, rel=0.02)
    assert any("run.py download refiner" in sentence for sentence in plan.warnings)
    values = dict(walk_stages("mindeye2", list_stages("mindeye2"), {}))
    disk = dryrun.plan_stage("03_reconstruct", values["03_reconstruct"]).disk
    assert "tokens that the decoder reads" not in disk  # the training has them

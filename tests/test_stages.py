"""The stages for real, at toy size: the whole mini recipe through run.py, and what follows from its
run.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src.utils import load_checkpoint

pytestmark = pytest.mark.slow(reason="runs whole notebooks in processes of their own")

ROOT = Path(__file__).resolve().parents[1]


def launch(home: Path, *command: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PERCEPT_")} | {
        "PERCEPT_HOME": str(home),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )


def test_the_mini_recipe_from_nothing_to_a_scored_report(tmp_path):
    toy = {
        "mini_images": 400,
        "num_epochs": 1,
        "first_images": 40,
        "num_inference_steps": 3,
        "plot_umap": False,
        "shuffles": 1,
    }
    flags = [text for name, value in toy.items() for text in ("-p", name, str(value))]
    done = launch(tmp_path, "run.py", "mindeye", "--mini", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "results" / "mindeye-mini-subj01"
    assert (
        len(list(results.glob("0*.ipynb"))) == 6
        and (results / "contact_sheet.png").exists()
        and (results / "report.html").exists()
    )
    with Image.open(results / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 300
    content = json.loads((results / "metrics.json").read_text())
    for record in content["metrics"]:
        assert {
            "name",
            "value",
            "low",
            "high",
            "n",
            "protocol",
            "test_set",
            "floors",
            "ceiling",
        } <= set(record)
        assert (
            record["low"] <= record["value"] <= record["high"]
            and record["floors"]
            and record["protocol"] == "mini-300"
        )
    assert {
        "pixcorr",
        "ssim",
        "mini:CLIP",
        "mini:judge:kind",
        "image_from_brain_top1",
        "hard_image_from_brain_top1",
    } <= {r["name"] for r in content["metrics"]}
    assert {
        "Other decoders on the same images",
        "Fewer repeats of the test images",
        "Retrieval in pools",
    } <= {t["title"] for t in content["tables"]}
    assert {c["stage"] for c in content["provenance"]["selection"]} == {"06_metrics"} and content[
        "provenance"
    ]["test_set"]["images"] == 40
    scores = pd.read_parquet(results / "scores.parquet")
    assert {"05_retrieve", "06_metrics"} == set(scores["stage"]) and not scores.duplicated(
        ["stage", "metric", "row", "image", "sample", "draw"]
    ).any()
    rows = {
        "system",
        "ridge",
        "shuffled",
        "mean_image",
        "other_recon",
        "untrained",
        "nearest_train",
        "ceiling",
        "low_level_network",
        "repeats_1",
    }
    assert rows <= set(scores["row"]) and {"abstain.png", "train_distance.png", "scores.png"} <= {
        p.name for p in (results / "figures").iterdir()
    }
    anyones_reconstructions(tmp_path, results)
    for stage in ("01_train_high_level", "02_train_autoencoder"):
        memory_is_as_planned(results / f"{stage}.ipynb")
    rerun = launch(tmp_path, "run.py", "mindeye", "--mini", *flags)
    assert rerun.stdout.count("finished before") == 6
    reconstruct_with_a_released_file(tmp_path)
    the_recipe_of_one_embedding(tmp_path, flags)
    both_trainings_with_everything_on(tmp_path)


def anyones_reconstructions(home: Path, results: Path) -> None:
    """The published files of the same run, scored as if they came from elsewhere, without data set
    or run: the same numbers, with the floors there can be.
    """
    recons = next(results.glob("*_recons_img2img*samples.pt"))
    flags = (
        "--recon_path",
        str(recons),
        "--all_images_path",
        str(results / "all_images.pt"),
        "--shuffles",
        "1",
    )
    mini = ("-f", "recipes/mindeye/mini/06_metrics.yaml")
    unnamed = launch(home, "notebooks/06_metrics.py", *mini, *flags)
    assert unnamed.returncode and "model_name" in unnamed.stderr.splitlines()[-1]
    done = launch(
        home,
        "notebooks/06_metrics.py",
        *mini,
        *flags,
        "--model_name",
        "theirs",
        "--hard_negatives",
        "",
    )
    assert done.returncode == 0, done.stderr
    recomputed, expected = (
        {r["name"]: r for r in json.loads((folder / "metrics.json").read_text())["metrics"]}
        for folder in (results.parent / "theirs", results)
    )
    for name in ("pixcorr", "ssim", "mini:AlexNet(2)", "mini:CLIP"):
        assert recomputed[name]["value"] == pytest.approx(
            expected[name]["value"], abs=2e-3
        )  # ours went through half precision
    assert (
        set(recomputed["pixcorr"]["floors"]) == {"shuffled", "mean_seen", "other_recon"}
        and recomputed["pixcorr"]["ceiling"]["not_applicable"]
    )
    good = load_file(results / "reconstructions.safetensors")[
        "ceiling"
    ].float()  # the toy network itself is at chance, and told so
    for name, pictures, alarm in (
        ("aligned", good, ""),
        ("misaligned", good.roll(7, 0), "probably misaligned"),
    ):
        torch.save(pictures, home / f"{name}.pt")
        few = (
            "--recon_path",
            str(home / f"{name}.pt"),
            *flags[2:],
            "--metrics",
            "pixcorr,CLIP",
            "--model_name",
            name,
            "--hard_negatives",
            "",
        )
        assert launch(home, "notebooks/06_metrics.py", *mini, *few).returncode == 0
        alarms = json.loads((results.parent / name / "metrics.json").read_text())["provenance"][
            "alarms"
        ]
        assert alarm in alarms[0] if alarm else not alarms
    table = pd.read_csv(recons.with_suffix(".csv"), sep="\t").set_index("Metric")["Value"]
    assert (
        table["pixcorr"] == pytest.approx(recomputed["pixcorr"]["value"], abs=1e-5)
        and (results.parent / "theirs" / "report.html").exists()
    )


def memory_is_as_planned(notebook: Path) -> None:
    """What an executed notebook printed at its beginning and at its end; of so little, most is
    libraries, which grow by .1 to .2 GB as they are first used.
    """
    text = "".join(
        "".join(out.get("text", ""))
        for cell in json.loads(notebook.read_text())["cells"]
        for out in cell.get("outputs", [])
    )
    planned, peak = (
        float(re.search(pattern, text)[1])
        for pattern in (r"\n  memory ([\d.]+) GB", r"peak memory ([\d.]+) GB")
    )
    assert planned == pytest.approx(peak, abs=0.3), text


def reconstruct_with_a_released_file(home: Path) -> None:
    """A network in the published file layout, with a low level of our own: notebook 03 takes each
    by its run's name, and gives it its kind of voxels.
    """
    state, _ = load_checkpoint(
        home / "train_logs" / "mindeye-mini-subj01" / "high_level" / "last.safetensors"
    )
    (home / "train_logs" / "prior_released").mkdir()
    torch.save(
        {"epoch": 239, "model_state_dict": {f"module.{k}": v for k, v in state.items()}},
        home / "train_logs" / "prior_released" / "last.pth",
    )
    flags = (
        "--model_name",
        "prior_released",
        "--decoder",
        "network",
        "--img2img_strength",
        "0.5",
        "--first_images",
        "6",
        "--num_inference_steps",
        "2",
    )
    flags += ("--autoencoder_name", "mindeye-mini-subj01")
    done = launch(
        home,
        "notebooks/03_reconstruct.py",
        "-f",
        "recipes/mindeye/mini/03_reconstruct.yaml",
        *flags,
        "--recons_per_sample",
        "2",
    )
    assert done.returncode == 0, done.stderr
    tensors = load_file(home / "results" / "prior_released" / "reconstructions.safetensors")
    expected = load_file(home / "results" / "mindeye-mini-subj01" / "reconstructions.safetensors")
    assert tensors["network"].shape == (6, 3, 32, 32) and not torch.allclose(
        tensors["tokens_network"], expected["tokens_network"][:6]
    )  # raw betas, not z-scores
    torch.testing.assert_close(tensors["low_level_network"], expected["low_level_network"][:6])
    assert (
        home / "results" / "prior_released" / "prior_released_recons_img2img0.5_2samples.pt"
    ).exists()


def the_recipe_of_one_embedding(home: Path, flags: tuple[str, ...]) -> None:
    """mindeye_retrieval on the same prepared data: the 1x768 model, image variations, and a table
    of scores.
    """
    done = launch(home, "run.py", "mindeye_retrieval", "--mini", *flags, "-p", "pool_images", "400")
    assert done.returncode == 0, done.stdout + done.stderr
    results = home / "results" / "mindeye_retrieval-mini-subj01"
    tensors = load_file(results / "reconstructions.safetensors")
    assert tensors["network"].shape == (40, 3, 32, 32) and tensors[
        "projected_network"
    ].shape == tensors["true_tokens"].shape == (40, 1, 128)
    assert "image_from_brain_top1" in {
        r["name"] for r in json.loads((results / "metrics.json").read_text())["metrics"]
    }
    two = (
        "--model_name2",
        results.name,
        "--rerank_k",
        "5",
        "--pool_sampling",
        "consecutive",
        "--pool_size",
        "20",
        "--no-plot_umap",
    )
    done = launch(
        home, "notebooks/05_retrieve.py", "-f", "recipes/mindeye/mini/05_retrieve.yaml", *two
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((home / "results" / "mindeye-mini-subj01" / "metrics.json").read_text())
    record = {r["name"]: r for r in content["metrics"]}["second_order_image_from_brain_top1"]
    assert (
        record["value"] <= record["ceiling"]["value"]
        and len({t["title"]: t["rows"] for t in content["tables"]}["Retrieval with two models"])
        == 4
    )
    searched = json.loads((results / "metrics.json").read_text())
    assert {"retrieved", "retrieved_ceiling"} <= set(
        pd.read_parquet(results / "scores.parquet")["row"]
    ) and "pool_top1" in {r["name"] for r in searched["metrics"]}
    decoders_table = {t["title"]: t for t in searched["tables"]}[
        "Other decoders on the same images"
    ]
    assert (
        "exact image in pool: no" in decoders_table["note"]
        and "retrieved" in decoders_table["rows"][0]
    )
    begin_at_retrieved_pictures(home, results.name)
    assert {"image_from_brain.png", "brain_from_image.png"} <= {
        p.name for p in (home / "results" / "mindeye-mini-subj01" / "figures").iterdir()
    }


def begin_at_retrieved_pictures(home: Path, found_by: str) -> None:
    """Notebook 03 begins where notebook 05_search_index ended: with no step at all, at what was
    retrieved, through the autoencoder.
    """
    flags = (
        "--model_name",
        "prior_released",
        "--decoder",
        "network",
        "--first_images",
        "6",
        "--num_inference_steps",
        "4",
        "--recons_per_sample",
        "1",
    )
    refused = launch(
        home,
        "notebooks/03_reconstruct.py",
        "-f",
        "recipes/mindeye/mini/03_reconstruct.yaml",
        *flags,
        "--start_run",
        found_by,
    )
    assert refused.returncode and "with start_run set untrained to False" in refused.stderr
    flags += (
        "--no-untrained",
        "--fewer_repeats",
        "",
        "--img2img_strength",
        "0",
        "--start_run",
        found_by,
    )
    done = launch(
        home,
        "notebooks/03_reconstruct.py",
        "-f",
        "recipes/mindeye/mini/03_reconstruct.yaml",
        *flags,
    )
    assert done.returncode == 0, done.stderr
    tensors = load_file(home / "results" / "prior_released" / "reconstructions.safetensors")[
        "network"
    ].float()
    start_images = load_file(home / "results" / found_by / "reconstructions.safetensors")[
        "retrieved"
    ][:6].float()
    seen = load_file(home / "results" / found_by / "reconstructions.safetensors")["seen"][
        :6
    ].float()
    from_begun, from_seen = (
        (tensors - other).square().mean((1, 2, 3)) for other in (start_images, seen)
    )
    assert (from_begun < 0.01).all() and (from_seen > 0.01).all()


def both_trainings_with_everything_on(home: Path) -> None:
    """All the published losses and augmentations at once, with figures on the way; then the
    published behaviours by name.
    """
    common = (
        "--num_epochs",
        "2",
        "--ckpt_interval",
        "1",
        "--decoder",
        "network",
        "--model_name",
        "everything",
    )
    on = (
        "--use_cont",
        "--cached_views",
        "0",
        "--use_reconst",
        "--use_sobel_loss",
        "--use_blurred_training",
        "--best_by",
        "ssim",
        "--mixup_pct",
        "0.5",
    )
    low = launch(
        home,
        "notebooks/02_train_autoencoder.py",
        "-f",
        "recipes/mindeye/mini/02_train_autoencoder.yaml",
        *common,
        *on,
    )
    assert low.returncode == 0, low.stderr
    history = pd.read_csv(home / "train_logs" / "everything" / "low_level" / "history.csv")
    assert {
        "train/loss_l1",
        "train/loss_cont",
        "train/loss_reconst",
        "train/loss_sobel",
        "val/ssim",
    } <= set(history)
    assert (
        history["train/loss_cont"].isna().tolist() == [True, False]
        and np.isfinite(history.iloc[1]).all()
    )  # mixing first, contrast afterwards
    assert (home / "train_logs" / "everything" / "low_level" / "epoch002.safetensors").exists()
    high = launch(
        home,
        "notebooks/01_train_high_level.py",
        "-f",
        "recipes/mindeye/mini/01_train_high_level.yaml",
        *common,
        "--use_image_aug",
        "--n_samples_save",
        "2",
        "--faithful",
        "mixco_labels, norm_decay, batch_repeats, resampled_epochs, train_on_val",
        "--no-use_projector",
        "--step_in_backward",
    )
    assert high.returncode == 0, high.stderr
    figures = {path.name for path in (home / "results" / "everything" / "figures").glob("*.png")}
    assert {
        "01_samples_epoch000.png",
        "01_samples_epoch001.png",
        "02_samples_epoch001.png",
        "01_training.png",
        "02_training.png",
    } <= figures
    assert not (
        home / "train_logs" / "everything" / "high_level" / "best.safetensors"
    ).exists()  # nothing to choose by when validation is trained on

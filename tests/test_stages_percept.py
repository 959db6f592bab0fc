"""The recipe percept for real, at toy size: encoding model, decoder, pictures, retrieval, scores,
through run.py, with a pool of other images.
"""

import json

import pandas as pd
import pytest
from safetensors.torch import load_file
from test_stages import launch

from src import miniworld
from src.search import write_tars
from src.utils import load_checkpoint

pytestmark = pytest.mark.slow(reason="runs all notebooks of a recipe")

TOY = {
    "mini_images": 150,
    "trials_per_session": 60,
    "variance_partitioning": False,
    "num_epochs": 2,
    "epoch_steps": 5,
    "n_draws": 50,
    "ridge_folds": 2,
    "first_images": 16,
    "num_inference_steps": 2,
    "shuffles": 1,
}


def flags_of(**settings):
    return [text for name, value in settings.items() for text in ("-p", name, str(value))]


def test_percept_from_the_scanner_to_scores(tmp_path):
    images = miniworld.generate_pool(320, n_test=300)  # 300 test images, then 20 others
    pool = write_tars(list(images)[300:], tmp_path / "pool", 20)
    run = ("run.py", "percept", "--mini", *flags_of(**TOY, pool=pool))
    refused = launch(tmp_path, *run, *flags_of(held_out_combination="scene,kind,colour"))
    assert refused.returncode == 1
    assert "with a combination of labels that is held out" in refused.stderr
    drop = flags_of(held_out_combination="scene,kind,colour", pool_overlap="drop")
    done = launch(tmp_path, *run, *drop)
    assert done.returncode == 0, done.stdout + done.stderr
    name = "percept-mini-subj01"
    _, config = load_checkpoint(tmp_path / "train_logs" / name / "high_level" / "last.safetensors")
    assert config["model"]["name"] == "PerceptDecoder"
    assert config["pool"]["name"] == str(pool) and 0 < config["pool"]["images"] < 20
    history = pd.read_csv(tmp_path / "train_logs" / name / "high_level" / "history.csv")
    assert {"train/loss_measured", "train/loss_simulated", "val/token_r2"} <= set(history)
    tensors = load_file(tmp_path / "results" / name / "reconstructions.safetensors")
    expected = ("network", "ridge", "low_level_network", "low_level_ridge", "ceiling")
    assert {*expected, "tokens_network", "tokens_ridge"} <= set(tensors)
    report = json.loads((tmp_path / "results" / name / "metrics.json").read_text())
    scores = {record["name"] for record in report["metrics"]}
    assert {"pixcorr", "image_from_brain_top1"} <= scores

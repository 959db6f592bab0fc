"""MindEye2 for real, at toy size: pretraining on another subject, fine-tuning on two sessions,
pictures, captions and scores, through run.py.
"""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_stages import launch

from src.utils import load_checkpoint

pytestmark = pytest.mark.slow(reason="runs MindEye2's notebooks from pretraining to captions")


def test_mindeye2_from_pretraining_on_others_to_captions(tmp_path):
    toy = {
        "mini_images": 150,
        "trials_per_session": 60,
        "num_epochs": 1,
        "prior_depth": 1,
        "subjects": "1,2",
        "also": "2",
        "ridge_folds": 2,
    }
    later = {
        "num_sessions": 2,
        "batch_size": 8,
        "first_images": 16,
        "num_inference_steps": 2,
        "converter_epochs": 1,
        "refine_run": 2,
        "shuffles": 1,
        "untrained": False,
    }
    flags = [
        [text for name, value in settings.items() for text in ("-p", name, str(value))]
        for settings in (toy, later)
    ]
    done = launch(tmp_path, "run.py", "mindeye2_small_pretrain", "--mini", *flags[0])
    assert done.returncode == 0, done.stdout + done.stderr
    pretrained, config = load_checkpoint(
        tmp_path
        / "train_logs"
        / "mindeye2_small_pretrain-mini-subj01"
        / "high_level"
        / "last.safetensors"
    )
    assert config["training"]["subjects"] == [2] and config["training"]["num_sessions"] == 0
    done = launch(tmp_path, "run.py", "mindeye2_small_finetune", "--mini", *flags[0], *flags[1])
    assert done.returncode == 0, done.stdout + done.stderr
    name = "mindeye2_small_finetune-mini-subj01-2sessions"
    tuned, config = load_checkpoint(
        tmp_path / "train_logs" / name / "high_level" / "last.safetensors"
    )
    dead = [key for key in tuned if key.startswith("backbone.mixer_blocks1")]
    assert dead and all(
        torch.equal(tuned[key], pretrained[key]) for key in dead
    )  # taken over, and nothing has touched them since
    assert not torch.equal(
        tuned["backbone.backbone_linear.weight"], pretrained["backbone.backbone_linear.weight"]
    )
    results = tmp_path / "results" / name
    tensors = load_file(results / "reconstructions.safetensors")
    assert {
        "network",
        "ridge",
        "low_level_network",
        "low_level_ridge",
        "nearest_train",
        "ceiling",
        "refined",
        "tokens_network",
    } <= set(tensors)
    captions = pd.read_parquet(results / "captions_brain.parquet")
    assert len(captions) == len(tensors["seen"]) == 16 and (captions["brain"].str.len() > 0).all()
    scores = {
        record["name"] for record in json.loads((results / "metrics.json").read_text())["metrics"]
    }
    assert {
        "pixcorr",
        "ROUGE-L",
        "CIDEr",
        "brain_correlation V1",
        "image_from_brain_top1",
    } <= scores
    recons = torch.load(results / f"{name}_all_recons.pt", weights_only=True)
    assert recons.shape == (16, 3, 256, 256) and recons.dtype == torch.float32
    assert "PixCorr" in (results / "tables" / f"{name}_all_recons.csv").read_text()

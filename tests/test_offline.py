"""A user's way: download what a recipe needs, switch the network off, run every stage.

The public servers are a folder with tiny models of the real classes, under the names of the real
repositories and files.
"""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from real_files import write_mindeye2
from test_unclip import TINY_UNET, TINY_VAE, network_keys, released, vae_keys
from transformers import CLIPConfig, CLIPModel

from src.pretrained import MINI_MODELS
from src.pretrained.base import HUB, locate_model
from src.pretrained.unclip import CHECKPOINT
from src.utils import ROOT

SMALL = {
    "hidden_dim": 16,
    "n_blocks": 1,
    "prior_depth": 1,
    "prior_dim_head": 8,
    "num_epochs": 2,
    "ridge_folds": 2,
    "clip_seq_dim": 0,
    "clip_emb_dim": 0,
    "prior_steps": 3,
    "num_inference_steps": 2,
    "generator_batch": 8,
    "converter_epochs": 1,
    "metrics": "pixcorr,CLIP",
    "resizing": "straight",
    "caption_metrics": "ROUGE-L,Sentence",
    "brain_corr": False,
    "refine": False,
}


def save_clip(folder):
    """A CLIP whose config contradicts itself as LAION's does."""
    torch.manual_seed(0)
    size = {
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = size | {"image_size": 32, "patch_size": 8, "projection_dim": 16}
    text = size | {"vocab_size": 50, "max_position_embeddings": 9, "projection_dim": 16}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)


def save_unclip(path):
    """The released decoder's file with tiny networks."""
    torch.manual_seed(0)
    models = UNet2DConditionModel(**TINY_UNET), AutoencoderKL(**TINY_VAE)
    rows = network_keys((32, 64, 64), (0, 1, 2), 12, 16), vae_keys((32, 32, 64, 64))
    state = released(*rows, [model.state_dict() for model in models])
    torch.save({"state_dict": state, "callbacks": SimpleNamespace(best=1)}, path)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mirror")
    data = folder / "pscotti/mindeyev2"
    write_mindeye2(data)
    save_unclip(data / CHECKPOINT)
    for name in ("clip", "clip-ViT-B-32", "git", "image_variation"):
        source = locate_model("clip" if name.startswith("clip") else name, "mini")
        shutil.copytree(source, folder / HUB[name])
        (folder / HUB[name] / "golden_features.json").unlink()
    save_clip(folder / HUB["clip-bigG"])
    shutil.copytree(MINI_MODELS / "sentence", folder / "sentence-transformers/all-MiniLM-L6-v2")
    return folder


@pytest.mark.slow(reason="runs every stage of a recipe")
@pytest.mark.parametrize("recipe", ["mindeye2_small"])
def test_download_then_no_network_then_every_stage(recipe, mirror, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name[:3] != "HF_"}
    environment |= {"PERCEPT_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")}
    environment |= {"TORCH_HOME": str(tmp_path / "torch"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    pairs = [f"{name}={value}" for name, value in SMALL.items()]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/offline_recipe.py", recipe, mirror, *pairs],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "all stages have run" in done.stdout
    assert "GIT wrote of 12 of these images" in done.stdout

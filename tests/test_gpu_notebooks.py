"""Every notebook that uses a device, at toy size on a pretended GPU: what mixes devices fails."""

import os
import subprocess
import sys

import pytest

from src.utils import ROOT

pytestmark = pytest.mark.slow(reason="runs the notebooks of every recipe on a pretended GPU")

FEW = {"num_epochs": 2, "ridge_folds": 2}
SHORT = {"num_inference_steps": 2}
VOTER = {"voters": "a", "rois": "V1,V2,V3,hV4", "bag_seeds": 3, "h": 64}
# recipe -> (notebook, parameters), in the order in which they need each other
WALKS = {
    "mindeye": [
        ("01_train_high_level", FEW | {"batch_size": 25, "precision": "fp16"}),
        ("02_train_autoencoder", FEW | {"batch_size": 25, "ckpt_interval": 1}),
        (
            "03_reconstruct",
            SHORT | {"first_images": 8, "prior": True, "recons_per_sample": 2, "prior_steps": 5},
        ),
        ("05_retrieve", {"plot_umap": False}),
        ("06_metrics", {"shuffles": 1}),
    ],
    "mindeye2_small": [
        (
            "01_train_mindeye2",
            {"num_epochs": 1, "prior_depth": 1, "ridge_folds": 2, "batch_size": 4},
        ),
        ("03_reconstruct", SHORT | {"first_images": 8, "converter_epochs": 1}),
        ("04_refine", SHORT | {"converter_epochs": 1}),
    ],
    "combined": [("01_train_combined", FEW | SHORT | {"batch_size": 25, "n_samples_save": 0})],
    "roi_voting": [
        ("02_train_roi_models", FEW | VOTER),
        ("01_train_high_level", FEW | {"batch_size": 25, "h": 64, "n_blocks": 1}),
        ("03_vote", SHORT | {"untrained": False, "token_map_images": 50}),
    ],
    "basic_ae": [("02_train_basic_autoencoder", {"num_epochs": 1, "ridge_folds": 2})],
    "mindeye_retrieval": [
        ("01_train_high_level", FEW | {"batch_size": 25}),
        ("05_search_index", {}),
    ],
}


def launch(home, notebook, recipe, **parameters):
    """A notebook on the pretended GPU, in a process of its own."""
    flags = [text for name, value in parameters.items() for text in (f"--{name}", str(value))]
    program = ["tests/pretend_gpu.py", f"notebooks/{notebook}.py", "--recipe", f"{recipe}/mini"]
    settings = {k: v for k, v in os.environ.items() if not k.startswith("PERCEPT_")}
    settings |= {"PERCEPT_HOME": str(home), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, *program, *flags],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    small = {"mini_images": 150, "trials_per_session": 60}
    done = launch(folder, "00_prepare_data", "mindeye", **small)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("recipe", WALKS)
def test_a_recipe_mixes_no_devices(recipe, home):
    for notebook, parameters in WALKS[recipe]:
        done = launch(home, notebook, recipe, **parameters)
        assert done.returncode == 0, f"{notebook}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

"""Small helpers: files that are whole or absent, checkpoints that rebuild, errors that say what is
wrong.
"""

import json
import subprocess
import sys

import pytest
import torch

from src import parameters, utils
from src.utils import PerceptError


def test_imports_stay_light():
    """A command line that lists recipes or shows its help must answer at once."""
    code = (
        "import src.utils, src.parameters, sys; heavy = {'torch', 'pandas', 'safetensors'};"
        "assert not heavy & set(sys.modules);"
        "import src.data; assert not {'torch', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=utils.ROOT)


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "a" / "file.txt"
    with utils.atomic(target) as path:
        path.write_text("old")
    with pytest.raises(RuntimeError), utils.atomic(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_checkpoint_round_trip_carries_the_config(tmp_path):
    state, config = (
        {"w": torch.arange(6.0).view(2, 3).T},
        {"model": {"name": "x", "kwargs": {"h": 1}}},
    )
    utils.save_checkpoint(tmp_path / "m.safetensors", state, config)
    loaded, loaded_config = utils.load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(loaded["w"], state["w"]) and loaded_config == config


def test_strict_loading_lists_what_does_not_fit():
    module = torch.nn.Linear(2, 3)
    with pytest.raises(
        PerceptError,
        match=r"elsewhere does not fit Linear: missing \['bias'\], unexpected \['extra'\].*weight",
    ):
        utils.load_strictly(
            module, {"weight": torch.zeros(1, 2), "extra": torch.zeros(1)}, "elsewhere"
        )


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert utils.to_device("auto") == "cuda" and utils.to_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert utils.to_device("auto") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.to_device("auto") == "cpu"


def test_json_is_written_whole(tmp_path):
    utils.write_json(tmp_path / "a.json", {"a": [1, 2]})
    assert utils.read_json(tmp_path / "a.json") == {"a": [1, 2]} and json.loads(
        (tmp_path / "a.json").read_text()
    )


def test_seeding_repeats_torch_and_numpy():
    import numpy as np

    draws = []
    for _ in range(2):
        utils.seed_everything(3)
        draws.append((float(torch.rand(())), float(np.random.rand())))
    assert draws[0] == draws[1]


def test_paths_hang_on_home_then_on_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "HOME", tmp_path)
    assert utils.resolve("/x") == utils.Path("/x")
    assert utils.resolve("data/none") == tmp_path / "data" / "none"
    assert utils.resolve("recipes") == utils.ROOT / "recipes"


def test_a_run_of_another_training_has_another_name():
    plain = {"model_name": "", "subj": 2, "split": "images", "n_components": 0}
    assert (
        parameters.make_run_name("mindeye/mini", plain)
        == parameters.make_run_name("mindeye/mini", {"subj": 2})
        == "mindeye-mini-subj02"
    )
    other = plain | {"split": "cluster-held-out", "n_components": 30}
    assert (
        parameters.make_run_name("mindeye/mini", other)
        == "mindeye-mini-subj02-cluster-held-out-pca30"
    )
    assert (
        parameters.make_run_name("mindeye/mini", other | {"num_sessions": 4})
        == "mindeye-mini-subj02-cluster-held-out-4sessions-pca30"
    )
    assert (
        parameters.make_run_name("mindeye/mini", plain | {"num_sessions": 0})
        == "mindeye-mini-subj02"
    )
    assert parameters.make_run_name("mindeye/mini", other | {"model_name": "mine"}) == "mine"

"""Weights that miniatures share: left out, put back to the byte, and refused when changed."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from src import utils
from src.pretrained.base import MINI_MODELS, locate_model
from src.pretrained.shared_weights import MANIFEST, complete_model, compute_sha256, read_entries
from src.utils import PerceptError
from tools.share_mini_weights import complete_weights, share_weights


@pytest.fixture
def models(tmp_path):
    """Two models that share a large tensor, one of them under another name."""
    large, small = torch.arange(4096.0), torch.ones(3)
    for name, key in (("a", "w"), ("b", "other.w")):
        (tmp_path / "models" / name).mkdir(parents=True)
        tensors = {key: large.clone(), "bias": small.clone(), "own": torch.rand(2000)}
        path = tmp_path / "models" / name / "model.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        (path.parent / "config.json").write_text("{}")
    return tmp_path / "models"


def test_a_file_comes_back_to_the_byte(models, tmp_path):
    files = [models / name / "model.safetensors" for name in "ab"]
    before = [compute_sha256(path) for path in files]
    assert share_weights(models) > 4 * 4000
    assert compute_sha256(files[0]) == before[0] and list(load_file(files[1])) == ["bias", "own"]
    assert complete_model(models / "a", tmp_path / "cache") == models / "a"
    complete = complete_model(models / "b", tmp_path / "cache")
    assert compute_sha256(complete / "model.safetensors") == before[1]
    assert (complete / "config.json").read_text() == "{}"
    assert complete_model(models / "b", tmp_path / "cache") == complete
    complete_weights(models)
    assert [compute_sha256(path) for path in files] == before and not (models / MANIFEST).exists()


def test_sharing_twice_is_sharing_once(models):
    share_weights(models)
    first = (models / MANIFEST).read_text()
    share_weights(models)
    assert (models / MANIFEST).read_text() == first


@pytest.mark.parametrize("change", ["other", "missing"])
def test_shared_weights_that_changed_are_refused(models, tmp_path, change):
    share_weights(models)
    path = models / "a" / "model.safetensors"
    tensors = load_file(path)
    if change == "other":
        save_file(tensors | {"w": tensors["w"] + 1}, path, metadata={"format": "pt"})
    else:
        path.unlink()
    with pytest.raises(PerceptError, match="restore data/mini_models from git"):
        complete_model(models / "b", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_committed_models_hold_shared_weights_once():
    manifest = json.loads((MINI_MODELS / MANIFEST).read_text())
    folders = {name.split("/")[0] for name in manifest}
    assert folders == {"git", "image_variation", "stable_diffusion", "unclip"}
    size = sum(path.stat().st_size for path in MINI_MODELS.rglob("*") if path.is_file())
    assert size < 45e6
    for name in ("clip", "versatile_diffusion"):  # the models of the demo are complete
        assert not read_entries(MINI_MODELS / name)


@pytest.mark.parametrize("name", ["git", "image_variation", "stable_diffusion", "unclip"])
def test_committed_models_are_complete_when_located(name, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "HOME", tmp_path)
    folder = Path(locate_model(name, "mini"))
    for path, entry in read_entries(MINI_MODELS / name).items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == entry["sha256"]


def test_a_copy_has_ordinary_permissions_and_takes_none_of_the_source(models, tmp_path):
    """An installation may be read-only; safetensors writes for the owner alone."""
    share_weights(models)
    (models / "b" / "model.safetensors").chmod(0o400)
    (models / "b").chmod(0o555)
    mask = os.umask(0o022)
    try:
        folder = complete_model(models / "b", tmp_path / "cache")
    finally:
        os.umask(mask)
        (models / "b").chmod(0o755)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]

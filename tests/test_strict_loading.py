"""Frozen models are loaded whole or not at all, and go on computing what they once did."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from src import pretrained, utils
from src.pretrained import clip as clip_module
from src.pretrained.base import load_frozen, locate_model
from src.utils import PerceptError


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder to which miniatures are copied one by one."""
    monkeypatch.setattr(utils, "HOME", tmp_path / "home")

    def copy(name, to=""):
        shutil.copytree(locate_model(name, "mini"), tmp_path / "models" / (to or name))
        (tmp_path / "models" / (to or name) / "golden_features.json").unlink(missing_ok=True)
        return tmp_path / "models"

    return copy


def rewrite(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def drop(ending):
    def change(state):
        for key in [key for key in state if key.endswith(ending)]:
            del state[key]

    return change


def add(state):
    state["vision_model.surprise.weight"] = torch.zeros(2)


LAST = "model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
CASES = [
    ("clip", LAST, drop("vision_model.encoder.layers.1.mlp.fc2.bias"), pretrained.Clipper),
    ("clip", LAST, add, pretrained.Clipper),
    (
        "versatile_diffusion",
        "vae/diffusion_pytorch_model.safetensors",
        drop("decoder.conv_out.bias"),
        pretrained.LatentAutoencoder,
    ),
    (
        "versatile_diffusion",
        "image_unet/diffusion_pytorch_model.safetensors",
        drop("conv_in.bias"),
        pretrained.VersatileDiffusion,
    ),
    ("stable_diffusion", UNET, drop("conv_in.bias"), pretrained.load_stable_diffusion_pipeline),
    (
        "stable_diffusion",
        "text_encoder/model.safetensors",
        drop("final_layer_norm.weight"),
        pretrained.load_stable_diffusion_pipeline,
    ),
    ("git", LAST, drop("git.encoder.layer.0.output.dense.bias"), pretrained.BrainCaptioner),
    ("blip", LAST, drop("vision_model.post_layernorm.bias"), pretrained.Captioner),
    ("unclip", UNET, drop("conv_in.bias"), pretrained.UnclipDecoder),
]


@pytest.mark.parametrize(("name", "file", "change", "cls"), CASES)
def test_a_model_without_a_layer_is_refused(models, name, file, change, cls):
    folder = models(name)
    cls(str(folder))
    rewrite(folder / name / file, change)
    with pytest.raises(PerceptError, match=r"lack|hold what|beside"):
        cls(str(folder))


def test_what_is_wrong_is_named(models):
    folder = models("clip")
    rewrite(folder / "clip" / LAST, drop("vision_model.encoder.layers.1.mlp.fc2.bias"))
    with pytest.raises(PerceptError, match=r"CLIPVision.*lack .*layers.1.mlp.fc2.bias"):
        pretrained.Clipper(str(folder))


def test_what_older_libraries_stored_is_harmless(models):
    folder = models("clip")

    def add_positions(state):
        state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]

    rewrite(folder / "clip" / LAST, add_positions)
    pretrained.Clipper(str(folder)).embed_text(["a red ball"])


@pytest.mark.parametrize("cls", [pretrained.Clipper, pretrained.PatchClip])
def test_laions_config_contradicts_itself(models, cls):
    """Its vision part says projection_dim 512, its top 1280, as the weights are."""
    folder = models("clip", "clip-bigG" if cls is pretrained.PatchClip else "clip")
    name = "clip-bigG" if cls is pretrained.PatchClip else "clip"
    config = json.loads((folder / name / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        config[part]["projection_dim"] = 48
    (folder / name / "config.json").write_text(json.dumps(config))
    variant = "bigG" if cls is pretrained.PatchClip else "ViT-L/14"
    images = torch.rand(2, 3, 32, 32)
    expected = cls("mini").embed_image(images)
    torch.testing.assert_close(cls(str(folder), variant=variant).embed_image(images), expected)
    if cls is pretrained.Clipper:
        texts = ["a red ball"]
        torch.testing.assert_close(
            cls(str(folder)).embed_text(texts), cls("mini").embed_text(texts)
        )


def test_features_are_stored_at_first_use_and_checked_later(models, monkeypatch):
    folder = models("clip")
    clipper = pretrained.Clipper(str(folder))
    golden = clipper.fingerprint()["golden"]
    (stored,) = (utils.HOME / "data" / "golden_features").glob("*.json")
    assert golden in json.loads(stored.read_text()).values()
    assert pretrained.Clipper(str(folder)).fingerprint()["golden"] == golden
    normalise = clip_module.normalise_for_clip
    monkeypatch.setattr(clip_module, "normalise_for_clip", lambda x: 2 * normalise(x))
    with pytest.raises(PerceptError, match=r"Clipper.* no longer gives .*golden_features"):
        pretrained.Clipper(str(folder)).fingerprint()
    pretrained.Clipper(str(folder), hidden=False)


def test_the_text_flow_may_lack_what_is_never_run():
    pretrained.VersatileDiffusionText("mini")


def test_a_class_that_the_library_gave_up_is_named(monkeypatch):
    import sys

    module = "diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PerceptError, match=r"UNetFlatConditionModel.*diffusers 0\.\d+"):
        pretrained.VersatileDiffusionText("mini")


def test_the_teacher_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "HOME", tmp_path)
    with pytest.raises(PerceptError, match="python run.py download teacher"):
        pretrained.Teacher("hub")


def test_the_published_size_of_tokens_names_its_clip():
    assert pretrained.find_patch_variant("bigG", 49, 768) == "ViT-B/32"
    assert pretrained.find_patch_variant("bigG", 0, 0) == "bigG"
    assert pretrained.find_patch_variant("ViT-L/14", 49, 768) == "ViT-L/14"


def test_configs_are_no_networks(models):
    from transformers import CLIPTokenizer

    load_frozen(CLIPTokenizer, str(models("clip") / "clip"))

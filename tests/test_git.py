"""Captions from tokens: GIT's miniature through the library's own classes, the converter from
CLIP's tokens, and notebook 04 on a small run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GitConfig, GitForCausalLM, GitProcessor

from src import figures, pretrained
from src.data.images import write_images
from src.data.subject import open_subject
from src.data.targets import _ids_file, cache_targets
from src.networks.linear import CaptionConverter, RidgeBaseline
from src.networks.released import load_published
from src.pretrained.base import locate_model
from src.pretrained.captioners import BrainCaptioner
from src.pretrained.clip import PatchClip
from src.utils import PerceptError, load_checkpoint, save_checkpoint
from tests.test_captions import as_float, scenes
from tools.mini_models import data
from tools.mini_models import git as git_training
from tools.mini_models.captions import compute_naming_accuracy
from tools.mini_models.degradation import NoisyTokenEstimator

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def captioner():
    return BrainCaptioner("mini")


@pytest.fixture(scope="module")
def samples():
    return scenes(64, "val")


@pytest.fixture(scope="module")
def library():
    """The library's own model and processor, its image encoder in its place."""
    return GitForCausalLM.from_pretrained(
        locate_model("git", "mini")
    ).float().eval(), GitProcessor.from_pretrained(locate_model("git", "mini"))


# ------------------------------------------------------------------------- the same as the library
@pytest.mark.slow(reason="writes captions twice")
def test_captions_are_those_of_the_librarys_own_generate(captioner, library, samples):
    model, processor = library
    pixels = processor(images=list(samples[0]), return_tensors="pt")["pixel_values"]
    reference = processor.batch_decode(
        model.generate(pixel_values=pixels, max_length=pretrained.MAX_LENGTH),
        skip_special_tokens=True,
    )
    images = as_float(samples[0])
    assert captioner.caption(images) == reference and len(set(reference)) > 30
    assert (
        captioner.caption_tokens(captioner.embed_image(images))
        == captioner.caption_tokens(captioner.embed_image(images), batch_size=64)
        == reference
    )
    without_cache = model.generate(
        pixel_values=pixels, max_length=pretrained.MAX_LENGTH, use_cache=False
    )
    assert processor.batch_decode(without_cache, skip_special_tokens=True) == reference, (
        "the tokens of the image are kept from word to word"
    )
    beams = processor.batch_decode(
        model.generate(pixel_values=pixels, max_length=6, num_beams=3), skip_special_tokens=True
    )
    assert captioner.caption(images, max_length=6, num_beams=3) == beams != reference


def test_tokens_are_the_last_hidden_states_of_the_image_encoder(captioner, library, samples):
    model, processor = library
    pixels = processor(images=list(samples[0][:5]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        reference = model.git.image_encoder(pixel_values=pixels).last_hidden_state
    assert reference.shape == (5, *captioner.target_shape) == (5, 17, 128)
    torch.testing.assert_close(
        captioner.embed_image(as_float(samples[0][:5])), reference, rtol=1e-4, atol=1e-4
    )


def test_no_image_is_looked_at_when_tokens_are_given(captioner, samples, monkeypatch):
    tokens = captioner.embed_image(as_float(samples[0][:6]))
    expected = captioner.caption_tokens(tokens)
    monkeypatch.setattr(captioner, "encoder", None)
    assert captioner.caption_tokens(tokens, batch_size=5) == expected
    assert (
        captioner.caption_tokens(torch.zeros_like(tokens))[0] != expected[0]
        and captioner.caption_tokens(tokens.flip(0)) == expected[::-1]
    )


@pytest.mark.parametrize("shape", [(32, 32), (20, 20), (75, 75), (75, 120)])
def test_pixels_are_those_of_the_librarys_processor(captioner, library, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    reference = library[1](images=[image], return_tensors="pt")["pixel_values"]
    result = captioner.preprocess(as_float(image[None]))
    assert result.shape == reference.shape == (1, 3, 32, 32)
    torch.testing.assert_close(
        result, reference, rtol=0, atol=1e-5 if shape == (32, 32) else 0.023
    )  # theirs is rounded to whole values, twice


def test_the_size_of_the_hubs_network():
    """GIT large as the library's classes hold it: 394 million weights, 257 tokens of 1024 from its
    image encoder.
    """
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    with torch.device("meta"):
        model = GitForCausalLM(GitConfig(vision_config=vision))
        tokens = model.git.image_encoder(pixel_values=torch.zeros(1, 3, 224, 224)).last_hidden_state
    assert sum(p.numel() for p in model.parameters()) == 394_196_026
    captioner_shell = BrainCaptioner.__new__(BrainCaptioner)
    captioner_shell.config, captioner_shell.size = model.config, 224
    assert captioner_shell.target_shape == tuple(tokens.shape[1:]) == (257, 1024)
    assert pretrained.HUB["git"] == "microsoft/git-large-coco"


# ----------------------------------------------------------------------------------- what they say
def test_captions_name_what_is_shown(captioner, samples):
    captions = captioner.caption(as_float(samples[0]))
    share = compute_naming_accuracy(captions, samples[1])
    assert share["scene"] > 0.9 and share["kind"] > 0.6 and share["colour"] > 0.85, (
        share
    )  # chance .125, .05, .125
    assert compute_naming_accuracy(captions, np.roll(samples[1], 1, axis=0))["kind"] < 0.3, (
        "of the next image they say little"
    )


def test_vague_tokens_still_give_sentences(captioner, samples):
    sentences, tokens = (
        torch.from_numpy(captioner.encode_pixels(images))
        for images in (scenes(400, "train")[0], samples[0])
    )
    mean = sentences.mean(0)
    half = captioner.caption_tokens(mean + 0.5 * (tokens - mean))
    assert all(
        len(caption.split()) >= 4 and caption.split()[-1] not in ("a", "an", "the", "in", "on")
        for caption in half
    )
    assert compute_naming_accuracy(half, samples[1])["scene"] > 0.7 and "blurry" not in " ".join(
        half
    )


# ------------------------------------------------------------------------------- as a frozen model
def test_hidden_states_can_be_cached_as_targets(captioner, samples, tmp_path):
    write_images(tmp_path / "images.h5", samples[0][:6], np.arange(6))
    targets = cache_targets(
        tmp_path,
        "git_tokens",
        captioner.fingerprint(),
        np.arange(6),
        captioner.encode_pixels,
        captioner.target_shape,
    )
    rows = torch.from_numpy(targets.rows([4, 1]).astype(np.float32))
    torch.testing.assert_close(
        rows, captioner.embed_image(as_float(samples[0][[4, 1]])), rtol=2e-3, atol=2e-3
    )
    assert captioner.caption_tokens(rows) == captioner.caption(as_float(samples[0][[4, 1]]))


def test_the_recorded_features_are_checked(captioner, monkeypatch):
    print_of = captioner.fingerprint()
    assert print_of["model"] == "mini:git" and json.loads(
        (pretrained.MINI_MODELS / "git" / "golden_features.json").read_text()
    )
    assert print_of == BrainCaptioner("mini").fingerprint()
    monkeypatch.setattr(captioner, "preprocess", lambda images: torch.zeros(1, 3, 32, 32))
    with pytest.raises(PerceptError, match="no longer gives the features recorded"):
        captioner.fingerprint()


@pytest.mark.slow(reason="writes captions in half precision, which some processors emulate")
def test_half_precision_writes_nearly_the_same(captioner, samples):
    half = BrainCaptioner("mini", dtype=torch.bfloat16)
    assert half.embed_image(as_float(samples[0][:2])).dtype == torch.bfloat16
    assert (
        np.mean(
            np.array(half.caption(as_float(samples[0])))
            == np.array(captioner.caption(as_float(samples[0])))
        )
        > 0.7
    )


def test_tokens_that_cannot_be_read_are_refused(captioner):
    with pytest.raises(
        PerceptError,
        match=r"writes from tokens \(images, 17, 128\), not \(2, 16, 128\): convert them first",
    ):
        captioner.caption_tokens(torch.zeros(2, 16, 128))
    with pytest.raises(PerceptError, match="not finite"):
        captioner.caption_tokens(torch.full((1, 17, 128), torch.nan))
    with pytest.raises(PerceptError, match="'git' is not at"):
        BrainCaptioner("nowhere")


def test_the_committed_config_names_no_folder_of_another_machine():
    for file in (pretrained.MINI_MODELS / "git").glob("*.json"):
        assert "_name_or_path" not in file.read_text() and "/" not in json.loads(
            file.read_text()
        ).get("_name_or_path", ""), file


# ----------------------------------------------------------------------------------- the converter
def test_the_converter_is_the_published_one(golden):
    with np.load(golden / "mindeye2" / "clip_converter_tiny.npz") as arrays:
        (_, tokens_in, dim_in), (_, tokens_out, dim_out) = arrays["x"].shape, arrays["y"].shape
        converter = CaptionConverter(tokens_in, tokens_out, dim_in, dim_out)
        converter.load_state_dict(
            {
                key.removeprefix("sd/"): torch.from_numpy(arrays[key])
                for key in arrays.files
                if key.startswith("sd/")
            }
        )
        with torch.no_grad():
            torch.testing.assert_close(
                converter(torch.from_numpy(arrays["x"])),
                torch.from_numpy(arrays["y"]),
                rtol=1e-5,
                atol=1e-5,
            )


def test_the_sizes_of_the_released_converters():
    count = lambda *sizes: sum(p.numel() for p in CaptionConverter(*sizes).parameters())  # noqa: E731
    assert count(256, 257, 1664, 1024) == 1_771_009 and count(49, 197, 768, 768) == 600_442


@pytest.mark.parametrize("key", ["model_state_dict", "model", ""])
def test_a_released_converter_is_read_safely_and_strictly(tmp_path, key):
    reference, result = CaptionConverter(5, 6, 8, 7), CaptionConverter(5, 6, 8, 7)
    state = reference.state_dict()
    torch.save(
        {"epoch": 8, key: state, "loss": np.float64(0.5)} if key else state, tmp_path / "epoch8.pth"
    )
    load_published(tmp_path / "epoch8.pth", result)
    assert all(
        torch.equal(a, b) for a, b in zip(result.state_dict().values(), state.values(), strict=True)
    )
    with pytest.raises(PerceptError, match=r"does not fit CaptionConverter.*2 of another shape"):
        load_published(tmp_path / "epoch8.pth", CaptionConverter(5, 9, 8, 7))


# -------------------------------------------------------------------- how the miniature is trained
def test_samples_of_vague_tokens_vary_as_much_as_tokens_and_their_mean_is_the_guess():
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(4000, 3, 4)) @ np.diag([2.0, 1.0, 0.5, 0.1]) + 1).astype(np.float32)
    clean, noise = torch.from_numpy(tokens), torch.full((4000,), 1.0)
    estimate = NoisyTokenEstimator(tokens)
    torch.manual_seed(0)
    guess, sample = estimate(clean, noise), estimate(clean, noise, sample=True)
    variance = clean.var(0)
    torch.testing.assert_close(sample.var(0), variance, rtol=0.15, atol=1e-3)
    assert (guess.var(0) < 0.85 * variance).all()
    error, sample_error = (float((x - clean).square().mean()) for x in (guess, sample))
    # a draw from the posterior is off by twice as much as its mean
    assert sample_error == pytest.approx(2 * error, rel=0.1)


@pytest.mark.slow(reason="executes notebooks")
def test_the_stage_trains_and_is_exported_as_the_library_reads_it(tmp_path, monkeypatch):
    env = os.environ | {"PERCEPT_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/train_mini_models.py", "git"]
    command += ["--minutes", "0.1", "--share", "0.01"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.setattr(data, "WORK", tmp_path / "train_logs" / "mini_models")
    monkeypatch.setattr(data, "OUT", tmp_path / "out")
    row = json.loads((data.WORK / "git.jsonl").read_text().splitlines()[-1])
    assert row["step"] > 0
    for way in git_training.VIEW_SHARES:
        assert {f"{way}_scene", f"{way}_kind", f"{way}_colour"} <= set(row)
    git_training.export_git()
    captioner = BrainCaptioner(str(tmp_path / "out"))
    stored = torch.load(data.WORK / "git.pt", weights_only=True)["average"]
    for key, value in captioner.model.state_dict().items():
        torch.testing.assert_close(value, stored[key], rtol=1e-3, atol=1e-4)
    clip = pretrained.Clipper("mini").model.model.vision_model.state_dict()
    assert all(
        torch.equal(value, clip[key])
        for key, value in captioner.encoder.vision_model.state_dict().items()
    ), "the image encoder stays the mini CLIP's"
    assert captioner.fingerprint()["golden"]
    assert captioner.caption(torch.rand(2, 3, 32, 32), max_length=5)


# --------------------------------------------------------------------------------------- the sheet
def test_sentences_stand_beneath_their_images():
    images = torch.rand(5, 3, 16, 16)
    plain = figures.plot_contact_sheet({"seen": images, "made": images}, n=4)
    captioned = figures.plot_contact_sheet(
        {"seen": images, "made": images},
        n=4,
        captions={"brain": ["a red ball"] * 5, "image": ["a very long sentence " * 4] * 5},
    )
    texts = [text.get_text() for text in captioned.axes[0].texts]
    assert sum(text.startswith("brain: a red ball\nimage: a very long") for text in texts) == 4
    assert (
        captioned.get_size_inches()[0] == plain.get_size_inches()[0]
        and captioned.get_size_inches()[1] > plain.get_size_inches()[1]
    )


# ------------------------------------------------------------------------------------- notebook 04
SMALL = {
    "dataset": "mini",
    "weights": "mini",
    "converter_epochs": 3,
    "converter_max_lr": 1e-2,
    "refine_steps": 4,
    "refine_run": 2,
    "generator_batch": 12,
    "sheet_images": 4,
}


def launch(home, *more, **parameters):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PERCEPT_")} | {
        "PERCEPT_HOME": str(home),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }
    flags = [
        text
        for name, value in (SMALL | {"model_name": "run"} | parameters).items()
        for text in (f"--{name}", str(value))
    ]
    return subprocess.run(
        [sys.executable, "notebooks/04_refine.py", *flags, *more],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_of(home, name, tokens, config, **rows):
    """What notebooks 01 and 03 leave of a run, its decoder a stand-in that is never called."""
    subject = open_subject(home / "data" / "mini", 1)
    ids = subject.image_ids("test")[:24]
    seen = as_float(subject.images(ids))
    rng = np.random.default_rng(0)
    stand_in = RidgeBaseline.fit(
        rng.normal(size=(20, 3)).astype("f"), rng.normal(size=(20, 2)).astype("f"), cv=2, seed=0
    )
    (home / "train_logs" / name / "high_level").mkdir(parents=True)
    save_checkpoint(
        home / "train_logs" / name / "high_level" / "last.safetensors",
        stand_in.state_dict(),
        config | {"model": stand_in.config},
    )
    true = tokens(seen)
    predictions = {
        "seen": seen,
        "network": 0.8 * seen + 0.1,
        "low_level_network": 0.5 * seen + 0.25,
        "ceiling": seen,
        "tokens_network": true,
        "true_tokens": true,
        "projected_network": true,
        "mean_image": seen.mean(0, True).expand_as(seen),
    } | {key: value(true) for key, value in rows.items()}
    stored = {key: value.half().contiguous() for key, value in predictions.items()} | {
        "image_ids": torch.from_numpy(ids.astype(np.int64))
    }
    (home / "results" / name).mkdir(parents=True)
    save_file(
        stored,
        home / "results" / name / "reconstructions.safetensors",
        metadata={"main": "network", "repeats": "3", "protocol": "mini", "test_set": "some"},
    )
    return subject, ids


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    env = os.environ | {"PERCEPT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    prepare = [
        sys.executable,
        "notebooks/00_prepare_data.py",
        "-f",
        "recipes/mindeye/mini/00_prepare_data.yaml",
        "--mini_images",
        "300",
    ]
    done = subprocess.run(prepare, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    clip = PatchClip("mini", "ViT-B/32")
    config = {
        "tokens": list(clip.target_shape),
        "clip": {"patch_tokens": True, "variant": "ViT-B/32", "squeezed": False, "patches": 0},
    }
    subject, ids = run_of(
        home, "run", clip.embed_image, config, backbone_network=lambda true: 2 * true
    )
    before = load_file(home / "results" / "run" / "reconstructions.safetensors")
    done = launch(home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home, subject, ids, before, done.stdout


@pytest.mark.slow(reason="executes notebooks")
def test_the_published_files_have_their_names_shapes_and_types(refined):
    home, _, ids, before, _ = refined
    files = {
        path.name.removeprefix("run_all_").removesuffix(".pt"): path
        for path in (home / "results" / "run").glob("run_all_*.pt")
    }
    assert set(files) == {
        "recons",
        "blurryrecons",
        "enhancedrecons",
        "predcaptions",
        "clipvoxels",
        "backbones",
        "prior_out",
    }
    loaded = {
        name: torch.load(path, weights_only=name != "predcaptions") for name, path in files.items()
    }
    for name in ("recons", "blurryrecons", "enhancedrecons"):
        assert (
            loaded[name].shape == (24, 3, 256, 256)
            and loaded[name].dtype == torch.float32
            and 0 <= loaded[name].min()
            and loaded[name].max() <= 1
        )
    for name in ("clipvoxels", "backbones", "prior_out"):
        assert loaded[name].shape == (24, 16, 128) and loaded[name].dtype == torch.float32
    assert torch.equal(loaded["backbones"], before["backbone_network"].float())
    assert (
        torch.nn.functional.avg_pool2d(loaded["recons"], 8) - before["network"].float()
    ).abs().mean() < 0.02  # the same images, larger
    assert (
        isinstance(loaded["predcaptions"], np.ndarray)
        and loaded["predcaptions"].dtype.kind == "U"
        and loaded["predcaptions"].shape == (24,)
    )
    table = pd.read_parquet(home / "results" / "run" / "captions_brain.parquet")
    assert (
        loaded["predcaptions"].tolist() == table["brain"].tolist()
        and table["image"].tolist() == ids.tolist()
    )


@pytest.mark.slow(reason="executes notebooks")
def test_the_captions_table_holds_what_brain_captioner_and_people_say(refined):
    home, subject, ids, _, _ = refined
    table = pd.read_parquet(home / "results" / "run" / "captions_brain.parquet")
    captioner = BrainCaptioner("mini")
    assert (
        np.mean(
            np.array(captioner.caption(as_float(subject.images(ids))))
            == table["git_image"].to_numpy()
        )
        > 0.9
    )  # its tokens were kept in half precision
    people = subject.captions.groupby("image")["caption"].agg(list)
    assert [json.loads(text) for text in table["references"]] == [people[i] for i in ids] and table[
        "reference"
    ].tolist() == [people[i][0] for i in ids]
    converter = CaptionConverter(16, 17, 128, 128)
    state, config = load_checkpoint(
        home / "train_logs" / "run" / "caption_converter" / "best.safetensors"
    )
    assert config["model"] == converter.config
    converter.load_state_dict(state)
    with torch.no_grad():
        predicted = converter(
            load_file(home / "results" / "run" / "reconstructions.safetensors")[
                "tokens_network"
            ].float()
        )
    assert captioner.caption_tokens(predicted) == table["brain"].tolist()


@pytest.mark.slow(reason="executes notebooks")
def test_rows_join_the_reconstructions_and_nothing_is_lost(refined):
    home, _, _, before, printed = refined
    path = home / "results" / "run" / "reconstructions.safetensors"
    after = load_file(path)
    assert set(after) - set(before) == {"refined", "refined_ceiling"} and all(
        torch.equal(after[key], value) for key, value in before.items()
    )
    assert (
        after["refined"].shape == before["network"].shape
        and after["refined"].dtype == torch.float16
    )
    assert not torch.equal(after["refined"], before["network"])
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    assert (
        about["main"] == "network"
        and json.loads(about["refined"])["run"] == 2
        and about["protocol"] == "mini"
    )
    assert (
        "R2 of the captioner's tokens on" in printed
        and "share of captions that name what is shown" in printed
    )
    assert not (home / "results" / "run" / ".refining").exists()
    with Image.open(home / "results" / "run" / "refined_sheet.png") as sheet:
        assert min(sheet.size) > 200


@pytest.mark.slow(reason="executes notebooks")
def test_only_training_images_teach_the_converter(refined):
    """Where the kept tokens of all other images are wiped out, the same converter is trained."""
    home, subject, _, _, _ = refined
    parts = [
        part
        for name in ("git_tokens", "patch_tokens")
        for part in (home / "data" / "mini" / "targets").glob(f"{name}-*/part-000.npy")
    ]
    before_bytes = {part: part.read_bytes() for part in parts}
    assert len(before_bytes) == 2
    try:
        for part in parts:
            rows, ids = np.load(part), np.load(_ids_file(part))[:, 0]
            test_rows = ~np.isin(ids, subject.image_ids("train"))
            assert 0 < test_rows.sum() < len(test_rows)
            rows[test_rows] = 0
            np.save(part, rows)
        clip = PatchClip("mini", "ViT-B/32")
        run_of(
            home,
            "wiped",
            clip.embed_image,
            load_checkpoint(home / "train_logs" / "run" / "high_level" / "last.safetensors")[1],
        )
        assert launch(home, "--no-refine", model_name="wiped").returncode == 0
    finally:
        for part, content in before_bytes.items():
            part.write_bytes(content)
    result, reference = (
        load_file(home / "train_logs" / name / "caption_converter" / "last.safetensors")
        for name in ("run", "wiped")
    )
    assert all(torch.equal(result[key], reference[key]) for key in result)
    histories = [
        pd.read_csv(home / "train_logs" / name / "caption_converter" / "history.csv")
        for name in ("run", "wiped")
    ]
    assert (histories[0]["val/loss"] != histories[1]["val/loss"]).all(), (
        "validation did look at other images"
    )


@pytest.mark.slow(reason="executes notebooks")
def test_again_without_captions_and_with_a_released_converter(refined):
    home, _, _, _, _ = refined
    path = home / "results" / "run" / "captions_brain.parquet"
    first = pd.read_parquet(path)
    done = launch(home, "--no-caption", "--no-refine_ceiling", refine_run=1)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(pd.read_parquet(path), first)
    state = load_checkpoint(home / "train_logs" / "run" / "caption_converter" / "best.safetensors")[
        0
    ]
    torch.save({"epoch": 8, "model_state_dict": state}, home / "epoch8.pth")
    done = launch(home, "--no-refine", caption_converter=home / "epoch8.pth")
    assert done.returncode == 0 and "training caption_converter" not in done.stderr, done.stderr
    pd.testing.assert_frame_equal(pd.read_parquet(path), first)
    path.unlink()
    refused = launch(home, "--no-caption")
    assert (
        refused.returncode
        and "without captions nothing can be refined" in refused.stderr.splitlines()[-1]
    )
    torch.save(CaptionConverter(49, 197, 768, 768).state_dict(), home / "other.pth")
    refused = launch(home, caption_converter=home / "other.pth")
    assert refused.returncode and "does not fit CaptionConverter" in refused.stderr.splitlines()[-1]


@pytest.mark.slow(reason="executes notebooks")
def test_a_run_of_versatile_diffusions_tokens_and_one_whose_tokens_are_others(refined):
    home = refined[0]
    clip = pretrained.Clipper("mini")
    run_of(
        home,
        "versatile",
        clip.embed_image,
        {"tokens": list(clip.target_shape), "clip": {"hidden": True, "norm_embs": True}},
    )
    done = launch(home, "--no-refine", model_name="versatile")
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(home / "results" / "versatile" / "captions_brain.parquet")) == 24
    run_of(
        home,
        "wrong",
        lambda seen: clip.embed_image(seen.flip(-1)),
        {"tokens": list(clip.target_shape), "clip": {"hidden": True, "norm_embs": True}},
    )
    refused = launch(home, model_name="wrong")
    assert (
        refused.returncode
        and "are not those that Clipper gives for the seen images"
        in refused.stderr.splitlines()[-1]
    )

"""The tool that trains the mini models.

Stages resume, two processes stay together, every image set has images of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from src import miniworld, pretrained
from src.pretrained import metric_networks
from src.pretrained.unclip import UnclipDecoder
from tools.mini_models import blip, data, degradation, flows, unclip
from tools.mini_models import metric_networks as metric_training
from tools.mini_models.captions import NAMING_CAPTIONS, find_named_attributes
from tools.mini_models.training import load_averaged

pytestmark = pytest.mark.slow(reason="trains miniatures in processes of their own")

ROOT = Path(__file__).resolve().parents[1]


def launch(home, stage, minutes, *extra_flags):
    env = os.environ | {"PERCEPT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    flags = [stage, "--minutes", str(minutes), "--share", "0.01", *extra_flags]
    command = [sys.executable, "tools/train_mini_models.py", *flags]
    options = {"capture_output": True, "text": True, "timeout": 900}
    done = subprocess.run(command, cwd=ROOT, env=env, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    log = home / "train_logs" / "mini_models" / f"{stage}.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Exports go to a folder of their own, and are read from where `launch` trains."""
    monkeypatch.setattr(data, "WORK", tmp_path / "train_logs" / "mini_models")
    monkeypatch.setattr(data, "OUT", tmp_path / "out")
    data.WORK.mkdir(parents=True, exist_ok=True)
    return data.OUT


def test_a_stage_goes_on_where_it_stopped_and_logs_its_quality(tmp_path):
    first = launch(tmp_path, "judge", 0.1)
    second = launch(tmp_path, "judge", 0.2)
    assert second[0] == first[0]
    assert second[1]["step"] > first[0]["step"] > 0
    assert second[1]["minutes"] > first[0]["minutes"]
    assert {"scene", "kind", "colour", "loss"} <= set(second[1])
    stored = torch.load(tmp_path / "train_logs/mini_models/judge.pt", weights_only=True)
    assert stored["step"] == second[1]["step"]


def test_two_processes_stop_at_the_same_step(tmp_path):
    rows = launch(tmp_path, "vae", 0.15, "--processes", "2")
    assert rows[-1]["step"] > 1 and rows[-1]["psnr"] > 5


def test_the_twin_that_learns_without_labels_is_probed_beside_random_weights(tmp_path):
    row = launch(tmp_path, "swav_resnet50", 0.1)[-1]
    assert row["step"] > 0
    for question in ("scene", "kind", "colour"):
        assert {question, f"random_{question}"} <= set(row)


def test_exported_twins_are_those_that_were_trained(out, monkeypatch):
    trained = {}
    for name in metric_training.METRIC_NETWORKS:
        trained[name] = metric_training.MetricNetworkTrainer(name)
        torch.save({"average": trained[name].state_dict()}, data.WORK / f"{name}.pt")
    metric_training.export_metric_networks()
    monkeypatch.setattr(metric_networks, "MINI_METRIC_NETWORKS", out / "metric_networks")
    assert {path.name for path in out.iterdir()} == {"metric_networks"}
    x = torch.rand(2, 3, 32, 32)
    for name in ("AlexNet(5)", "InceptionV3", "EffNet-B1", "SwAV"):
        twin = trained[metric_networks.METRIC_NETWORKS[name].architecture].eval()
        exported = metric_networks.FeatureNetwork(name, weights="mini")
        features = torch.from_numpy(exported(x))
        if name == "AlexNet(5)":  # whose trained head reads on from there
            layer = twin.body.features[12]
            maps = layer(features.unflatten(1, (64, 7, 7)))
            features = twin.body.avgpool(maps).flatten(1)
        expected = twin.compute_features(x).detach()
        tolerance = 0.02 * float(features.std())
        torch.testing.assert_close(features, expected, rtol=0.02, atol=tolerance)


def test_the_captioner_trains_and_is_exported_as_the_libraries_read_it(tmp_path, out):
    row = launch(tmp_path, "blip", 0.1)[-1]
    assert row["step"] > 0 and "says" in row
    for question in ("scene", "kind", "colour"):
        assert {question, f"degraded_{question}"} <= set(row)
    blip.export_blip()
    captioner = pretrained.Captioner(str(out))
    stored = torch.load(data.WORK / "blip.pt", weights_only=True)["average"]
    for key, value in captioner.model.state_dict().items():
        torch.testing.assert_close(value, stored[key], rtol=1e-3, atol=1e-4)
    assert captioner.fingerprint()["golden"]
    assert captioner.caption(torch.rand(2, 3, 32, 32), max_length=5)
    shipped = pretrained.Captioner("mini").processor.tokenizer
    assert len(captioner.processor.tokenizer) == len(shipped)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a striped red ball next to a blue car on a sandy beach", ("beach", "ball", "red")),
        ("room scene with an orange cup at night", ("room", "cup", "orange")),
        ("a picture of a thing", ("", "", "")),
    ],
)
def test_what_a_caption_names(caption, named):
    assert find_named_attributes(caption) == named


def test_every_caption_that_teaches_names_kind_colour_and_scene():
    for split, count in (("train", 300), ("test", 100)):
        for i in range(count):
            content = miniworld.compose_image(1, i, split)
            main, captions = content.objects[-1], miniworld.write_captions(content)
            expected = (
                miniworld.SCENES[content.scene],
                list(miniworld.CATEGORIES)[main.category],
                list(miniworld.COLOURS)[main.colour],
            )
            assert all(find_named_attributes(captions[k]) == expected for k in NAMING_CAPTIONS)


def test_vague_and_washed_out_pictures_keep_something(out, monkeypatch):
    monkeypatch.setitem(data.IMAGE_SETS, "train", [(data.SEED, "train", 200)])
    clear = data.to_pixels(data.load_images("train"))
    vague = data.to_pixels(degradation.load_degraded_images("train", 200))
    for images in (vague, degradation.wash_out(clear)):
        assert images.shape == clear.shape
        assert 0 <= float(images.min()) and float(images.max()) <= 1
        deviations = [(x - x.mean(0)).flatten() for x in (images, clear)]
        assert 0.5 < torch.corrcoef(torch.stack(deviations))[0, 1] < 0.97
    stored = np.load(data.WORK / "degraded_train.npy")
    assert np.array_equal(degradation.load_degraded_images("train", 200), stored)


def test_committed_twins_have_the_settings_of_the_tool():
    for name, config in metric_training.METRIC_NETWORKS.items():
        path = metric_networks.MINI_METRIC_NETWORKS / name / "config.json"
        assert json.loads(path.read_text()) == config


def find_combination_splits(name):
    """Splits to which the combinations of object, colour and scene of some images belong."""
    splits = set()
    for seed, split, count in data.IMAGE_SETS[name]:
        for i in range(min(count, 400)):
            content = miniworld.compose_image(seed, i, split)
            main = content.objects[-1]
            splits.add(miniworld.assign_split(main.category, main.colour, content.scene))
    return splits


def test_no_model_but_those_that_judge_sees_a_held_out_combination_and_no_image_is_shared():
    assert find_combination_splits("train") == {"train"}
    assert find_combination_splits("check") == {"val"}
    assert find_combination_splits("judge") == {"train", "val", "test"}
    (laion,), (training,) = data.IMAGE_SETS["laion"], data.IMAGE_SETS["train"]
    assert (laion.seed, laion.split) == (training.seed, training.split)
    assert laion.count < training.count  # a part of the others' training images
    sources = []
    for name in set(data.IMAGE_SETS) - {"laion"}:
        sources += [(seed, split) for seed, split, _ in data.IMAGE_SETS[name]]
    assert len(set(sources)) == len(sources)
    assert not {seed for seed, _ in sources} & {0, 42}


def test_vague_tokens_are_the_best_linear_guess():
    rng = np.random.default_rng(0)
    scales = np.diag([2.0, 1.0, 0.5, 0.1])
    tokens = (rng.normal(size=(4000, 3, 4)) @ scales + 1).astype(np.float32)
    estimate, clean = degradation.NoisyTokenEstimator(tokens), torch.from_numpy(tokens)
    errors = []
    for noise in (1e-6, 0.1, 1.0, 100.0):
        estimated = estimate(clean, torch.full((4000,), noise))
        errors.append(float(((estimated - clean) ** 2).mean()))
    assert errors[0] < 1e-4 and errors == sorted(errors)
    variance = clean.flatten(1).var(0)
    wiener = float((variance / (variance + 1)).mean())  # the error of a Wiener filter
    assert errors[2] == pytest.approx(wiener, rel=0.1)
    assert errors[3] < float(variance.mean())  # never worse than the mean image


def test_folding_the_scale_gives_the_same_network():
    torch.manual_seed(0)
    unet = flows.build_unet().eval()
    latents, condition = torch.randn(2, 4, 16, 16), torch.randn(2, 17, data.DIM)
    with torch.no_grad():
        expected = unet(latents, 500, encoder_hidden_states=3 * condition).sample
        folded = flows.fold_scale(unet, 3.0)
        predicted = folded(latents, 500, encoder_hidden_states=condition).sample
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)


def test_the_unclip_stage_begins_as_the_image_flow(out, monkeypatch):
    """On patch tokens it predicts about what the image flow predicts on its own.

    The vector says nothing yet.
    """
    monkeypatch.setitem(data.IMAGE_SETS, "check", [(data.SEED, "val", 64)])
    latents, tokens = unclip.load_patch_tokens("check")
    assert tokens.shape == (64, 16, data.DIM)
    assert 0.8 < latents.astype(np.float32).std() < 1.2
    unet, factor = unclip.build_unclip().eval(), 0.9
    unclip.begin_as_image_flow(unet, factor)
    image_flow = pretrained.VersatileDiffusion("mini").unet
    x = torch.from_numpy(latents[:16]).float()
    c = factor * torch.from_numpy(tokens[:16]).float()
    images = data.to_pixels(data.load_images("check")[:16])
    normed = pretrained.Clipper("mini").embed_image(images)[:, 1:]
    vector = torch.randn(16, unclip.VECTOR_SIZE)
    with torch.no_grad():
        predicted = unet(x, 600, encoder_hidden_states=c, class_labels=vector).sample
        expected, mismatched = (
            image_flow(x, 600, encoder_hidden_states=conditions).sample
            for conditions in (normed, normed.flip(0))
        )
    error = float((predicted - expected).square().mean())
    assert error < 0.1 * float((mismatched - expected).square().mean())


def test_unclip_trains_and_is_exported_as_its_decoder_reads_it(tmp_path, out):
    row = launch(tmp_path, "unclip", 0.1, "--batch", "4")[-1]
    assert row["step"] > 0
    assert {"held_out", "scene", "kind", "colour"} <= set(row)
    assert {"from_vague_tokens", "from_sampled_tokens"} <= set(row)
    unclip.export_unclip()
    decoder = UnclipDecoder(str(out))
    trained = load_averaged("unclip", unclip.build_unclip())
    factor = flows.compute_condition_scale(unclip.load_patch_tokens("train")[1])
    x, c = torch.randn(2, 4, 16, 16), torch.randn(2, 16, data.DIM)
    vector = torch.randn(2, unclip.VECTOR_SIZE)
    with torch.no_grad():
        expected = trained(x, 400, encoder_hidden_states=factor * c, class_labels=vector).sample
        predicted = decoder.unet(x, 400, encoder_hidden_states=c, class_labels=vector).sample
    torch.testing.assert_close(predicted, expected, rtol=0.02, atol=0.02)
    assert decoder.fingerprint()["golden"]
    assert decoder.scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(decoder.vector, unclip.build_unclip_vector())

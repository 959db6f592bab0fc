"""The tool that trains the mini models: stages resume, two processes stay together, every image set
is its own.
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
from src.pretrained import metric_networks as networks
from src.pretrained import unclip
from tools import train_mini_models as tool

ROOT = Path(__file__).resolve().parents[1]


def launch(home, stage, minutes, *more):
    env = os.environ | {"PERCEPT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    flags = [stage, "--minutes", str(minutes), "--share", "0.01", *more]
    done = subprocess.run(
        [sys.executable, "tools/train_mini_models.py", *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [
        json.loads(line)
        for line in (
            (home / "train_logs" / "mini_models" / f"{stage}.jsonl").read_text().splitlines()
        )
    ]


def test_a_stage_goes_on_where_it_stopped_and_logs_its_quality(tmp_path):
    first = launch(tmp_path, "judge", 0.1)
    second = launch(tmp_path, "judge", 0.2)
    assert (
        second[0] == first[0]
        and second[1]["step"] > first[0]["step"] > 0
        and second[1]["minutes"] > first[0]["minutes"]
    )
    assert {"scene", "kind", "colour", "loss"} <= set(second[1])
    stored = torch.load(tmp_path / "train_logs/mini_models/judge.pt", weights_only=True)
    assert stored["step"] == second[1]["step"]


def test_two_processes_stop_at_the_same_step(tmp_path):
    rows = launch(tmp_path, "vae", 0.15, "--processes", "2")
    assert rows[-1]["step"] > 1 and rows[-1]["psnr"] > 5


def test_the_twin_that_learns_without_labels_is_probed_beside_random_weights(tmp_path):
    row = launch(tmp_path, "swav_resnet50", 0.1)[-1]
    assert row["step"] > 0 and {
        "scene",
        "kind",
        "colour",
        "random_scene",
        "random_kind",
        "random_colour",
    } <= set(row)


def test_exported_twins_are_those_that_were_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "WORK", tmp_path)
    monkeypatch.setattr(tool, "OUT", tmp_path / "out")
    trained = {name: tool.Twin(name) for name in tool.METRIC_NETWORKS}
    for name, twin in trained.items():
        torch.save({"average": twin.state_dict()}, tmp_path / f"{name}.pt")
    tool.export_metric_networks()
    monkeypatch.setattr(networks, "MINI", tmp_path / "out" / "metric_networks")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metric_networks"}
    x = torch.rand(2, 3, 32, 32)
    for name in ("AlexNet(5)", "InceptionV3", "EffNet-B1", "SwAV"):
        twin, made = (
            trained[networks.NETWORKS[name].architecture].eval(),
            networks.FeatureNetwork(name, weights="mini"),
        )
        features = torch.from_numpy(made(x))
        if name == "AlexNet(5)":  # whose trained head reads on from there
            features = twin.body.avgpool(
                twin.body.features[12](features.unflatten(1, (64, 7, 7)))
            ).flatten(1)
        torch.testing.assert_close(
            features, twin.features(x).detach(), rtol=0.02, atol=0.02 * float(features.std())
        )


def test_the_captioner_trains_and_is_exported_as_the_libraries_read_it(tmp_path, monkeypatch):
    row = launch(tmp_path, "blip", 0.1)[-1]
    assert row["step"] > 0 and {
        "scene",
        "kind",
        "colour",
        "degraded_scene",
        "degraded_kind",
        "degraded_colour",
        "says",
    } <= set(row)
    monkeypatch.setattr(tool, "WORK", tmp_path / "train_logs" / "mini_models")
    monkeypatch.setattr(tool, "OUT", tmp_path / "out")
    tool.export_blip()
    made, stored = (
        pretrained.Captioner(str(tmp_path / "out")),
        torch.load(tool.WORK / "blip.pt", weights_only=True)["average"],
    )
    for key, value in made.model.state_dict().items():
        torch.testing.assert_close(value, stored[key], rtol=1e-3, atol=1e-4)
    assert made.fingerprint()["golden"] and made.caption(torch.rand(2, 3, 32, 32), max_length=5)
    assert len(made.processor.tokenizer) == len(pretrained.Captioner("mini").processor.tokenizer)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a striped red ball next to a blue car on a sandy beach", ("beach", "ball", "red")),
        ("room scene with an orange cup at night", ("room", "cup", "orange")),
        ("a picture of a thing", ("", "", "")),
    ],
)
def test_what_a_caption_names(caption, named):
    assert tool.named_in(caption) == named


def test_every_caption_that_teaches_names_kind_colour_and_scene():
    for split, count in (("train", 300), ("test", 100)):
        for what in (miniworld.compose(1, i, split) for i in range(count)):
            main, five = what.things[-1], miniworld.caption(what)
            right = (
                miniworld.SCENES[what.scene],
                list(miniworld.KINDS)[main.kind],
                list(miniworld.COLOURS)[main.colour],
            )
            assert all(tool.named_in(five[k]) == right for k in tool.NAMING)


def test_vague_and_washed_out_pictures_keep_something(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "WORK", tmp_path)
    monkeypatch.setitem(tool.DRAWN, "train", [(tool.SEED, "train", 200)])
    clear = tool.pixels(tool.images("train"))
    for made in (tool.pixels(tool.degraded("train", 200)), tool.washed_out(clear)):
        assert made.shape == clear.shape and 0 <= float(made.min()) and float(made.max()) <= 1
        kept = torch.corrcoef(
            torch.stack([(made - made.mean(0)).flatten(), (clear - clear.mean(0)).flatten()])
        )[0, 1]
        assert 0.5 < kept < 0.97
    assert np.array_equal(tool.degraded("train", 200), np.load(tmp_path / "degraded_train.npy"))


def test_committed_twins_have_the_settings_of_the_tool():
    for name, config in tool.METRIC_NETWORKS.items():
        assert json.loads((networks.MINI / name / "config.json").read_text()) == config


def test_no_model_but_those_that_judge_sees_a_held_out_combination_and_no_image_is_shared():
    def combinations(name):
        what = [
            miniworld.compose(seed, i, split)
            for seed, split, count in tool.DRAWN[name]
            for i in range(min(count, 400))
        ]
        return {
            miniworld.combination_split(w.things[-1].kind, w.things[-1].colour, w.scene)
            for w in what
        }

    assert (
        combinations("train") == {"train"}
        and combinations("check") == {"val"}
        and combinations("judge") == {"train", "val", "test"}
    )
    ((seed, split, some),), ((of_seed, of_split, all_of_them),) = (
        tool.DRAWN["laion"],
        tool.DRAWN["train"],
    )
    assert (seed, split) == (
        of_seed,
        of_split,
    ) and some < all_of_them  # a part of the others' training images
    sources = [
        (seed, split)
        for name in tool.DRAWN
        if name != "laion"
        for seed, split, _ in tool.DRAWN[name]
    ]
    assert len(set(sources)) == len(sources) and not {seed for seed, _ in sources} & {0, 42}


def test_vague_tokens_are_the_best_linear_guess():
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(4000, 3, 4)) @ np.diag([2.0, 1.0, 0.5, 0.1]) + 1).astype(np.float32)
    vague, clean = tool.Vagueness(tokens), torch.from_numpy(tokens)
    error = [
        float(((vague(clean, torch.full((4000,), noise)) - clean) ** 2).mean())
        for noise in (1e-6, 0.1, 1.0, 100.0)
    ]
    assert error[0] < 1e-4 and error == sorted(error)
    variance = clean.flatten(1).var(0)
    assert error[2] == pytest.approx(
        float((variance / (variance + 1)).mean()), rel=0.1
    )  # the error of a Wiener filter
    assert error[3] < float(variance.mean())  # never worse than the mean image


def test_folding_the_scale_gives_the_same_network():
    torch.manual_seed(0)
    unet = tool.new_unet().eval()
    latents, condition = torch.randn(2, 4, 16, 16), torch.randn(2, 17, tool.DIM)
    with torch.no_grad():
        scaled = unet(latents, 500, encoder_hidden_states=3 * condition).sample
        torch.testing.assert_close(
            tool.fold_scale(unet, 3.0)(latents, 500, encoder_hidden_states=condition).sample,
            scaled,
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_unclip_stage_begins_as_the_image_flow(tmp_path, monkeypatch):
    """On patch tokens it predicts about what the image flow predicts on its own; the vector says
    nothing yet.
    """
    monkeypatch.setattr(tool, "WORK", tmp_path)
    monkeypatch.setitem(tool.DRAWN, "check", [(tool.SEED, "val", 64)])
    latents, tokens = tool.patch_tokens("check")
    assert tokens.shape == (64, 16, tool.DIM) and 0.8 < latents.astype(np.float32).std() < 1.2
    unet, donor, factor = tool.new_unclip().eval(), pretrained.VersatileDiffusion("mini").unet, 0.9
    tool.begin_as_image_flow(unet, factor)
    x, c = torch.from_numpy(latents[:16]).float(), factor * torch.from_numpy(tokens[:16]).float()
    images = (
        torch.from_numpy(np.ascontiguousarray(tool.images("check")[:16]))
        .permute(0, 3, 1, 2)
        .float()
        / 255
    )
    normed = pretrained.Clipper("mini").embed_image(images)[:, 1:]
    with torch.no_grad():
        made = unet(
            x, 600, encoder_hidden_states=c, class_labels=torch.randn(16, tool.UNCLIP_VECTOR)
        ).sample
        expected, wrong = (
            donor(x, 600, encoder_hidden_states=tokens).sample
            for tokens in (normed, normed.flip(0))
        )
    assert float((made - expected).square().mean()) < 0.1 * float(
        (wrong - expected).square().mean()
    )


def test_unclip_trains_and_is_exported_as_its_decoder_reads_it(tmp_path, monkeypatch):
    row = launch(tmp_path, "unclip", 0.1, "--batch", "4")[-1]
    assert row["step"] > 0 and {
        "held_out",
        "scene",
        "kind",
        "colour",
        "from_vague_tokens",
        "from_sampled_tokens",
    } <= set(row)
    monkeypatch.setattr(tool, "WORK", tmp_path / "train_logs" / "mini_models")
    monkeypatch.setattr(tool, "OUT", tmp_path / "out")
    tool.export_unclip()
    decoder, trained = (
        unclip.UnclipDecoder(str(tmp_path / "out")),
        tool.averaged("unclip", tool.new_unclip()),
    )
    factor = tool.condition_scale(tool.patch_tokens("train")[1])
    x, c, vector = (
        torch.randn(2, 4, 16, 16),
        torch.randn(2, 16, tool.DIM),
        torch.randn(2, tool.UNCLIP_VECTOR),
    )
    with torch.no_grad():
        expected = trained(x, 400, encoder_hidden_states=factor * c, class_labels=vector).sample
        torch.testing.assert_close(
            decoder.unet(x, 400, encoder_hidden_states=c, class_labels=vector).sample,
            expected,
            rtol=0.02,
            atol=0.02,
        )
    assert (
        decoder.fingerprint()["golden"]
        and decoder.scheduler.config.prediction_type == "v_prediction"
    )
    assert torch.equal(decoder.vector, tool.unclip_vector())

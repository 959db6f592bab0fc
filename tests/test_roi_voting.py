"""The ROI project from nothing to a scored vote, small: notebooks 00, 01, 02_train_roi_models,
03_vote and 06 on the mini world.
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
from safetensors.torch import load_file

from src.data.normaliser import Normaliser
from src.data.subject import open_subject
from src.decoding.checkpoints import load_decoder
from src.pretrained.clip import Clipper

pytestmark = pytest.mark.slow(reason="runs the notebooks of ROI voting")

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "mini_images": 300,
    "num_epochs": 1,
    "voters": "a,b",
    "rois": "V1,V2,V3,hV4; !V1,!V2",
    "bag_seeds": "3,4",
    "batch_sizes": "25",
    "h": 128,
    "block_out_channels": "32,32,32",
    "image_to": 24,
    "num_inference_steps": 4,
    "token_map_images": 100,
    "sheets": 2,
    "shuffles": 1,
    "metrics": "pixcorr,CLIP-cosine",
}


def launch(home: Path, *command: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PERCEPT_")} | {
        "PERCEPT_HOME": str(home),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    done = launch(
        home,
        "run.py",
        "roi_voting",
        "--mini",
        *(part for name, value in SMALL.items() for part in ("-p", name, str(value))),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return home


def test_each_voter_keeps_its_voxels_its_images_and_its_seed(voted):
    logs, subject = (
        voted / "train_logs" / "roi_voting-mini-subj01",
        open_subject(voted / "data" / "mini", 1),
    )
    seen = {}
    for name, rois, seed in (("a", "V1,V2,V3,hV4", 3), ("b", "!V1,!V2", 4)):
        folder = logs / name
        decoder, config = load_decoder(folder / "low_level" / "best.safetensors")
        recorded, normaliser = (
            json.loads((folder / "voter.json").read_text()),
            Normaliser.load(folder / "normaliser.safetensors"),
        )
        member = (
            subject.voxels[["V1", "V2", "V3", "hV4"]].any(axis=1)
            if name == "a"
            else ~subject.voxels[["V1", "V2"]].any(axis=1)
        )
        np.testing.assert_array_equal(normaliser.columns, np.flatnonzero(member))
        assert (
            config["training"]["rois"] == rois == recorded["rois"]
            and config["training"]["bag_seed"] == seed == recorded["bag_seed"]
        )
        assert decoder.lin0[0].in_features == member.sum() == recorded["inputs"]
        split = pd.read_parquet(folder / "split.parquet").set_index("image")["split"]
        draws = set(split.index[split == "train"])
        assert (
            draws == set(subject.bootstrap_split(0.7, seed).image_ids("train"))
            and len(draws) == 210
        )
        assert set(split.index[split == "val"]) == set(subject.image_ids("train")) - draws
        assert set(split.index[split == "test"]) == set(subject.image_ids("test")) and set(
            split.index[split == "exclude"]
        ) == set(subject.image_ids("val"))
        seen[name] = draws
    assert seen["a"] != seen["b"]
    table = pd.read_csv(voted / "results" / "roi_voting-mini-subj01" / "voters.csv")
    assert (
        {"its own images", "not drawn", "seen by none", "mean latent"} <= set(table)
        and len(table) == 4
        and np.isfinite(table.select_dtypes("number")).all().all()
    )


def test_every_row_is_there_and_the_vote_is_one_of_the_candidates(voted):
    results = voted / "results" / "roi_voting-mini-subj01"
    outputs = load_file(results / "reconstructions.safetensors")
    rules = {"vote_published", "vote_medoid", "vote_agreement", "oracle"}
    expected = rules | {
        "voter_a",
        "voter_b",
        "latent_mean",
        "brain_caption",
        "ridge",
        "untrained",
        "ceiling",
        "nearest_train",
        "mean_image",
        "low_level_mean",
        "seen",
    }
    assert expected <= set(outputs) and outputs["voter_a"].shape == (24, 3, 32, 32)
    candidates = torch.stack([outputs["voter_a"], outputs["voter_b"]], 1)
    for rule in rules:
        assert (outputs[rule][:, None] == candidates).flatten(2).all(-1).any(1).all(), rule
    clip = Clipper("mini", hidden=False, norm_embs=True)
    look = lambda x: clip.embed_image(x.float()).flatten(1)  # noqa: E731
    similarities = torch.stack(
        [torch.cosine_similarity(look(c), look(outputs["seen"])) for c in candidates.unbind(1)], 1
    )
    best = candidates[torch.arange(24), similarities.argmax(1)]
    assert (best == outputs["oracle"]).flatten(1).all(
        1
    ).float().mean() > 0.9  # stored pictures are in half precision: near ties may turn
    captions = pd.read_parquet(results / "captions.parquet")
    assert (
        set(captions["row"]) >= {"voter_a", "voter_b", "latent_mean", "brain_caption", "ceiling"}
        and (captions["caption"].str.split().str.len() >= 3).all()
    )
    sheet = np.asarray(Image.open(results / "sheets" / "result_1.png"))
    assert (
        sheet.shape == (168, 4 * 148 + 80, 3) and len(list((results / "sheets").glob("*.png"))) == 2
    )


def test_the_report_says_what_the_vote_is_worth(voted):
    results = voted / "results" / "roi_voting-mini-subj01"
    stored = json.loads((results / "metrics.json").read_text())
    records = {record["name"]: record for record in stored["metrics"]}
    assert {"pixcorr", "mini:CLIP-cosine", "mini:judge:kind"} <= set(records)
    other_conditions = records["pixcorr"]["others"]
    assert {
        "voter_a",
        "voter_b",
        "latent_mean",
        "oracle",
        "vote_medoid",
        "vote_agreement",
        "ridge",
        "brain_caption",
    } <= set(other_conditions)
    assert any(
        "voters" in entry["what"] and entry["split"].startswith("none")
        for entry in stored["provenance"]["selection"]
    )
    scores = pd.read_parquet(results / "scores.parquet")
    cosine = (
        scores[(scores["metric"] == "mini:CLIP-cosine") & (scores["draw"] == 0)]
        .groupby("row")["value"]
        .mean()
    )
    assert (
        cosine["oracle"] >= max(cosine[["system", "voter_a", "voter_b", "vote_medoid"]]) - 1e-6
    )  # nothing that chooses can be better
    page = (results / "report.html").read_text()
    assert (
        "What the vote is worth" in page
        and "oracle (ceiling)" in page
        and "better than its average voter in" in page
    )


def test_voters_of_another_run_without_captions(voted):
    flags = [
        "-f",
        "recipes/roi_voting/mini/03_vote.yaml",
        "--model_name",
        "low",
        "--voters",
        "roi_voting-mini-subj01/b",
        "--strength",
        "0",
    ]
    flags += ["--image_from", "4", "--image_to", "10"]
    done = launch(voted, "notebooks/03_vote.py", *flags, "--no-untrained")
    assert done.returncode == 0, done.stderr
    path = voted / "results" / "low" / "reconstructions.safetensors"
    outputs, before = (
        load_file(path),
        load_file(voted / "results" / "roi_voting-mini-subj01" / "reconstructions.safetensors"),
    )
    assert outputs["image_ids"].tolist() == before["image_ids"].tolist()[4:10]
    with safe_open(path, framework="pt") as file:
        assert (
            file.metadata()["test_set"].endswith("-4to10")
            and file.metadata()["voters"] == "voter_roi_voting-mini-subj01-b"
        )
    torch.testing.assert_close(outputs["vote_published"], outputs["voter_roi_voting-mini-subj01-b"])
    torch.testing.assert_close(
        outputs["ceiling"].float(), outputs["seen"].float(), atol=0.25, rtol=0
    )  # only the autoencoder's round trip
    refused = launch(voted, "notebooks/03_vote.py", *flags, "--vote", "agreement")
    assert refused.returncode != 0 and "There is no high level in" in refused.stderr

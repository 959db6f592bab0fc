"""Notebook 05_search_index for real: a brain that nearly tells the true embedding, a pool that
holds the test images, and servers.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from servers import serving
from test_remote import Quiet

from src.data.images import write_images
from src.data.layout import write_image_table, write_subject
from src.data.subject import open_subject
from src.miniworld.cortex import simulate
from src.pretrained.clip import Clipper
from src.search import LocalIndex, load_local_images
from src.utils import save_checkpoint

pytestmark = pytest.mark.slow(reason="runs notebooks on an index that it builds")

ROOT = Path(__file__).resolve().parents[1]
N_TEST, POOL = 24, 260


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small dataset and what notebook 03 would leave of two runs: of one embedding, and of all
    tokens.
    """
    home = tmp_path_factory.mktemp("home")
    experiment, folder = simulate(1, 40, 8, N_TEST), home / "data" / "small"
    about = {
        "source": "mini world (simulated)",
        "units": "percent signal change",
        "normalisation": "none",
        "protocol": "mini",
    }
    write_subject(
        folder / "subj01",
        experiment.scan.betas,
        experiment.scan.trials,
        experiment.scan.voxels,
        about,
    )
    write_images(folder / "images.h5", experiment.images, experiment.image_ids)
    write_image_table(folder / "labels.parquet", experiment.labels)
    subject = open_subject(folder, 1)
    ids, rng = subject.image_ids("test"), np.random.default_rng(0)
    pixels = subject.images(ids)
    seen = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    for name, encoder in {
        "one": Clipper("mini", hidden=False, norm_embs=False),
        "tokens": Clipper("mini"),
    }.items():
        true = torch.from_numpy(encoder.encode_pixels(pixels)).view(N_TEST, -1, encoder.dim)
        brain = true + 0.2 * true.std() * torch.from_numpy(rng.standard_normal(true.shape)).float()
        rows = {
            "seen": seen,
            "network": seen.flip(0),
            "projected_network": brain,
            "tokens_network": brain.clone(),
            "true_tokens": true,
        }
        rows["image_ids"] = torch.from_numpy(ids)
        (home / "results" / name).mkdir(parents=True)
        about = {
            "main": "network",
            "protocol": "mini",
            "test_set": subject.test_set,
            "repeats": "3",
        }
        save_file(
            {k: v.contiguous() for k, v in rows.items()},
            home / "results" / name / "reconstructions.safetensors",
            metadata=about,
        )
        config = {"tokens": list(true.shape[1:]), "model": {}} | (
            {} if name == "tokens" else {"clip": {"hidden": False, "norm_embs": False}}
        )
        (home / "train_logs" / name / "high_level").mkdir(parents=True)
        save_checkpoint(
            home / "train_logs" / name / "high_level" / "last.safetensors",
            {"w": torch.zeros(1)},
            config,
        )
    return SimpleNamespace(home=home, ids=ids, seen=seen)


def search(world, *flags):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PERCEPT_")} | {
        "PERCEPT_HOME": str(world.home),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }
    common = [
        "--model_name",
        "one",
        "--dataset",
        "small",
        "--weights",
        "mini",
        "--k",
        "4",
        "--picture_size",
        "32",
    ]
    return subprocess.run(
        [sys.executable, "notebooks/05_search_index.py", *common, *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def outcome(world):
    results = world.home / "results" / "one"
    tensors, found_rows = (
        load_file(results / "reconstructions.safetensors"),
        pd.read_parquet(results / "found.parquet"),
    )
    content = json.loads((results / "metrics.json").read_text())
    return (
        tensors,
        found_rows,
        {r["name"]: r for r in content["metrics"]},
        {t["title"]: t for t in content["tables"]},
    )


def pooled(world):
    return ("--index", "data/indices/small", "--pool", "mini", "--pool_images", str(POOL))


def test_the_test_images_are_left_out_and_everything_is_written(world):
    done = search(world, *pooled(world))
    assert done.returncode == 0, done.stdout + done.stderr
    tensors, found_rows, records, tables = outcome(world)
    assert f"In the pool are {N_TEST} of {N_TEST} test pictures" in done.stdout
    assert "Exact image in pool: no." in done.stdout
    assert (
        tensors["retrieved"].shape
        == tensors["retrieved_ceiling"].shape
        == (
            N_TEST,
            3,
            32,
            32,
        )
    )
    assert {
        "seen",
        "network",
    } <= set(tensors)
    for name in (
        "retrieved",
        "retrieved_ceiling",
    ):  # no picture is one of the test set, which are the first of the pool
        assert (tensors[name].float()[:, None] - world.seen[None]).abs().amax((2, 3, 4)).min() > 0.1
    assert found_rows["row"].min() >= N_TEST
    assert len(found_rows) == 2 * 4 * N_TEST
    assert found_rows.groupby(["search", "image"])["chosen"].sum().eq(1).all()
    brain = (
        found_rows[found_rows["search"] == "retrieved"].groupby("image")["similarity"].apply(list)
    )
    assert all(values == sorted(values, reverse=True) for values in brain)
    assert found_rows["caption"].str.len().gt(0).all()
    assert (
        records["pool_top1"]["value"]
        > 0.8
        > 0.2
        > records["pool_top1"]["floors"]["shuffled"]["value"]
    )
    assert records["pool_top1"]["exact_in_pool"] == "yes"
    assert tables["Retrieved pictures"]["rows"][0]["exact image in pool"] == "no"
    assert tables["Retrieved pictures"]["rows"][0]["test pictures left out"] == N_TEST
    assert torch.load(
        world.home / "results/one/one_laion_retrievals_top16.pt", weights_only=True
    ).shape == (N_TEST, 3, 32, 32)
    assert (world.home / "results/one/figures/found.png").exists()
    assert not (world.home / "results/one/.searching").exists()


def test_asked_for_they_are_found_and_all_tokens_choose(world):
    done = search(world, *pooled(world), "--keep_test_images", "--token_run", "tokens")
    assert done.returncode == 0, done.stdout + done.stderr
    tensors, found_rows, records, tables = outcome(world)
    assert "embedding: 0" in done.stderr
    assert "Exact image in pool: yes" in done.stdout  # nothing was new in the pool
    assert (
        (tensors["retrieved"].float() - world.seen).abs().amax((1, 2, 3)) < 1e-3
    ).float().mean() > 0.9
    torch.testing.assert_close(tensors["retrieved_ceiling"].float(), world.seen, atol=1e-3, rtol=0)
    assert tables["Retrieved pictures"]["rows"][0]["exact image in pool"] == "yes"
    assert "tokens of tokens" in tables["Retrieved pictures"]["rows"][0]["chosen by"]


def test_a_run_of_many_tokens_cannot_ask(world):
    done = search(world, *pooled(world), "--model_name", "tokens")
    assert done.returncode
    assert "(17, 128) tokens an image, and an index is searched by one embedding" in done.stderr


class Server(Quiet):
    """A clip-retrieval server of the index that was built above, and a host of its pictures, of
    which every third is gone.
    """

    index: LocalIndex

    def do_POST(self):
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        result = self.index.search(
            np.array([fields["embedding_input"]]), min(fields["num_images"], 60)
        )
        lines = [
            {
                "id": int(row),
                "similarity": float(s),
                "url": f"http://127.0.0.1:{self.server.server_address[1]}/{row}.png",
            }
            for s, row in zip(result.similarity[0], result.row[0], strict=True)
        ]
        self.send(200, json.dumps(lines).encode(), Content_Type="application/json")

    def do_GET(self):
        row, content = int(self.path[1:].split(".")[0]), io.BytesIO()
        if row % 3 == 0:
            return self.send(404)
        Image.fromarray(load_local_images(self.index.get_metadata([row]), 32)[0][0]).save(
            content, "png"
        )
        self.send(200, content.getvalue(), Content_Type="image/png")


def test_a_server_is_asked_and_dead_urls_are_passed_over(world):
    assert (world.home / "data/indices/small").exists(), "the tests above build the index"
    with serving(Server, index=LocalIndex(world.home / "data/indices/small")) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/knn-service"
        refused = search(world, "--url", url, "--candidates", "8", "--server_timeout", "60")
        assert "without a picture" in refused.stdout
        # pictures on this machine are not fetched unless asked for
        assert f"'retrieved': {N_TEST}" in refused.stdout
        done = search(
            world,
            "--url",
            url,
            "--candidates",
            "20",
            "--private_pictures",
            "--server_timeout",
            "60",
            "--picture_timeout",
            "60",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        tensors, found_rows, _, tables = outcome(world)
        assert (found_rows["row"] % 3 > 0).all()
        assert len(found_rows) == 2 * 4 * N_TEST
        assert found_rows["url"].str.startswith("http").all()
        assert found_rows["row"].min() >= N_TEST
        chosen_rows = (
            found_rows[found_rows["chosen"] & (found_rows["search"] == "retrieved")]
            .set_index("image")
            .loc[world.ids, "row"]
        )
        pixels, _ = load_local_images(
            LocalIndex(world.home / "data/indices/small").get_metadata(chosen_rows), 32
        )
        torch.testing.assert_close(
            tensors["retrieved"].float(),
            torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255,
            atol=2e-3,
            rtol=0,
        )


def test_a_server_that_is_down_is_one_sentence(world):
    done = search(world, "--url", "http://127.0.0.1:9/knn-service")
    assert done.returncode
    assert done.stderr.strip().splitlines()[-1].count("http://127.0.0.1:9/knn-service") == 1
    assert "December 2023" in done.stderr

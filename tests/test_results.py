"""Statistics against what they promise, tables and records with their controls, and the alarms."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_metrics import embed, make_images

from src import metrics
from src.evaluation import records as recording
from src.evaluation import sanity_checks as sanity
from src.evaluation import statistics
from src.evaluation.images import (
    compute_mean_image,
    find_most_similar,
    hash_pixels,
    load_image_pairs,
    load_images,
)
from src.evaluation.records import make_records, score_table
from src.evaluation.statistics import bootstrap_mean
from src.metrics import METRICS, two_way_metric
from src.utils import PerceptError


@pytest.fixture(scope="module")
def table():
    images, recons = make_images(8)
    rows = {
        "system": recons,
        "mean_image": images.mean(0, keepdim=True).expand(8, -1, -1, -1),
        "nearest_train": make_images(8, seed=5)[0],
        "ceiling": images,
        "ridge": recons.roll(1, 0),
    }
    chosen = [METRICS["pixcorr"], METRICS["mse"], two_way_metric("two_way_pixels", embed)]
    return score_table(images, rows, chosen, draws=4), chosen


def records_of(table):
    return make_records(*table, protocol="test", test_set="8-abc")


# -------------------------------------------------------------------------------------- statistics
def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.value == pytest.approx(half, rel=0.1)
    assert interval.value - interval.low == pytest.approx(half, rel=0.1)
    assert bootstrap_mean(values) == interval != bootstrap_mean(values, seed=1)
    with pytest.raises(PerceptError, match="NaN"):
        bootstrap_mean([1.0, np.nan])


def test_paired_bootstrap_sees_what_unpaired_would_not():
    rng = np.random.default_rng(1)
    images = rng.normal(0, 10, 100)
    better = statistics.paired_bootstrap(images + 0.5 + rng.normal(0, 1, 100), images)
    assert better.low > 0 and better.p < 0.01 and better.value == pytest.approx(0.5, abs=0.3)
    same = statistics.paired_bootstrap(images, images)
    assert same == (0, 0, 0, 1)


def test_permutation_p_is_uniform_without_an_effect_and_small_with_one():
    rng = np.random.default_rng(2)
    null = []
    for _ in range(200):
        scores = rng.normal(size=(30, 5))
        null.append(statistics.permutation_p(scores[:, 0], scores[:, 1:], n_permutations=199))
    assert 0.4 < np.mean(null) < 0.6 and 0.01 < np.mean(np.array(null) <= 0.1) < 0.2
    others = rng.normal(size=(30, 4))
    assert statistics.permutation_p(others[:, 0] + 2, others, "higher") == pytest.approx(1 / 2001)
    assert statistics.permutation_p(others[:, 0] + 2, others, "lower") == 1
    assert statistics.permutation_p(others[:, 0] - 2, others, "lower") == pytest.approx(1 / 2001)


def test_derangements_leave_nothing_in_place():
    orders = list(statistics.derangements(5, 50, seed=1))
    assert len(orders) == 50 and all(
        sorted(o) == list(range(5)) and (o != np.arange(5)).all() for o in orders
    )
    assert len({tuple(o) for o in orders}) > 10


# ------------------------------------------------------------------------------------------ tables
def test_score_table_holds_every_row_and_image(table):
    scores, chosen = table
    assert set(scores["row"]) == {
        "system",
        "shuffled",
        "mean_image",
        "nearest_train",
        "ceiling",
        "ridge",
    }
    assert len(scores) == len(chosen) * 8 * (5 + 4)  # five rows with one draw, one with four
    images, recons = make_images(8)
    mine = scores.query("metric == 'pixcorr' and row == 'system'").sort_values("image")
    np.testing.assert_allclose(mine["value"], metrics.pixcorr(images, recons))
    ceiling = scores.query("row == 'ceiling' and metric == 'mse'")["value"]
    assert (ceiling == 0).all()


def test_shuffled_rows_are_the_same_reconstructions_against_other_images(table):
    scores, _ = table
    images, recons = make_images(8)
    order = next(statistics.derangements(8, 1, seed=0))
    drawn = scores.query("metric == 'mse' and row == 'shuffled' and draw == 0").set_index("image")[
        "value"
    ]
    expected = ((recons - images[order]) ** 2).flatten(1).mean(1).numpy()
    np.testing.assert_allclose(drawn.to_numpy(), expected, rtol=1e-5)
    names = [metric.name for metric in table[1] if metric.better == "higher"]
    shuffled = scores.query("metric == 'two_way_pixels' and row == 'shuffled'")["value"]
    assert names and abs(shuffled.mean() - 0.5) < 0.2


def test_the_true_images_are_prepared_once():
    calls = []

    def counted(images):
        calls.append(len(images))
        return images.flatten(1)

    images, recons = make_images(5)
    both = [two_way_metric("two_way", counted), metrics.cosine_metric("cosine", counted)]
    score_table(images, {"system": recons, "mean_image": recons, "ceiling": images}, both, draws=3)
    assert (
        len(calls) == 4
    )  # true images, system, shuffled, control and ceiling would be six and more


def test_records_carry_floors_ceiling_and_p(table):
    record = records_of(table)[0]
    assert (
        record["name"] == "pixcorr"
        and record["n"] == 8
        and record["protocol"] == "test"
        and record["test_set"] == "8-abc"
    )
    assert set(record["floors"]) == {"shuffled", "mean_image", "nearest_train"}
    assert record["low"] <= record["value"] <= record["high"] <= record["ceiling"]["value"] + 1e-9
    assert set(record["others"]) == {"ridge"} and record["others"]["ridge"]["difference"]["low"] > 0
    assert record["p_shuffled"] < 0.01 and record["floors"]["shuffled"]["value"] < record["low"]
    scores, chosen = table
    without = scores[scores["row"] != "ceiling"]
    with pytest.raises(PerceptError, match="no ceiling row"):
        make_records(without, chosen, protocol="test", test_set="8-abc")
    records = make_records(
        without,
        chosen,
        protocol="test",
        test_set="8-abc",
        no_upper_bound="retrieval has no generator",
    )
    assert records[0]["ceiling"] == {"not_applicable": "retrieval has no generator"}


def added(folder, table, stage="06_metrics", test_set="8-abc", **more):
    origin = recording.provenance(
        "mini", {"training": 42}, [{"what": f"epoch of {stage}", "split": "val"}], subject=1
    )
    records = [record | {"test_set": test_set} for record in records_of(table)]
    recording.add_results(folder, stage, table[0], records, origin, **more)


def test_results_are_plain_json_and_a_tidy_table(table, tmp_path):
    added(tmp_path, table, tables=[{"title": "More", "note": "", "rows": [{"a": 1}]}])
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert [r["name"] for r in content["metrics"]] == ["pixcorr", "mse", "two_way_pixels"]
    assert (
        content["provenance"]["versions"]["scikit-image"] and content["provenance"]["subject"] == 1
    )
    assert content["tables"] == [
        {"title": "More", "note": "", "rows": [{"a": 1}], "stage": "06_metrics"}
    ]
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    assert (
        list(scores.columns) == recording.COLUMNS
        and len(scores) == len(table[0])
        and set(scores["stage"]) == {"06_metrics"}
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "scores.parquet"]


def test_each_stage_replaces_its_own_results_only(table, tmp_path):
    retrieval = (table[0][table[0]["metric"] == "mse"], table[1])
    added(tmp_path, table, "06_metrics", tables=[{"title": "six", "note": "", "rows": []}])
    for _ in range(2):
        added(tmp_path, table, "05_retrieve", tables=[{"title": "five", "note": "", "rows": []}])
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert [r["stage"] for r in content["metrics"]] == ["05_retrieve"] * 3 + ["06_metrics"] * 3
    assert [t["title"] for t in content["tables"]] == ["five", "six"]
    assert [c["what"] for c in content["provenance"]["selection"]] == [
        "epoch of 05_retrieve",
        "epoch of 06_metrics",
    ]
    assert content["provenance"]["seeds"] == {
        "06_metrics: training": 42,
        "05_retrieve: training": 42,
    }
    assert (
        len(pd.read_parquet(tmp_path / "scores.parquet")) == 2 * len(table[0]) > len(retrieval[0])
    )


def test_scores_of_two_test_sets_are_not_mixed(table, tmp_path):
    added(tmp_path, table, "05_retrieve")
    before = (tmp_path / "metrics.json").read_bytes(), (tmp_path / "scores.parquet").read_bytes()
    with pytest.raises(PerceptError, match="8-abc, these are on 8-other"):
        added(tmp_path, table, "06_metrics", test_set="8-other")
    assert before == (
        (tmp_path / "metrics.json").read_bytes(),
        (tmp_path / "scores.parquet").read_bytes(),
    )
    added(
        tmp_path, table, "05_retrieve", test_set="8-other"
    )  # the only stage there: it replaces itself
    assert sanity.check_same_test({"a": "8-abc", "b": "8-abc"}) == []
    assert (
        "8-abc: a; 8-other: b, c"
        in sanity.check_same_test({"a": "8-abc", "b": "8-other", "c": "8-other"})[0]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"floors": {}}, "has no floor"),
        ({"floors": {"shuffled": {"value": None}}}, "has no floor"),
        ({"ceiling": None}, "has no ceiling"),
        ({"ceiling": {"not_applicable": ""}}, "has no ceiling"),
        ({"protocol": ""}, "lacks protocol"),
        ({"value": float("nan")}, "not finite"),
    ],
)
def test_a_score_without_its_controls_is_refused(table, tmp_path, change, words):
    bad = records_of(table)[0] | change
    with pytest.raises(PerceptError, match=words):
        recording.write_metrics(
            tmp_path / "metrics.json", [bad], recording.provenance("mini", {}, [])
        )
    assert not list(tmp_path.iterdir())


def test_a_table_without_provenance_is_refused(table, tmp_path):
    with pytest.raises(PerceptError, match="lacks seeds, selection"):
        recording.write_metrics(tmp_path / "metrics.json", records_of(table), {"recipe": "mini"})


# ------------------------------------------------------------------------------------------ alarms
def test_good_outputs_raise_no_alarm():
    assert sanity.check_outputs(make_images(6)[1]) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x.index_fill(0, torch.tensor([2]), float("nan")), "1 of 6 .* NaN .*2"),
        (lambda x: x.index_fill(0, torch.tensor([0, 1]), 0.0), "2 of 6 .* black"),
        (lambda x: x.index_fill(0, torch.tensor([4]), 0.6), "1 of 6 .* flat"),
        (
            lambda x: torch.cat(
                [x[:5], torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1).expand_as(x[:1])]
            ),
            "1 of 6 .* flat",
        ),
        (lambda x: x * 2 - 1, "leave the range"),
        (lambda x: x[:1].repeat(6, 1, 1, 1) + 0.0, "nearly alike"),
    ],
)
def test_degenerate_outputs_raise_an_alarm(spoil, words):
    alarms = sanity.check_outputs(spoil(make_images(6)[0]))
    assert len(alarms) == 1 and re.search(words, alarms[0])


def test_misaligned_rows_raise_an_alarm():
    images, recons = make_images(40)
    order = next(statistics.derangements(40, 1))
    metric = two_way_metric("two_way", embed)
    good, ceiling = metric.score(images, recons), metric.score(images, images)
    assert sanity.check_alignment(good, metrics.pixcorr(images, recons)) == []
    assert sanity.check_alignment(good, metrics.pixcorr(images, recons), oracle=ceiling) == []
    shuffled = recons[order]
    scores = metric.score(images, shuffled), metrics.pixcorr(images, shuffled)
    assert "misaligned" in sanity.check_alignment(*scores)[0]
    assert (
        "while true latents reach 100.0%: your rows are probably misaligned"
        in sanity.check_alignment(*scores, oracle=ceiling)[0]
    )
    broken = sanity.check_alignment(*scores, oracle=metric.score(images, shuffled))
    assert len(broken) == 1 and "generator" in broken[0] and "misaligned" not in broken[0]


def test_test_images_among_the_training_images_raise_an_alarm():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
    test, train = pixels[:5], pixels[5:]
    assert sanity.check_leak(test, train) == []
    mixed = np.concatenate([train, test[[3, 1]]])
    assert (
        "2 of 5 test images are also training images (first: 1, 3)"
        in sanity.check_leak(test, mixed)[0]
    )
    assert sanity.check_leak(test, iter(np.array_split(mixed, 3))) == sanity.check_leak(test, mixed)


# ----------------------------------------------------------------------------------- noise ceiling
def test_noise_ceiling_is_what_a_perfect_decoder_reaches():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(60, 4000))
    repeats = truth[None] + 2 * rng.normal(
        size=(3, 60, 4000)
    )  # what an unbiased decoder makes of three repeats
    pairs = [metrics.pcc(repeats[a], repeats[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    ceiling = statistics.noise_ceiling(np.mean(pairs, 0), 3)
    reached = metrics.pcc(truth, repeats.mean(0)).mean()
    assert ceiling.low - 0.01 < reached < ceiling.high + 0.01 and ceiling.value == pytest.approx(
        np.sqrt(1 / (1 + 4 / 3)), abs=0.01
    )
    assert statistics.noise_ceiling(np.full(5, -0.1), 3).value == 0


# ------------------------------------------------------------------------------- --anyone's images
def test_images_of_every_format_are_read_alike(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), np.uint8)
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    torch.save(floats, tmp_path / "a.pt")
    torch.save({"images": floats}, tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", pixels)
    np.save(tmp_path / "d.npy", floats.numpy())
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(
            tmp_path / "folder" / f"recon_{i}.png"
        )  # 10 comes after 9, not after 1
    for name in ("a.pt", "b.pt", "c.npz", "d.npy", "folder"):
        found = load_images(tmp_path / name)
        assert torch.allclose(
            found / 255 if found.dtype == torch.uint8 else found, floats, atol=1e-6
        ), name
        assert torch.allclose(
            compute_mean_image(found), floats.mean(0).expand_as(floats), atol=1e-6
        )
        assert hash_pixels(found) == hash_pixels(floats)
    assert hash_pixels(floats) != hash_pixels(floats.flip(0)) and hash_pixels(floats).startswith(
        "12-pixels-"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.pt", None, "no images at"),
        ("bad.pt", b"nothing", "cannot be read"),
        ("notes.txt", b"text", "cannot be read as images"),
        ("two.npz", {"a": np.zeros(3), "b": np.zeros(3)}, "2 entries"),
        ("flat.npz", {"a": np.zeros((4, 5))}, "shape .4, 5."),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, name, content, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        np.savez(tmp_path / name, **content)
    with pytest.raises(PerceptError, match=words) as error:
        load_images(tmp_path / name)
    assert name in str(error.value)


def test_a_pickled_file_runs_no_code(tmp_path):
    torch.save({"recons": print}, tmp_path / "evil.pt")
    with pytest.raises(PerceptError, match="no Python objects"):
        load_images(tmp_path / "evil.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PerceptError, match="no PNG or JPEG files"):
        load_images(tmp_path / "empty")


def save_folder(folder, names, size=6):
    """A folder of images whose grey level tells the place in `names`."""
    folder.mkdir()
    for place, name in enumerate(names):
        Image.fromarray(np.full((size, size), 20 * place, np.uint8)).save(folder / name)
    return folder


def test_folders_are_paired_by_the_names_of_their_files(tmp_path):
    names = [f"{place}.png" for place in range(11)]
    seen = save_folder(tmp_path / "seen", names)
    (seen / "._0.png").write_bytes(b"\x00\x05\x16\x07")  # as a Mac leaves them
    shuffled = np.random.default_rng(0).permutation(11)
    padded = [f"recon_{place:03d}.png" for place in range(11)]
    same = save_folder(tmp_path / "same", names, 9)
    numbered = save_folder(tmp_path / "numbered", padded)
    for other in (same, numbered):
        pairs = load_image_pairs(seen, other)
        assert pairs.seen.shape == (11, 3, 6, 6) and len(pairs.recons) == 11
        assert (pairs.seen[:, 0, 0, 0] == pairs.recons[:, 0, 0, 0]).all()
    lettered = save_folder(tmp_path / "lettered", [f"{chr(97 + place)}.png" for place in shuffled])
    with pytest.raises(PerceptError, match="do not pair by their names: .*0.png has no other side"):
        load_image_pairs(seen, lettered)
    (same / "7.png").rename(same / "12.png")
    with pytest.raises(PerceptError, match="do not pair by their names: .*7.png"):
        load_image_pairs(seen, same)


def test_a_folder_beside_an_array_must_be_numbered(tmp_path):
    np.save(tmp_path / "all.npy", np.zeros((3, 6, 6, 3), np.uint8))
    numbered = save_folder(tmp_path / "numbered", ["recon_1.png", "recon_2.png", "recon_3.png"])
    assert len(load_image_pairs(tmp_path / "all.npy", numbered).recons) == 3
    gap = save_folder(tmp_path / "gap", ["4.png", "5.png", "7.png"])
    with pytest.raises(PerceptError, match="not numbered from 0 or 1 without a gap"):
        load_image_pairs(tmp_path / "all.npy", gap)
    with pytest.raises(PerceptError, match="holds 3 seen images and .* 2 reconstructions"):
        (numbered / "recon_3.png").unlink()
        load_image_pairs(tmp_path / "all.npy", numbered)


def test_images_of_a_folder_that_cannot_be_read_are_counted(tmp_path):
    folder = save_folder(tmp_path / "pictures", ["0.png", "1.png", "2.png", "3.png"])
    for name in ("1.png", "3.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(PerceptError, match="2 of 4 images in .*pictures cannot be read: .*1.png"):
        load_images(folder)
    (folder / "2.jpg").write_bytes((folder / "2.png").read_bytes())
    with pytest.raises(PerceptError, match="holds 2 in several formats"):
        load_images(folder)
    np.save(tmp_path / "wide.npy", np.zeros((3, 6, 6, 3), np.uint16))
    with pytest.raises(PerceptError, match="wide.npy holds uint16 numbers"):
        load_images(tmp_path / "wide.npy")


def test_most_alike_is_never_oneself():
    images, _ = make_images(10)
    twins = torch.cat([images, (images * 0.97 + 0.01)])
    assert find_most_similar(twins).tolist() == [*range(10, 20), *range(10)]

"""Statistics against what they promise, tables and records with their controls, and the alarms."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from test_metrics import embed, pictures

from src import metrics, results
from src.metrics import METRICS, two_way_metric
from src.results import bootstrap_mean, make_records, score_table
from src.utils import PerceptError


@pytest.fixture(scope="module")
def table():
    images, recons = pictures(8)
    controls = {
        "mean_image": images.mean(0, keepdim=True).expand(8, -1, -1, -1),
        "nearest_train": pictures(8, seed=5)[0],
    }
    chosen = [METRICS["pixcorr"], METRICS["mse"], two_way_metric("two_way_pixels", embed)]
    return score_table(images, recons, controls, images, chosen, draws=4), chosen


def records_of(table):
    return make_records(*table, protocol="test", test_set="8-abc")


# ------------------------------------------------------------------------------------------------ statistics
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
    better = results.paired_bootstrap(images + 0.5 + rng.normal(0, 1, 100), images)
    assert better.low > 0 and better.p < 0.01 and better.value == pytest.approx(0.5, abs=0.3)
    same = results.paired_bootstrap(images, images)
    assert same == (0, 0, 0, 1)


def test_permutation_p_is_uniform_without_an_effect_and_small_with_one():
    rng = np.random.default_rng(2)
    null = []
    for _ in range(200):
        scores = rng.normal(size=(30, 5))
        null.append(results.permutation_p(scores[:, 0], scores[:, 1:], n_permutations=199))
    assert 0.4 < np.mean(null) < 0.6 and 0.01 < np.mean(np.array(null) <= 0.1) < 0.2
    others = rng.normal(size=(30, 4))
    assert results.permutation_p(others[:, 0] + 2, others, "higher") == pytest.approx(1 / 2001)
    assert results.permutation_p(others[:, 0] + 2, others, "lower") == 1
    assert results.permutation_p(others[:, 0] - 2, others, "lower") == pytest.approx(1 / 2001)


def test_derangements_leave_nothing_in_place():
    orders = list(results.derangements(5, 50, seed=1))
    assert len(orders) == 50 and all(
        sorted(o) == list(range(5)) and (o != np.arange(5)).all() for o in orders
    )
    assert len({tuple(o) for o in orders}) > 10


# ------------------------------------------------------------------------------------------------ tables
def test_score_table_holds_every_row_and_image(table):
    scores, chosen = table
    assert set(scores["row"]) == {"system", "shuffled", "mean_image", "nearest_train", "ceiling"}
    assert len(scores) == len(chosen) * 8 * (4 + 4)  # four rows with one draw, one with four
    images, recons = pictures(8)
    mine = scores.query("metric == 'pixcorr' and row == 'system'").sort_values("image")
    np.testing.assert_allclose(mine["value"], metrics.pixcorr(images, recons))
    ceiling = scores.query("row == 'ceiling' and metric == 'mse'")["value"]
    assert (ceiling == 0).all()


def test_shuffled_rows_are_the_same_reconstructions_against_other_images(table):
    scores, _ = table
    images, recons = pictures(8)
    order = next(results.derangements(8, 1, seed=0))
    drawn = scores.query("metric == 'mse' and row == 'shuffled' and draw == 0").set_index("image")["value"]
    expected = ((recons[order] - images) ** 2).flatten(1).mean(1).numpy()
    np.testing.assert_allclose(drawn.loc[order].to_numpy(), expected, rtol=1e-5)


def test_the_true_images_are_prepared_once():
    calls = []

    def counted(images):
        calls.append(len(images))
        return images.flatten(1)

    images, recons = pictures(5)
    both = [two_way_metric("two_way", counted), metrics.cosine_metric("cosine", counted)]
    score_table(images, recons, {"mean_image": recons}, images, both, draws=3)
    assert len(calls) == 4  # true images, system, shuffled, control and ceiling would be six and more


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
    assert record["p_shuffled"] < 0.01 and record["floors"]["shuffled"]["value"] < record["low"]
    scores, chosen = table
    without = scores[scores["row"] != "ceiling"]
    with pytest.raises(PerceptError, match="no ceiling row"):
        make_records(without, chosen, protocol="test", test_set="8-abc")
    records = make_records(
        without, chosen, protocol="test", test_set="8-abc", no_ceiling="retrieval has no generator"
    )
    assert records[0]["ceiling"] == {"not_applicable": "retrieval has no generator"}


def test_metrics_file_is_plain_json(table, tmp_path):
    origin = results.provenance("mini", {"training": 42}, [{"what": "epoch", "split": "val"}], subject=1)
    results.write_metrics(tmp_path / "metrics.json", records_of(table), origin)
    results.write_scores(tmp_path / "scores.parquet", table[0])
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert [r["name"] for r in content["metrics"]] == ["pixcorr", "mse", "two_way_pixels"]
    assert content["provenance"]["versions"]["scikit-image"] and content["provenance"]["subject"] == 1
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "scores.parquet"), table[0], check_dtype=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "scores.parquet"]


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
        results.write_metrics(tmp_path / "metrics.json", [bad], results.provenance("mini", {}, []))
    assert not list(tmp_path.iterdir())


def test_a_table_without_provenance_is_refused(table, tmp_path):
    with pytest.raises(PerceptError, match="lacks seeds, selection"):
        results.write_metrics(tmp_path / "metrics.json", records_of(table), {"recipe": "mini"})


# ------------------------------------------------------------------------------------------------ alarms
def test_good_outputs_raise_no_alarm():
    assert results.check_outputs(pictures(6)[1]) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x.index_fill(0, torch.tensor([2]), float("nan")), "1 of 6 .* NaN .*2"),
        (lambda x: x.index_fill(0, torch.tensor([0, 1]), 0.0), "2 of 6 .* black"),
        (lambda x: x.index_fill(0, torch.tensor([4]), 0.6), "1 of 6 .* flat"),
        (lambda x: x * 2 - 1, "leave the range"),
        (lambda x: x[:1].repeat(6, 1, 1, 1) + 0.0, "nearly alike"),
    ],
)
def test_degenerate_outputs_raise_an_alarm(spoil, words):
    alarms = results.check_outputs(spoil(pictures(6)[0]))
    assert len(alarms) == 1 and re.search(words, alarms[0])


def test_misaligned_rows_raise_an_alarm():
    images, recons = pictures(40)
    order = next(results.derangements(40, 1))
    metric = two_way_metric("two_way", embed)
    assert results.check_alignment(metric.each(images, recons), metrics.pixcorr(images, recons)) == []
    shuffled = recons[order]
    alarms = results.check_alignment(metric.each(images, shuffled), metrics.pixcorr(images, shuffled))
    assert len(alarms) == 1 and "misaligned" in alarms[0]

"""Metrics against the formulas of the published evaluation, statistics against what they promise, and the
refusals.
"""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.io import loadmat
from scipy.spatial.distance import correlation
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torchvision.transforms.functional import resize as torchvision_resize

from src import metrics
from src.metrics import METRICS, answer_metrics, bootstrap_mean, make_records, score_table, two_way_each, two_way_metric
from src.utils import PerceptError


def pictures(n=6, side=24, seed=0):
    """Smooth random images (n, 3, side, side) in [0, 1], and noisy versions of them."""
    generator = torch.Generator().manual_seed(seed)
    images = metrics.resize(torch.rand(n, 3, 5, 5, generator=generator), side)
    return images, (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def embed(images):
    return images.flatten(1)[:, ::5]


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


# ------------------------------------------------------------------------------------------------ two-way
@pytest.mark.parametrize("n", [2, 7, 300])
def test_two_way_is_the_published_formula(n):
    rng = np.random.default_rng(n)
    real = rng.normal(size=(n, 11))
    recon = real + 2 * rng.normal(size=(n, 11))
    r = np.corrcoef(real, recon)[:n, n:]  # rows: real images, columns: reconstructions
    success = r < np.diag(r)
    expected = success.sum(0) / (n - 1)
    np.testing.assert_allclose(two_way_each(real, recon), expected, atol=1e-12)
    assert metrics.two_way_identification(torch.tensor(real), torch.tensor(recon)) == pytest.approx(
        expected.mean()
    )


def test_two_way_distractors_are_the_real_images():
    real = np.array([[1.0, 0, 0, 0], [0.9, 0.5, 0, 0], [0, 0, 1, 0.2]])
    recon = np.array([[1.0, 0.1, 0, 0], [1.0, 0, 0, 0.05], [0, 0.1, 1, 0]])
    r = np.corrcoef(real, recon)[:3, 3:]
    transposed = (r.T < np.diag(r)).sum(0) / 2
    assert two_way_each(real, recon).tolist() == [1.0, 0.5, 1.0]
    assert transposed.tolist() != [1.0, 0.5, 1.0]


def test_two_way_at_its_ends():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 3, 5))
    assert metrics.two_way_identification(real, real) == 1
    assert metrics.two_way_identification(
        real, np.tile(rng.normal(size=(1, 3, 5)), (40, 1, 1))
    ) == pytest.approx(0.5)
    assert metrics.two_way_identification(real, np.full((40, 3, 5), 0.3)) == 0  # ties are lost
    assert abs(metrics.two_way_identification(real, rng.normal(size=(40, 3, 5))) - 0.5) < 0.15


def test_two_way_chunks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(3)
    real, recon = rng.normal(size=(2, 30, 6))
    whole = two_way_each(real, recon)
    monkeypatch.setattr(metrics, "CHUNK", 7)
    np.testing.assert_array_equal(two_way_each(real, recon), whole)


# ------------------------------------------------------------------------------------------------ pixels
@pytest.mark.parametrize(
    ("side", "other", "antialias"), [(24, 24, False), (32, 48, False), (500, 500, False), (500, 460, True)]
)
def test_pixcorr_is_correlation_after_resizing(side, other, antialias):
    images, recons = pictures(3, side)[0], pictures(3, other)[1]
    big = [
        torchvision_resize(x.double(), [425, 425], antialias=antialias).flatten(1).numpy()
        for x in (images, recons)
    ]
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(*big, strict=True)]
    np.testing.assert_allclose(metrics.pixcorr(images, recons, antialias=antialias), expected, atol=1e-6)


def test_flat_images_correlate_with_nothing():
    images, recons = pictures(3)
    recons[1] = 0.7
    values = metrics.pixcorr(images, recons)
    assert values[1] == 0 and values[0] > 0.5
    assert metrics.pcc(images, recons)[1] == 0 and metrics.correlation_distance(images, recons)[1] == 1


@pytest.mark.parametrize(("name", "axis"), [("ssim", None), ("ssim_columns", 1)])
def test_ssim_is_the_fields_call_on_grey_images(name, axis):
    images, recons = pictures(3)
    expected = []
    for image, recon in zip(images, recons, strict=True):
        a, b = (
            rgb2gray(torchvision_resize(x, [425, 425], antialias=False).permute(1, 2, 0).numpy()).astype(
                np.float64
            )
            for x in (recon, image)
        )
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        expected.append(structural_similarity(a, b, channel_axis=axis, **options))
    np.testing.assert_allclose(getattr(metrics, name)(images, recons), expected, atol=2e-5)
    assert np.allclose(getattr(metrics, name)(images, images), 1)


def test_pcc_mse_cosine_and_distance_against_numpy():
    images, recons = (x.numpy().astype(np.float64) for x in pictures(4))
    a, b = images.reshape(4, -1), recons.reshape(4, -1)
    np.testing.assert_allclose(
        metrics.pcc(images, recons), [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
    )
    np.testing.assert_allclose(
        metrics.correlation_distance(a, b), [correlation(x, y) for x, y in zip(a, b, strict=True)]
    )
    np.testing.assert_allclose(metrics.mse(images, recons), ((a - b) ** 2).mean(1))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(metrics.cosine(a, b), (a * b).sum(1) / norms)


def test_mean_digit_scores_what_was_measured_before(digits69_path):
    mat = loadmat(digits69_path)
    train, test = mat["stimTrn"] / 255.0, mat["stimTest"] / 255.0
    mean = np.tile(train.mean(0), (len(test), 1))
    assert metrics.pcc(test, mean).mean() == pytest.approx(0.655, abs=1e-3)
    assert metrics.mse(test, mean).mean() == pytest.approx(0.0547, abs=1e-4)


FEATURE_METRICS = [
    two_way_metric("two_way", embed),
    metrics.distance_metric("distance", embed),
    metrics.cosine_metric("cosine", embed),
]


@pytest.mark.parametrize("metric", [*METRICS.values(), *FEATURE_METRICS], ids=lambda m: m.name)
def test_every_metric_prefers_the_seen_image(metric):
    images, recons = pictures(6)
    features = {}
    own = metric.each(images, recons, features)
    assert own.shape == (6,) and metric.prepare in features
    other = metric.each(images, recons.roll(1, 0), features)
    sign = {"higher": 1, "lower": -1}[metric.better]
    assert sign * own.mean() > sign * other.mean()
    assert METRICS.get(metric.name, metric).name == metric.name and metric.description and metric.source


@pytest.mark.parametrize(
    ("recons", "words"),
    [
        (torch.rand(3, 3, 8, 8), "row with row"),
        (torch.rand(4, 3, 8, 8) * 255, r"expect \[0, 1\]"),
        (torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8), "expect floats"),
        (torch.full((4, 3, 8, 8), float("nan")), "NaN"),
        (torch.rand(4, 8, 8), "height, width"),
    ],
)
def test_bad_pictures_are_refused(recons, words):
    with pytest.raises(PerceptError, match=words):
        metrics.pixcorr(torch.rand(4, 3, 8, 8), recons)


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
    better = metrics.paired_bootstrap(images + 0.5 + rng.normal(0, 1, 100), images)
    assert better.low > 0 and better.p < 0.01 and better.value == pytest.approx(0.5, abs=0.3)
    same = metrics.paired_bootstrap(images, images)
    assert same == (0, 0, 0, 1)


def test_permutation_p_is_uniform_without_an_effect_and_small_with_one():
    rng = np.random.default_rng(2)
    null = []
    for _ in range(200):
        scores = rng.normal(size=(30, 5))
        null.append(metrics.permutation_p(scores[:, 0], scores[:, 1:], n_permutations=199))
    assert 0.4 < np.mean(null) < 0.6 and 0.01 < np.mean(np.array(null) <= 0.1) < 0.2
    others = rng.normal(size=(30, 4))
    assert metrics.permutation_p(others[:, 0] + 2, others, "higher") == pytest.approx(1 / 2001)
    assert metrics.permutation_p(others[:, 0] + 2, others, "lower") == 1
    assert metrics.permutation_p(others[:, 0] - 2, others, "lower") == pytest.approx(1 / 2001)


def test_derangements_leave_nothing_in_place():
    orders = list(metrics.derangements(5, 50, seed=1))
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
    order = next(metrics.derangements(8, 1, seed=0))
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
    origin = metrics.provenance("mini", {"training": 42}, [{"what": "epoch", "split": "val"}], subject=1)
    metrics.write_metrics(tmp_path / "metrics.json", records_of(table), origin)
    metrics.write_scores(tmp_path / "scores.parquet", table[0])
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
        metrics.write_metrics(tmp_path / "metrics.json", [bad], metrics.provenance("mini", {}, []))
    assert not list(tmp_path.iterdir())


def test_a_table_without_provenance_is_refused(table, tmp_path):
    with pytest.raises(PerceptError, match="lacks seeds, selection"):
        metrics.write_metrics(tmp_path / "metrics.json", records_of(table), {"recipe": "mini"})


# ------------------------------------------------------------------------------------------------ alarms
def test_good_outputs_raise_no_alarm():
    assert metrics.check_outputs(pictures(6)[1]) == []


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
    alarms = metrics.check_outputs(spoil(pictures(6)[0]))
    assert len(alarms) == 1 and re.search(words, alarms[0])


def test_misaligned_rows_raise_an_alarm():
    images, recons = pictures(40)
    order = next(metrics.derangements(40, 1))
    metric = two_way_metric("two_way", embed)
    assert metrics.check_alignment(metric.each(images, recons), metrics.pixcorr(images, recons)) == []
    shuffled = recons[order]
    alarms = metrics.check_alignment(metric.each(images, shuffled), metrics.pixcorr(images, shuffled))
    assert len(alarms) == 1 and "misaligned" in alarms[0]


# ------------------------------------------------------------------------------------------------ answers
def test_answers_are_held_against_the_labels_and_not_against_the_classifiers_view_of_the_shown_images():
    images = torch.zeros(4, 3, 8, 8)
    images[2:] = 1.0  # two dark and two bright images
    calls = []

    def ask(x):
        calls.append(len(x))
        return {"light": np.where(x.mean((1, 2, 3)) > 0.5, "day", "night"), "size": np.array(["big"] * len(x))}

    truth = {"light": ["night", "day", "day", "day"], "size": ["big", "big", "small", "small"]}  # the second is not what it looks like
    light, size = answer_metrics("judge", ask, truth, {"light": 0.5, "size": 0.5})
    table = score_table(images, images, {}, None, [light, size], draws=1)
    value = table[table["row"] == "system"].pivot(index="image", columns="metric", values="value")
    assert value["judge:light"].tolist() == [1, 0, 1, 1] and value["judge:size"].tolist() == [1, 1, 0, 0]
    assert calls == [4]  # one look for both questions, none at the shown images
    shuffled = table[(table["row"] == "shuffled") & (table["metric"] == "judge:size")]
    assert len(shuffled) == 4 and shuffled["value"].mean() == 0.5
    assert (light.each(images, images) == [1, 0, 1, 1]).all() and light.chance == 0.5

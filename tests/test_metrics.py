"""Metrics against the formulas of the published evaluation, statistics against what they promise,
and the refusals.
"""

import re

import numpy as np
import pytest
import torch
from scipy.io import loadmat
from scipy.spatial.distance import correlation
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torchvision.transforms.functional import resize as torchvision_resize

from src import metrics
from src.evaluation.records import score_table
from src.metrics import METRICS, answer_metrics, two_way_each, two_way_metric
from src.utils import PerceptError


def make_images(n=6, side=24, seed=0):
    """Smooth random images (n, 3, side, side) in [0, 1], and noisy versions of them."""
    generator = torch.Generator().manual_seed(seed)
    images = metrics.resize(torch.rand(n, 3, 5, 5, generator=generator), side)
    return images, (images + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def embed(images):
    return images.flatten(1)[:, ::5]


# ----------------------------------------------------------------------------------------- two-way
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
    monkeypatch.setattr(metrics, "BLOCK", 7 * 6)
    np.testing.assert_array_equal(two_way_each(real, recon), whole)


def published_two_way(real, recon):
    n = len(real)
    r = np.corrcoef(real.astype(np.float64), recon.astype(np.float64))[:n, n:]
    return (r < np.diag(r)).sum(0) / (n - 1)


def test_two_way_ties_of_identical_images_are_lost():
    rng = np.random.default_rng(0)
    real = np.repeat(
        rng.normal(size=(20, 50)).astype(np.float32), 2, 0
    )  # every image twice, as repeats that were not averaged
    recon = real + rng.normal(size=real.shape).astype(np.float32)
    r = np.corrcoef(real, recon)[:40, 40:]
    twin = np.arange(40) ^ 1
    others = (
        np.array(
            [sum(r[i, j] < r[j, j] for i in range(40) if i not in (j, twin[j])) for j in range(40)]
        )
        / 39
    )
    np.testing.assert_allclose(two_way_each(real, recon), others, atol=1e-12)
    assert two_way_each(np.tile(real[:1], (30, 1)), rng.normal(size=(30, 50))).max() == 0


@pytest.mark.parametrize(
    "spoil",
    [lambda x: x + 20, lambda x: np.concatenate([x[:, :-1], 0 * x[:, :1] + 3000], 1), np.abs],
    ids=["mean", "outlier", "relu"],
)
def test_two_way_is_exact_where_single_precision_is_not(spoil):
    rng = np.random.default_rng(1)
    base = rng.normal(size=(1, 57_600))
    real = spoil((base + 0.01 * rng.normal(size=(24, 57_600))).astype(np.float32))
    recon = (base + 0.3 * rng.normal(size=(24, 57_600))).astype(np.float32)
    np.testing.assert_array_equal(two_way_each(real, recon), published_two_way(real, recon))


def test_two_way_within_groups_knows_no_other_distractors():
    rng = np.random.default_rng(2)
    real, recon = rng.normal(size=(2, 9, 12))
    groups = np.array(list("aabbbabba"))
    groups[8] = "c"
    values = metrics.two_way_within(real, recon, groups)
    for label in "ab":
        mine = groups == label
        np.testing.assert_allclose(values[mine], published_two_way(real[mine], recon[mine]))
    assert np.isnan(values[8])
    with pytest.raises(PerceptError, match="8 group labels"):
        metrics.two_way_within(real, recon, groups[:8])


def test_pairing_holds_reconstructions_against_other_images():
    images, recons = make_images(7)
    order = np.array([1, 2, 3, 4, 5, 6, 0])
    for metric in (METRICS["pixcorr"], METRICS["ssim"], METRICS["mse"]):
        np.testing.assert_allclose(
            metric.compare(images, recons, pairing=order), metric.compare(images[order], recons)
        )
    real, recon = images.flatten(1).numpy(), recons.flatten(1).numpy()
    r = np.corrcoef(real, recon)[:7, 7:]
    np.testing.assert_allclose(
        two_way_each(real, recon, pairing=order),
        [(r[:, j] < r[order[j], j]).sum() / 6 for j in range(7)],
    )
    with pytest.raises(PerceptError, match="pairing of 3"):
        two_way_each(real, recon, pairing=order[:3])


# ------------------------------------------------------------------------------------------ pixels
def test_bytes_and_views_are_compared_as_floats_are():
    images, recons = make_images(5, 40)
    as_bytes = (images * 255).round().to(torch.uint8)
    for name in ("pixcorr", "ssim", "ssim_columns"):
        exact = METRICS[name].score(as_bytes.float() / 255, recons)
        np.testing.assert_allclose(METRICS[name].score(as_bytes, recons.numpy()), exact)
        np.testing.assert_allclose(
            METRICS[name].score(
                metrics.apply_resizing(as_bytes, "straight"),
                metrics.reorder_lazily(recons, np.arange(5)),
            ),
            exact,
        )
        small = [torchvision_resize(x, [256, 256], antialias=False) for x in (images, recons)]
        np.testing.assert_allclose(
            METRICS[name].score(
                *(metrics.apply_resizing(x, "published") for x in (images, recons))
            ),
            METRICS[name].score(*small),
            atol=1e-6,
        )
    with pytest.raises(PerceptError, match="no resizing 'mine'"):
        metrics.apply_resizing(images, "mine")


@pytest.mark.parametrize(
    ("side", "other", "antialias"),
    [(24, 24, False), (32, 48, False), (500, 500, False), (500, 460, True)],
)
def test_pixcorr_is_correlation_after_resizing(side, other, antialias):
    images, recons = make_images(3, side)[0], make_images(3, other)[1]
    big = [
        torchvision_resize(x.double(), [425, 425], antialias=antialias).flatten(1).numpy()
        for x in (images, recons)
    ]
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(*big, strict=True)]
    np.testing.assert_allclose(
        metrics.pixcorr(images, recons, antialias=antialias), expected, atol=1e-6
    )


def test_flat_images_correlate_with_nothing():
    images, recons = make_images(3)
    recons[1] = 0.7
    values = metrics.pixcorr(images, recons)
    assert values[1] == 0 and values[0] > 0.5
    assert (
        metrics.pcc(images, recons)[1] == 0 and metrics.correlation_distance(images, recons)[1] == 1
    )


@pytest.mark.parametrize(("name", "axis"), [("ssim", None), ("ssim_columns", 1)])
def test_ssim_is_the_fields_call_on_grey_images(name, axis):
    images, recons = make_images(3)
    expected = []
    for image, recon in zip(images, recons, strict=True):
        a, b = (
            rgb2gray(
                torchvision_resize(x, [425, 425], antialias=False).permute(1, 2, 0).numpy()
            ).astype(np.float64)
            for x in (recon, image)
        )
        options = {
            "gaussian_weights": True,
            "sigma": 1.5,
            "use_sample_covariance": False,
            "data_range": 1.0,
        }
        expected.append(structural_similarity(a, b, channel_axis=axis, **options))
    np.testing.assert_allclose(getattr(metrics, name)(images, recons), expected, atol=2e-5)
    assert np.allclose(getattr(metrics, name)(images, images), 1)


def test_pcc_mse_cosine_and_distance_against_numpy():
    images, recons = (x.numpy().astype(np.float64) for x in make_images(4))
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
    if metric.network:
        with pytest.raises(PerceptError, match=re.escape(metric.name) + ".*was not given"):
            metric.score(*make_images(6))
        metric = metric.through(embed)
    images, recons = make_images(6)
    features = {}
    own = metric.score(images, recons, features)
    assert own.shape == (6,) and metric.prepare in features
    other = metric.score(images, recons.roll(1, 0), features)
    sign = {"higher": 1, "lower": -1}[metric.better]
    assert sign * own.mean() > sign * other.mean()
    assert (
        METRICS.get(metric.name, metric).name == metric.name
        and metric.description
        and metric.source
    )


@pytest.mark.parametrize(
    ("recons", "words"),
    [
        (torch.rand(3, 3, 8, 8), "row with row"),
        (torch.rand(4, 3, 8, 8) * 255, r"expect \[0, 1\]"),
        (torch.full((4, 3, 8, 8), float("nan")), "NaN"),
        (torch.rand(4, 8, 8), "height, width"),
    ],
)
def test_bad_images_are_refused(recons, words):
    with pytest.raises(PerceptError, match=words):
        metrics.pixcorr(torch.rand(4, 3, 8, 8), recons)


# ----------------------------------------------------------------------------------------- answers
def test_answers_are_compared_with_the_labels_and_not_with_the_classifiers_view_of_the_images():
    images = torch.zeros(4, 3, 8, 8)
    images[2:] = 1.0  # two dark and two bright images
    calls = []

    def ask(x):
        calls.append(len(x))
        return {
            "light": np.where(x.mean((1, 2, 3)) > 0.5, "day", "night"),
            "size": np.array(["big"] * len(x)),
        }

    truth = {
        "light": ["night", "day", "day", "day"],
        "size": ["big", "big", "small", "small"],
    }  # the second is not what it looks like
    light, size = answer_metrics("judge", ask, truth, {"light": 0.5, "size": 0.5})
    table = score_table(images, {"system": images}, [light, size], draws=1)
    value = table[table["row"] == "system"].pivot(index="image", columns="metric", values="value")
    assert value["judge:light"].tolist() == [1, 0, 1, 1] and value["judge:size"].tolist() == [
        1,
        1,
        0,
        0,
    ]
    assert calls == [4]  # one look for both questions, none at the shown images
    shuffled = table[(table["row"] == "shuffled") & (table["metric"] == "judge:size")]
    assert len(shuffled) == 4 and shuffled["value"].mean() == 0.5
    assert (light.score(images, images) == [1, 0, 1, 1]).all() and light.chance == 0.5

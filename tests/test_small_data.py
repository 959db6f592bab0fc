"""Decoders of small data: against plain formulas, without test images, on data of any kind."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, pearsonr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from src import small_data
from src.data import open_subject
from src.readers import npz
from src.small_data import Candidate, Examples, Responses, decode_fold, pose_problem
from src.small_data.decoders import (
    Mixture,
    fit_encoder,
    predict_bayesian,
    predict_kernel,
    predict_ridge,
    solve_noise,
)
from src.small_data.examples import rank_voxels
from src.small_data.nested import choose_members, choose_setting
from src.small_data.network import build_networks, predict_network
from src.small_data.variants import warp_images

NETWORK = {
    "voxels": 30,
    "width": 16,
    "dropout": 0.2,
    "noise": 0.1,
    "epochs": 20,
    "batch_size": 8,
    "max_lr": 1e-2,
    "networks": 2,
    "seed": 0,
}
KERNEL = {"kernel": "rbf", "voxels": 30, "alpha": 0.1}
BAYESIAN = {
    "voxels": 30,
    "strength": 1.0,
    "clusters": 1,
    "evidence": 0.5,
    "penalty": 10,
    "shrinkage": 0.8,
}
DECODERS = {
    "ridge": (predict_ridge, {"voxels": 30, "alpha": 10.0}),
    "kernel": (predict_kernel, KERNEL),
    "arc-cosine": (predict_kernel, KERNEL | {"kernel": "arc-cosine"}),
    "bayesian": (predict_bayesian, BAYESIAN),
    "bayesian, clusters": (predict_bayesian, BAYESIAN | {"clusters": 3}),
    "network": (predict_network, NETWORK),
}


def make_examples(n_images=40, n_voxels=50, side=6, noise=0.3, seed=0):
    """Images whose pixels drive the voxels, with moved copies."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((n_images, 1, 2, 2)).astype(np.float32)
    pixels = np.kron(coarse, np.ones((1, 1, side // 2, side // 2), np.float32))
    flat = pixels.reshape(n_images, -1)
    voxels = flat @ rng.normal(size=(flat.shape[1], n_voxels)) / side
    voxels += noise * rng.normal(size=voxels.shape)
    return Examples(voxels.astype(np.float32), flat, small_data.make_variants(pixels, 0))


@pytest.fixture(scope="module")
def problem():
    examples = make_examples()
    return pose_problem(examples.select(np.arange(30)), examples.voxels[30:], 50)


# --------------------------------------------------------------------------------------- problems
def test_voxels_are_scaled_and_ranked_by_training_images_alone():
    examples = make_examples()
    train, tests = examples.select(np.arange(30)), examples.voxels[30:]
    ours = pose_problem(train, tests, 20)
    scaler = StandardScaler().fit(train.voxels)
    relevance = rank_voxels(scaler.transform(train.voxels), train.targets)
    order = np.argsort(-relevance)[:20]
    np.testing.assert_allclose(
        ours.train.voxels, scaler.transform(train.voxels)[:, order], atol=1e-5
    )
    np.testing.assert_allclose(ours.test_voxels, scaler.transform(tests)[:, order], atol=1e-4)
    other = pose_problem(train, tests + 100, 20)
    np.testing.assert_array_equal(other.train.voxels, ours.train.voxels)


def test_relevance_of_many_targets_is_that_of_their_axes_of_most_variance():
    rng = np.random.default_rng(0)
    voxels = rng.normal(size=(150, 7))
    for n_targets in (130, 400):  # more than the axes that are read, fewer and more than images
        spectrum = np.where(np.arange(n_targets) < 90, 1.0, 1e-6)
        targets = rng.normal(size=(150, n_targets)) * spectrum
        exact = ((voxels.T @ (targets - targets.mean(0)) / 150) ** 2).sum(1)
        np.testing.assert_allclose(rank_voxels(voxels, targets), exact, rtol=1e-4)


def test_constant_voxels_come_last_and_stay_zero():
    examples = make_examples(n_voxels=4)
    voxels = examples.voxels.copy()
    voxels[:30, 2] = 1e4
    posed = pose_problem(
        Examples(voxels[:30], examples.targets[:30]), np.full((2, 4), 3, np.float32), 4
    )
    assert (posed.train.voxels[:, 3] == 0).all() and (posed.test_voxels[:, 3] == 0).all()
    assert np.isfinite(posed.test_voxels).all()


# --------------------------------------------------------------------------------------- decoders
def test_ridge_is_that_of_scikit_learn(problem):
    predicted = predict_ridge(problem, {"voxels": 20, "alpha": 3.0})
    model = Ridge(alpha=3.0).fit(problem.train.voxels[:, :20], problem.train.targets)
    np.testing.assert_allclose(predicted, model.predict(problem.test_voxels[:, :20]), atol=1e-5)


def test_kernel_is_the_plain_formula(problem):
    predicted = predict_kernel(problem, KERNEL)
    x, t = problem.train.voxels[:, :30], problem.test_voxels[:, :30]

    def distances(a, b):
        return ((a[:, None].astype(float) - b[None]) ** 2).sum(-1)

    pairs = distances(x, x)
    gamma = 2 / np.median(pairs[np.triu_indices(len(x), 1)])
    gram = np.exp(-gamma * pairs)
    targets = problem.train.targets
    weights = np.linalg.inv(gram + 0.1 * np.eye(len(x))) @ (targets - targets.mean(0))
    expected = targets.mean(0) + np.exp(-gamma * distances(t, x)) @ weights
    np.testing.assert_allclose(predicted, expected, atol=1e-5)


def test_leave_one_out_residuals_are_those_of_fits_without_the_image():
    rng = np.random.default_rng(0)
    z, a = rng.normal(size=(12, 3)), rng.normal(size=(12, 5))
    _, residuals = fit_encoder(z, a, 2.0)
    for row in range(12):
        rest = np.arange(12) != row
        weights = np.linalg.solve(z[rest].T @ z[rest] + 2 * np.eye(3), z[rest].T @ a[rest])
        np.testing.assert_allclose(residuals[row], a[row] - z[row] @ weights, atol=1e-10)


def test_bayesian_is_the_posterior_mean_with_the_whole_noise_covariance(problem):
    predicted = predict_bayesian(problem, BAYESIAN)
    prior = problem.fit_axes(1.0)
    sd = np.sqrt(prior.explained_variance_)
    z = (problem.train.targets - prior.mean_) @ prior.components_.T / sd
    a, tests = problem.train.voxels[:, :30], problem.test_voxels[:, :30]
    encoder, residuals = fit_encoder(z, a, 10 * len(z) / 10)
    empirical = residuals.T @ residuals / len(z)
    noise = 0.8 * np.diag(np.diag(empirical)) + 0.2 * empirical
    precision = np.eye(len(encoder)) + 0.5 * encoder @ np.linalg.inv(noise) @ encoder.T
    right = 0.5 * encoder @ np.linalg.inv(noise) @ tests.T
    posterior = np.linalg.inv(precision) @ right
    expected = prior.mean_ + (posterior.T * sd) @ prior.components_
    np.testing.assert_allclose(predicted, expected, atol=1e-4)


def test_a_mixture_posterior_is_the_integral_over_a_grid():
    rng = np.random.default_rng(0)
    centres, shares = rng.normal(size=(3, 2)), np.array([0.2, 0.3, 0.5])
    covariance = np.array([[0.5, 0.2], [0.2, 0.4]])
    gram, fit = np.array([[2.0, 0.5], [0.5, 1.0]]), rng.normal(size=(2, 4))
    mixture = Mixture(centres, shares, np.linalg.inv(covariance))
    side = np.linspace(-6, 6, 241)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    density = sum(
        share * multivariate_normal(centre, covariance).pdf(grid)
        for centre, share in zip(centres, shares, strict=True)
    )
    for column, z in zip(fit.T, mixture.compute_posterior(gram, fit), strict=True):
        quadratic = (grid @ gram * grid).sum(1)
        posterior = density * np.exp(grid @ column - quadratic / 2)
        np.testing.assert_allclose(z, posterior @ grid / posterior.sum(), atol=1e-6)


@pytest.mark.parametrize("n_images", [8, 60])
def test_noise_is_inverted_as_the_whole_matrix_would_be(n_images):
    rng = np.random.default_rng(0)
    residuals, right = rng.normal(size=(n_images, 20)), rng.normal(size=(20, 3))
    empirical = residuals.T @ residuals / n_images
    noise = 0.7 * np.diag(np.diag(empirical)) + 0.3 * empirical
    np.testing.assert_allclose(
        solve_noise(residuals, 0.7, right), np.linalg.inv(noise) @ right, atol=1e-8
    )


def test_networks_side_by_side_are_independent():
    torch.manual_seed(0)
    model = build_networks(3, 5, 8, 2, dropout=0.0)
    x = torch.randn(3, 4, 5)
    together = model(x)
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(model(changed)[[0, 2]], together[[0, 2]])
    weights = model[0].linear.weight
    assert not torch.equal(weights[0], weights[1])


def test_networks_come_out_the_same_again_and_leave_the_random_state(problem):
    state = torch.get_rng_state()
    first = predict_network(problem, NETWORK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    np.testing.assert_array_equal(predict_network(problem, NETWORK), first)


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_finds_the_images_of_the_test_voxels(problem, name):
    predict, setting = DECODERS[name]
    predicted = predict(problem, setting)
    truth = make_examples().targets[30:]
    correlations = [pearsonr(a, b)[0] for a, b in zip(truth, predicted, strict=True)]
    assert predicted.shape == truth.shape and predicted.dtype == np.float32
    assert np.mean(correlations) > 0.75


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["few images", "one voxel", "equal targets", "equal voxels"])
def test_decoders_stay_finite_on_poor_data(name, kind):
    examples = make_examples(n_images=6 if kind == "few images" else 20)
    voxels, targets = examples.voxels.copy(), examples.targets.copy()
    if kind == "one voxel":
        voxels = voxels[:, :1]
    if kind == "equal targets":
        targets[:] = targets[0]
    if kind == "equal voxels":
        voxels[:] = 1
    variants = {strength: np.repeat(targets[:, None], 2, 1) for strength in (0.5, 1.0)}
    rows = np.arange(len(voxels))
    train = Examples(voxels, targets, variants).select(rows[2:])
    predict, setting = DECODERS[name]
    predicted = predict(pose_problem(train, voxels[:2], 50), setting)
    assert np.isfinite(predicted).all() and np.abs(predicted).max() < 10


# ------------------------------------------------------------------------------- choices within
def test_no_choice_depends_on_a_test_image():
    """With other voxels of one test image, the other test images are decoded to the last bit."""
    examples = make_examples(30)
    fold = (np.arange(24), np.arange(24, 30))
    inner = small_data.split_into_folds(np.arange(24), None, 3, 0)
    grids = {
        "ridge": Candidate(
            predict_ridge, [{"voxels": v, "alpha": a} for v in (5, 30) for a in (1.0, 100.0)]
        ),
        "kernel": Candidate(predict_kernel, [KERNEL, KERNEL | {"alpha": 1.0}]),
    }
    first = decode_fold(examples, fold, inner, grids)
    voxels, targets = examples.voxels.copy(), examples.targets.copy()
    voxels[29] = 1e3
    targets[24:] = 0.5  # of all test images
    second = decode_fold(Examples(voxels, targets, examples.variants), fold, inner, grids)
    assert first.members == second.members and first.settings == second.settings
    for name, predicted in first.predictions.items():
        np.testing.assert_array_equal(predicted[:5], second.predictions[name][:5])
    assert set(first.describe()) >= {"mean of", "ridge", "kernel", "ridge, inner score"}


def test_the_best_setting_and_the_best_subset_are_taken():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(20, 6)).astype(np.float32)
    noise = {
        name: truth + sd * rng.normal(size=truth.shape)
        for name, sd in (("a", 0.5), ("b", 0.5), ("bad", 50.0))
    }
    score = small_data.nested.mean_correlation
    assert choose_members(noise, truth, score) == ("a", "b")
    outputs = {1: noise["bad"], 2: noise["a"]}
    candidate = Candidate(
        lambda problem, setting: outputs[setting["k"]][problem], [{"k": 1}, {"k": 2}]
    )
    setting, predicted = choose_setting(candidate, [slice(0, 12), slice(12, 20)], truth, score)
    assert setting == {"k": 2} and (predicted == noise["a"]).all()


# ------------------------------------------------------------------------------------------- data
def test_uneven_repeats_in_any_order_are_averaged_by_image():
    rng = np.random.default_rng(0)
    rows = np.array([2, 0, 1, 2, 2, 0])
    betas = rng.normal(size=(6, 4)).astype(np.float32)
    mean = Responses(betas, np.zeros(6, int), rows, 3).average(np.array([0, 1]))
    expected = np.stack([betas[rows == image].mean(0) for image in range(3)])
    np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_sessions_are_scaled_by_their_trials_of_training_images():
    rng = np.random.default_rng(0)
    rows = np.tile(np.arange(30), 2)
    sessions = np.repeat([0, 1], 30)
    betas = rng.normal(size=(60, 3)).astype(np.float32)
    betas[sessions == 1] = 5 * betas[sessions == 1] + 100
    train = np.arange(25)
    mean = Responses(betas, sessions, rows, 30).average(train)
    parts = []
    for session in (0, 1):
        here = betas[sessions == session]
        parts.append((here - here[:25].mean(0)) / here[:25].std(0))
    np.testing.assert_allclose(mean, np.mean(parts, 0), atol=1e-5)
    betas[30 + 29] = 1e6  # a trial of a test image
    again = Responses(betas, sessions, rows, 30).average(train)
    np.testing.assert_array_equal(again[:29], mean[:29])


def test_pixels_keep_colour_and_shape_and_are_shrunk_to_a_longest_side():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (3, 40, 80, 3), dtype=np.uint8)
    assert small_data.make_pixels(colour, 20).shape == (3, 3, 10, 20)
    grey = np.repeat(colour[..., :1], 3, -1)
    pixels = small_data.make_pixels(grey, 80)
    assert pixels.shape == (3, 1, 40, 80) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[:, 0] * 255, grey[..., 0], atol=1e-4)
    flat = np.full((1, 50, 50, 3), 255, np.uint8)
    assert small_data.make_pixels(flat, 7).min() == pytest.approx(1)


def test_moved_copies_are_the_image_at_strength_zero_and_rotate_about_the_centre():
    image = np.zeros((1, 1, 9, 9), np.float32)
    image[0, 0, 2:7, 4] = 1
    np.testing.assert_allclose(warp_images(image, 2, 0.0)[0], image.repeat(2, 0), atol=1e-6)
    moved = warp_images(image, 200, 1.0)
    assert moved.shape == (1, 200, 1, 9, 9) and moved.std(1).max() > 0.1
    assert abs(moved.mean(1).ravel() @ np.arange(81) / moved.mean(1).sum() - 40) < 0.5


def write_subject(tmp_path, **more):
    rng = np.random.default_rng(0)
    arrays = {
        "betas": rng.normal(size=(30, 8)),
        "images": rng.integers(0, 256, (15, 6, 6), dtype=np.uint8),
        "image_index": rng.permutation(np.repeat(np.arange(15), 2)),
    }
    np.savez(tmp_path / "mine.npz", **(arrays | more))
    npz.read(tmp_path / "mine.npz", tmp_path / "out")
    return open_subject(tmp_path / "out", 1), arrays["image_index"]


def test_only_a_split_that_came_with_the_data_is_official(tmp_path):
    subject, index = write_subject(tmp_path)
    responses, ids = small_data.read_responses(subject)
    assert len(ids) == 15 and (ids[responses.image_rows] == index).all()
    assert small_data.find_official_split(subject, ids) is None
    split = np.where(index < 4, "test", np.where(index == 5, "val", "train"))
    (tmp_path / "split").mkdir()
    subject, _ = write_subject(tmp_path / "split", split=split)
    train, test = small_data.find_official_split(subject, ids)
    assert test.tolist() == [0, 1, 2, 3] and train.tolist() == list(range(4, 15))


def test_an_official_split_with_one_test_image_is_left_out(tmp_path):
    index = np.random.default_rng(1).permutation(np.repeat(np.arange(15), 2))
    split = np.where(index == 3, "test", "train")
    subject, _ = write_subject(tmp_path, image_index=index, split=split)
    with pytest.warns(UserWarning, match="14 training and 1 test images"):
        assert small_data.find_official_split(subject, np.arange(15)) is None


# ----------------------------------------------------------------------------------- class means
def test_class_means_are_those_of_a_classifier_on_all_voxels():
    examples = make_examples(30, n_voxels=200)
    labels = np.where(examples.targets[:, 0] > 0.5, "bright", "dark")
    train, test = np.arange(20), np.arange(20, 30)
    ours = small_data.predict_class_mean(examples, (train, test), labels)
    scaler = StandardScaler().fit(examples.voxels[train])
    classifier = LogisticRegression(C=1e-3, max_iter=500)
    classifier.fit(scaler.transform(examples.voxels[train]), labels[train])
    decoded = classifier.predict(scaler.transform(examples.voxels[test]))
    expected = [examples.targets[train][labels[train] == name].mean(0) for name in decoded]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_labels_that_name_each_image_are_no_classes():
    assert small_data.are_classes(np.array(["a", "b"] * 5))
    assert not small_data.are_classes(np.arange(10).astype(str))
    assert not small_data.are_classes(None)


def test_one_class_in_the_training_images_gives_its_mean():
    examples = make_examples(10)
    labels = np.array(["a"] * 9 + ["b"])
    fold = (np.arange(9), np.array([9]))
    predicted = small_data.predict_class_mean(examples, fold, labels)
    np.testing.assert_allclose(predicted[0], examples.targets[:9].mean(0))

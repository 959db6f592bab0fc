"""Kernel decoders against independent formulas: kernels, features, solution, leave-one-out."""

import math

import numpy as np
import pytest
import torch
from sklearn.gaussian_process.kernels import RBF
from sklearn.kernel_ridge import KernelRidge as SklearnKernelRidge

from src.networks import KernelRidge, RepeatNoise, build_network
from src.networks.kernels import (
    ARC_COSINE_BIAS,
    compute_arc_cosine_kernel,
    compute_rbf_kernel,
    compute_reliability_weights,
    compute_signal_projection,
)
from src.utils import PerceptError

VOXELS, IMAGES, REPEATS = 12, 400, 3


@pytest.fixture(scope="module")
def world():
    """Three dimensions of signal in 12 voxels, correlated noise, targets that need a nonlinearity.

    Returns means (images, voxels), single trials (images, repeats, voxels), targets (images, 2, 2).
    """
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(IMAGES, 3))
    mixing = rng.normal(size=(3, VOXELS)) * 2
    shared = rng.normal(size=(IMAGES, REPEATS, 2)) @ rng.normal(size=(2, VOXELS))
    noise = shared + 0.7 * rng.normal(size=(IMAGES, REPEATS, VOXELS))
    trials = (latent @ mixing)[:, None] + noise
    columns = [np.abs(latent[:, 0]), latent[:, 1], latent[:, 0] * latent[:, 1], latent[:, 2]]
    targets = np.stack(columns, 1).reshape(IMAGES, 2, 2)
    return trials.mean(1).astype(np.float32), trials, targets.astype(np.float32)


@pytest.fixture(scope="module")
def noise(world):
    trials = world[1]
    residuals = (trials - trials.mean(1, keepdims=True)).reshape(-1, VOXELS)
    covariance = residuals.T @ residuals / (IMAGES * (REPEATS - 1))
    return RepeatNoise(torch.from_numpy(covariance).float(), 1 / REPEATS)


def test_arc_cosine_kernel_is_that_of_an_infinite_rectified_layer():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 5, generator=generator), torch.randn(4, 5, generator=generator)
    weights = torch.randn(400_000, 5, generator=generator)
    bias = torch.randn(400_000, generator=generator) * math.sqrt(ARC_COSINE_BIAS * 5)
    hidden = [(x @ weights.T + bias).relu() for x in (a, b)]
    expected = 2 * hidden[0] @ hidden[1].T / len(weights)
    torch.testing.assert_close(compute_arc_cosine_kernel(a, b), expected, rtol=0.03, atol=0.05)


def test_rbf_kernel_is_sklearns():
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    expected = RBF(length_scale=2.0)(a.numpy(), b.numpy())
    np.testing.assert_allclose(compute_rbf_kernel(a, b, 1 / 8).numpy(), expected, rtol=1e-5)


def test_signal_projection_whitens_rotates_and_shrinks(world, noise):
    """By the symmetric square root of the covariance, which must give the same inner products."""
    means = torch.from_numpy(world[0])
    projected = means @ compute_signal_projection(means, noise)
    covariance = noise.covariance.double().numpy()
    shrunk = 0.8 * covariance + 0.2 * np.diag(np.diag(covariance))
    values, vectors = np.linalg.eigh(shrunk)
    whitening = vectors @ np.diag(values**-0.5) @ vectors.T
    signal, rotation = np.linalg.eigh(whitening @ np.cov(world[0].T) @ whitening - np.eye(12) / 3)
    kept = signal > 0
    weights = signal[kept] / (signal[kept] + 1 / 3)
    expected = world[0] @ whitening @ rotation[:, kept] * weights
    assert projected.shape[1] == kept.sum() < VOXELS
    np.testing.assert_allclose(
        (projected @ projected.T).numpy(), expected @ expected.T, rtol=1e-3, atol=1e-2
    )


def test_reliability_weights_are_the_noise_ceilings_snr(world, noise):
    means, trials, _ = world
    weights = compute_reliability_weights(torch.from_numpy(means), noise).numpy()
    within = trials.var(1, ddof=1).mean(0)
    signal = means.var(0, ddof=1) - within / REPEATS
    np.testing.assert_allclose(weights, np.sqrt(signal / within), rtol=1e-3)


@pytest.mark.parametrize("kernel", ["arc-cosine", "rbf"])
def test_solution_is_sklearns_and_learns_what_a_line_cannot(world, noise, kernel):
    means, _, targets = world
    decoder = KernelRidge.fit(means[:300], targets[:300], noise, kernel, device="cpu")
    test = torch.from_numpy(means[300:])
    predicted = decoder(test)
    assert predicted.shape == (100, 2, 2)

    gram = decoder._compare(decoder.support, decoder.support).double().numpy()
    solver = SklearnKernelRidge(alpha=0.1 * np.diag(gram).mean(), kernel="precomputed")
    flat = targets[:300].reshape(300, 4).astype(float)
    solver.fit(gram, flat - flat.mean(0))
    to_test = decoder._compare(decoder._project(test), decoder.support).double().numpy()
    expected = solver.predict(to_test) + flat.mean(0)
    np.testing.assert_allclose(predicted.flatten(1).numpy(), expected, atol=2e-3)

    design = np.c_[np.ones(300), means[:300]]
    line = np.c_[np.ones(100), means[300:]] @ np.linalg.lstsq(design, flat, rcond=None)[0]
    truth = targets[300:].reshape(100, 4)
    errors = [((guess - truth) ** 2).mean(0) for guess in (expected, line)]
    assert errors[0][0] < 0.5 * errors[1][0]  # the absolute value of a latent


def test_leave_one_out_is_that_of_refitting(world):
    means, _, targets = world
    means, targets = means[:40], targets[:40]
    decoder = KernelRidge.fit(means, targets, None, "arc-cosine", device="cpu")
    left_out = decoder.predict_left_out(torch.from_numpy(targets))
    gram = decoder._compare(decoder.support, decoder.support).double().numpy()
    centred = (targets - targets.mean(0)).reshape(40, 4)
    for image in (0, 17):
        others = np.arange(40) != image
        penalised = gram[np.ix_(others, others)] + decoder.penalty.item() * np.eye(39)
        expected = gram[image, others] @ np.linalg.solve(penalised, centred[others])
        expected = expected + targets.reshape(40, 4).mean(0)
        np.testing.assert_allclose(left_out[image].flatten().numpy(), expected, atol=1e-3)


def test_it_is_rebuilt_from_its_config(world, noise):
    means, _, targets = world
    for kernel, estimated in (("rbf", noise), ("arc-cosine", noise), ("arc-cosine", None)):
        decoder = KernelRidge.fit(means, targets, estimated, kernel, device="cpu")
        again = build_network(decoder.config)
        again.load_state_dict(decoder.state_dict())
        x = torch.from_numpy(means[:5])
        torch.testing.assert_close(again(x), decoder(x))


def test_unit_and_constant_shift_of_targets_do_not_matter(world, noise):
    means, _, targets = world
    first = KernelRidge.fit(means, targets, noise, device="cpu")
    other = KernelRidge.fit(means, 3 * targets + 7, noise, device="cpu")
    x = torch.from_numpy(means[:5])
    torch.testing.assert_close(other(x), 3 * first(x) + 7, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_fitted_is_refused(world, noise):
    means, _, targets = world
    silent = RepeatNoise(noise.covariance * 1e6, 1 / REPEATS)
    flat = noise.covariance.clone()
    flat[3] = flat[:, 3] = 0
    broken = means.copy()
    broken[5, 2] = np.nan
    with pytest.raises(PerceptError, match="matching rows"):
        KernelRidge.fit(means, targets[:5])
    with pytest.raises(PerceptError, match="not finite"):
        KernelRidge.fit(broken, targets)
    with pytest.raises(PerceptError, match="choose one of arc-cosine, rbf"):
        KernelRidge.fit(means, targets, noise, "linear")
    with pytest.raises(PerceptError, match="no signal"):
        KernelRidge.fit(means, targets, silent)
    with pytest.raises(PerceptError, match="no signal"):
        KernelRidge.fit(means, targets, silent, "rbf")
    with pytest.raises(PerceptError, match="1 of 12 voxels have no noise"):
        RepeatNoise(flat, 1 / REPEATS)
    decoder = KernelRidge.fit(means, targets, noise, device="cpu")
    with pytest.raises(PerceptError, match="reads 12 voxels"):
        decoder(torch.zeros(2, 11))

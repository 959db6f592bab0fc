"""Encoding models: features, banded ridge, variance partitioning, noise, files."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from src import encoding
from src.encoding import FeatureSpace, GaborPyramid, NoiseModel
from src.encoding.banded_ridge import (
    choose_penalties,
    predict_out_of_fold,
    solve_banded_ridge,
    split_rows,
)
from src.encoding.gabor import split_into_opponent_channels
from src.encoding.model import FeatureProjection
from src.figures import plot_spectra
from src.utils import PerceptError

SPACES = {"first": FeatureSpace(0, False), "second": FeatureSpace(0, False)}


def make_world(n=300, noise=0.5, seed=0):
    """Two feature spaces; voxels 0-3 follow the first, 4-7 the second, 8-9 neither."""
    rng = np.random.default_rng(seed)
    features = {
        "first": rng.standard_normal((n, 6)).astype(np.float32),
        "second": rng.standard_normal((n, 20)).astype(np.float32),
    }
    voxels = noise * rng.standard_normal((n, 10))
    voxels[:, :4] += features["first"] @ rng.standard_normal((6, 4)) / 6**0.5
    voxels[:, 4:8] += features["second"] @ rng.standard_normal((20, 4)) / 20**0.5
    return features, voxels.astype(np.float32)


# ----------------------------------------------------------------------------------------- Gabor
def grating(angle, cycles, phase=0.0, size=32):
    """Grey image (1, 3, size, size) of a wave whose crests run across `angle`."""
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = x * np.cos(angle) + y * np.sin(angle)
    wave = 0.5 + 0.4 * torch.cos(2 * np.pi * cycles * along + phase)
    return wave.expand(1, 3, size, size).float()


def test_the_pyramid_has_the_documented_number_of_features():
    pyramid = GaborPyramid()
    windows = 9**2 + 7**2 + 6**2 + 4**2
    assert pyramid.n_features == 3 * windows * (4 * 2 + 2) == 5460
    assert pyramid(torch.rand(2, 3, 32, 32)).shape == (2, 5460)


def test_an_energy_is_that_of_its_formula():
    """One window in the middle, one orientation, one frequency, by direct sums."""
    pyramid = GaborPyramid(16, sigmas=(0.2,), grids=(1,), orientations=1, cycles=(0.3,))
    image = torch.rand(1, 3, 16, 16)
    grey = image[0].mean(0).double().numpy() - 0.5
    places = (np.arange(16) + 0.5) / 16
    window = np.exp(-((places[None] - 0.5) ** 2 + (places[:, None] - 0.5) ** 2) / (2 * 0.2**2))
    window /= window.sum()
    wave = 2 * np.pi * 0.3 / 0.2 * (places[None] - 0.5)
    even, odd = (window * np.cos(wave) * grey).sum(), (window * np.sin(wave) * grey).sum()
    expected = [np.hypot(even, odd), (window * grey).sum(), abs((window * grey).sum())]
    np.testing.assert_allclose(pyramid(image)[0, :3].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("number", range(4))
def test_energies_prefer_their_orientation_whatever_the_phase(number):
    pyramid = GaborPyramid(sigmas=(0.13,), grids=(1,), cycles=(0.42,))
    angle, cycles = np.pi * number / 4, 0.42 / 0.13
    energies = [pyramid(grating(angle, cycles, phase))[0, :4] for phase in (0.0, 0.8, 1.6)]
    for energy in energies:
        assert energy.argmax() == number
    assert torch.allclose(energies[0][number], energies[2][number], rtol=0.05)


def test_opponent_channels_are_those_of_the_formula():
    pixel = torch.tensor([0.9, 0.3, 0.2]).view(1, 3, 1, 1)
    channels = split_into_opponent_channels(pixel).flatten().tolist()
    assert channels == pytest.approx([1.4 / 3 - 0.5, 0.3, (0.2 - 0.6) / 2])


def test_larger_images_are_resized_and_too_fine_waves_refused():
    pyramid = GaborPyramid()
    small = torch.rand(1, 3, 32, 32)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (pyramid(large) - pyramid(small)).abs().max() < 0.05
    with pytest.raises(PerceptError, match="take at least 14 pixels"):
        GaborPyramid(size=12)
    with pytest.raises(PerceptError, match="one grid for each sigma"):
        GaborPyramid(grids=(9, 7))


# -------------------------------------------------------------------------------------- features
def test_features_are_given_computed_or_refused():
    images = np.random.default_rng(0).integers(0, 255, (5, 40, 40, 3), dtype=np.uint8)
    tokens = np.ones((5, 3, 4), np.float16)
    mean = {"mean": lambda x: x.reshape(len(x), -1).mean(1, keepdims=True)}
    features = encoding.compute_features(
        ["gabor", "tokens", "mean"], images, {"tokens": tokens}, mean
    )
    assert [(name, rows.shape) for name, rows in features.items()] == [
        ("gabor", (5, 5460)),
        ("tokens", (5, 12)),
        ("mean", (5, 1)),
    ]
    assert all(rows.dtype == np.float32 for rows in features.values())
    with pytest.raises(PerceptError, match="'smell' is neither given nor can it be computed"):
        encoding.compute_features(["smell"], images)
    with pytest.raises(PerceptError, match="3 rows for 5 images"):
        encoding.compute_features(["tokens"], images, {"tokens": tokens[:3]})
    with pytest.raises(PerceptError, match="not finite"):
        encoding.compute_features(["tokens"], images, {"tokens": np.full((5, 2), np.nan)})


def test_layers_of_any_network_are_pooled():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(7)
    )
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    network(pixels)
    rows = encoding.build_layer_extractor(network, ["1", "3"], grid=2)(images)
    pooled = nn.functional.adaptive_avg_pool2d(network[:2](pixels), 2).flatten(1)
    expected = torch.cat([pooled, network(pixels)], 1).detach().numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    with pytest.raises(PerceptError, match="no layer 9"):
        encoding.build_layer_extractor(network, ["9"])


def test_gnet_features_are_its_pooled_maps():
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    extract = encoding.build_extractors(["gabor", "gnet"], "mini")
    rows = extract["gnet"](images)
    assert list(extract) == ["gnet"] and rows.shape[0] == 3 and np.isfinite(rows).all()


def test_categories_and_captions_become_embeddings():
    labels = pd.DataFrame(
        {"image": [7, 3, 5], "kind": ["cat", "dog", "cat"], "size": ["s", "s", "l"]}
    )
    rows = encoding.embed_categories(labels, np.array([3, 7]))
    assert rows.tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]
    captions = pd.DataFrame({"image": [3, 3, 7], "caption": ["ab", "b", "b"]})

    def embed(sentences):
        return torch.tensor([[float(s.count("a")), float(s.count("b"))] for s in sentences])

    rows = encoding.embed_captions(captions, np.array([7, 3]), embed)
    half = 0.5 * np.array([0.5**0.5, 0.5**0.5 + 1])
    np.testing.assert_allclose(rows, [[0, 1], half], atol=1e-6)
    with pytest.raises(PerceptError, match="Image 9 has no caption"):
        encoding.embed_captions(captions, np.array([9]), embed)
    with pytest.raises(PerceptError, match="Image 9 has no labels"):
        encoding.embed_categories(labels, np.array([9]))


# ----------------------------------------------------------------------------------- projections
def test_a_projection_keeps_distances_up_to_one_scale():
    rows = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    projection = FeatureProjection.fit(rows, FeatureSpace(0, standardise=False))
    z = projection(torch.from_numpy(rows))
    assert z.square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)
    ratio = torch.pdist(z) / torch.pdist(torch.from_numpy(rows))
    assert ratio.max() / ratio.min() < 1.001


def test_a_projection_keeps_the_leading_components():
    rng = np.random.default_rng(0)
    strong = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 40)) * 10
    rows = (strong + rng.standard_normal((400, 40))).astype(np.float32)
    projection = FeatureProjection.fit(rows, FeatureSpace(3, standardise=False))
    centred = rows - rows.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3].T
    ours = np.linalg.qr(projection.components.numpy())[0]
    assert np.linalg.svd(ours.T @ axes)[1].min() > 0.999


def test_constant_features_are_left_out_and_constant_spaces_refused():
    rows = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    rows[:, 1] = 3
    projection = FeatureProjection.fit(rows, FeatureSpace(0))
    assert torch.isfinite(projection.components).all() and projection.components.shape == (4, 3)
    with pytest.raises(PerceptError, match="same for all images"):
        FeatureProjection.fit(np.ones((30, 4)), FeatureSpace(0))


# ---------------------------------------------------------------------------------- banded ridge
def test_weights_are_those_of_the_normal_equations():
    features, y = make_world()
    x = np.concatenate(list(features.values()), 1)
    penalties = np.random.default_rng(1).uniform(1, 50, (2, 10)).astype(np.float32)
    weight, bias = solve_banded_ridge(x, [6, 20], y, penalties)
    augmented = np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64)
    for voxel in range(10):
        ridge = np.diag([*np.repeat(penalties[:, voxel], [6, 20]), 0])
        expected = np.linalg.solve(augmented.T @ augmented + ridge, augmented.T @ y[:, voxel])
        np.testing.assert_allclose(weight[:, voxel], expected[:-1], atol=1e-4)
        assert bias[voxel].item() == pytest.approx(expected[-1], abs=1e-4)


def test_an_infinite_penalty_leaves_a_space_out():
    features, y = make_world()
    x = np.concatenate(list(features.values()), 1)
    penalties = np.full((2, 10), 5, np.float32)
    penalties[1] = np.inf
    weight, _ = solve_banded_ridge(x, [6, 20], y, penalties)
    alone, _ = solve_banded_ridge(features["first"], [6], y, penalties[:1])
    assert not weight[6:].any()
    np.testing.assert_allclose(weight[:6], alone, atol=1e-5)


def test_penalties_are_those_of_an_exhaustive_search():
    """himalaya's choice against the cross-validated error of every candidate."""
    features, y = make_world(120)
    x = np.concatenate(list(features.values()), 1)
    candidates, folds = (1.0, 10.0, 100.0), split_rows(len(y), 3, None, 0)
    chosen = choose_penalties(x, [6, 20], y, candidates, 1, folds)
    errors = []
    for penalty in candidates:
        predicted = predict_out_of_fold(x, [6, 20], y, np.full((2, 10), penalty), folds)
        # the mean over folds of each fold's mean error
        errors.append(np.mean([((y - predicted)[rows] ** 2).mean(0) for _, rows in folds], 0))
    expected = np.array(candidates)[np.argmin(errors, 0)]
    np.testing.assert_allclose(chosen[0], expected, rtol=1e-4)
    np.testing.assert_allclose(chosen[0], chosen[1], rtol=1e-6)


def test_a_banded_ridge_turns_to_the_space_that_a_voxel_follows():
    features, y = make_world(noise=2.0)
    options = {"spaces": SPACES, "penalties": np.logspace(-1, 3, 9)}
    one = encoding.fit_encoding_model(features, y, **options)
    banded = encoding.fit_encoding_model(features, y, n_mixtures=20, **options)
    ratio = banded.penalties[0] / banded.penalties[1]
    assert np.median(ratio[:4]) < 1 < np.median(ratio[4:8])
    np.testing.assert_allclose(one.penalties[0], one.penalties[1], rtol=1e-6)
    assert banded.score[:8].mean() > one.score[:8].mean()


def test_out_of_fold_rows_do_not_see_their_own_group():
    """Two rows of an image share their features: only grouped folds keep them apart."""
    rng = np.random.default_rng(0)
    features = {"first": np.repeat(rng.standard_normal((60, 100)), 2, 0).astype(np.float32)}
    y = np.repeat(rng.standard_normal((60, 5)), 2, 0).astype(np.float32)
    groups = np.repeat(np.arange(60), 2)
    options = {"spaces": SPACES, "penalties": (0.1, 1.0)}
    leaking = encoding.fit_encoding_model(features, y, **options)
    grouped = encoding.fit_encoding_model(features, y, groups, **options)
    assert leaking.total_score > 0.3 and grouped.total_score < 0.05
    for rows, left_out in split_rows(120, 4, groups, 1):
        assert not set(groups[rows]) & set(groups[left_out])


def test_score_and_residuals_belong_to_the_out_of_fold_predictions():
    features, y = make_world()
    fit = encoding.fit_encoding_model(features, y, spaces=SPACES)
    np.testing.assert_allclose(fit.residuals, y - fit.out_of_fold)
    expected = 1 - (fit.residuals**2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(fit.score, expected, atol=1e-5)
    assert (fit.score[:8] > 0.5).all() and (fit.score[8:] < 0.05).all()
    whole = 1 - (fit.residuals**2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert fit.total_score == pytest.approx(whole, rel=1e-5)
    features["first"] = features["first"][:-1]
    with pytest.raises(PerceptError, match="the same images in the same order"):
        encoding.fit_encoding_model(features, y)


def test_variance_partitioning_tells_unique_from_shared():
    rng = np.random.default_rng(0)
    common, own = rng.standard_normal((2, 500, 5))
    features = {"first": common, "second": np.concatenate([common, own], 1)}
    y = np.stack([common[:, 0], own[:, 0], common[:, 1] + own[:, 1]], 1)
    y = (y + 0.1 * rng.standard_normal(y.shape)).astype(np.float32)
    options = {"penalties": (1e-3, 1e-2, 0.1)}
    fit = encoding.fit_encoding_model(features, y, spaces=SPACES, **options)
    table = encoding.partition_variance(fit, features, y, **options)
    np.testing.assert_allclose(table["first unique"], [0, 0, 0], atol=0.02)
    np.testing.assert_allclose(table["second unique"], [0, 0.99, 0.5], atol=0.05)
    np.testing.assert_allclose(table["shared"], [0.99, 0, 0.5], atol=0.05)
    parts = table[["first unique", "second unique", "shared"]].sum(axis=1)
    np.testing.assert_allclose(parts, table["all"])


# the network drops a third of its inputs, which of four is much
@pytest.mark.parametrize(("readout", "least"), [("kernel", 0.4), ("mlp", 0.15)])
def test_nonlinear_readouts_predict_what_no_line_does(readout, least, monkeypatch):
    monkeypatch.setattr("src.encoding.nonlinear.EPOCHS", 60)
    monkeypatch.setattr("src.encoding.nonlinear.MAX_RATE", 3e-3)
    rng = np.random.default_rng(0)
    features = {"first": rng.standard_normal((600, 4)).astype(np.float32)}
    curved = np.abs(features["first"])
    y = (curved - curved.mean(0)).astype(np.float32)
    linear = encoding.fit_encoding_model(features, y, spaces=SPACES, folds=2)
    curved_fit = encoding.fit_encoding_model(features, y, spaces=SPACES, readout=readout, folds=2)
    assert linear.total_score < 0.05 and curved_fit.total_score > least
    predicted = curved_fit.model.predict(features).numpy()
    assert ((predicted - y) ** 2).mean() < (1 - least) * y.var()


def test_a_kernel_readout_solves_its_own_equations():
    rng = np.random.default_rng(0)
    features = {"first": rng.standard_normal((80, 5)).astype(np.float32)}
    y = rng.standard_normal((80, 3)).astype(np.float32)
    fit = encoding.fit_encoding_model(features, y, spaces=SPACES, readout="kernel")
    readout = fit.model.readout
    kernel = readout.compare().double().numpy()
    for voxel in range(3):
        matrix = kernel + fit.penalties[0, voxel] * np.eye(80)
        dual = np.linalg.solve(matrix, y[:, voxel] - y[:, voxel].mean())
        predicted = kernel @ dual + y[:, voxel].mean()
        np.testing.assert_allclose(fit.model.predict(features)[:, voxel], predicted, atol=1e-3)


# ------------------------------------------------------------------------------------------ noise
def test_draws_have_exactly_the_covariance_of_the_residuals():
    rng = np.random.default_rng(0)
    residuals = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6))
    noise = NoiseModel(residuals)
    expected = np.cov(residuals, rowvar=False, bias=True)
    np.testing.assert_allclose(noise.covariance().numpy(), expected, rtol=1e-4, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    draws = noise.draw(100_000, generator).numpy()
    np.testing.assert_allclose(np.cov(draws, rowvar=False), expected, atol=0.03 * expected.max())
    assert np.abs(draws.mean(0)).max() < 0.05
    again = noise.draw(100_000, torch.Generator().manual_seed(0))
    assert torch.equal(again, torch.from_numpy(draws))
    with pytest.raises(PerceptError, match="at least 2 images"):
        NoiseModel(residuals[:1])


def simulate_trials(n_images=3000, seed=0):
    """Trials with known covariances, 1 to 4 repeats an image, in random order."""
    rng = np.random.default_rng(seed)
    signal_map, noise_map = rng.standard_normal((2, 5, 5))
    signal_map[:, 3:] = 0
    signal_map = signal_map.T  # responses lie in the first axes, two voxels have no signal
    counts = rng.integers(1, 5, n_images)
    ids = np.repeat(np.arange(n_images), counts)
    responses = rng.standard_normal((n_images, 5)) @ signal_map.T
    trials = responses[ids] + rng.standard_normal((len(ids), 5)) @ noise_map.T
    order = rng.permutation(len(ids))
    return trials[order], ids[order], signal_map @ signal_map.T, noise_map @ noise_map.T


def test_signal_and_noise_are_those_of_a_simulated_truth():
    trials, ids, signal, noise = simulate_trials(20_000)
    parts = encoding.estimate_signal_and_noise(trials, ids)
    np.testing.assert_allclose(parts.noise, noise, atol=0.06 * noise.max())
    np.testing.assert_allclose(parts.signal, signal, atol=0.08 * signal.max())
    assert np.linalg.eigvalsh(parts.signal).min() > -1e-9
    assert parts.degrees == len(ids) - 20_000
    true = np.diag(signal) / (np.diag(signal) + np.diag(noise) / 3)
    np.testing.assert_allclose(parts.noise_ceiling(3), true, atol=0.05)


def test_the_noise_covariance_is_that_of_an_analysis_of_variance():
    trials, ids, _, _ = simulate_trials(40)
    parts = encoding.estimate_signal_and_noise(trials, ids, shrinkage=0.25)
    pooled = sum(
        (rows - rows.mean(0)).T @ (rows - rows.mean(0))
        for rows in (trials[ids == image] for image in np.unique(ids))
    ) / (len(ids) - 40)
    expected = 0.75 * pooled + 0.25 * np.diag(np.diag(pooled))
    np.testing.assert_allclose(parts.noise, expected, rtol=1e-9)


def test_without_repeats_there_is_no_telling():
    trials, _, _, _ = simulate_trials(40)
    with pytest.raises(PerceptError, match="tell no signal from noise"):
        encoding.estimate_signal_and_noise(trials, np.arange(len(trials)))
    with pytest.raises(PerceptError, match="between 0 and 1"):
        encoding.estimate_signal_and_noise(trials, np.zeros(len(trials)), 2.0)


def test_residuals_of_a_perfect_encoder_are_the_noise():
    """Linear truth, correlated noise: the noise model finds its covariance."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((4, 4))
    features = {"first": rng.standard_normal((4000, 3)).astype(np.float32)}
    noise = rng.standard_normal((4000, 4)) @ mixing.T
    y = (features["first"] @ rng.standard_normal((3, 4)) + noise).astype(np.float32)
    fit = encoding.fit_encoding_model(features, y, spaces=SPACES)
    truth = mixing @ mixing.T
    estimate = NoiseModel(fit.residuals).covariance().numpy()
    np.testing.assert_allclose(estimate, truth, atol=0.06 * truth.max())


# ------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("readout", ["linear", "kernel"])
def test_an_encoder_comes_back_as_it_was(tmp_path, readout):
    features, y = make_world(60)
    fit = encoding.fit_encoding_model(features, y, spaces=SPACES, readout=readout)
    noise = NoiseModel(fit.residuals)
    config = {"data": {"subj01": {"betas": "abc"}}}
    encoding.save_encoder(tmp_path, fit.model, noise, config)
    model, loaded_noise = encoding.load_encoder(tmp_path)
    assert torch.equal(model.predict(features), fit.model.predict(features))
    torch.testing.assert_close(loaded_noise.residuals, noise.residuals)
    assert encoding.read_encoder_config(tmp_path)["data"] == config["data"]


def test_a_model_refuses_features_that_it_was_not_fitted_to():
    features, y = make_world(60)
    model = encoding.fit_encoding_model(features, y, spaces=SPACES).model
    with pytest.raises(PerceptError, match="needs the feature space 'second'"):
        model.predict({"first": features["first"]})
    with pytest.raises(
        PerceptError, match="has 5 features and the encoding model was fitted with 6"
    ):
        model.predict(features | {"first": features["first"][:, :5]})


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(PerceptError, match="no encoding model at .*run notebook 01_train_encoder"):
        encoding.load_encoder(tmp_path)
    features, y = make_world(60)
    fit = encoding.fit_encoding_model(features, y, spaces=SPACES)
    encoding.save_encoder(tmp_path, fit.model, NoiseModel(fit.residuals[:, :4]))
    with pytest.raises(PerceptError, match="does not hold the residuals of the 10 voxels"):
        encoding.load_encoder(tmp_path)
    from safetensors.torch import save_file

    for config in ({}, {"encoder": {"spaces": {"first": [3]}, "n_voxels": 4}}):
        path = tmp_path / "encoder.safetensors"
        save_file({"x": torch.zeros(1)}, path, metadata={"config": json.dumps(config)})
        with pytest.raises(PerceptError, match="encoder.safetensors"):
            encoding.load_encoder(tmp_path)


def test_logarithmic_axes_have_plain_numbers():
    figure = plot_spectra({"signal": np.diag([100.0, 10.0, 1.0, 0.1]), "noise": np.eye(4)})
    figure.canvas.draw()
    (axes,) = figure.axes
    labels = [text.get_text() for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert {"1", "100"} <= set(labels) and not any("$" in label for label in labels)

"""src.data.normaliser and src.data.reliability: z-scores, components, regions, noise ceilings."""

import warnings

import numpy as np
import pandas as pd
import pytest

from src.data.batches import BrainDataset
from src.data.images import write_images
from src.data.layout import write_subject
from src.data.normaliser import Normaliser, compute_moments
from src.data.reliability import estimate_noise_ceiling
from src.data.subject import open_subject
from src.utils import PerceptError
from tests.toy_data import (
    ATTRIBUTES,
    FLAGS,
    N_VOXELS,
    add_regions,
    make_trials,
    make_world,
    prepare,
)


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def test_noise_ceiling_recovers_what_was_simulated(tmp_path):
    rng = np.random.default_rng(3)
    trials = make_trials(n_images=600, sessions=3)
    signal_share = np.array([0.0, 0.1, 0.3, 0.6, 0.9])
    image = ((trials["image"] - 100) // 3).to_numpy()
    signal = rng.standard_normal((600, 5))[image] * np.sqrt(signal_share)
    betas = 4 * (signal + rng.standard_normal((len(trials), 5)) * np.sqrt(1 - signal_share)) + 10
    betas = np.concatenate([betas, np.full((len(betas), 1), 2.0)], 1)  # and a constant voxel
    write_images(
        tmp_path / "images.h5", np.zeros((600, 1, 1, 3), np.uint8), np.unique(trials["image"])
    )
    write_subject(tmp_path / "subj01", betas, trials, None, ATTRIBUTES)
    subject = open_subject(tmp_path, 1)
    with pytest.warns(UserWarning, match="1 of 6 voxels"):
        single, of_three = (
            estimate_noise_ceiling(subject),
            estimate_noise_ceiling(subject, repeats=3),
        )
    np.testing.assert_allclose(single["noise_ceiling"][:5], signal_share, atol=0.06)
    ncsnr = single["ncsnr"].to_numpy()
    np.testing.assert_allclose(
        of_three["noise_ceiling_percent"], 100 * ncsnr**2 / (ncsnr**2 + 1 / 3), rtol=1e-6
    )
    assert single.iloc[5].tolist() == [0, 0, 0]
    with pytest.raises(PerceptError, match="at least 1"):
        estimate_noise_ceiling(subject, 0)


def test_noise_ceiling_by_the_published_recipe(world):
    """With three repeats of every training image: noise variance = mean over images of the variance
    over repeats (ddof 1).
    """
    x, ids = world.subject.get_trials("train", Normaliser.fit(world.subject))
    noise = np.mean([x[ids == i].var(0, ddof=1) for i in np.unique(ids)], axis=0)
    ncsnr = np.sqrt(np.maximum(1 - noise, 0)) / np.sqrt(noise)
    np.testing.assert_allclose(
        estimate_noise_ceiling(world.subject)["ncsnr"], ncsnr, rtol=1e-4, atol=1e-5
    )


def test_noise_ceiling_needs_repeats(tmp_path):
    prepare(tmp_path, repeats=1)
    with pytest.raises(PerceptError, match="shown twice"):
        estimate_noise_ceiling(open_subject(tmp_path, 1))


@pytest.mark.parametrize("by_session", [True, False])
def test_normaliser_against_numpy_on_training_trials_only(world, by_session):
    normaliser = Normaliser.fit(world.subject, by_session)
    out = normaliser.apply(world.betas, world.trials["session"])
    train, session = (
        (world.trials["split"] == "train").to_numpy(),
        world.trials["session"].to_numpy(),
    )
    for s in (0, 1):
        is_fitted = train & (session == s) if by_session else train
        x = world.betas[is_fitted].astype(np.float64)
        in_session = session == s
        np.testing.assert_allclose(
            out[in_session], (world.betas[in_session] - x.mean(0)) / x.std(0), rtol=1e-4, atol=1e-5
        )
    changed = world.betas.copy()
    changed[~train] = 1e4
    write_subject(world.folder / "subj02", changed, world.trials, None, ATTRIBUTES)
    other = Normaliser.fit(open_subject(world.folder, 2), by_session)
    np.testing.assert_array_equal(other.mean, normaliser.mean)
    np.testing.assert_array_equal(other.std, normaliser.std)


def test_moments_are_exact_far_from_zero_and_in_half_precision():
    rng = np.random.default_rng(0)
    betas = (20_000 + 16 * rng.integers(-4, 5, (700, 3))).astype(np.float16)
    mean, std = compute_moments(betas, np.arange(700))
    np.testing.assert_allclose(mean, betas.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, betas.astype(np.float64).std(0), rtol=1e-9)


@pytest.mark.parametrize("by_session", [True, False])
def test_normaliser_is_saved_and_loaded(world, tmp_path, by_session):
    normaliser = Normaliser.fit(world.subject, by_session)
    normaliser.save(tmp_path / "n.safetensors")
    loaded = Normaliser.load(tmp_path / "n.safetensors")
    sessions = world.trials["session"].to_numpy()
    np.testing.assert_array_equal(
        loaded.apply(world.betas, sessions), normaliser.apply(world.betas, sessions)
    )
    assert (loaded.sessions is None) is not by_session
    with pytest.raises(PerceptError, match="missing"):
        Normaliser.load(tmp_path / "absent.safetensors")
    (tmp_path / "bad").write_bytes(b"not safetensors")
    with pytest.raises(PerceptError, match="no safetensors"):
        Normaliser.load(tmp_path / "bad")


def test_normaliser_refusals(world):
    normaliser = Normaliser.fit(world.subject)
    with pytest.raises(PerceptError, match=r"\(trials, 7\) voxels"):
        normaliser.apply(np.zeros((2, N_VOXELS + 1)), [0, 0])
    with pytest.raises(PerceptError, match="session 9.*by_session=False"):
        normaliser.apply(np.zeros((1, N_VOXELS)), [9])
    trials = world.trials.copy()
    trials.loc[trials["split"] == "test", "session"] = 5
    write_subject(world.folder / "subj02", world.betas, trials, None, ATTRIBUTES)
    subject = open_subject(world.folder, 2)
    with pytest.warns(UserWarning, match=r"Sessions \[5\].*with all training trials"):
        by_session = Normaliser.fit(subject)
    together, rows = Normaliser.fit(subject, by_session=False), subject.rows_by_image("test")[0]
    np.testing.assert_array_equal(
        subject.get_betas(rows, by_session), subject.get_betas(rows, together)
    )  # nothing of the test trials themselves
    write_subject(
        world.folder / "subj02", world.betas, trials.assign(split="test"), None, ATTRIBUTES
    )
    with pytest.raises(PerceptError, match="no training trials"):
        Normaliser.fit(open_subject(world.folder, 2))


def test_constant_voxels_are_counted_and_become_zero(world):
    betas = world.betas.copy()
    betas[:, 2], betas[:, 5] = 0.1, 0
    write_subject(world.folder / "subj02", betas, world.trials, None, ATTRIBUTES)
    subject = open_subject(world.folder, 2)
    with pytest.warns(UserWarning, match="2 of 7 voxels"):
        normaliser = Normaliser.fit(subject)
    out = normaliser.apply(betas, world.trials["session"])
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:, [2, 5]], 0, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Normaliser.fit(world.subject)


def write_with_components(world, betas, trials=None):
    """Those betas as subject 2 of the same images, and a normaliser of three components."""
    write_subject(
        world.folder / "subj02", betas, world.trials if trials is None else trials, None, ATTRIBUTES
    )
    subject = open_subject(world.folder, 2)
    return subject, Normaliser.fit(subject, n_components=3)


@pytest.mark.parametrize("by_session", [True, False])
def test_components_are_those_of_an_svd_of_the_z_scored_training_trials(world, by_session):
    plain, normaliser = (
        Normaliser.fit(world.subject, by_session),
        Normaliser.fit(world.subject, by_session, n_components=3),
    )
    z, _ = world.subject.get_trials("train", plain)
    left, _, _ = np.linalg.svd(z.astype(np.float64), full_matrices=False)
    scores, ids = world.subject.get_trials("train", normaliser)
    assert (
        scores.shape == (len(z), 3)
        and scores.dtype == np.float32
        and normaliser.n_features == world.subject.n_features(normaliser) == 3
    )
    for k in range(3):
        expected = (
            left[:, k] * np.sqrt(len(z)) * np.sign(left[:, k] @ scores[:, k])
        )  # of unit variance
        np.testing.assert_allclose(scores[:, k], expected, atol=2e-4)
    np.testing.assert_allclose(scores.std(0), 1, rtol=1e-5)
    assert (
        plain.n_features == world.subject.n_features() == N_VOXELS
        and Normaliser.fit(world.subject).components is None
    )


def test_components_keep_nearly_the_most_variance_where_the_spectrum_is_flat(tmp_path):
    rng, trials = np.random.default_rng(5), make_trials(n_images=200)
    betas = (rng.standard_normal((600, 30)) * np.arange(60, 30, -1) / 60) @ rng.standard_normal(
        (30, 400)
    ) + 3 * rng.standard_normal((600, 400))
    write_images(
        tmp_path / "images.h5", np.zeros((200, 1, 1, 3), np.uint8), np.unique(trials["image"])
    )
    write_subject(tmp_path / "subj01", betas, trials, None, ATTRIBUTES)
    subject = open_subject(tmp_path, 1)
    z, _ = subject.get_trials("train", Normaliser.fit(subject))
    largest_variance = (np.linalg.svd(z, compute_uv=False)[:20] ** 2).sum()
    axes, _ = np.linalg.qr(Normaliser.fit(subject, n_components=20).components)
    assert ((z @ axes) ** 2).sum() > 0.9995 * largest_variance


def test_test_and_validation_trials_do_not_move_the_components(world):
    train = (world.trials["split"] == "train").to_numpy()
    _, one = write_with_components(world, world.betas)
    _, other = write_with_components(
        world, np.where(train[:, None], world.betas, 1e3 * world.betas[::-1])
    )
    np.testing.assert_array_equal(one.components, other.components)


def test_averaging_and_projecting_commute(world):
    subject, normaliser = write_with_components(world, world.betas)
    plain, _ = subject.get_mean_betas("val", normaliser=Normaliser.fit(subject))
    projected, _ = subject.get_mean_betas("val", normaliser=normaliser)
    assert projected.shape == (3, 3)
    np.testing.assert_allclose(projected, plain @ normaliser.components, atol=1e-5)
    for repeats, shape in (("mean", (2, 3)), ("random", (2, 3)), ("all", (2, 3, 3))):
        assert (
            BrainDataset(subject, "train", {}, normaliser, repeats)
            .__getitems__([0, 1])["voxels"]
            .shape
            == shape
        )


def test_components_are_saved_with_the_normaliser(world, tmp_path):
    subject, normaliser = write_with_components(world, world.betas)
    normaliser.save(tmp_path / "n.safetensors")
    loaded = Normaliser.load(tmp_path / "n.safetensors")
    assert loaded.n_features == 3
    np.testing.assert_array_equal(
        subject.get_mean_betas("test", normaliser=loaded)[0],
        subject.get_mean_betas("test", normaliser=normaliser)[0],
    )


@pytest.mark.filterwarnings("ignore:.*do not vary")
def test_components_refusals(world):
    for k in (N_VOXELS + 1, -1):
        with pytest.raises(
            PerceptError, match=f"n_components is {k}: choose 0 for all voxels, or at most 7"
        ):
            Normaliser.fit(world.subject, n_components=k)
    betas = world.betas.copy()
    betas[:, 2:] = betas[:, :1]
    with pytest.raises(
        PerceptError, match="n_components is 3, but the training trials vary in 2 dimensions only"
    ):
        write_with_components(world, betas)
    with pytest.raises(PerceptError, match="vary in 0 dimensions"):
        write_with_components(world, np.zeros_like(betas))
    with pytest.raises(PerceptError, match="noise ceiling is of voxels"):
        estimate_noise_ceiling(
            world.subject, normaliser=Normaliser.fit(world.subject, n_components=2)
        )


@pytest.fixture
def regions(world):
    return add_regions(world)


@pytest.mark.parametrize(
    ("rois", "columns"), [("V1", [0, 2]), ("V2, V1", [0, 2, 5]), ("FFA,V1,V1", [0, 2, 6])]
)
def test_regions_select_their_own_voxels_and_no_others(world, regions, tmp_path, rois, columns):
    all_voxels, selecting = Normaliser.fit(world.subject), Normaliser.fit(regions, rois=rois)
    selecting.save(tmp_path / "n.safetensors")
    loaded = Normaliser.load(tmp_path / "n.safetensors")
    sessions = world.trials["session"].to_numpy()
    for normaliser in (selecting, loaded):
        np.testing.assert_array_equal(
            normaliser.apply(world.betas, sessions),
            all_voxels.apply(world.betas, sessions)[:, columns],
        )
        assert (
            normaliser.columns.tolist() == columns
            and normaliser.n_features == regions.n_features(normaliser) == len(columns)
        )
    assert loaded.rois == tuple(dict.fromkeys(name.strip() for name in rois.split(",")))
    np.testing.assert_array_equal(
        regions.get_mean_betas("test", normaliser=loaded)[0],
        world.subject.get_mean_betas("test", normaliser=all_voxels)[0][:, columns],
    )
    assert BrainDataset(regions, "train", {}, loaded, "all").__getitems__([1, 0])[
        "voxels"
    ].shape == (2, 3, len(columns))
    with pytest.raises(
        PerceptError, match=r"\(trials, 7\) voxels"
    ):  # whole rows, not the selected voxels
        loaded.apply(world.betas[:, columns], sessions)
    ceiling = estimate_noise_ceiling(world.subject).iloc[columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(estimate_noise_ceiling(regions, normaliser=loaded), ceiling)


def test_components_are_of_the_regions_alone(world, regions, tmp_path):
    normaliser = Normaliser.fit(regions, rois="V1,V2", n_components=2)
    assert normaliser.components.shape == (3, 2) and normaliser.n_features == 2
    z = Normaliser.fit(regions, rois="V1,V2").apply(world.betas, world.trials["session"])
    np.testing.assert_allclose(
        normaliser.apply(world.betas, world.trials["session"]), z @ normaliser.components, atol=1e-6
    )
    with pytest.raises(PerceptError, match="at most 3"):
        Normaliser.fit(regions, rois="V1,V2", n_components=4)
    normaliser.save(tmp_path / "n.safetensors")
    np.testing.assert_array_equal(
        regions.get_mean_betas("test", normaliser=Normaliser.load(tmp_path / "n.safetensors"))[0],
        regions.get_mean_betas("test", normaliser=normaliser)[0],
    )


def test_regions_that_are_missing_are_named(world, regions):
    with pytest.warns(UserWarning, match="no region hV4, PPA: 'V1' is what is taken"):
        assert Normaliser.fit(regions, rois="hV4,V1,PPA").columns.tolist() == FLAGS["V1"]
    with pytest.raises(PerceptError, match="none of the regions 'hV4,x': it has V1, V2, FFA"):
        Normaliser.fit(regions, rois="hV4,x")
    with pytest.raises(PerceptError, match="no named region"):
        Normaliser.fit(world.subject, rois="V1")


def test_masked_regions_keep_their_places(world, regions, tmp_path):
    masked, selecting = (
        Normaliser.fit(regions, rois="V1,V2", masked=True),
        Normaliser.fit(regions, rois="V1,V2"),
    )
    masked.save(tmp_path / "n.safetensors")
    sessions = world.trials["session"].to_numpy()
    for normaliser in (masked, Normaliser.load(tmp_path / "n.safetensors")):
        z = normaliser.apply(world.betas, sessions)
        assert normaliser.n_features == N_VOXELS == z.shape[1] and normaliser.rois == ("V1", "V2")
        np.testing.assert_array_equal(z[:, [0, 2, 5]], selecting.apply(world.betas, sessions))
        assert not z[:, [1, 3, 4, 6]].any()
    assert regions.get_mean_betas("test", normaliser=masked)[0].shape[1] == N_VOXELS
    with pytest.raises(PerceptError, match="masked"):
        Normaliser.fit(regions, rois="V1,V2", masked=True, n_components=2)

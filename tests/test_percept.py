"""Percept's decoder: components of targets, simulated measurements, the pool and its checks."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from toy_data import N_VOXELS, make_world

from src.data import BrainDataset, Normaliser
from src.decoding import predict_latents, predict_tokens, predicts_both_levels
from src.encoding import EncodingModel, open_run_encoder, save_encoder, target_pca
from src.encoding import pool as pools
from src.encoding.noise import NoiseModel
from src.encoding.pool import ImagePool, check_pool, find_overlap, open_pool
from src.encoding.simulation import MeasuredAndSimulated, draw_noise_bank, simulate_responses
from src.encoding.target_pca import TargetSet, fit_target_basis
from src.models import PerceptDecoder
from src.networks import build_decoder
from src.search import write_tars
from src.training import Batching, Checkpointing, Execution, Optimisation, fit
from src.utils import PerceptError


class Rows:
    """Targets by image id, as `TargetCache` gives them."""

    def __init__(self, targets):
        self.targets = targets

    def rows(self, image_ids):
        return self.targets[image_ids]


def make_targets(n=300, shape=(5, 8), seed=0):
    """Targets (n, *shape) that vary most along few directions."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    spread = 3.0 / (1 + np.arange(size))
    rotation = np.linalg.qr(rng.standard_normal((size, size)))[0]
    flat = rng.standard_normal((n, size)) * spread @ rotation + 2
    return flat.reshape(n, *shape).astype(np.float32)


# ---------------------------------------------------------------------------- components of targets
@pytest.mark.parametrize("exact_dim", [4096, 10])
def test_components_are_those_of_sklearn(monkeypatch, exact_dim):
    """Exactly, and by the randomised algorithm over blocks."""
    monkeypatch.setattr(target_pca, "EXACT_DIM", exact_dim)
    monkeypatch.setattr(target_pca, "BLOCK_NUMBERS", 1000)  # 25 images at a time
    monkeypatch.setattr(target_pca, "OVERSAMPLING", 10)
    targets = make_targets()
    basis = fit_target_basis(TargetSet(Rows(targets), np.arange(300)), n_components=6)
    expected = PCA(6).fit(targets.reshape(300, -1))
    cosines = (basis.components.numpy() * expected.components_).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)
    np.testing.assert_allclose(basis.variances, expected.explained_variance_ * 299 / 300, rtol=1e-4)
    np.testing.assert_allclose(basis.mean, expected.mean_, rtol=1e-5)
    assert basis.explained == pytest.approx(expected.explained_variance_ratio_.sum(), rel=1e-4)
    gram = basis.components @ basis.components.T
    torch.testing.assert_close(gram, torch.eye(6), atol=1e-5, rtol=0)


def test_further_images_widen_the_components_about_the_training_mean():
    targets = make_targets()
    training, further = np.arange(100), np.arange(100, 300)
    rows = Rows(targets)
    basis = fit_target_basis(TargetSet(rows, training), [TargetSet(rows, further)], 40)
    flat = targets.reshape(300, -1).astype(np.float64)
    mean = flat[:100].mean(0)
    np.testing.assert_allclose(basis.mean, mean, rtol=1e-5)
    values = np.linalg.eigvalsh((flat - mean).T @ (flat - mean) / 300)[::-1]
    np.testing.assert_allclose(basis.variances, values[:40], rtol=1e-3)


def test_targets_that_are_all_alike_are_refused():
    same = Rows(np.ones((10, 4), np.float32))
    with pytest.raises(PerceptError, match="targets of all images are the same"):
        fit_target_basis(TargetSet(same, np.arange(10)))
    with pytest.raises(PerceptError, match="at least 2 images"):
        fit_target_basis(TargetSet(same, np.arange(1)))


# ------------------------------------------------------------------------------------------ decoder
def make_decoder(tokens, latents, count=300, **options):
    """A decoder whose bases keep everything of tokens (n, 5, 8) and latents (n, 2, 3, 3)."""
    ids = np.arange(count)
    token_basis, latent_basis = (
        fit_target_basis(TargetSet(Rows(targets), ids), n_components=40)
        for targets in (tokens, latents)
    )
    decoder = PerceptDecoder(
        N_VOXELS, (5, 8), 40, (2, 3, 3), len(latent_basis.components), h=16, **options
    )
    decoder.set_bases(
        *((basis.mean, basis.components, basis.variances) for basis in (token_basis, latent_basis))
    )
    return decoder.eval()


def test_components_lead_back_to_tokens_and_latents():
    tokens, latents = make_targets(), make_targets(shape=(2, 3, 3), seed=1)
    decoder = make_decoder(tokens, latents)
    t, z = torch.from_numpy(tokens), torch.from_numpy(latents)
    components = decoder.encode_targets(t, z)
    torch.testing.assert_close(decoder.decode_tokens(components), t, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoder.decode_latents(components), z, atol=1e-4, rtol=1e-4)
    variances = components.square().mean(0)
    assert float(variances[40:].sum() / variances[:40].sum()) == pytest.approx(0.5, rel=1e-4)
    loss = decoder.compute_loss(torch.zeros_like(components), components)
    assert float(loss) == pytest.approx(1.5, rel=1e-4)


def test_an_untrained_decoder_predicts_the_mean_and_is_rebuilt_from_its_config():
    tokens, latents = make_targets(), make_targets(shape=(2, 3, 3), seed=1)
    decoder = make_decoder(tokens, latents)
    x = torch.randn(4, N_VOXELS)
    torch.testing.assert_close(
        decoder.predict_tokens(x), torch.from_numpy(tokens.mean(0)).expand(4, -1, -1)
    )
    rebuilt = build_decoder(decoder.config)
    rebuilt.load_state_dict(decoder.state_dict())
    torch.testing.assert_close(rebuilt.eval()(x), decoder(x))
    with pytest.raises(PerceptError, match="reads 7 voxels"):
        decoder(torch.randn(4, 3))


def test_the_linear_path_moves_a_tenth_as_far():
    """One step of Adam moves each weight by the learning rate; the map it makes, by a tenth."""
    decoder = make_decoder(make_targets(), make_targets(shape=(2, 3, 3), seed=1))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, weight_decay=0)
    decoder.compute_loss(decoder(torch.randn(8, N_VOXELS)), torch.randn(8, 58)).backward()
    optimizer.step()
    probe = torch.zeros(2, N_VOXELS)
    probe[1, 0] = 1
    for layer in decoder.input:
        if hasattr(layer, "weight"):
            layer.weight.data.zero_()  # leaves the linear path alone
    change = (decoder(probe)[1] - decoder(probe)[0]).abs()
    torch.testing.assert_close(change, torch.full_like(change, 1e-3), rtol=1e-3, atol=1e-6)


def test_a_decoder_of_tokens_alone_has_no_latents():
    decoder = PerceptDecoder(N_VOXELS, (5, 8), 10, h=16)
    assert decoder(torch.randn(2, N_VOXELS)).shape == (2, 10)
    with pytest.raises(PerceptError, match="predicts tokens alone"):
        decoder.predict_latents(torch.randn(2, N_VOXELS))
    with pytest.raises(PerceptError, match="give both, or neither"):
        PerceptDecoder(N_VOXELS, (5, 8), 10, (4, 2, 2), 0)
    with pytest.raises(PerceptError, match="has room for"):
        decoder.set_bases((torch.zeros(40), torch.zeros(3, 40), torch.ones(3)))


# ------------------------------------------------------------------------- simulated measurements
@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path / "toy")


def make_samples(world, samples=20, share=0.3, seed=3):
    """Samples of which components say what they are of: -1 - trial, or image of the pool."""
    measured = BrainDataset(world.subject, "train", repeats="each")
    trials = -1 - np.arange(len(measured), dtype=np.float32)[:, None]
    responses = np.repeat(np.arange(6, dtype=np.float16)[:, None], N_VOXELS, 1)
    noise = np.repeat(np.arange(1, 5, dtype=np.float16)[:, None] / 8, N_VOXELS, 1)
    images = np.arange(6, dtype=np.float32)[:, None]
    return MeasuredAndSimulated(measured, trials, responses, images, noise, samples, share, seed)


def test_samples_are_measured_trials_and_responses_with_noise(world):
    data = make_samples(world)
    batch = data.__getitems__(list(range(20)))
    assert batch["simulated"].tolist() == [False] * 6 + [True] * 14
    for voxels, component, simulated in zip(*batch.values(), strict=True):
        if simulated:
            noise = voxels[0] - component
            assert (voxels == voxels[0]).all() and float(noise) in (0.125, 0.25, 0.375, 0.5)
        else:
            trial = int(-1 - component)
            expected = data.measured.__getitems__([trial])["voxels"][0]
            torch.testing.assert_close(voxels, expected)


def test_trials_and_images_are_shown_equally_often(world):
    """Whatever the length of an epoch: 14 simulated samples an epoch, 6 images; 6 of 18 trials."""
    data, images, trials = make_samples(world), [], []
    for epoch in range(6):
        data.set_epoch(epoch)
        batch = data.__getitems__(list(range(20)))
        images += batch["components"][batch["simulated"]].flatten().tolist()
        trials += batch["components"][~batch["simulated"]].flatten().tolist()
    assert np.bincount(np.array(images, int)).tolist() == [14] * 6
    assert sorted(trials) == sorted(2 * [-1.0 - t for t in range(18)])


def test_a_sample_is_a_function_of_seed_epoch_and_position(world):
    one, other = make_samples(world), make_samples(world)
    for data, epochs in ((one, (0, 1, 2)), (other, (2,))):
        for epoch in epochs:
            data.set_epoch(epoch)
    whole, rows = one.__getitems__(list(range(20))), [17, 2, 9]
    part = other.__getitems__(rows)
    for name, values in part.items():
        torch.testing.assert_close(values, whole[name][[2, 17, 9]])  # measured trials come first
    different = make_samples(world, seed=4)
    different.set_epoch(2)
    assert not torch.equal(different.__getitems__(list(range(20)))["voxels"], whole["voxels"])


def test_all_measured_needs_no_pool_and_nothing_measured_no_trials(world):
    measured = make_samples(world, share=1.0).__getitems__([0, 1])
    assert not measured["simulated"].any()
    assert make_samples(world, share=0.0).__getitems__([0, 1])["simulated"].all()
    with pytest.raises(PerceptError, match="choose it from 0 to 1"):
        make_samples(world, share=1.2)


def test_responses_and_noise_are_those_of_the_encoder():
    residuals = np.random.default_rng(0).standard_normal((50, 3)) @ np.diag([1.0, 2.0, 3.0])
    bank = draw_noise_bank(NoiseModel(residuals), 20_000).astype(np.float32)
    centred = residuals - residuals.mean(0)
    covariance = centred.T @ centred / 50
    np.testing.assert_allclose(np.cov(bank.T), covariance, atol=0.05 * covariance.max())
    weights = torch.randn(1, 3)
    responses = simulate_responses(
        lambda ids: torch.from_numpy(ids)[:, None] * weights, np.arange(3.0)
    )
    np.testing.assert_allclose(responses, np.arange(3)[:, None] * weights.numpy(), rtol=2e-3)
    with pytest.raises(PerceptError, match="not finite in half precision"):
        simulate_responses(lambda ids: torch.full((len(ids), 2), 1e6), np.arange(3))


# --------------------------------------------------------------------------------------------- pool
def embed(images):
    """Colours of the four quarters: an embedding that a slight change leaves nearly as it is."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1).numpy()


@pytest.fixture
def folder(world, tmp_path):
    """Ten images that no subject saw."""
    rng = np.random.default_rng(7)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


def test_the_training_images_are_a_pool(world):
    pool = open_pool("train", world.subject)
    assert pool.image_ids.tolist() == world.subject.image_ids("train").tolist()
    assert check_pool(pool, world.subject, embed) is pool
    assert len(open_pool("train", world.subject, count=2)) == 2


def test_a_folder_is_a_pool_and_is_read_once(world, folder, monkeypatch):
    pool = open_pool(str(folder), world.subject)
    assert len(pool) == 10 and pool.images(pool.image_ids[:2]).shape == (2, 4, 4, 3)
    assert pool.folder.parent.name == "targets"
    monkeypatch.setattr(pools, "_write_pool", None)
    again = open_pool(str(folder), world.subject)
    assert again.identity == pool.identity and len(open_pool(str(folder), world.subject, 0)) == 10


@pytest.mark.parametrize("change", ["none", "compressed", "mirrored"])
def test_test_images_in_a_pool_are_refused(world, tmp_path, change):
    """As they are, with slightly other pixels, and mirrored."""
    images = world.subject.images(world.subject.image_ids("test"))[:, :, :4]
    if change == "compressed":
        images = np.clip(
            images.astype(int) + np.random.default_rng(0).integers(-3, 4, images.shape), 0, 255
        )
    if change == "mirrored":
        images = images[:, :, ::-1]
    store = ImagePool("given", tmp_path, np.arange(3))
    pools.write_images(tmp_path / "images.h5", images.astype(np.uint8), np.arange(3))
    square = world.subject
    square.images = lambda ids: world.images[np.searchsorted(world.ids, ids)][:, :, :4]
    overlap = find_overlap(store, square, embed, near_duplicate=1.1)
    assert overlap.by_pixels.tolist() == [0, 1, 2] and not len(overlap.by_embedding)
    with pytest.raises(PerceptError, match="holds 3 of its 3 images that must not be trained on"):
        check_pool(store, square, embed)


def test_near_duplicates_by_embedding_are_dropped_where_that_is_asked_for(world, tmp_path):
    square = world.subject
    square.images = lambda ids: world.images[np.searchsorted(world.ids, ids)][:, :, :4]
    test = square.images(square.image_ids("test"))[:1].astype(float)
    darker = (test * 0.8).astype(np.uint8)  # other pixels, nearly the same embedding
    other = np.random.default_rng(5).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    pools.write_images(tmp_path / "images.h5", np.concatenate([darker, other]), np.arange(3))
    pool = ImagePool("given", tmp_path, np.arange(3))

    def direction(images):
        values = embed(images)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    overlap = find_overlap(pool, square, direction, near_duplicate=0.99)
    assert overlap.by_embedding.tolist() == [0] and not len(overlap.by_pixels)
    kept = check_pool(pool, square, direction, 0.99, overlap="drop")
    assert kept.image_ids.tolist() == [1, 2]
    with pytest.raises(PerceptError, match="choose one of refuse, drop"):
        check_pool(pool, square, direction, overlap="ignore")


def test_held_out_combinations_are_refused(world, tmp_path):
    ids = world.subject.image_ids("train+val+test")
    colours = np.where(np.isin(ids, world.subject.image_ids("test")), "red", "blue")
    table = pd.DataFrame({"image": ids, "colour": colours, "kind": "boat"})
    table.to_parquet(world.folder / "labels.parquet")
    rng = np.random.default_rng(3)
    samples = [
        (rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), "", {"colour": colour, "kind": "boat"})
        for colour in ("blue", "red", "blue")
    ]
    tars = write_tars(samples, tmp_path / "tars", 3)
    pool = open_pool(str(tars), world.subject)
    assert pool.labels["colour"].tolist() == ["blue", "red", "blue"]
    overlap = find_overlap(pool, world.subject, embed, 1.1, "kind, colour")
    assert overlap.by_combination.tolist() == [1]
    with pytest.raises(PerceptError, match="1 with a combination of labels that is held out"):
        check_pool(pool, world.subject, embed, 1.1, "kind, colour")
    unlabelled = ImagePool("plain", pool.folder, pool.image_ids)
    with pytest.raises(PerceptError, match="have no labels colour"):
        find_overlap(unlabelled, world.subject, embed, 1.1, "colour")


def test_a_pool_without_an_image_is_refused(world, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no image")
    with pytest.raises(PerceptError, match="holds no image that can be read"):
        open_pool(str(tmp_path / "bad"), world.subject)
    with pytest.raises(PerceptError, match="it is for the mini world"):
        open_pool("mini", world.subject)


# ----------------------------------------------------------------------------- encoder and decoding
def make_encoder(world, spaces=("tokens",)):
    """A linear stand-in for a fitted encoding model, and its noise."""
    sizes = {name: [40, 5] for name in spaces}
    model = EncodingModel(sizes, N_VOXELS)
    generator = torch.Generator().manual_seed(0)
    for buffer in model.state_dict().values():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model, NoiseModel(np.random.default_rng(0).standard_normal((20, N_VOXELS)))


PARAMETERS = {
    "split": "images",
    "n_clusters": 20,
    "num_sessions": 0,
    "rois": "",
    "clip_variant": "ViT-L/14",
    "norm_embs": True,
    "weights": "mini",
}


def test_the_encoder_of_a_run_measures_images(world, tmp_path):
    model, noise = make_encoder(world)
    data = {world.subject.key: world.subject.identity}
    save_encoder(tmp_path, model, noise, {"data": data, "training": {"rois": ""}})
    normaliser = Normaliser.fit(world.subject)
    instrument, read = open_run_encoder(tmp_path, world.subject, normaliser, PARAMETERS)
    tokens = make_targets(3)
    measured = instrument.measure(np.zeros((3, 4, 4, 3), np.uint8), tokens)
    expected = model.predict({"tokens": tokens.reshape(3, -1)})
    torch.testing.assert_close(measured, expected)
    torch.testing.assert_close(read.residuals, noise.residuals)


def test_an_encoder_of_other_voxels_or_settings_is_refused(world, tmp_path):
    model, noise = make_encoder(world)
    normaliser = Normaliser.fit(world.subject)
    trained = {"training": {"num_sessions": 1}, "clip": {"norm_embs": False}}
    save_encoder(tmp_path / "sessions", model, noise, trained)
    with pytest.raises(PerceptError, match="trained with num_sessions 1, here it is 0"):
        open_run_encoder(tmp_path / "sessions", world.subject, normaliser, PARAMETERS)
    save_encoder(tmp_path / "tokens", model, noise, {"clip": {"norm_embs": False}})
    with pytest.raises(PerceptError, match="trained with norm_embs False"):
        open_run_encoder(tmp_path / "tokens", world.subject, normaliser, PARAMETERS)
    save_encoder(tmp_path / "labels", *make_encoder(world, ("tokens", "captions")), {})
    with pytest.raises(PerceptError, match="reads captions"):
        open_run_encoder(tmp_path / "labels", world.subject, normaliser, PARAMETERS)
    with pytest.raises(PerceptError, match="no encoding model"):
        open_run_encoder(tmp_path / "none", world.subject, normaliser, PARAMETERS)


def test_tokens_and_latents_are_decoded_by_one_network():
    decoder = make_decoder(make_targets(), make_targets(shape=(2, 3, 3), seed=1))
    torch.nn.init.normal_(decoder.head.weight)
    voxels = np.random.default_rng(2).standard_normal((5, N_VOXELS)).astype(np.float32)
    tokens, projected = predict_tokens(decoder, voxels, (5, 8), batch_size=2)
    torch.testing.assert_close(tokens[:, 0], decoder.predict_tokens(torch.from_numpy(voxels)))
    torch.testing.assert_close(projected, tokens[:, 0])
    latents = predict_latents(decoder, voxels, (2, 3, 3), batch_size=2)
    torch.testing.assert_close(latents, decoder.predict_latents(torch.from_numpy(voxels)))
    assert predicts_both_levels(decoder)
    assert not predicts_both_levels(PerceptDecoder(N_VOXELS, (5, 8), 4, h=8))
    assert not predicts_both_levels(None)


def test_an_interrupted_training_on_simulated_trials_ends_with_the_same_bits(world, tmp_path):
    def train(folder, fail_at=-1):
        torch.manual_seed(0)
        model = PerceptDecoder(N_VOXELS, (5, 8), 1, h=8)
        steps = []

        def step(model, batch, epoch):
            steps.append(epoch)
            if len(steps) == fail_at:
                raise RuntimeError("a crash")
            return model.compute_loss(model(batch["voxels"]), batch["components"]), {}

        fit(
            model,
            step,
            make_samples(world),
            folder=folder,
            config={},
            batching=Batching(3, 5),
            optimisation=Optimisation(1e-2, weight_average=0.9),
            execution=Execution("cpu"),
            checkpointing=Checkpointing(save_steps=1),
        )
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="a crash"):
        train(tmp_path / "stopped", fail_at=7)
    resumed = train(tmp_path / "stopped")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

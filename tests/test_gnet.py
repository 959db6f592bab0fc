"""GNet and brain correlation: released keys and shapes, formulas written down a second time, files,
and what the mini world's encoder is worth.
"""

import collections
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import pearsonr
from torch import nn

from src import miniworld
from src.evaluation.brain_correlation import brain_correlation, brain_correlation_centred, roi_masks
from src.pretrained import gnet
from src.pretrained.gnet import GNetEncoder, GNetReadout, GNetTrunk, load_gnet, prepare_gnet_images
from src.utils import PerceptError
from tools.mini_models import data
from tools.mini_models import gnet as gnet_training

TINY = {
    "input_size": 47,
    "stem": 4,
    "width": 6,
    "dim": 5,
    "trunk_width": 3,
    "pass_through": 2,
    "drop": 0.5,
}
NSD_VOXELS = {1: 15724, 2: 14278, 3: 15226, 4: 13153, 5: 13039, 6: 17907, 7: 12682, 8: 14386}


def published_shapes(voxels):
    """Shapes as the authors describe the layers: convolution (out, in, side), norm (channels)."""
    convolutions = {
        "pre.conv1.0": (64, 3, 11),
        "pre.conv2.0": (192, 64, 5),
        "enc.conv3": (128, 192, 3),
        "enc.conv4a.conv1": (256, 128, 3),
        "enc.conv4b.conv1": (256, 256, 3),
        "enc.conv5a.conv1": (256, 256, 3),
        "enc.conv5b.conv1": (256, 256, 3),
        "enc.conv6a.conv1": (256, 256, 3),
        "enc.conv6b.conv1": (64, 256, 3),
    }
    norms = {
        "enc.bn1": 192,
        "enc.conv4a.bn1": 128,
        **{f"enc.conv{n}.bn1": 256 for n in ("4b", "5a", "5b", "6a", "6b")},
    }
    trunk = {"mu": (1, 3, 1, 1)}
    for name, (out, into, side) in convolutions.items():
        trunk |= {f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)}
    for name, n in norms.items():
        trunk |= {
            f"{name}.{what}": (n,) for what in ("weight", "bias", "running_mean", "running_var")
        } | {f"{name}.num_batches_tracked": ()}
    return trunk, {
        "rf0": (voxels, 25, 25),
        "rf1": (voxels, 13, 13),
        "w": (voxels, 512),
        "b": (voxels,),
    }


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("voxels", NSD_VOXELS.values())
def test_keys_and_shapes_are_the_released_ones(voxels):
    with torch.device("meta"):
        encoder = GNetEncoder(voxels)
        maps = encoder.trunk(torch.empty(2, 3, 227, 227))
        assert encoder.readout(maps, torch.arange(3)).shape == (2, 3)
    assert (shapes(encoder.trunk), shapes(encoder.readout)) == published_shapes(voxels)
    assert [tuple(m.shape) for m in maps] == [(2, 256, 25, 25), (2, 256, 13, 13)]
    assert encoder.trunk.channels == (256, 256) and encoder.trunk.sides == (25, 13)


def randomised(module):
    """Every number of a state dict drawn anew, norms' variances positive, so that nothing is a
    default that a wrong layer would share.
    """
    generator = torch.Generator().manual_seed(3)
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            if key.endswith("running_var"):
                value.abs_().add_(0.5)
    return module.eval().requires_grad_(False)


def trunk_by_hand(state, x, width):
    """The trunk from its state dict, without its classes."""

    def norm(x, name):
        mean, variance, gain, bias = (
            state[f"{name}.{what}"].view(1, -1, 1, 1)
            for what in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * gain + bias

    def conv(x, name, **how):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how).clamp_min(0)

    def block(x, name):
        return conv(norm(x, f"enc.{name}.bn1"), f"enc.{name}.conv1", padding=1)

    x = conv(x - state["mu"], "pre.conv1.0", stride=4, padding=2)
    x = F.max_pool2d(x, 3, 2)
    c3 = conv(norm(conv(x, "pre.conv2.0", padding=2), "enc.bn1"), "enc.conv3")
    c4a = block(c3, "conv4a")
    c4b = block(c4a, "conv4b")
    c5a = block(F.max_pool2d(c4b, 3, 2, 1), "conv5a")
    c5b = block(c5a, "conv5b")
    c6a = block(c5b, "conv6a")
    c6b = block(c6a, "conv6b")
    first = [c3, c4a[:, :width], c4b[:, :width]]
    second = [c5a[:, :width], c5b[:, :width], c6a[:, :width], c6b]
    return torch.cat(first, 1), torch.cat(second, 1)


def readout_by_hand(state, maps):
    """Voxel by voxel and image by image: softmax field, squashed features, squashed pooling,
    weights.
    """
    compress = lambda v: np.log(1 + np.abs(v)) * np.tanh(v)  # noqa: E731
    state, maps = (
        {k: v.double().numpy() for k, v in state.items()},
        [m.double().numpy() for m in maps],
    )
    responses = np.empty((len(maps[0]), len(state["b"])))
    for i, v in np.ndindex(*responses.shape):
        pooled = []
        for k, features in enumerate(maps):
            field = np.exp(state[f"rf{k}"][v] - state[f"rf{k}"][v].max())
            field /= field.sum()
            pooled += [compress((field * compress(channel)).sum()) for channel in features[i]]
        responses[i, v] = np.dot(pooled, state["w"][v]) + state["b"][v]
    return responses


def test_the_trunk_computes_what_its_layers_say():
    trunk, x = randomised(GNetTrunk(**TINY)), torch.rand(3, 3, 47, 47)
    maps = trunk(x)
    expected = trunk_by_hand(trunk.state_dict(), x, TINY["trunk_width"])
    shapes = [tuple(m.shape[2:]) for m in maps]
    assert shapes == [(side, side) for side in trunk.sides]
    for feature_map, expected_map in zip(maps, expected, strict=True):
        torch.testing.assert_close(feature_map, expected_map, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 2**25])
def test_the_readout_is_the_feature_weighted_receptive_field(monkeypatch, block):
    monkeypatch.setattr(gnet, "BLOCK", block)  # a voxel at a time, or all at once
    readout = randomised(GNetReadout(7, (4, 3), (5, 2)))
    maps = [2 * torch.randn(3, 4, 5, 5), 2 * torch.randn(3, 3, 2, 2)]
    expected = readout_by_hand(readout.state_dict(), maps)
    np.testing.assert_allclose(readout(maps).numpy(), expected, rtol=1e-5, atol=1e-5)
    chosen = torch.tensor([5, 0, 3])
    np.testing.assert_allclose(
        readout(maps, chosen).numpy(), expected[:, chosen], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("side", [227, 96])
def test_images_are_prepared_as_published(side):
    images = torch.rand(2, 3, 60, 60)
    prepared = prepare_gnet_images(images, side)
    for image, one in zip(images, prepared, strict=True):
        cut = np.floor(image.numpy().transpose(1, 2, 0) * np.float32(255)).astype(np.uint8)
        expected = (
            np.array(
                Image.fromarray(cut, "RGB").resize((side, side), Image.Resampling.LANCZOS)
            ).astype(np.float32)
            / 255
        )
        np.testing.assert_array_equal(one.numpy().transpose(1, 2, 0), expected)
    stored = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    torch.testing.assert_close(
        prepare_gnet_images(stored, side), prepare_gnet_images(stored / 255, side), rtol=0, atol=0
    )


def test_prediction_goes_in_batches_and_leaves_the_network_as_it_was():
    encoder, images = randomised(GNetEncoder(9, **TINY)), torch.rand(5, 3, 32, 32)
    expected = encoder(prepare_gnet_images(images, 47)).numpy()
    for batch in (1, 2, 100):
        np.testing.assert_allclose(encoder.predict(images, batch), expected, rtol=1e-4, atol=1e-5)
    encoder.train()
    np.testing.assert_allclose(
        encoder.predict(images.numpy()), expected, rtol=1e-4, atol=1e-5
    )  # without dropout
    assert encoder.training and encoder.predict(images).dtype == np.float32


@pytest.mark.parametrize(
    "images", [torch.rand(3, 32, 32), torch.rand(2, 1, 32, 32), torch.rand(0, 3, 32, 32)]
)
def test_images_of_another_shape_are_refused(images):
    with pytest.raises(PerceptError, match="GNet's images have the shape"):
        GNetEncoder(4, **TINY).predict(images)


@pytest.mark.parametrize(
    "images",
    [2 * torch.ones(1, 3, 8, 8), torch.full((1, 3, 8, 8), float("nan")), -torch.ones(1, 3, 8, 8)],
)
def test_values_out_of_range_are_refused(images):
    with pytest.raises(PerceptError, match="out of .0, 1."):
        GNetEncoder(4, **TINY).predict(images)


def test_too_small_an_input_is_refused():
    assert GNetTrunk(input_size=31).sides == (1, 1)
    with pytest.raises(PerceptError, match="at least 31"):
        GNetTrunk(input_size=30)


# ------------------------------------------------------------------------------------------- files
RAN = []


class Payload:
    def __reduce__(self):
        return RAN.append, ("ran",)


def released(path, encoder, subjects=(1, 2)):
    """A file in the layout of gnet_multisubject.pt, with the numpy arrays that it carries, and one
    thing that it does not.
    """
    state = lambda module: collections.OrderedDict(module.state_dict())  # noqa: E731
    best = {"enc": state(encoder.trunk), "fwrfs": {s: state(encoder.readout) for s in subjects}}
    masks = {s: np.ones(len(encoder.readout.b), bool) for s in subjects}
    more = {
        "num_epochs": 50,
        "best_epoch": np.int64(3),
        "input_mean": np.zeros((1, 3, 1, 1), np.float32),
        "voxel_mask": masks,
        "evil": Payload(),
    }
    torch.save({"best_params": best, "final_params": best, "val_cc": masks, **more}, path)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """An encoder of the published size but for its voxels, which are five, and its file."""
    encoder, path = randomised(GNetEncoder(5)), tmp_path_factory.mktemp("gnet") / gnet.GNET_FILE
    released(path, encoder)
    return encoder, path


def test_a_released_file_is_read_and_runs_no_code(full_size):
    encoder, path = full_size
    RAN.clear()
    for weights in (path, path.parent, str(path)):
        loaded = load_gnet(weights, 2)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        for key, value in encoder.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
    images = torch.rand(2, 3, 50, 50)
    np.testing.assert_array_equal(loaded.predict(images), encoder.predict(images))
    assert not RAN


def test_files_that_do_not_fit_are_one_sentence(full_size, tmp_path, monkeypatch):
    with pytest.raises(PerceptError, match="no encoder of subject 5: it has subjects 1, 2"):
        load_gnet(full_size[1], 5)
    with pytest.raises(PerceptError, match="There is no GNet encoder at .*nowhere"):
        load_gnet(tmp_path / "nowhere")
    monkeypatch.setattr(gnet, "HOME", tmp_path)
    with pytest.raises(PerceptError, match="run.py download gnet"):
        load_gnet("hub")
    for content in ({"weights": torch.ones(2)}, {"best_params": {"enc": {}}}, torch.ones(3)):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(PerceptError, match="holds no GNet"):
            load_gnet(tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(PerceptError, match="cannot be read as a PyTorch checkpoint"):
        load_gnet(tmp_path / "broken.pt")
    released(tmp_path / "narrow.pt", GNetEncoder(5, **TINY))
    with pytest.raises(PerceptError, match="does not fit GNetTrunk"):
        load_gnet(tmp_path / "narrow.pt")


def test_what_the_tool_exports_is_what_it_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WORK", tmp_path)
    monkeypatch.setattr(data, "OUT", tmp_path / "out")
    trained = randomised(gnet_training.GNetTrainer({1: 11, 3: 8}))
    torch.save({"average": trained.state_dict()}, tmp_path / "gnet.pt")
    gnet_training.export_gnet()
    encoder = load_gnet(tmp_path / "out" / "gnet", 3)
    x = torch.rand(4, 3, 32, 32)
    inputs = prepare_gnet_images(x, gnet_training.TRUNK_CONFIG["input_size"])
    expected = trained.readouts["3"](trained.trunk(inputs)).numpy()
    np.testing.assert_allclose(encoder.predict(x), expected, rtol=0.02, atol=0.02 * expected.std())
    with pytest.raises(PerceptError, match="no encoder of subject 2: it has subjects 1, 3"):
        load_gnet(tmp_path / "out" / "gnet", 2)


# ------------------------------------------------------------------------------- brain correlation
def test_correlation_is_pearsons_across_the_voxels_of_a_region_for_each_image():
    rng = np.random.default_rng(0)
    predicted, measured = rng.normal(size=(2, 6, 40))
    masks = {"a": np.arange(40) < 25, "b": np.arange(40) % 3 == 0}
    correlations = brain_correlation(torch.from_numpy(predicted), measured, masks)
    assert list(correlations) == ["a", "b"]
    for name, mask in masks.items():
        expected = [
            pearsonr(p[mask], m[mask]).statistic for p, m in zip(predicted, measured, strict=True)
        ]
        np.testing.assert_allclose(correlations[name], expected, rtol=1e-10)
    predicted[2] = 1.0
    assert brain_correlation(predicted, measured, masks)["a"][2] == 0


def test_the_centred_one_takes_off_what_images_have_in_common():
    rng = np.random.default_rng(1)
    common, individual = 5 * rng.normal(size=300), rng.normal(size=(40, 300))
    predicted, measured = (
        common + individual + rng.normal(size=individual.shape),
        common + individual + rng.normal(size=individual.shape),
    )
    masks, shuffled = {"all": np.ones(300, bool)}, np.roll(np.arange(40), 1)

    def score(order):
        return brain_correlation(predicted[order], measured, masks)["all"].mean()

    def centred(order):
        scores = brain_correlation_centred(predicted[order], measured, masks, common, common)
        return scores["all"].mean()

    assert score(np.arange(40)) > 0.9 and score(shuffled) > 0.85  # any image at all scores high
    assert 0.45 < centred(np.arange(40)) < 0.55 and abs(centred(shuffled)) < 0.05


def test_responses_that_do_not_fit_are_refused():
    ones = np.random.default_rng(0).normal(size=(3, 5))
    masks = {"all": np.ones(5, bool)}
    mismatched = [(ones, ones[:, :4]), (ones[:2], ones), (ones[0], ones[0])]
    for predicted, measured in mismatched:
        with pytest.raises(PerceptError, match="both must be the same"):
            brain_correlation(predicted, measured, masks)
    with pytest.raises(PerceptError, match="NaN"):
        brain_correlation(np.full((3, 5), np.nan), ones, masks)
    for mask in (np.ones(5), np.ones(4, bool), np.arange(5) == 0):
        with pytest.raises(PerceptError, match="region 'V1'"):
            brain_correlation(ones, ones, {"V1": mask})
    with pytest.raises(PerceptError, match="mean of the measured"):
        brain_correlation_centred(ones, ones, masks, ones[0], ones)


def test_regions_are_found_under_the_names_of_every_reader():
    def mask(*names):
        columns = {name: np.arange(8) == i for i, name in enumerate(names)}
        return roi_masks(pd.DataFrame(columns | {"x": np.arange(8.0)}))

    mask_of_regions = mask("V1v", "V1d", "V2v", "V3d", "hV4", "FFA-1")
    assert list(mask_of_regions) == ["nsd_general", "V1", "V2", "V3", "V4", "higher_vis"]
    assert {n: list(np.flatnonzero(m)) for n, m in mask_of_regions.items()} == {
        "nsd_general": list(range(8)),
        "V1": [0, 1],
        "V2": [2],
        "V3": [3],
        "V4": [4],
        "higher_vis": [5, 6, 7],
    }
    assert list(mask("V1", "LO")) == ["nsd_general", "V1", "higher_vis"] and list(
        mask("LO")
    ) == list(mask()) == ["nsd_general"]


# ---------------------------------------------------------------------------------- the mini world
@pytest.fixture(scope="module")
def mini_world():
    """60 test images, what subject 1's cortex says to them (a measurement of three repeats), and
    what the mini encoder predicts.
    """
    compositions = [miniworld.compose_image(77, i, "test") for i in range(60)]
    images = np.stack([miniworld.render_image(what, 77) for what in compositions])
    cortex, rng = miniworld.VisualCortex(1), np.random.default_rng(5)
    signal, ceiling = cortex.respond(images, compositions), cortex.voxels.noise_ceiling.to_numpy()
    measured = np.sqrt(ceiling) * signal + np.sqrt((1 - ceiling) / 3) * rng.standard_normal(
        signal.shape
    )
    encoder = load_gnet("mini", 1)
    return (
        encoder,
        encoder.predict(images.transpose(0, 3, 1, 2)),
        measured,
        roi_masks(cortex.voxels),
    )


def test_seen_images_score_above_a_shuffled_pairing_in_every_region(mini_world):
    encoder, predicted, measured, masks = mini_world
    assert list(masks) == ["nsd_general", "V1", "V2", "V3", "V4", "higher_vis"]
    seen, shuffled = (
        brain_correlation(predicted, measured, masks),
        brain_correlation(np.roll(predicted, 7, 0), measured, masks),
    )
    for name in masks:
        gain = seen[name] - shuffled[name]
        assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain)), name
    assert seen["nsd_general"].mean() > shuffled["nsd_general"].mean() + 0.15


def test_the_mini_encoders_are_the_same_network_at_half_precision():
    config = json.loads((gnet.MINI_GNET / "config.json").read_text())
    assert config["trunk"] == gnet_training.TRUNK_CONFIG
    assert config["subjects"] == list(gnet_training.SUBJECTS)
    for subj in config["subjects"]:
        encoder = load_gnet("mini", subj)
        assert len(encoder.readout.b) == miniworld.N_VOXELS[subj] and isinstance(
            encoder.trunk.enc.conv4a.drop1, nn.Dropout2d
        )
    assert sum(path.stat().st_size for path in gnet.MINI_GNET.iterdir()) < 2.6 * 2**20

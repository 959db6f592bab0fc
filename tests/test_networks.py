"""The frozen networks of the metrics: torchvision's own calls on files under the published names,
and the mini world's twins.
"""

import errno
import gc
import json
import tempfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from src import metrics, miniworld
from src.pretrained import metric_networks as networks
from src.pretrained.metric_networks import (
    METRIC_NETWORKS,
    RESIZING_MODES,
    FeatureNetwork,
    locate_weights,
)
from src.utils import PerceptError

FILES = {  # what torchvision and SwAV's authors call their files
    "alexnet": "alexnet-owt-7be5be79.pth",
    "inception_v3": "inception_v3_google-0cc3c7bd.pth",
    "efficientnet_b1": "efficientnet_b1-c27df63c.pth",
    "swav_resnet50": "swav_800ep_pretrain.pth.tar",
}
DIMS = {
    "AlexNet(2)": 192 * 31 * 31,
    "AlexNet(5)": 256 * 15 * 15,
    "InceptionV3": 2048,
    "EffNet-B1": 1280,
    "SwAV": 2048,
}


def published_calls():
    """The networks as the published evaluation makes them (their random weights come from the
    files).
    """
    swav = models.resnet50()
    state = torch.load(
        Path(torch.hub.get_dir()) / "checkpoints" / FILES["swav_resnet50"], weights_only=True
    )
    swav.load_state_dict(
        {key.replace("module.", ""): value for key, value in state.items()}, strict=False
    )
    return {
        "alexnet": models.alexnet(weights=models.AlexNet_Weights.IMAGENET1K_V1),
        "inception_v3": models.inception_v3(weights=models.Inception_V3_Weights.DEFAULT),
        "efficientnet_b1": models.efficientnet_b1(weights=models.EfficientNet_B1_Weights.DEFAULT),
        "swav_resnet50": swav,
    }


def swav_state():
    """A state dict with the keys of SwAV's file: ResNet-50 inside DistributedDataParallel, no
    classifier, projection head and prototypes.
    """
    state = {
        key: value
        for key, value in models.resnet50().state_dict().items()
        if not key.startswith("fc.")
    }
    head = torch.nn.Sequential(
        torch.nn.Linear(2048, 2048),
        torch.nn.BatchNorm1d(2048),
        torch.nn.ReLU(),
        torch.nn.Linear(2048, 128),
    ).state_dict()
    state |= {f"projection_head.{key}": value for key, value in head.items()} | {
        "prototypes.weight": torch.randn(30, 128)
    }
    return {f"module.{key}": value for key, value in state.items()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder that torch takes for its cache of downloads, with random weights under the published
    names.
    """
    before, place = torch.hub.get_dir(), tmp_path_factory.mktemp("hub")
    (place / "checkpoints").mkdir()
    torch.hub.set_dir(str(place))
    torch.manual_seed(0)
    makers = {
        "alexnet": models.alexnet,
        "inception_v3": lambda: models.inception_v3(init_weights=False),
        "efficientnet_b1": models.efficientnet_b1,
    }
    for name, make in makers.items():
        torch.save(make().state_dict(), place / "checkpoints" / FILES[name])
    torch.save(swav_state(), place / "checkpoints" / FILES["swav_resnet50"])
    yield place
    torch.hub.set_dir(before)
    networks._load_network.cache_clear()


@pytest.fixture(scope="module")
def originals(hub):
    return published_calls()


@pytest.fixture(scope="module")
def scenes():
    blocks = np.concatenate(list(miniworld.render_blocks(31, "test", 40, workers=1)))
    return torch.from_numpy(blocks).permute(0, 3, 1, 2)  # uint8


def twin(name="AlexNet(2)", **options):
    return FeatureNetwork(name, weights="mini", **options)


@pytest.mark.parametrize("name", METRIC_NETWORKS)
def test_features_are_those_of_the_published_calls(name, hub, originals):
    network = METRIC_NETWORKS[name]
    images = torch.rand(2, 3, 300, 270, generator=torch.Generator().manual_seed(1))
    x = TF.resize(images, [256, 256], antialias=False)  # bilinear
    x = TF.resize(x, [network.size, network.size], antialias=False)
    x = TF.normalize(x, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = (
            create_feature_extractor(originals[network.architecture].eval(), [network.node])(x)[
                network.node
            ]
            .flatten(1)
            .numpy()
        )
    extractor = FeatureNetwork(name)
    features = extractor(images)
    assert features.shape == (2, DIMS[name]) == (2, extractor.dim) and features.dtype == np.float32
    assert (
        features.std() > 0
        and np.abs(features[0] - features[1]).max() > 1e-3 * np.abs(features).max()
    )
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_both_alexnets_share_one_network_and_end_at_their_node(hub):
    early, late = FeatureNetwork("AlexNet(2)"), FeatureNetwork("AlexNet(5)")
    assert (
        len(early.model) == 5
        and len(late.model) == 12
        and early.model[3].weight is late.model[3].weight
    )


def test_a_folder_gives_what_the_downloads_give(hub):
    folder = FeatureNetwork("EffNet-B1", weights=str(hub / "checkpoints"))
    downloaded = FeatureNetwork("EffNet-B1")
    images = torch.rand(1, 3, 64, 64)
    np.testing.assert_array_equal(folder(images), downloaded(images))
    assert (
        folder.fingerprint() == downloaded.fingerprint()
        and folder.fingerprint()["weights"] == FILES["efficientnet_b1"]
    )


def test_the_files_of_the_downloads_have_the_names_that_a_folder_is_searched_for():
    for name, network in METRIC_NETWORKS.items():
        assert locate_weights(name, "/weights") == Path("/weights") / FILES[network.architecture]


def test_swavs_file_must_fit(tmp_path):
    state, file = swav_state(), tmp_path / FILES["swav_resnet50"]
    for change in (
        {"module.layer5.weight": torch.zeros(1)},
        {"module.fc.weight": torch.zeros(1000, 2048)},
        {"module.conv1.weight": None},
    ):
        torch.save(
            {key: value for key, value in (state | change).items() if value is not None}, file
        )
        with pytest.raises(PerceptError, match="does not fit"):
            FeatureNetwork("SwAV", weights=str(tmp_path))
    torch.save(
        {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
        file,
    )  # as files were before PyTorch 0.4.1
    extractor = FeatureNetwork("SwAV", weights=str(tmp_path))
    torch.testing.assert_close(extractor.model.conv1.weight, state["module.conv1.weight"])


def test_weights_that_cannot_be_had_are_said_plainly(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    for name in ("AlexNet(2)", "SwAV"):
        with pytest.raises(
            PerceptError,
            match=(
                rf"could not be downloaded from https://.*{FILES[METRIC_NETWORKS[name].architecture]}.*no"
                r" route.*by hand"
            ),
        ):
            FeatureNetwork(name)
    with pytest.raises(
        PerceptError, match=f"are not at .*{FILES['inception_v3']}: put the file of https://"
    ):
        FeatureNetwork("InceptionV3", weights=str(tmp_path))
    (tmp_path / FILES["alexnet"]).write_bytes(b"<html>not found</html>")
    with pytest.raises(PerceptError, match=f"{FILES['alexnet']} is a web page.*again"):
        FeatureNetwork("AlexNet(2)", weights=str(tmp_path))
    monkeypatch.setattr(networks, "MINI_METRIC_NETWORKS", tmp_path)
    with pytest.raises(PerceptError, match="no twin of SwAV"):
        twin("SwAV")


def test_bad_input_is_refused(scenes):
    with pytest.raises(PerceptError, match="No network of the metrics is called 'VGG'"):
        FeatureNetwork("VGG")
    with pytest.raises(PerceptError, match="no resizing 'bicubic'"):
        twin(resizing="bicubic")
    extractor = twin()
    for images, what in (
        (scenes[0], "shape"),
        (scenes[:0], "shape"),
        (scenes.permute(0, 2, 3, 1), "shape"),
        (scenes.float(), "run from"),
    ):
        with pytest.raises(PerceptError, match=what):
            extractor(images)
    with pytest.raises(PerceptError, match="expects"):
        extractor(torch.full((1, 3, 8, 8), torch.nan))


@pytest.mark.parametrize("resizing", RESIZING_MODES)
def test_resizing(resizing, scenes):
    sizes = {"published": [256, 64], "antialias": [256, 64], "straight": [64]}[resizing]
    x = scenes[:3].float() / 255
    for size in sizes:
        x = TF.resize(x, [size, size], antialias=resizing == "antialias")
    extractor = twin(resizing=resizing)
    x = TF.normalize(x, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    np.testing.assert_allclose(
        extractor(scenes[:3]), extractor.model(x).flatten(1).numpy(), rtol=1e-4, atol=1e-5
    )
    assert twin().resizing == "straight"


def test_neither_chunks_nor_the_type_of_the_images_matter(scenes, monkeypatch):
    extractor = twin("AlexNet(5)")
    expected = extractor(scenes)
    for images in (scenes.float() / 255, scenes.numpy(), (scenes.double() / 255).numpy()):
        np.testing.assert_allclose(extractor(images), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(FeatureNetwork, "_batch_size", 7)
    np.testing.assert_allclose(extractor(scenes), expected, rtol=1e-5, atol=1e-5)


def test_large_sets_live_in_a_file_that_goes_with_them(scenes, tmp_path, monkeypatch):
    extractor = twin()
    expected = extractor(scenes)
    monkeypatch.setattr(networks, "MAX_BYTES_IN_MEMORY", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    features = extractor(scenes)
    assert isinstance(features, np.memmap) and not list(tmp_path.iterdir())
    gc.collect()
    np.testing.assert_array_equal(features, expected)
    assert metrics.two_way_identification(features, expected) == 1

    def full(*args):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(FeatureNetwork, "_write", full)
    with pytest.raises(PerceptError, match="no room"):
        extractor(scenes)


def test_the_cache_computes_once_and_knows_its_images(scenes, tmp_path, monkeypatch):
    calls, embed = [], FeatureNetwork._embed
    extractor = twin()
    expected, _ = extractor(scenes), extractor.dim
    monkeypatch.setattr(FeatureNetwork, "_batch_size", 16)
    monkeypatch.setattr(
        FeatureNetwork,
        "_embed",
        lambda self, images: calls.append(len(images)) or embed(self, images),
    )
    first = extractor.features(scenes, tmp_path)
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-5)
    assert calls == [16, 16, 8]
    np.testing.assert_array_equal(extractor.features(scenes.numpy(), str(tmp_path)), first)
    np.testing.assert_array_equal(twin().features(scenes, tmp_path), first)
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 1
    changed = scenes.clone()
    changed[-1, 0, 0, 0] ^= 1
    extractor.features(changed, tmp_path)
    twin(resizing="antialias").features(scenes, tmp_path)
    twin("AlexNet(5)").features(scenes, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_an_interrupted_computation_leaves_nothing(scenes, tmp_path, monkeypatch):
    extractor, embed, calls = twin(), FeatureNetwork._embed, []
    extractor.dim  # noqa: B018

    def stopped(self, images):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(self, images)

    monkeypatch.setattr(FeatureNetwork, "_batch_size", 16)
    monkeypatch.setattr(FeatureNetwork, "_embed", stopped)
    with pytest.raises(KeyboardInterrupt):
        extractor.features(scenes, tmp_path / "cache")
    assert len(calls) == 2 and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", METRIC_NETWORKS)
def test_twins_prefer_the_image_that_was_seen(name, scenes):
    extractor = twin(name)
    config = json.loads((locate_weights(name, "mini").parent / "config.json").read_text())
    assert extractor.size == config["size"] and extractor.fingerprint()["weights"].startswith(
        "mini:"
    )
    x = scenes.float() / 255
    noisy = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    real, recon = extractor(scenes), extractor(noisy)
    assert real.shape == (40, extractor.dim) and np.isfinite(real).all()
    assert metrics.two_way_identification(real, recon) > 0.8
    assert (
        metrics.correlation_distance(real, recon).mean()
        < metrics.correlation_distance(real, np.roll(recon, 1, 0)).mean()
    )


def test_the_twins_are_small():
    files = list(networks.MINI_METRIC_NETWORKS.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == set(networks.ARCHITECTURES) and sum(
        file.stat().st_size for file in files
    ) < 2.5 * 2**20

"""The frozen networks of the image metrics: AlexNet, InceptionV3, EfficientNet-B1 and SwAV.

- `METRIC_NETWORKS` lists them by the names that tables use. CLIP, the eighth of the published
  scores, is `pretrained.Clipper`.
- `weights` is "hub" (torchvision's own downloads, and the file of SwAV's authors), a folder that
  holds those files under their own names, or "mini": the miniatures of the mini world. Tables list
  their scores under other names, as they compare with no published number.
- Images are resized to 256 pixels first and are never cropped, as in the published evaluation
  (MindEye, arXiv 2305.18274, Table 1).
- 10,000 images through AlexNet(2) are 7.4 GB of features: they are computed a few images at a time,
  and large sets lie in a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision import models
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams
from tqdm.auto import tqdm

from src.files.foreign import load_npy, shorten
from src.files.weights import plan_network
from src.pretrained.base import freeze, normalise_colours
from src.pretrained.shared_weights import REMEDY
from src.safe_pickle import UnpicklingError, load_plain_torch_file
from src.utils import ROOT, PerceptError, atomic, load_strictly, read_json, read_tensors

log = logging.getLogger(__name__)

MINI_METRIC_NETWORKS = ROOT / "data" / "mini_models" / "metric_networks"

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SWAV_URL = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"

# pixels a side to which the published evaluation resizes every image, before any network's own size
INTERMEDIATE_SIZE = 256


@dataclass(frozen=True)
class Resizing:
    """How images are resized for a network, bilinearly.

    Attributes:
        by_intermediate: to INTERMEDIATE_SIZE first, then to the network's size.
        antialias: whether to antialias.
    """

    by_intermediate: bool
    antialias: bool


RESIZING_MODES = {
    # torchvision 0.15, with which the published numbers were made, did not antialias tensors
    "published": Resizing(by_intermediate=True, antialias=False),
    # what the same call does in torchvision 0.17 and later
    "antialias": Resizing(by_intermediate=True, antialias=True),
    # the miniatures were trained so
    "straight": Resizing(by_intermediate=False, antialias=False),
}

MAX_BYTES_IN_MEMORY = 2**30  # of features; more lie in a file

# no connection, wrong hash, broken off, not a file of weights
HUB_ERRORS = (OSError, RuntimeError, HTTPException, EOFError, UnpicklingError)


@dataclass(frozen=True)
class MetricNetwork:
    """A network, and the node whose output is compared.

    Attributes:
        architecture: key of `ARCHITECTURES`.
        node: of torchvision's feature extractor, whose output is flattened to (n, features).
        size: pixels a side of the network's input.
    """

    architecture: str
    node: str
    size: int


# AlexNet's features.3 is the second convolution and features.4 its ReLU; features.10 and .11 are
# the fifth with its ReLU. Both nodes come after a ReLU and before a max-pool, which works on a
# copy: no later layer changes them in place. At 256 px: 192 x 31 x 31 = 184,512 and 256 x 15 x 15
# = 57,600 features. The other networks are read after their global average pool.
METRIC_NETWORKS = {
    "AlexNet(2)": MetricNetwork("alexnet", "features.4", 256),
    "AlexNet(5)": MetricNetwork("alexnet", "features.11", 256),
    "InceptionV3": MetricNetwork("inception_v3", "avgpool", 342),
    "EffNet-B1": MetricNetwork("efficientnet_b1", "avgpool", 255),
    "SwAV": MetricNetwork("swav_resnet50", "avgpool", 224),
}


@dataclass(frozen=True)
class _Architecture:
    """A network of torchvision.

    Attributes:
        build: makes it without weights.
        head: the layers after the last node that is read.
        enum: torchvision's entry of its weights; None for SwAV, whose authors host the file.
    """

    build: Callable[[], nn.Module]
    head: str
    enum: Any = None

    @property
    def url(self) -> str:
        return SWAV_URL if self.enum is None else self.enum.url


def _build_inception() -> nn.Module:
    """InceptionV3 with the transform of its input, which belongs to the published weights.

    torchvision switches it on together with them, and off without.
    """
    return models.inception_v3(
        weights=None, transform_input=True, aux_logits=True, init_weights=False
    )


ARCHITECTURES = {
    "alexnet": _Architecture(models.alexnet, "classifier", models.AlexNet_Weights.IMAGENET1K_V1),
    "inception_v3": _Architecture(_build_inception, "fc", models.Inception_V3_Weights.DEFAULT),
    "efficientnet_b1": _Architecture(
        models.efficientnet_b1, "classifier", models.EfficientNet_B1_Weights.DEFAULT
    ),
    "swav_resnet50": _Architecture(models.resnet50, "fc"),
}


def _narrow_alexnet(channels: list[int], kernel: int, stride: int) -> nn.Module:
    """torchvision's AlexNet with other channels and a finer first convolution.

    Its layers have the same numbers.
    """
    a, b, c, d, e = channels
    with torch.device("meta"):  # the layers that are replaced need no memory
        model = models.AlexNet()
    model.features = nn.Sequential(
        nn.Conv2d(3, a, kernel, stride, kernel // 2),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(a, b, 5, padding=2),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(b, c, 3, padding=1),
        nn.ReLU(True),
        nn.Conv2d(c, d, 3, padding=1),
        nn.ReLU(True),
        nn.Conv2d(d, e, 3, padding=1),
        nn.ReLU(True),
        nn.MaxPool2d(3, 2),
    )
    model.avgpool = nn.AdaptiveAvgPool2d(3)
    model.classifier = nn.Identity()
    return model


def _narrow_efficientnet(blocks: list[list[int]], last_channel: int) -> nn.Module:
    model = models.EfficientNet(
        [MBConvConfig(*block) for block in blocks],
        dropout=0.0,
        stochastic_depth_prob=0.0,
        last_channel=last_channel,
    )
    return _remove_head(model, "classifier")


def _narrow_regnet(stem_width: int, **stages: Any) -> nn.Module:
    model = models.RegNet(BlockParams(**stages), stem_width=stem_width)
    return _remove_head(model, "fc")


def _narrow_shufflenet(repeats: list[int], channels: list[int]) -> nn.Module:
    return _remove_head(models.ShuffleNetV2(repeats, channels), "fc")


def _remove_head(model: nn.Module, head: str) -> nn.Module:
    setattr(model, head, nn.Identity())
    return model


# torchvision's class -> makes the network of some settings, which gives features (n, dim)
MINI_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "AlexNet": _narrow_alexnet,
    "EfficientNet": _narrow_efficientnet,
    "RegNet": _narrow_regnet,
    "ShuffleNetV2": _narrow_shufflenet,
}


def build_mini_network(config: dict[str, Any]) -> nn.Module:
    """A miniature with random weights and without a head.

    Args:
        config: of its config.json: "class", a key of `MINI_NETWORKS`, and its "settings".
    """
    return MINI_NETWORKS[config["class"]](**config["settings"])


def locate_weights(name: str, weights: str) -> Path:
    """Where the weights of a network of `METRIC_NETWORKS` lie, or will lie once downloaded ("hub").

    Raises:
        PerceptError: for an unknown network.
    """
    if name not in METRIC_NETWORKS:
        raise PerceptError(
            f"No network of the metrics is called '{name}': choose one of"
            f" {', '.join(METRIC_NETWORKS)}."
        )
    architecture = METRIC_NETWORKS[name].architecture
    if weights == "mini":
        return MINI_METRIC_NETWORKS / architecture / "model.safetensors"
    folder = Path(weights)
    if weights == "hub":
        folder = Path(torch.hub.get_dir()) / "checkpoints"
    return folder / Path(ARCHITECTURES[architecture].url).name


def _require_weights(name: str, weights: str) -> Path:
    """The file of `locate_weights`.

    Raises:
        PerceptError: if it is missing, unless it can be downloaded.
    """
    file = locate_weights(name, weights)
    if weights == "mini" and not file.is_file():
        raise PerceptError(
            f"The mini world has no twin of {name} at {file.parent}: restore data/mini_models from"
            f" git, or leave {name} out."
        )
    if weights != "hub" and not file.is_file():
        url = ARCHITECTURES[METRIC_NETWORKS[name].architecture].url
        raise PerceptError(
            f"The weights of {name} are not at {file}: put the file of {url} there, or set weights"
            " to 'hub' or 'mini'."
        )
    return file


def _read_published_state(architecture: str, weights: str, file: Path) -> dict[str, Tensor]:
    """The state dict of a published network, downloaded first for "hub"."""
    source = ARCHITECTURES[architecture]
    try:
        if weights != "hub":
            return load_plain_torch_file(file, f"take the file of {source.url} again")
        if source.enum is not None:
            return source.enum.get_state_dict(
                progress=True, check_hash=True, map_location="cpu", weights_only=True
            )
        # SwAV's own hub entry clones a repository with a package `src`, which hides ours; its file
        # is all that is needed.
        return torch.hub.load_state_dict_from_url(
            source.url, map_location="cpu", progress=True, weights_only=True
        )
    except HUB_ERRORS as error:
        raise PerceptError(
            f"The weights of {architecture} could not be downloaded from {source.url} to"
            f" {file.parent} ({shorten(error)}): put that file there by hand, or set weights to a"
            " folder that holds it."
        ) from error


def _build_published(architecture: str, state: dict[str, Tensor], origin: str) -> nn.Module:
    """The network with published weights, without the layers after its last node."""
    is_state = isinstance(state, dict) and all(map(torch.is_tensor, state.values()))
    if not is_state or not all(isinstance(key, str) for key in state):
        raise PerceptError(f"{origin} holds no state dict: take it again as it is published.")
    model = ARCHITECTURES[architecture].build()
    if architecture == "swav_resnet50":
        _remove_head(model, "fc")  # the file has no classifier
        state = _select_backbone(state)
    # Files older than PyTorch 0.4.1 lack this counter, which only training reads.
    counters = {}
    for key, value in model.state_dict().items():
        if key.endswith(".num_batches_tracked"):
            counters[key] = value
    load_strictly(model, counters | dict(state), origin)
    return _remove_head(model, ARCHITECTURES[architecture].head)


def _select_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of SwAV's ResNet, without the layers that only its training needs."""
    backbone = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        if not key.startswith(("projection_head.", "prototypes.")):
            backbone[key] = value
    return backbone


@dataclass(frozen=True)
class _LoadedNetwork:
    """A network with its weights.

    Attributes:
        model: in eval mode, without gradients.
        size: pixels a side of a miniature's input; 0 for a published network.
        digest: hash of the file of weights.
    """

    model: Any
    size: int
    digest: str


@lru_cache(maxsize=8)
def _load_network(
    architecture: str, weights: str, file: Path, stamp: float, device: str
) -> _LoadedNetwork:
    """Load a network once: AlexNet's two nodes share one.

    A new `stamp` reads the file again.
    """
    size = 0
    if weights == "mini":
        path = file.parent / "config.json"
        config = read_json(path, ("class", "settings", "size"), REMEDY)
        state = {}
        for key, value in read_tensors(file, remedy=REMEDY)[0].items():
            state[key] = value.float() if value.is_floating_point() else value
        plan_network(lambda: build_mini_network(config), state, str(path))
        model, size = build_mini_network(config), int(config["size"])
        load_strictly(model, state, str(file))
    else:
        state = _read_published_state(architecture, weights, file)
        model = _build_published(architecture, state, file.name)
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:12]
    return _LoadedNetwork(freeze(model, torch.device(device)), size, digest)


@contextmanager
def _disable_tf32() -> Iterator[None]:
    """Context in which convolutions on a GPU are not rounded to TF32, torch's default there.

    So a GPU gives what a CPU gives.
    """
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


class FeatureNetwork:
    """A frozen network up to the node that one metric reads: images -> features.

    Args:
        name: key of `METRIC_NETWORKS`.
        weights: "hub", "mini", or a folder that holds the published files under their own names
            (`locate_weights`).
        device: torch device.
        resizing: key of `RESIZING_MODES`, or "auto": "published", and "straight" for miniatures.

    Attributes:
        size: pixels a side of the network's input.

    Raises:
        PerceptError: for an unknown name or resizing, and for weights that are missing, cannot be
            downloaded or do not fit.

    Source: the evaluation of MindEye (arXiv 2305.18274, Table 1) and MindEye2 (arXiv 2403.11207),
    after Ozcelik & VanRullen 2023.
    """

    def __init__(
        self, name: str, weights: str = "hub", device: str = "cpu", resizing: str = "auto"
    ):
        if resizing == "auto":
            resizing = "straight" if weights == "mini" else "published"
        if resizing not in RESIZING_MODES:
            raise PerceptError(
                f"There is no resizing '{resizing}': choose one of auto,"
                f" {', '.join(RESIZING_MODES)}."
            )
        file = _require_weights(name, weights)
        self.name = name
        self.weights = weights
        self.device = torch.device(device)
        self.resizing = resizing
        self.network = METRIC_NETWORKS[name]
        stamp = file.stat().st_mtime if file.is_file() else 0.0
        loaded = _load_network(self.network.architecture, weights, file, stamp, device)
        self._file = file
        self._digest = loaded.digest
        self.size = loaded.size or self.network.size
        self.model: Any = loaded.model
        # The layers after the node are left out: AlexNet(2) computes two of five convolutions.
        _, _, last_layer = self.network.node.partition("features.")
        if last_layer:
            self.model = self.model.features[: int(last_layer) + 1]

    @property
    def _batch_size(self) -> int:
        """Images that the network sees at a time: 16 of 256 pixels a side."""
        return max(1, 2**20 // self.size**2)

    @cached_property
    def dim(self) -> int:
        """Features an image: 184,512 for AlexNet(2), 57,600 for AlexNet(5).

        Of the others 2,048 (InceptionV3), 1,280 (EffNet-B1) and 2,048 (SwAV).
        """
        black = np.zeros((1, 3, self.size, self.size), np.float32)
        return self._embed(black).shape[1]

    def fingerprint(self) -> dict[str, Any]:
        """What the features depend on, for caches and to record where results come from.

        It does not depend on the folder of the weights.
        """
        place = f"mini:{self.network.architecture}" if self.weights == "mini" else self._file.name
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        return {
            "name": self.name,
            "node": self.network.node,
            "size": self.size,
            "weights": place,
            "hash": self._digest,
            "resizing": self.resizing,
            "versions": versions,
        }

    def __call__(self, images: Any) -> np.ndarray:
        """`features` without a cache: images (n, 3, height, width) -> (n, features) float32."""
        return self.features(images)

    def features(self, images: Any, cache: str | Path | None = None) -> np.ndarray:
        """The features of images, flattened.

        Args:
            images: (n, 3, height, width), tensor or array; floats in [0, 1] or uint8.
            cache: folder in which features are stored, keyed by the bytes of the images and by
                `fingerprint`; they are read from there the next time.

        Returns:
            (n, features) float32 on the CPU: in memory, or mapped from a file. The file is the
                cache's (changes do not reach it), or, of more than 1 GB, a nameless one in the
                folder for temporary files (TMPDIR), which is deleted with the array.

        Raises:
            PerceptError: for images of another shape or range, and where the disk has no room.
        """
        shape: tuple[int, ...] = tuple(getattr(images, "shape", ()))
        if len(shape) != 4 or shape[1] != 3 or not len(images):
            raise PerceptError(
                f"Images of shape {shape} were given; {self.name} expects (n, 3, height, width), n"
                " at least 1."
            )
        if cache is None and self._count_bytes(images) <= MAX_BYTES_IN_MEMORY:
            features = np.empty((len(images), self.dim), np.float32)
            start = 0
            for part in self._embed_in_parts(images):
                features[start : start + len(part)] = part
                start += len(part)
            return features
        try:
            if cache is not None:
                return self._read_or_compute(images, Path(cache))
            return self._compute_in_file(images)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            folder = cache or f"{tempfile.gettempdir()} (TMPDIR)"
            raise PerceptError(
                f"There is no room at {folder} for {self._count_bytes(images) / 1e9:.1f} GB of"
                f" features of {self.name}: choose a folder on a larger disk."
            ) from error

    def _count_bytes(self, images: Any) -> int:
        """Size of the features of images, in bytes."""
        return len(images) * self.dim * 4

    def _read_or_compute(self, images: Any, cache: Path) -> np.ndarray:
        path = cache / f"{self.name}-{self._hash(images)}.npy"
        features = self._read_features(path, len(images)) if path.exists() else None
        if features is None:
            # a computation that stops leaves nothing behind
            with atomic(path) as temporary, open(temporary, "wb") as file:
                self._write(images, file)
            # copy on write: torch warns of arrays that may not be written
            features = load_npy(path, mode="c")
        return features

    def _read_features(self, path: Path, images: int) -> np.ndarray | None:
        """Stored features; None where the file is damaged, which are then computed again."""
        try:
            features = load_npy(path, "its features are computed again", mode="c")
        except PerceptError as error:
            log.warning("%s", error)
            return None
        return features if features.ndim == 2 and len(features) == images else None

    def _compute_in_file(self, images: Any) -> np.ndarray:
        with tempfile.TemporaryFile() as file:  # nameless, it exists as long as it is mapped
            start = self._write(images, file)
            return np.memmap(file, np.float32, "r+", offset=start, shape=(len(images), self.dim))

    def _write(self, images: Any, file: IO[bytes]) -> int:
        """Write features as .npy, chunk by chunk.

        A full disk is an error then, where writing through a map would kill the process.

        Returns:
            Offset of the data in the file.
        """
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(images), self.dim)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for part in self._embed_in_parts(images):
            file.write(part.tobytes())
        file.flush()
        return start

    def _hash(self, images: Any) -> str:
        """Hash of the images and of what their features depend on."""
        fingerprint = json.dumps(self.fingerprint(), sort_keys=True)
        digest = hashlib.blake2b(fingerprint.encode(), digest_size=12)
        layout = f"{images.dtype}{tuple(images.shape)}".replace("torch.", "")
        digest.update(layout.encode())
        for start in range(0, len(images), 64):
            part = torch.as_tensor(images[start : start + 64]).cpu().numpy()
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def _embed_in_parts(self, images: Any) -> Iterator[np.ndarray]:
        """Features of a few images at a time, (chunk, features) each."""
        starts = range(0, len(images), self._batch_size)
        for start in tqdm(starts, desc=f"{self.name} looks", leave=False, delay=5, mininterval=1):
            yield self._embed(images[start : start + self._batch_size])

    @torch.inference_mode()
    def _embed(self, images: Any) -> np.ndarray:
        """Images (n, 3, height, width), floats in [0, 1] or uint8 -> (n, features) float32."""
        x = torch.as_tensor(images).to(self.device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if not (x.min() >= -1e-3 and x.max() <= 1 + 1e-3):
            raise PerceptError(
                f"Image values run from {x.min():.6g} to {x.max():.6g}; {self.name} expects [0, 1]:"
                " clamp reconstructions, or pass uint8."
            )
        x = normalise_colours(self._resize(x), IMAGENET_MEAN, IMAGENET_STD)
        with _disable_tf32():
            return self.model(x).flatten(1).float().cpu().numpy()

    def _resize(self, images: Tensor) -> Tensor:
        """Images (n, 3, height, width) in the size of the network's input."""
        mode = RESIZING_MODES[self.resizing]
        sides = [INTERMEDIATE_SIZE, self.size] if mode.by_intermediate else [self.size]
        for side in sides:
            if images.shape[-2:] != (side, side):
                images = F.interpolate(
                    images,
                    (side, side),
                    mode="bilinear",
                    align_corners=False,
                    antialias=mode.antialias,
                )
        return images

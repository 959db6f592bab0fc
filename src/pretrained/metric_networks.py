"""The frozen networks through which the field compares pictures: AlexNet, InceptionV3,
EfficientNet-B1 and SwAV's ResNet-50.

- `METRIC_NETWORKS` lists them by the names that tables use. CLIP, the eighth of the published scores, is
  `pretrained.Clipper`.
- `weights` is "hub" (torchvision's own downloads, and the file of SwAV's authors), a folder that
  holds those files under their own names, or "mini": the small twins of the mini world, which the
  caller shows under names of their own, as their scores compare with nothing else.
- Images pass through 256 pixels first and are never cropped, as in the published evaluation
  (MindEye, arXiv 2305.18274, Table 1).
- 10,000 images through AlexNet(2) are 7.4 GB of features: they are computed a few images at a time,
  and large sets live in a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
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
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams
from tqdm.auto import tqdm

from src.safe_pickle import UnpicklingError
from src.utils import ROOT, PerceptError, atomic, load_strictly

MINI_METRIC_NETWORKS = ROOT / "data" / "mini_models" / "metric_networks"

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SWAV_URL = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"

# pixels a side to which the published evaluation brings every picture, before any network's own
# size
INTERMEDIATE_SIZE = 256

RESIZING = {  # how pictures come to a network's size: (by way of INTERMEDIATE_SIZE, antialias)
    "published": (
        True,
        False,
    ),  # torchvision 0.15, with which the published numbers were made, did not antialias tensors
    "antialias": (True, True),  # what the same call does in torchvision 0.17 and later
    "straight": (False, False),  # the twins of the mini world were trained so
}

IN_MEMORY = 2**30  # bytes of features; more live in a file

HUB_ERRORS = (
    OSError,
    RuntimeError,
    HTTPException,
    EOFError,
    UnpicklingError,
)  # no connection, wrong hash, broken off, not a file of weights


@dataclass(frozen=True)
class MetricNetwork:
    """Where one score looks.

    Attributes:
        architecture: key of `ARCHITECTURES`.
        node: of torchvision's feature extractor, whose output is flattened to (n, features).
        size: pixels a side of the network's input.
    """

    architecture: str
    node: str
    size: int


# AlexNet's features.3 is the second convolution and features.4 its ReLU; features.10 and .11 are
# the fifth with its ReLU. Both nodes come after
# a ReLU and before a max-pool, which works on a copy: no later layer changes them in place. At 256
# px: 192 x 31 x 31 = 184,512 and
# 256 x 15 x 15 = 57,600 features. The other networks are read after their global average pool.
METRIC_NETWORKS = {
    "AlexNet(2)": MetricNetwork("alexnet", "features.4", 256),
    "AlexNet(5)": MetricNetwork("alexnet", "features.11", 256),
    "InceptionV3": MetricNetwork("inception_v3", "avgpool", 342),
    "EffNet-B1": MetricNetwork("efficientnet_b1", "avgpool", 255),
    "SwAV": MetricNetwork("swav_resnet50", "avgpool", 224),
}


@dataclass(frozen=True)
class _Architecture:
    build: Callable[[], nn.Module]
    head: str  # what comes after the last node that is read
    enum: Any = (
        None  # torchvision's own entry of the weights; SwAV's authors keep their file themselves
    )

    @property
    def url(self) -> str:
        return SWAV_URL if self.enum is None else self.enum.url


# Inception's input transform belongs to its published weights: torchvision switches it on together
# with them, and off without.
ARCHITECTURES = {
    "alexnet": _Architecture(models.alexnet, "classifier", models.AlexNet_Weights.IMAGENET1K_V1),
    "inception_v3": _Architecture(
        lambda: models.inception_v3(
            weights=None, transform_input=True, aux_logits=True, init_weights=False
        ),
        "fc",
        models.Inception_V3_Weights.DEFAULT,
    ),
    "efficientnet_b1": _Architecture(
        models.efficientnet_b1, "classifier", models.EfficientNet_B1_Weights.DEFAULT
    ),
    "swav_resnet50": _Architecture(models.resnet50, "fc"),
}


def _narrow_alexnet(channels: list[int], kernel: int, stride: int) -> nn.Module:
    """torchvision's AlexNet with other channels and a finer first convolution; its layers have the
    same numbers.
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
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(3), nn.Identity()
    return model


def _headless(model: nn.Module, head: str) -> nn.Module:
    setattr(model, head, nn.Identity())
    return model


MINI_NETWORKS: dict[
    str, Callable[..., nn.Module]
] = {  # torchvision's class -> the network of some settings, giving features (n, dim)
    "AlexNet": _narrow_alexnet,
    "EfficientNet": lambda blocks, last_channel: _headless(
        models.EfficientNet(
            [MBConvConfig(*block) for block in blocks],
            dropout=0.0,
            stochastic_depth_prob=0.0,
            last_channel=last_channel,
        ),
        "classifier",
    ),
    "RegNet": lambda stem_width, **stages: _headless(
        models.RegNet(BlockParams(**stages), stem_width=stem_width), "fc"
    ),
    "ShuffleNetV2": lambda repeats, channels: _headless(
        models.ShuffleNetV2(repeats, channels), "fc"
    ),
}


def build_mini_network(config: dict[str, Any]) -> nn.Module:
    """The network that a twin's config.json describes ("class" of `MINI_NETWORKS`, its "settings"), with
    random weights and without a head.
    """
    return MINI_NETWORKS[config["class"]](**config["settings"])


def locate_weights(name: str, weights: str) -> Path:
    """Where the weights of a network of `METRIC_NETWORKS` lie, or will lie once downloaded ("hub").

    Raises:
        PerceptError: for an unknown network.
    """
    if name not in METRIC_NETWORKS:
        raise PerceptError(
            f"No network of the metrics is called '{name}': choose one of {', '.join(METRIC_NETWORKS)}."
        )
    architecture = METRIC_NETWORKS[name].architecture
    if weights == "mini":
        return MINI_METRIC_NETWORKS / architecture / "model.safetensors"
    folder = Path(torch.hub.get_dir()) / "checkpoints" if weights == "hub" else Path(weights)
    return folder / Path(ARCHITECTURES[architecture].url).name


def _present(name: str, weights: str) -> Path:
    """The file of `locate_weights`, refused where it must be there and is not."""
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


def _published_state(architecture: str, weights: str, file: Path) -> dict[str, Tensor]:
    """The state dict of a published network, downloaded first where that is asked for."""
    made = ARCHITECTURES[architecture]
    try:
        if weights != "hub":
            return torch.load(file, map_location="cpu", weights_only=True)
        if made.enum is not None:
            return made.enum.get_state_dict(
                progress=True, check_hash=True, map_location="cpu", weights_only=True
            )
        # SwAV's own hub entry clones a repository with a package `src`, which hides ours; its file
        # is all that is needed.
        return torch.hub.load_state_dict_from_url(
            made.url, map_location="cpu", progress=True, weights_only=True
        )
    except HUB_ERRORS as error:
        what = (
            f"downloaded from {made.url} to {file.parent}"
            if weights == "hub"
            else f"read from {file}"
        )
        todo = (
            "put that file there by hand, or set weights to a folder that holds it"
            if weights == "hub"
            else f"take the file of {made.url} again"
        )
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PerceptError(
            f"The weights of {architecture} could not be {what} ({reason}): {todo}."
        ) from error


def _fitted(architecture: str, state: dict[str, Tensor], origin: str) -> nn.Module:
    """The network with published weights, without what comes after its last node."""
    model = ARCHITECTURES[architecture].build()
    if (
        architecture == "swav_resnet50"
    ):  # the file has no classifier, and the layers that SwAV trains with
        _headless(model, "fc")
        state = {key.removeprefix("module."): value for key, value in state.items()}
        state = {
            key: value
            for key, value in state.items()
            if not key.startswith(("projection_head.", "prototypes."))
        }
    # Files older than PyTorch 0.4.1 lack this counter, which only training reads.
    counters = {
        key: value
        for key, value in model.state_dict().items()
        if key.endswith(".num_batches_tracked")
    }
    load_strictly(model, counters | dict(state), origin)
    return _headless(model, ARCHITECTURES[architecture].head)


@lru_cache(maxsize=8)
def _loaded(
    architecture: str, weights: str, file: Path, stamp: float, device: str
) -> tuple[nn.Module, int, str]:
    """Network, input size of a twin (0: the published one) and hash of the weights; AlexNet's two
    nodes share one.

    A new `stamp` reads the file again.
    """
    if weights == "mini":
        config = json.loads((file.parent / "config.json").read_text())
        model, size = build_mini_network(config), int(config["size"])
        load_strictly(
            model,
            {
                key: value.float() if value.is_floating_point() else value
                for key, value in load_file(file).items()
            },
            str(file),
        )
    else:
        model, size = (
            _fitted(architecture, _published_state(architecture, weights, file), file.name),
            0,
        )
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:12]
    return model.eval().requires_grad_(False).to(device), size, digest


@contextmanager
def _full_precision() -> Iterator[None]:
    """Within this context convolutions on a GPU are not rounded to TF32, torch's default there: it
    gives what a CPU gives.
    """
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


class FeatureNetwork:
    """A frozen network cut at the node that one score reads: images -> features.

    Args:
        name: key of `METRIC_NETWORKS`.
        weights: "hub", "mini", or a folder that holds the published files (`locate_weights` says under
            what names).
        device: torch device.
        resizing: key of `RESIZING`, or "auto": "published", and "straight" for the twins.

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
        resizing = (
            ("straight" if weights == "mini" else "published") if resizing == "auto" else resizing
        )
        if resizing not in RESIZING:
            raise PerceptError(
                f"There is no resizing '{resizing}': choose one of auto, {', '.join(RESIZING)}."
            )
        self._file = file = _present(name, weights)
        self.name, self.weights, self.device, self.resizing = (
            name,
            weights,
            torch.device(device),
            resizing,
        )
        self.network = METRIC_NETWORKS[name]
        stamp = file.stat().st_mtime if file.is_file() else 0.0
        model, size, self._digest = _loaded(self.network.architecture, weights, file, stamp, device)
        self.size = size or self.network.size
        # What comes after the node is left out: AlexNet(2) computes two of five convolutions.
        _, _, last = self.network.node.partition("features.")
        self.model: Any = model.features[: int(last) + 1] if last else model  # type: ignore[index]

    @property
    def _batch_size(self) -> int:
        """Images that the network sees at a time: 16 of 256 pixels a side."""
        return max(1, 2**20 // self.size**2)

    @cached_property
    def dim(self) -> int:
        """Features an image: 184,512 for AlexNet(2), 57,600 for AlexNet(5), 2,048, 1,280 and 2,048."""
        return self._embed(np.zeros((1, 3, self.size, self.size), np.float32)).shape[1]

    def fingerprint(self) -> dict[str, Any]:
        """What the features depend on, for caches and for provenance; a file gives the same
        wherever it lies.
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
            cache: folder in which features are kept, keyed by the bytes of the images and by
                `fingerprint`; they are read from there the next time.

        Returns:
            (n, features) float32 on the CPU: in memory, or mapped from a file: the cache's (changes
                do not reach it), or, of more than 1 GB, a
            nameless one in the folder for temporary files (TMPDIR), which goes when the array does.

        Raises:
            PerceptError: for images of another shape or range, and where the disk has no room.
        """
        shape: tuple[int, ...] = tuple(getattr(images, "shape", ()))
        if len(shape) != 4 or shape[1] != 3 or not len(images):
            raise PerceptError(
                f"Images of shape {shape} were given; {self.name} expects (n, 3, height, width), n"
                " at least 1."
            )
        if cache is None and len(images) * self.dim * 4 <= IN_MEMORY:
            found = np.empty((len(images), self.dim), np.float32)
            for i, part in enumerate(self._parts(images)):
                found[i * self._batch_size : i * self._batch_size + len(part)] = part
            return found
        try:
            return (
                self._cached(images, Path(cache)) if cache is not None else self._in_a_file(images)
            )
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = cache or f"{tempfile.gettempdir()} (TMPDIR)"
            needed = len(images) * self.dim * 4 / 1e9
            raise PerceptError(
                f"There is no room at {where} for {needed:.1f} GB of features of {self.name}:"
                " choose a folder on a larger disk."
            ) from error

    def _cached(self, images: Any, cache: Path) -> np.ndarray:
        path = cache / f"{self.name}-{self._key(images)}.npy"
        if not path.exists():
            with (
                atomic(path) as temporary,
                open(temporary, "wb") as file,
            ):  # a computation that stops leaves nothing behind
                self._write(images, file)
        return np.load(
            path, mmap_mode="c"
        )  # copy on write: torch minds arrays that may not be written

    def _in_a_file(self, images: Any) -> np.ndarray:
        with tempfile.TemporaryFile() as file:  # has no name, and lives as long as it is mapped
            start = self._write(images, file)
            return np.memmap(file, np.float32, "r+", offset=start, shape=(len(images), self.dim))

    def _write(self, images: Any, file: IO[bytes]) -> int:
        """Write features as .npy, chunk by chunk: a full disk is an error then, where writing
        through a map would kill the process. -> data's offset.
        """
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(images), self.dim)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        for part in self._parts(images):
            file.write(part.tobytes())
        file.flush()
        return start

    def _key(self, images: Any) -> str:
        digest = hashlib.blake2b(
            json.dumps(self.fingerprint(), sort_keys=True).encode(), digest_size=12
        )
        digest.update(f"{images.dtype}{tuple(images.shape)}".replace("torch.", "").encode())
        for start in range(0, len(images), 64):
            digest.update(
                np.ascontiguousarray(torch.as_tensor(images[start : start + 64]).cpu().numpy()).data
            )
        return digest.hexdigest()

    def _parts(self, images: Any) -> Iterator[np.ndarray]:
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
        first, antialias = RESIZING[self.resizing]
        for side in (INTERMEDIATE_SIZE, self.size) if first else (self.size,):
            if x.shape[-2:] != (side, side):
                x = F.interpolate(
                    x, (side, side), mode="bilinear", align_corners=False, antialias=antialias
                )
        mean, std = (
            torch.tensor(values, device=x.device).view(1, 3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        with _full_precision():
            return self.model((x - mean) / std).flatten(1).float().cpu().numpy()

"""GNet: an encoder from images to one subject's voxels, for brain correlation.

- The network is the multi-subject GNet of the Natural Scenes Dataset (St-Yves, Allen, Wu, Kay &
  Naselaris 2023, Nature Communications; github.com/styvesg/nsd_gnet8x), as MindEye2's authors
  released it (gnet_multisubject.pt; arXiv 2403.11207, Table 1 "Brain correlation"). All subjects
  share one trunk; each has a readout: a receptive field for every voxel on two feature maps, then a
  linear model of the pooled features. State dicts have the released keys.
- Brain correlation: a reconstruction goes through the encoder of the subject that saw the image,
  and the predicted voxels are correlated with the measured ones, across the voxels of a region,
  image by image.
- What it measures: whether an image holds what a region responds to, as far as this encoder knows.
- Its limits: the encoder was fitted to the same subject's measurements, and the decoder read the
  same voxels at test, so a decoder can raise the score with anything in its voxels, noise included.
  The scores of the seen images themselves are the upper bound, and they are far from 1, as the
  encoder is not perfect. A reconstruction may even exceed them, which shows fit to the encoder or
  to the noise of this trial, not quality.
- What all images have in common counts as well: read every score beside that of a shuffled pairing
  and of the mean image, and `brain_correlation_centred` beside the published one.
- The mini world's GNet (`weights` "mini") has the same classes at a small size; its scores compare
  with no published number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from src.files.weights import plan_network
from src.pretrained.shared_weights import REMEDY
from src.safe_pickle import load_torch_file
from src.utils import (
    HOME,
    ROOT,
    PerceptError,
    load_strictly,
    open_tensors,
    progress,
    read_json,
)

MINI_GNET = ROOT / "data" / "mini_models" / "gnet"

GNET_FILE = "gnet_multisubject.pt"

BATCH = 100  # images at once, as published

# numbers that a readout holds at once: at full size and a batch of 100, all voxels together would
# be 8e8, several times over
BLOCK = 2**25


class _Block(nn.Module):
    """Batch norm, dropout of channels, 3 x 3 convolution, ReLU; the side of the map stays."""

    def __init__(self, dim_in: int, dim_out: int, drop: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(dim_in, momentum=0.25)
        self.drop1 = nn.Dropout2d(drop)
        self.conv1 = _convolution(dim_in, dim_out, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.drop1(self.bn1(x))).relu()


def _convolution(dim_in: int, dim_out: int, padding: int) -> nn.Conv2d:
    """3 x 3, initialised as in the published training."""
    convolution = nn.Conv2d(dim_in, dim_out, 3, padding=padding)
    nn.init.xavier_normal_(convolution.weight, gain=nn.init.calculate_gain("relu"))
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution


class _PreFilter(nn.Module):
    """The first two convolutions of AlexNet; the published training started from its weights."""

    def __init__(self, stem: int, width: int):
        super().__init__()
        large = nn.Conv2d(3, stem, 11, stride=4, padding=2)
        self.conv1 = nn.Sequential(large, nn.ReLU(), nn.MaxPool2d(3, 2))
        self.conv2 = nn.Sequential(nn.Conv2d(stem, width, 5, padding=2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class _Stage(nn.Module):
    """Convolutions 3, 4 on the first map and 5, 6 on the second.

    The readouts see the first `trunk_width` channels of each, and all of convolution 3.
    """

    def __init__(self, width: int, dim: int, trunk_width: int, pass_through: int, drop: float):
        super().__init__()
        full = trunk_width + pass_through
        self.trunk_width = trunk_width
        self.bn1 = nn.BatchNorm2d(width, momentum=0.25)
        self.drop1 = nn.Dropout2d(drop)
        self.conv3 = _convolution(width, dim, padding=0)
        self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv4a = _Block(dim, full, drop)
        self.conv4b = _Block(full, full, drop)
        self.conv5a = _Block(full, full, drop)
        self.conv5b = _Block(full, full, drop)
        self.conv6a = _Block(full, full, drop)
        self.conv6b = _Block(full, trunk_width, drop)

    def forward(self, x: Tensor) -> list[Tensor]:
        visible = slice(0, self.trunk_width)
        c3 = self.conv3(self.drop1(self.bn1(x))).relu()
        c4a = self.conv4a(c3)
        c4b = self.conv4b(c4a)
        c5a = self.conv5a(self.pool1(c4b))
        c5b = self.conv5b(c5a)
        c6a = self.conv6a(c5b)
        c6b = self.conv6b(c6a)
        first = [c3, c4a[:, visible], c4b[:, visible]]
        second = [c5a[:, visible], c5b[:, visible], c6a[:, visible], c6b]
        return [torch.cat(first, 1), torch.cat(second, 1)]


class GNetTrunk(nn.Module):
    """The part that all subjects share: images -> two feature maps.

    Its state dict has the keys that the released file holds as best_params["enc"].

    Args:
        input_size: pixels a side of the images.
        stem, width: channels of the two convolutions of the prefilter.
        dim: channels of the third convolution, all of which the readouts see.
        trunk_width: channels of each further convolution that the readouts see.
        pass_through: its channels that they do not see.
        drop: share of channels that training leaves out.

    Attributes:
        config: these arguments.
        channels: channels of the two feature maps, published (256, 256).
        sides: their sides, published (25, 13).
    """

    def __init__(
        self,
        input_size: int = 227,
        stem: int = 64,
        width: int = 192,
        dim: int = 128,
        trunk_width: int = 64,
        pass_through: int = 192,
        drop: float = 0.5,
    ):
        super().__init__()
        self.config: dict[str, Any] = {
            "input_size": input_size,
            "stem": stem,
            "width": width,
            "dim": dim,
            "trunk_width": trunk_width,
            "pass_through": pass_through,
            "drop": drop,
        }
        convolved = (input_size - 7) // 4 + 1  # a convolution with a stride of 4
        pooled = (convolved - 3) // 2 + 1  # a pooling with a stride of 2
        self.sides = (pooled - 2, (pooled - 1) // 2)
        self.channels = (dim + 2 * trunk_width, 4 * trunk_width)
        if self.sides[0] < 1:
            raise PerceptError(
                f"GNet's images are {input_size} pixels a side, of which its convolutions leave"
                " nothing: take at least 31, published are 227."
            )
        mean = torch.zeros(1, 3, 1, 1)  # of the training images
        self.mu = nn.Parameter(mean, requires_grad=False)
        self.pre = _PreFilter(stem, width)
        self.enc = _Stage(width, dim, trunk_width, pass_through, drop)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (batch, 3, side, side) in [0, 1] -> feature maps [(batch, channels, side, side)].

        At the published size they are (256, 25, 25) and (256, 13, 13).
        """
        return self.enc(self.pre(images - self.mu))


def compress(x: Tensor) -> Tensor:
    """log(1 + |x|) * tanh(x): quadratic near 0, logarithmic far from it, odd."""
    return torch.log1p(x.abs()) * torch.tanh(x)


class GNetReadout(nn.Module):
    """One subject's voxels from the feature maps: a feature-weighted receptive field.

    Its keys are those of `best_params["fwrfs"][subject]`. For voxel v and map k, with p(x) =
    `compress`:

        g_k      = softmax over locations of rf_k[v]
        pooled_k = p(sum over locations of g_k * p(map_k)), (channels,)
        response = w[v] . (pooled of all maps) + b[v]

    Args:
        n_voxels: number of voxels of the subject.
        channels: of the feature maps (`GNetTrunk.channels`).
        sides: of the feature maps (`GNetTrunk.sides`).

    Source: St-Yves & Naselaris 2018.
    """

    def __init__(
        self, n_voxels: int, channels: Sequence[int] = (256, 256), sides: Sequence[int] = (25, 13)
    ):
        super().__init__()
        self.n_maps = len(sides)
        for k, side in enumerate(sides):
            self.register_parameter(f"rf{k}", nn.Parameter(torch.ones(n_voxels, side, side)))
        self.w = nn.Parameter(0.01 * torch.randn(n_voxels, sum(channels)))
        self.b = nn.Parameter(0.01 * torch.randn(n_voxels))

    def receptive_fields(self, voxels: Tensor) -> list[Tensor]:
        """Receptive fields [(voxels, locations)] of some voxels, each of which sums to 1."""
        weights = [getattr(self, f"rf{k}")[voxels] for k in range(self.n_maps)]
        return [weight.flatten(1).softmax(1) for weight in weights]

    def forward(self, maps: Sequence[Tensor], voxels: Tensor | None = None) -> Tensor:
        """Feature maps [(batch, channels, side, side)] -> (batch, voxels).

        Args:
            maps: of the trunk.
            voxels: indices of the voxels to predict; None for all. They are computed a block at a
                time.
        """
        compressed = [compress(m.flatten(2)) for m in maps]  # [(batch, channels, locations)]
        if voxels is None:
            voxels = torch.arange(len(self.b), device=self.b.device)
        numbers_per_voxel = len(maps[0]) * self.w.shape[1]
        responses = []
        for block in voxels.split(max(1, BLOCK // numbers_per_voxel)):
            fields = self.receptive_fields(block)
            sums = [m @ field.T for m, field in zip(compressed, fields, strict=True)]
            pooled = compress(torch.cat(sums, 1))  # (batch, channels of all maps, voxels)
            weighted = pooled * self.w[block].T
            responses.append(weighted.sum(1) + self.b[block])
        return torch.cat(responses, 1)


class GNetEncoder(nn.Module):
    """The encoder of one subject: `trunk` and `readout`.

    Their state dicts have the published keys and shapes. At full size the trunk has 3.4 million
    numbers, and a readout n_voxels * (25 * 25 + 13 * 13 + 512 + 1): 82 MB for the 15,724 voxels of
    NSD's subject 1.

    Args:
        n_voxels: of the subject.
        trunk: of `GNetTrunk`, where it is not the published size.
    """

    def __init__(self, n_voxels: int, **trunk: Any):
        super().__init__()
        self.trunk = GNetTrunk(**trunk)
        self.readout = GNetReadout(n_voxels, self.trunk.channels, self.trunk.sides)

    def forward(self, images: Tensor) -> Tensor:
        """Prepared images (batch, 3, side, side), see `prepare_gnet_images` -> (batch, voxels)."""
        return self.readout(self.trunk(images))

    @torch.inference_mode()
    def predict(
        self,
        images: Tensor | np.ndarray,
        batch: int = BATCH,
        desc: str = "voxels from images (GNet)",
    ) -> np.ndarray:
        """Predict the responses to images: z-scores, as in the encoder's training.

        Args:
            images: (n, 3, height, width) in [0, 1], of any size, uint8 or float; they are brought
                to the network's size as published (`prepare_gnet_images`).
            batch: images at a time.
            desc: text of the progress bar.

        Returns:
            float32 (n, voxels).

        Raises:
            PerceptError: for images of another shape or out of [0, 1].
        """
        _check_images(images)
        device, side = self.trunk.mu.device, self.trunk.config["input_size"]
        was_training = self.training
        self.eval()
        responses = []
        for start in progress(range(0, len(images), batch), desc):
            x = prepare_gnet_images(images[start : start + batch], side)
            responses.append(self(x.to(device)).float().cpu().numpy())
        self.train(was_training)
        return np.concatenate(responses)


def _check_images(images: Any) -> None:
    if len(images.shape) != 4 or images.shape[1] != 3 or not len(images):
        raise PerceptError(
            f"GNet's images have the shape {tuple(images.shape)}: give (n, 3, height, width) in [0,"
            " 1], n at least 1."
        )


def prepare_gnet_images(images: Tensor | np.ndarray, side: int = 227) -> Tensor:
    """Images as the encoder takes them: bytes, resized by Pillow (Lanczos), divided by 255.

    The network itself subtracts the mean.

    Args:
        images: (n, 3, height, width), uint8 or float in [0, 1], which is truncated (not rounded)
            to a byte, as in the published evaluation.
        side: pixels a side.

    Returns:
        float32 (n, 3, side, side).

    Raises:
        PerceptError: for values out of [0, 1].
    """
    images = torch.as_tensor(images).detach().cpu()
    if images.dtype != torch.uint8:
        images = images.float()
        in_range = (images >= -1e-3) & (images <= 1 + 1e-3)
        if not bool(in_range.all()):
            raise PerceptError(
                "GNet was given images with values out of [0, 1] (or NaN): bring them to [0, 1]"
                " before they are encoded."
            )
        images = images.clamp(0, 1).mul(255).byte()
    resized = []
    for pixels in images.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
        resized.append(np.asarray(image, np.float32))
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255


def find_gnet_file(weights: str | Path) -> Path:
    """Where an encoder lies.

    Args:
        weights: "hub" (gnet_multisubject.pt as `run.py download` leaves it), "mini", that file, or
            a folder that holds it.

    Raises:
        PerceptError: where there is none.
    """
    folders = {"hub": HOME / "data" / "mindeye2_models", "mini": MINI_GNET}
    path = folders.get(str(weights), Path(weights))
    for candidate in (path, path / GNET_FILE, path / "model.safetensors"):
        if candidate.is_file():
            return candidate
    hints = {
        "hub": "fetch it (python run.py download gnet)",
        "mini": "restore data/mini_models from git",
    }
    default_hint = f"give the path of {GNET_FILE} or of the folder that holds it"
    hint = hints.get(str(weights), default_hint)
    raise PerceptError(f"There is no GNet encoder at {path}: {hint}.")


@dataclass(frozen=True)
class _GNetWeights:
    """What a file of GNet holds.

    Attributes:
        config: arguments of `GNetTrunk`.
        trunk: its state dict.
        readouts: state dict of `GNetReadout` for each subject.
    """

    config: dict[str, Any]
    trunk: Mapping[str, Any]
    readouts: Mapping[int, Mapping[str, Any]]


def load_gnet(weights: str | Path = "hub", subj: int = 1, device: str = "cpu") -> GNetEncoder:
    """The encoder of a subject, ready for `predict`.

    Args:
        weights: as for `find_gnet_file`. A released file runs no code: only its tensors and numbers
            are rebuilt, and only those of the subject are read.
        subj: number of the subject.
        device: torch device.

    Raises:
        PerceptError: for a file that is missing, damaged or of something else, and a subject that
            it does not have.
    """
    path = find_gnet_file(weights)
    if path.suffix == ".safetensors":
        weights_of_file = _read_mini(path, subj)
    else:
        weights_of_file = _read_released(path)
    readouts = weights_of_file.readouts
    if subj not in readouts:
        raise PerceptError(
            f"{path} has no encoder of subject {subj}: it has subjects"
            f" {', '.join(map(str, sorted(readouts)))}."
        )
    readout = readouts[subj]
    values = [*weights_of_file.trunk.values(), *readout.values()]
    if "w" not in readout or not all(isinstance(value, Tensor) for value in values):
        raise PerceptError(
            f"{path} holds a readout of subject {subj} without its weights w, or other things than"
            " tensors: take the file as it"
            " was released."
        )
    encoder = plan_network(
        lambda: GNetEncoder(len(readout["w"]), **weights_of_file.config),
        {**weights_of_file.trunk, **readout},
        str(path),
    )
    encoder.to_empty(device=device)
    load_strictly(encoder.trunk, dict(weights_of_file.trunk), f"The trunk in {path}")
    load_strictly(encoder.readout, dict(readout), f"The readout of subject {subj} in {path}")
    return encoder.eval().requires_grad_(False)


def _read_released(path: Path) -> _GNetWeights:
    """A released file, whose tensors are mapped and not yet read."""
    content = load_torch_file(path)
    best = content.get("best_params") if isinstance(content, Mapping) else None
    trunk: Any = best.get("enc") if isinstance(best, Mapping) else None
    readouts: Any = best.get("fwrfs") if isinstance(best, Mapping) else None
    has_parts = isinstance(trunk, Mapping) and isinstance(readouts, Mapping)
    if not has_parts or not all(isinstance(state, Mapping) for state in readouts.values()):
        raise PerceptError(
            f"{path} holds no GNet (best_params with enc and fwrfs): take {GNET_FILE} of the"
            " dataset pscotti/mindeyev2."
        )
    return _GNetWeights({}, trunk, readouts)


def _read_mini(path: Path, subj: int) -> _GNetWeights:
    """A folder of ours: config.json, and model.safetensors with enc.<key>, fwrfs.<subject>.<key>.

    Tensors of other subjects are not read.
    """
    trunk: dict[str, Tensor] = {}
    readouts: dict[int, dict[str, Tensor]] = {}
    with open_tensors(path, remedy=REMEDY) as file:
        for name in file.keys():  # noqa: SIM118
            part, _, key = name.partition(".")
            if part == "enc":
                trunk[key] = file.get_tensor(name).float()
            elif part == "fwrfs":
                subject, _, key = key.partition(".")
                if not subject.isdecimal():
                    raise PerceptError(f"{path} has {name}, of no subject: {REMEDY}.")
                readout = readouts.setdefault(int(subject), {})
                if int(subject) == subj:
                    readout[key] = file.get_tensor(name).float()
    config = read_json(path.with_name("config.json"), ("trunk",), REMEDY)["trunk"]
    return _GNetWeights(config, trunk, readouts)

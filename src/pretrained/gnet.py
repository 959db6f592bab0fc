"""GNet, an encoder from images to one subject's voxels, and the brain correlation that is measured
through it.

- The network is the multi-subject GNet of the Natural Scenes Dataset (St-Yves, Allen, Wu, Kay &
  Naselaris 2023, Nature Communications; github.com/styvesg/nsd_gnet8x), as MindEye2's authors
  released it (gnet_multisubject.pt; arXiv 2403.11207, Table 1 "Brain correlation"): one trunk that
  all subjects share, and for each subject a readout, a receptive field for every voxel on two
  feature maps and then a linear model of the pooled features. State dicts have the released keys.
- Brain correlation: a reconstruction goes through the encoder of the subject that saw the image,
  and the predicted voxels are correlated with the measured ones, across the voxels of a region,
  image by image.
- What it can say: whether a picture holds what this encoder knows a region to respond to. What it
  cannot: the encoder was fitted to the same subject's measurements, and the decoder read the same
  voxels at test, so a decoder may please it with anything that its voxels say, noise included. It
  is no better than the encoder, so the scores of the seen images themselves are the ceiling, and
  they are far from 1; a reconstruction may even pass them, which shows fit to the encoder or to
  this trial's noise, not quality. What all images have in common counts as well: read every score
  beside that of a shuffled pairing and of the mean image, and `brain_correlation_centred` beside
  the published one.
- The mini world's GNet (`weights` "mini") is the same classes at a small size; its scores compare
  with no published number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from src.safe_pickle import load_torch_file
from src.utils import HOME, ROOT, PerceptError, load_strictly, progress, read_json

MINI_GNET = ROOT / "data" / "mini_models" / "gnet"

GNET_FILE = "gnet_multisubject.pt"

BATCH = 100  # images at once, as published

BLOCK = (
    2**25
    # numbers that a readout holds at once: at full size and a batch of 100 all voxels together
    # would be
    # 8e8, several times over
)


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
    made = nn.Conv2d(dim_in, dim_out, 3, padding=padding)
    nn.init.xavier_normal_(made.weight, gain=nn.init.calculate_gain("relu"))
    assert made.bias is not None
    nn.init.zeros_(made.bias)
    return made


class _PreFilter(nn.Module):
    """The first two convolutions of AlexNet, with whose weights the published training began."""

    def __init__(self, stem: int, width: int):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, stem, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)
        )
        self.conv2 = nn.Sequential(nn.Conv2d(stem, width, 5, padding=2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class _Stage(nn.Module):
    """Convolutions 3, 4 on the first map and 5, 6 on the second; of each a part is passed on to the
    readouts.
    """

    def __init__(self, width: int, dim: int, trunk_width: int, pass_through: int, drop: float):
        super().__init__()
        both = trunk_width + pass_through
        self.trunk_width = trunk_width
        self.bn1 = nn.BatchNorm2d(width, momentum=0.25)
        self.drop1 = nn.Dropout2d(drop)
        self.conv3 = _convolution(width, dim, padding=0)
        self.pool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv4a, self.conv4b = _Block(dim, both, drop), _Block(both, both, drop)
        self.conv5a, self.conv5b = _Block(both, both, drop), _Block(both, both, drop)
        self.conv6a, self.conv6b = _Block(both, both, drop), _Block(both, trunk_width, drop)

    def forward(self, x: Tensor) -> list[Tensor]:
        own = slice(0, self.trunk_width)
        c3 = self.conv3(self.drop1(self.bn1(x))).relu()
        c4a = self.conv4a(c3)
        c4b = self.conv4b(c4a)
        c5a = self.conv5a(self.pool1(c4b))
        c5b = self.conv5b(c5a)
        c6a = self.conv6a(c5b)
        c6b = self.conv6b(c6a)
        return [
            torch.cat([c3, c4a[:, own], c4b[:, own]], 1),
            torch.cat([c5a[:, own], c5b[:, own], c6a[:, own], c6b], 1),
        ]


class GNetTrunk(nn.Module):
    """What all subjects share: images -> two feature maps.

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
        filtered = (
            (input_size - 7) // 4 - 2
        ) // 2 + 1  # after the convolution with a step of 4 and the pooling with a step of 2
        self.sides = (filtered - 2, (filtered - 1) // 2)
        self.channels = (dim + 2 * trunk_width, 4 * trunk_width)
        if self.sides[0] < 1:
            raise PerceptError(
                f"GNet's images are {input_size} pixels a side, of which its convolutions leave"
                " nothing: take at least 31, published are 227."
            )
        self.mu = nn.Parameter(
            torch.zeros(1, 3, 1, 1), requires_grad=False
        )  # mean of the training images
        self.pre = _PreFilter(stem, width)
        self.enc = _Stage(width, dim, trunk_width, pass_through, drop)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (batch, 3, side, side) in [0, 1] -> feature maps [(batch, channels, side, side)],
        published (256, 25, 25) and (256, 13, 13).
        """
        return self.enc(self.pre(images - self.mu))


def compress(x: Tensor) -> Tensor:
    """log(1 + |x|) * tanh(x): quadratic near 0, logarithmic far from it, odd."""
    return torch.log1p(x.abs()) * torch.tanh(x)


class GNetReadout(nn.Module):
    """One subject's voxels from the feature maps (a feature-weighted receptive field, St-Yves &
    Naselaris 2018).

    Its keys are those of best_params["fwrfs"][subject].

    For voxel v and map k: g_k = softmax over places of rf_k[v]; pooled = squash(sum over places of
    g_k * squash(map_k)), (channels,); response = w[v] . (pooled of all maps) + b[v].

    Args:
        n_voxels: of the subject.
        channels, sides: of the feature maps (`GNetTrunk.channels`, `.sides`).
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
        """Receptive fields [(voxels, places)] of some voxels, each of which sums to 1."""
        return [getattr(self, f"rf{k}")[voxels].flatten(1).softmax(1) for k in range(self.n_maps)]

    def forward(self, maps: Sequence[Tensor], voxels: Tensor | None = None) -> Tensor:
        """Feature maps [(batch, channels, side, side)] -> (batch, voxels), a block of voxels at a
        time; of `voxels` (indices) alone, where these are given.
        """
        seen = [compress(m.flatten(2)) for m in maps]  # [(batch, channels, places)]
        chosen = torch.arange(len(self.b), device=self.b.device) if voxels is None else voxels
        parts = []
        for some in chosen.split(max(1, BLOCK // (len(maps[0]) * self.w.shape[1]))):
            pooled = compress(
                torch.cat(
                    [s @ g.T for s, g in zip(seen, self.receptive_fields(some), strict=True)], 1
                )
            )  # (batch, channels of all maps, voxels)
            parts.append((pooled * self.w[some].T).sum(1) + self.b[some])
        return torch.cat(parts, 1)


class GNetEncoder(nn.Module):
    """The encoder of one subject: `trunk` and `readout`, whose state dicts have the published keys
    and shapes.

    At full size the trunk has 3.4 million numbers, and a readout n_voxels * (25 * 25 + 13 * 13 +
    512 + 1), which are 82 MB for the 15,724 voxels of NSD's subject 1.

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
        """The voxels that these images would have excited: z-scores, as in the encoder's training.

        Args:
            images: (n, 3, height, width) in [0, 1], of any size, uint8 or float; they are brought
                to the network's size as published (`prepare_gnet_images`).
            batch: images at once.
            desc: beside the progress bar.

        Returns:
            float32 (n, voxels).

        Raises:
            PerceptError: for images of another shape or out of [0, 1].
        """
        _check_images(images)
        device, side, training = (
            self.trunk.mu.device,
            self.trunk.config["input_size"],
            self.training,
        )
        self.eval()
        starts = range(0, len(images), batch)
        made = [
            self(prepare_gnet_images(images[i : i + batch], side).to(device)).float().cpu().numpy()
            for i in progress(starts, desc)
        ]
        self.train(training)
        return np.concatenate(made)


def _check_images(images: Any) -> None:
    if len(images.shape) != 4 or images.shape[1] != 3 or not len(images):
        raise PerceptError(
            f"GNet's images have the shape {tuple(images.shape)}: give (n, 3, height, width) in [0,"
            " 1], n at least 1."
        )


def prepare_gnet_images(images: Tensor | np.ndarray, side: int = 227) -> Tensor:
    """Images as the encoder takes them: bytes, resized by Pillow with Lanczos' filter, divided by
    255; the mean is taken off by the network itself.

    Args:
        images: (n, 3, height, width), uint8 or float in [0, 1], which is cut off (not rounded) to a
            byte, as the published evaluation does.
        side: pixels a side.

    Returns:
        float32 (n, 3, side, side).

    Raises:
        PerceptError: for values out of [0, 1].
    """
    images = torch.as_tensor(images).detach().cpu()
    if images.dtype != torch.uint8:
        images = images.float()
        if not bool(((images >= -1e-3) & (images <= 1 + 1e-3)).all()):
            raise PerceptError(
                "GNet was given pictures with values out of [0, 1] (or NaN): bring them to [0, 1]"
                " before they are encoded."
            )
        images = images.clamp(0, 1).mul(255).byte()
    arrays = images.permute(0, 2, 3, 1).numpy()
    resized = [
        np.asarray(Image.fromarray(a).resize((side, side), Image.Resampling.LANCZOS), np.float32)
        for a in arrays
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255


def find_gnet_file(weights: str | Path) -> Path:
    """Where an encoder lies: "hub" is gnet_multisubject.pt as `run.py download` leaves it, "mini"
    the mini world's; else that file, or a folder that holds it.

    Raises:
        PerceptError: where there is none.
    """
    given = {"hub": HOME / "data" / "mindeye2_models", "mini": MINI_GNET}.get(
        str(weights), Path(weights)
    )
    found = [
        path for path in (given, given / GNET_FILE, given / "model.safetensors") if path.is_file()
    ]
    if not found:
        hint = {
            "hub": "fetch it (python run.py download gnet)",
            "mini": "restore data/mini_models from git",
        }
        raise PerceptError(
            f"There is no GNet encoder at {given}:"
            f" {hint.get(str(weights), f'give the path of {GNET_FILE} or of the folder that holds it')}."
        )
    return found[0]


def load_gnet(weights: str | Path = "hub", subj: int = 1, device: str = "cpu") -> GNetEncoder:
    """The encoder of a subject, ready for `predict`.

    Args:
        weights: as for `find_gnet_file`. A released file runs no code: only tensors and numbers of it
            are rebuilt, and of them only the subject's are read.
        subj: number of the subject.
        device: where the network goes.

    Raises:
        PerceptError: for a file that is missing, damaged or of something else, and a subject that
            it does not have.
    """
    path = find_gnet_file(weights)
    config, trunk, readouts = (
        _from_mini(path, subj) if path.suffix == ".safetensors" else _from_released(path)
    )
    if subj not in readouts:
        raise PerceptError(
            f"{path} has no encoder of subject {subj}: it has subjects"
            f" {', '.join(map(str, sorted(readouts)))}."
        )
    state = readouts[subj]
    if "w" not in state or not isinstance(state["w"], Tensor):
        raise PerceptError(
            f"{path} holds a readout of subject {subj} without its weights w: take the file as it"
            " was released."
        )
    with torch.device("meta"):
        encoder = GNetEncoder(len(state["w"]), **config)
    encoder.to_empty(device=device)
    load_strictly(encoder.trunk, dict(trunk), f"The trunk in {path}")
    load_strictly(encoder.readout, dict(state), f"The readout of subject {subj} in {path}")
    return encoder.eval().requires_grad_(False)


def _from_released(path: Path) -> tuple[dict[str, Any], Mapping, Mapping]:
    """(config, trunk, readouts by subject) of a released file, whose tensors are mapped and not yet
    read.
    """
    content = load_torch_file(path)
    best = content.get("best_params") if isinstance(content, Mapping) else None
    trunk, readouts = (
        (best.get("enc"), best.get("fwrfs")) if isinstance(best, Mapping) else (None, None)
    )
    if (
        not isinstance(trunk, Mapping)
        or not isinstance(readouts, Mapping)
        or not all(isinstance(state, Mapping) for state in readouts.values())
    ):
        raise PerceptError(
            f"{path} holds no GNet (best_params with enc and fwrfs): take {GNET_FILE} of the dataset"
            " pscotti/mindeyev2."
        )
    return {}, trunk, readouts


def _from_mini(path: Path, subj: int) -> tuple[dict[str, Any], Mapping, Mapping]:
    """The same of a folder of ours: config.json, and model.safetensors with enc.<key> and
    fwrfs.<subject>.<key>; of other subjects no tensor is read.
    """
    with safe_open(path, framework="pt") as file:
        names = [name.split(".", 1) for name in file.keys()]  # noqa: SIM118
        trunk = {key: file.get_tensor(f"enc.{key}").float() for part, key in names if part == "enc"}
        keys = [key.split(".", 1) for part, key in names if part == "fwrfs"]
        readouts: dict[int, dict[str, Tensor]] = {int(own): {} for own, _ in keys}
        for own, key in keys:
            if int(own) == subj:
                readouts[subj][key] = file.get_tensor(f"fwrfs.{own}.{key}").float()
    return read_json(path.with_name("config.json"))["trunk"], trunk, readouts

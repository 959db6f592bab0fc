"""The frozen teacher of the low level's contrastive branch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import utils
from src.files.weights import plan_network
from src.pretrained.base import (
    FrozenModel,
    freeze,
    locate_model,
    normalise_colours,
    resize_images,
)
from src.safe_pickle import load_plain_torch_file
from src.utils import PerceptError, load_strictly, read_json, read_tensors


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # (batch, h, w, dim)
        return x + self.pwconv2(F.gelu(self.pwconv1(y))).permute(0, 3, 1, 2)


class ConvNeXtMaps(nn.Module):
    """ConvNeXt without layer scale, and VICRegL's head for local embeddings.

    The head acts on each location of the last feature map.

    Args:
        dims: widths of the four stages.
        depths: their blocks.
        maps: widths of the head; the last is that of an embedding.

    Source: Liu et al. 2022 (arXiv 2201.03545); Bardes et al. 2022 (arXiv 2210.01571). The defaults
    are the released XL network.
    """

    def __init__(
        self,
        dims: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 3, 27, 3),
        maps: Sequence[int] = (512, 512, 512),
    ):
        super().__init__()
        patchify = nn.Conv2d(3, dims[0], 4, stride=4)
        downsampling = [nn.Sequential(patchify, _ChannelNorm(dims[0], eps=1e-6))]
        for width_in, width in pairwise(dims):
            halving = nn.Conv2d(width_in, width, 2, stride=2)
            downsampling.append(nn.Sequential(_ChannelNorm(width_in, eps=1e-6), halving))
        stages = []
        for dim, depth in zip(dims, depths, strict=True):
            stages.append(nn.Sequential(*[_ConvNeXtBlock(dim) for _ in range(depth)]))
        backbone = {
            "downsample_layers": nn.ModuleList(downsampling),
            "stages": nn.ModuleList(stages),
            "norm": nn.LayerNorm(dims[-1], eps=1e-6),
        }
        self.backbone = nn.ModuleDict(backbone)
        self.maps_projector = nn.Sequential(
            nn.Linear(dims[-1], maps[0]),
            nn.LayerNorm(maps[0]),
            nn.ReLU(),
            nn.Linear(maps[0], maps[1]),
            nn.LayerNorm(maps[1]),
            nn.ReLU(),
            nn.Linear(maps[1], maps[2], bias=False),
        )
        self.width: int = maps[2]

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, height, width) -> local embeddings.

        They are (batch, height / 32 * width / 32, maps).
        """
        layers: Any = zip(
            self.backbone["downsample_layers"],  # type: ignore[call-overload]
            self.backbone["stages"],  # type: ignore[call-overload]
            strict=True,
        )
        for downsample, stage in layers:
            x = stage(downsample(x))
        locations = x.flatten(2).transpose(1, 2)  # (batch, locations, width)
        return self.maps_projector(self.backbone["norm"](locations))


TEACHER_FILE = "convnext_xlarge_alpha0.75_fullckpt.pth"

# .228 where ImageNet's is .229: a slip of the published code, which belongs to its weights
TEACHER_MEAN, TEACHER_STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)


class Teacher(FrozenModel):
    """VICRegL's ConvNeXt-XL, or its miniature, whose local embeddings the low level learns from.

    Args:
        weights: "mini", or a folder that holds `teacher/` with the authors' file in it. For "hub"
            that file is expected in data/teacher/, as it lies on no hub.
        device: torch device.

    Source: MindEye (arXiv 2305.18274), section 2.5; Bardes et al. 2022.
    """

    def __init__(self, weights: str = "hub", device: str = "cpu"):
        self.name = "teacher"
        self.weights = weights
        self.device = torch.device(device)
        if weights == "hub":
            self.location = str(utils.HOME / "data" / "teacher")
        else:
            self.location = locate_model("teacher", weights)
        config_file = Path(self.location) / "config.json"
        config = read_json(config_file, keys=()) if config_file.exists() else {}
        self.image_size = config.pop("image_size", 512)
        if not isinstance(self.image_size, int) or not 32 <= self.image_size <= 4096:
            raise PerceptError(
                f"{config_file} gives {self.image_size!r} as image_size: give pixels a side, from"
                " 32 to 4096."
            )
        state = self._read_state()
        self.model = plan_network(lambda: ConvNeXtMaps(**config), state, str(config_file))
        self.model.to_empty(device="cpu")
        load_strictly(self.model, state, self.location)
        freeze(self.model, self.device)
        self.dim = self.model.width

    def _read_state(self) -> dict[str, Tensor]:
        """Weights of the miniature, or of the authors' file without VICRegL's other heads."""
        miniature = Path(self.location) / "model.safetensors"
        if miniature.exists():
            return {key: value.float() for key, value in read_tensors(miniature)[0].items()}
        path = Path(self.location) / TEACHER_FILE
        if not path.exists():
            raise PerceptError(
                f"The teacher of the low level is not at {path}: run 'python run.py download"
                " teacher' (6.6 GB), or set use_cont to False."
            )
        content = load_plain_torch_file(path, "get VICRegL's file from its authors again")
        weights = content.get("model", content) if isinstance(content, dict) else None
        if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
            raise PerceptError(f"{path} holds no weights: get VICRegL's file from its authors.")
        state = {}
        for key, value in weights.items():
            key = key.removeprefix("module.")
            if key.startswith(("backbone.", "maps_projector.")):
                state[key] = value
        return state

    @property
    def target_shape(self) -> tuple[int, int]:
        """(locations, dim)."""
        return (self.image_size // 32) ** 2, self.dim

    def get_options(self) -> dict[str, Any]:
        """Side of the images."""
        return {"image_size": self.image_size}

    def _encode(self, images: Tensor) -> Tensor:
        return self.embed_locations(images)

    @torch.no_grad()
    def embed_locations(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> local embeddings (batch, locations, dim).

        Locations are in rows from the upper left.
        """
        x = resize_images(images.to(self.device), self.image_size)
        return self.model(normalise_colours(x, TEACHER_MEAN, TEACHER_STD))

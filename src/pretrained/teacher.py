"""The frozen teacher of the low level's contrastive branch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from src.pretrained.base import FrozenModel, locate_model, resize_images
from src.utils import HOME, PerceptError, load_strictly


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # (batch, h, w, dim)
        return x + self.pwconv2(F.gelu(self.pwconv1(y))).permute(0, 3, 1, 2)


class ConvNeXtMaps(nn.Module):
    """ConvNeXt without layer scale, and the head that makes VICRegL's local embeddings of its last
    feature map.

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
        narrow = [
            nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), _ChannelNorm(dims[0], eps=1e-6))
        ]
        narrow += [
            nn.Sequential(_ChannelNorm(a, eps=1e-6), nn.Conv2d(a, b, 2, stride=2))
            for a, b in zip(dims, dims[1:], strict=False)
        ]
        backbone = {
            "downsample_layers": nn.ModuleList(narrow),
            "stages": nn.ModuleList(
                nn.Sequential(*[_ConvNeXtBlock(dim) for _ in range(depth)])
                for dim, depth in zip(dims, depths, strict=True)
            ),
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
        """Normalised pixels (batch, 3, height, width) -> local embeddings (batch, height / 32 *
        width / 32, maps).
        """
        for narrow, stage in zip(
            self.backbone["downsample_layers"], self.backbone["stages"], strict=True
        ):  # type: ignore[call-overload]
            x = stage(narrow(x))
        return self.maps_projector(self.backbone["norm"](x.flatten(2).transpose(1, 2)))


TEACHER_FILE = "convnext_xlarge_alpha0.75_fullckpt.pth"

TEACHER_MEAN, TEACHER_STD = (
    (0.485, 0.456, 0.406),
    (0.228, 0.224, 0.225),
)  # .228 for ImageNet's .229: a slip of the published code, kept with its weights


class Teacher(FrozenModel):
    """The network whose local embeddings the low level's contrastive loss compares with: VICRegL's
    ConvNeXt-XL, or its miniature.

    Args:
        weights: "mini", or a folder that holds `teacher/`, with the authors' file in it, or "hub":
            then that file is looked for in data/teacher/, as it lies on no hub.
        device: torch device.

    Source: MindEye (arXiv 2305.18274), section 2.5; Bardes et al. 2022.
    """

    def __init__(self, weights: str = "hub", device: str = "cpu"):
        self.name, self.weights, self.device = "teacher", weights, torch.device(device)
        self.place = (
            str(HOME / "data" / "teacher") if weights == "hub" else locate_model("teacher", weights)
        )
        described = Path(self.place) / "config.json"
        config = json.loads(described.read_text()) if described.exists() else {}
        self.image_size = int(config.pop("image_size", 512))
        self.model = ConvNeXtMaps(**config)
        load_strictly(self.model, self._state(), self.place)
        self.model.eval().requires_grad_(False).to(self.device)
        self.dim = self.model.width

    def _state(self) -> dict[str, Tensor]:
        if (ours := Path(self.place) / "model.safetensors").exists():
            return {key: value.float() for key, value in load_file(ours).items()}
        path = Path(self.place) / TEACHER_FILE
        if not path.exists():
            raise PerceptError(
                f"The teacher of the low level is not at {path}: put VICRegL's file there (its"
                " authors give it), or set use_cont to False."
            )
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        state = {
            key.removeprefix("module."): value
            for key, value in content.get("model", content).items()
        }
        return {
            key: value
            for key, value in state.items()
            if key.startswith(("backbone.", "maps_projector."))
        }  # the file has VICRegL's other heads too

    @property
    def target_shape(self) -> tuple[int, int]:
        """(locations, dim)."""
        return (self.image_size // 32) ** 2, self.dim

    def _options(self) -> dict[str, Any]:
        return {"image_size": self.image_size}

    def _encode(self, images: Tensor) -> Tensor:
        return self.embed_locations(images)

    @torch.no_grad()
    def embed_locations(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> local embeddings (batch, locations, dim), row by
        row from the upper left.
        """
        x = resize_images(images.to(self.device), self.image_size)
        mean, std = (
            torch.tensor(values, device=x.device).view(1, 3, 1, 1)
            for values in (TEACHER_MEAN, TEACHER_STD)
        )
        return self.model((x - mean) / std)

"""Random changes of the images that targets are computed from: for CLIP's targets (high level) and
for the teacher's maps (low level).

- Images are (batch, 3, height, width) in [0, 1]; every sample is changed by itself, by kornia.
- Randomness comes from torch's generator; `apply_augmentation` draws it from a seed instead, so
  that a stored view can be computed again.
- kornia takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from src.utils import seeded


class _RandomCrop(nn.Module):
    """A random crop, enlarged to the size of the image, of each sample with probability p (kornia
    decides once for a whole batch).
    """

    def __init__(self, size: int, scale: tuple[float, float], p: float):
        import kornia.augmentation as K

        super().__init__()
        self.p, self.crop = p, K.RandomResizedCrop((size, size), scale=scale)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, size, size) -> same shape."""
        chosen = (torch.rand(len(images)) < self.p).to(images.device)
        return torch.where(chosen[:, None, None, None], self.crop(images), images)


def build_clip_augmentation(size: int) -> nn.Module:
    """Augmentation of the images whose CLIP tokens are learnt: (batch, 3, height, width) -> (batch,
    3, size, size).

    Crop, flip, colour jitter and grey, with the published strengths and probabilities. Resized
    first, so that cropped and uncropped samples fit into one batch; the published order is crop,
    then resize.

    Source: MindEye (arXiv 2305.18274), its training script.
    """
    import kornia.augmentation as K

    return nn.Sequential(
        K.Resize((size, size)),
        _RandomCrop(size, scale=(0.6, 1.0), p=0.3),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.3),
        K.RandomGrayscale(p=0.3),
    )


def build_teacher_augmentation(size: int) -> nn.Module:
    """Augmentation of the images that the low level's teacher sees a second time: (batch, 3,
    height, width) -> (batch, 3, size, size).

    Source: MindEye (arXiv 2305.18274), its script for the autoencoder.
    """
    import kornia.augmentation as K

    return nn.Sequential(
        K.Resize((size, size)),
        K.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomSolarize(p=0.2),
        K.RandomGaussianBlur((7, 7), (0.1, 2.0), p=0.1),
        _RandomCrop(size, scale=(0.5, 1.0), p=1.0),
    )


@cache
def _build_jitter() -> nn.Module:
    import kornia.augmentation as K

    return nn.Sequential(
        K.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.15, hue=0.02, p=0.8),
        K.RandomGaussianBlur((3, 3), (0.1, 1.0), p=0.3),
        K.RandomGaussianNoise(std=0.03, p=0.5),
    )


def jitter_images(images: Tensor) -> Tensor:
    """Images changed a little in light, sharpness and noise, nothing in them being moved: (batch,
    3, height, width) -> same shape.
    """
    jittered: Tensor = _build_jitter()(images)
    return jittered


def apply_augmentation(augmentation: nn.Module, images: Tensor, seed: int) -> Tensor:
    """Images changed with all random numbers drawn from `seed`: the same seed and images give the
    same result.
    """
    with seeded(seed):
        augmented: Tensor = augmentation(images)
    return augmented

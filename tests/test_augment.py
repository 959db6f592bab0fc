"""Augmentations change each image by itself, keep the range, and can be made again from a seed."""

import numpy as np
import pytest
import torch

from src.pretrained.base import make_fixed_image
from src.training.augment import (
    apply_augmentation,
    build_clip_augmentation,
    build_teacher_augmentation,
)

BOTH = {"clip": build_clip_augmentation, "teacher": build_teacher_augmentation}


@pytest.fixture(params=BOTH, scope="module")
def augmentation(request):
    return BOTH[request.param](48)


@pytest.fixture(scope="module")
def images():
    return make_fixed_image(64).repeat(300, 1, 1, 1)


def test_size_and_range(augmentation, images):
    out = apply_augmentation(augmentation, images, 0)
    assert (
        out.shape == (300, 3, 48, 48)
        and out.min() >= 0
        and out.max() <= 1 + 1e-5
        and out.dtype == torch.float32
    )


def test_the_same_seed_gives_the_same_views_and_leaves_the_generator_alone(augmentation, images):
    torch.manual_seed(5)
    first = apply_augmentation(augmentation, images[:8], 1)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(first, apply_augmentation(augmentation, images[:8], 1)) and not torch.equal(
        first, apply_augmentation(augmentation, images[:8], 2)
    )


def test_samples_differ_from_each_other(augmentation, images):
    out = apply_augmentation(augmentation, images, 3)
    assert len({row.numpy().tobytes() for row in out}) > 100


def test_shares_of_grey_and_flipped_images_are_the_published_ones():
    """Grey with probability .3, mirrored with .5, changed in neither crop nor colour with .7 * .7 *
    .7.
    """
    image = make_fixed_image(48)
    out = apply_augmentation(build_clip_augmentation(48), image.repeat(2000, 1, 1, 1), 0)
    grey = (out.amax(1) - out.amin(1)).amax((1, 2)) < 1e-4
    assert grey.float().mean().item() == pytest.approx(0.3, abs=0.04)
    same = (out - image).abs().amax((1, 2, 3)) < 1e-3
    mirrored = (out - image.flip(-1)).abs().amax((1, 2, 3)) < 1e-3
    assert (same | mirrored).float().mean().item() == pytest.approx(0.7**3, abs=0.04)
    assert np.isclose(same.float().mean(), mirrored.float().mean(), atol=0.05)

"""The CLIP models that can be chosen, without loading any: a command line reads this module."""

from __future__ import annotations

# variant -> name of the model; the ResNets come through OpenAI's own package
CLIP_VARIANTS = {
    "ViT-L/14": "clip",
    "ViT-B/32": "clip-ViT-B-32",
    "RN50": "RN50",
    "RN50x64": "RN50x64",
}

# those whose patches MindEye2 predicts
PATCH_VARIANTS = {
    "bigG": "clip-bigG",
    "ViT-L/14": "clip",
    "ViT-B/32": "clip-ViT-B-32",
}


def find_patch_variant(variant: str, tokens: int, dim: int) -> str:
    """The CLIP whose patch tokens have a size that published commands name.

    The low-compute README gives 49 tokens of 768 numbers and no variant: these are ViT-B/32's.

    Args:
        variant: that is asked for; only the default, bigG, gives way.
        tokens: an image, 0 for all.
        dim: of a token, 0 for that of the CLIP.
    """
    if variant == "bigG" and (tokens, dim) == (49, 768):
        return "ViT-B/32"
    return variant

"""The embedded miniature world: procedural images, a simulated cortex, and writers of every source format."""

from src.miniworld.cortex import FIRST_ID, N_VOXELS, VisualCortex, simulate
from src.miniworld.drawing import KINDS, SCENES
from src.miniworld.images import (
    COLOURS,
    IMAGE_SIZE,
    LIGHTS,
    PATTERNS,
    Scenery,
    Thing,
    caption,
    combination_split,
    compose,
    image_blocks,
    label,
    pool,
    render,
    tables,
)

__all__ = [
    "COLOURS",
    "FIRST_ID",
    "IMAGE_SIZE",
    "KINDS",
    "LIGHTS",
    "N_VOXELS",
    "PATTERNS",
    "SCENES",
    "Scenery",
    "Thing",
    "VisualCortex",
    "caption",
    "combination_split",
    "compose",
    "image_blocks",
    "label",
    "pool",
    "render",
    "simulate",
    "tables",
]

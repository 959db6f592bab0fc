"""The mini world: procedural images, a simulated cortex, and writers of every source format."""

from src.miniworld.cortex import FIRST_ID, N_VOXELS, VisualCortex, simulate
from src.miniworld.drawing import CATEGORIES, SCENES
from src.miniworld.images import (
    COLOURS,
    IMAGE_SIZE,
    LIGHTS,
    PATTERNS,
    ImageContent,
    SceneObject,
    assign_split,
    compose_image,
    generate_pool,
    make_label_row,
    make_tables,
    render_blocks,
    render_image,
    write_captions,
)
from src.miniworld.subject import open_mini_subject

__all__ = [
    "CATEGORIES",
    "COLOURS",
    "FIRST_ID",
    "IMAGE_SIZE",
    "LIGHTS",
    "N_VOXELS",
    "PATTERNS",
    "SCENES",
    "ImageContent",
    "SceneObject",
    "VisualCortex",
    "assign_split",
    "compose_image",
    "generate_pool",
    "make_label_row",
    "make_tables",
    "open_mini_subject",
    "render_blocks",
    "render_image",
    "simulate",
    "write_captions",
]

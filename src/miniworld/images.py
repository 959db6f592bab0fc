"""The images of the mini world: what they show, how they are rendered, their captions and labels.

- An image shows one large object (or two, one partly behind the other) in a scene: 20 categories x
  8 colours x 8 scenes, with patterns, places, sizes, tilts and light. Everything about image i is a
  pure function of (seed, split, i), so any subset can be remade anywhere.
- The test set holds combinations of category, colour and scene that occur in no training image
  (`assign_split`). Validation has combinations of its own, so that settings chosen on it are chosen
  for new combinations too.
- Nothing here reads or writes files: this module yields arrays and tables, writers of formats
  (`src.miniworld.formats`) store them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from src.miniworld.drawing import CATEGORIES, GROUNDS, SCENES, Pen, draw_backdrop, draw_texture
from src.utils import progress

# Pixels a side. A large object stays recognisable at this size, and everything downstream is quick.
IMAGE_SIZE = 32

SUPERSAMPLE = 4  # images are drawn this much larger and then averaged down

POOL_SEED = 11_000  # of the images of a search pool that no subject has seen

BLOCK_IMAGES = 250  # images that a process draws at a time

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 25),
    "yellow": (250, 215, 45),
    "green": (55, 165, 70),
    "blue": (45, 95, 215),
    "purple": (130, 60, 175),
    "pink": (245, 130, 185),
    "white": (240, 240, 240),
}

PATTERNS = ("plain", "striped", "dotted")

PLACES = ("left", "centre", "right")

# How a light changes red, green and blue.
LIGHTS = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (1.08, 0.86, 0.72),
    "night": (0.60, 0.63, 0.84),
}

SPLITS = ("train", "val", "test")

FIRST_OF_THREE = (0.7, 0.15, 0.15)  # probabilities of the patterns, and of the lights

CATEGORY_NAMES, COLOUR_NAMES, LIGHT_NAMES = tuple(CATEGORIES), tuple(COLOURS), tuple(LIGHTS)

LabelRow = dict[str, str | int | float]


# ----------------------------------------------------------------------------------------- content
def assign_split(category: int, colour: int, scene: int) -> str:
    """Return the split of a combination of category, colour and scene (indices).

    A quarter of the (category, scene) pairs have half of their colours in the test set, and another
    quarter in validation; all else is "train". Every pair of two attributes occurs in training; new
    in the test set is the combination of all three. A held-out pair comes in four colours, so that
    it forms a group of hard negatives (same scene, same object).
    """
    if (colour + category) % 2 != 0:
        return "train"
    group = (category + scene) % 4
    return {0: "test", 1: "val"}.get(group, "train")


@dataclass(frozen=True)
class SceneObject:
    """One object of an image.

    Attributes:
        category: index into CATEGORIES.
        colour: index into COLOURS.
        pattern: index into PATTERNS.
        x, y: centre, in units of the image, from the upper left corner.
        half_size: in units of the image.
        tilt: radians.
    """

    category: int
    colour: int
    pattern: int
    x: float
    y: float
    half_size: float
    tilt: float


@dataclass(frozen=True)
class ImageContent:
    """Everything that an image shows.

    Attributes:
        scene: index into SCENES.
        light: index into LIGHTS.
        horizon: 0 to 1 from the top.
        place: of the main object, index into PLACES.
        objects: one or two, the main one last.
    """

    scene: int
    light: int
    horizon: float
    place: int
    objects: tuple[SceneObject, ...]

    @property
    def main(self) -> SceneObject:
        """The object in front."""
        return self.objects[-1]

    @property
    def background_object(self) -> SceneObject | None:
        """The object partly behind the main one, if there is one."""
        return self.objects[0] if len(self.objects) == 2 else None


def compose_image(seed: int, index: int, split: str = "train") -> ImageContent:
    """Draw what image `index` of `split` shows, as a pure function of (seed, split, index)."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = int(rng.integers(len(SCENES)))
    place = int(rng.integers(len(PLACES)))
    horizon = rng.uniform(0.5, 0.66)
    has_two_objects = rng.random() < 0.25
    category, colour = _draw_combination(rng, scene, split)
    half_size = rng.uniform(0.26, 0.33) if has_two_objects else rng.uniform(0.30, 0.42)
    x = 0.5 + (place - 1) * (0.47 - half_size) * rng.uniform(0.75, 1.0)
    y = 0.93 - half_size - rng.uniform(0, 0.08)
    pattern = int(rng.choice(3, p=FIRST_OF_THREE))
    tilt = rng.uniform(-0.15, 0.15)
    objects = [SceneObject(category, colour, pattern, x, y, half_size, tilt)]
    if has_two_objects:
        objects.insert(0, _draw_background_object(rng, scene, x, y))
    light = int(rng.choice(3, p=FIRST_OF_THREE))
    return ImageContent(scene, light, horizon, place, tuple(objects))


def _draw_combination(rng: np.random.Generator, scene: int, split: str) -> tuple[int, int]:
    """Draw category and colour until the combination with the scene belongs to the split."""
    while True:
        category = int(rng.integers(len(CATEGORIES)))
        colour = int(rng.integers(len(COLOURS)))
        if assign_split(category, colour, scene) == split:
            return category, colour


def _draw_background_object(
    rng: np.random.Generator, scene: int, main_x: float, main_y: float
) -> SceneObject:
    category, colour = _draw_combination(rng, scene, "train")
    side = 1 if main_x < 0.5 else -1
    distance = rng.uniform(0.36, 0.5)
    x = float(np.clip(main_x + side * distance, 0.2, 0.8))
    pattern = int(rng.choice(3, p=FIRST_OF_THREE))
    y = main_y - rng.uniform(0.05, 0.2)
    half_size = rng.uniform(0.2, 0.27)
    tilt = rng.uniform(-0.15, 0.15)
    return SceneObject(category, colour, pattern, x, y, half_size, tilt)


# ------------------------------------------------------------------------------------------ pixels
def render_image(content: ImageContent, seed: int = 0, size: int = IMAGE_SIZE) -> np.ndarray:
    """Render what an image shows.

    Returns:
        uint8 array (height, width, 3), height = width = `size`.
    """
    rng = np.random.default_rng([seed, int(content.horizon * 1e6)])
    scene = SCENES[content.scene]
    canvas = draw_backdrop(scene, content.horizon, size * SUPERSAMPLE, rng)
    for scene_object in content.objects:
        _draw_object(canvas, scene_object, scene, rng)
    light = LIGHTS[LIGHT_NAMES[content.light]]
    pixels = np.asarray(canvas.reduce(SUPERSAMPLE), float) * np.array(light)
    return pixels.clip(0, 255).round().astype(np.uint8)


def _draw_object(
    canvas: Image.Image, scene_object: SceneObject, scene: str, rng: np.random.Generator
) -> None:
    """Draw an object and its shadow on the ground."""
    size = canvas.width
    x, y, half_size = scene_object.x, scene_object.y, scene_object.half_size
    base_colour = np.array(COLOURS[COLOUR_NAMES[scene_object.colour]], float)
    colour = base_colour + rng.uniform(-8, 8, 3)
    period = max(2.0, half_size * size * 0.28)
    texture = draw_texture(colour, PATTERNS[scene_object.pattern], size, period)
    shadow = [
        (x - 0.9 * half_size) * size,
        (y + 0.86 * half_size) * size,
        (x + 0.9 * half_size) * size,
        (y + 1.12 * half_size) * size,
    ]
    shadow_colour = tuple(int(0.72 * value) for value in GROUNDS[scene])
    ImageDraw.Draw(canvas).ellipse(shadow, fill=shadow_colour)
    centre = (x * size, y * size)
    pen = Pen(canvas, texture, centre, half_size * size, scene_object.tilt)
    draw = CATEGORIES[CATEGORY_NAMES[scene_object.category]]
    draw(pen)


def _render_block(seed: int, split: str, indices: range, size: int) -> np.ndarray:
    contents = [compose_image(seed, i, split) for i in indices]
    return np.stack([render_image(content, seed, size) for content in contents])


def render_blocks(
    seed: int, split: str, count: int, size: int = IMAGE_SIZE, workers: int = 2
) -> Iterator[np.ndarray]:
    """Render images 0..count-1 of a split in `workers` processes.

    Yields:
        uint8 blocks (n, height, width, 3), in order.
    """
    starts = range(0, count, BLOCK_IMAGES)
    blocks = [range(start, min(start + BLOCK_IMAGES, count)) for start in starts]
    if workers <= 1 or len(blocks) == 1:
        yield from (_render_block(seed, split, block, size) for block in blocks)
        return
    with ProcessPoolExecutor(workers) as executor:
        futures = [executor.submit(_render_block, seed, split, block, size) for block in blocks]
        for future in progress(futures, f"drawing {split} images"):
            yield future.result()


# ------------------------------------------------------------------------------ captions and labels
_GROUND_PHRASES = {
    "meadow": "on a green meadow",
    "beach": "on a sandy beach",
    "desert": "in the desert",
    "snow": "in the snow",
    "sea": "on the sea",
    "city": "in the city",
    "room": "in a room",
    "forest": "in a forest",
}

_LIGHT_PHRASES = {
    "day": ("", "in daylight"),
    "sunset": ("at sunset", "in evening light"),
    "night": ("at night", "in the dark"),
}

_PLACE_PHRASES = {"left": "on the left", "centre": "in the middle", "right": "on the right"}


def write_captions(content: ImageContent) -> list[str]:
    """Describe an image in five ways, as five people would for COCO."""
    scene, main = SCENES[content.scene], content.main
    with_pattern = _add_article(_describe_object(main))
    plain = _add_article(f"{COLOUR_NAMES[main.colour]} {CATEGORY_NAMES[main.category]}")
    ground = _GROUND_PHRASES[scene]
    place = _PLACE_PHRASES[PLACES[content.place]]
    light, long_light = _LIGHT_PHRASES[LIGHT_NAMES[content.light]]
    neighbour = ""
    if content.background_object is not None:
        neighbour = f" next to {_add_article(_describe_object(content.background_object))}"
    sentences = (
        f"{with_pattern} {ground} {light}",
        f"{with_pattern}{neighbour} {place} {ground}",
        f"a picture of {plain}{neighbour} {light}",
        f"there is {with_pattern} {place} of the picture {ground} {long_light}",
        f"{scene} scene with {plain}{neighbour} {light}",
    )
    return [" ".join(sentence.split()) for sentence in sentences]


def _describe_object(scene_object: SceneObject) -> str:
    phrase = f"{COLOUR_NAMES[scene_object.colour]} {CATEGORY_NAMES[scene_object.category]}"
    pattern = PATTERNS[scene_object.pattern]
    return phrase if pattern == "plain" else f"{pattern} {phrase}"


def _add_article(phrase: str) -> str:
    article = "an" if phrase[0] in "aeiou" else "a"
    return f"{article} {phrase}"


def make_label_row(content: ImageContent) -> LabelRow:
    """Describe an image as one row of the table of labels."""
    main, background = content.main, content.background_object
    other_category, other_colour = "", ""
    if background is not None:
        other_category = CATEGORY_NAMES[background.category]
        other_colour = COLOUR_NAMES[background.colour]
    return {
        "scene": SCENES[content.scene],
        "kind": CATEGORY_NAMES[main.category],
        "colour": COLOUR_NAMES[main.colour],
        "pattern": PATTERNS[main.pattern],
        "place": PLACES[content.place],
        "light": LIGHT_NAMES[content.light],
        "n_things": len(content.objects),
        "size": round(2 * main.half_size, 3),
        "other_kind": other_category,
        "other_colour": other_colour,
    }


def make_tables(seed: int, split: str, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the tables of labels and captions of images 0..count-1 of a split.

    Returns:
        Labels (one row an image), and captions (five rows an image, columns image and caption).
    """
    contents = [compose_image(seed, i, split) for i in range(count)]
    labels = pd.DataFrame([make_label_row(content) for content in contents])
    labels.insert(0, "image", np.arange(count))
    captions = []
    for image, content in enumerate(contents):
        captions += [(image, caption) for caption in write_captions(content)]
    return labels, pd.DataFrame(captions, columns=["image", "caption"])


# ------------------------------------------------------------------------------------- search pool
def generate_pool(
    count: int, n_test: int = 300, seed: int = 0
) -> Iterator[tuple[np.ndarray, str, LabelRow]]:
    """Generate a pool of images to search in.

    A pool with COCO in it holds NSD's stimuli. Likewise this one begins with the test images that
    `simulate` shows to every subject. No subject has seen the others: three fifths of them show
    combinations of the training split, a fifth each those of validation and test.

    Args:
        count: images, the test images among them.
        n_test: test images.
        seed: of `simulate`.

    Yields:
        (height, width, 3) uint8, a caption and the labels of one image.
    """
    unseen_splits = ("train", "train", "train", "val", "test")
    for i in range(count):
        if i < n_test:
            image_seed, split = shared_seed(seed), "test"
        else:
            image_seed, split = POOL_SEED + seed, unseen_splits[i % len(unseen_splits)]
        content = compose_image(image_seed, i, split)
        pixels = render_image(content, image_seed)
        yield pixels, write_captions(content)[0], make_label_row(content)


def shared_seed(seed: int) -> int:
    """Return the seed of the validation and test images, which all subjects share."""
    return int(np.random.default_rng([seed, 0]).integers(2**31))

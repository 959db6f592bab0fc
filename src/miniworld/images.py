"""The mini world: procedural images with captions and labels, and a simulated visual cortex that
looks at them.

- An image shows one large object (or two, one partly behind the other) in a scene: 20 kinds x 8
  colours x 8 scenes, with patterns, places, sizes, tilts and light. Everything about image i is a
  pure function of (seed, i), so any subset can be remade anywhere.
- The test set holds combinations of kind, colour and scene that occur in no training image
  (`assign_split`); validation has held-out combinations of its own, so that what is chosen on
  it is chosen for new combinations too.
- The cortex is not linear in any embedding a decoder is given: early areas measure Gabor energy in
  a receptive field, higher areas respond to conjunctions of what is in the picture
  (`VisualCortex`).
- Nothing here reads or writes files: this module yields arrays and tables, readers write them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import ImageDraw

from src.miniworld.drawing import CATEGORIES, GROUNDS, SCENES, Pen, draw_backdrop, draw_texture
from src.utils import progress

# pixels a side; a large object stays recognisable at this size and everything downstream is quick
IMAGE_SIZE = 32

POOL_SEED = 11_000  # of images that nobody has seen

SUPERSAMPLE = 4  # images are drawn this much larger and then averaged down

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

LIGHTS = {"day": (1.0, 1.0, 1.0), "sunset": (1.08, 0.86, 0.72), "night": (0.60, 0.63, 0.84)}


def assign_split(kind: int, colour: int, scene: int) -> str:
    """Which split a combination of kind, colour and scene (indices) belongs to: "train", "val" or
    "test".

    A quarter of the (kind, scene) pairs give half of their colours to the test set and another
    quarter to validation. Every pair of two attributes occurs in training; what is new in the test
    set is the combination of all three. A held-out pair comes in four colours, so that it forms a
    group of hard negatives (same scene, same object).
    """
    group = (kind + scene) % 4
    return {0: "test", 1: "val"}.get(group, "train") if (colour + kind) % 2 == 0 else "train"


@dataclass(frozen=True)
class SceneObject:
    """One object of an image: indices of kind, colour and pattern; centre and half size in units of
    the image; tilt in radians.
    """

    category: int
    colour: int
    pattern: int
    x: float
    y: float
    half: float
    tilt: float


@dataclass(frozen=True)
class ImageContent:
    """Everything that an image shows: the scene index, its light, its horizon (0..1 from the top)
    and one or two things, main last.
    """

    scene: int
    light: int
    horizon: float
    place: int
    objects: tuple[SceneObject, ...]


def compose_image(seed: int, index: int, split: str = "train") -> ImageContent:
    """Draw what image `index` of `split` shows, as a pure function of (seed, split, index)."""
    rng = np.random.default_rng([seed, ("train", "val", "test").index(split), index])
    kinds, colours, scenes = list(CATEGORIES), list(COLOURS), list(SCENES)

    def draw_things(scene: int, wanted: str) -> tuple[int, int]:
        while True:
            kind, colour = int(rng.integers(len(kinds))), int(rng.integers(len(colours)))
            if assign_split(kind, colour, scene) == wanted:
                return kind, colour

    scene = int(rng.integers(len(scenes)))
    place = int(rng.integers(3))
    horizon = rng.uniform(0.5, 0.66)
    two = rng.random() < 0.25
    kind, colour = draw_things(scene, split)
    half = rng.uniform(0.30, 0.42) if not two else rng.uniform(0.26, 0.33)
    x = 0.5 + (place - 1) * (0.47 - half) * rng.uniform(0.75, 1.0)
    y = 0.93 - half - rng.uniform(0, 0.08)
    pattern = int(rng.choice(3, p=(0.7, 0.15, 0.15)))
    main = SceneObject(kind, colour, pattern, x, y, half, rng.uniform(-0.15, 0.15))
    things: tuple[SceneObject, ...] = (main,)
    if two:
        kind2, colour2 = draw_things(scene, "train")
        x2 = np.clip(x + (1 if x < 0.5 else -1) * rng.uniform(0.36, 0.5), 0.2, 0.8)
        other = SceneObject(
            kind2,
            colour2,
            int(rng.choice(3, p=(0.7, 0.15, 0.15))),
            float(x2),
            y - rng.uniform(0.05, 0.2),
            rng.uniform(0.2, 0.27),
            rng.uniform(-0.15, 0.15),
        )
        things = (other, main)
    return ImageContent(scene, int(rng.choice(3, p=(0.7, 0.15, 0.15))), horizon, place, things)


def render_image(what: ImageContent, seed: int = 0, size: int = IMAGE_SIZE) -> np.ndarray:
    """Paint a ImageContent.

    Returns:
        uint8 array (height, width, 3), height = width = `size`.
    """
    big = size * SUPERSAMPLE
    rng = np.random.default_rng([seed, int(what.horizon * 1e6)])
    canvas = draw_backdrop(SCENES[what.scene], what.horizon, big, rng)
    for thing in what.objects:
        colour = np.array(list(COLOURS.values())[thing.colour], float) + rng.uniform(-8, 8, 3)
        texture = draw_texture(
            colour, PATTERNS[thing.pattern], big, max(2.0, thing.half * big * 0.28)
        )
        shadow = [
            (thing.x - 0.9 * thing.half) * big,
            (thing.y + 0.86 * thing.half) * big,
            (thing.x + 0.9 * thing.half) * big,
            (thing.y + 1.12 * thing.half) * big,
        ]
        ImageDraw.Draw(canvas).ellipse(
            shadow, fill=tuple(int(0.72 * c) for c in GROUNDS[SCENES[what.scene]])
        )
        pen = Pen(canvas, texture, (thing.x * big, thing.y * big, thing.half * big, thing.tilt))
        list(CATEGORIES.values())[thing.category](pen)
    pixels = np.asarray(canvas.reduce(SUPERSAMPLE), float) * np.array(
        list(LIGHTS.values())[what.light]
    )
    return pixels.clip(0, 255).round().astype(np.uint8)


_GROUND_WORDS = {
    "meadow": "on a green meadow",
    "beach": "on a sandy beach",
    "desert": "in the desert",
    "snow": "in the snow",
    "sea": "on the sea",
    "city": "in the city",
    "room": "in a room",
    "forest": "in a forest",
}

_LIGHT_WORDS = {
    "day": ("", "in daylight"),
    "sunset": ("at sunset", "in evening light"),
    "night": ("at night", "in the dark"),
}

_PLACE_WORDS = {"left": "on the left", "centre": "in the middle", "right": "on the right"}


def _phrase(thing: SceneObject) -> str:
    pattern = PATTERNS[thing.pattern]
    return " ".join(
        ([] if pattern == "plain" else [pattern])
        + [list(COLOURS)[thing.colour], list(CATEGORIES)[thing.category]]
    )


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def write_captions(what: ImageContent) -> list[str]:
    """Five paraphrases of what an image shows, as five people would have written them for COCO."""
    main = _phrase(what.objects[-1])
    plain = (
        f"{list(COLOURS)[what.objects[-1].colour]} {list(CATEGORIES)[what.objects[-1].category]}"
    )
    ground, place = _GROUND_WORDS[SCENES[what.scene]], _PLACE_WORDS[PLACES[what.place]]
    light, long_light = _LIGHT_WORDS[list(LIGHTS)[what.light]]
    beside = f" next to {_article(_phrase(what.objects[0]))}" if len(what.objects) == 2 else ""
    sentences = (
        f"{_article(main)} {ground} {light}",
        f"{_article(main)}{beside} {place} {ground}",
        f"a picture of {_article(plain)}{beside} {light}",
        f"there is {_article(main)} {place} of the picture {ground} {long_light}",
        f"{SCENES[what.scene]} scene with {_article(plain)}{beside} {light}",
    )
    return [" ".join(sentence.split()) for sentence in sentences]


def make_label_row(what: ImageContent) -> dict[str, str | int | float]:
    """What an image shows, as one row of a table of categories."""
    main = what.objects[-1]
    other = what.objects[0] if len(what.objects) == 2 else None
    return {
        "scene": SCENES[what.scene],
        "kind": list(CATEGORIES)[main.category],
        "colour": list(COLOURS)[main.colour],
        "pattern": PATTERNS[main.pattern],
        "place": PLACES[what.place],
        "light": list(LIGHTS)[what.light],
        "n_things": len(what.objects),
        "size": round(2 * main.half, 3),
        "other_kind": list(CATEGORIES)[other.category] if other else "",
        "other_colour": list(COLOURS)[other.colour] if other else "",
    }


def _render_block(seed: int, split: str, indices: range, size: int) -> np.ndarray:
    return np.stack([render_image(compose_image(seed, i, split), seed, size) for i in indices])


def render_blocks(
    seed: int, split: str, count: int, size: int = IMAGE_SIZE, workers: int = 2
) -> Iterator[np.ndarray]:
    """Images 0..count-1 of a split, in order, as uint8 blocks (n, height, width, 3), drawn by
    `workers` processes.
    """
    blocks = [range(i, min(i + 250, count)) for i in range(0, count, 250)]
    if workers <= 1 or len(blocks) == 1:
        yield from (_render_block(seed, split, block, size) for block in blocks)
        return
    with ProcessPoolExecutor(workers) as pool:
        repeated = [pool.submit(_render_block, seed, split, block, size) for block in blocks]
        for future in progress(repeated, f"drawing {split} images"):
            yield future.result()


def make_tables(seed: int, split: str, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Labels (one row an image) and captions (five rows an image, columns image and caption) of
    images 0..count-1 of a split.
    """
    everything = [compose_image(seed, i, split) for i in range(count)]
    labels = pd.DataFrame([make_label_row(what) for what in everything])
    labels.insert(0, "image", np.arange(count))
    captions = [(i, text) for i, what in enumerate(everything) for text in write_captions(what)]
    return labels, pd.DataFrame(captions, columns=["image", "caption"])


def generate_pool(
    count: int, n_test: int = 300, seed: int = 0
) -> Iterator[tuple[np.ndarray, str, dict[str, str | int | float]]]:
    """A pool to search in: (height, width, 3) uint8, a caption and the labels of one image after
    the other.

    As a pool that holds COCO holds NSD's own stimuli, so this one begins with the test images that
    every subject of `simulate` is shown. All others nobody has seen, three fifths of them of
    combinations of training, a fifth each of those of validation and test.

    Args:
        count: images, the test images among them.
        n_test: test images.
        seed: of `simulate`.
    """
    others = ("train", "train", "train", "val", "test")
    for i in range(count):
        number, index, split = (
            (shared_seed(seed), i, "test")
            if i < n_test
            else (POOL_SEED + seed, i, others[i % len(others)])
        )
        what = compose_image(number, index, split)
        yield render_image(what, number), write_captions(what)[0], make_label_row(what)


def shared_seed(seed: int) -> int:
    """Seed of the validation and test images, which are the same for every subject."""
    return int(np.random.default_rng([seed, 0]).integers(2**31))

"""The mini world: procedural images with captions and labels, and a simulated visual cortex that
looks at them.

- An image shows one large object (or two, one partly behind the other) in a scene: 20 kinds x 8
  colours x 8 scenes, with patterns, places, sizes, tilts and light. Everything about image i is a
  pure function of (seed, i), so any subset can be remade anywhere.
- The test set holds combinations of kind, colour and scene that occur in no training image
  (`combination_split`); validation has held-out combinations of its own, so that what is chosen on
  it is chosen for new combinations too.
- The cortex is not linear in any embedding a decoder is given: early areas measure Gabor energy in
  a receptive field, higher areas respond to conjunctions of what is in the picture
  (`VisualCortex`).
- Nothing here reads or writes files: this module yields arrays and tables, readers write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from src.utils import PerceptError, progress

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
INK = (35, 30, 40)


# ----------------------------------------------------------------------------------------- drawing
class Pen:
    """Draws one object in its own frame (x right, y up, both about -1..1) onto a canvas.

    A tone is "body" (the object's colour and pattern), "shade" or "tint" (darker, lighter body), or
    an (r, g, b) colour.
    """

    def __init__(
        self,
        canvas: Image.Image,
        texture: dict[str, Image.Image],
        place: tuple[float, float, float, float],
    ):
        self.canvas, self.texture = canvas, texture
        self.x, self.y, self.scale, tilt = (
            place  # centre and half size in canvas pixels, tilt in radians
        )
        self.cos, self.sin = np.cos(tilt), np.sin(tilt)

    def polygon(self, points, tone="body") -> None:
        """Fill the polygon through `points` [(x, y), ...]."""
        turned = [
            (
                self.x + self.scale * (u * self.cos - v * self.sin),
                self.y - self.scale * (u * self.sin + v * self.cos),
            )
            for u, v in points
        ]
        if isinstance(tone, str):
            mask = Image.new("L", self.canvas.size, 0)
            ImageDraw.Draw(mask).polygon(turned, fill=255)
            self.canvas.paste(self.texture[tone], (0, 0), mask)
        else:
            ImageDraw.Draw(self.canvas).polygon(turned, fill=tone)

    def ellipse(self, x, y, width, height, tone="body", start=0.0, end=360.0) -> None:
        """Fill the ellipse (or, from `start` to `end` degrees, its pie) with half axes `width` and
        `height`.
        """
        angles = np.deg2rad(np.linspace(start, end, 28))
        points = [(x + width * np.cos(a), y + height * np.sin(a)) for a in angles]
        self.polygon(points if end - start >= 360 else [(x, y), *points], tone)

    def box(self, left, bottom, right, top, tone="body") -> None:
        """Fill an upright rectangle."""
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], tone)


def _ball(pen: Pen) -> None:
    pen.ellipse(0, 0, 1, 1)
    pen.ellipse(-0.35, 0.4, 0.28, 0.2, "tint")


def _box(pen: Pen) -> None:
    pen.box(-0.95, -0.95, 0.55, 0.5)
    pen.polygon([(-0.95, 0.5), (0.55, 0.5), (0.98, 0.95), (-0.5, 0.95)], "tint")
    pen.polygon([(0.55, -0.95), (0.98, -0.45), (0.98, 0.95), (0.55, 0.5)], "shade")


def _star(pen: Pen) -> None:
    angles = np.pi / 2 + np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.08, 0.45)
    pen.polygon(list(zip(radius * np.cos(angles), radius * np.sin(angles), strict=True)))


def _heart(pen: Pen) -> None:
    t = np.linspace(0, 2 * np.pi, 40)
    x, y = (
        np.sin(t) ** 3,
        (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16,
    )
    pen.polygon(list(zip(1.02 * x, 1.05 * y + 0.1, strict=True)))


def _ring(pen: Pen) -> None:
    outer, inner = np.linspace(0, 2 * np.pi, 36), np.linspace(2 * np.pi, 0, 36)
    pen.polygon(
        [(np.cos(a), np.sin(a)) for a in outer]
        + [(0.48 * np.cos(a), 0.48 * np.sin(a)) for a in inner]
    )


def _tree(pen: Pen) -> None:
    pen.box(-0.16, -1, 0.16, -0.3, (110, 70, 40))
    for x, y, r in ((-0.42, 0.05, 0.5), (0.42, 0.05, 0.5), (0, 0.48, 0.55)):
        pen.ellipse(x, y, r, r)


def _house(pen: Pen) -> None:
    pen.box(-0.8, -1, 0.8, 0.15)
    pen.polygon([(-1.05, 0.12), (1.05, 0.12), (0, 1)], (120, 60, 45))
    pen.box(-0.2, -1, 0.2, -0.35, INK)
    pen.box(0.35, -0.45, 0.65, -0.15, (250, 240, 170))


def _car(pen: Pen) -> None:
    pen.polygon([(-0.62, 0.0), (-0.35, 0.58), (0.4, 0.58), (0.68, 0.0)])
    pen.polygon([(-0.45, 0.06), (-0.28, 0.44), (0.0, 0.44), (0.0, 0.06)], (190, 225, 245))
    pen.polygon([(0.1, 0.06), (0.1, 0.44), (0.32, 0.44), (0.5, 0.06)], (190, 225, 245))
    pen.box(-1.08, -0.5, 1.08, 0.06)
    for x in (-0.58, 0.58):
        pen.ellipse(x, -0.52, 0.3, 0.3, INK)
        pen.ellipse(x, -0.52, 0.12, 0.12, (190, 190, 190))


def _fish(pen: Pen) -> None:
    pen.polygon([(0.5, 0), (1.12, 0.6), (1.12, -0.6)], "shade")
    pen.ellipse(-0.15, 0, 0.88, 0.58)
    pen.polygon([(-0.2, 0.5), (0.35, 0.45), (0.2, 0.85)], "shade")
    pen.ellipse(-0.62, 0.14, 0.13, 0.13, (255, 255, 255))
    pen.ellipse(-0.64, 0.14, 0.07, 0.07, INK)


def _mushroom(pen: Pen) -> None:
    pen.polygon([(-0.3, -1), (0.3, -1), (0.22, 0.1), (-0.22, 0.1)], (235, 220, 190))
    pen.ellipse(0, 0, 1.02, 0.92, "body", 0, 180)


def _cup(pen: Pen) -> None:
    pen.ellipse(0.68, -0.02, 0.42, 0.45, "shade")
    pen.ellipse(0.68, -0.02, 0.22, 0.25, (120, 120, 130))
    pen.polygon([(-0.85, 0.75), (0.68, 0.75), (0.5, -0.85), (-0.67, -0.85)])
    pen.ellipse(-0.085, 0.75, 0.765, 0.18, INK)


def _umbrella(pen: Pen) -> None:
    pen.box(-0.06, -0.85, 0.06, 0.2, INK)
    pen.ellipse(0.18, -0.85, 0.24, 0.2, INK, 180, 360)
    pen.ellipse(0, 0.02, 1.08, 0.95, "body", 0, 180)
    for x in (-0.72, 0, 0.72):
        pen.ellipse(x, 0.0, 0.34, 0.16, "shade", 0, 180)


def _boat(pen: Pen) -> None:
    pen.polygon([(-1.05, -0.45), (1.05, -0.45), (0.65, -0.98), (-0.65, -0.98)], (125, 75, 45))
    pen.box(-0.06, -0.45, 0.06, 1.0, INK)
    pen.polygon([(0.1, -0.3), (0.1, 1.0), (0.95, -0.3)])
    pen.polygon([(-0.1, -0.3), (-0.1, 0.8), (-0.75, -0.3)], "tint")


def _flower(pen: Pen) -> None:
    pen.box(-0.07, -1.05, 0.07, 0.2, (40, 120, 50))
    pen.ellipse(0.28, -0.68, 0.28, 0.13, (40, 120, 50))
    for a in np.arange(6) * np.pi / 3:
        pen.ellipse(0.45 * np.cos(a), 0.35 + 0.45 * np.sin(a), 0.32, 0.32)
    pen.ellipse(0, 0.35, 0.25, 0.25, (90, 60, 20))


def _moon(pen: Pen) -> None:
    outer = np.deg2rad(np.linspace(60, 300, 30))
    inner = np.deg2rad(np.linspace(290, 70, 30))
    curve = [(np.cos(a) + 0.2, np.sin(a)) for a in outer] + [
        (0.72 * np.cos(a) + 0.55, 0.86 * np.sin(a)) for a in inner
    ]
    pen.polygon(curve)


def _rocket(pen: Pen) -> None:
    pen.polygon([(-0.38, -0.5), (-0.78, -0.95), (-0.3, -0.8)], "shade")
    pen.polygon([(0.38, -0.5), (0.78, -0.95), (0.3, -0.8)], "shade")
    pen.polygon([(-0.22, -0.75), (0.22, -0.75), (0, -1.2)], (255, 170, 40))
    pen.polygon(
        [
            (-0.38, -0.8),
            (0.38, -0.8),
            (0.42, 0.1),
            (0.25, 0.7),
            (0, 1.12),
            (-0.25, 0.7),
            (-0.42, 0.1),
        ]
    )
    pen.ellipse(0, 0.2, 0.2, 0.2, (190, 225, 245))


def _butterfly(pen: Pen) -> None:
    for side in (-1, 1):
        pen.polygon(
            [
                (0, 0.1),
                (side * 0.5, 0.95),
                (side * 1.08, 0.8),
                (side * 0.95, 0.1),
                (side * 0.3, -0.1),
            ]
        )
        pen.polygon(
            [(0, 0.0), (side * 0.8, -0.05), (side * 0.85, -0.6), (side * 0.45, -0.9)], "shade"
        )
    pen.ellipse(0, 0, 0.12, 0.75, INK)


def _bottle(pen: Pen) -> None:
    pen.polygon(
        [
            (-0.5, -1),
            (0.5, -1),
            (0.5, 0.15),
            (0.18, 0.5),
            (0.18, 0.95),
            (-0.18, 0.95),
            (-0.18, 0.5),
            (-0.5, 0.15),
        ]
    )
    pen.box(-0.22, 0.85, 0.22, 1.08, INK)
    pen.box(-0.5, -0.6, 0.5, -0.1, (250, 245, 225))


def _snowman(pen: Pen) -> None:
    pen.ellipse(0, -0.5, 0.62, 0.55, (250, 250, 252))
    pen.ellipse(0, 0.22, 0.42, 0.4, (250, 250, 252))
    pen.box(-0.5, -0.1, 0.5, 0.08)
    pen.box(0.15, -0.45, 0.38, 0.0)
    pen.box(-0.55, 0.5, 0.55, 0.62)
    pen.box(-0.33, 0.58, 0.33, 1.08)
    for x in (-0.15, 0.15):
        pen.ellipse(x, 0.32, 0.07, 0.07, INK)


def _bird(pen: Pen) -> None:
    pen.polygon([(0.4, 0.05), (1.12, 0.5), (1.0, -0.1)], "shade")
    pen.ellipse(0.05, -0.12, 0.72, 0.52)
    pen.ellipse(-0.5, 0.42, 0.38, 0.36)
    pen.polygon([(-0.82, 0.5), (-1.15, 0.36), (-0.82, 0.28)], (245, 160, 30))
    pen.polygon([(-0.2, 0.1), (0.62, 0.25), (0.3, -0.42)], "shade")
    pen.ellipse(-0.58, 0.5, 0.09, 0.09, INK)
    for x in (-0.1, 0.2):
        pen.box(x - 0.05, -0.98, x + 0.05, -0.55, (245, 160, 30))


KINDS: dict[str, Callable[[Pen], None]] = {
    "ball": _ball,
    "box": _box,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "tree": _tree,
    "house": _house,
    "car": _car,
    "fish": _fish,
    "mushroom": _mushroom,
    "cup": _cup,
    "umbrella": _umbrella,
    "boat": _boat,
    "flower": _flower,
    "moon": _moon,
    "rocket": _rocket,
    "butterfly": _butterfly,
    "bottle": _bottle,
    "snowman": _snowman,
    "bird": _bird,
}

SKIES = {
    "meadow": ((120, 190, 245), (205, 232, 250)),
    "beach": ((95, 185, 240), (220, 240, 250)),
    "desert": ((245, 205, 130), (252, 235, 195)),
    "snow": ((150, 170, 195), (215, 225, 235)),
    "sea": ((130, 180, 230), (225, 235, 245)),
    "city": ((120, 120, 140), (190, 180, 185)),
    "room": ((225, 205, 170), (232, 215, 185)),
    "forest": ((70, 110, 85), (120, 160, 110)),
}
GROUNDS = {
    "meadow": (110, 185, 75),
    "beach": (238, 216, 160),
    "desert": (222, 160, 85),
    "snow": (245, 248, 252),
    "sea": (40, 105, 165),
    "city": (85, 85, 92),
    "room": (150, 98, 62),
    "forest": (88, 72, 48),
}
SCENES = tuple(SKIES)


def _gradient(size: int, top: tuple, bottom: tuple) -> Image.Image:
    ramp = np.linspace(0, 1, size)[:, None, None]
    column = np.array(top) * (1 - ramp) + np.array(bottom) * ramp  # (height, 1, 3)
    return Image.fromarray(np.broadcast_to(column, (size, size, 3)).clip(0, 255).astype(np.uint8))


def _backdrop(scene: str, horizon: float, size: int, rng: np.random.Generator) -> Image.Image:
    """Sky, ground and the scene's own furniture; `horizon` is the fraction of the height at which
    the ground begins.
    """
    canvas = _gradient(size, *SKIES[scene])
    draw, h = ImageDraw.Draw(canvas), int(horizon * size)

    def box(x0, y0, x1, y1, colour):
        draw.rectangle([x0 * size, y0 * size, x1 * size, y1 * size], fill=colour)

    if scene == "meadow":
        draw.ellipse([size * 0.72, size * 0.06, size * 0.92, size * 0.26], fill=(255, 235, 120))
    elif scene == "beach":
        box(0, horizon - 0.14, 1, horizon, (50, 140, 200))
    elif scene == "snow":
        for x in (0.1, 0.45, 0.85):
            peak = x + rng.uniform(-0.08, 0.08)
            draw.polygon(
                [
                    ((peak - 0.3) * size, h),
                    (peak * size, h - 0.32 * size),
                    ((peak + 0.3) * size, h),
                ],
                fill=(120, 135, 165),
            )
    elif scene == "city":
        for x in np.arange(0, 1, 0.2):
            top = horizon - rng.uniform(0.25, 0.5)
            box(x, top, x + 0.17, horizon, (60, 62, 80))
            box(x + 0.04, top + 0.06, x + 0.08, top + 0.11, (250, 225, 120))
            box(x + 0.1, top + 0.16, x + 0.14, top + 0.21, (250, 225, 120))
    elif scene == "room":
        box(0.62, 0.1, 0.9, 0.38, (250, 250, 250))
        box(0.65, 0.13, 0.87, 0.35, (150, 205, 245))
    elif scene == "forest":
        for x in np.arange(0.02, 1, 0.19) + rng.uniform(-0.03, 0.03):
            box(x, 0, x + 0.07, horizon, (75, 50, 35))
    draw.rectangle([0, h, size, size], fill=GROUNDS[scene])
    _ground(draw, scene, h, size, rng)
    return canvas


def _ground(
    draw: ImageDraw.ImageDraw, scene: str, h: int, size: int, rng: np.random.Generator
) -> None:
    if scene == "desert":
        draw.ellipse(
            [-0.3 * size, h - 0.1 * size, 0.7 * size, h + 0.4 * size], fill=(235, 180, 105)
        )
    elif scene == "sea":
        for y in np.arange(h + 0.06 * size, size, 0.12 * size):
            draw.line([(0, y), (size, y)], fill=(90, 155, 205), width=max(1, size // 40))
    elif scene == "meadow":
        for x, y in rng.uniform(0, 1, (7, 2)):
            draw.ellipse(
                [
                    x * size,
                    h + y * (size - h),
                    x * size + 0.04 * size,
                    h + y * (size - h) + 0.03 * size,
                ],
                fill=(245, 245, 245),
            )
    elif scene == "room":
        for x in (0.2, 0.5, 0.8):
            draw.line(
                [(x * size, h), ((x - 0.5) * 1.6 * size + 0.5 * size, size)],
                fill=(120, 75, 45),
                width=max(1, size // 60),
            )
    elif scene == "city":
        draw.line(
            [(0, (h + size) // 2), (size, (h + size) // 2)],
            fill=(230, 225, 200),
            width=max(1, size // 32),
        )


def _texture(colour: np.ndarray, pattern: str, size: int, period: float) -> dict[str, Image.Image]:
    """The object's body, shade and tint as images of the whole canvas, lit from above."""
    ramp = np.linspace(1.12, 0.84, size)[:, None, None]
    body = np.broadcast_to(colour * ramp, (size, size, 3)).copy()
    other = np.array(INK if colour.mean() > 130 else (245, 245, 245), float)
    y, x = np.mgrid[:size, :size]
    if pattern == "striped":
        body[((x + y) // period % 2 == 0)] = 0.35 * colour + 0.65 * other
    elif pattern == "dotted":
        body[
            ((x % (2 * period) - period) ** 2 + (y % (2 * period) - period) ** 2)
            < (0.62 * period) ** 2
        ] = 0.2 * colour + 0.8 * other
    image = {
        "body": body,
        "shade": np.broadcast_to(colour * 0.68, body.shape),
        "tint": np.broadcast_to(colour * 0.5 + 127, body.shape),
    }
    return {
        name: Image.fromarray(value.clip(0, 255).astype(np.uint8)) for name, value in image.items()
    }


# ----------------------------------------------------------------------------- what is in an image
def combination_split(kind: int, colour: int, scene: int) -> str:
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
class Thing:
    """One object of an image: indices of kind, colour and pattern; centre and half size in units of
    the image; tilt in radians.
    """

    kind: int
    colour: int
    pattern: int
    x: float
    y: float
    half: float
    tilt: float


@dataclass(frozen=True)
class Scenery:
    """Everything that an image shows: the scene index, its light, its horizon (0..1 from the top)
    and one or two things, main last.
    """

    scene: int
    light: int
    horizon: float
    place: int
    things: tuple[Thing, ...]


def compose(seed: int, index: int, split: str = "train") -> Scenery:
    """Draw what image `index` of `split` shows, as a pure function of (seed, split, index)."""
    rng = np.random.default_rng([seed, ("train", "val", "test").index(split), index])
    kinds, colours, scenes = list(KINDS), list(COLOURS), list(SCENES)

    def draw_things(scene: int, wanted: str) -> tuple[int, int]:
        while True:
            kind, colour = int(rng.integers(len(kinds))), int(rng.integers(len(colours)))
            if combination_split(kind, colour, scene) == wanted:
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
    main = Thing(kind, colour, pattern, x, y, half, rng.uniform(-0.15, 0.15))
    things: tuple[Thing, ...] = (main,)
    if two:
        kind2, colour2 = draw_things(scene, "train")
        x2 = np.clip(x + (1 if x < 0.5 else -1) * rng.uniform(0.36, 0.5), 0.2, 0.8)
        other = Thing(
            kind2,
            colour2,
            int(rng.choice(3, p=(0.7, 0.15, 0.15))),
            float(x2),
            y - rng.uniform(0.05, 0.2),
            rng.uniform(0.2, 0.27),
            rng.uniform(-0.15, 0.15),
        )
        things = (other, main)
    return Scenery(scene, int(rng.choice(3, p=(0.7, 0.15, 0.15))), horizon, place, things)


def render(what: Scenery, seed: int = 0, size: int = IMAGE_SIZE) -> np.ndarray:
    """Paint a Scenery.

    Returns:
        uint8 array (height, width, 3), height = width = `size`.
    """
    big = size * SUPERSAMPLE
    rng = np.random.default_rng([seed, int(what.horizon * 1e6)])
    canvas = _backdrop(SCENES[what.scene], what.horizon, big, rng)
    for thing in what.things:
        colour = np.array(list(COLOURS.values())[thing.colour], float) + rng.uniform(-8, 8, 3)
        texture = _texture(colour, PATTERNS[thing.pattern], big, max(2.0, thing.half * big * 0.28))
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
        list(KINDS.values())[thing.kind](pen)
    pixels = np.asarray(canvas.reduce(SUPERSAMPLE), float) * np.array(
        list(LIGHTS.values())[what.light]
    )
    return pixels.clip(0, 255).round().astype(np.uint8)


# -------------------------------------------------------------------------------- words and labels
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


def _phrase(thing: Thing) -> str:
    pattern = PATTERNS[thing.pattern]
    return " ".join(
        ([] if pattern == "plain" else [pattern])
        + [list(COLOURS)[thing.colour], list(KINDS)[thing.kind]]
    )


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def caption(what: Scenery) -> list[str]:
    """Five paraphrases of what an image shows, as five people would have written them for COCO."""
    main = _phrase(what.things[-1])
    plain = f"{list(COLOURS)[what.things[-1].colour]} {list(KINDS)[what.things[-1].kind]}"
    ground, place = _GROUND_WORDS[SCENES[what.scene]], _PLACE_WORDS[PLACES[what.place]]
    light, long_light = _LIGHT_WORDS[list(LIGHTS)[what.light]]
    beside = f" next to {_article(_phrase(what.things[0]))}" if len(what.things) == 2 else ""
    sentences = (
        f"{_article(main)} {ground} {light}",
        f"{_article(main)}{beside} {place} {ground}",
        f"a picture of {_article(plain)}{beside} {light}",
        f"there is {_article(main)} {place} of the picture {ground} {long_light}",
        f"{SCENES[what.scene]} scene with {_article(plain)}{beside} {light}",
    )
    return [" ".join(sentence.split()) for sentence in sentences]


def label(what: Scenery) -> dict[str, str | int | float]:
    """What an image shows, as one row of a table of categories."""
    main = what.things[-1]
    other = what.things[0] if len(what.things) == 2 else None
    return {
        "scene": SCENES[what.scene],
        "kind": list(KINDS)[main.kind],
        "colour": list(COLOURS)[main.colour],
        "pattern": PATTERNS[main.pattern],
        "place": PLACES[what.place],
        "light": list(LIGHTS)[what.light],
        "n_things": len(what.things),
        "size": round(2 * main.half, 3),
        "other_kind": list(KINDS)[other.kind] if other else "",
        "other_colour": list(COLOURS)[other.colour] if other else "",
    }


def _render_block(seed: int, split: str, indices: range, size: int) -> np.ndarray:
    return np.stack([render(compose(seed, i, split), seed, size) for i in indices])


def image_blocks(
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


def tables(seed: int, split: str, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Labels (one row an image) and captions (five rows an image, columns image and caption) of
    images 0..count-1 of a split.
    """
    everything = [compose(seed, i, split) for i in range(count)]
    labels = pd.DataFrame([label(what) for what in everything])
    labels.insert(0, "image", np.arange(count))
    captions = [(i, text) for i, what in enumerate(everything) for text in caption(what)]
    return labels, pd.DataFrame(captions, columns=["image", "caption"])


def pool(
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
            (_shared(seed), i, "test")
            if i < n_test
            else (POOL_SEED + seed, i, others[i % len(others)])
        )
        what = compose(number, index, split)
        yield render(what, number), caption(what)[0], label(what)


def _shared(seed: int) -> int:
    """Seed of the validation and test images, which are the same for every subject."""
    return int(np.random.default_rng([seed, 0]).integers(2**31))


# --------------------------------------------------------------------- the simulated visual cortex
# Fixed before any decoder was trained on it, and not tuned to a decoder's scores since.
N_VOXELS = {
    1: 1572,
    2: 1428,
    3: 1523,
    4: 1315,
    5: 1304,
    6: 1791,
    7: 1268,
    8: 1439,
}  # a tenth of NSD's nsdgeneral, subjects 1-8
# share of the voxels; receptive field (sd, fraction of the image); cycles a field; mean
# single-trial noise ceiling
AREAS = {
    "V1": (0.20, 0.055, 1.0, 0.23),
    "V2": (0.17, 0.08, 1.0, 0.20),
    "V3": (0.13, 0.11, 0.9, 0.17),
    "hV4": (0.12, 0.15, 0.7, 0.15),
    "LO": (0.14, None, None, 0.12),
    "EBA": (0.06, None, None, 0.12),
    "FFA": (0.06, None, None, 0.11),
    "PPA": (0.07, None, None, 0.13),
    "OPA": (0.05, None, None, 0.11),
}
_TASTES = {  # what the voxels of a higher area care about: weights of the groups of `_semantics`
    "LO": {"kind": 1.0, "place": 0.8, "size": 0.8, "pattern": 0.5, "colour": 0.5, "other": 0.6},
    "EBA": {"kind": 1.2, "other": 0.8, "size": 0.4},
    "FFA": {"kind": 1.2, "colour": 0.6, "other": 0.5},
    "PPA": {"scene": 1.3, "light": 0.7, "kind": 0.3},
    "OPA": {"scene": 1.0, "place": 0.7, "light": 0.5},
}
_CENTRES = {
    "V1": (0, -40, 0),
    "V2": (8, -38, 5),
    "V3": (15, -34, 9),
    "hV4": (20, -28, -8),
    "LO": (30, -30, 2),
    "EBA": (36, -24, 6),
    "FFA": (30, -16, -12),
    "PPA": (22, -12, -10),
    "OPA": (26, -30, 16),
}


def _semantics(everything: list[Scenery]) -> dict[str, np.ndarray]:
    """What is in each image, as groups of indicator columns (images, columns)."""
    main = [what.things[-1] for what in everything]
    other = np.zeros((len(everything), len(KINDS)))
    for row, what in enumerate(everything):
        if len(what.things) == 2:
            other[row, what.things[0].kind] = 0.7
    return {
        "scene": np.eye(len(SCENES))[[what.scene for what in everything]],
        "light": np.eye(len(LIGHTS))[[what.light for what in everything]],
        "kind": np.eye(len(KINDS))[[t.kind for t in main]],
        "colour": np.eye(len(COLOURS))[[t.colour for t in main]],
        "pattern": np.eye(len(PATTERNS))[[t.pattern for t in main]],
        "place": np.eye(len(PLACES))[[what.place for what in everything]],
        "size": np.array([[(t.half - 0.35) / 0.05] for t in main]),
        "other": other,
    }


@dataclass(frozen=True)
class Scan:
    """One subject's simulated experiment.

    Attributes:
        betas: float32 (trials, voxels), percent signal change, with trial noise and the drift of
            sessions.
        trials: one row a trial: trial, row (index into the images shown), session, run, repeat.
        voxels: one row a voxel: a Boolean column an area, x, y, z (mm), noise_ceiling (single
            trial, fraction of variance; the simulation's own).
    """

    betas: np.ndarray
    trials: pd.DataFrame
    voxels: pd.DataFrame


class VisualCortex:
    """A simulated visual cortex: image and what is in it -> noiseless responses; `scan` adds
    trials, noise and sessions.

    V1-hV4: quadrature pairs of Gabor filters in a receptive field, on luminance and two
    colour-opponent channels; the response is the square root of the energy (Adelson & Bergen 1985),
    mixed with a rectified response to the field's mean colour that grows from V1 to hV4. Higher
    areas: a random two-layer network with eight rectified conjunctions a voxel over what the image
    shows (scene, kind, colour, place, ...). Noise: independent plus a few shared components an
    area. Single-trial noise ceilings are drawn once a subject.

    Raises:
        PerceptError: for a subject that NSD does not have.
    """

    def __init__(self, subject: int, size: int = IMAGE_SIZE):
        if subject not in N_VOXELS:
            raise PerceptError(
                f"The mini world has subjects 1 to 8, not {subject}: choose subj among them."
            )
        self.rng = np.random.default_rng([69, subject])
        self.size, n = size, N_VOXELS[subject]
        share = np.array([area[0] for area in AREAS.values()])
        counts = np.floor(share * n).astype(int)
        counts[0] += n - counts.sum()
        self.roi = np.repeat(list(AREAS), counts)
        mean = np.array([AREAS[r][3] for r in self.roi])
        ceiling = self.rng.beta(2.5, 2.5 * (1 - mean) / mean).clip(0.005, 0.7)
        xyz = np.array([_CENTRES[r] for r in self.roi]) * self.rng.choice((-1, 1), n)[
            :, None
        ] ** np.array([1, 0, 0])
        xyz = xyz + self.rng.normal(0, 4, (n, 3))
        self.voxels = pd.DataFrame(
            {
                **{area: self.roi == area for area in AREAS},
                "x": xyz[:, 0],
                "y": xyz[:, 1],
                "z": xyz[:, 2],
                "noise_ceiling": ceiling,
            }
        ).round(4)
        self._build_early()
        self._build_higher()
        self.mean, self.sd = np.zeros(n, np.float32), np.ones(n, np.float32)
        self._calibrate()

    def _build_early(self) -> None:
        """Gabor pairs (2, early voxels, 3 * height * width) and colour fields, as matrices over
        opponent-channel pixels.
        """
        early = [r for r in self.roi if AREAS[r][1] is not None]
        n, rng = len(early), self.rng
        radius = 0.5 * np.sqrt(
            rng.random(n)
        )  # more voxels near the fovea than an even spread in area would give
        angle, phase_axis = rng.uniform(0, 2 * np.pi, n), rng.uniform(0, np.pi, n)
        x0, y0 = 0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)
        sd = np.array([AREAS[r][1] for r in early]) * (0.7 + 1.2 * radius)
        frequency = np.array([AREAS[r][2] for r in early]) / (2.5 * sd) * rng.uniform(0.6, 1.6, n)
        channels = rng.normal(size=(n, 3)) * np.array([1.0, 0.6, 0.6])
        channels /= np.linalg.norm(channels, axis=1, keepdims=True)
        y, x = (np.mgrid[: self.size, : self.size] + 0.5) / self.size
        dx, dy = x[None] - x0[:, None, None], y[None] - y0[:, None, None]
        envelope = np.exp(-(dx**2 + dy**2) / (2 * sd[:, None, None] ** 2))
        envelope /= np.sqrt((envelope**2).sum((1, 2), keepdims=True))
        turned = (
            2
            * np.pi
            * frequency[:, None, None]
            * (dx * np.cos(phase_axis)[:, None, None] + dy * np.sin(phase_axis)[:, None, None])
        )
        spread = lambda field: (
            (channels[:, :, None, None] * field[:, None]).reshape(n, -1).astype(np.float32)
        )  # noqa: E731
        self.even, self.odd = spread(envelope * np.cos(turned)), spread(envelope * np.sin(turned))
        self.even -= self.even.mean(1, keepdims=True)
        self.colour = spread(envelope / envelope.sum((1, 2), keepdims=True))
        self.colour_share = np.array(
            [{"V1": 0.25, "V2": 0.3, "V3": 0.35, "hV4": 0.6}[r] for r in early], np.float32
        )
        self.colour_bias = rng.normal(0, 0.05, n).astype(np.float32)

    def _build_higher(self) -> None:
        """Random conjunctions: weights (higher voxels, 8, columns of `_semantics`), biases and
        read-out (higher voxels, 8).
        """
        groups = _semantics([compose(0, 0)])
        higher = [r for r in self.roi if AREAS[r][1] is None]
        taste = np.array(
            [
                np.concatenate(
                    [np.full(v.shape[1], _TASTES[r].get(k, 0.0)) for k, v in groups.items()]
                )
                for r in higher
            ]
        )
        shape = (len(higher), 8, taste.shape[1])
        self.conjunctions = (self.rng.normal(size=shape) * taste[:, None]).astype(np.float32)
        self.threshold = self.rng.normal(0.4, 0.4, shape[:2]).astype(np.float32)
        self.readout = self.rng.normal(size=shape[:2]).astype(np.float32)

    def _calibrate(self) -> None:
        """Mean and sd of every voxel's signal over 600 images of the training split, so that signal
        has unit variance.
        """
        everything = [compose(12_345, i) for i in range(600)]
        signal = self.respond(
            np.stack([render(what, 12_345, self.size) for what in everything]), everything
        )
        self.mean, self.sd = signal.mean(0), signal.std(0) + 1e-6

    def respond(self, images: np.ndarray, everything: list[Scenery]) -> np.ndarray:
        """Noiseless responses.

        Args:
            images: uint8 (images, height, width, 3).
            everything: what each of them shows.

        Returns:
            float32 (images, voxels), zero mean and unit variance over images like those of the
            training split.
        """
        rgb = images.reshape(len(images), -1, 3).astype(np.float32) / 255 - 0.5
        red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
        opponent = np.concatenate(
            [(red + green + blue) / 3, (red - green) / 2, (blue - (red + green) / 2) / 2], 1
        )  # (images, 3 * pixels)
        energy = np.sqrt((opponent @ self.even.T) ** 2 + (opponent @ self.odd.T) ** 2)
        colour = np.maximum(opponent @ self.colour.T + self.colour_bias, 0) * 8
        early = (1 - self.colour_share) * energy + self.colour_share * colour
        columns = np.concatenate(list(_semantics(everything).values()), 1).astype(np.float32)
        higher = np.stack(
            [
                (np.maximum(columns @ w.T - t, 0) @ r)
                for w, t, r in zip(self.conjunctions, self.threshold, self.readout, strict=True)
            ],
            1,
        )
        return (np.concatenate([early, higher], 1) - self.mean) / self.sd

    def scan(
        self, signal: np.ndarray, repeats: int = 3, trials_per_session: int = 420, seed: int = 0
    ) -> Scan:
        """Show every image `repeats` times in random order and measure.

        Args:
            signal: noiseless responses (images, voxels) from `respond`.
            repeats: presentations an image.
            trials_per_session: trials a session; the drift of a session is a gain and an offset a
                voxel.
            seed: of the order and of the noise.
        """
        n, v = signal.shape
        rng = np.random.default_rng([seed, v])
        row = rng.permutation(np.repeat(np.arange(n), repeats))
        trial = np.arange(len(row))
        session = trial // trials_per_session
        trials = pd.DataFrame(
            {
                "trial": trial,
                "row": row,
                "session": session,
                "run": trial % trials_per_session // 35,
            }
        )
        trials["repeat"] = trials.groupby("row").cumcount()
        ceiling = self.voxels.noise_ceiling.to_numpy()
        noise_sd = np.sqrt((1 - ceiling) / ceiling).astype(np.float32)
        betas = np.empty((len(row), v), np.float32)
        for s in np.unique(session):
            block = session == s
            gain, offset = 1 + 0.06 * rng.standard_normal(v), 0.4 * rng.standard_normal(v)
            betas[block] = (
                gain * (signal[row[block]] + noise_sd * self._noise(int(block.sum()), rng)) + offset
            )
        return Scan(betas, trials, self.voxels)

    def _noise(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Unit-variance noise (trials, voxels): 70 % independent, 30 % in three components that an
        area shares.
        """
        noise = rng.standard_normal((n, len(self.roi)), dtype=np.float32) * np.float32(np.sqrt(0.7))
        for area in AREAS:
            member = np.flatnonzero(self.roi == area)
            loading = np.random.default_rng([len(member), 3]).standard_normal((3, len(member)))
            loading /= np.linalg.norm(loading, axis=0)
            noise[:, member] += (np.sqrt(0.3) * rng.standard_normal((n, 3)) @ loading).astype(
                np.float32
            )
        return noise


@dataclass(frozen=True)
class Experiment:
    """A whole simulated experiment of one subject.

    Attributes:
        scan: betas, trials (with the columns image and split as well) and voxels.
        images: uint8 (images, height, width, 3), in the order of image_ids.
        image_ids: int64 (images,); training ids differ between subjects, validation and test ids
            are shared by all.
        labels: one row an image.
        captions: five rows an image.
    """

    scan: Scan
    images: np.ndarray
    image_ids: np.ndarray
    labels: pd.DataFrame
    captions: pd.DataFrame


FIRST_ID = {"train": 0, "val": 900_000, "test": 950_000}


def simulate(
    subject: int,
    n_train: int = 5000,
    n_val: int = 300,
    n_test: int = 300,
    seed: int = 0,
    trials_per_session: int = 420,
) -> Experiment:
    """Show a subject its own training images and the shared validation and test images, three times
    each.

    Args:
        subject: 1 to 8.
        n_train: training images of this subject.
        n_val: validation images, the same for every subject.
        n_test: test images, the same for every subject.
        seed: of the images, the order and the noise.
        trials_per_session: trials a session.
    """
    cortex, images, signals, parts, ids, split = VisualCortex(subject), [], [], [], [], []
    for name, count in (("train", n_train), ("val", n_val), ("test", n_test)):
        number = (
            int(np.random.default_rng([seed, subject]).integers(2**31))
            if name == "train"
            else _shared(seed)
        )
        everything = [compose(number, i, name) for i in range(count)]
        block = np.concatenate(list(image_blocks(number, name, count, cortex.size)))
        images.append(block)
        signals += [
            cortex.respond(block[i : i + 500], everything[i : i + 500])
            for i in range(0, count, 500)
        ]
        first = FIRST_ID[name] + (subject * 100_000 if name == "train" else 0)
        ids.append(first + np.arange(count))
        parts.append(
            [table.assign(image=table.image + first) for table in tables(number, name, count)]
        )
        split += [name] * count
    scan = cortex.scan(np.concatenate(signals), 3, trials_per_session, seed)
    image_ids = np.concatenate(ids)
    trials = scan.trials.assign(
        image=image_ids[scan.trials.row], split=np.array(split)[scan.trials.row]
    ).drop(columns="row")
    labels, captions = (pd.concat([part[k] for part in parts], ignore_index=True) for k in (0, 1))
    return Experiment(
        Scan(scan.betas, trials, scan.voxels), np.concatenate(images), image_ids, labels, captions
    )

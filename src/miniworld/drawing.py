"""Procedural scenes: objects, backgrounds and the pen that draws them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

INK = (35, 30, 40)


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


CATEGORIES: dict[str, Callable[[Pen], None]] = {
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


def draw_backdrop(scene: str, horizon: float, size: int, rng: np.random.Generator) -> Image.Image:
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


def draw_texture(
    colour: np.ndarray, pattern: str, size: int, period: float
) -> dict[str, Image.Image]:
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

"""Drawing of the mini world: objects, backgrounds and the pen that draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Tone = str | Colour
Point = tuple[float, float]

INK: Colour = (35, 30, 40)
GLASS: Colour = (190, 225, 245)
LEAF: Colour = (40, 120, 50)
SNOW: Colour = (250, 250, 252)
BEAK: Colour = (245, 160, 30)
PAPER: Colour = (245, 245, 245)


class Pen:
    """Draws one object in its own frame (x right, y up, both about -1..1) onto a canvas.

    A tone is "body" (the object's colour and pattern), "shade" or "tint" (darker, lighter body), or
    an (r, g, b) colour.

    Args:
        canvas: image to draw on.
        texture: body, shade and tint as images of the size of the canvas.
        centre: x and y of the object, canvas pixels.
        scale: half size of the object, canvas pixels.
        tilt: radians.
    """

    def __init__(
        self,
        canvas: Image.Image,
        texture: dict[str, Image.Image],
        centre: tuple[float, float],
        scale: float,
        tilt: float,
    ):
        self.canvas, self.texture = canvas, texture
        self.x, self.y = centre
        self.scale = scale
        self.cos, self.sin = np.cos(tilt), np.sin(tilt)

    def polygon(self, points: str | Iterable[Point], tone: Tone = "body") -> None:
        """Fill the polygon through `points`: (x, y) each, or a text "x,y x,y ..." as in SVG."""
        if isinstance(points, str):
            points = parse_points(points)
        pixels = [self._to_pixels(x, y) for x, y in points]
        if isinstance(tone, str):
            mask = Image.new("L", self.canvas.size, 0)
            ImageDraw.Draw(mask).polygon(pixels, fill=255)
            self.canvas.paste(self.texture[tone], (0, 0), mask)
        else:
            ImageDraw.Draw(self.canvas).polygon(pixels, fill=tone)

    def _to_pixels(self, x: float, y: float) -> Point:
        right = self.x + self.scale * (x * self.cos - y * self.sin)
        down = self.y - self.scale * (x * self.sin + y * self.cos)
        return right, down

    def ellipse(self, x, y, width, height, tone: Tone = "body") -> None:
        """Fill the ellipse with half axes `width` and `height`."""
        self.polygon(_arc(x, y, width, height, 0.0, 360.0), tone)

    def pie(self, x, y, width, height, tone: Tone, start: float, end: float) -> None:
        """Fill the part of an ellipse from `start` to `end` degrees."""
        arc = _arc(x, y, width, height, start, end)
        self.polygon([(x, y), *arc], tone)

    def box(self, left, bottom, right, top, tone: Tone = "body") -> None:
        """Fill an upright rectangle."""
        corners = [(left, bottom), (right, bottom), (right, top), (left, top)]
        self.polygon(corners, tone)


def parse_points(text: str) -> list[Point]:
    """Parse the points of a polygon as SVG writes them, "x,y x,y ..."."""
    points = []
    for pair in text.split():
        x, y = pair.split(",")
        points.append((float(x), float(y)))
    return points


def _arc(x, y, width, height, start: float, end: float) -> list[Point]:
    """Points of an ellipse with half axes `width` and `height`, from `start` to `end` degrees."""
    angles = np.deg2rad(np.linspace(start, end, 28))
    return _zip_points(x + width * np.cos(angles), y + height * np.sin(angles))


def _zip_points(x: np.ndarray, y: np.ndarray) -> list[Point]:
    return list(zip(x, y, strict=True))


# ----------------------------------------------------------------------------------------- objects
def _draw_ball(pen: Pen) -> None:
    pen.ellipse(0, 0, 1, 1)
    pen.ellipse(-0.35, 0.4, 0.28, 0.2, "tint")


def _draw_box(pen: Pen) -> None:
    pen.box(-0.95, -0.95, 0.55, 0.5)
    pen.polygon("-0.95,0.5 0.55,0.5 0.98,0.95 -0.5,0.95", "tint")
    pen.polygon("0.55,-0.95 0.98,-0.45 0.98,0.95 0.55,0.5", "shade")


def _draw_star(pen: Pen) -> None:
    angles = np.pi / 2 + np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.08, 0.45)
    pen.polygon(_zip_points(radius * np.cos(angles), radius * np.sin(angles)))


def _draw_heart(pen: Pen) -> None:
    t = np.linspace(0, 2 * np.pi, 40)
    x = np.sin(t) ** 3
    upper = 13 * np.cos(t) - 5 * np.cos(2 * t)
    y = (upper - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    pen.polygon(_zip_points(1.02 * x, 1.05 * y + 0.1))


def _draw_ring(pen: Pen) -> None:
    outer = np.linspace(0, 2 * np.pi, 36)
    inner = np.linspace(2 * np.pi, 0, 36)
    outer_points = _zip_points(np.cos(outer), np.sin(outer))
    inner_points = _zip_points(0.48 * np.cos(inner), 0.48 * np.sin(inner))
    pen.polygon(outer_points + inner_points)


def _draw_tree(pen: Pen) -> None:
    pen.box(-0.16, -1, 0.16, -0.3, (110, 70, 40))
    pen.ellipse(-0.42, 0.05, 0.5, 0.5)
    pen.ellipse(0.42, 0.05, 0.5, 0.5)
    pen.ellipse(0, 0.48, 0.55, 0.55)


def _draw_house(pen: Pen) -> None:
    pen.box(-0.8, -1, 0.8, 0.15)
    pen.polygon("-1.05,0.12 1.05,0.12 0,1", (120, 60, 45))
    pen.box(-0.2, -1, 0.2, -0.35, INK)
    pen.box(0.35, -0.45, 0.65, -0.15, (250, 240, 170))


def _draw_car(pen: Pen) -> None:
    pen.polygon("-0.62,0 -0.35,0.58 0.4,0.58 0.68,0")
    pen.polygon("-0.45,0.06 -0.28,0.44 0,0.44 0,0.06", GLASS)
    pen.polygon("0.1,0.06 0.1,0.44 0.32,0.44 0.5,0.06", GLASS)
    pen.box(-1.08, -0.5, 1.08, 0.06)
    for x in (-0.58, 0.58):
        pen.ellipse(x, -0.52, 0.3, 0.3, INK)
        pen.ellipse(x, -0.52, 0.12, 0.12, (190, 190, 190))


def _draw_fish(pen: Pen) -> None:
    pen.polygon("0.5,0 1.12,0.6 1.12,-0.6", "shade")
    pen.ellipse(-0.15, 0, 0.88, 0.58)
    pen.polygon("-0.2,0.5 0.35,0.45 0.2,0.85", "shade")
    pen.ellipse(-0.62, 0.14, 0.13, 0.13, (255, 255, 255))
    pen.ellipse(-0.64, 0.14, 0.07, 0.07, INK)


def _draw_mushroom(pen: Pen) -> None:
    pen.polygon("-0.3,-1 0.3,-1 0.22,0.1 -0.22,0.1", (235, 220, 190))
    pen.pie(0, 0, 1.02, 0.92, "body", 0, 180)


def _draw_cup(pen: Pen) -> None:
    pen.ellipse(0.68, -0.02, 0.42, 0.45, "shade")
    pen.ellipse(0.68, -0.02, 0.22, 0.25, (120, 120, 130))
    pen.polygon("-0.85,0.75 0.68,0.75 0.5,-0.85 -0.67,-0.85")
    pen.ellipse(-0.085, 0.75, 0.765, 0.18, INK)


def _draw_umbrella(pen: Pen) -> None:
    pen.box(-0.06, -0.85, 0.06, 0.2, INK)
    pen.pie(0.18, -0.85, 0.24, 0.2, INK, 180, 360)
    pen.pie(0, 0.02, 1.08, 0.95, "body", 0, 180)
    for x in (-0.72, 0, 0.72):
        pen.pie(x, 0.0, 0.34, 0.16, "shade", 0, 180)


def _draw_boat(pen: Pen) -> None:
    pen.polygon("-1.05,-0.45 1.05,-0.45 0.65,-0.98 -0.65,-0.98", (125, 75, 45))
    pen.box(-0.06, -0.45, 0.06, 1.0, INK)
    pen.polygon("0.1,-0.3 0.1,1 0.95,-0.3")
    pen.polygon("-0.1,-0.3 -0.1,0.8 -0.75,-0.3", "tint")


def _draw_flower(pen: Pen) -> None:
    pen.box(-0.07, -1.05, 0.07, 0.2, LEAF)
    pen.ellipse(0.28, -0.68, 0.28, 0.13, LEAF)
    for a in np.arange(6) * np.pi / 3:
        x, y = 0.45 * np.cos(a), 0.35 + 0.45 * np.sin(a)
        pen.ellipse(x, y, 0.32, 0.32)
    pen.ellipse(0, 0.35, 0.25, 0.25, (90, 60, 20))


def _draw_moon(pen: Pen) -> None:
    outer = np.deg2rad(np.linspace(60, 300, 30))
    inner = np.deg2rad(np.linspace(290, 70, 30))
    outer_points = _zip_points(np.cos(outer) + 0.2, np.sin(outer))
    inner_points = _zip_points(0.72 * np.cos(inner) + 0.55, 0.86 * np.sin(inner))
    pen.polygon(outer_points + inner_points)


def _draw_rocket(pen: Pen) -> None:
    pen.polygon("-0.38,-0.5 -0.78,-0.95 -0.3,-0.8", "shade")
    pen.polygon("0.38,-0.5 0.78,-0.95 0.3,-0.8", "shade")
    pen.polygon("-0.22,-0.75 0.22,-0.75 0,-1.2", (255, 170, 40))
    pen.polygon("-0.38,-0.8 0.38,-0.8 0.42,0.1 0.25,0.7 0,1.12 -0.25,0.7 -0.42,0.1")
    pen.ellipse(0, 0.2, 0.2, 0.2, GLASS)


def _draw_butterfly(pen: Pen) -> None:
    upper_wing = parse_points("0,0.1 0.5,0.95 1.08,0.8 0.95,0.1 0.3,-0.1")
    lower_wing = parse_points("0,0 0.8,-0.05 0.85,-0.6 0.45,-0.9")
    for side in (-1, 1):
        pen.polygon([(side * x, y) for x, y in upper_wing])
        pen.polygon([(side * x, y) for x, y in lower_wing], "shade")
    pen.ellipse(0, 0, 0.12, 0.75, INK)


def _draw_bottle(pen: Pen) -> None:
    pen.polygon("-0.5,-1 0.5,-1 0.5,0.15 0.18,0.5 0.18,0.95 -0.18,0.95 -0.18,0.5 -0.5,0.15")
    pen.box(-0.22, 0.85, 0.22, 1.08, INK)
    pen.box(-0.5, -0.6, 0.5, -0.1, (250, 245, 225))


def _draw_snowman(pen: Pen) -> None:
    pen.ellipse(0, -0.5, 0.62, 0.55, SNOW)
    pen.ellipse(0, 0.22, 0.42, 0.4, SNOW)
    pen.box(-0.5, -0.1, 0.5, 0.08)
    pen.box(0.15, -0.45, 0.38, 0.0)
    pen.box(-0.55, 0.5, 0.55, 0.62)
    pen.box(-0.33, 0.58, 0.33, 1.08)
    for x in (-0.15, 0.15):
        pen.ellipse(x, 0.32, 0.07, 0.07, INK)


def _draw_bird(pen: Pen) -> None:
    pen.polygon("0.4,0.05 1.12,0.5 1,-0.1", "shade")
    pen.ellipse(0.05, -0.12, 0.72, 0.52)
    pen.ellipse(-0.5, 0.42, 0.38, 0.36)
    pen.polygon("-0.82,0.5 -1.15,0.36 -0.82,0.28", BEAK)
    pen.polygon("-0.2,0.1 0.62,0.25 0.3,-0.42", "shade")
    pen.ellipse(-0.58, 0.5, 0.09, 0.09, INK)
    for x in (-0.1, 0.2):
        pen.box(x - 0.05, -0.98, x + 0.05, -0.55, BEAK)


# How to draw an object of each category. The order is part of the world: categories are stored as
# their position.
CATEGORIES: dict[str, Callable[[Pen], None]] = {
    "ball": _draw_ball,
    "box": _draw_box,
    "star": _draw_star,
    "heart": _draw_heart,
    "ring": _draw_ring,
    "tree": _draw_tree,
    "house": _draw_house,
    "car": _draw_car,
    "fish": _draw_fish,
    "mushroom": _draw_mushroom,
    "cup": _draw_cup,
    "umbrella": _draw_umbrella,
    "boat": _draw_boat,
    "flower": _draw_flower,
    "moon": _draw_moon,
    "rocket": _draw_rocket,
    "butterfly": _draw_butterfly,
    "bottle": _draw_bottle,
    "snowman": _draw_snowman,
    "bird": _draw_bird,
}


# ----------------------------------------------------------------------------------------- scenes
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


@dataclass
class _SceneCanvas:
    """The canvas of a scene while it is drawn.

    Attributes:
        image: square.
        horizon: fraction of the height at which the ground begins.
        rng: of the places of mountains, houses, flowers, ...
    """

    image: Image.Image
    horizon: float
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.size = self.image.width
        self.ground_y = int(self.horizon * self.size)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill a rectangle, in fractions of the image."""
        size = self.size
        box = [left * size, top * size, right * size, bottom * size]
        self.draw.rectangle(box, fill=colour)

    def line(self, start: Point, end: Point, colour: Colour, thinness: int) -> None:
        """Draw a line between two points, in pixels; its width is 1 / `thinness` of the image."""
        width = max(1, self.size // thinness)
        self.draw.line([start, end], fill=colour, width=width)


def _draw_sun(canvas: _SceneCanvas) -> None:
    size = canvas.size
    box = [size * 0.72, size * 0.06, size * 0.92, size * 0.26]
    canvas.draw.ellipse(box, fill=(255, 235, 120))


def _draw_sea_behind(canvas: _SceneCanvas) -> None:
    horizon = canvas.horizon
    canvas.box(0, horizon - 0.14, 1, horizon, (50, 140, 200))


def _draw_mountains(canvas: _SceneCanvas) -> None:
    size, ground_y = canvas.size, canvas.ground_y
    for x in (0.1, 0.45, 0.85):
        peak = x + canvas.rng.uniform(-0.08, 0.08)
        left, right = (peak - 0.3) * size, (peak + 0.3) * size
        top = ground_y - 0.32 * size
        corners = [(left, ground_y), (peak * size, top), (right, ground_y)]
        canvas.draw.polygon(corners, fill=(120, 135, 165))


def _draw_houses(canvas: _SceneCanvas) -> None:
    window = (250, 225, 120)
    for x in np.arange(0, 1, 0.2):
        top = canvas.horizon - canvas.rng.uniform(0.25, 0.5)
        canvas.box(x, top, x + 0.17, canvas.horizon, (60, 62, 80))
        canvas.box(x + 0.04, top + 0.06, x + 0.08, top + 0.11, window)
        canvas.box(x + 0.1, top + 0.16, x + 0.14, top + 0.21, window)


def _draw_window(canvas: _SceneCanvas) -> None:
    canvas.box(0.62, 0.1, 0.9, 0.38, (250, 250, 250))
    canvas.box(0.65, 0.13, 0.87, 0.35, (150, 205, 245))


def _draw_trunks(canvas: _SceneCanvas) -> None:
    shift = canvas.rng.uniform(-0.03, 0.03)
    for x in np.arange(0.02, 1, 0.19) + shift:
        canvas.box(x, 0, x + 0.07, canvas.horizon, (75, 50, 35))


def _draw_dune(canvas: _SceneCanvas) -> None:
    size, ground_y = canvas.size, canvas.ground_y
    box = [-0.3 * size, ground_y - 0.1 * size, 0.7 * size, ground_y + 0.4 * size]
    canvas.draw.ellipse(box, fill=(235, 180, 105))


def _draw_waves(canvas: _SceneCanvas) -> None:
    size = canvas.size
    for y in np.arange(canvas.ground_y + 0.06 * size, size, 0.12 * size):
        start, end = (0, y), (size, y)
        canvas.line(start, end, (90, 155, 205), 40)


def _draw_daisies(canvas: _SceneCanvas) -> None:
    size, ground_y = canvas.size, canvas.ground_y
    for x, depth in canvas.rng.uniform(0, 1, (7, 2)):
        left, top = x * size, ground_y + depth * (size - ground_y)
        box = [left, top, left + 0.04 * size, top + 0.03 * size]
        canvas.draw.ellipse(box, fill=(245, 245, 245))


def _draw_floorboards(canvas: _SceneCanvas) -> None:
    size = canvas.size
    for x in (0.2, 0.5, 0.8):
        near_x = (x - 0.5) * 1.6 * size + 0.5 * size
        start, end = (x * size, canvas.ground_y), (near_x, size)
        canvas.line(start, end, (120, 75, 45), 60)


def _draw_road_marking(canvas: _SceneCanvas) -> None:
    y = (canvas.ground_y + canvas.size) // 2
    start, end = (0, y), (canvas.size, y)
    canvas.line(start, end, (230, 225, 200), 32)


_DRAW_BEHIND_HORIZON: dict[str, Callable[[_SceneCanvas], None]] = {
    "meadow": _draw_sun,
    "beach": _draw_sea_behind,
    "snow": _draw_mountains,
    "city": _draw_houses,
    "room": _draw_window,
    "forest": _draw_trunks,
}

_DRAW_ON_GROUND: dict[str, Callable[[_SceneCanvas], None]] = {
    "desert": _draw_dune,
    "sea": _draw_waves,
    "meadow": _draw_daisies,
    "room": _draw_floorboards,
    "city": _draw_road_marking,
}


def draw_backdrop(scene: str, horizon: float, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw sky, ground and what belongs to a scene.

    Args:
        scene: one of SCENES.
        horizon: fraction of the height at which the ground begins.
        size: of the square image, pixels.
        rng: of the places of mountains, houses, flowers, ...
    """
    canvas = _SceneCanvas(_draw_gradient(size, *SKIES[scene]), horizon, rng)
    if scene in _DRAW_BEHIND_HORIZON:
        _DRAW_BEHIND_HORIZON[scene](canvas)
    canvas.draw.rectangle([0, canvas.ground_y, size, size], fill=GROUNDS[scene])
    if scene in _DRAW_ON_GROUND:
        _DRAW_ON_GROUND[scene](canvas)
    return canvas.image


def _draw_gradient(size: int, top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, size)[:, None, None]
    column = np.array(top) * (1 - ramp) + np.array(bottom) * ramp  # (height, 1, 3)
    return _to_image(np.broadcast_to(column, (size, size, 3)))


def draw_texture(
    colour: np.ndarray, pattern: str, size: int, period: float
) -> dict[str, Image.Image]:
    """Draw an object's body, shade and tint as images of the whole canvas, lit from above.

    Args:
        colour: (3,), 0 to 255.
        pattern: plain, striped or dotted.
        size: of the canvas, pixels.
        period: of stripes and dots, pixels.
    """
    ramp = np.linspace(1.12, 0.84, size)[:, None, None]
    body = np.broadcast_to(colour * ramp, (size, size, 3)).copy()
    is_bright = colour.mean() > 130
    contrast = np.array(INK if is_bright else PAPER, float)
    y, x = np.mgrid[:size, :size]
    if pattern == "striped":
        in_stripe = (x + y) // period % 2 == 0
        body[in_stripe] = 0.35 * colour + 0.65 * contrast
    elif pattern == "dotted":
        dx, dy = x % (2 * period) - period, y % (2 * period) - period
        in_dot = dx**2 + dy**2 < (0.62 * period) ** 2
        body[in_dot] = 0.2 * colour + 0.8 * contrast
    return {
        "body": _to_image(body),
        "shade": _to_image(np.broadcast_to(colour * 0.68, body.shape)),
        "tint": _to_image(np.broadcast_to(colour * 0.5 + 127, body.shape)),
    }


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

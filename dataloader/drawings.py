"""The pictures of the sample dataset: twenty objects and eight backgrounds, drawn with Pillow.

Every drawing lives in a square from (0, 0) top left to (100, 100) bottom right; objects stand on its lower
edge. A pen maps the square to pixels at any size and angle. Outlines are written "x y, x y, ...".
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, ...]
Shape = str | np.ndarray | list

COLOURS = {
    "red": (229, 68, 66),
    "yellow": (255, 214, 60),
    "green": (74, 178, 92),
    "blue": (56, 132, 230),
    "purple": (144, 86, 204),
    "pink": (250, 136, 182),
    "white": (255, 253, 250),
    "brown": (160, 104, 64),
}
WHITE, CREAM, GLASS = (255, 255, 255), (255, 243, 219), (188, 228, 244)
INK, STEEL, GOLD, BRASS = (45, 38, 72), (120, 122, 146), (255, 214, 102), (217, 171, 88)
WOOD, DARK_WOOD, LEAF, DARK_LEAF = (160, 106, 66), (112, 68, 50), (92, 168, 84), (54, 118, 66)
SIZES = {"small": 0.44, "large": 0.68}  # in widths of the picture
POSITIONS = {"left": -1, "middle": 0, "right": 1}
SUPERSAMPLING = 3


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one object, or two if `other` names the one on the opposite side."""

    background: str
    thing: str
    colour: str
    size: str
    position: str
    other: str = ""
    other_colour: str = ""


class Tones(NamedTuple):
    """A colour with the shades a drawing needs."""

    base: Colour
    dark: Colour
    deep: Colour
    light: Colour


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return `a` with `share` (0 to 1) of it replaced by `b`."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))


def darker(colour: Colour) -> Colour:
    """Return a darker and richer shade: yellow turns amber, not olive."""
    red, green, blue = (v / 255 for v in colour)
    return round(216 * red**1.15), round(219 * green**1.3), round(235 * blue**1.2)


def tones(colour: Colour) -> Tones:
    """Return the colour with its two darker shades and its lighter one."""
    return Tones(colour, darker(colour), darker(darker(colour)), mix(colour, WHITE, 0.45))


def gradient(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    """Return an image of `size` pixels that fades from `top` down to `bottom`."""
    ends = Image.fromarray(np.array([[top], [bottom]], np.uint8))
    column = ends.resize((1, size[1]), Image.Resampling.BILINEAR, box=(0, 0.5, 1, 1.5))
    return column.resize(size, Image.Resampling.NEAREST)


def points(shape: Shape) -> np.ndarray:
    """Return the points of "x y, x y, ..." (or of an array) as an array of shape (n, 2)."""
    return np.array([pair.split() for pair in shape.split(",")] if isinstance(shape, str) else shape, float)


def arc(x: float, y: float, r: float, start: float = 0, stop: float = 360, count: int = 40) -> np.ndarray:
    """Return `count` points on a circle from one angle to another, in degrees clockwise from the right."""
    angles = np.radians(np.linspace(start, stop, count))
    return np.stack([x + r * np.cos(angles), y + r * np.sin(angles)], axis=1)


def turned(shape: Shape, degrees: float) -> np.ndarray:
    """Return the points turned clockwise about (0, 0)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points(shape) @ [[cos, sin], [-sin, cos]]


def flipped(shape: Shape) -> np.ndarray:
    """Return the points with left and right exchanged."""
    return points(shape) * (-1, 1) + (100, 0)


def smooth(shape: Shape, closed: bool = True) -> np.ndarray:
    """Return a Catmull-Rom spline through the points."""
    p = points(shape)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = np.linspace(0, 1, 10)[:, None, None]
    spline = b + (c - a) * t / 2 + (a - 2.5 * b + 2 * c - d / 2) * t**2 + (3 * (b - c) + d - a) * t**3 / 2
    return spline.transpose(1, 0, 2).reshape(-1, 2)


def symmetric(half: str) -> np.ndarray:
    """Return the smooth outline whose right half, from top to bottom, is given."""
    return smooth(np.concatenate([points(half), flipped(half)[-2:0:-1]]))


class Pen:
    """Fills shapes on an image, and marks them on a mask if there is one; a call draws any number of shapes.

    The square of the drawing is `scale` pixels wide and has the centre of the image.
    """

    def __init__(
        self,
        image: Image.Image,
        scale: float,
        turn: float = 0,
        mirror: int = 1,
        mask: Image.Image | None = None,
    ) -> None:
        self.image, self.scale, self.centre = image, scale / 100, np.array(image.size) / 2
        self.matrix = turned([(mirror * self.scale, 0), (0, self.scale)], turn)
        self.draws = {3: ImageDraw.Draw(image), 4: ImageDraw.Draw(image, "RGBA")}  # by length of the colour
        self.marks = ImageDraw.Draw(mask) if mask else None

    def pixels(self, shape: Shape) -> np.ndarray:
        return (points(shape) - 50) @ self.matrix + self.centre

    def polygon(self, fill: Colour, *shapes: Shape) -> None:
        for shape in shapes:
            corners = self.pixels(shape).ravel().tolist()
            self.draws[len(fill)].polygon(corners, fill)
            if self.marks:
                self.marks.polygon(corners, 255)

    def blob(self, fill: Colour, *shapes: Shape) -> None:
        self.polygon(fill, *map(smooth, shapes))

    def solid(self, fill: Colour, rim: Colour, outline: np.ndarray) -> None:
        """Fill an outline and give it a (darker) rim on the side away from the light."""
        middle = (outline.max(0) + outline.min(0)) / 2
        self.polygon(rim, outline)
        self.polygon(fill, middle + (outline - middle) * 0.9 - 0.035 * np.ptp(outline, axis=0))

    def disc(self, fill: Colour, *discs: tuple[float, ...]) -> None:
        """Draw circles (x, y, r) and ellipses (x, y, rx, ry)."""
        for x, y, r, *height in discs:
            if height:
                self.polygon(fill, arc(0, 0, 1) * (r, *height) + (x, y))
                continue
            bounds = [edge for way in (-1, 1) for edge in self.pixels([x, y]) + way * r * self.scale]
            self.draws[len(fill)].ellipse(bounds, fill)
            if self.marks:
                self.marks.ellipse(bounds, 255)

    def box(self, fill: Colour, *boxes: tuple[float, float, float, float], r: float = 0) -> None:
        for x, y, right, low in boxes:
            corners = [(right, y), (right, low), (x, low), (x, y)]
            if r:
                inner = np.clip(corners, (x + r, y + r), (right - r, low - r))
                corners = [p for i, spot in enumerate(inner) for p in arc(*spot, r, i * 90 - 90, i * 90, 6)]
            self.polygon(fill, corners)

    def line(self, fill: Colour, width: float, *paths: Shape) -> None:
        """Draw lines with round ends and, unless they have the many points of a curve, round joints."""
        for path in map(points, paths):
            bends = len(path) < 8
            for piece in [path[i : i + 2] for i in range(len(path) - 1)] if bends else [path]:
                along = np.gradient(piece, axis=0)
                across = along[:, ::-1] * (width / 2, -width / 2) / np.hypot(*along.T)[:, None]
                self.polygon(fill, np.concatenate([piece + across, (piece - across)[::-1]]))
            self.disc(fill, *((x, y, width / 2) for x, y in (path if bends else path[[0, -1]])))

    def curve(self, fill: Colour, width: float, *paths: Shape) -> None:
        self.line(fill, width, *(smooth(path, closed=False) for path in paths))


# Objects: each is drawn in the shades of one colour.


def apple(pen: Pen, c: Tones) -> None:
    pen.solid(c.base, c.dark, symmetric("50 30, 62 24, 82 28, 92 50, 84 78, 66 96, 50 93"))
    pen.blob(c.light, "20 46, 27 36, 36 34, 30 44, 25 56")
    pen.curve(WOOD, 5, "50 34, 50 20, 56 8")
    pen.blob(LEAF, "53 20, 64 6, 84 5, 76 19, 60 23")


def bicycle(pen: Pen, c: Tones) -> None:
    for x in (23, 77):
        pen.line(INK, 4.5, arc(x, 76, 19))
        pen.line(c.light, 3, arc(x, 76, 15))
        pen.line(WHITE, 0.8, *(arc(x, 76, 14, turn, turn + 180, 2) for turn in (0, 45, 90, 135)))
    pen.line(c.dark, 6, "48 76, 36 38")
    pen.line(c.base, 6.5, "23 76, 39 47, 68 45, 48 76, 23 76", "77 76, 66 36")
    pen.curve(INK, 4.5, "66 36, 72 31, 80 34, 79 40")
    pen.line(INK, 6, "30 36, 42 36")
    pen.disc(INK, (48, 76, 5.5))


def bottle(pen: Pen, c: Tones) -> None:
    pen.box(WOOD, (42, 3, 58, 14))
    pen.solid(c.base, c.dark, symmetric("50 11, 57 12, 57 28, 66 40, 73 50, 73 92, 68 98, 50 98"))
    pen.box(c.dark, (40, 11, 60, 17), r=2)
    pen.box(CREAM, (27, 56, 73, 84))
    pen.box(c.dark, (27, 60, 73, 62.5), (27, 77.5, 73, 80))
    pen.disc(c.base, (50, 70, 6))
    pen.line(c.light, 4.5, "36 46, 40 38")


def wheels(pen: Pen, hub: Colour, *places: tuple[float, float, float]) -> None:
    for share, fill in ((1, INK), (0.58, (203, 201, 209)), (0.3, hub)):
        pen.disc(fill, *((x, y, r * share) for x, y, r in places))


def bus(pen: Pen, c: Tones) -> None:
    pen.box(c.dark, (2, 34, 98, 90), r=9)
    pen.box(c.base, (2, 34, 98, 84), r=9)
    pen.box(c.light, (8, 36, 92, 38.5), (2, 68, 60, 71.5))
    pen.box(INK, (62, 43, 75, 83), r=2)
    pen.box(GLASS, *((x, 43, x + 15, 60) for x in (7, 25, 43)), (63.5, 44.5, 73.5, 81.5), (80, 43, 98, 62), r=2)
    pen.polygon((221, 241, 249), *(points("5 43, 10 43, 5 60, 0 60") + (x, 0) for x in (7, 25, 43)))
    pen.disc(GOLD, (94, 74, 3.5))
    wheels(pen, c.base, (22, 88, 10), (84, 88, 10))


def butterfly(pen: Pen, c: Tones) -> None:
    for side in (points, flipped):
        pen.solid(c.dark, c.deep, smooth(side("52 54, 70 56, 87 64, 86 82, 70 93, 58 80")))
        pen.solid(c.base, c.dark, smooth(side("52 50, 60 24, 80 7, 97 12, 95 36, 80 52, 60 58")))
        pen.blob(c.light, side("66 42, 72 27, 85 19, 87 30, 78 43"), side("68 73, 74 67, 80 73, 74 79"))
        pen.curve(INK, 2, side("51 30, 55 16, 63 10"))
    pen.disc(INK, (50, 53, 4.5, 27), (50, 28, 5.5))


def castle(pen: Pen, c: Tones) -> None:
    pen.box(c.base, (20, 50, 80, 98), *((x, 44, x + 7, 50) for x in (26, 37, 56, 67)))
    for x, top, low in ((50, 30, 60), (14, 42, 98), (86, 42, 98)):
        pen.box(c.base, (x - 12, top, x + 12, low))
        pen.box(c.dark, (x + 5, top, x + 12, low))
        pen.polygon(c.deep, [(x - 15, top), (x, top - 24), (x + 15, top)])
        pen.line(INK, 1.4, [(x, top - 24), (x, top - 30)])
        pen.polygon(GOLD, [(x, top - 30), (x + 9, top - 27), (x, top - 24)])
        pen.box(INK, (x - 3, top + 8, x + 3, top + 18), r=3)
    for fill, r in ((c.light, 12.5), (WOOD, 9)):
        pen.disc(fill, (50, 76, r))
        pen.box(fill, (50 - r, 76, 50 + r, 98))


def clock(pen: Pen, c: Tones) -> None:
    for side, turn in ((points, 220), (flipped, 140)):
        pen.line(INK, 7, side("70 85, 80 96"))
        pen.polygon(c.dark, arc(*side("75 25")[0], 17, turn, turn + 180))
    pen.box(INK, (46, 8, 54, 20))
    pen.solid(c.base, c.dark, arc(50, 57, 39))
    pen.disc(CREAM, (50, 57, 30))
    pen.disc(STEEL, *((x, y, 1.8) for x, y in arc(50, 57, 25, count=13)))
    pen.line(INK, 3.5, "50 38, 50 57, 63 63")
    pen.disc(c.base, (50, 57, 3.5))


def cup(pen: Pen, c: Tones) -> None:
    pen.disc(c.deep, (46, 93, 42, 5.5))
    pen.disc(c.light, (46, 91.5, 42, 5))
    pen.line(c.dark, 6.5, arc(76, 59, 14, -110, 120))
    pen.solid(c.base, c.dark, symmetric("50 36, 82 38, 81 60, 74 80, 64 92, 50 93") - (4, 0))
    pen.disc(c.light, (46, 39, 33, 7.5))
    pen.disc((112, 70, 50), (46, 40, 28.5, 5.5))
    pen.curve((236, 236, 246), 3, *(points("0 29, 4 22, -3 13, 2 5") + (x, 0) for x in (34, 46, 58)))


def house(pen: Pen, c: Tones) -> None:
    pen.box(DARK_WOOD, (68, 14, 80, 40))
    pen.box(WOOD, (66, 12, 82, 17))
    pen.polygon(c.base, "12 98, 12 46, 50 14, 88 46, 88 98")
    pen.box(c.dark, (12, 92, 88, 98))
    pen.line(c.deep, 8.5, "5 51, 50 10, 95 51")
    pen.disc(CREAM, (50, 40, 7.5))
    pen.disc(GLASS, (50, 40, 5.5))
    pen.box(CREAM, (17, 60, 34, 80), (66, 60, 83, 80))
    pen.box(GOLD, *((x, y, x + 6, y + 7.5) for x in (18.7, 26.2, 67.7, 75.2) for y in (61.7, 70.7)))
    pen.box(WOOD, (40, 62, 60, 98))
    pen.disc(GOLD, (56, 81, 1.8))


def lamp(pen: Pen, c: Tones) -> None:
    pen.disc(WOOD, (50, 94, 22, 5))
    pen.disc(BRASS, (50, 92, 22, 4.5), (50, 70, 7))
    pen.box(BRASS, (47, 44, 53, 92))
    pen.disc(GOLD, (50, 48, 11))
    pen.polygon(c.base, "31 6, 69 6, 90 50, 10 50")
    pen.polygon(c.dark, "58 6, 69 6, 90 50, 68 50")
    pen.polygon(c.light, "36 6, 43 6, 34 50, 22 50")
    pen.box(c.dark, (9.5, 47, 90.5, 51.5), r=2)
    pen.line(STEEL, 1.4, "76 51, 76 66")
    pen.disc(GOLD, (76, 67, 2.2))


def mushroom(pen: Pen, c: Tones) -> None:
    pen.solid(CREAM, (222, 195, 165), symmetric("50 50, 60 50, 61 70, 69 88, 64 98, 50 98"))
    pen.disc((222, 195, 165), (50, 56, 36, 8.5))
    pen.solid(c.base, c.dark, symmetric("50 5, 70 10, 89 28, 97 50, 90 58, 70 54, 50 53"))
    spots = WHITE if min(c.base) < 200 else (206, 170, 150)
    pen.disc(spots, (46, 25, 9), (72, 33, 6.5), (22, 40, 6), (53, 45, 4.5), (28, 22, 3.5))


def palm_tree(pen: Pen, c: Tones) -> None:
    pen.curve(WOOD, 8.5, "42 97, 45 75, 50 55, 50 36")
    pen.line(DARK_WOOD, 1.8, "40 86, 46 85", "42 74, 49 73", "45 63, 51 62", "47 52, 53 51")
    for side in (points, flipped):
        pen.blob(c.dark, side("50 34, 64 30, 78 44, 80 66, 68 50"), side("50 34, 60 12, 76 3, 93 10, 74 16"))
        pen.blob(c.base, side("50 34, 66 19, 87 22, 100 46, 80 36"))
        for vein in ("50 32, 71 42, 80 66", "50 32, 70 12, 93 10", "50 32, 79 29, 100 46"):
            pen.curve(c.light, 1.2, side(vein))
    pen.disc(DARK_WOOD, (45, 38, 4.5), (55, 38, 4.5))


def pine_tree(pen: Pen, c: Tones) -> None:
    pen.box(WOOD, (44, 82, 56, 98))
    for tier in (
        "50 42, 70 73, 90 87, 50 90.5",
        "50 22, 66 49, 82 63, 50 66.5",
        "50 2, 61.5 25, 73 39, 50 42.5",
    ):
        pen.polygon(c.base, flipped(tier))
        pen.polygon(c.dark, tier)
    pen.line(c.light, 2.2, "21 83.5, 36 74", "27 59.5, 39 50", "33.5 35.5, 42 26")


def rocket(pen: Pen, c: Tones) -> None:
    pen.blob((255, 140, 60), "38 74, 62 74, 60 88, 50 100, 40 88")
    pen.blob(GOLD, "43 74, 57 74, 55 85, 50 92, 45 85")
    for side in (points, flipped):
        pen.blob(c.deep, side("66 50, 80 62, 86 84, 62 74"))
    pen.solid(c.base, c.dark, symmetric("50 0, 60 10, 69 30, 69 54, 61 76, 50 77"))
    pen.polygon(c.deep, symmetric("50 0, 57 7, 63.5 17, 50 19"))
    pen.disc(c.deep, (50, 36, 11.5))
    pen.disc(GLASS, (50, 36, 8.5))
    pen.blob(WHITE, "44 36, 47 31, 53 30, 48 34")
    pen.box(c.deep, (47, 56, 53, 84), r=3)


def snail(pen: Pen, c: Tones) -> None:
    pen.curve((212, 167, 133), 3.5, "83 72, 81 60, 83 48", "83 72, 91 60, 93 48")
    pen.disc(INK, (83, 47, 3.5), (93, 47, 3.5))
    pen.blob((250, 206, 156), "3 96, 20 86, 60 86, 74 80, 76 68, 86 62, 95 70, 94 86, 84 96, 50 98")
    pen.solid(c.base, c.dark, arc(41, 54, 35.5))
    pen.line(c.deep, 4, arc(0, 0, 1, 0, 828, 80) * np.linspace(1, 27, 80)[:, None] + (40, 53))
    pen.curve(c.light, 3.5, "15 44, 20 33, 28 27")


def sunflower(pen: Pen, c: Tones) -> None:
    pen.curve(LEAF, 5, "50 40, 52 70, 49 98")
    pen.blob(LEAF, "50 86, 60 68, 80 64, 74 80")
    pen.blob(DARK_LEAF, "50 92, 38 76, 20 74, 28 88")
    for fill, start in ((c.dark, 15), (c.base, 0)):
        for turn in range(start, 360, 30):
            pen.blob(fill, turned("0 0, 20 -6.5, 29 -5, 36.5 0, 29 5, 20 6.5", turn) + (50, 37))
    pen.disc((92, 56, 40), (50, 37, 17.5))
    pen.disc((124, 78, 50), (49, 36, 14.5))
    pen.disc((92, 56, 40), *((x, y, 1.7) for r in (4, 10) for x, y in arc(49, 36, r, count=9)))


def television(pen: Pen, c: Tones) -> None:
    pen.line(STEEL, 2.5, "24 6, 50 30, 76 6")
    pen.disc(INK, (24, 6, 3), (76, 6, 3))
    pen.line(WOOD, 5, "29 88, 24 97", "71 88, 76 97")
    pen.box(c.dark, (4, 26, 96, 91), r=9)
    pen.box(c.base, (4, 26, 94, 88), r=9)
    pen.box(INK, (10, 33, 71, 82), r=8)
    pen.box((120, 196, 214), (12.5, 35.5, 68.5, 79.5), r=7)
    pen.polygon((168, 220, 230), "20 78, 40 37, 50 37, 30 78")
    pen.disc(CREAM, (82, 42, 5.5), (82, 56, 5.5))
    pen.line(INK, 1.8, "82 42, 82 38.5", "82 56, 84.5 53.5")
    pen.line(c.deep, 1.8, "77 67, 87 67", "77 72, 87 72", "77 77, 87 77")


def train(pen: Pen, c: Tones) -> None:
    pen.disc((238, 238, 246), (80, 17, 5), (70, 11, 7), (57, 8, 8))
    pen.polygon(c.deep, "74 27, 90 27, 86 48, 78 48")
    pen.disc(GOLD, (60, 45, 6))
    pen.box(c.dark, (30, 45, 94, 76), r=6)
    pen.box(c.base, (30, 45, 94, 70), r=6)
    pen.line(c.light, 2.2, "46 50, 88 50")
    pen.box(GOLD, (56, 45, 58.5, 76), (70, 45, 72.5, 76))
    pen.box(c.base, (6, 28, 43, 80))
    pen.box(GLASS, (13, 37, 36, 55), r=2)
    pen.polygon(STEEL, "86 76, 100 93, 86 93")
    pen.box(c.deep, (2, 22, 47, 30), (4, 74, 92, 82), r=2)
    wheels(pen, c.base, (22, 84, 13), (50, 87, 10), (74, 87, 10))
    pen.line(STEEL, 2.2, "22 87, 74 87")


def turtle(pen: Pen, c: Tones) -> None:
    skin, shadow = (160, 200, 122), (126, 160, 97)
    pen.blob(shadow, "2 90, 10 80, 20 84, 18 90")
    pen.box(shadow, (24, 78, 38, 97), (60, 78, 74, 97), r=5)
    pen.curve(skin, 14, "68 84, 80 78, 86 62")
    pen.disc(skin, (87, 56, 10.5, 9))
    pen.disc(INK, (91, 53, 2))
    pen.line(INK, 1.2, arc(90, 54, 7, 30, 80))
    dome = arc(0, 0, 1, 180, 360)
    pen.polygon(c.dark, dome * (36, 50) + (43, 84))
    pen.polygon(c.base, dome * (33.5, 45.5) + (42, 83))
    seams = "26 63, 11 70", "58 63, 73 70", "42 74, 42 82"
    pen.line(c.dark, 2.8, "32 48, 52 48, 58 63, 42 74, 26 63, 32 48", *seams)
    pen.box(c.deep, (5, 81, 81, 88), r=3.5)


def whale(pen: Pen, c: Tones) -> None:
    pen.curve(GLASS, 4, "66 40, 66 28, 60 20, 53 24", "66 40, 66 28, 72 20, 79 24")
    pen.blob(c.dark, "9 48, 0 36, 3 24, 12 30, 20 24, 24 36, 14 50")
    pen.solid(
        c.base,
        c.dark,
        smooth("6 40, 14 60, 30 62, 50 46, 72 41, 92 52, 97 72, 86 90, 60 97, 34 93, 14 76, 4 58"),
    )
    pen.blob(CREAM, "96.5 70, 84 78, 60 81, 44 80, 34 90, 60 96.5, 86 89")
    pen.blob(c.dark, "50 76, 62 76, 60 86, 48 93")
    pen.disc(INK, (80, 65, 3))
    pen.disc(WHITE, (81, 64, 1))
    pen.disc(mix(c.base, (255, 120, 140), 0.5), (73, 70, 3))


# Backgrounds: each is drawn a little differently every time.


def sky(pen: Pen, top: Colour, bottom: Colour) -> None:
    pen.image.paste(gradient(pen.image.size, top, bottom))


def sun(pen: Pen, rng: random.Random, y: float, r: float, fill: Colour) -> None:
    x = 50 + rng.choice((-1, 1)) * rng.uniform(20, 38)
    for spread, alpha in ((2, 40), (1.5, 60), (1, 255)):
        pen.disc((*fill, alpha), (x, y, r * spread))


def clouds(pen: Pen, rng: random.Random, fill: Colour = WHITE) -> None:
    for middle in (20, 55, 90):
        x, y, size = rng.uniform(middle - 12, middle + 12), rng.uniform(10, 30), rng.uniform(7, 12)
        puffs = (-0.6, 0.08, 0.3), (-0.2, -0.12, 0.42), (0.25, -0.04, 0.36), (0.62, 0.1, 0.26)
        pen.disc(fill, *((x + a * size, y + b * size, r * size) for a, b, r in puffs))
        pen.box(fill, (x - 0.75 * size, y + 0.05 * size, x + 0.8 * size, y + 0.36 * size), r=0.15 * size)


def ground(pen: Pen, rng: random.Random, y: float, wave: float, top: Colour, low: Colour, rim: Colour = ()) -> None:
    """Draw land or water from a wavy edge, which catches the light, at height `y` downwards."""
    x = np.linspace(0, 100, 60)
    long, short = (np.sin(x * rng.uniform(*pace) + rng.uniform(0, 6)) for pace in ((0.03, 0.06), (0.08, 0.11)))
    edge = np.stack([x, y + wave * (long + 0.35 * short)], axis=1)
    pen.line(rim or mix(top, WHITE, 0.2), 2.4, edge)
    width = pen.image.width
    start = int(edge[:, 1].min() * pen.scale)
    mask = Image.new("L", (width, width - start))
    inner = pen.pixels(edge + (0, 1.2)) - (0, start)
    ImageDraw.Draw(mask).polygon([*inner.ravel().tolist(), width, width, 0, width], fill=255)
    pen.image.paste(gradient(mask.size, top, low), (0, start), mask)


def scatter(rng: random.Random, count: int, top: float, low: float) -> list[tuple[float, float, float]]:
    """Return random places between two heights, each with a random number from 0 to 1."""
    return [(rng.uniform(0, 100), rng.uniform(top, low), rng.random()) for _ in range(count)]


def ripples(pen: Pen, rng: random.Random, fill: Colour) -> None:
    for x, y, share in scatter(rng, 18, 77, 98):
        pen.curve(fill, 0.5, [(x, y), (x + 3, y - 0.6), (x + 4 + 5 * share, y)])


def meadow(pen: Pen, rng: random.Random) -> None:
    sky(pen, (104, 190, 240), WHITE)
    sun(pen, rng, 16, 7.5, (255, 236, 150))
    clouds(pen, rng)
    ground(pen, rng, 55, 4, (164, 214, 130), (90, 170, 84))
    ground(pen, rng, 66, 3, (132, 200, 98), (70, 156, 72))
    for x, y, kind in scatter(rng, 26, 74, 98):
        pen.disc((WHITE, (255, 214, 90), (255, 150, 180))[int(kind * 3)], (x, y, 0.6 + 0.006 * y))


def beach(pen: Pen, rng: random.Random) -> None:
    sky(pen, (92, 198, 244), WHITE)
    sun(pen, rng, 15, 7, (255, 244, 190))
    clouds(pen, rng)
    ground(pen, rng, 50, 0, (24, 140, 190), (200, 255, 236))
    for x, y, share in scatter(rng, 12, 53, 64):
        pen.line((140, 216, 226), 0.5, [(x, y), (x + 3 + 5 * share, y)])
    ground(pen, rng, 68, 1.2, (226, 186, 128), (226, 186, 128), WHITE)
    ground(pen, rng, 71, 1.2, (252, 228, 176), (238, 196, 132))
    ripples(pen, rng, (224, 180, 120))


def night(pen: Pen, rng: random.Random) -> None:
    sky(pen, (16, 20, 58), (110, 88, 176))
    pen.disc((255, 250, 225), *((x, y, 0.2 + 0.4 * share) for x, y, share in scatter(rng, 60, 0, 60)))
    for x, y, share in scatter(rng, 6, 4, 50):
        rays = np.stack([arc(x, y, 1.4 + 1.4 * share, count=5), arc(x, y, 0.6, 45, 405, 5)], axis=1)
        pen.polygon((255, 240, 190), rays.reshape(-1, 2))
    sun(pen, rng, 18, 8, (255, 244, 206))
    ground(pen, rng, 62, 4, (66, 58, 120), (36, 32, 80), (84, 76, 146))
    ground(pen, rng, 72, 3, (54, 52, 112), (26, 26, 66), (72, 68, 134))


def snow(pen: Pen, rng: random.Random) -> None:
    sky(pen, (136, 182, 226), WHITE)
    for middle in (12, 86, 48):
        peak = rng.uniform(middle - 8, middle + 8), rng.uniform(26, 36)
        pen.polygon((150, 176, 212), points("0 0, 34 41, -34 41") + peak)
        pen.polygon((126, 152, 194), points("0 0, 34 41, 5 41") + peak)
        pen.polygon(WHITE, points("0 0, 10 12, 5 10, 2 14, -4 9, -10 12") + peak)
    ground(pen, rng, 62, 3, (226, 237, 249), (190, 210, 236), WHITE)
    ground(pen, rng, 70, 3, (250, 252, 255), (196, 214, 238), WHITE)
    pen.disc(WHITE, *((x, y, 0.3 + 0.5 * share) for x, y, share in scatter(rng, 55, 0, 100)))


def desert(pen: Pen, rng: random.Random) -> None:
    sky(pen, (246, 130, 92), (255, 255, 180))
    sun(pen, rng, 36, 12, (255, 240, 190))
    ground(pen, rng, 58, 4.5, (240, 178, 104), (210, 126, 74))
    for x, y, share in scatter(rng, 3, 64, 70):
        for branch in ("0 4, 0 -10", "-3 -6, -3 -3, 0 -2", "3 -8, 3 -5, 0 -4"):
            pen.line((104, 132, 84), 1.6, points(branch) * (0.7 + 0.4 * share) + (x, y))
    ground(pen, rng, 70, 3.5, (236, 166, 92), (204, 112, 66))
    ripples(pen, rng, (206, 124, 70))


def sea(pen: Pen, rng: random.Random) -> None:
    sky(pen, (62, 190, 214), (14, 84, 140))
    for x, lean, _ in scatter(rng, 4, -25, 10):
        pen.polygon((255, 255, 255, 26), [(x, 0), (x + 8, 0), (x + lean + 20, 80), (x + lean, 80)])
    ground(pen, rng, 76, 2.5, (38, 116, 150), (24, 84, 124))
    for x, sway, share in scatter(rng, 7, -3, 3):
        weed = points("0 0, 1 -3, -1 -7, 1 -10") * (sway, 1 + 1.6 * share) + (x, 90)
        pen.curve(rng.choice(((36, 142, 124), (66, 164, 120), (232, 112, 128))), 2.2, weed)
    ground(pen, rng, 84, 1.5, (206, 196, 160), (120, 150, 150))
    for x, y, share in scatter(rng, 16, 5, 75):
        r = 0.8 + 1.6 * share
        pen.disc((200, 240, 250, 110), (x, y, r))
        pen.disc(WHITE, (x - r * 0.3, y - r * 0.3, r * 0.3))


def city(pen: Pen, rng: random.Random) -> None:
    sky(pen, (146, 134, 210), (255, 226, 190))
    clouds(pen, rng, (226, 200, 226))
    for fill, step, high, low in (((164, 148, 204), 11, 26, 50), ((98, 92, 156), 14, 40, 62)):
        for x in np.arange(-step * rng.random(), 100, step):
            top = rng.uniform(high, low)
            pen.box(fill, (x, top, x + step - 1, 78))
            places = [(x + a, b) for a in (2, 5.5, 9) for b in np.arange(top + 3, 72, 5) if step == 14]
            pen.box((255, 224, 150), *((a, b, a + 1.6, b + 2.4) for a, b in places if rng.random() < 0.6))
    ground(pen, rng, 76, 0, (206, 196, 214), (206, 196, 214))
    ground(pen, rng, 79, 0, (134, 128, 160), (94, 88, 124))
    pen.box((240, 230, 220), *((x, 94.5, x + 12, 96) for x in np.arange(-20 * rng.random(), 100, 22)))


def room(pen: Pen, rng: random.Random) -> None:
    sky(pen, (255, 240, 230), (250, 222, 210))
    pen.box((246, 190, 184), *((x, 0, x + 6.25, 80) for x in np.arange(-10 * rng.random(), 100, 12.5)))
    x, y = rng.choice((20, 80)), rng.uniform(20, 26)
    pen.box((190, 136, 92), (x - 12, y - 13, x + 12, y + 13))
    pen.box((222, 240, 244), (x - 10, y - 11, x + 10, y + 11))
    pen.polygon((130, 180, 160), points("-10 11, -4 0, 2 7, 5 3, 10 11") + (x, y))
    ground(pen, rng, 71, 0, WHITE, (244, 234, 230))
    ground(pen, rng, 75.5, 0, (214, 158, 112), (176, 118, 78))
    pen.line((166, 110, 74), 0.4, "0 83, 100 83", "0 91, 100 91")
    rug, x = rng.choice(((250, 232, 214), (178, 216, 208), (232, 176, 170))), rng.uniform(40, 60)
    pen.disc(rug, (x, 90, 42, 8))
    pen.disc(mix(rug, WHITE, 0.35), (x, 90, 36, 6.2))


THINGS: dict[str, Callable[[Pen, Tones], None]] = {
    draw.__name__.replace("_", " "): draw
    for draw in (apple, bicycle, bottle, bus, butterfly, castle, clock, cup, house, lamp, mushroom, palm_tree)
    + (pine_tree, rocket, snail, sunflower, television, train, turtle, whale)
}
BACKGROUNDS: dict[str, Callable[[Pen, random.Random], None]] = {
    draw.__name__: draw for draw in (meadow, beach, night, snow, desert, sea, city, room)
}
FLYING = {"butterfly": 0.16, "rocket": 0.1}  # how high, in sizes of the object
SHADOW = Image.radial_gradient("L").point(lambda v: max(0, 170 - v))


def draw_thing(canvas: Image.Image, rng: random.Random, name: str, colour: str, x: float, size: float) -> None:
    """Draw an object and its shadow, centred on `x` and `size` wide, both in widths of the canvas."""
    unit, lift = canvas.width, FLYING.get(name, 0)
    x, size, floor = x + rng.uniform(-0.02, 0.02), size * rng.uniform(0.96, 1.03), 0.84 + 0.1 * size
    picture = Image.new("RGB", (round(size * unit * 1.25),) * 2)
    mask = Image.new("L", picture.size)
    pen = Pen(picture, size * unit, rng.uniform(-3, 3) * (5 if lift else 1), rng.choice((-1, 1)), mask)
    THINGS[name](pen, tones(tuple(min(255, v + rng.randint(-7, 4)) for v in COLOURS[colour])))

    def paste(layer: Image.Image | Colour, y: float, shape: Image.Image) -> None:
        canvas.paste(layer, (round(x * unit - shape.width / 2), round(y * unit - shape.height / 2)), shape)

    middle = floor - size * (0.48 + lift)
    paste(INK, floor - 0.02 * size, SHADOW.resize((round(size * unit), round(size * unit * 0.16))))
    paste(WHITE, middle, mask.filter(ImageFilter.BoxBlur(unit / 120)).point(lambda v: min(150, v)))
    paste(ImageChops.multiply(picture, gradient(picture.size, WHITE, (222, 212, 222))), middle, mask)


def draw_scene(scene: Scene, size: int, seed: str = "") -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels.

    `seed` picks the small variations (shade, angle, clouds...); equal arguments give equal pictures.
    Raises KeyError for a scene with an unknown name.
    """
    rng = random.Random(seed)
    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2)
    BACKGROUNDS[scene.background](Pen(canvas, canvas.width), rng)
    side, width = POSITIONS[scene.position], SIZES[scene.size]
    if scene.other:
        draw_thing(canvas, rng, scene.other, scene.other_colour, 0.5 - side * 0.26, 0.46)
        draw_thing(canvas, rng, scene.thing, scene.colour, 0.5 + side * 0.22, width * 0.82)
    else:
        draw_thing(canvas, rng, scene.thing, scene.colour, 0.5 + side * (0.46 - width / 2), width)
    return canvas.reduce(SUPERSAMPLING)

"""Paint the scenes of the sample data set with Pillow; drawings.txt has the shapes."""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageOps


class Scene(NamedTuple):
    """The content of a picture: one object, or two if `other` names the one on the opposite side."""

    background: str
    thing: str
    color: str
    size: str
    position: str
    other: str = ""
    other_color: str = ""


def read_tables(file: Path) -> dict[str, dict[str, list[str]]]:
    """Return the lines of each name in each [section]."""
    tables: dict[str, dict[str, list[str]]] = {}
    section, name = "", ""
    for row in file.read_text(encoding="utf-8").splitlines():
        if row.startswith("["):
            section = row.strip("[]")
        elif row and not row.startswith("#"):
            name = row[:12].strip() or name
            tables.setdefault(section, {}).setdefault(name, []).extend(row[12:].split(" | "))
    return tables


Pair = tuple[float, float]
TABLES_FILE = Path(__file__).with_name("drawings.txt")
COLORS, PALETTE, THINGS, BACKGROUNDS, CAPTIONS, PLACES, TEST_IMAGES = read_tables(TABLES_FILE).values()
SIZES = {"small": 0.44, "large": 0.68}  # in widths of the picture
POSITIONS = {"left": -1, "middle": 0, "right": 1}
FLYING = ("butterfly", "rocket")
SHADOW = ["disc #2d264820: 0 0 50 8; 0 0 42 6.4; 0 0 34 5; 0 0 26 3.6"]
SUPERSAMPLING = 3
CIRCLE = np.array([(np.cos(angle), np.sin(angle)) for angle in np.pi * np.arange(0.5, 41) / 20])


def draw_scene(scene: Scene, size: int, seed: str = "") -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels.

    `seed` selects small variations such as angles and clouds; equal arguments give equal pictures.
    """
    rng = random.Random(seed)
    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2)
    paint(canvas, BACKGROUNDS[scene.background], shades(), rng, (0, 0), (1, 1))
    if rng.random() < 0.5:
        canvas = ImageOps.mirror(canvas)
    side, width = POSITIONS[scene.position], SIZES[scene.size]
    if scene.other:
        draw_thing(canvas, scene.other, scene.other_color, rng, 0.5 - side * 0.26, 0.46)
        draw_thing(canvas, scene.thing, scene.color, rng, 0.5 + side * 0.22, width * 0.82)
    else:
        draw_thing(canvas, scene.thing, scene.color, rng, 0.5 + side * (0.46 - width / 2), width)
    return canvas.reduce(SUPERSAMPLING)


def draw_thing(canvas: Image.Image, name: str, color: str, rng: random.Random, x: float, size: float) -> None:
    """Draw an object with a shadow and a halo, centered on `x` and `size` wide, both in widths of the canvas."""
    x, size = x + rng.uniform(-0.02, 0.02), size * rng.uniform(0.96, 1.03)
    floor = 0.84 + 0.1 * size
    middle = floor - size * (0.6 if name in FLYING else 0.48)
    paint(canvas, SHADOW, shades(), rng, (100 * x, 100 * floor), (0.85 * size, size))
    picture = Image.new("RGBA", (round(1.25 * size * canvas.width),) * 2)
    paint(picture, THINGS[name], shades(color), rng, (10, 10), (0.8, 0.8))
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    picture = picture.rotate(rng.uniform(-4, 4))
    halo = picture.getchannel("A").filter(ImageFilter.BoxBlur(canvas.width / 120)).point(lambda alpha: 0.6 * alpha)
    corner = round(x * canvas.width - picture.width / 2), round(middle * canvas.width - picture.height / 2)
    canvas.paste("white", corner, halo)
    canvas.paste(picture, corner, picture)


def shades(color: str = "") -> dict[str, str | tuple[int, ...]]:
    """Return the palette, with `color` in two darker shades (yellow turns amber, not olive) and a lighter one."""
    palette: dict = {name: value for name, (value,) in PALETTE.items()}
    if not color:
        return palette
    base = np.array(ImageColor.getrgb(*COLORS[color])) / 255
    dark = base ** (1.15, 1.3, 1.2) * (0.85, 0.86, 0.92)
    deep = dark ** (1.15, 1.3, 1.2) * (0.85, 0.86, 0.92)
    named = {"color": base, "dark": dark, "deep": deep, "light": 0.55 * base + 0.45}
    return palette | {name: tuple((255 * shade).astype(int).tolist()) for name, shade in named.items()}


def paint(image: Image.Image, drawing: list[str], palette: dict, rng: random.Random, origin: Pair, scale: Pair) -> None:
    """Paint a drawing on a square image, with its 0 0 at `origin`, in hundredths of the image."""
    for line in drawing:
        word, rest = line.split(maxsplit=1)
        if word == "both":
            mirrored = (origin[0] + 100 * scale[0], origin[1]), (-scale[0], scale[1])
            paint(image, [rest], palette, rng, origin, scale)
            paint(image, [rest], palette, rng, *mirrored)
        elif word == "scatter":
            count, top, bottom, rest = rest.split(maxsplit=3)
            for i in range(int(count)):  # each in its own part of the width, so that no part stays empty
                spot = (i + rng.random()) * 100 / int(count), rng.uniform(float(top), float(bottom))
                paint(image, [rest], palette, rng, spot, (rng.uniform(0.75, 1.25),) * 2)
        else:
            paint_shapes(image, line, palette, rng, origin, scale)


def paint_shapes(image: Image.Image, line: str, palette: dict, rng: random.Random, origin: Pair, scale: Pair) -> None:
    """Paint the shapes of one line, without "both" or "scatter"."""
    pen, unit = ImageDraw.Draw(image, "RGBA"), image.width / 100
    style, shapes = line.split(":")
    kind, fills, *numbers = style.split()
    fill, *rim = [palette.get(name, name) for name in fills.split("/")]
    size = float(numbers[0]) if numbers else 0
    for shape in shapes.split(";"):
        if kind == "fade":
            fade(image, fill, *rim, float(shape), size, rng)
            continue
        points = (outline(kind, shape, size) * scale + origin) * unit
        if kind in ("line", "curve", "ring"):
            width = max(1, round(size * scale[1] * unit))
            r = (width - 1) / 2
            pen.line(points.ravel().tolist(), fill, width)
            for x, y in points:  # round ends and joints
                pen.ellipse((x - r, y - r, x + r, y + r), fill)
            continue
        if rim:
            pen.polygon(points.ravel().tolist(), *rim)
            points = 0.9 * points + 0.05 * (points.max(0) + points.min(0)) - 0.035 * np.ptp(points, axis=0)
        pen.polygon(points.ravel().tolist(), fill)


def outline(kind: str, numbers: str, size: float) -> np.ndarray:
    """Return the points of a shape, float64 [num_points, 2]. `size`: the corner radius of a box."""
    points = np.array([pair.split() for pair in numbers.split(",")], float)
    if kind in ("poly", "line"):
        return points
    if kind in ("disc", "ring"):
        return points[0, :2] + CIRCLE * points[0, 2:]
    if kind == "box":  # a circle with its quarters moved apart
        middle, half = (points[0, :2] + points[0, 2:]) / 2, (points[0, 2:] - points[0, :2]) / 2
        return middle + np.sign(CIRCLE) * (half - size) + CIRCLE * size
    if kind == "half":
        points = np.concatenate([points, points[-2:0:-1] * (-1, 1) + (100, 0)])
    points = np.concatenate([points[:1], points, points[-1:]] if kind == "curve" else [points[-1:], points, points[:2]])
    a, b, c, d = points[:-3], points[1:-2], points[2:-1], points[3:]
    t = np.linspace(0, 1, 10)[:, None, None]  # of a Catmull-Rom spline
    spline = b + (c - a) * t / 2 + (a - 2.5 * b + 2 * c - d / 2) * t**2 + (3 * (b - c) + d - a) * t**3 / 2
    return spline.transpose(1, 0, 2).reshape(-1, 2)


def fade(image: Image.Image, top: str, bottom: str, height: float, wave: float, rng: random.Random) -> None:
    """Paint the area below a wavy edge with a vertical gradient, and a bright line along the edge."""
    x, unit = np.linspace(0, 100, 50), image.width / 100
    edge = height + wave * np.sin(x * rng.uniform(0.04, 0.09) + rng.uniform(0, 6))
    area = np.stack([[*x, 100, 0], [*edge, 100, 100]], axis=1) * unit
    ImageDraw.Draw(image, "RGBA").polygon((area - (0, unit)).ravel().tolist(), "#ffffff50")
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(area.ravel().tolist(), 255)
    start = max(0, round(edge.min() * unit))
    gradient = ImageOps.colorize(Image.linear_gradient("L"), top, bottom).resize((image.width, image.height - start), 0)
    image.paste(gradient, (0, start), mask.crop((0, start, *image.size)))

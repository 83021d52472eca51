"""The pictures of the sample dataset: twenty objects and eight backgrounds, drawn with Pillow.

A drawing is a list of lines "shape fill size: numbers", painted one over the other on a square that goes from 0 0 at
its top left to 100 100. A ";" separates shapes that are painted alike.

    shape              size      numbers
    poly, blob, half             x y, x y, ...         a polygon; a smooth outline; the right half of a symmetrical one
    line, curve        width     x y, x y, ...         straight; smooth
    disc, ring         width     x y radius            or x y and two radii, for an ellipse
    box                corner    left top right bottom
    fade               wave      height                all below a wavy edge, from the first colour down to the second

"fill/rim" leaves a rim of another colour on the side away from the light. "both" before a line paints it a second
time with left and right exchanged; "scatter count top bottom" paints it at random places between two heights.
"""

import random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageOps


class Scene(NamedTuple):
    """What a picture shows: one object, or two if `other` names the one on the opposite side."""

    background: str
    thing: str
    colour: str
    size: str
    position: str
    other: str = ""
    other_colour: str = ""


def parse(table: str) -> dict[str, list[str]]:
    """Return the drawings of a table: names in its first column, lines, " | " between them, in its second."""
    drawings, name = {}, ""
    for row in table.strip().splitlines():
        name = row[:12].strip() or name
        drawings.setdefault(name, []).extend(row[12:].split(" | "))
    return drawings


Pair = tuple[float, float]
SIZES = {"small": 0.44, "large": 0.68}  # in widths of the picture
POSITIONS = {"left": -1, "middle": 0, "right": 1}
FLYING = ("butterfly", "rocket")
SHADOW = ["disc #2d264820: 0 0 50 8; 0 0 42 6.4; 0 0 34 5; 0 0 26 3.6"]
SUPERSAMPLING = 3
# fmt: off
COLOURS = {
    "red": "#e54442", "yellow": "#ffd63c", "green": "#4ab25c", "blue": "#3884e6",
    "purple": "#9056cc", "pink": "#fa88b6", "white": "#fffdfa", "brown": "#a06840",
}
PALETTE = {
    "ink": "#2d2648", "gold": "#ffd666", "cream": "#fff3db", "glass": "#bce4f4", "sand": "#dec3a5",
    "wood": "#a06a42", "bark": "#704432", "leaf": "#5ca854", "sun": "#fff4ce", "glow": "#fff4ce40",
}
# fmt: on
# `colour` is one of COLOURS; `dark`, `deep` and `light` are its shades. Objects stand on the lower edge.
THINGS = parse("""
apple       half colour/dark: 50 30, 62 24, 82 28, 92 50, 84 78, 66 96, 50 93
            blob light: 20 46, 27 36, 36 34, 30 44, 25 56
            curve wood 5: 50 34, 50 20, 56 8 | blob leaf: 53 20, 64 6, 84 5, 76 19, 60 23
bicycle     both ring ink 4.5: 23 76 19 | both ring light 3: 23 76 15
            both line white 0.8: 9 76, 37 76; 23 62, 23 90; 13 66, 33 86; 13 86, 33 66
            line colour 6.5: 23 76, 39 47, 68 45, 48 76, 23 76; 77 76, 66 36; 48 76, 36 38
            line ink 5: 30 36, 42 36; 66 36, 72 32, 79 34, 79 40; 47 76, 49 76
bottle      box wood: 42 3 58 14 | half colour/dark: 50 11, 57 12, 57 28, 66 40, 73 50, 73 92, 68 98, 50 98
            box cream: 27 56 73 84 | box dark: 40 11 60 17; 27 60 73 62.5; 27 77.5 73 80 | disc colour: 50 70 6
bus         box colour/dark 9: 2 34 98 90 | box light: 4 66 60 70
            box glass 2: 8 43 23 60; 26 43 41 60; 44 43 59 60; 63 43 75 82; 79 43 94 62
            disc ink: 22 88 10; 82 88 10 | disc colour/white: 22 88 6; 82 88 6
butterfly   both blob dark/deep: 52 54, 70 56, 87 64, 86 82, 70 93, 58 80
            both blob colour/dark: 52 50, 60 24, 80 7, 97 12, 95 36, 80 52, 60 58
            both blob light: 66 42, 72 27, 85 19, 87 30, 78 43; 68 73, 74 67, 80 73, 74 79
            both curve ink 2: 51 30, 55 16, 63 10 | disc ink: 50 53 4.5 27; 50 28 5.5
castle      box colour: 20 50 80 98; 26 44 33 50; 37 44 44 50; 56 44 63 50; 67 44 74 50
            box colour: 38 30 62 60; 2 42 26 98; 74 42 98 98 | box dark: 55 30 62 60; 19 42 26 98; 91 42 98 98
            poly deep: 35 30, 50 6, 65 30; -1 42, 14 18, 29 42; 71 42, 86 18, 101 42
            poly gold: 50 7, 50 0, 60 3; 14 19, 14 12, 24 15; 86 19, 86 12, 96 15
            box ink 3: 47 38 53 48; 11 50 17 60; 83 50 89 60
            poly wood: 39 98, 39 77, 42 69, 50 65, 58 69, 61 77, 61 98
clock       both line ink 7: 70 85, 80 96 | both disc dark: 76 22 15
            disc colour/dark: 50 57 39 | disc cream: 50 57 30
            line ink 3: 50 37, 50 57, 63 63; 50 31, 50 32; 50 82, 50 83; 24 57, 25 57; 75 57, 76 57
cup         disc light/deep: 46 92 42 6 | ring dark 6.5: 76 59 14
            blob colour/dark: 13 38, 46 36, 79 38, 77 60, 70 80, 60 92, 46 93, 32 92, 22 80, 15 60
            disc light: 46 39 33 7.5 | disc bark: 46 40 28.5 5.5
            curve #ececf6 3: 34 29, 38 22, 31 13, 36 5; 46 29, 50 22, 43 13, 48 5; 58 29, 62 22, 55 13, 60 5
house       box bark: 68 14 80 40 | poly colour: 12 98, 12 46, 50 14, 88 46, 88 98
            line deep 8.5: 5 51, 50 10, 95 51 | disc cream: 50 40 7.5 | disc glass: 50 40 5.5
            both box cream: 17 58 34 78 | both box gold: 19 60 25 67; 26 60 32 67; 19 69 25 76; 26 69 32 76
            box wood: 40 62 60 98 | disc gold: 56 81 1.8
lamp        disc gold/wood: 50 93 22 5.5 | box wood: 47 44 53 92 | disc gold: 50 70 7; 50 48 11
            poly colour: 31 6, 69 6, 90 50, 10 50
            poly dark: 58 6, 69 6, 90 50, 68 50 | poly light: 36 6, 43 6, 34 50, 22 50
mushroom    half cream/sand: 50 50, 60 50, 61 70, 69 88, 64 98, 50 98 | disc sand: 50 56 36 8.5
            half colour/dark: 50 5, 70 10, 89 28, 97 50, 90 58, 70 54, 50 53
            disc cream: 46 25 9; 72 33 6.5; 22 40 6; 53 45 4.5; 28 22 3.5
palm tree   curve wood 8.5: 42 97, 45 75, 50 55, 50 36 | line bark 2: 41 86, 46 85; 43 74, 48 73; 46 62, 51 61
            both blob dark: 50 34, 64 30, 78 44, 80 66, 68 50; 50 34, 60 12, 76 3, 93 10, 74 16
            both blob colour: 50 34, 66 19, 87 22, 100 46, 80 36
            both curve light 1.2: 50 32, 71 42, 80 66; 50 32, 70 12, 93 10; 50 32, 79 29, 100 46
            disc bark: 45 38 4.5; 55 38 4.5
pine tree   box wood: 44 82 56 98
            both poly colour: 50 2, 73 39, 50 43; 50 22, 82 63, 50 67; 50 42, 90 87, 50 91
            poly dark: 50 2, 73 39, 50 43; 50 22, 82 63, 50 67; 50 42, 90 87, 50 91
            line light 2.2: 21 83.5, 36 70; 27 59.5, 39 48; 33.5 35.5, 42 24
rocket      half #ff8c3c: 50 72, 62 74, 60 88, 50 100 | half gold: 50 72, 57 74, 55 85, 50 92
            both blob deep: 66 50, 80 62, 86 84, 62 74
            half colour/dark: 50 0, 60 10, 69 30, 69 54, 61 76, 50 77 | half deep: 50 0, 57 7, 63.5 17, 50 19
            disc deep: 50 36 11.5 | disc glass: 50 36 8.5 | box deep 3: 47 56 53 84
snail       curve wood 3.5: 83 72, 81 60, 83 48; 83 72, 91 60, 93 48 | disc ink: 83 47 3.5; 93 47 3.5
            blob #facf9c: 3 96, 20 86, 60 86, 74 80, 76 68, 86 62, 95 70, 94 86, 84 96, 50 98
            disc colour/dark: 41 54 35.5
            curve deep 4: 42 54, 38 58, 33 52, 37 44, 48 44, 53 56, 44 67, 29 65, 21 50, 31 33, 51 33, 63 51, 58 71
sunflower   curve leaf 5: 50 40, 52 70, 49 98
            blob leaf: 50 86, 60 68, 80 64, 74 80; 50 92, 38 76, 20 74, 28 88
            half dark: 50 11, 59 3, 63 14, 75 12, 73 24, 84 28, 76 37, 84 46, 73 50, 75 62, 63 60, 59 71, 50 63
            half colour: 50 1, 57 12, 68 6, 68 19, 81 19, 75 30, 86 37, 75 44, 81 55, 68 55, 68 68, 57 62, 50 73
            disc wood/bark: 50 37 17.5
            disc bark: 43 34 2; 50 28 2; 57 34 2; 50 41 2; 41 42 2; 58 43 2; 50 48 2; 49 35 2
television  both line ink 3: 24 6, 50 30; 29 88, 24 97 | box colour/dark 9: 4 26 96 91
            box glass/ink 8: 10 33 71 82 | poly white: 24 74, 40 41, 48 41, 32 74
            disc cream/ink: 82 42 6; 82 56 6 | line deep 2: 77 68, 87 68; 77 74, 87 74
train       disc #eeeef6: 80 17 5; 70 11 7; 57 8 8 | poly deep: 74 27, 90 27, 86 48, 78 48; 86 76, 100 93, 86 93
            box colour/dark 6: 30 45 94 76 | box gold: 56 45 58.5 76; 70 45 72.5 76
            box colour: 6 28 43 80 | box glass 2: 13 37 36 55 | box deep 2: 2 22 47 30; 4 74 92 82
            disc ink: 22 84 13; 50 87 10; 74 87 10 | disc colour/white: 22 84 7; 50 87 6; 74 87 6
turtle      box #7ea061 5: 24 78 38 97; 60 78 74 97
            blob #a0c87a: 64 84, 76 72, 77 52, 88 46, 97 54, 94 66, 87 78, 74 90 | disc ink: 90 53 2
            blob colour/dark: 7 84, 11 59, 25 40, 43 34, 61 40, 75 59, 79 84, 60 86, 26 86
            line dark 2.8: 32 48, 52 48, 58 63, 42 74, 26 63, 32 48; 26 63, 13 70; 58 63, 71 70; 42 74, 42 82
            box deep 3.5: 5 81 81 88
whale       curve glass 4: 66 40, 66 28, 60 20, 53 24; 66 40, 66 28, 72 20, 79 24
            blob dark: 9 48, 0 36, 3 24, 12 30, 20 24, 24 36, 14 50
            blob colour/dark: 6 40, 14 60, 30 62, 50 46, 72 41, 92 52, 97 72, 86 90, 60 97, 34 93, 14 76, 4 58
            blob cream: 96.5 70, 84 78, 60 81, 44 80, 34 90, 60 96.5, 86 89
            blob dark: 50 76, 62 76, 60 86, 48 93 | disc ink: 80 65 3
""")
BACKGROUNDS = parse("""
meadow      fade #68bef0/white: 0 | disc glow: 80 16 14; 80 16 11 | disc sun: 80 16 8
            scatter 3 10 30 disc white: -6 1 3; -2 -1 4.2; 3 0 3.6; 6 1 2.6; 0 2 8 2
            fade #a4d682/#5aaa54 3: 55 | fade #84c862/#469c48 3: 66
            scatter 12 74 98 disc white: 0 0 1.1 | scatter 12 74 98 disc #ffb0c8: 0 0 1.1
beach       fade #5cc6f4/white: 0 | disc glow: 80 16 14; 80 16 11 | disc sun: 80 16 8
            scatter 3 10 30 disc white: -6 1 3; -2 -1 4.2; 3 0 3.6; 6 1 2.6; 0 2 8 2
            fade #188cbe/#c8ffec: 50 | fade #fce4b0/#eec684 3: 70
            scatter 18 77 98 curve #e0b478 0.6: 0 0, 3 -0.7, 8 0
night       fade #10143a/#6e58b0: 0 | scatter 60 0 60 disc sun: 0 0 0.45
            scatter 6 4 50 poly sun: -2 0, -0.4 -0.4, 0 -2, 0.4 -0.4, 2 0, 0.4 0.4, 0 2, -0.4 0.4
            disc glow: 80 18 14; 80 18 11 | disc sun: 80 18 8
            fade #423a78/#242050 3: 62 | fade #363470/#1a1a42 3: 72
snow        fade #88b6e2/white: 0
            poly #96b0d4: 12 32, 46 73, -22 73; 86 28, 120 69, 52 69; 48 34, 82 75, 14 75
            poly #7e98c2: 12 32, 46 73, 17 73; 86 28, 120 69, 91 69; 48 34, 82 75, 53 75
            poly white: 12 32, 22 44, 12 40, 2 44; 86 28, 96 40, 86 36, 76 40; 48 34, 58 46, 48 42, 38 46
            fade #e2edf9/#bed2ec 3: 62 | fade #fafcff/#c4d6ee 3: 70
            scatter 55 0 100 disc white: 0 0 0.5
desert      fade #f6825c/#ffffb4: 0 | disc glow: 74 34 21; 74 34 16 | disc sun: 74 34 12
            fade #f0b268/#d27e4a 3: 58
            scatter 3 62 68 line #688454 1.6: 0 4, 0 -10; -3 -6, -3 -3, 0 -2; 3 -8, 3 -5, 0 -4
            fade #eca65c/#cc7042 3: 70 | scatter 18 77 98 curve #ce7c46 0.6: 0 0, 3 -0.7, 8 0
sea         fade #3ebed6/#0e548c: 0 | scatter 4 0 0 poly #ffffff1a: 0 0, 8 0, 18 80, -2 80
            fade #267496/#18547c 3: 74 | scatter 4 90 90 curve #248e7c 2.2: 0 0, 2 -5, -2 -11, 1 -17
            fade #cec4a0/#789696 3: 84 | scatter 16 5 75 disc #c8f0fa/#c8f0fa70: 0 0 1.6
city        fade #9286d2/#ffe2be: 0 | scatter 9 26 50 box #a494cc: -5 0 5 80
            scatter 8 40 62 box #625c9c: -6 0 6 60 | scatter 40 60 74 box #ffe096: 0 0 1.6 2.4
            fade #8680a0/#5e587c: 78
            box cream: 4 94.5 16 96; 26 94.5 38 96; 48 94.5 60 96; 70 94.5 82 96; 92 94.5 104 96
room        fade #fff0e6/#fadede: 0
            box #f6beb8: 3 0 9 80; 16 0 22 80; 29 0 35 80; 42 0 48 80; 55 0 61 80; 68 0 74 80; 81 0 87 80; 94 0 100 80
            box glass/wood: 66 8 90 34 | poly #82b4a0: 68 31, 74 20, 80 27, 83 23, 87 31 | fade white/white: 71
            fade #d69e70/#b0764e: 75.5 | disc #cce5e0/#b2d8d0: 50 90 42 8
""")
CIRCLE = np.array([(np.cos(angle), np.sin(angle)) for angle in np.pi * np.arange(0.5, 41) / 20])


def draw_scene(scene: Scene, size: int, seed: str = "") -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels.

    `seed` picks the small variations (angle, clouds, ...); equal arguments give equal pictures.
    Raises KeyError for a scene with an unknown name.
    """
    rng = random.Random(seed)
    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2)
    paint(canvas, BACKGROUNDS[scene.background], PALETTE, rng, (0, 0), (1, 1))
    if rng.random() < 0.5:
        canvas = ImageOps.mirror(canvas)
    side, width = POSITIONS[scene.position], SIZES[scene.size]
    if scene.other:
        draw_thing(canvas, scene.other, scene.other_colour, rng, 0.5 - side * 0.26, 0.46)
        draw_thing(canvas, scene.thing, scene.colour, rng, 0.5 + side * 0.22, width * 0.82)
    else:
        draw_thing(canvas, scene.thing, scene.colour, rng, 0.5 + side * (0.46 - width / 2), width)
    return canvas.reduce(SUPERSAMPLING)


def draw_thing(canvas: Image.Image, name: str, colour: str, rng: random.Random, x: float, size: float) -> None:
    """Draw an object with a shadow and a halo, centred on `x` and `size` wide, both in widths of the canvas."""
    x, size = x + rng.uniform(-0.02, 0.02), size * rng.uniform(0.96, 1.03)
    floor = 0.84 + 0.1 * size
    middle = floor - size * (0.6 if name in FLYING else 0.48)
    paint(canvas, SHADOW, PALETTE, rng, (100 * x, 100 * floor), (0.85 * size, size))
    picture = Image.new("RGBA", (round(1.25 * size * canvas.width),) * 2)
    paint(picture, THINGS[name], PALETTE | shades(COLOURS[colour]), rng, (10, 10), (0.8, 0.8))
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    picture = picture.rotate(rng.uniform(-4, 4))
    halo = picture.getchannel("A").filter(ImageFilter.BoxBlur(canvas.width / 120)).point(lambda alpha: 0.6 * alpha)
    corner = round(x * canvas.width - picture.width / 2), round(middle * canvas.width - picture.height / 2)
    canvas.paste("white", corner, halo)
    canvas.paste(picture, corner, picture)


def shades(colour: str) -> dict[str, tuple[int, ...]]:
    """Return a colour with its two darker shades (yellow turns amber, not olive) and its lighter one."""
    base = np.array(ImageColor.getrgb(colour)) / 255
    dark = base ** (1.15, 1.3, 1.2) * (0.85, 0.86, 0.92)
    deep = dark ** (1.15, 1.3, 1.2) * (0.85, 0.86, 0.92)
    named = {"colour": base, "dark": dark, "deep": deep, "light": 0.55 * base + 0.45}
    return {name: tuple((255 * shade).astype(int).tolist()) for name, shade in named.items()}


def paint(image: Image.Image, drawing: list[str], palette: dict, rng: random.Random, place: Pair, scale: Pair) -> None:
    """Paint a drawing on a square image, its 0 0 at a place that is told in hundredths of the image."""
    for line in drawing:
        word, rest = line.split(maxsplit=1)
        if word == "both":
            paint(image, [rest], palette, rng, place, scale)
            paint(image, [rest], palette, rng, (place[0] + 100 * scale[0], place[1]), (-scale[0], scale[1]))
        elif word == "scatter":
            count, top, bottom, rest = rest.split(maxsplit=3)
            for i in range(int(count)):  # each in its own share of the width, so that no part stays empty
                spot = (i + rng.random()) * 100 / int(count), rng.uniform(float(top), float(bottom))
                paint(image, [rest], palette, rng, spot, (rng.uniform(0.75, 1.25),) * 2)
        else:
            paint_shapes(image, line, palette, rng, place, scale)


def paint_shapes(image: Image.Image, line: str, palette: dict, rng: random.Random, place: Pair, scale: Pair) -> None:
    """Paint the shapes of a line that has neither "both" nor "scatter" before it."""
    pen, unit = ImageDraw.Draw(image, "RGBA"), image.width / 100
    style, shapes = line.split(":")
    kind, fills, *numbers = style.split()
    fill, *rim = [palette.get(name, name) for name in fills.split("/")]
    size = float(numbers[0]) if numbers else 0
    for shape in shapes.split(";"):
        if kind == "fade":
            fade(image, fill, *rim, float(shape), size, rng)
            continue
        points = (outline(kind, shape, size) * scale + place) * unit
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
    """Return the points of a shape, [n, 2]; `size` is how round a box's corners are."""
    points = np.array([pair.split() for pair in numbers.split(",")], float)
    if kind in ("poly", "line"):
        return points
    if kind in ("disc", "ring"):
        return points[0, :2] + CIRCLE * points[0, 2:]
    if kind == "box":  # a circle whose quarters are pulled apart
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
    """Paint everything below a wavy edge, which catches the light."""
    x, unit = np.linspace(0, 100, 50), image.width / 100
    edge = height + wave * np.sin(x * rng.uniform(0.04, 0.09) + rng.uniform(0, 6))
    area = np.stack([[*x, 100, 0], [*edge, 100, 100]], axis=1) * unit
    ImageDraw.Draw(image, "RGBA").polygon((area - (0, unit)).ravel().tolist(), "#ffffff50")
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(area.ravel().tolist(), 255)
    start = max(0, round(edge.min() * unit))
    gradient = ImageOps.colorize(Image.linear_gradient("L"), top, bottom).resize((image.width, image.height - start), 0)
    image.paste(gradient, (0, start), mask.crop((0, start, *image.size)))

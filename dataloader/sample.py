"""The sample dataset: captioned drawings in the COCO captions format, made on the spot.

`python -m dataloader.sample --output_dir data/sample` draws it; `make_sample` does so from Python.
"""

import argparse
import hashlib
import io
import json
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dataloader import drawings
from dataloader.drawings import BACKGROUNDS, COLOURS, POSITIONS, SIZES, THINGS, Scene, draw_scene
from utils.errors import UserError

OBJECTS: tuple[str, ...] = tuple(THINGS)
IMAGE_SIZE = 224
CAPTIONS_PER_IMAGE = 5
SHARE_OF_PAIRS = 0.3

# Colours that are hard to see on a background or odd on an object.
CLASHES = {
    "yellow": ("desert", "beach"),
    "green": ("meadow", "sunflower"),
    "blue": ("sea",),
    "purple": ("city", "night"),
    "pink": ("room",),
    "white": ("snow", "room"),
    "brown": ("desert", "night", "sunflower", "palm tree"),
}
# A person's captions tell more or less. The held-out ones tell all, so that each fits one picture only.
FULL = (
    "a photo of a {size} {colour} {thing} {where}, {place}",
    "there is a {size} {colour} {thing} {where}, {place}",
    "{place}, there is a {size} {colour} {thing} {where}",
    "{where}, we see a {size} {colour} {thing} {place}",
    "a {size} {colour} {thing} {place}, {where}",
    "a {size} {thing} in {colour}, {where}, {place}",
    "a {colour} {thing}, quite {size}, {where}, {place}",
    "the {thing} {where} is {size} and {colour}, {place}",
    "this picture shows a {size} {colour} {thing} {place}, {where}",
    "an illustration of a {size} {colour} {thing} {where}, {place}",
)
SHORT = "a photo of {things}."  # the prompt of zero-shot classification
PARTIAL = ("a photo of {coloured_things}.", "a drawing of {things}", "{coloured_things}", "there is {things}")
WORDINGS = {
    "small": ("small", "tiny"),
    "large": ("large", "big"),
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
    "meadow": ("in a green meadow", "on a grassy field with flowers"),
    "beach": ("on a sandy beach", "on the beach by the sea"),
    "night": ("under a starry night sky", "at night under the moon and stars"),
    "snow": ("in the snow", "in front of snowy mountains"),
    "desert": ("in the desert at sunset", "among desert dunes"),
    "sea": ("deep under water", "at the bottom of the sea"),
    "city": ("in front of a city skyline", "on a city street at dusk"),
    "room": ("in a room with striped wallpaper", "in front of a striped wall"),
}
TEST_SCENES = tuple(
    Scene(background, thing, colour, "large", "middle")
    for line in (
        "beach red bicycle, city yellow bus, meadow purple butterfly, snow pink castle",
        "room blue lamp, meadow red mushroom, desert green palm tree, night white rocket, beach purple snail",
        "night yellow sunflower, snow green train, sea brown turtle",
    )
    for background, colour, thing in (words.split(maxsplit=2) for words in line.split(", "))
)


class SamplePaths(NamedTuple):
    """Where the parts of the sample dataset lie."""

    train_img_dir: Path
    train_annotation_file: Path
    val_img_dir: Path
    val_annotation_file: Path


class Picture(NamedTuple):
    """A picture to draw; `seed` picks its small variations and its captions."""

    id: int
    path: Path
    scene: Scene
    seed: str


def make_sample(output_dir: Path, *, num_train: int = 2000, num_val: int = 200, seed: int = 11) -> SamplePaths:
    """Draw the sample dataset into a folder, unless it is there already, and return where its parts lie.

    No two pictures show the same scene, and a picture depends only on `seed`, its split and its index.
    Raises ValueError unless both numbers of pictures are positive, and UserError if the disk refuses.
    """
    if min(num_train, num_val) < 1:
        raise ValueError(f"the numbers of pictures must be positive, not {num_train} and {num_val}")
    train_dir, val_dir, texts = (Path(output_dir) / name for name in ("train", "val", "annotations"))
    paths = SamplePaths(train_dir, texts / "captions_train.json", val_dir, texts / "captions_val.json")
    train = plan(train_dir, num_train, seed, first_id=1)
    val = plan(val_dir, num_val, seed, first_id=num_train + 1)

    marker = Path(output_dir) / "sample.json"  # written last: where it is, everything is
    arguments = {"code": code_version(), "num_train": num_train, "num_val": num_val, "seed": seed}
    files = [paths.train_annotation_file, paths.val_annotation_file, *(p.path for p in train + val)]
    if marker.is_file() and marker.read_text() == json.dumps(arguments) and all(map(Path.is_file, files)):
        return paths
    try:
        marker.unlink(missing_ok=True)
        for folder in (train_dir, val_dir, texts):
            folder.mkdir(parents=True, exist_ok=True)
        draw_all(train + val)
        for file, content in zip((*files[:2], marker), (coco(train), coco(val), arguments), strict=True):
            write(file, json.dumps(content).encode())
    except OSError as error:
        raise UserError(f"the sample dataset cannot be written into {output_dir} ({error.strerror})") from None
    return paths


def make_test_images(output_dir: Path, *, seed: int = 12) -> None:
    """Draw the test pictures, each named after its one object; their scenes are not in the sample dataset."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for scene in TEST_SCENES:
        name = scene.thing.replace(" ", "_")
        draw(Picture(0, Path(output_dir) / f"{name}.jpeg", scene, f"{seed} test {name}"))


def plan(folder: Path, count: int, seed: int, first_id: int) -> list[Picture]:
    """Return the pictures of a split, which is named like its folder."""
    scenes = enumerate(islice(distinct_scenes(folder.name, seed), count))
    return [
        Picture(first_id + i, folder / f"{first_id + i:012}.jpg", scene, f"{seed} {folder.name} {i}")
        for i, scene in scenes
    ]


def distinct_scenes(split: str, seed: int) -> Iterator[Scene]:
    """Yield the scenes of a split without end; objects, colours and backgrounds come equally often."""
    rng = random.Random(f"{seed} {split}")
    suitable = [pair for pair in product(THINGS, COLOURS) if pair[0] not in CLASHES.get(pair[1], ())]
    things, others, backgrounds = deck(rng, suitable), deck(rng, suitable), deck(rng, list(BACKGROUNDS))
    seen = set(TEST_SCENES)
    while True:
        thing, colour = next(things)
        other, other_colour = next(others) if rng.random() < SHARE_OF_PAIRS else ("", "")
        if thing == other or colour == other_colour:
            continue
        clashes = CLASHES.get(colour, ()) + CLASHES.get(other_colour, ())
        background = next(name for name in backgrounds if name not in clashes)
        size, position = rng.choice(layouts(split, background, thing, colour, other, other_colour))
        scene = Scene(background, thing, colour, size, position, other, other_colour)
        if scene not in seen:
            seen.add(scene)
            yield scene


def layouts(split: str, *content: str) -> list[tuple[str, str]]:
    """Return the sizes and positions in which a split may show a content; a hash keeps one for "val"."""
    pair = content[-1] != ""
    every = [layout for layout in product(SIZES, POSITIONS) if not (pair and "middle" in layout)]
    held_out = every.pop(zlib.crc32(repr(content).encode()) % len(every))
    return [held_out] if split == "val" else every


def deck(rng: random.Random, cards: Sequence) -> Iterator:
    """Yield all cards in random order, then all again in another, without end."""
    while True:
        yield from rng.sample(cards, len(cards))


def captions(scene: Scene, seed: str, split: str) -> list[str]:
    """Return different captions: all tell the whole scene in "val"; three in "train" tell only part of it."""
    rng = random.Random(f"{seed} captions")
    things, coloured_things = article(scene.thing), f"a {scene.colour} {scene.thing}"
    positions = WORDINGS[scene.position]
    if scene.other:
        other = f"a {scene.other_colour} {scene.other}"
        positions = (f"to the {scene.position} of {other}", f"on the {scene.position}, next to {other}")
        things, coloured_things = f"{things} and {article(scene.other)}", f"{coloured_things} and {other}"
    templates = rng.sample(FULL, CAPTIONS_PER_IMAGE)
    if split == "train":
        templates[:3] = SHORT, *rng.sample(PARTIAL, 2)
    return [
        template.format(
            size=rng.choice(WORDINGS[scene.size]),
            colour=scene.colour,
            thing=scene.thing,
            things=things,
            coloured_things=coloured_things,
            where=rng.choice(positions),
            place=rng.choice(WORDINGS[scene.background]),
        )
        for template in templates
    ]


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def coco(pictures: Sequence[Picture]) -> dict:
    """Return the captions file of a split."""
    images = [{"id": p.id, "file_name": p.path.name, "width": IMAGE_SIZE, "height": IMAGE_SIZE} for p in pictures]
    annotations = [
        {"id": p.id * CAPTIONS_PER_IMAGE + i, "image_id": p.id, "caption": caption}
        for p in pictures
        for i, caption in enumerate(captions(p.scene, p.seed, p.path.parent.name))
    ]
    return {"info": {"description": "sample drawings"}, "images": images, "annotations": annotations}


def draw_all(pictures: Sequence[Picture]) -> None:
    """Draw the pictures with up to eight processes."""
    workers = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers) as pool:
        drawn = pool.map(draw, pictures, chunksize=16) if workers > 1 else map(draw, pictures)
        for _ in tqdm(drawn, total=len(pictures), desc="drawing the sample dataset", unit="image", disable=None):
            pass


def draw(picture: Picture) -> None:
    """Draw a picture and write it as JPEG."""
    buffer = io.BytesIO()
    draw_scene(picture.scene, IMAGE_SIZE, picture.seed).save(buffer, "JPEG", quality=90, subsampling=0)
    write(picture.path, buffer.getvalue())


def write(path: Path, data: bytes) -> None:
    """Write a file in one step, so that no reader, nor a second process drawing here, meets half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)


def code_version() -> str:
    """Return a hash of the modules that make the dataset, so that changed code draws it anew."""
    sources = b"".join(Path(file).read_bytes() for file in (__file__, drawings.__file__))
    return hashlib.sha256(sources).hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the sample dataset from the command line."""
    parser = argparse.ArgumentParser(description="Draw the sample dataset.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/sample"))
    parser.add_argument("--test_images", type=Path, help="draw the test pictures, too, into this folder")
    args = parser.parse_args(argv)
    print(f"the training pictures lie in {make_sample(args.output_dir).train_img_dir}")
    if args.test_images:
        make_test_images(args.test_images)


if __name__ == "__main__":
    main()

"""The sample dataset: captioned drawings in the COCO captions format, made on the spot.

`make_test_images(Path("test_images"))` drew the pictures that the demo classifies.
"""

import hashlib
import io
import json
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dataloader import drawings
from dataloader.drawings import BACKGROUNDS, COLOURS, POSITIONS, SIZES, THINGS, Scene, draw_scene
from utils.errors import UserError
from utils.files import write_whole

IMAGE_SIZE = 224
# People tell more or less of what they see. The held-out captions tell all, so that each fits one picture only.
FULL = (
    "a photo of a {size} {colour} {thing} {where}, {place}",
    "{place}, there is a {size} {colour} {thing} {where}",
    "a {size} {colour} {thing} {place}, {where}",
    "a {colour} {thing}, quite {size}, {where}, {place}",
    "the {thing} {where} is {size} and {colour}, {place}",
)
PARTIAL = ("a photo of {coloured_things}.", "a drawing of {things}", "{coloured_things}", "there is {things}")
SHORT = "a photo of {things}."  # the prompt of zero-shot classification
WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
PLACES = {
    "meadow": ("in a green meadow", "on a grassy field with flowers"),
    "beach": ("on a sandy beach", "on the beach by the sea"),
    "night": ("under a starry night sky", "at night under the moon and stars"),
    "snow": ("in the snow", "in front of snowy mountains"),
    "desert": ("in the desert at sunset", "among desert dunes"),
    "sea": ("deep under water", "at the bottom of the sea"),
    "city": ("in front of a city skyline", "on a city street at dusk"),
    "room": ("in a room with striped wallpaper", "in front of a striped wall"),
}
TEST_SCENES = [Scene(*words, "large", "middle") for words in (
    ("beach", "bicycle", "red"), ("city", "bus", "yellow"), ("meadow", "butterfly", "purple"),
    ("snow", "castle", "pink"), ("room", "lamp", "blue"), ("meadow", "mushroom", "red"),
    ("desert", "palm tree", "green"), ("night", "rocket", "white"), ("beach", "snail", "purple"),
    ("night", "sunflower", "yellow"), ("snow", "train", "green"), ("sea", "turtle", "brown"),
)]  # fmt: skip


class Picture(NamedTuple):
    """A picture to draw; `seed` picks its small variations and its captions."""

    id: int
    path: Path
    scene: Scene
    seed: str


def make_sample(output_dir: Path, *, num_train: int = 2000, num_val: int = 200, seed: int = 11) -> None:
    """Draw the sample dataset into a folder, unless it is there already.

    The pictures lie in train/ and val/, their captions in annotations/captions_train.json and captions_val.json.
    Raises UserError if the disk refuses.
    """
    pictures = plan(output_dir, num_train, num_val, seed)
    code = b"".join(Path(file).read_bytes() for file in (__file__, drawings.__file__))  # changed code draws anew
    arguments = {"code": hashlib.sha256(code).hexdigest(), "num_train": num_train, "num_val": num_val, "seed": seed}
    marker = output_dir / "sample.json"
    texts = {
        output_dir / "annotations/captions_train.json": coco(pictures[:num_train]),
        output_dir / "annotations/captions_val.json": coco(pictures[num_train:]),
        marker: arguments,  # written last: where it is, everything is
    }
    files = [*texts, *(picture.path for picture in pictures)]
    if all(map(Path.is_file, files)) and marker.read_text() == json.dumps(arguments):
        return
    try:
        marker.unlink(missing_ok=True)
        for folder in {file.parent for file in files}:
            folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            drawn = pool.map(draw, pictures, chunksize=16)
            list(tqdm(drawn, "drawing the sample dataset", len(pictures), unit="image", disable=None))
        for file, content in texts.items():
            write_whole(file, json.dumps(content).encode())
    except OSError as error:
        raise UserError(f"the sample dataset cannot be written into {output_dir} ({error.strerror})") from None


def make_test_images(output_dir: Path, *, seed: int = 12) -> None:
    """Draw the test pictures, each named after its one object; their scenes are not in the sample dataset."""
    for scene in TEST_SCENES:
        name = scene.thing.replace(" ", "_")
        draw(Picture(0, output_dir / f"{name}.jpeg", scene, f"{seed} test {name}"))


def plan(output_dir: Path, num_train: int, num_val: int, seed: int) -> list[Picture]:
    """Return the pictures to train on, then the held-out ones; no two show the same scene."""
    rng = random.Random(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < num_train + num_val:
        (thing, other), (colour, other_colour) = rng.sample(list(THINGS), 2), rng.sample(list(COLOURS), 2)
        background, size, position = (rng.choice(list(names)) for names in (BACKGROUNDS, SIZES, POSITIONS))
        if position == "middle" or rng.random() < 0.5:
            other = other_colour = ""
        scene = Scene(background, thing, colour, size, position, other, other_colour)
        if scene not in TEST_SCENES:
            scenes[scene] = None
    splits = ["train"] * num_train + ["val"] * num_val
    return [
        Picture(i, output_dir / split / f"{i:012}.jpg", scene, f"{seed} {i}")
        for i, (split, scene) in enumerate(zip(splits, scenes, strict=True), start=1)
    ]


def coco(pictures: Sequence[Picture]) -> dict:
    """Return the captions file of a split."""
    images = [{"id": picture.id, "file_name": picture.path.name} for picture in pictures]
    texts = [{"image_id": picture.id, "caption": caption} for picture in pictures for caption in captions(picture)]
    return {"images": images, "annotations": texts}


def captions(picture: Picture) -> list[str]:
    """Return five different captions; those in "val" tell the whole scene, three in "train" only part of it."""
    scene, rng = picture.scene, random.Random(f"{picture.seed} captions")
    where, things, coloured_things = WHERE[scene.position], f"a {scene.thing}", f"a {scene.colour} {scene.thing}"
    if scene.other:
        where = f"to the {scene.position} of a {scene.other_colour} {scene.other}"
        things += f" and a {scene.other}"
        coloured_things += f" and a {scene.other_colour} {scene.other}"
    templates = FULL
    if picture.path.parent.name == "train":
        templates = SHORT, *rng.sample(PARTIAL, 2), *rng.sample(FULL, 2)
    words = scene._asdict() | {"where": where, "things": things, "coloured_things": coloured_things}
    filled = [template.format(place=rng.choice(PLACES[scene.background]), **words) for template in templates]
    return [caption.replace("a apple", "an apple") for caption in filled]


def draw(picture: Picture) -> None:
    """Draw a picture and write it as JPEG."""
    buffer = io.BytesIO()
    draw_scene(picture.scene, IMAGE_SIZE, picture.seed).save(buffer, "JPEG", quality=90, subsampling=0)
    write_whole(picture.path, buffer.getvalue())

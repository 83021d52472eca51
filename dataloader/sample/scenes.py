"""The sample data set: captioned drawings in COCO's captions format, drawn on demand.

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

from dataloader.sample import drawings
from dataloader.sample.drawings import CAPTIONS, PLACES, Scene, draw_scene
from utils.errors import UserError
from utils.files import write_atomic

IMAGE_SIZE = 224
WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
TEST_SCENES = [
    Scene(background, thing, color, "large", "middle")
    for thing, (words,) in drawings.TEST_IMAGES.items()
    for background, color in [words.split()]
]


class Picture(NamedTuple):
    """A picture to draw; `seed` selects its small variations and its captions."""

    id: int
    path: Path
    scene: Scene
    seed: str


def make_sample(output_dir: Path, *, num_train: int = 2000, num_val: int = 200, seed: int = 11) -> None:
    """Draw the sample data set into a folder, unless it is complete there.

    The pictures are in train/ and val/, the captions in annotations/captions_train.json and captions_val.json. A change
    of the code or the drawings draws everything anew. Raises UserError if the folder cannot be written.
    """
    pictures = plan(output_dir, num_train, num_val, seed)
    code = b"".join(Path(file).read_bytes() for file in (__file__, drawings.__file__, drawings.TABLES_FILE))
    arguments = {"code": hashlib.sha256(code).hexdigest(), "num_train": num_train, "num_val": num_val, "seed": seed}
    marker = output_dir / "sample.json"
    texts = {
        output_dir / "annotations/captions_train.json": coco(pictures[:num_train]),
        output_dir / "annotations/captions_val.json": coco(pictures[num_train:]),
        marker: arguments,  # written last: if it exists, everything does
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
            list(tqdm(drawn, "drawing the sample data set", len(pictures), unit="image", disable=None))
        for file, content in texts.items():
            write_atomic(file, json.dumps(content).encode())
    except OSError as error:
        raise UserError(f"the sample data set cannot be written into {output_dir} ({error.strerror})") from None


def make_test_images(output_dir: Path, *, seed: int = 12) -> None:
    """Draw the test pictures, each named after its object; their scenes are not in the sample data set."""
    for scene in TEST_SCENES:
        name = scene.thing.replace(" ", "_")
        draw(Picture(0, output_dir / f"{name}.jpeg", scene, f"{seed} test {name}"))


def plan(output_dir: Path, num_train: int, num_val: int, seed: int) -> list[Picture]:
    """Return the training pictures, then the held-out ones; no two show the same scene."""
    rng = random.Random(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < num_train + num_val:
        thing, other = rng.sample(list(drawings.THINGS), 2)
        color, other_color = rng.sample(list(drawings.COLORS), 2)
        choices = drawings.BACKGROUNDS, drawings.SIZES, drawings.POSITIONS
        background, size, position = (rng.choice(list(names)) for names in choices)
        if position == "middle" or rng.random() < 0.5:
            other = other_color = ""
        scene = Scene(background, thing, color, size, position, other, other_color)
        if scene not in TEST_SCENES:
            scenes[scene] = None
    splits = ["train"] * num_train + ["val"] * num_val
    return [
        Picture(i, output_dir / split / f"{i:012}.jpg", scene, f"{seed} {i}")
        for i, (split, scene) in enumerate(zip(splits, scenes, strict=True), start=1)
    ]


def coco(pictures: Sequence[Picture]) -> dict:
    """Return the content of a captions file."""
    images = [{"id": picture.id, "file_name": picture.path.name} for picture in pictures]
    texts = [{"image_id": picture.id, "caption": caption} for picture in pictures for caption in captions(picture)]
    return {"images": images, "annotations": texts}


def captions(picture: Picture) -> list[str]:
    """Return five different captions. Those in "val" describe the whole scene, three of those in "train" a part."""
    scene, rng = picture.scene, random.Random(f"{picture.seed} captions")
    where, things, colored_things = WHERE[scene.position], f"a {scene.thing}", f"a {scene.color} {scene.thing}"
    if scene.other:
        where = f"to the {scene.position} of a {scene.other_color} {scene.other}"
        things += f" and a {scene.other}"
        colored_things += f" and a {scene.other_color} {scene.other}"
    templates = CAPTIONS["full"]
    if picture.path.parent.name == "train":
        templates = [*CAPTIONS["short"], *rng.sample(CAPTIONS["partial"], 2), *rng.sample(CAPTIONS["full"], 2)]
    words = scene._asdict() | {"where": where, "things": things, "colored_things": colored_things}
    filled = [template.format(place=rng.choice(PLACES[scene.background]), **words) for template in templates]
    return [caption.replace("a apple", "an apple") for caption in filled]


def draw(picture: Picture) -> None:
    """Draw a picture and write it as JPEG."""
    buffer = io.BytesIO()
    draw_scene(picture.scene, IMAGE_SIZE, picture.seed).save(buffer, "JPEG", quality=90, subsampling=0)
    write_atomic(picture.path, buffer.getvalue())

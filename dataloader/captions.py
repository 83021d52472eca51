"""Images and their captions, from files in COCO's captions format."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

from pycocotools.coco import COCO

from utils.errors import UserError

COCO_STEPS = """
To fetch MS-COCO (19 GB of images) into data/mscoco, where data_config.yaml expects it:
  mkdir -p data/mscoco
  wget http://images.cocodataset.org/zips/train2017.zip -O data/mscoco/train2017.zip
  unzip data/mscoco/train2017.zip -d data/mscoco
  wget http://images.cocodataset.org/annotations/annotations_trainval2017.zip -O data/mscoco/annotations.zip
  unzip data/mscoco/annotations.zip -d data/mscoco
To train without any download: python train.py --sample"""


class CaptionedImage(NamedTuple):
    """One image file and every caption of it."""

    image_id: int | str
    path: str
    captions: tuple[str, ...]


class CaptionSet(NamedTuple):
    """The images of an annotation file that have captions and are on disk, and the names of those that are not."""

    images: list[CaptionedImage]
    missing: list[str]

    @property
    def num_captions(self) -> int:
        return sum(len(image.captions) for image in self.images)


def read_captions(img_dir: str | Path, annotation_file: str | Path) -> CaptionSet:
    """Read captions in COCO's JSON format for the images in `img_dir`.

    Raises UserError if either path is missing, the file is not in that format, or it and the directory share
    no image.
    """
    img_dir, annotation_file = Path(img_dir), Path(annotation_file)
    if not img_dir.is_dir():
        raise UserError(f"the image directory {img_dir} does not exist; check the path.{COCO_STEPS}")
    if not annotation_file.is_file():
        raise UserError(f"the annotation file {annotation_file} does not exist; check the path.{COCO_STEPS}")
    coco = _index(annotation_file)

    present = {entry.name for entry in os.scandir(img_dir)}
    images, missing = [], []
    for image_id, annotations in coco.imgToAnns.items():
        captions = tuple(annotation["caption"] for annotation in annotations if annotation["caption"].strip())
        if not captions or image_id not in coco.imgs:
            continue
        file_name = coco.imgs[image_id]["file_name"]
        if file_name in present or ("/" in file_name and (img_dir / file_name).is_file()):
            images.append(CaptionedImage(image_id, str(img_dir / file_name), captions))
        else:
            missing.append(file_name)
    if not images and not missing:
        raise UserError(f"{annotation_file}: holds no captions; is it a captions file (captions_*.json)?")
    if not images:
        raise UserError(
            f"none of the {len(missing):,} images of {annotation_file} is in {img_dir} (e.g. {missing[0]}); "
            f"check that the two belong together.{COCO_STEPS}"
        )
    return CaptionSet(images, missing)


def _index(annotation_file: Path) -> COCO:
    """Load and check the JSON, then let pycocotools index it."""
    try:
        content = json.loads(annotation_file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{annotation_file}: is not valid JSON ({error}); is the download complete?") from None
    except OSError as error:
        raise UserError(f"{annotation_file}: cannot be read ({error.strerror})") from None
    required = {
        "images": {"id": (int, str), "file_name": str},
        "annotations": {"image_id": (int, str), "caption": str},
    }
    for section, keys in required.items():
        rows = content.get(section) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise UserError(f"{annotation_file}: has no list {section!r}; it should be in COCO's captions format")
        for number, row in enumerate(rows):
            for key, kind in keys.items():
                if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                    raise UserError(
                        f"{annotation_file}: entry {number} of {section!r} has no usable {key!r}; "
                        "it should be in COCO's captions format"
                    )
    for number, annotation in enumerate(content["annotations"]):
        annotation.setdefault("id", number)  # pycocotools wants one, captions do not need it
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco

"""Images and their captions, from the formats that captioned datasets come in."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools.coco import COCO

from dataloader.shards import Shards
from utils.errors import UserError
from utils.images import list_images

COCO_STEPS = """
To fetch MS-COCO (19 GB of images) into data/mscoco, where data_config.yaml expects it:
  mkdir -p data/mscoco
  wget http://images.cocodataset.org/zips/train2017.zip -O data/mscoco/train2017.zip
  unzip data/mscoco/train2017.zip -d data/mscoco
  wget http://images.cocodataset.org/annotations/annotations_trainval2017.zip -O data/mscoco/annotations.zip
  unzip data/mscoco/annotations.zip -d data/mscoco
To train without any download: python train.py --sample"""


class CaptionedImage(NamedTuple):
    """One image and every caption of it."""

    image_id: int | str
    path: str  # of its file, or SHARD.tar/KEY
    captions: tuple[str, ...]


class CaptionSet(NamedTuple):
    """The images that have captions and are there, and what was left out."""

    images: list[CaptionedImage]
    missing: list[str]  # file names that have captions and are not on disk
    unusable: list[str] = []  # rows without an image or a caption, as "FILE line 7"
    shards: Shards | None = None  # where the images are, in the same order, if not in files

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def num_captions(self) -> int:
        return sum(len(image.captions) for image in self.images)

    def take(self, numbers: Sequence[int]) -> "CaptionSet":
        """Return the images of these numbers alone."""
        shards = self.shards and Shards(self.shards.folder, self.shards.places[list(numbers)])
        return self._replace(images=[self.images[number] for number in numbers], shards=shards)

    def describe(self) -> str:
        """Return what was found and what was left out, in a line."""
        text = f"{self.num_images:,} images, {self.num_captions:,} captions"
        if self.missing:
            text += f"; {len(self.missing):,} more images are not on disk (e.g. {self.missing[0][:100]})"
        if self.unusable:
            text += f"; {len(self.unusable):,} entries are unusable (e.g. {self.unusable[0][:100]})"
        return text


def read_captions(
    img_dir: str | Path,
    annotation_file: str | Path | None = None,
    *,
    format: str = "auto",
    split: str = "train",
    csv_columns: tuple[str, str] = ("filepath", "title"),
) -> CaptionSet:
    """Read every image's captions. `data_config.yaml` lists the formats; `auto` tells them by the files.

    `split` chooses in a Karpathy file ("train" takes "restval" too); `csv_columns` name the image's and the
    caption's. File names are relative to `img_dir`, or absolute. Raises UserError if a path is missing, the file is
    not in the format, or it and the directory share no image.
    """
    img_dir = Path(img_dir)
    if not img_dir.is_dir():
        raise UserError(f"the image directory {img_dir} does not exist; check the path.{COCO_STEPS}")
    has_file = annotation_file is not None and Path(annotation_file).is_file()
    if format == "shards" or (format == "auto" and any(img_dir.glob("*.tar"))):
        return _read_shards(img_dir)
    if format == "folder" or (format == "auto" and not has_file and any(img_dir.rglob("*.txt"))):
        return _read_folder(img_dir)
    if annotation_file is None:
        raise UserError(
            f"{img_dir} has neither shards (*.tar) nor captions in .txt files beside its images; "
            "for captions in a file of their own set train_annotation_file"
        )
    if not has_file:
        raise UserError(f"the annotation file {annotation_file} does not exist; check the path.{COCO_STEPS}")
    unusable: list[str] = []
    records = _read_records(Path(annotation_file), format, split, csv_columns, unusable)
    return _locate(records, img_dir, Path(annotation_file), unusable)


Record = tuple[int | str, str, list[str]]  # image id, file name, captions


def _read_records(
    file: Path, format: str, split: str, csv_columns: tuple[str, str], unusable: list[str]
) -> Iterable[Record]:
    if format == "csv" or (format == "auto" and file.suffix.lower() in (".csv", ".tsv")):
        return _csv_records(file, csv_columns, unusable)
    content = _read_json(file)
    images = content.get("images") if isinstance(content, dict) else None
    is_karpathy = isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]
    if format == "karpathy" or (format == "auto" and is_karpathy):
        return _karpathy_records(file, content, split)
    return _coco_records(file, content, unusable)


def _locate(records: Iterable[Record], img_dir: Path, annotation_file: Path, unusable: list[str]) -> CaptionSet:
    """Keep the records that have captions and whose images are on disk."""
    present = {entry.name for entry in os.scandir(img_dir)}
    images, missing = [], []
    for image_id, file_name, captions in records:
        captions = tuple(_encodable(caption) for caption in captions if caption.strip())
        if not captions:
            continue
        if file_name in present or (os.sep in file_name and os.path.isfile(img_dir / file_name)):  # noqa: PTH113
            images.append(CaptionedImage(image_id, str(img_dir / file_name), captions))
        else:
            missing.append(file_name)
    if not images and not missing:
        what = f" that fit its images (e.g. {unusable[0][:100]})" if unusable else ""
        raise UserError(f"{annotation_file}: holds no captions{what}; is it a captions file (captions_*.json)?")
    if not images:
        raise UserError(
            f"none of the {len(missing):,} images of {annotation_file} is in {img_dir} (e.g. {missing[0][:100]}); "
            f"check that the two belong together.{COCO_STEPS}"
        )
    return CaptionSet(images, missing, unusable)


def _read_shards(folder: Path) -> CaptionSet:
    shards = Shards(folder)
    images = [CaptionedImage(*sample) for sample in shards.samples()]
    if not images:
        raise UserError(f"the shards in {folder} hold no image with a caption")
    return CaptionSet(images, [], shards.unusable, shards)


def _read_folder(folder: Path) -> CaptionSet:
    """Read `name.txt` beside each `name.jpg`, one caption a line, subfolders included."""
    images, missing = [], []
    for file in sorted(image for part in [folder, *folder.rglob("*/")] if part.is_dir() for image in list_images(part)):
        with contextlib.suppress(OSError):
            lines = map(_decode, file.with_suffix(".txt").read_bytes().splitlines())
            captions = tuple(line.strip() for line in lines if line.strip())
            if captions:
                images.append(CaptionedImage(str(file.relative_to(folder)), str(file), captions))
                continue
        missing.append(f"{file.stem}.txt")
    if not images:
        raise UserError(
            f"{folder} holds no image with its captions in a .txt file of the same name, and no .tar shards; "
            "for captions in a file of their own give --train_annotation_file"
        )
    return CaptionSet(images, missing)


def _csv_records(file: Path, columns: tuple[str, str], unusable: list[str]) -> Iterator[Record]:
    """Group the rows of one image, wherever they are; rows without an image or a caption go to `unusable`."""
    lines = map(_decode, file.read_bytes().replace(b"\0", b"").splitlines(keepends=True))
    header = next(lines, "")
    delimiter = "\t" if "\t" in header else ","
    names = next(csv.reader([header], delimiter=delimiter), [])
    for column in columns:
        if column not in names:
            raise UserError(
                f"{file}: has no column {column!r} (its columns: {', '.join(names)[:200] or 'none'}); set "
                "csv_image_column and csv_caption_column in data_config.yaml"
            )
    captions: dict[str, list[str]] = {}
    rows = csv.DictReader(lines, names, delimiter=delimiter)
    try:
        for row in rows:
            name, caption = ((row[column] or "").strip() for column in columns)
            if name and caption:
                captions.setdefault(name, []).append(caption)
            else:
                unusable.append(f"{file} line {rows.line_num + 1}")
    except csv.Error as error:
        raise UserError(f"{file} line {rows.line_num + 1}: is not CSV ({error}); mend that line") from None
    return ((name, name, own) for name, own in captions.items())


def _encodable(caption: str) -> str:
    """Return a caption without halves of characters, which JSON can write and no file can hold."""
    return caption if caption.isascii() else caption.encode("utf-8", errors="replace").decode("utf-8")


def _decode(line: bytes) -> str:
    """Decode a line that is UTF-8, as it should be, or Windows' Western encoding, as it often is."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")


def _karpathy_records(file: Path, content: Any, split: str) -> Iterator[Record]:
    splits = {"train", "restval"} if split == "train" else {split}
    try:
        for image in content["images"]:
            if image["split"] in splits:
                name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
                captions = [sentence["raw"] for sentence in image["sentences"]]
                if not all(isinstance(text, str) for text in (name, *captions)):
                    raise TypeError(f"a name or caption of {name!r} is no text")
                yield image.get("cocoid", name), name, captions
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is not in Karpathy's format ({type(error).__name__}: {error})") from None


def _coco_records(file: Path, content: Any, unusable: list[str]) -> Iterator[Record]:
    coco = _index(file, content)
    for image_id, annotations in coco.imgToAnns.items():
        captions = [annotation["caption"] for annotation in annotations]
        if image_id in coco.imgs:
            yield image_id, coco.imgs[image_id]["file_name"], captions
        else:
            unusable += [f"the caption of image_id {image_id!r}, which is no image's"] * len(captions)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not valid JSON ({error}); is the download complete?") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _index(annotation_file: Path, content: Any) -> COCO:
    """Check the JSON, then let pycocotools index it."""
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
        annotation["id"] = number  # pycocotools wants one, captions do not need it
    coco = COCO()
    coco.dataset = {section: content[section] for section in required}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
    return coco

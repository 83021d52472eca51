"""Find images and their captions in the formats that captioned data sets come in."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pycocotools.coco import COCO

from dataloader.config import CaptionSpec
from dataloader.storage.shards import Shards
from dataloader.token_table import PackedStrings
from utils.errors import UserError
from utils.images import ImageList, list_images

COCO_DIR = Path("data/mscoco")
COCO_STEPS = """
To download MS-COCO (19 GB of images) into data/mscoco, the default in data_config.yaml:
  mkdir -p data/mscoco
  wget http://images.cocodataset.org/zips/train2017.zip -O data/mscoco/train2017.zip
  unzip data/mscoco/train2017.zip -d data/mscoco
  wget http://images.cocodataset.org/annotations/annotations_trainval2017.zip -O data/mscoco/annotations.zip
  unzip data/mscoco/annotations.zip -d data/mscoco
To train without a download: python train.py --sample"""
COCO_SCHEMA = {
    "images": {"id": (int, str), "file_name": str},
    "annotations": {"image_id": (int, str), "caption": str},
}


class CaptionedImage(NamedTuple):
    """An image and all its captions."""

    image_id: int | str
    path: str  # of its file, or SHARD.tar/KEY; from a reader: as the annotation file names it
    captions: tuple[str, ...]


class CaptionSet(NamedTuple):
    """The captioned images that were found, and what was left out."""

    images: list[CaptionedImage]
    missing: list[str]  # names of captioned images that are not on disk
    unusable: list[str] = []  # entries without an image or a caption, e.g. "captions.csv line 7"
    shards: Shards | None = None  # the images in the same order, if they are in shards

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def num_captions(self) -> int:
        return sum(len(image.captions) for image in self.images)

    @property
    def files(self) -> ImageList | Shards:
        """The encoded images in order."""
        return self.shards or ImageList(PackedStrings(image.path for image in self.images))

    def take(self, numbers: Sequence[int]) -> "CaptionSet":
        """Return the set of the images at these positions."""
        shards = self.shards and self.shards.take(numbers)
        return self._replace(images=[self.images[number] for number in numbers], shards=shards)

    def describe(self) -> str:
        """Return a line with the number of images and captions, and what was left out."""
        text = f"{self.num_images:,} images, {self.num_captions:,} captions"
        if self.missing:
            text += f"; {len(self.missing):,} more images are not on disk (e.g. {self.missing[0][:100]})"
        if self.unusable:
            text += f"; {len(self.unusable):,} entries are unusable (e.g. {self.unusable[0][:100]})"
        return "; ".join([text, *(self.shards.notes if self.shards else [])])


def open_captions(spec: CaptionSpec) -> CaptionSet:
    """Find the images and captions of `spec`. Training, validation, evaluation and packing all use this function.

    What is missing or unusable is left out and listed. Raises UserError if a path does not exist, the file is not in
    the format, or no image has a caption.
    """
    if not Path(spec.img_dir).is_dir():
        raise UserError(f"{spec.flags.img_dir} {spec.img_dir} does not exist; check the path", _steps(spec.img_dir))
    annotations = Annotations(spec)
    format = _detect_format(annotations) if spec.format == "auto" else spec.format
    if format == "shards":
        shards = Shards.open(Path(spec.img_dir), cache_dir=spec.cache_dir)
        found = CaptionSet([CaptionedImage(*sample) for sample in shards.samples()], [], shards.unusable, shards)
    else:
        found = _find_images(READERS[format](annotations), spec)
    where = spec.img_dir if format in ("shards", "folder") else spec.annotation_file
    if not found.images and not found.missing:
        example = f" that fit its images (e.g. {found.unusable[0][:100]})" if found.unusable else ""
        raise UserError(f"{where}: holds no captions{example}; check that it is a captions file (captions_*.json)")
    if not found.images:
        raise UserError(
            f"none of the {len(found.missing):,} images of {where} is in {spec.flags.img_dir} {spec.img_dir} (e.g. "
            f"{found.missing[0][:100]}); check both paths",
            _steps(spec.img_dir),
        )
    return found


def read_captions(
    img_dir: str | Path,
    annotation_file: str | Path | None = None,
    *,
    format: str = "auto",
    split: str = "train",
    csv_columns: tuple[str, str] = ("filepath", "title"),
) -> CaptionSet:
    """Find images and captions with `open_captions`. `csv_columns`: of the image's file name and of the caption."""
    return open_captions(CaptionSpec(img_dir, annotation_file, format, *csv_columns, split))


class Annotations:
    """The annotation file of a spec, read on the first access and parsed once."""

    def __init__(self, spec: CaptionSpec) -> None:
        self.spec = spec
        self.file = None if spec.annotation_file is None else Path(spec.annotation_file)

    @cached_property
    def content(self) -> bytes:
        """The bytes of the file. Raises UserError if it cannot be read."""
        img_dir, flag = self.spec.img_dir, self.spec.flags.annotation_file
        if self.file is None:
            raise UserError(
                f"{img_dir} has neither shards (*.tar) nor captions in .txt files beside its images; for captions in "
                f"another file give {flag}"
            )
        try:
            return self.file.read_bytes()
        except OSError as error:
            steps = "" if self.file.exists() else _steps(self.file)
            raise UserError(f"{flag} {self.file} cannot be read ({error.strerror}); check the path", steps) from None

    @cached_property
    def json(self) -> Any:
        """The content of a JSON file. Raises UserError if it is not JSON."""
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.file}: is not valid JSON ({error}); complete the download, or set another "
                f"{self.spec.flags.prefix}format"
            ) from None


def coco_records(annotations: Annotations) -> Iterator[CaptionedImage | str]:
    """Yield the images of a COCO captions file. Raises UserError for any other file."""
    content = annotations.json
    for problem in _coco_problems(content):
        raise UserError(f"{annotations.file}: {problem}; it should be in COCO's captions format")
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number  # pycocotools needs unique ids
    coco = COCO()
    coco.dataset = {section: content[section] for section in COCO_SCHEMA}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    for image_id, rows in coco.imgToAnns.items():
        if image_id in coco.imgs:
            captions = tuple(row["caption"] for row in rows)
            yield CaptionedImage(image_id, coco.imgs[image_id]["file_name"], captions)
        else:
            yield from [f"the caption of image_id {image_id!r}, which no image has"] * len(rows)


def _coco_problems(content: Any) -> Iterator[str]:
    for section, keys in COCO_SCHEMA.items():
        rows = content.get(section) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            yield f"has no list {section!r}"
            continue
        for number, row in enumerate(rows):
            for key, kind in keys.items():
                if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                    yield f"entry {number} of {section!r} has no usable {key!r}"


def karpathy_records(annotations: Annotations) -> Iterator[CaptionedImage | str]:
    """Yield the images of one split of a Karpathy file (Karpathy & Fei-Fei 2015). Raises UserError for another file."""
    split = annotations.spec.split
    try:
        for image in annotations.json["images"]:
            if image["split"] in ({"train", "restval"} if split == "train" else {split}):
                name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
                captions = tuple(sentence["raw"] for sentence in image["sentences"])
                if not all(isinstance(text, str) for text in (name, *captions)):
                    raise TypeError(f"the name or a caption of {name!r} is not text")
                yield CaptionedImage(image.get("cocoid", name), name, captions)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{annotations.file}: is not in Karpathy's format ({problem})") from None


def csv_records(annotations: Annotations) -> Iterator[CaptionedImage | str]:
    """Yield the images of a table with one caption per row, comma- or tab-separated. Raises UserError."""
    file, spec = annotations.file, annotations.spec
    lines = map(_decode, annotations.content.replace(b"\0", b"").splitlines(keepends=True))
    header = next(lines, "")
    delimiter = "\t" if "\t" in header else ","
    names = next(csv.reader([header], delimiter=delimiter), [])
    columns, flag = (spec.csv_image_column, spec.csv_caption_column), f"{spec.flags.prefix}csv_image_column"
    for column in columns:
        if column not in names:
            raise UserError(
                f"{file}: has no column {column!r} (its columns: {', '.join(names)[:200] or 'none'}); set {flag} and "
                f"{flag.replace('image', 'caption')}"
            )
    captions: dict[str, list[str]] = {}  # the rows of an image may be anywhere in the file
    rows = csv.DictReader(lines, names, delimiter=delimiter)
    try:
        for row in rows:
            name, caption = ((row[column] or "").strip() for column in columns)
            if name and caption:
                captions.setdefault(name, []).append(caption)
            else:
                yield f"{file} line {rows.line_num + 1}"
    except csv.Error as error:
        raise UserError(f"{file} line {rows.line_num + 1}: is not CSV ({error}); correct that line") from None
    yield from (CaptionedImage(name, name, tuple(texts)) for name, texts in captions.items())


def folder_records(annotations: Annotations) -> Iterator[CaptionedImage | str]:
    """Yield the images of a folder and its subfolders, with the lines of the .txt file beside each one."""
    folder = Path(annotations.spec.img_dir)
    for file in list_images(folder, nested=True):
        name, lines = str(file.relative_to(folder)), []
        with contextlib.suppress(OSError):
            lines = file.with_suffix(".txt").read_bytes().splitlines()
        captions = tuple(_decode(line).strip() for line in lines if line.strip())
        yield CaptionedImage(name, name, captions) if captions else f"{name} without captions in {file.stem}.txt"


# By format: yields an image, or a description of an unusable entry. A new format also goes into config.FORMATS.
READERS: dict[str, Callable[[Annotations], Iterator[CaptionedImage | str]]] = {
    "coco": coco_records,
    "karpathy": karpathy_records,
    "csv": csv_records,
    "folder": folder_records,
}


def _detect_format(annotations: Annotations) -> str:
    """Return the format of a folder and annotation file. Raises UserError if there is none."""
    img_dir, file = Path(annotations.spec.img_dir), annotations.file
    if any(img_dir.glob("*.tar")):
        return "shards"
    if not (file and file.is_file()) and any(img_dir.rglob("*.txt")):
        return "folder"
    if file and file.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    images = annotations.json.get("images") if isinstance(annotations.json, dict) else None
    is_karpathy = isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]
    return "karpathy" if is_karpathy else "coco"


def _find_images(entries: Iterable[CaptionedImage | str], spec: CaptionSpec) -> CaptionSet:
    """Return the entries with captions, by whether their images are on disk, and the unusable ones."""
    img_dir = Path(spec.img_dir)
    present = {entry.name for entry in os.scandir(img_dir)}
    found = CaptionSet([], [], [])
    for entry in entries:
        if isinstance(entry, str):
            found.unusable.append(entry)
            continue
        name, captions = entry.path, tuple(_encodable(caption) for caption in entry.captions if caption.strip())
        is_nested = "/" in name or os.sep in name
        if captions and (name in present or (is_nested and os.path.isfile(img_dir / name))):  # noqa: PTH113 (NUL)
            found.images.append(CaptionedImage(entry.image_id, str(img_dir / name), captions))
        elif captions:
            found.missing.append(name)
    return found


def _steps(path: str | Path) -> str:
    """Return how to download COCO if `path` is one of its default paths."""
    return COCO_STEPS if COCO_DIR in Path(path).parents else ""


def _encodable(caption: str) -> str:
    """Return a caption without lone surrogates, which JSON may contain but UTF-8 cannot encode."""
    return caption if caption.isascii() else caption.encode("utf-8", errors="replace").decode("utf-8")


def _decode(line: bytes) -> str:
    """Decode a line as UTF-8, or as Windows-1252 if it is not valid UTF-8."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")

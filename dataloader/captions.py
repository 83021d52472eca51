"""Find images and their captions in the formats that captioned data sets come in."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dataloader.config import CaptionSpec
from dataloader.readers import (
    OTHER_SPLITS,
    READERS,
    Annotations,
    CaptionedImage,
    archive_problem,
    detect_format,
    download_steps,
)
from dataloader.storage.parquet import ParquetImages
from dataloader.storage.shards import Shards
from dataloader.tables import Notes
from dataloader.token_table import PackedStrings
from utils.errors import UserError
from utils.images import ImageList
from utils.text import one_line


class CaptionSet(NamedTuple):
    """The captioned images that were found, and what was left out."""

    images: list[CaptionedImage]
    missing: list[str]  # names of captioned images that are not on disk
    unusable: list[str] = []  # entries without an image or a caption, e.g. "captions.csv line 7"
    shards: Shards | ParquetImages | None = None  # the images in the same order, if they are packed
    notes: Notes = {}  # what was read in another way than it is written, and where

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def num_captions(self) -> int:
        return sum(len(image.captions) for image in self.images)

    @property
    def files(self) -> ImageList | Shards | ParquetImages:
        """The encoded images in order."""
        return self.shards or ImageList(PackedStrings(image.path for image in self.images))

    def take(self, numbers: Sequence[int]) -> "CaptionSet":
        """Return the set of the images at these positions."""
        shards = self.shards and self.shards.take(numbers)
        return self._replace(images=[self.images[number] for number in numbers], shards=shards)

    def describe(self) -> str:
        """Return a line with the number of images and captions, and what was left out or read in another way."""
        text = f"{self.num_images:,} images, {self.num_captions:,} captions"
        if self.missing:
            text += f"; {len(self.missing):,} more images are not on disk (e.g. {one_line(self.missing[0])[:100]})"
        if self.unusable:
            text += f"; {len(self.unusable):,} entries are unusable (e.g. {one_line(self.unusable[0])[:100]})"
        for note, examples in self.notes.items():
            text += f"; {len(examples):,} {note} (e.g. {one_line(examples[0])[:100]})"
        return "; ".join([text, *(self.shards.notes if self.shards else [])])


def open_captions(spec: CaptionSpec) -> CaptionSet:
    """Find the images and captions of `spec`. Training, validation, evaluation and packing all use this function.

    What is missing or unusable is left out and listed. Raises UserError if a path does not exist, the file is not in
    the format, or no image has a caption.
    """
    img_dir = Path(spec.img_dir)
    if not img_dir.is_dir():
        problem = archive_problem(img_dir) if img_dir.is_file() else "does not exist; check the path"
        problem = problem or "is a file; give the folder of the images"
        raise UserError(
            f"{spec.flags.img_dir} {img_dir} {problem}", "" if img_dir.exists() else download_steps(img_dir)
        )
    annotations = Annotations(spec)
    format = detect_format(annotations) if spec.format == "auto" else spec.format
    if format == "shards":
        shards = Shards.open(img_dir, cache_dir=spec.cache_dir)
        found = CaptionSet([CaptionedImage(*sample) for sample in shards.samples()], [], shards.unusable, shards)
    else:
        found = _find_images(READERS[format](annotations), annotations)
    where = img_dir if format in ("shards", "folder") else annotations.file
    if not found.images and not found.missing:
        if OTHER_SPLITS in found.notes:
            example = one_line(found.notes[OTHER_SPLITS][0])
            raise UserError(
                f"{where}: holds no captions of the split {spec.split} (e.g. {example}); give the file of that split, "
                "or one without splits"
            )
        example = f" that fit its images (e.g. {one_line(found.unusable[0])[:100]})" if found.unusable else ""
        raise UserError(f"{where}: holds no captions{example}; check that it is a captions file (captions_*.json)")
    if not found.images:
        name = found.missing[0]
        raise UserError(
            f"none of the {len(found.missing):,} images of {where} is in {spec.flags.img_dir} {img_dir} (e.g. "
            f"{one_line(name)[:100]}); {_find_elsewhere(name, annotations) or 'check both paths'}",
            download_steps(img_dir),
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


def _find_images(entries: Iterable[CaptionedImage | str], annotations: Annotations) -> CaptionSet:
    """Return the entries with captions, by whether their images are on disk, and the unusable ones."""
    img_dir, notes = Path(annotations.spec.img_dir), annotations.notes
    present = {entry.name for entry in os.scandir(img_dir)}

    def find(name: str) -> str | None:
        if annotations.images is not None:
            return name
        if name in present or (("/" in name or os.sep in name) and os.path.isfile(img_dir / name)):  # noqa: PTH113 (NUL)
            return str(img_dir / name)
        posix = name.replace("\\", "/")
        if posix != name and os.path.isfile(img_dir / posix):  # noqa: PTH113
            notes.setdefault("backslashes are read as folders", []).append(name)
            return str(img_dir / posix)
        return None

    found = CaptionSet([], [], [], None, notes)
    for entry in entries:
        if isinstance(entry, str):
            found.unusable.append(entry)
            continue
        captions = []
        for caption in entry.captions:
            if not caption.strip():
                found.unusable.append(f"a blank caption of {entry.path}")
                continue
            text = _encodable(caption)
            if text != caption:
                notes.setdefault("captions contain half a surrogate pair, read as ?", []).append(entry.path)
            captions.append(text)
        if not captions:
            continue
        if path := find(entry.path):
            found.images.append(CaptionedImage(entry.image_id, path, tuple(captions)))
        else:
            found.missing.append(entry.path)
    return found._replace(shards=annotations.images)


def _find_elsewhere(name: str, annotations: Annotations) -> str | None:
    """Return how to correct the names of images that are in another folder than the names say."""
    flag, img_dir = annotations.spec.flags.img_dir, Path(annotations.spec.img_dir)
    if "://" in name:
        return "these are web addresses: download the images with img2dataset first"
    parts = [part for part in re.split(r"[\\/]", name) if part]
    above = img_dir.resolve().parent
    if os.path.isfile(above / name):  # noqa: PTH113
        return f"they are in {above}: give {flag} {above}"
    for number in range(1, len(parts)):
        rest = "/".join(parts[number:])
        if os.path.isfile(img_dir / rest):  # noqa: PTH113
            return f"{rest} is in {img_dir}: remove {one_line(name[: -len(rest)])} from the names in the file"
    for file in img_dir.rglob("*") if parts else ():
        if file.name == parts[-1]:
            return f"{file.name} is in {file.parent}: give {flag} that folder"
        if parts[-1].casefold() in (file.name.casefold(), file.stem.casefold()):
            return f"there is {file}: write the names in the file as they are on the disk"
    return None


def _encodable(caption: str) -> str:
    """Return a caption without lone surrogates, which JSON may contain but UTF-8 cannot encode."""
    return caption if caption.isascii() else caption.encode("utf-8", errors="replace").decode("utf-8")

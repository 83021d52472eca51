"""Read annotation files: which format one has, and the captioned images that it names."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from pycocotools.coco import COCO

from dataloader.config import CaptionSpec
from dataloader.storage.parquet import ParquetImages, read_parquet, split_images
from dataloader.tables import (
    NUMBERED_NAME,
    Columns,
    Notes,
    Table,
    captions_in,
    decode,
    find_columns,
    is_image_name,
    split_lines,
)
from utils.errors import UserError
from utils.images import list_images
from utils.text import one_line

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

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of Hugging Face's image folders
OTHER_SPLITS = "entries are of other splits"
SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),  # restval: the rest of COCO's validation images
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
GZIP = b"\x1f\x8b"
SIGNATURES = {
    b"PK\x03\x04": "a zip archive or a workbook; unpack it (unzip {}), or save the workbook as CSV",
    b"BZh": "compressed with bzip2; unpack it: bunzip2 -k {}",
    b"\xfd7zXZ": "compressed with xz; unpack it: xz -dk {}",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; unpack it: zstd -d {}",
    b"<": "a web page or XML, not captions; download the file again",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; get the file: git lfs pull",
}


class CaptionedImage(NamedTuple):
    """An image and all its captions."""

    image_id: int | str
    path: str  # of its file, or SHARD.tar/KEY; from a reader: as the annotation file names it
    captions: tuple[str, ...]


class Annotations:
    """The annotation file of a spec, read on the first access and parsed once.

    `notes`: what its reader reads in another way than it is written. `images`: those in the file, or None.
    """

    def __init__(self, spec: CaptionSpec) -> None:
        self.spec = spec
        self.file = None if spec.annotation_file is None else Path(spec.annotation_file)
        self.notes: Notes = {}
        self.images: ParquetImages | None = None

    @property
    def is_default(self) -> bool:
        """Whether the file is not given, or is COCO's in data_config.yaml."""
        return self.file is None or COCO_DIR in self.file.parents

    @cached_property
    def content(self) -> bytes:
        """The bytes of the file, decompressed. Raises UserError if it cannot be read."""
        img_dir, flag = self.spec.img_dir, self.spec.flags.annotation_file
        if self.file is None:
            raise UserError(
                f"{img_dir} has neither shards (*.tar) nor captions in .txt files beside its images; for captions in "
                f"another file give {flag}"
            )
        try:
            content = self.file.read_bytes()
            if problem := archive_problem(self.file):
                raise UserError(f"{flag} {self.file} {problem}")
            return gzip.decompress(content) if content.startswith(GZIP) else content
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(
                f"{flag} {self.file} is a gzip file that is cut short or damaged; download it again"
            ) from None
        except OSError as error:
            steps = "" if self.file.exists() else download_steps(self.file)
            raise UserError(f"{flag} {self.file} cannot be read ({error.strerror}); check the path", steps) from None

    @cached_property
    def text(self) -> str:
        """The decoded content. Raises UserError if it is not Unicode text."""
        try:
            return decode(self.content)
        except ValueError as error:
            raise UserError(
                f"{self.file} {error}; if it is text, convert it: iconv -f WINDOWS-1252 -t UTF-8 {self.file} > NEW_FILE"
            ) from None

    @cached_property
    def json(self) -> Any:
        """The content of a JSON file, or the list of a JSON Lines file's. Raises UserError if it is neither."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem.startswith("Extra data"):
            lines = [line for line in self.text.split("\n") if line.strip()]
            try:
                return [json.loads(line) for line in lines]
            except (ValueError, RecursionError):
                problem = f"{problem}, nor JSON Lines"
        raise UserError(
            f"{self.file}: is not valid JSON ({problem}); complete the download, or set another "
            f"{self.spec.flags.prefix}format"
        )

    def is_other_split(self, value: object, where: str) -> bool:
        """Return whether an entry belongs to another split than the spec's, and count it."""
        split = SPLITS.get(str(value).strip().casefold())
        if split is None:
            raise UserError(
                f"{where}: its split is {one_line(repr(value))[:50]}, not train, restval, val or test; rename it"
            )
        if split != self.spec.split:
            self.notes.setdefault(OTHER_SPLITS, []).append(f"{where}: {value}")
        return split != self.spec.split

    def select(
        self, columns: Columns, rows: Iterable[tuple[int, Sequence[Any]]], unit: str
    ) -> Iterator[tuple[int, str, list[str]] | str]:
        """Yield the number, image name and captions of each row of the split, or where one of them is missing."""
        image, caption, split, folder = columns
        for number, row in rows:
            where = f"{self.file} {unit} {number}"
            if split is not None and self.is_other_split(row[split], where):
                continue
            name = row[image].strip().removeprefix("./") if isinstance(row[image], str) else ""
            if "#" in name and (numbered := NUMBERED_NAME.fullmatch(name)):
                name = numbered[1]
            if folder is not None and row[folder] and PurePath(row[folder]).name != name:
                name = f"{row[folder]}/{name}"
            captions = captions_in(row[caption])
            yield (number, name, captions) if name and any(map(str.strip, captions)) else where


def coco_records(annotations: Annotations) -> Iterator[CaptionedImage | str]:
    """Yield the images of a COCO captions file. Raises UserError for any other file."""
    content = annotations.json
    for problem in _coco_problems(content):
        raise UserError(
            f"{annotations.file}: {problem}; it should be in COCO's captions format, or a list of "
            '{"image": NAME, "caption": TEXT}'
        )
    names: dict[int | str, str] = {}
    for image in content["images"]:
        if names.setdefault(image["id"], image["file_name"]) != image["file_name"]:
            raise UserError(
                f"{annotations.file}: two images have the same id {one_line(repr(image['id']))} ("
                f"{one_line(names[image['id']])} and {one_line(image['file_name'])}), so their captions cannot be told "
                "apart; give each image an id of its own"
            )
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number  # pycocotools needs unique ids
    coco = COCO()
    coco.dataset = {section: content[section] for section in COCO_SCHEMA}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    for image_id, rows in coco.imgToAnns.items():
        if image_id in names:
            yield CaptionedImage(image_id, names[image_id], tuple(row["caption"] for row in rows))
        else:
            yield from [f"the caption of image_id {image_id!r}, which no image has"] * len(rows)
    yield from (f"{name} without captions" for image_id, name in names.items() if image_id not in coco.imgToAnns)


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
    try:
        for number, image in enumerate(annotations.json["images"]):
            if annotations.is_other_split(image["split"], f"{annotations.file} image {number}"):
                continue
            name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
            captions = tuple(sentence["raw"] for sentence in image["sentences"])
            if not all(isinstance(text, str) for text in (name, *captions)):
                raise TypeError(f"the name or a caption of {name!r} is not text")
            yield CaptionedImage(image.get("cocoid", name), name, captions) if captions else f"{name} without captions"
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{annotations.file}: is not in Karpathy's format ({problem})") from None


def csv_records(annotations: Annotations) -> Iterator[CaptionedImage | str]:
    """Yield the images of a table, one row or several for each. Raises UserError as `Table`."""
    table = Table(annotations.text, annotations.spec, annotations.notes)
    yield from _group(annotations.select(table.columns, table.rows(), "line"))


def json_records(annotations: Annotations) -> Iterator[CaptionedImage | str]:
    """Yield the images of a list of records or of JSON Lines: {"image": NAME, "caption": TEXT or [TEXT, ...]}.

    Also of one object {NAME: TEXT or [TEXT, ...], ...}. Raises UserError for any other file.
    """
    records = annotations.json
    if isinstance(records, dict) and all(map(is_image_name, records)):  # parsed again, since a name may be there twice
        pairs = json.loads(annotations.text, object_pairs_hook=list)
        records = [dict(zip(("image", "caption"), pair, strict=True)) for pair in pairs]
    records = records if isinstance(records, list) else [records]
    names = list({key: None for record in records if isinstance(record, dict) for key in record})
    columns = find_columns(names, annotations.spec, annotations.notes)
    rows = ([record.get(name) if isinstance(record, dict) else None for name in names] for record in records)
    yield from _group(annotations.select(columns, enumerate(rows, start=1), "entry"))


def parquet_records(annotations: Annotations) -> Iterator[CaptionedImage | str]:
    """Yield the images of a Parquet file with their paths, or with their bytes, in a column. Raises UserError."""
    table = read_parquet(annotations.file)
    columns = find_columns(table.column_names, annotations.spec, annotations.notes)
    images, paths = split_images(table.column(columns.image))
    needed = [paths, *(table.column(column).to_pylist() for column in columns[1:] if column is not None)]
    rows = enumerate(zip(*needed, strict=True), start=1)
    positions = iter(range(1, 4))
    columns = Columns(0, *(next(positions) if column is not None else None for column in columns[1:]))
    if images is None:
        yield from _group(annotations.select(columns, rows, "row"))
        return
    annotations.images = ParquetImages(annotations.file, images, [])
    rows = ((number, [row[0] or f"row {number}", *row[1:]]) for number, row in rows)
    for entry in annotations.select(columns, rows, "row"):
        if isinstance(entry, str):
            yield entry
        else:
            number, name, captions = entry
            annotations.images.rows.append(number - 1)
            yield CaptionedImage(name, f"{annotations.file} row {number}", tuple(captions))


def _group(entries: Iterable[tuple[int, str, list[str]] | str]) -> Iterator[CaptionedImage | str]:
    """Put the captions of each image together, in the order of the images' first rows."""
    captions: dict[str, list[str]] = {}
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            captions.setdefault(entry[1], []).extend(entry[2])
    yield from (CaptionedImage(name, name, tuple(texts)) for name, texts in captions.items())


def folder_records(annotations: Annotations) -> Iterator[CaptionedImage | str]:
    """Yield the images of a folder and its subfolders, with the lines of the .txt file beside each one."""
    folder = Path(annotations.spec.img_dir)
    for file in list_images(folder, nested=True):
        name = str(file.relative_to(folder))
        try:
            captions = tuple(split_lines(file.with_suffix(".txt").read_bytes()))
            yield CaptionedImage(name, name, captions) if captions else f"{name} without captions in {file.stem}.txt"
        except OSError:
            yield f"{name} without captions in {file.stem}.txt"
        except ValueError as error:
            yield f"{name}: {file.stem}.txt {error}"


# By format: yields an image, or a description of an unusable entry. A new format also goes into config.FORMATS.
READERS: dict[str, Callable[[Annotations], Iterator[CaptionedImage | str]]] = {
    "coco": coco_records,
    "karpathy": karpathy_records,
    "csv": csv_records,
    "json": json_records,
    "parquet": parquet_records,
    "folder": folder_records,
}


def detect_format(annotations: Annotations) -> str:
    """Return the format of a folder and annotation file by their contents. Raises UserError if there is none."""
    spec, img_dir = annotations.spec, Path(annotations.spec.img_dir)
    has_file = annotations.file is not None and annotations.file.is_file()
    if any(img_dir.glob("*.tar")):
        if has_file and not annotations.is_default:
            raise UserError(
                f"{img_dir} has shards (*.tar), and {spec.flags.annotation_file} {annotations.file} is given too; say "
                f"which to read with {spec.flags.prefix}format: shards, or the format of the file"
            )
        return "shards"
    if annotations.is_default and not has_file:
        metadata = [file for file in map(img_dir.joinpath, METADATA_FILES) if file.is_file()]
        if len(metadata) == 1:
            annotations.file = metadata[0]
            annotations.spec = spec._replace(annotation_file=metadata[0])
        elif any(img_dir.rglob("*.txt")):
            return "folder"
        elif compressed := next((file for file in sorted(img_dir.glob("*.tar.*")) if archive_problem(file)), None):
            raise UserError(f"{compressed} {archive_problem(compressed)}")
    if annotations.file is not None and annotations.file.is_file() and _head(annotations.file).startswith(b"PAR1"):
        return "parquet"
    if annotations.text.lstrip()[:1] not in ("{", "["):
        return "csv"
    content = annotations.json
    if isinstance(content, dict):
        images = content.get("images")
        if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
            return "karpathy"
        is_record = not {"images", "annotations"} & content.keys() and any(map(captions_in, content.values()))
        return "json" if is_record else "coco"
    return "json" if isinstance(content, list) and any(isinstance(record, dict) for record in content) else "coco"


def _head(file: Path) -> bytes:
    """Return the first bytes of a file. Raises OSError."""
    with file.open("rb") as opened:
        return opened.read(512)


def archive_problem(file: Path) -> str | None:
    """Say of a file that has to be unpacked or downloaded again what it is and how to do so. Raises OSError."""
    head = _head(file)
    if head.startswith(GZIP):
        with gzip.open(file) as opened:
            is_tar = opened.read(512)[257:262] == b"ustar"
        return f"is a compressed archive; unpack it: tar -xzf {file}" if is_tar else None
    if head[257:262] == b"ustar":
        return f"is an archive; unpack it (tar -xf {file}), or give the folder of such shards instead of it"
    return next(
        (f"is {what.format(file)}" for start, what in SIGNATURES.items() if head.lstrip().startswith(start)), None
    )


def download_steps(path: str | Path) -> str:
    """Return how to download COCO if `path` is one of its default paths."""
    return COCO_STEPS if COCO_DIR in Path(path).parents else ""

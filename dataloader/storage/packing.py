"""Pack captioned images once, as WebDataset shards or as one array of pixels, so that training reads them fast."""

import contextlib
import io
import json
import logging
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.lib.format import open_memmap
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataloader.captions import CaptionedImage, CaptionSet
from dataloader.storage.identity import checksum, fingerprint, relative_names, stamps
from dataloader.storage.shards import INDEX_FILE, MANIFEST_FILE, index_shards, write_index
from utils.errors import UserError
from utils.files import atomic_open, delete_unfinished, write_atomic
from utils.images import UnreadableImageError, load_image, plain_jpeg_size, read_pixels, resize_short_side
from utils.text import one_line

JPEG_QUALITY = 90
PIXELS_FILE, SOURCES_FILE, TOKENS_FILE, SIZES_FILE = "pixels.npy", "sources.npz", "tokens.npz", "sizes.json"
DERIVED = "|".join(map(re.escape, (PIXELS_FILE, INDEX_FILE, SIZES_FILE, TOKENS_FILE))) + r"|[0-9]{6}\.tar"
FINISHED = r"[0-9]{6}_unreadable\.json"  # marks a finished chunk
OWN_NAMES = f"{DERIVED}|{FINISHED}|{re.escape(MANIFEST_FILE)}|{re.escape(SOURCES_FILE)}"


class PackSpec(NamedTuple):
    """The content of a pack. A folder with any other content is refused."""

    form: str  # "shards" or "pixels"
    size: int  # pixels of the short side (shards), of both sides (pixels)
    images_per_chunk: int  # a chunk is one shard, or this number of rows of the pixel array
    num_images: int
    names: str  # fingerprint of the images' names, in order

    def numbers(self, chunk: int) -> range:
        """Return the positions of a chunk's images."""
        start = chunk * self.images_per_chunk
        return range(start, min(start + self.images_per_chunk, self.num_images))


class OtherPackError(UserError):
    """A folder contains a pack of other images; `reason` says what differs."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"{folder} contains a pack of other images than are there now, or of another size ({reason}); delete it, "
            "or choose another folder"
        )
        self.reason = reason


def make_spec(train_set: CaptionSet, form: str, size: int, images_per_chunk: int = 1000) -> PackSpec:
    """Describe the pack of these images. Raises UserError if they are in shards."""
    if train_set.shards:
        raise UserError(f"{train_set.shards.folder} holds packed images already; set dataloader.cache to none")
    names = fingerprint(relative_names([image.path for image in train_set.images]))
    return PackSpec(form, size, images_per_chunk, train_set.num_images, names)


def read_manifest(train_set: CaptionSet, folder: Path, spec: PackSpec, logger: logging.Logger) -> list[int] | None:
    """Return the positions of the unreadable images that a finished pack lacks, or None if it is not finished.

    An image belongs to the pack if its size and times are the recorded ones, or else if its checksum is. Raises
    OtherPackError if `folder` contains another pack or a damaged one, and UserError if it contains files of the same
    names that are no pack.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        others = sorted(file.name for file in folder.glob("*") if re.fullmatch(rf"{OWN_NAMES}|.*\.tar", file.name))
        if others:
            raise UserError(
                f"{folder} contains {one_line(others[0])} but no {MANIFEST_FILE}, so it may be something else than a "
                "pack; move the file away, or choose another folder"
            ) from None
        return None
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); choose another folder") from None
    except ValueError:
        manifest = {}
    if reason := _difference(manifest, train_set, folder, spec, logger):
        raise OtherPackError(folder, reason)
    return manifest["unreadable"]


def _difference(manifest: Any, train_set: CaptionSet, folder: Path, spec: PackSpec, logger: logging.Logger) -> str:
    """Return why a folder with this manifest is not, or not the beginning of, the pack of these images, or ""."""
    is_known = isinstance(manifest, dict) and manifest.keys() == {*spec._fields, "unreadable"}
    if not is_known or not isinstance(manifest["unreadable"], list | None):
        return f"its {MANIFEST_FILE} is damaged or of an earlier version"
    for key, value in spec._asdict().items():
        if manifest[key] != value:
            return "the images have other names" if key == "names" else f"{key} was {manifest[key]}, is {value}"
    paths, is_finished = [image.path for image in train_set.images], manifest["unreadable"] is not None
    image_stamps, file_stamps = stamps(paths), stamps(_files(folder, spec))
    try:
        with np.load(folder / SOURCES_FILE) as stored:
            sources = dict(stored)
        recorded = sources["image_stamps"]
        if len(times := np.flatnonzero((image_stamps != recorded).any(axis=1))):
            changed = np.flatnonzero(image_stamps[:, 0] != recorded[:, 0])  # in size
            if not len(changed) and not is_finished:
                changed = times  # there are no checksums yet
            elif not len(changed):
                logger.info(f"comparing {len(times):,} images, whose times have changed, with those of {folder}")
                changed = times[_map(checksum, [paths[number] for number in times]) != sources["image_crc"][times]]
            if len(changed):
                example = one_line(relative_names(paths)[changed[0]])
                return f"{len(changed):,} of {len(paths):,} images have changed, e.g. {example}"
        if is_finished and not np.array_equal(file_stamps, sources["file_stamps"]):
            logger.info(f"comparing {folder}, whose times have changed, with its checksums")
            if (_map(partial(_chunk_checksum, folder, spec), _chunks(spec)) != sources["chunk_crc"]).any():
                return "its own files have changed"
        elif not len(times):
            return ""
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        return f"its {SOURCES_FILE} or other files are damaged"
    with contextlib.suppress(OSError):
        _write_sources(folder, **sources | {"image_stamps": image_stamps, "file_stamps": file_stamps})
    return ""


def _write_sources(folder: Path, **arrays: np.ndarray) -> None:
    with atomic_open(folder / SOURCES_FILE) as file:
        np.savez(file, **arrays)


def _map(checksum_of: Callable[[Any], int], items: Sequence[Any]) -> np.ndarray:
    with ThreadPoolExecutor() as pool:
        return np.fromiter(pool.map(checksum_of, items), np.int64)


def pack(
    train_set: CaptionSet,
    folder: Path,
    spec: PackSpec,
    *,
    num_workers: int,
    logger: logging.Logger,
    replace: bool = False,
    flag: str = "--output",
) -> list[int]:
    """Write the pack in worker processes, with a progress bar, and return the positions of the unreadable images.

    An interrupted pack continues after its finished chunks and has the same bytes in the end. `replace`: write over
    the pack that is there. `flag`: the one that chooses `folder`, for messages. Raises UserError if `folder` has other
    content or cannot be written, or if no image is readable.
    """
    if not replace and (unreadable := read_manifest(train_set, folder, spec, logger)) is not None:
        return unreadable
    is_new = replace or not (folder / MANIFEST_FILE).exists()
    chunks = _chunks(spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        delete_unfinished(folder, OWN_NAMES)
        if is_new:  # in this order: a process that is killed here leaves the old pack, or the beginning of the new one
            _delete(folder, FINISHED)
            write_atomic(folder / MANIFEST_FILE, json.dumps({**spec._asdict(), "unreadable": None}).encode())
            _write_sources(folder, image_stamps=stamps([image.path for image in train_set.images]))
        todo = [chunk for chunk in chunks if not _finished_file(folder, chunk).is_file()]
        if len(todo) == len(chunks):
            _delete(folder, DERIVED)
            if spec.form == "pixels":
                shape = spec.num_images, spec.size, spec.size, 3
                open_memmap(folder / PIXELS_FILE, mode="w+", dtype=np.uint8, shape=shape).flush()
        problems = DataLoader(
            todo,
            batch_size=None,
            collate_fn=partial(_write_chunk, train_set.images, folder, spec),  # runs in the workers
            num_workers=min(num_workers, len(todo)),
            generator=torch.Generator(),  # leaves torch's default generator unchanged
        )
        with tqdm(desc=f"packing {spec.form}", total=spec.num_images, unit="image", disable=None) as bar:
            bar.update(sum(len(spec.numbers(chunk)) for chunk in chunks if chunk not in todo))
            for chunk, problem in zip(todo, problems, strict=True):
                if problem:
                    raise OSError(None, problem)
                bar.update(len(spec.numbers(chunk)))

        finished = [json.loads(_finished_file(folder, chunk).read_bytes()) for chunk in chunks]
        failures = [row for chunk in finished for row in chunk["unreadable"]]
        for number, reason in failures:
            logger.warning(f"left out {one_line(train_set.images[number].path)}: {reason}")
        unreadable = [number for number, _ in failures]
        if len(unreadable) == spec.num_images:
            raise UserError(f"no image of {spec.num_images:,} can be read; check them, and delete {folder}")
        if spec.form == "shards":
            write_index(folder / INDEX_FILE, index_shards(folder))
            counts = {}  # open_clip reads them too
            for numbers, name in ((spec.numbers(chunk), f"{chunk:06}.tar") for chunk in chunks):
                counts[name] = len(numbers) - sum(number in numbers for number in unreadable)
            write_atomic(folder / SIZES_FILE, json.dumps(counts, indent=1).encode())
        with np.load(folder / SOURCES_FILE) as begun:
            sources = {"image_stamps": begun["image_stamps"], "file_stamps": stamps(_files(folder, spec))}
        sources["image_crc"] = np.array([crc for chunk in finished for crc in chunk["image_crc"]])
        sources["chunk_crc"] = np.array([chunk["crc"] for chunk in finished])
        _write_sources(folder, **sources)
        write_atomic(folder / MANIFEST_FILE, json.dumps({**spec._asdict(), "unreadable": unreadable}).encode())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); choose another folder with {flag}, or correct that and "
            "run the same command again to continue"
        ) from None
    return unreadable


def shrink_jpeg(path: str, size: int) -> bytes:
    """Return an image file as an RGB JPEG with a short side of `size` pixels; such a JPEG keeps its bytes.

    Raises UnreadableImageError.
    """
    image = read_pixels(path, size)
    with contextlib.suppress(ValueError):
        data = Path(path).read_bytes()
        if min(plain_jpeg_size(data)) == size:
            return data
    pixels = np.ascontiguousarray(resize_short_side(image, size).permute(1, 2, 0))
    return simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="420")


def _write_chunk(images: Sequence[CaptionedImage], folder: Path, spec: PackSpec, chunk: int) -> str:
    """Write a chunk, then the list of its unreadable images. Returns why it cannot be written, or ""."""
    numbers, failures, checksums = spec.numbers(chunk), [], []

    def converted(convert: Callable[[str, int], Any]) -> Iterator[tuple[int, Any]]:
        for number in numbers:
            checksums.append(checksum(images[number].path))  # before it is read: a later change will differ
            try:
                yield number, convert(images[number].path, spec.size)
            except UnreadableImageError as error:
                failures.append((number, str(error)))

    try:
        if spec.form == "shards":
            write_atomic(folder / f"{chunk:06}.tar", _make_tar(images, converted(shrink_jpeg)))
        else:
            pixels = np.zeros((len(numbers), spec.size, spec.size, 3), dtype=np.uint8)
            for number, image in converted(load_image):
                pixels[number - numbers.start] = np.asarray(image)
            start = open_memmap(folder / PIXELS_FILE, mode="r").offset + numbers.start * pixels[0].nbytes
            with (folder / PIXELS_FILE).open("r+b") as file:  # not through the map, where a full disk is a SIGBUS
                file.seek(start)
                file.write(pixels)
                file.flush()
                os.fsync(file.fileno())
        content = {"unreadable": failures, "image_crc": checksums, "crc": _chunk_checksum(folder, spec, chunk)}
        write_atomic(_finished_file(folder, chunk), json.dumps(content).encode())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _make_tar(images: Sequence[CaptionedImage], jpegs: Iterable[tuple[int, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, jpeg in jpegs:
            image = images[number]
            record = {"captions": image.captions, "image_id": image.image_id, "file_name": Path(image.path).name}
            members = {"jpg": jpeg, "json": json.dumps(record).encode()}
            members["txt"] = image.captions[0].encode("utf-8", "replace")  # other tools read it
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _chunks(spec: PackSpec) -> range:
    return range(-(-spec.num_images // spec.images_per_chunk))


def _files(folder: Path, spec: PackSpec) -> list[Path]:
    """Return the files with a pack's images."""
    return [folder / (PIXELS_FILE if spec.form == "pixels" else f"{chunk:06}.tar") for chunk in _chunks(spec)]


def _chunk_checksum(folder: Path, spec: PackSpec, chunk: int) -> int:
    """Return the CRC-32 of a chunk. Raises OSError and ValueError."""
    if spec.form == "shards":
        return checksum(folder / f"{chunk:06}.tar")
    numbers = spec.numbers(chunk)
    return zlib.crc32(np.load(folder / PIXELS_FILE, mmap_mode="r")[numbers.start : numbers.stop])


def _finished_file(folder: Path, chunk: int) -> Path:
    """Return the file with a chunk's unreadable images and checksums, which marks the chunk as finished."""
    return folder / f"{chunk:06}_unreadable.json"


def _delete(folder: Path, names: str) -> None:
    """Delete the files whose names match the regular expression. Raises OSError."""
    for file in folder.iterdir():
        if re.fullmatch(names, file.name):
            file.unlink()

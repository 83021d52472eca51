"""Pack captioned images once, as WebDataset shards or as one array of pixels, so that training reads them fast."""

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from dataloader.storage.shards import MANIFEST_FILE, index_shards, write_index
from utils.errors import UserError
from utils.files import delete_unfinished, write_atomic
from utils.images import UnreadableImageError, load_image, plain_jpeg_size, read_pixels, resize_short_side
from utils.text import one_line

JPEG_QUALITY = 90
PIXELS_FILE = "pixels.npy"


class PackSpec(NamedTuple):
    """The content of a pack. A folder with any other content is refused."""

    form: str  # "shards" or "pixels"
    size: int  # pixels of the short side (shards), of both sides (pixels)
    images_per_chunk: int  # a chunk is one shard, or this number of rows of the pixel array
    num_images: int
    fingerprint: str  # of the images' names and sizes

    def numbers(self, chunk: int) -> range:
        """Return the positions of a chunk's images."""
        start = chunk * self.images_per_chunk
        return range(start, min(start + self.images_per_chunk, self.num_images))


def make_spec(train_set: CaptionSet, form: str, size: int, images_per_chunk: int = 1000) -> PackSpec:
    """Describe the pack of these images. The fingerprint covers their names and sizes in bytes, in order.

    Raises UserError if the images are in shards.
    """
    if train_set.shards:
        raise UserError(f"{train_set.shards.folder} contains shards, which are packed images already; use it as it is")
    digest = hashlib.sha256()
    for image in train_set.images:
        digest.update(f"{Path(image.path).name}\0{Path(image.path).stat().st_size}\0".encode("utf-8", "surrogatepass"))
    return PackSpec(form, size, images_per_chunk, train_set.num_images, digest.hexdigest())


def read_manifest(folder: Path, spec: PackSpec) -> list[int] | None:
    """Return the positions of the unreadable images that a finished pack lacks, or None if it is not finished.

    Raises UserError if `folder` has other content than `spec`.
    """
    manifest = None
    with contextlib.suppress(OSError, ValueError):
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    if manifest is None and not any(folder.glob("*.tar")) and not (folder / PIXELS_FILE).exists():
        return None
    if not isinstance(manifest, dict) or {key: manifest.get(key) for key in spec._fields} != spec._asdict():
        raise UserError(
            f"{folder} contains a pack of other images than are there now, or of another size; delete it, or choose "
            "another folder"
        )
    return manifest.get("unreadable")


def pack(train_set: CaptionSet, folder: Path, spec: PackSpec, *, num_workers: int, logger: logging.Logger) -> list[int]:
    """Write the pack in worker processes, with a progress bar, and return the positions of the unreadable images.

    An interrupted pack continues after its finished chunks and has the same bytes in the end. Raises UserError if
    `folder` has other content or cannot be written, or if no image is readable.
    """
    read_manifest(folder, spec)
    chunks = range(-(-spec.num_images // spec.images_per_chunk))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        delete_unfinished(folder)
        write_atomic(folder / MANIFEST_FILE, json.dumps(spec._asdict()).encode())
        todo = [chunk for chunk in chunks if not _failures_file(folder, chunk).is_file()]
        if spec.form == "pixels" and len(todo) == len(chunks):
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

        failures = [row for chunk in chunks for row in json.loads(_failures_file(folder, chunk).read_bytes())]
        for number, reason in failures:
            logger.warning(f"left out {one_line(train_set.images[number].path)}: {reason}")
        unreadable = [number for number, _ in failures]
        if len(unreadable) == spec.num_images:
            raise UserError(f"no image of {spec.num_images:,} can be read; check them, and delete {folder}")
        if spec.form == "shards":
            write_index(folder, index_shards(folder))
            counts = {}  # open_clip reads them too
            for numbers, name in ((spec.numbers(chunk), f"{chunk:06}.tar") for chunk in chunks):
                counts[name] = len(numbers) - sum(number in numbers for number in unreadable)
            write_atomic(folder / "sizes.json", json.dumps(counts, indent=1).encode())
        write_atomic(folder / MANIFEST_FILE, json.dumps({**spec._asdict(), "unreadable": unreadable}).encode())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); choose another folder, or correct that and run the same "
            "command again to continue"
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
    numbers, failures = spec.numbers(chunk), []

    def converted(convert: Callable[[str, int], Any]) -> Iterator[tuple[int, Any]]:
        for number in numbers:
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
        write_atomic(_failures_file(folder, chunk), json.dumps(failures).encode())
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


def _failures_file(folder: Path, chunk: int) -> Path:
    """Return the file with a chunk's unreadable images, which marks the chunk as finished."""
    return folder / f"{chunk:06}_unreadable.json"

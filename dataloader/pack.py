"""Pack a captioned dataset once, so that training reads it fast.

python -m dataloader.pack --img_dir DIR --annotation_file FILE --output DIR                 WebDataset shards
python -m dataloader.pack --img_dir DIR --annotation_file FILE --output DIR --form pixels --size 224
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.lib.format import open_memmap
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataloader.captions import CaptionedImage, CaptionSet, read_captions
from dataloader.shards import MANIFEST_FILE, index_shards, write_index
from utils.errors import UserError, run_script
from utils.files import UNFINISHED, delete_unfinished, write_whole
from utils.images import UnreadableImageError, load_image, plain_jpeg_size, read_pixels, resize_short_side

JPEG_QUALITY = 90
PIXELS_FILE = "pixels.npy"


class PackSpec(NamedTuple):
    """What a pack holds: it is refused for anything else."""

    form: str  # "shards" or "pixels"
    size: int  # shards: short side; pixels: both sides
    images_per_chunk: int  # a chunk is a shard, or as many rows of pixels
    num_images: int
    fingerprint: str  # of the images that it was made from

    def numbers(self, chunk: int) -> range:
        """Return the numbers of a chunk's images."""
        start = chunk * self.images_per_chunk
        return range(start, min(start + self.images_per_chunk, self.num_images))


def make_spec(train_set: CaptionSet, form: str, size: int, images_per_chunk: int = 1000) -> PackSpec:
    """Describe the pack of these images. The fingerprint is of their names and sizes in bytes, in order."""
    digest = hashlib.sha256()
    for image in train_set.images:
        digest.update(f"{Path(image.path).name}\0{Path(image.path).stat().st_size}\0".encode("utf-8", "surrogatepass"))
    return PackSpec(form, size, images_per_chunk, len(train_set.images), digest.hexdigest())


def pack(train_set: CaptionSet, output: Path, spec: PackSpec, *, num_workers: int, tell: Callable[[str], None]) -> None:
    """Write the pack into `output`, in worker processes, with a progress bar.

    Chunks that an earlier, interrupted call finished are kept; the result is the same byte for byte. Each chunk is
    read back before it counts. Raises UserError if `output` holds another pack or cannot be written.
    """
    chunks = -(-spec.num_images // spec.images_per_chunk)
    try:
        output.mkdir(parents=True, exist_ok=True)
        delete_unfinished(output)
        finished = {chunk: read_stats(output, chunk) for chunk in range(chunks)}
        if spec.form == "pixels" and not any(finished.values()):
            part = output / f"{PIXELS_FILE}{UNFINISHED}{os.getpid()}"
            open_memmap(part, mode="w+", dtype=np.uint8, shape=(spec.num_images, spec.size, spec.size, 3)).flush()
            part.replace(output / PIXELS_FILE)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another folder") from None
    for chunk, stats in finished.items():
        if stats is not None and stats["spec"] != spec._asdict():
            raise UserError(
                f"{output} holds part of another pack ({chunk_name(chunk)}_stats.json); delete it, or choose another"
            )
    writer = ChunkWriter(train_set.images, output, spec, [chunk for chunk, stats in finished.items() if stats is None])
    generator = torch.Generator()  # not torch's own: a run that builds its cache goes on as one that finds it
    loader = DataLoader(writer, batch_size=None, num_workers=min(num_workers, len(writer)), generator=generator)
    bar = tqdm(total=spec.num_images, desc=f"packing {spec.form}", unit="image", disable=None)
    for chunk, problem in loader:
        if problem:
            raise UserError(f"{output}: {problem}; free the disk or mend it, and run the same again: it goes on there")
        finished[chunk] = read_stats(output, chunk)
        bar.update(len(spec.numbers(chunk)))
    bar.close()

    unreadable = [row for chunk in range(chunks) for row in finished[chunk]["unreadable"]]
    for number, reason in unreadable:
        tell(f"left out {train_set.images[number].path}: {reason}")
    if len(unreadable) == spec.num_images:
        raise UserError(f"no image of {spec.num_images:,} can be read; check them, and delete {output}")
    if spec.form == "shards":
        write_index(output, index_shards(output))
        counts = {f"{chunk_name(chunk)}.tar": finished[chunk]["num_samples"] for chunk in range(chunks)}
        write_whole(output / "sizes.json", json.dumps(counts, indent=1).encode())  # open_clip reads it too
    manifest = {**spec._asdict(), "unreadable": [number for number, _ in unreadable]}
    write_whole(output / MANIFEST_FILE, json.dumps(manifest).encode())


class ChunkWriter(Dataset):
    """Writes the chunks that are still to do, one an item: returns its number, and what went wrong, or ""."""

    def __init__(self, images: Sequence[CaptionedImage], output: Path, spec: PackSpec, todo: Sequence[int]) -> None:
        self.images = images
        self.output = output
        self.spec = spec
        self.todo = todo

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, item: int) -> tuple[int, str]:
        chunk = self.todo[item]
        numbers = self.spec.numbers(chunk)
        write = self._write_shard if self.spec.form == "shards" else self._write_pixels
        unreadable: list[tuple[int, str]] = []
        try:
            write(chunk, numbers, unreadable)
            stats = {
                "spec": self.spec._asdict(),
                "num_samples": len(numbers) - len(unreadable),
                "unreadable": unreadable,
            }
            write_whole(stats_file(self.output, chunk), json.dumps(stats).encode())
        except OSError as error:
            return chunk, f"{chunk_name(chunk)} cannot be written ({error.strerror or error})"
        return chunk, ""

    def _write_shard(self, chunk: int, numbers: range, unreadable: list[tuple[int, str]]) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers:
                image = self.images[number]
                try:
                    jpeg = shrink_jpeg(image.path, self.spec.size)
                except UnreadableImageError as error:
                    unreadable.append((number, str(error)))
                    continue
                record = {"captions": image.captions, "image_id": image.image_id, "file_name": Path(image.path).name}
                members = {"jpg": jpeg, "json": json.dumps(record).encode()}
                members["txt"] = image.captions[0].encode("utf-8", "replace")  # what other tools read
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{number:09}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        shard = self.output / f"{chunk_name(chunk)}.tar"
        write_whole(shard, buffer.getvalue())
        if shard.read_bytes() != buffer.getvalue():
            raise OSError("what was written does not read back")

    def _write_pixels(self, chunk: int, numbers: range, unreadable: list[tuple[int, str]]) -> None:
        pixels = np.zeros((len(numbers), self.spec.size, self.spec.size, 3), dtype=np.uint8)
        for row, number in enumerate(numbers):
            try:
                pixels[row] = np.asarray(load_image(self.images[number].path, self.spec.size))
            except UnreadableImageError as error:
                unreadable.append((number, str(error)))
        stored = open_memmap(self.output / PIXELS_FILE, mode="r+")
        stored[numbers.start : numbers.stop] = pixels
        stored.flush()
        if not np.array_equal(stored[numbers.start : numbers.stop], pixels):
            raise OSError("what was written does not read back")


def shrink_jpeg(path: str, size: int) -> bytes:
    """Return an image file as an RGB JPEG with its short side at `size`: its own bytes if it is one already.

    Raises UnreadableImageError.
    """
    image = read_pixels(path, size)
    with contextlib.suppress(ValueError):
        data = Path(path).read_bytes()
        if min(plain_jpeg_size(data)) == size:
            return data
    pixels = np.ascontiguousarray(resize_short_side(image, size).permute(1, 2, 0))
    return simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="420")


def read_manifest(folder: Path, spec: PackSpec) -> dict[str, Any] | None:
    """Return what a finished pack tells of itself, None where there is none. Raises UserError if not of `spec`."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / MANIFEST_FILE}: cannot be read ({error}); delete the folder, and pack again"
        ) from None
    if not isinstance(manifest, dict) or {key: manifest.get(key) for key in spec._fields} != spec._asdict():
        raise UserError(
            f"{folder} was packed from other images than are there now, or to another size; delete it, or choose "
            "another folder"
        )
    return manifest


def chunk_name(chunk: int) -> str:
    """Return the name of a chunk: of its shard, and of its statistics."""
    return f"{chunk:06}"


def stats_file(output: Path, chunk: int) -> Path:
    """Return the file whose presence says that a chunk is complete."""
    return output / f"{chunk_name(chunk)}_stats.json"


def read_stats(output: Path, chunk: int) -> dict[str, Any] | None:
    """Return what is known of a finished chunk, None of any other."""
    try:
        return json.loads(stats_file(output, chunk).read_bytes())
    except (OSError, ValueError):
        return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img_dir", required=True, metavar="DIR")
    parser.add_argument("--annotation_file", metavar="FILE", help="none for a folder of name.jpg and name.txt")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--form", choices=("shards", "pixels"), default="shards")
    parser.add_argument("--size", type=int, default=256, help="pixels: of the short side (shards), of both (pixels)")
    parser.add_argument("--images_per_shard", type=int, default=1000, metavar="N")
    parser.add_argument("--format", default="auto", help="of the captions, as in data_config.yaml")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args(argv)
    if min(args.size, args.images_per_shard) < 1:
        parser.error("--size and --images_per_shard should be at least 1")
    train_set = read_captions(args.img_dir, args.annotation_file, format=args.format)
    spec = make_spec(train_set, args.form, args.size, args.images_per_shard)
    if read_manifest(args.output, spec):
        print(f"{args.output} is packed already")
        return
    pack(train_set, args.output, spec, num_workers=args.num_workers, tell=print)
    num_bytes = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"packed {len(train_set.images):,} images into {args.output}: {num_bytes / 2**20:,.1f} MiB")


if __name__ == "__main__":
    run_script(main)

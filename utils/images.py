"""Decode image files to upright RGB, and turn the pixels into the model's input."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from utils.errors import UserError
from utils.text import one_line

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_open` refuses such images
NOT_RASTER = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow runs Ghostscript for EPS and decodes no other
MAX_ASPECT = 8  # ratio of sides; longer images are cropped to it before they are resized
ORIENTATION_TAG = 0x0112  # Exif
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
START_OF_SCAN = b"\xff\xda"  # the JPEG marker that ends the header
BITS_PER_SAMPLE, PHOTOMETRIC, COLOR_MAP = 258, 262, 320  # TIFF
OTHER_KINDS = {  # of files that Pillow does not decode, by what is in their first bytes
    b"ftyphei": "a HEIC picture",
    b"ftypmif": "a HEIF picture",
    b"ftypavi": "an AVIF picture",
    b"jxl ": "a JPEG XL picture",
    b"<svg": "an SVG drawing",
    b"<html": "an HTML page",
    b"<!doctype html": "an HTML page",
    b"%pdf": "a PDF document",
    b"%!ps": "a PostScript document",
    b"git-lfs": "a pointer of Git LFS: git lfs pull fetches the file",
}

ImageLike = str | Path | io.BytesIO | Image.Image


class UnreadableImageError(Exception):
    """An image that cannot be decoded. The message gives the reason in a few words."""


class ImageList(Sequence[ImageLike]):
    """Image files and pictures with names for messages."""

    def __init__(self, images: Sequence[ImageLike]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageLike:
        return self.images[index]

    def name(self, index: int) -> str:
        """Return the path of a file, or "image 3" for a picture in memory."""
        image = self.images[index]
        return str(image) if isinstance(image, str | Path) else f"image {index}"


def load_image(
    source: ImageLike, size: int, *, resample: Image.Resampling = Image.Resampling.BICUBIC, is_squashed: bool = False
) -> Image.Image:
    """Return the image as upright RGB: short side resized to `size` pixels, then the central square.

    Equals torchvision's `Resize` and `CenterCrop` on the decoded file bit for bit. `is_squashed` resizes both sides to
    `size` instead. Raises UnreadableImageError.
    """
    with _unreadable():
        image, turn = _open(source)
        image = _to_rgb(image)
    if max(image.size) > MAX_ASPECT * min(image.size):
        top, left, height, width = _central_part(image.height, image.width)
        image = image.crop((left, top, left + width, top + height))
    image = image.resize((size, size) if is_squashed else _scaled(*image.size, size), resample)
    image = image if turn is None else image.transpose(turn)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def read_pixels(source: str | Path | io.BytesIO, at_least: int, buffer: np.ndarray | None = None) -> Tensor:
    """Return an image file, or the bytes of one, as upright RGB, uint8 [3, height, width].

    `at_least`: the pixels that the short side needs. If it has eight times as many, a JPEG is decoded at a fraction of
    its size, and the result has twice `at_least`. `buffer`, uint8 [num_bytes]: memory for the result, valid until
    the next call; reused memory is faster. Raises UnreadableImageError.
    """
    with contextlib.suppress(OSError, ValueError):  # Pillow decodes every other file, or gives the reason why not
        _check_regular(source)
        data = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
        height, width, turn = _read_jpeg_header(data)
        if min(height, width) < 8 * at_least:
            fits = buffer is not None and height * width * 3 <= buffer.size
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer if fits else None)
            if turn is not None:
                return to_tensor(Image.fromarray(pixels).transpose(turn))
            return torch.from_numpy(pixels).permute(2, 0, 1)
    with _unreadable():
        image, turn = _open(source)
        width, height = image.size
        is_large = min(width, height) >= 8 * at_least
        if is_large:
            image.draft(None, (2 * at_least, 2 * at_least))
        image = _to_rgb(image)
        if is_large:  # a draft's size is rounded up: leave out its last row and column where they are partly empty
            fraction = max(1, round(width / image.width))
            extent = (0, 0, min(width / fraction, image.width), min(height / fraction, image.height))
            image = image.resize(_scaled(width, height, 2 * at_least), Image.Resampling.BICUBIC, box=extent)
        return to_tensor(image if turn is None else image.transpose(turn))


def plain_jpeg_size(data: bytes) -> tuple[int, int]:
    """Return the height and width of an upright YCbCr JPEG of a safe size. Raises ValueError for any other file."""
    height, width, turn = _read_jpeg_header(data)
    if turn is not None:
        raise ValueError("not upright")
    return height, width


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Resize uint8 [3, height, width] to `size` on its short side: bicubic, within one grey level of Pillow's."""
    top, left, height, width = _central_part(*image.shape[1:])
    image = image[:, top : top + height, left : left + width]
    width, height = _scaled(width, height, size)
    if (height, width) == image.shape[1:]:
        return image
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # torch sees channels_last strides: faster
    return F.interpolate(batch, (height, width), mode="bicubic", antialias=True)[0]


def crop_center(image: Tensor, size: int) -> Tensor:
    """Return the central square [3, size, size] of [3, height, width]."""
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def resize_and_crop(image: Tensor, size: int) -> Tensor:
    """Apply `load_image`'s resize and crop to uint8 [3, height, width], within one grey level."""
    return crop_center(resize_short_side(image, size), size)


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB picture as uint8 [3, height, width]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Return (images / 255 - mean) / std as float32, channels_last, on the device of `images`.

    `images`: [batch, 3, height, width] in 0..255; `mean` and `std`: of RGB in [0, 1].
    """
    mean, std = (torch.as_tensor(values, device=images.device).view(1, 3, 1, 1) * 255 for values in (mean, std))
    return (images.contiguous(memory_format=torch.channels_last).float() - mean).div_(std)


def find_images(folder: Path) -> list[Path]:
    """Return `list_images` of a folder that the user named. Raises UserError if it is missing or has no image."""
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist; check the path")
    images = list_images(folder)
    if not images:
        raise UserError(f"the image folder {folder} contains no image ({', '.join(sorted(image_suffixes()))})")
    return images


def list_images(folder: Path, *, nested: bool = False) -> list[Path]:
    """Return the files of a folder, if `nested` of its subfolders too, that have an image's suffix, sorted.

    macOS's leftovers, `__MACOSX` and `._NAME`, are not among them.
    """
    files = (file for file in (folder.rglob("*") if nested else folder.iterdir()) if not file.name.startswith("._"))
    files = (file for file in files if file.suffix.lower() in image_suffixes() and file.is_file())
    return sorted(file for file in files if "__MACOSX" not in file.relative_to(folder).parts)


def describe_left_out(folder: Path, images: Collection[Path], *, nested: bool = False) -> list[str]:
    """Return a line for each reason why entries of a folder, if `nested` of its subfolders too, are not in `images`."""
    left_out: dict[str, list[Path]] = {}
    for entry in sorted({*(folder.rglob("*") if nested else folder.iterdir())} - {*images}):
        if reason := _why_left_out(entry, nested):
            left_out.setdefault(reason, []).append(entry.relative_to(folder))
    return [f"left out: {len(entries):,} {reason} (e.g. {entries[0]})" for reason, entries in left_out.items()]


def _why_left_out(entry: Path, nested: bool) -> str | None:
    """Return what an entry is that was left out, in the plural; None for a folder whose entries are looked at."""
    if entry.is_dir():
        return "links to folders" if nested and entry.is_symlink() else None if nested else "folders"
    if entry.name.startswith("._") or entry.name == ".DS_Store" or "__MACOSX" in entry.parts:
        return "leftovers of macOS"
    if not entry.is_file():
        return "broken links" if entry.is_symlink() and not entry.exists() else "pipes or devices"
    is_image = entry.suffix.lower() in image_suffixes()
    return "images outside of the folders that are read" if is_image else "files that are not images by their suffix"


@lru_cache(maxsize=1)
def raster_formats() -> list[str]:
    """Return the names of the raster formats that the installed Pillow decodes itself."""
    Image.init()
    return [name for name in Image.OPEN if name not in NOT_RASTER]


@lru_cache(maxsize=1)
def image_suffixes() -> set[str]:
    """Return the suffixes of these formats, in lower case: .jpg, .jfif, .png, .avif, ..."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in raster_formats()}


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """Raise UnreadableImageError for any exception: on a damaged file, Pillow's plugins raise many kinds."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        raise UnreadableImageError(reason) from None


def _check_regular(source: ImageLike) -> None:
    """Raise ValueError for the path of a pipe or a device, which would block or never end."""
    if isinstance(source, str | Path) and not stat.S_ISREG(os.stat(source).st_mode):  # noqa: PTH116 (a str, often)
        raise ValueError("not a regular file")


def _open(source: ImageLike) -> tuple[Image.Image, Image.Transpose | None]:
    """Open an image, not decoded yet, and return it with the transpose that turns it upright.

    Raises ValueError for a decompression bomb, a pipe or a device, and 16-bit colors that use few of their bits.
    """
    _check_regular(source)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=raster_formats())
    except UnidentifiedImageError:
        raise ValueError(f"cannot identify it as an image: {_describe_content(source)}") from None
    if image is not source and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    if image.mode.startswith("RGB") and ";16" in str(getattr(image, "tile", "")):  # Pillow keeps 8 of the 16 bits
        brightest = max(high for _, high in image.getextrema()[:3])
        if 0 < brightest < 16:
            raise ValueError("its 16-bit colors are below 4,096, so 4 bits are left of them; save it with 8 bits")
    return image, ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG))


def _describe_content(source: str | Path | io.BytesIO) -> str:
    """Return what a file is that Pillow cannot identify."""
    data = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
    found = (kind for mark, kind in OTHER_KINDS.items() if mark in data[:512].lower())
    return f"it is {kind}" if (kind := next(found, None)) else f"it begins with {data[:8]!r}" if data else "it is empty"


def _read_jpeg_header(data: bytes) -> tuple[int, int, Image.Transpose | None]:
    """Return height, width and `_open`'s transpose of a YCbCr JPEG, whose pixels simplejpeg and Pillow decode alike.

    Raises ValueError for any other file.
    """
    height, width, mode, _ = simplejpeg.decode_jpeg_header(data)
    if mode != "YCbCr" or height * width > Image.MAX_IMAGE_PIXELS:
        raise ValueError("not a YCbCr JPEG of a safe size")
    end = 2
    while data[end : end + 1] == b"\xff" and data[end : end + 2] != START_OF_SCAN:
        end += 2 + int.from_bytes(data[end + 2 : end + 4], "big")
    if data[end : end + 2] != START_OF_SCAN:
        raise ValueError("its segments cannot be followed")
    header = data[:end]
    may_be_turned = b"Exif\0\0" in header or b"tiff:Orientation" in header  # asking Pillow takes ten times as long
    return height, width, _open(io.BytesIO(data))[1] if may_be_turned else None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode to 8-bit RGB, with white where the image is transparent."""
    color_map = getattr(image, "tag_v2", {}).get(COLOR_MAP, ())
    if image.mode == "P" and 0 < max(color_map, default=0) < 256:  # 8 bits, where TIFF has 16
        image.putpalette(bytes(color_map), "RGB;L")
    transparency = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _to_grey(image)
        if transparency is not None:
            grey[np.asarray(image) == transparency] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> np.ndarray:
    """Scale grey values of more than 8 bits, or floating-point ones, to uint8 [height, width].

    Black is 0 and white the end of the smallest range that holds all values: of 8, 10, 12, 14 or 16 bits; 1 or 255 for
    floating-point values. Values outside of these ranges are scaled from the lowest to the highest.
    """
    values, tags = np.asarray(image).astype(np.float32), getattr(image, "tag_v2", {})
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    black, white = low, high
    depths = (12,) if tags.get(BITS_PER_SAMPLE) == (12,) else (8, 10, 12, 14, 16)
    ranges = {2: 1, 256: 255} if image.mode == "F" else {1 << bits: (1 << bits) - 1 for bits in depths}
    if low >= 0 and high < max(ranges):
        black, white = 0.0, next(white for end, white in ranges.items() if high < end)
    values = np.nan_to_num(values, nan=black, posinf=high, neginf=low)
    grey = ((values - black) * (255 / max(white - black, 1e-30)) + 0.5).clip(0, 255).astype(np.uint8)
    return 255 - grey if tags.get(PHOTOMETRIC) == 0 else grey  # 0: white is zero


def _central_part(height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the central part, at most MAX_ASPECT times as long as wide.

    Resized to a short side of 224, an image of 20,000 x 3 pixels would take a gigabyte.
    """
    longest = MAX_ASPECT * min(height, width)
    top, left = ((side - min(side, longest)) // 2 for side in (height, width))
    return top, left, min(height, longest), min(width, longest)


def _scaled(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the width and height after the short side is resized to `size`."""
    return (size, int(size * height / width)) if width < height else (int(size * width / height), size)

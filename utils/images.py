"""An image file of any kind to an upright square RGB picture, and uint8 batches to the model's input."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.errors import UserError

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such images are refused below
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
MAX_ASPECT = 8  # of an image's sides; what is longer loses its ends before it is resized
ORIENTATION_TAG = 0x0112  # EXIF
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource = str | Path | io.BytesIO | Image.Image


class UnreadableImageError(Exception):
    """An image file that cannot be decoded; the message says why, in a few words."""


def load_image(
    source: ImageSource,
    size: int,
    *,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    is_squashed: bool = False,
) -> Image.Image:
    """Return the image as upright RGB, short side resized to `size` pixels, centre crop `size` x `size`.

    Equal, bit for bit, to torchvision's `Resize` and `CenterCrop` on the decoded file. With `is_squashed` both sides
    are resized, and nothing is cropped. Raises UnreadableImageError.
    """
    with _unreadable():
        image = source if isinstance(source, Image.Image) else _open(source)
        orientation = ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG))
        image = _to_rgb(image)
        if max(image.size) > MAX_ASPECT * min(image.size):
            top, left, height, width = _central_part(image.height, image.width)
            image = image.crop((left, top, left + width, top + height))
    image = image.resize((size, size) if is_squashed else _resized(*image.size, size), resample)
    if orientation is not None:
        image = image.transpose(orientation)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def read_pixels(source: str | Path | io.BytesIO, at_least: int, buffer: np.ndarray | None = None) -> Tensor:
    """Return an image file, or the bytes of one, as upright RGB, uint8 [3, height, width].

    A photograph at least eight times as large as is needed, with `at_least` its short side, is decoded at a
    fraction of its size, and returned at twice `at_least`. With a `buffer`, uint8 [num_bytes], the result may lie in
    it until it is used again: memory that is already there is faster. Raises UnreadableImageError.
    """
    with contextlib.suppress(OSError, ValueError):  # not a plain JPEG: Pillow reads it, or says what is wrong
        data = source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
        height, width = plain_jpeg_size(data)
        if min(height, width) < 8 * at_least:
            is_large_enough = buffer is not None and height * width * 3 <= buffer.size
            pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer if is_large_enough else None)
            return torch.from_numpy(pixels).permute(2, 0, 1)
    with _unreadable():
        image = _open(source)
        width, height = image.size
        orientation = ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG))
        is_large = min(width, height) >= 8 * at_least
        if is_large:
            image.draft(None, (2 * at_least, 2 * at_least))
        image = _to_rgb(image)
        if is_large:  # sizes at a fraction are rounded up, the last row and column partly empty: leave that part out
            fraction = max(1, round(width / image.width))
            extent = (0, 0, min(width / fraction, image.width), min(height / fraction, image.height))
            image = image.resize(_resized(width, height, 2 * at_least), Image.Resampling.BICUBIC, box=extent)
        return to_tensor(image if orientation is None else image.transpose(orientation))


def plain_jpeg_size(data: bytes) -> tuple[int, int]:
    """Return the height and width of a JPEG that is RGB, upright and no bomb. Raises ValueError for any other."""
    height, width, mode, _ = simplejpeg.decode_jpeg_header(data)
    if mode != "YCbCr" or b"Exif\0\0" in data[:4096] or height * width > Image.MAX_IMAGE_PIXELS:
        raise ValueError("not a plain JPEG")
    return height, width


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Resize uint8 [3, height, width] to `size` on its short side: bicubic, within one grey level of Pillow's."""
    top, left, height, width = _central_part(*image.shape[1:])
    image = image[:, top : top + height, left : left + width]
    width, height = _resized(image.shape[2], image.shape[1], size)
    if (height, width) == image.shape[1:]:
        return image
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # strides that torch knows as channels_last: faster
    return F.interpolate(batch, (height, width), mode="bicubic", antialias=True)[0]


def crop_centre(image: Tensor, size: int) -> Tensor:
    """Return the central square [3, size, size] of [3, height, width]."""
    top, left = (round((side - size) / 2) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def resize_and_crop(image: Tensor, size: int) -> Tensor:
    """Do to uint8 [3, height, width] what `load_image` does to a file, within one grey level."""
    return crop_centre(resize_short_side(image, size), size)


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """Tell whatever a damaged image raises as UnreadableImageError; Pillow's plugins raise anything."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(reason) from None


def _open(source: str | Path | io.BytesIO) -> Image.Image:
    """Open an image file that is no decompression bomb."""
    image = Image.open(source)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    return image


def _central_part(height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the middle of an image longer than MAX_ASPECT, else all of it.

    A line of 20,000 x 3 pixels, its short side resized to 224, would take a gigabyte.
    """
    longest = MAX_ASPECT * min(height, width)
    top, left = ((side - min(side, longest)) // 2 for side in (height, width))
    return top, left, min(height, longest), min(width, longest)


def _resized(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the width and height after the short side became `size`."""
    return (size, int(size * height / width)) if width < height else (int(size * width / height), size)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Decode to 8-bit RGB; what is transparent becomes white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip rather than scale
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB picture as uint8 [3, height, width]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Return [batch, 3, height, width] with values in 0..255 as float32 in units of `std` around `mean`, channels_last.

    `mean` and `std` are of RGB in [0, 1]. Runs where the images are: as uint8 they cross to the device in a quarter
    of the bytes.
    """
    mean, std = (torch.as_tensor(values, device=images.device).view(1, 3, 1, 1) * 255 for values in (mean, std))
    return (images.contiguous(memory_format=torch.channels_last).float() - mean).div_(std)


def find_images(folder: Path) -> list[Path]:
    """Return `list_images` of a folder that a user named. Raises UserError if it does not exist or holds none."""
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist; check the path")
    images = list_images(folder)
    if not images:
        raise UserError(f"the image folder {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return images


def list_images(folder: Path) -> list[Path]:
    """Return the image files of a folder by their suffix, sorted; other files are passed over."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())

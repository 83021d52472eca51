"""An image file of any kind to an upright square RGB picture, and uint8 batches to the model's input."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
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


class UnreadableImageError(Exception):
    """An image file that cannot be decoded; the message says why, in a few words."""


def load_image(source: str | Path | Image.Image, size: int, *, scaled_decoding: bool = False) -> Image.Image:
    """Return the image as upright RGB, short side resized to `size` pixels (bicubic), centre crop `size` x `size`.

    Equal to torchvision's `Resize` and `CenterCrop` on the decoded file. With `scaled_decoding` a JPEG is decoded
    at 1/2, 1/4 or 1/8 of its size where that still is twice `size`: faster on large photographs, not bit-equal.
    Raises UnreadableImageError.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        width, height = image.size
        orientation = _orientation(image)
        if scaled_decoding:
            image.draft(None, (2 * size, 2 * size))
        image = _to_rgb(image)
    except Exception as error:  # Pillow's plugins raise anything on a damaged file, IndexError and struct.error too
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(reason) from None

    # Sizes come from the undecoded picture: a scaled JPEG's are rounded up, its last row and column partly empty.
    shrink = max(1, round(width / image.width))
    extent = (0, 0, min(width / shrink, image.width), min(height / shrink, image.height))
    image = image.resize(_resized(width, height, size), Image.Resampling.BICUBIC, box=extent)
    if orientation is not None:
        image = image.transpose(orientation)
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def load_pixels(file: str | Path, size: int) -> Tensor:
    """Return `load_image`'s picture as uint8 [3, size, size], within one grey level of it, in half its time on JPEGs.

    Photographs of at least eight times `size` are decoded at a quarter or an eighth, and differ a little more.
    Raises UnreadableImageError.
    """
    with contextlib.suppress(OSError, ValueError):  # `load_image` tells what is wrong
        return decode_pixels(Path(file).read_bytes(), size)
    return to_tensor(load_image(file, size, scaled_decoding=True))


def decode_pixels(jpeg: bytes, size: int) -> Tensor:
    """Decode an RGB JPEG, resize its short side to `size` (bicubic), crop the centre: uint8 [3, size, size].

    Raises ValueError for what only `load_image` can do: other formats and modes, rotation, large photographs.
    """
    height, width, mode, _ = simplejpeg.decode_jpeg_header(jpeg)
    if mode != "YCbCr" or b"Exif\0\0" in jpeg[:65_536] or min(height, width) >= 8 * size:
        raise ValueError("not a plain JPEG")
    image = torch.from_numpy(simplejpeg.decode_jpeg(jpeg, "RGB")).permute(2, 0, 1)
    width, height = _resized(width, height, size)
    image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image[:, top : top + size, left : left + size]


def _resized(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the width and height after the short side became `size`."""
    return (size, int(size * height / width)) if width < height else (int(size * width / height), size)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    return ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG))


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


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 [batch, 3, height, width] as float32 in units of `std` around `mean`, channels_last.

    Runs where the images are: as uint8 they cross to the device in a quarter of the bytes.
    """
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) * 255 for values in (mean, std))
    return images.contiguous(memory_format=torch.channels_last).float().sub_(mean).div_(std)


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

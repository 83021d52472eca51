"""Training images by index: decoded from files or shards, or squares of a pixel cache on the disk or a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloader.storage.identity import stamps
from dataloader.storage.shards import Shards
from utils.errors import UserError
from utils.images import ImageList, crop_center, read_pixels

BUFFER_BYTES = 3 * 1200 * 1200  # larger images are decoded into memory of their own


class ImageSource:
    """Training images. A source defines `__len__`, `read` and `name`; caches have the other methods of their own."""

    side: int | None = None  # of the squares that `read` returns, in pixels; None: images of any shape
    note = ""  # what a user should know about it

    def read(self, index: int) -> Tensor:
        """Return an upright RGB image, uint8 [3, height, width], valid until the next call.

        Raises UnreadableImageError.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        raise NotImplementedError

    def read_squares(self, indices: np.ndarray) -> Tensor | None:
        """Return the squares of a batch, uint8 [batch, 3, side, side], channels_last; None: read them one by one."""
        return None

    def to_device(self, images: Tensor, indices: Tensor, device: torch.device) -> Tensor:
        """Return on `device` the images that were read for `indices`, int64 [batch]."""
        return images.to(device, non_blocking=True)

    def hold_on(self, device: torch.device) -> "ImageSource":
        """Return the source to use for training on `device`."""
        return self


class EncodedImages(ImageSource):
    """Image files, or images in shards, decoded on each read.

    `side`: crop images, which have a short side of `side` pixels, to squares; or None. Without it, `read` returns at
    least `size` pixels on the short side where the image has them.
    """

    def __init__(self, images: ImageList | Shards, size: int, side: int | None) -> None:
        self.images = images
        self.side = side
        self.at_least = side or size
        self.buffer = np.empty(BUFFER_BYTES, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        image = read_pixels(self.images[index], self.at_least, self.buffer)
        return crop_center(image, self.side) if self.side else image

    def name(self, index: int) -> str:
        return self.images.name(index)


class PixelCache(ImageSource):
    """Squares in a memory-mapped file, uint8 [num_rows, side, side, 3]; image i is row rows[i].

    Mapping raises UserError once another run has replaced the file.

    `cache_device`: "gpu" lets a GPU hold them, "auto" if they fit in half of its free memory, "cpu" never.
    """

    def __init__(self, file: Path, rows: np.ndarray, side: int, cache_device: str = "cpu") -> None:
        self.file = file
        self.rows = rows
        self.side = side
        self.cache_device = cache_device
        self.stamp = stamps([file])
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # each process maps the file itself

    @property
    def pixels(self) -> np.ndarray:
        """The array in the file."""
        if self._pixels is None:  # mapped copy-on-write, since torch warns about read-only memory
            self._pixels = np.asarray(np.load(self.file, mmap_mode="c"))
            if (stamps([self.file]) != self.stamp).any():
                raise UserError(
                    f"another run replaced {self.file} for other images; give each its own dataloader.cache_dir"
                )
        return self._pixels

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(self.pixels[self.rows[index]]).permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"{self.file} row {self.rows[index]}"

    def read_squares(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(self.pixels[self.rows[indices]]).permute(0, 3, 1, 2)

    def hold_on(self, device: torch.device) -> ImageSource:
        is_gpu, num_bytes = device.type == "cuda", len(self) * self.side**2 * 3
        if self.cache_device == "gpu" and not is_gpu:
            raise UserError("there is no GPU to hold the pixel cache; --set dataloader.cache_device=auto")
        fits = is_gpu and self.cache_device == "auto" and num_bytes < torch.cuda.mem_get_info(device)[0] / 2
        return GPUPixels(self, device) if fits or self.cache_device == "gpu" else self


class GPUPixels(PixelCache):
    """A pixel cache in the memory of a device: workers read nothing, and `to_device` gathers each batch there."""

    def __init__(self, cache: PixelCache, device: torch.device) -> None:
        super().__init__(cache.file, cache.rows, cache.side)
        self.note = (
            f"the GPU holds the pixel cache, {len(self) * self.side**2 * 3 / 2**30:.1f} GiB; "
            "--set dataloader.cache_device=cpu leaves its memory to the model"
        )
        self.gpu_pixels = torch.empty(len(self), self.side, self.side, 3, dtype=torch.uint8, device=device)
        for start in range(0, len(self), 1024):
            self.gpu_pixels[start : start + 1024] = torch.from_numpy(cache.pixels[self.rows[start : start + 1024]])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "gpu_pixels": None}  # workers do not need them

    def read_squares(self, indices: np.ndarray) -> Tensor:
        return torch.empty(len(indices), 3, 0, 0, dtype=torch.uint8)

    def to_device(self, images: Tensor, indices: Tensor, device: torch.device) -> Tensor:
        return self.gpu_pixels[indices.to(device, non_blocking=True)].permute(0, 3, 1, 2)

"""The cache that `data_config.yaml` asks for: built where it is missing, refused where it is stale."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloader.captions import CaptionSet
from dataloader.config import DataConfig
from dataloader.pack import PIXELS_FILE, make_spec, pack, read_manifest
from dataloader.shards import Shards
from utils.errors import UserError


class PixelCache:
    """The uint8 squares of a pixel pack, memory-mapped, by number."""

    def __init__(self, folder: Path, rows: np.ndarray, side: int) -> None:
        self.folder = folder
        self.rows = rows  # of each image
        self.side = side
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # each process maps the file itself

    @property
    def pixels(self) -> np.ndarray:
        """The whole array, uint8 [num_rows, side, side, 3]."""
        if self._pixels is None:
            # Mapped as writable, though nothing writes to it: torch warns of memory that is not.
            self._pixels = np.asarray(np.load(self.folder / PIXELS_FILE, mmap_mode="c"))
        return self._pixels

    def __getitem__(self, index: int) -> Tensor:
        """Return one square, uint8 [3, side, side], in place."""
        return torch.from_numpy(self.pixels[self.rows[index]]).permute(2, 0, 1)

    def read(self, indices: np.ndarray) -> Tensor:
        """Return squares, uint8 [num_indices, 3, side, side], channels_last."""
        return torch.from_numpy(self.pixels[self.rows[indices]]).permute(0, 3, 1, 2)

    def copy_to(self, device: torch.device) -> Tensor:
        """Return all squares in the order of the images, uint8 [num_images, side, side, 3], on `device`."""
        copy = torch.empty(len(self), self.side, self.side, 3, dtype=torch.uint8, device=device)
        for start in range(0, len(self), 1024):
            copy[start : start + 1024] = torch.from_numpy(self.pixels[self.rows[start : start + 1024]])
        return copy

    @property
    def num_bytes(self) -> int:
        """What the squares take."""
        return len(self) * self.side**2 * 3


def open_cache(
    train_set: CaptionSet, config: DataConfig, *, image_size: int, num_workers: int, tell: Callable[[str], None]
) -> tuple[CaptionSet, Shards | PixelCache]:
    """Return the images and the cache that holds them, in the same order. Builds the cache if there is none.

    An image that could not be read when it was built gives its place to the next one that could. Raises UserError
    if it was made from other images, or if too many of them cannot be read.
    """
    form = "pixels" if config.cache == "pixels" else "shards"
    is_exact = form == "pixels" and config.augmentation == "reference"
    size = image_size if is_exact else round(image_size * 8 / 7)  # 224 from 256, as is customary
    folder = Path(config.cache_dir) / f"{form}_{size}"
    spec = make_spec(train_set, form, size)
    manifest = read_manifest(folder, spec)
    if manifest is None:
        tell(f"building the cache {folder}; the next run finds it there")
        pack(train_set, folder, spec, num_workers=num_workers, tell=tell)
        manifest = read_manifest(folder, spec)
    left_out = set(manifest["unreadable"])
    if len(left_out) > config.max_unreadable_share * spec.num_images:
        raise UserError(
            f"{len(left_out):,} of the {spec.num_images:,} images could not be read when the cache {folder} was "
            "built, more than max_unreadable_share in data_config.yaml allows; mend them and delete the cache, or "
            "allow more"
        )
    readable = np.array([number for number in range(spec.num_images) if number not in left_out])
    places = np.searchsorted(readable, np.arange(spec.num_images)) % len(readable)
    images = [train_set.images[number] for number in readable[places]]
    cache = PixelCache(folder, readable[places], size) if form == "pixels" else Shards(folder, places)
    return train_set._replace(images=images), cache

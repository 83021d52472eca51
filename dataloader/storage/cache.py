"""The image cache that `data_config.yaml` configures."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from dataloader.captions import CaptionSet
from dataloader.config import DataConfig
from dataloader.sources import EncodedImages, ImageSource, PixelCache
from dataloader.storage.packing import PIXELS_FILE, TOKENS_FILE, OtherPackError, make_spec, pack, read_manifest
from dataloader.storage.shards import Shards
from utils.errors import UserError


def open_cache(
    train_set: CaptionSet, config: DataConfig, image_size: int, num_workers: int, logger: logging.Logger
) -> tuple[CaptionSet, ImageSource, Path]:
    """Open the cache of a training set for a model of `image_size` pixels; build it if there is none of these images.

    Returns the training set, a source of its images in the same order, and the file to store its tokens in. An image
    that was unreadable when the cache was built is replaced by the next readable one, with its captions. Raises
    UserError if the cache cannot be built, or too many of the images are unreadable.
    """
    form = "pixels" if config.cache == "pixels" else "shards"
    is_exact = form == "pixels" and config.augmentation == "reference"
    size = image_size if is_exact else round(image_size * 8 / 7)  # the customary 256 for 224
    folder = Path(config.cache_dir) / f"{form}_{size}"
    spec = make_spec(train_set, form, size)
    with _lock(folder, logger):
        try:
            unreadable, reason = read_manifest(train_set, folder, spec, logger), ""
        except OtherPackError as error:
            unreadable, reason = None, error.reason
        if unreadable is None:
            why = f"anew, since {reason}" if reason else "which later runs use too"
            logger.info(f"building the cache {folder}, {why}")
            options = {"num_workers": num_workers, "logger": logger, "flag": "--set dataloader.cache_dir=DIR"}
            unreadable = pack(train_set, folder, spec, replace=bool(reason), **options)
    if len(unreadable) > config.max_unreadable_share * spec.num_images:
        raise UserError(
            f"{len(unreadable):,} of the {spec.num_images:,} images were unreadable when the cache {folder} was built; "
            "repair them, or allow more with --set dataloader.max_unreadable_share=SHARE"
        )
    readable = np.setdiff1d(np.arange(spec.num_images), unreadable)
    chosen = np.searchsorted(readable, np.arange(spec.num_images)) % len(readable)
    cached_set = train_set._replace(images=[train_set.images[number] for number in readable[chosen]])
    if form == "pixels":
        source: ImageSource = PixelCache(folder / PIXELS_FILE, readable[chosen], size, config.cache_device)
    else:
        shards = Shards.open(folder, chosen)  # they lack the unreadable images
        for note in shards.notes:
            logger.info(note)
        source = EncodedImages(shards, image_size, size)
    return cached_set, source, folder / TOKENS_FILE


@contextlib.contextmanager
def _lock(folder: Path, logger: logging.Logger) -> Iterator[None]:
    """Wait until no other run checks or builds this cache. Without locks, as on some network disks, do not wait."""
    lock = FileLock(folder.with_suffix(".lock"))
    with contextlib.suppress(OSError, NotImplementedError):  # `pack` says that a folder cannot be written
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.info(f"waiting for another run that builds {folder}; if there is none, delete {lock.lock_file}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()

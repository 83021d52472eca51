"""Batches for training.

Everything random about a training sample is drawn from (seed, epoch, index), so that the number of workers and of
devices never changes the data.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataloader.augment import CAPTION, NUM_DRAWS, Augmentation
from dataloader.batch import Batch, Failure
from dataloader.cache import PixelCache, open_cache
from dataloader.captions import CaptionSet, read_captions
from dataloader.classification import ClassificationSet, load_class_folders
from dataloader.config import DataConfig
from dataloader.order import EpochBatchSampler
from dataloader.shards import name_of
from dataloader.stream import ShardStream, StreamDataset
from dataloader.tables import PackedStrings, TokenTable, random_numbers
from dataloader.workers import start_worker, usable_workers
from utils.errors import UserError
from utils.images import (
    ImageSource,
    UnreadableImageError,
    crop_centre,
    normalize,
    read_pixels,
)
from utils.text import printable

MAX_REPLACEMENTS = 100
BUFFER_BYTES = 3 * 1200 * 1200  # larger photographs are decoded to memory of their own


class CaptionDataset(Dataset):
    """Batches by lists of (epoch, index), all of one epoch: images, and one of the captions of each.

    `source` has the images: their files' names, shards, a pixel cache; or None, where the device has them. An
    unreadable image gives its place to another, drawn at random. With `leaves_squares`, images of a packed source come
    as the squares that they are, for the device to crop.
    """

    def __init__(
        self,
        source: Sequence[ImageSource] | PixelCache | None,
        tokens: TokenTable,
        augmentation: Augmentation,
        *,
        seed: int,
        leaves_squares: bool = False,
    ) -> None:
        self.source = source
        self.tokens = tokens
        self.augmentation = augmentation
        self.seed = seed
        self.leaves_squares = leaves_squares
        self.side = getattr(source, "side", None)
        self.buffer = np.empty(BUFFER_BYTES, dtype=np.uint8)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        epoch, indices = keys[0][0], np.array([index for _, index in keys])
        draws = random_numbers(self.seed, epoch, indices, NUM_DRAWS)
        failures: list[Failure] = []
        is_ready = self.leaves_squares or (self.side == self.augmentation.size and not self.augmentation.is_random)
        if self.source is None:
            images = None
        elif isinstance(self.source, PixelCache) and is_ready:
            images = self.source.read(indices)
        else:
            size = self.side if self.leaves_squares else self.augmentation.size
            images = torch.empty(len(indices), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # channels_last
            for row, place in enumerate(images):
                image = self._read(epoch, indices, row, failures)
                if image is not None:
                    place.copy_(image if self.leaves_squares else self.augmentation.crop(image, draws[row]))
        tokens = self.tokens.draw(indices, draws[:, CAPTION])
        tokens = self.augmentation.vary_texts(tokens, self.seed, epoch, indices)
        return Batch(images, tokens, torch.from_numpy(indices), draws, failures)

    def _read(self, epoch: int, indices: np.ndarray, row: int, failures: list[Failure]) -> Tensor | None:
        """Return the image of one row; where it cannot be read, change the row's index to one that can be."""
        rng = None
        for _ in range(MAX_REPLACEMENTS):
            index = int(indices[row])
            try:
                if isinstance(self.source, PixelCache):
                    return self.source[index]
                image = read_pixels(self.source[index], self.side or self.augmentation.size, self.buffer)
                return crop_centre(image, self.side) if self.side else image
            except UnreadableImageError as error:
                failures.append(Failure(name_of(self.source, index), str(error)))
                rng = rng or np.random.default_rng((self.seed, epoch, index))
                indices[row] = rng.integers(len(self.source))
        return None  # so many failures are over every allowed share: `TrainLoader` ends the run before this is used


class TrainLoader:
    """Iterates over a run's training batches on `device`, augmented and normalized, one ahead of the loop.

    `wait_seconds` is how long the loop has waited for data. Each unreadable image is told to `warn` once; more
    than `max_unreadable_share` of the images raise UserError. Builds the cache that the config asks for, and says so.
    """

    def __init__(
        self,
        train_set: CaptionSet | ShardStream,
        config: DataConfig,
        order: EpochBatchSampler,
        *,
        image_size: int,
        context_length: int,
        num_workers: int,
        device: torch.device,
        tell: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.augmentation = Augmentation(config, image_size)
        self.mean, self.std = (torch.tensor(values, device=device) for values in (config.image_mean, config.image_std))
        self.device = device
        self.num_batches = len(order)
        self.max_unreadable = config.max_unreadable_share * train_set.num_images
        self.unreadable: set[str] = set()
        self.warn = warn
        self.wait_seconds = 0.0
        self.resident: Tensor | None = None  # the pixel cache, where the device holds it
        self.leaves_squares = False  # a GPU crops what is packed; without one, the workers do
        self.advice = ""  # to a run that waits for its data
        self.image_ids: Sequence[int | str] = ()  # by a batch's indices; a stream has none
        self.captions: TokenTable | None = None  # of the same images
        num_workers = usable_workers(num_workers)
        # with a generator of its own the loader does not draw from torch's, whose state a checkpoint keeps
        common = {
            "generator": torch.Generator().manual_seed(order.seed),
            "pin_memory": device.type == "cuda",
            "worker_init_fn": start_worker,
        }

        if isinstance(train_set, ShardStream):
            if order.start_epoch or order.start_sample:
                tell("a stream cannot be resumed at its place: from here its shards come in a new order")
            stream = StreamDataset(train_set, self.augmentation, order, context_length=context_length)
            num_workers = min(num_workers, train_set.num_shards // order.world_size)
            self.loader = DataLoader(stream, batch_size=None, num_workers=num_workers, **common)
            return

        source: Sequence[ImageSource] | PixelCache | None = train_set.shards
        if config.cache == "none" and source is None:
            gib = train_set.num_images * image_size**2 * 3 / 2**30
            self.advice = f"--set dataloader.cache=pixels would save it, with {gib:.1f} GiB in {config.cache_dir}"
        if config.cache != "none":
            train_set, source = open_cache(train_set, config, image_size=image_size, num_workers=num_workers, tell=tell)
        self.image_ids = [image.image_id for image in train_set.images]
        tokens_file = None if config.cache == "none" else source.folder / "tokens.npz"
        self.captions = TokenTable([image.captions for image in train_set.images], context_length, tokens_file)
        self.leaves_squares = device.type == "cuda" and getattr(source, "side", None) is not None
        if source is None:
            source = PackedStrings(image.path for image in train_set.images)
        if isinstance(source, PixelCache) and _fits_on(device, source, config.cache_device):
            self.resident, source = source.copy_to(device), None
        dataset = CaptionDataset(
            source, self.captions, self.augmentation, seed=order.seed, leaves_squares=self.leaves_squares
        )
        self.loader = DataLoader(dataset, batch_sampler=order, collate_fn=_as_it_is, num_workers=num_workers, **common)

    def __iter__(self) -> Iterator[Batch]:
        batches = islice(self.loader, self.num_batches)
        ahead = self._next(batches)
        while ahead is not None:
            batch, ahead = ahead, self._next(batches)  # the next one's copy to the device is under way
            yield batch._replace(images=self._finish(batch))

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        start = time.perf_counter()
        batch = next(batches, None)
        self.wait_seconds += time.perf_counter() - start
        if batch is None:
            return None
        self._report(batch.failures)
        images = None if batch.images is None else batch.images.to(self.device, non_blocking=True)
        return batch._replace(images=images, tokens=batch.tokens.to(self.device, non_blocking=True))

    def _finish(self, batch: Batch) -> Tensor:
        images = batch.images
        if self.resident is not None:
            indices = batch.indices.to(self.device, non_blocking=True)
            images = self.resident[indices].permute(0, 3, 1, 2)
        if self.leaves_squares:
            images = self.augmentation.crop_squares(images, batch.draws)
        return normalize(self.augmentation.recolour(images, batch.draws), self.mean, self.std)

    def _report(self, failures: Sequence[Failure]) -> None:
        for path, reason in failures:
            if path not in self.unreadable:
                self.unreadable.add(path)
                self.warn(f"skipped {printable(path)}: {reason}")
        if len(self.unreadable) > self.max_unreadable:
            raise UserError(
                f"{len(self.unreadable)} training images cannot be read (the last: {failures[-1].path}), more than "
                "max_unreadable_share in data_config.yaml allows; mend them, or allow a larger share"
            )


def open_train_set(config: DataConfig) -> CaptionSet | ShardStream:
    """Find the training images and captions that the config names. Raises UserError if they are not there."""
    if config.format == "stream":
        return ShardStream(config.train_img_dir, config.stream_num_images)
    return read_captions(
        config.train_img_dir,
        config.train_annotation_file,
        format=config.format,
        csv_columns=(config.csv_image_column, config.csv_caption_column),
    )


def open_val_set(config: DataConfig) -> CaptionSet | None:
    """Find the held-out images and captions, if the config names any. Raises UserError if they are not there."""
    if config.val_img_dir is None:
        return None
    columns = (config.csv_image_column, config.csv_caption_column)
    return read_captions(config.val_img_dir, config.val_annotation_file, split="val", csv_columns=columns)


def open_class_set(config: DataConfig) -> ClassificationSet | None:
    """Find the labelled images, if the config names any. Raises UserError if they are not there."""
    return None if config.val_class_dir is None else load_class_folders(Path(config.val_class_dir))


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _fits_on(device: torch.device, cache: PixelCache, wanted: str) -> bool:
    """Return whether the pixel cache goes to the GPU: `gpu` always, `auto` into at most half of its free memory."""
    if device.type != "cuda":
        if wanted == "gpu":
            raise UserError("data_config.yaml: cache_device is gpu, and there is no GPU; set it to auto or cpu")
        return False
    return wanted == "gpu" or (wanted == "auto" and cache.num_bytes < torch.cuda.mem_get_info(device)[0] / 2)

"""Batches for training and evaluation.

Everything random about a training sample is drawn from (seed, epoch, index), so that the number of workers and of
devices never changes the data.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataloader.augment import CAPTION, NUM_DRAWS, Augmentation
from dataloader.batch import Batch, Failure
from dataloader.cache import PixelCache, open_cache
from dataloader.captions import CaptionSet, read_captions
from dataloader.config import DataConfig
from dataloader.shards import Shards
from dataloader.stream import ShardStream, StreamDataset
from dataloader.tables import PackedStrings, TokenTable, random_numbers
from utils.errors import UserError
from utils.images import (
    ImageSource,
    UnreadableImageError,
    crop_centre,
    load_image,
    normalize,
    read_pixels,
    to_tensor,
)

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
                failures.append(Failure(_name(self.source, index), str(error)))
                rng = rng or np.random.default_rng((self.seed, epoch, index))
                indices[row] = rng.integers(len(self.source))
        return None  # so many failures are over every allowed share: `TrainLoader` ends the run before this is used


class EpochBatchSampler:
    """Batches of (epoch, index) for a whole run: each epoch a new permutation, cut to `batches_per_epoch`.

    One stream for all epochs, so that the workers read on where one ends and the next begins. Of `world_size`
    processes each takes its own part of a batch of batch_size * world_size.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        batches_per_epoch: int,
        num_epochs: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.num_epochs = num_epochs
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.num_epochs * self.batches_per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.num_epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            for batch in range(self.batches_per_epoch):
                start = (batch * self.world_size + self.rank) * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


class TrainLoader:
    """Iterates over a run's training batches on `device`, augmented and normalized, one ahead of the loop.

    `wait_seconds` is how long the loop has waited for data. Each unreadable image is told to `warn` once; more
    than `max_unreadable_share` of the images raise UserError. Builds the cache that the config asks for, and says so.
    """

    def __init__(
        self,
        train_set: CaptionSet | ShardStream,
        config: DataConfig,
        *,
        image_size: int,
        context_length: int,
        batch_size: int,
        batches_per_epoch: int,
        num_epochs: int,
        num_workers: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        tell: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.augmentation = Augmentation(config, image_size)
        self.mean, self.std = (torch.tensor(values, device=device) for values in (config.image_mean, config.image_std))
        self.device = device
        self.num_batches = num_epochs * batches_per_epoch
        self.max_unreadable = config.max_unreadable_share * train_set.num_images
        self.unreadable: set[str] = set()
        self.warn = warn
        self.wait_seconds = 0.0
        self.resident: Tensor | None = None  # the pixel cache, where the device holds it
        self.leaves_squares = False  # a GPU crops what is packed; without one, the workers do
        self.advice = ""  # to a run that waits for its data
        num_workers = _usable_workers(num_workers)
        common = {"pin_memory": device.type == "cuda", "worker_init_fn": _freeze}

        if isinstance(train_set, ShardStream):
            stream = StreamDataset(
                train_set, self.augmentation, batch_size=batch_size, context_length=context_length, seed=seed, rank=rank
            )
            num_workers = min(num_workers, train_set.num_shards // world_size)
            self.loader = DataLoader(stream, batch_size=None, num_workers=num_workers, **common)
            return

        source: Sequence[ImageSource] | PixelCache | None = train_set.shards
        if config.cache == "none" and source is None:
            gib = train_set.num_images * image_size**2 * 3 / 2**30
            self.advice = f"--set dataloader.cache=pixels would save it, with {gib:.1f} GiB in {config.cache_dir}"
        if config.cache != "none":
            train_set, source = open_cache(train_set, config, image_size=image_size, num_workers=num_workers, tell=tell)
        tokens_file = None if config.cache == "none" else source.folder / "tokens.npz"
        tokens = TokenTable([image.captions for image in train_set.images], context_length, tokens_file)
        self.leaves_squares = device.type == "cuda" and getattr(source, "side", None) is not None
        if source is None:
            source = PackedStrings(image.path for image in train_set.images)
        if isinstance(source, PixelCache) and _fits_on(device, source, config.cache_device):
            self.resident, source = source.copy_to(device), None
        dataset = CaptionDataset(source, tokens, self.augmentation, seed=seed, leaves_squares=self.leaves_squares)
        sampler = EpochBatchSampler(
            train_set.num_images,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            num_epochs=num_epochs,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        self.loader = DataLoader(
            dataset, batch_sampler=sampler, collate_fn=_as_it_is, num_workers=num_workers, **common
        )

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
                self.warn(f"skipped {path}: {reason}")
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


class ImageDataset(Dataset):
    """Preprocessed images by index, each decoded in full: what is measured on them compares with other tools."""

    def __init__(
        self, sources: Sequence[ImageSource], image_size: int, load: Callable[..., Image.Image] = load_image
    ) -> None:
        self.sources = sources
        self.image_size = image_size
        self.load = load

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Failure]:
        try:
            return index, to_tensor(self.load(self.sources[index], self.image_size))
        except UnreadableImageError as error:
            return index, Failure(_name(self.sources, index), str(error))


class ThreadedLoader:
    """Batches read by threads, none ahead: where the model computes on the CPU, all cores read, then all compute.

    Processes that read beside it would take turns with its threads, and copy every image once more.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, num_threads: int) -> None:
        self.dataset = dataset
        self.batches = torch.arange(len(dataset)).split(batch_size)
        self.num_threads = num_threads

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[Failure]]]:
        with ThreadPoolExecutor(self.num_threads) as pool:  # decoding and resizing let other threads run
            for indices in self.batches:
                yield _collate_images(list(pool.map(self.dataset.__getitem__, indices.tolist())))


class ImageLoader:
    """Images to evaluate, in order, batched and normalized on `device`. What cannot be read is in `failures`.

    Iterates over (indices int64 [batch], images float32 [batch, 3, size, size]): an index is a position in `sources`.
    Raises UserError if nothing can be read.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource],
        *,
        image_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        batch_size: int,
        num_workers: int,
        device: torch.device,
        load: Callable[..., Image.Image] = load_image,
    ) -> None:
        dataset, num_workers = ImageDataset(sources, image_size, load), _usable_workers(num_workers)
        if device.type == "cpu":
            self.loader = ThreadedLoader(dataset, batch_size, max(1, num_workers))
        else:
            self.loader = DataLoader(
                dataset,
                batch_size=batch_size,
                collate_fn=_collate_images,
                num_workers=num_workers if len(sources) > batch_size else 0,
                pin_memory=True,
            )
        self.normalize = partial(normalize, mean=image_mean, std=image_std)
        self.device = device
        self.failures: list[Failure] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.failures = []
        for indices, images, failures in self.loader:
            self.failures += failures
            if len(indices):
                yield indices.to(self.device), self.normalize(images.to(self.device, non_blocking=True))
        if len(self.failures) == len(self.loader.dataset):
            path, reason = self.failures[0]
            raise UserError(f"{path}: cannot be read as an image ({reason}); no other image is left")


def _collate_images(items: Sequence[tuple[int, Tensor | Failure]]) -> tuple[Tensor, Tensor, list[Failure]]:
    readable = [(index, image) for index, image in items if isinstance(image, Tensor)]
    indices = torch.tensor([index for index, _ in readable], dtype=torch.int64)
    images = torch.stack([image for _, image in readable]) if readable else torch.empty(0, dtype=torch.uint8)
    return indices, images, [item for _, item in items if isinstance(item, Failure)]


def _name(sources: Sequence[ImageSource], index: int) -> str:
    """Return what a message calls an image."""
    return sources.name(index) if isinstance(sources, Shards) else str(sources[index])


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _freeze(worker_id: int) -> None:
    """Keep the garbage collector off the parent's objects, whose pages it would copy into each worker."""
    gc.freeze()


def _fits_on(device: torch.device, cache: PixelCache, wanted: str) -> bool:
    """Return whether the pixel cache goes to the GPU: `gpu` always, `auto` into at most half of its free memory."""
    if device.type != "cuda":
        if wanted == "gpu":
            raise UserError("data_config.yaml: cache_device is gpu, and there is no GPU; set it to auto or cpu")
        return False
    return wanted == "gpu" or (wanted == "auto" and cache.num_bytes < torch.cuda.mem_get_info(device)[0] / 2)


def _usable_workers(num_workers: int) -> int:
    """Return at most as many workers as there are cores; more only get in each other's way."""
    return min(num_workers, os.cpu_count() or 1)

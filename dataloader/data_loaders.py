"""Open the data that a configuration names, and iterate over its training batches.

Everything random about a training sample is drawn from (seed, epoch, index), so the number of workers and devices
never changes the data.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataloader.augment import CAPTION, NUM_DRAWS, Augmentation
from dataloader.captions import CaptionSet, open_captions
from dataloader.classification import ClassificationSet, load_class_folders
from dataloader.config import DataConfig
from dataloader.counts import count_captions, require_complete
from dataloader.sampler import START, Batch, EpochSampler
from dataloader.sources import EncodedImages, ImageSource
from dataloader.storage.cache import open_cache
from dataloader.storage.identity import fingerprint, relative_names, stamps
from dataloader.storage.stream import ShardStream, StreamDataset
from dataloader.token_table import TokenTable, random_numbers, tokenize
from utils.device import IdleClock
from utils.errors import UserError
from utils.image_loader import Failure, start_worker, usable_workers
from utils.images import UnreadableImageError
from utils.text import one_line

MAX_REPLACEMENTS = 100


class OpenedData(NamedTuple):
    """The data of a run; the validation and class sets are optional."""

    train: CaptionSet | ShardStream
    val: CaptionSet | None
    classes: ClassificationSet | None

    def count(self, context_length: int) -> dict[str, dict[str, Any]]:
        """Return `count_captions` of the sets that are not a stream, by "train" and "val"."""
        sets = {"train": self.train, "val": self.val}
        return {
            name: count_captions(found, context_length) for name, found in sets.items() if isinstance(found, CaptionSet)
        }

    def identify(self) -> str:
        """Return "N images, M captions, fingerprint F", by which a checkpoint tells the training set from others.

        The fingerprint covers, in order, the images' names below their common folder, their sizes in bytes (in shards
        also the checksums) and their captions; of a stream the shards' names.
        """
        train = self.train
        if isinstance(train, ShardStream):
            names = relative_names([url.partition("?")[0] for url in train.urls])  # without a signature
            return f"{train.num_images} images, fingerprint {fingerprint(names)}"
        paths, shards = [image.path for image in train.images], train.shards
        contents = shards.contents() if shards else [stamps(paths)[:, 0]]
        counts = np.array([len(image.captions) for image in train.images], dtype=np.int64)
        captions = [caption for image in train.images for caption in image.captions]
        value = fingerprint(relative_names(paths), *contents, counts, captions)
        return f"{train.num_images} images, {train.num_captions} captions, fingerprint {value}"


def open_data(config: DataConfig) -> OpenedData:
    """Find the images and captions that the configuration names. Raises UserError if any are missing."""
    if config.format == "stream":
        train: CaptionSet | ShardStream = ShardStream(config.train_img_dir, config.stream_num_images)
    else:
        train = open_captions(config.captions("train"))
    val, class_dir = config.captions("val") and open_captions(config.captions("val")), config.val_class_dir
    if val and not config.allow_missing:
        require_complete(val.num_images + len(val.missing), val.missing, config.max_unreadable_share)
    classes = class_dir and load_class_folders(Path(class_dir), flag="--set dataloader.val_class_dir")
    return OpenedData(train, val, classes)


class CaptionDataset(Dataset):
    """Training batches by lists of (epoch, index): images, and one caption of each.

    `max_unreadable`: the run ends when more images are unreadable. `advice`: what would make reading faster.
    """

    crop_on_device = False  # then batches have the source's squares, which the device crops

    def __init__(
        self,
        source: ImageSource,
        captions: TokenTable,
        augmentation: Augmentation,
        *,
        seed: int,
        max_unreadable: float = 0.0,
        advice: str = "",
    ) -> None:
        self.source = source
        self.captions = captions
        self.augmentation = augmentation
        self.seed = seed
        self.max_unreadable = max_unreadable
        self.advice = advice

    def on(self, device: torch.device) -> "CaptionDataset":
        """Return the dataset for training on `device`. A GPU crops squares itself, and may hold a pixel cache."""
        dataset = copy.copy(self)
        dataset.source = self.source.hold_on(device)
        dataset.crop_on_device = device.type == "cuda" and self.source.side is not None
        return dataset

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """Read the batch of `keys`, pairs (epoch, index) of one epoch.

        `images`: uint8 [batch, 3, size, size] in channels_last memory format, cropped to the model's size; with
        `crop_on_device`, the source's squares; empty if a GPU holds the pixels. `tokens`: int64 [batch, length], a
        random caption of each image, with masked tokens. `indices`: int64 [batch]. `draws`: float64 [batch, NUM_DRAWS],
        the random numbers of (seed, epoch, index).

        An unreadable image is listed in `failures` and replaced by a random other one: `images`, `tokens` and `indices`
        are those of the replacement, `draws` those of the original.
        """
        epoch, indices = keys[0][0], np.array([index for _, index in keys])
        draws = random_numbers(self.seed, epoch, indices, NUM_DRAWS)
        images, indices, failures = self._read_images(epoch, indices, draws)
        tokens = self.captions.draw(indices, draws[:, CAPTION])
        tokens = self.augmentation.mask_tokens(tokens, self.seed, epoch, indices)
        return Batch(images, tokens, torch.from_numpy(indices), draws, failures)

    def _read_images(
        self, epoch: int, indices: np.ndarray, draws: np.ndarray
    ) -> tuple[Tensor, np.ndarray, list[Failure]]:
        """Return the images of a batch, the indices that were read, int64 [batch], and the failures."""
        source, augmentation = self.source, self.augmentation
        if self.crop_on_device or (source.side == augmentation.size and not augmentation.is_random):
            squares = source.read_squares(indices)
            if squares is not None:
                return squares, indices, []
        size = source.side if self.crop_on_device else augmentation.size
        images = torch.empty(len(indices), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # channels_last
        read, failures = np.empty_like(indices), []
        for row, index in enumerate(indices.tolist()):
            image, read[row], failed = self._read_or_replace(epoch, index)
            images[row].copy_(image if self.crop_on_device else augmentation.crop(image, draws[row]))
            failures += failed
        return images, read, failures

    def _read_or_replace(self, epoch: int, index: int) -> tuple[Tensor, int, list[Failure]]:
        """Return an image, or a random other one if it is unreadable, the index of that one, and the failures."""
        failures: list[Failure] = []
        rng = None
        while len(failures) < MAX_REPLACEMENTS:
            try:
                return self.source.read(index), index, failures
            except UnreadableImageError as error:
                failures.append(Failure(self.source.name(index), str(error)))
                rng = rng or np.random.default_rng((self.seed, epoch, index))
                index = int(rng.integers(len(self.source)))
        size = self.source.side or self.augmentation.size
        return torch.zeros(3, size, size, dtype=torch.uint8), index, failures  # `TrainLoader` raises on these failures


def open_dataset(
    train_set: CaptionSet | ShardStream,
    config: DataConfig,
    sampler: EpochSampler,
    *,
    image_size: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    context_length: int,
    num_workers: int,
    logger: logging.Logger,
) -> CaptionDataset | StreamDataset:
    """Return the dataset of a training set. Builds the cache if one is configured and not there yet.

    `image_size`, in pixels, `image_mean` and `image_std`, of RGB in [0, 1], and `context_length`, in tokens, are the
    model's; `num_workers` processes build the cache. Raises UserError if the cache is unusable.
    """
    augmentation = Augmentation(config, image_size, image_mean, image_std)
    max_unreadable = config.max_unreadable_share * train_set.num_images
    if isinstance(train_set, ShardStream):
        if sampler.start != START:
            logger.warning("a stream cannot continue at its position: its shards are read in a new order from here")
        return StreamDataset(train_set.urls, augmentation, sampler, context_length, max_unreadable)
    tokens_file, advice = None, ""
    if config.cache != "none":
        num_workers = usable_workers(num_workers)
        train_set, source, tokens_file = open_cache(train_set, config, image_size, num_workers, logger)
    else:
        shards = train_set.shards
        source = EncodedImages(train_set.files, image_size, shards and shards.side)
        gib = train_set.num_images * image_size**2 * 3 / 2**30
        if not shards:
            advice = f"--set dataloader.cache=pixels would save it, with {gib:.1f} GiB in {config.cache_dir}"
    captions = tokenize([image.captions for image in train_set.images], context_length, tokens_file, logger)
    options = {"seed": sampler.seed, "max_unreadable": max_unreadable, "advice": advice}
    return CaptionDataset(source, captions, augmentation, **options)


class TrainLoader:
    """Iterate over the batches of a run on `device`, augmented and normalized, one batch ahead of the caller.

    `wait` sums the time that the device spent waiting for data, and `advice` says how to shorten it, or is empty. Logs
    each unreadable image once; raises UserError if there are more than `dataset.max_unreadable`.
    """

    def __init__(
        self,
        dataset: CaptionDataset | StreamDataset,
        sampler: EpochSampler,
        device: torch.device,
        num_workers: int,
        logger: logging.Logger,
    ) -> None:
        self.dataset = dataset.on(device)
        is_stream = isinstance(dataset, StreamDataset)
        batching = {"batch_size": None} if is_stream else {"batch_sampler": sampler}
        self.loader = DataLoader(
            self.dataset,
            **batching,
            collate_fn=_identity,
            num_workers=usable_workers(min(num_workers, dataset.max_workers) if is_stream else num_workers),
            pin_memory=device.type == "cuda",
            worker_init_fn=start_worker,
            generator=torch.Generator().manual_seed(sampler.seed),  # leaves torch's default generator unchanged
        )
        self.num_batches = len(sampler)
        self.device = device
        self.logger = logger
        self.advice = dataset.advice
        self.wait = IdleClock(device)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.copies:
            self.copies.wait_stream(torch.cuda.current_stream(device))  # which copied the pixels that the GPU holds
        if self.dataset.source.note:
            logger.info(self.dataset.source.note)
        self.unreadable: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        batches = islice(self.loader, self.num_batches)
        ahead = self._next(batches)
        while ahead is not None:
            self._await_copy(ahead)
            batch, ahead = ahead, self._next(batches)  # the next batch is copied while this one is used
            images, augmentation = batch.images, self.dataset.augmentation
            if self.dataset.crop_on_device:
                images = augmentation.crop_squares(images, batch.draws)
            yield batch._replace(images=augmentation.finish(images, batch.draws))

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        with self.wait:
            batch = next(batches, None)
        if batch is None:
            return None
        if not len(batch.images):
            path, reason = batch.failures[-1]
            raise UserError(
                f"the stream has too few images with captions (the last sample, {one_line(path)}: {one_line(reason)}); "
                "check its shards"
            )
        self._report(batch.failures)
        with torch.cuda.stream(self.copies):  # beside the computation; without a GPU this does nothing
            images = self.dataset.source.to_device(batch.images, batch.indices, self.device)
            tokens = batch.tokens.to(self.device, non_blocking=True)
        return batch._replace(images=images, tokens=tokens)

    def _await_copy(self, batch: Batch) -> None:
        """Let the computation begin once the copy of the batch is complete, and keep its memory until it is used."""
        if self.copies:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self.copies)
            batch.images.record_stream(stream)
            batch.tokens.record_stream(stream)

    def _report(self, failures: Sequence[Failure]) -> None:
        for path, reason in failures:
            if path not in self.unreadable:
                self.unreadable.add(path)
                self.logger.warning(f"skipped {one_line(path)}: {reason}")
        if len(self.unreadable) > self.dataset.max_unreadable:
            raise UserError(
                f"{len(self.unreadable)} training images are unreadable (the last: {failures[-1].path}); repair them, "
                "or allow more with --set dataloader.max_unreadable_share=SHARE"
            )


def _identity(batch: Batch) -> Batch:
    return batch

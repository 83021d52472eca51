"""Batches for training and evaluation.

Everything random about a training sample is drawn from (seed, epoch, index), so that the number of workers and of
devices never changes the data.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataloader.captions import CaptionedImage
from dataloader.config import DataConfig
from dataloader.images import UnreadableImageError, load_image, load_pixels, normalize, to_tensor
from utils.errors import UserError
from utils.tokenizer import get_tokenizer

MAX_REPLACEMENTS = 100
ImageSource = str | Path | Image.Image


class Failure(NamedTuple):
    """A file that could not be read."""

    path: str
    reason: str


class Sample(NamedTuple):
    """One image, one of its captions, and the files that failed before this one was readable."""

    image: Tensor  # uint8 [3, size, size]
    caption: str
    image_id: int | str
    failures: list[Failure]


class Batch(NamedTuple):
    """A training batch; `images` are uint8 until `TrainLoader` has normalized them on the device."""

    images: Tensor  # [batch, 3, size, size]
    tokens: Tensor  # int64 [batch, length]
    image_ids: list[int | str]
    failures: list[Failure]


class CaptionDataset(Dataset):
    """Image and random caption by (epoch, index). An unreadable image gives its place to another, drawn at random."""

    def __init__(self, images: Sequence[CaptionedImage], *, image_size: int, seed: int) -> None:
        self.images = images
        self.image_size = image_size
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        failures = []
        for _ in range(MAX_REPLACEMENTS):
            image = self.images[index]
            caption = image.captions[rng.integers(len(image.captions))]
            try:
                pixels = load_pixels(image.path, self.image_size)
                return Sample(pixels, caption, image.image_id, failures)
            except UnreadableImageError as error:
                failures.append(Failure(image.path, str(error)))
                index = int(rng.integers(len(self.images)))
        # So many failures are over every allowed share: `TrainLoader` ends the run before this blank is used.
        return Sample(torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), "", -1, failures)


class EpochBatchSampler:
    """Batches of (epoch, index) for a whole run: each epoch a new permutation, cut to `batches_per_epoch`.

    One stream for all epochs, so that the workers read on where one ends and the next begins.
    """

    def __init__(
        self, num_samples: int, *, batch_size: int, batches_per_epoch: int, num_epochs: int, seed: int
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.num_epochs = num_epochs
        self.seed = seed

    def __len__(self) -> int:
        return self.num_epochs * self.batches_per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.num_epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples).tolist()
            for start in range(0, self.batches_per_epoch * self.batch_size, self.batch_size):
                yield [(epoch, index) for index in order[start : start + self.batch_size]]


class TrainLoader:
    """Iterates over a run's training batches on `device`, normalized, one ahead of the loop.

    `wait_seconds` is how long the loop has waited for data. Each unreadable image is told to `warn` once; more
    than `max_unreadable_share` of the images raise UserError.
    """

    def __init__(
        self,
        images: Sequence[CaptionedImage],
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
        warn: Callable[[str], None],
    ) -> None:
        self.loader = DataLoader(
            CaptionDataset(images, image_size=image_size, seed=seed),
            batch_sampler=EpochBatchSampler(
                len(images),
                batch_size=batch_size,
                batches_per_epoch=batches_per_epoch,
                num_epochs=num_epochs,
                seed=seed,
            ),
            collate_fn=partial(_collate, context_length=context_length),
            num_workers=_usable_workers(num_workers),
            pin_memory=device.type == "cuda",
        )
        self.normalize = partial(normalize, mean=config.image_mean, std=config.image_std)
        self.device = device
        self.max_unreadable = config.max_unreadable_share * len(images)
        self.unreadable: set[str] = set()
        self.warn = warn
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        ahead = self._next(batches)
        while ahead is not None:
            batch, ahead = ahead, self._next(batches)  # the next one's copy to the device is under way
            yield batch._replace(images=self.normalize(batch.images))

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        start = time.perf_counter()
        batch = next(batches, None)
        self.wait_seconds += time.perf_counter() - start
        if batch is None:
            return None
        self._report(batch.failures)
        images, tokens = (tensor.to(self.device, non_blocking=True) for tensor in (batch.images, batch.tokens))
        return batch._replace(images=images, tokens=tokens)

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


def _collate(samples: Sequence[Sample], context_length: int) -> Batch:
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        tokens=get_tokenizer()([sample.caption for sample in samples], context_length=context_length),
        image_ids=[sample.image_id for sample in samples],
        failures=[failure for sample in samples for failure in sample.failures],
    )


class ImageDataset(Dataset):
    """Preprocessed images by index, each decoded in full: what is measured on them compares with other tools."""

    def __init__(self, sources: Sequence[ImageSource], image_size: int) -> None:
        self.sources = sources
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Failure]:
        try:
            return index, to_tensor(load_image(self.sources[index], self.image_size))
        except UnreadableImageError as error:
            return index, Failure(str(self.sources[index]), str(error))


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
    ) -> None:
        self.loader = DataLoader(
            ImageDataset(sources, image_size),
            batch_size=batch_size,
            collate_fn=_collate_images,
            num_workers=_usable_workers(num_workers) if len(sources) > batch_size else 0,
            pin_memory=device.type == "cuda",
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


def _usable_workers(num_workers: int) -> int:
    """Return at most as many workers as there are cores; more only get in each other's way."""
    return min(num_workers, os.cpu_count() or 1)

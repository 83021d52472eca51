"""Shards that are read as they come, from a disk, a pipe or the web: data sets larger than one disk."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dataloader.augment import CAPTION, NUM_DRAWS, Augmentation
from dataloader.batch import Batch, Failure
from dataloader.order import EpochBatchSampler
from dataloader.shards import IMAGE_MEMBERS, texts_of
from dataloader.tables import random_numbers
from utils.errors import UserError
from utils.images import UnreadableImageError, read_pixels
from utils.tokenizer import get_tokenizer

SHUFFLE_BUFFER = 2000  # samples, of encoded images, in each worker


class ShardStream:
    """Any number of shards: paths or addresses with braces ({00000..00099}), or pipe:COMMAND. Needs `webdataset`.

    Raises UserError if the package is not installed, or the number of images is told neither by the caller nor by a
    `sizes.json` beside the shards.
    """

    def __init__(self, urls: str, num_images: int | None) -> None:
        try:
            import webdataset
        except ImportError:
            raise UserError("format stream needs a package more: pip install webdataset") from None
        self.urls = webdataset.shardlists.expand_urls(urls)
        self.num_shards = len(self.urls)
        sizes = Path(urls).parent / "sizes.json"
        if num_images is None and sizes.is_file():
            counts = json.loads(sizes.read_bytes())
            num_images = sum(counts.get(Path(url).name, 0) for url in self.urls)
        if not num_images:
            raise UserError(
                "data_config.yaml: stream_num_images is not set, and no sizes.json beside the shards "
                f"{urls} counts their images; set it to the number of images of an epoch"
            )
        self.num_images = num_images

    def describe(self) -> str:
        """Return what the run will say of its data."""
        return f"a stream of {self.num_shards:,} shards, {self.num_images:,} images an epoch"


class StreamDataset(IterableDataset):
    """Endless batches of a stream: shards in a new order each time round, split by process and worker, then shuffled.

    Which worker reads which shard, and so the batches, depends on the number of workers and processes; for a given
    number, the same seed and start give the same batches.
    """

    def __init__(
        self,
        stream: ShardStream,
        augmentation: Augmentation,
        order: EpochBatchSampler,
        *,
        context_length: int,
    ) -> None:
        self.urls = stream.urls
        self.augmentation = augmentation
        self.batch_size = order.batch_size
        self.context_length = context_length
        self.seed = (order.seed, order.start_epoch, order.start_sample, order.rank)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = np.random.default_rng((*self.seed, 0 if worker is None else worker.id))
        own_seed = int(rng.integers(2**31))
        samples = self._samples(rng)
        indices = np.arange(self.batch_size)
        number = 0
        while True:
            draws = random_numbers(own_seed, number, indices, NUM_DRAWS)
            images, captions, failures = [], [], []
            while len(images) < self.batch_size:
                sample = next(samples)
                own = draws[len(images)]
                suffix = next((suffix for suffix in IMAGE_MEMBERS if suffix in sample), None)
                _, texts = texts_of(sample, sample["__key__"])
                if suffix is None or not texts:
                    failures.append(Failure(f"{sample['__url__']}/{sample['__key__']}", "has no image or no caption"))
                    continue
                try:
                    image = read_pixels(io.BytesIO(sample[suffix]), self.augmentation.size)
                except UnreadableImageError as error:
                    failures.append(Failure(f"{sample['__url__']}/{sample['__key__']}", str(error)))
                    continue
                images.append(self.augmentation.crop(image, own).permute(1, 2, 0))
                captions.append(texts[int(own[CAPTION] * len(texts))])
            tokens = get_tokenizer()(captions, context_length=self.context_length)
            tokens = self.augmentation.vary_texts(tokens, own_seed, number, indices)
            places = torch.full((self.batch_size,), -1)
            yield Batch(torch.stack(images).permute(0, 3, 1, 2), tokens, places, draws, failures)
            number += 1

    def _samples(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Yield this worker's samples for ever."""
        import webdataset

        mine = list(webdataset.split_by_worker(webdataset.split_by_node(self.urls)))
        if not mine:
            raise UserError(f"{len(self.urls)} shards are too few for so many processes; use more shards")

        def shards() -> Iterator[dict[str, str]]:
            while True:
                yield from ({"url": mine[number]} for number in rng.permutation(len(mine)))

        read = webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue)
        shuffle = webdataset.shuffle(SHUFFLE_BUFFER, rng=random.Random(int(rng.integers(2**31))))
        return iter(shuffle(read(shards())))

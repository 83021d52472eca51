"""Read shards in sequence from a disk, a pipe or the web, for data sets larger than one disk."""

import io
import json
import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dataloader.augment import CAPTION, NUM_DRAWS, Augmentation
from dataloader.sampler import Batch, EpochSampler
from dataloader.sources import ImageSource
from dataloader.storage.shards import IMAGE_MEMBERS, texts_of
from dataloader.token_table import random_numbers
from utils.errors import UserError
from utils.image_loader import Failure
from utils.images import UnreadableImageError, read_pixels
from utils.tokenizer import get_tokenizer

SHUFFLE_BUFFER = 2000  # encoded samples of each worker
MAX_FAILURES = 100  # unreadable samples in a row, if `max_unreadable` is less


class ShardStream:
    """Shards to read in sequence. `urls`: paths or addresses with braces ({00000..00099}), or pipe:COMMAND.

    `num_images`: of an epoch; None counts them in a `sizes.json` beside the shards. Raises UserError if neither is
    known, a shard on a disk is missing, or the package `webdataset` is not installed.
    """

    def __init__(self, urls: str, num_images: int | None) -> None:
        try:
            import webdataset
        except ImportError:
            raise UserError("format stream needs another package: pip install webdataset") from None
        self.urls = webdataset.shardlists.expand_urls(urls)
        self.num_shards = len(self.urls)
        missing = [url for url in self.urls if not (":" in url or Path(url).is_file())]
        if missing:
            raise UserError(
                f"{len(missing):,} of the {self.num_shards:,} shards do not exist (e.g. {missing[0]}); check "
                "--train_img_dir"
            )
        sizes = Path(urls).parent / "sizes.json"
        if num_images is None and sizes.is_file():
            counts = json.loads(sizes.read_bytes())
            num_images = sum(counts.get(Path(url).name, 0) for url in self.urls)
        if not num_images:
            raise UserError(
                f"the number of images in {urls} is unknown, since no sizes.json is beside the shards; give the number "
                "of an epoch: --set dataloader.stream_num_images=N"
            )
        self.num_images = num_images

    def describe(self) -> str:
        """Return a line with the number of shards and images."""
        return f"a stream of {self.num_shards:,} shards, {self.num_images:,} images per epoch"


class StreamDataset(IterableDataset):
    """Endless training batches of a stream; each pass reads the shards in a new order.

    A batch without images, and the last one, says in `failures` why no sample of the stream can be read.

    Shards are split by process and worker, then shuffled in a buffer: the same seed, start, number of processes and of
    workers give the same batches. The other attributes are those of `CaptionDataset`.
    """

    source = ImageSource()
    captions = None
    crop_on_device = False
    advice = ""

    def __init__(
        self,
        urls: Sequence[str],
        augmentation: Augmentation,
        sampler: EpochSampler,
        context_length: int,
        max_unreadable: float = 0.0,
    ) -> None:
        self.urls = urls
        self.augmentation = augmentation
        self.batch_size = sampler.layout.batch_size
        self.seed = (sampler.seed, *sampler.start, sampler.layout.rank)
        self.max_workers = len(urls) // sampler.layout.world_size  # a worker needs a shard
        self.context_length = context_length
        self.max_unreadable = max_unreadable

    def on(self, device: torch.device) -> "StreamDataset":
        """Return the dataset for training on `device`."""
        return self

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = np.random.default_rng((*self.seed, 0 if worker is None else worker.id))
        seed = int(rng.integers(2**31))
        samples = self._samples(rng)
        rows = np.arange(self.batch_size)
        for number in count():
            draws = random_numbers(seed, number, rows, NUM_DRAWS)
            images, captions, failures = [], [], []
            while len(images) < self.batch_size:
                sample = next(samples, None)
                if sample is None or len(failures) > max(self.max_unreadable, MAX_FAILURES):
                    nothing = torch.empty(0, dtype=torch.int64)
                    yield Batch(nothing, nothing, nothing, draws[:0], failures)
                    return
                try:
                    image, texts = _decode(sample, self.augmentation.size)
                except UnreadableImageError as error:
                    failures.append(Failure(f"{sample['__url__']}/{sample['__key__']}", str(error)))
                    continue
                own = draws[len(images)]
                images.append(self.augmentation.crop(image, own).permute(1, 2, 0))
                captions.append(texts[int(own[CAPTION] * len(texts))])
            tokens = get_tokenizer()(captions, context_length=self.context_length)
            tokens = self.augmentation.mask_tokens(tokens, seed, number, rows)
            unknown = torch.full((self.batch_size,), -1)
            yield Batch(torch.stack(images).permute(0, 3, 1, 2), tokens, unknown, draws, failures)

    def _samples(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Yield the samples of this worker's shards, with their `__captions__`, until a pass has no usable one."""
        import webdataset

        urls = list(webdataset.split_by_worker(webdataset.split_by_node(self.urls)))
        if not urls:
            raise UserError(f"{len(self.urls)} shards are too few for this number of processes; make more shards")

        read = webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue)

        def passes() -> Iterator[dict[str, Any]]:
            is_usable = True
            while is_usable:
                is_usable = False
                for sample in read({"url": urls[number]} for number in rng.permutation(len(urls))):
                    _, sample["__captions__"] = texts_of(sample, sample["__key__"])
                    is_usable |= bool(sample["__captions__"]) and not sample.keys().isdisjoint(IMAGE_MEMBERS)
                    yield sample

        shuffle = webdataset.shuffle(SHUFFLE_BUFFER, rng=random.Random(int(rng.integers(2**31))))
        return iter(shuffle(passes()))


def _decode(sample: dict[str, Any], size: int) -> tuple[Tensor, list[str]]:
    """Return the image as `read_pixels` does, and its captions. Raises UnreadableImageError."""
    data = next((sample[suffix] for suffix in IMAGE_MEMBERS if suffix in sample), None)
    if data is None or not sample["__captions__"]:
        raise UnreadableImageError("has no image or no caption")
    return read_pixels(io.BytesIO(data), size), sample["__captions__"]

"""Read images in order for inference: decoded at full size, batched and normalized; unreadable ones are listed."""

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.images import ImageLike, ImageList, UnreadableImageError, load_image, normalize, to_tensor


class Failure(NamedTuple):
    """An image that could not be read."""

    path: str
    reason: str


class Preprocessing(NamedTuple):
    """How a model's images are prepared."""

    image_size: int  # pixels per side
    mean: Sequence[float]  # of RGB in [0, 1]
    std: Sequence[float]
    load: Callable[[ImageLike, int], Image.Image] = load_image  # (image, size) -> square RGB picture


class ImageDataset(Dataset):
    """Preprocessed images by index: (index, uint8 [3, size, size]), or (index, Failure)."""

    def __init__(self, images: Sequence[ImageLike], preprocessing: Preprocessing) -> None:
        self.images = ImageList(images) if isinstance(images, list | tuple) else images
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Failure]:
        try:
            picture = self.preprocessing.load(self.images[index], self.preprocessing.image_size)
        except UnreadableImageError as error:
            return index, Failure(self.images.name(index), str(error))
        return index, to_tensor(picture)


class ImageLoader:
    """Iterate over (indices int64 [batch], images float32 [batch, 3, size, size]) on `device`, in order.

    `images`: a list, or a sequence with a method `name(index)` for messages; indices are positions in it. Unreadable
    images are left out and listed in `failures`. `num_workers`: threads on a CPU, processes beside a GPU (0: none).
    """

    def __init__(
        self,
        images: Sequence[ImageLike],
        preprocessing: Preprocessing,
        batch_size: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self.dataset = ImageDataset(images, preprocessing)
        self.batch_size = batch_size
        self.num_workers = usable_workers(num_workers)
        self.device = device
        self.failures: list[Failure] = []

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.failures = []
        preprocessing = self.dataset.preprocessing
        batches = self._thread_batches() if self.device.type == "cpu" else self._worker_batches()
        for indices, images, failures in batches:
            self.failures += failures
            if len(indices):
                pixels = images.to(self.device, non_blocking=True)
                yield indices.to(self.device), normalize(pixels, preprocessing.mean, preprocessing.std)

    def _thread_batches(self) -> Iterator[tuple[Tensor, Tensor, list[Failure]]]:
        """Read each batch with threads when it is asked for, without prefetching.

        All cores read, then all cores compute. Worker processes would compete with the model for the cores, and copy
        each image once more. One thread reads pictures in memory: they take so little time that several threads would
        wait for Python's global lock.
        """
        images = self.dataset.images
        is_decoded = isinstance(images, ImageList) and isinstance(images[0], Image.Image)
        num_threads = 1 if is_decoded else max(1, self.num_workers)
        with ThreadPoolExecutor(num_threads) as pool:  # decoding and resizing release Python's global lock
            map_items = pool.map if num_threads > 1 else map
            for indices in torch.arange(len(images)).split(self.batch_size):
                yield _collate(list(map_items(self.dataset.__getitem__, indices.tolist())))

    def _worker_batches(self) -> DataLoader:
        """Read batches ahead with worker processes, while the GPU computes."""
        return DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            collate_fn=_collate,
            num_workers=self.num_workers if len(self) > 1 else 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # leaves torch's default generator unchanged
        )


def start_worker(worker_id: int) -> None:
    """Ignore signals in a worker process, and keep the garbage collector off inherited objects.

    The main process handles the signals. The collector writes to objects, which copies the memory they share with it.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    gc.freeze()


def usable_workers(num_workers: int) -> int:
    """Return `num_workers`, limited to the number of cores."""
    return max(0, min(num_workers, os.cpu_count() or 1))


def _collate(items: Sequence[tuple[int, Tensor | Failure]]) -> tuple[Tensor, Tensor, list[Failure]]:
    """Return the indices and pixels of the readable images of a batch, and the failures."""
    readable = [(index, image) for index, image in items if isinstance(image, Tensor)]
    indices = torch.tensor([index for index, _ in readable], dtype=torch.int64)
    images = torch.stack([image for _, image in readable]) if readable else torch.empty(0, dtype=torch.uint8)
    return indices, images, [item for _, item in items if isinstance(item, Failure)]

"""Images to evaluate: in order, decoded in full, what cannot be read told apart."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataloader.batch import Failure
from dataloader.shards import name_of
from dataloader.workers import start_worker, usable_workers
from utils.errors import UserError
from utils.images import ImageSource, UnreadableImageError, load_image, normalize, to_tensor


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
            return index, Failure(name_of(self.sources, index), str(error))


class ThreadedLoader:
    """Batches read by threads, none ahead: where the model computes on the CPU, all cores read, then all compute.

    Processes that read beside it would take turns with its threads, and copy every image once more. One thread is the
    caller's own: enough for what is quickly read, where several would wait for their turn with the interpreter.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, num_threads: int) -> None:
        self.dataset = dataset
        self.batches = torch.arange(len(dataset)).split(batch_size)
        self.num_threads = num_threads

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[Failure]]]:
        with ThreadPoolExecutor(self.num_threads) as pool:  # decoding and resizing let other threads run
            map_items = pool.map if self.num_threads > 1 else map
            for indices in self.batches:
                yield _collate_images(list(map_items(self.dataset.__getitem__, indices.tolist())))


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
        dataset, num_workers = ImageDataset(sources, image_size, load), usable_workers(num_workers)
        if device.type == "cpu":
            is_decoded = isinstance(sources, list) and isinstance(sources[0], Image.Image)
            self.loader = ThreadedLoader(dataset, batch_size, 1 if is_decoded else max(1, num_workers))
        else:
            self.loader = DataLoader(
                dataset,
                batch_size=batch_size,
                collate_fn=_collate_images,
                num_workers=num_workers if len(sources) > batch_size else 0,
                pin_memory=True,
                worker_init_fn=start_worker,
                generator=torch.Generator(),  # torch's own is left as it is
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

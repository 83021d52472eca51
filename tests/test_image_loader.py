"""Images for inference: in order, on any number of workers, with the unreadable ones listed."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.image_loader import ImageLoader, Preprocessing
from utils.images import ImageList, load_image, normalize, to_tensor

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CPU = torch.device("cpu")


def make_loader(images, num_workers: int = 0) -> ImageLoader:
    return ImageLoader(images, Preprocessing(16, MEAN, STD), batch_size=4, num_workers=num_workers, device=CPU)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_keep_their_order_and_failures_their_names(caption_files, num_workers):
    files = sorted(caption_files[0].iterdir())[:10]
    files[6].write_bytes(b"damaged")
    loader = make_loader([*files, Image.new("RGB", (20, 30))], num_workers)
    indices, images = (torch.cat(column) for column in zip(*loader, strict=True))
    assert len(loader) == 3
    assert indices.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10] and images.shape == (10, 3, 16, 16)
    expected = normalize(to_tensor(load_image(files[3], 16))[None], MEAN, STD)[0]
    assert np.array_equal(images[3], expected)
    assert [Path(failure.path) for failure in loader.failures] == [files[6]]


def test_worker_processes_give_the_same_batches(caption_files):
    files = sorted(caption_files[0].iterdir())[:10]
    files[6].write_bytes(b"damaged")
    loader = make_loader(files, num_workers=2)
    batches = list(loader._worker_batches())
    for ours, theirs in zip(loader._thread_batches(), batches, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2]


def test_a_batch_without_a_readable_image_is_left_out(tmp_path: Path):
    loader = make_loader([io.BytesIO(b"")] * 5 + [Image.new("RGB", (20, 30))])
    assert [indices.tolist() for indices, _ in loader] == [[5]]
    assert [failure.path for failure in loader.failures] == [f"image {index}" for index in range(5)]


def test_a_sequence_names_its_own_images(tmp_path: Path):
    class Archive(ImageList):
        def name(self, index: int) -> str:
            return f"archive/{index}"

    loader = make_loader(Archive([io.BytesIO(b"")]))
    assert list(loader) == [] and loader.failures[0].path == "archive/0"

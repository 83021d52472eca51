from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataloader.augment import Augmentation
from dataloader.captions import read_captions
from dataloader.config import load_data_config
from dataloader.data_loaders import CaptionDataset, TrainLoader
from dataloader.image_loader import ImageLoader
from dataloader.order import EpochBatchSampler
from dataloader.tables import PackedStrings, TokenTable
from tests.conftest import make_captions, make_order
from utils.errors import UserError
from utils.images import load_image, normalize, to_tensor

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CPU = torch.device("cpu")


def make_sampler(num_samples, *, num_epochs=3, seed=1) -> EpochBatchSampler:
    return make_order(num_samples, 5, num_epochs, seed)


def make_loader(files, *, num_workers=0, seed=3, num_epochs=2, share=0.0, told=None, **changes) -> TrainLoader:
    changes = {"image_mean": MEAN, "image_std": STD, "max_unreadable_share": share, **changes}
    caption_set, told = read_captions(*files), [] if told is None else told
    return TrainLoader(
        caption_set, load_data_config(list(changes.items())), make_order(caption_set.num_images, 5, num_epochs, seed),
        image_size=16, context_length=77, num_workers=num_workers, device=CPU,
        tell=told.append, warn=told.append,
    )  # fmt: skip


def test_every_image_comes_once_an_epoch_in_a_new_order():
    batches = list(make_sampler(20))
    assert len(batches) == len(make_sampler(20)) == 12
    epochs = [[index for batch in batches for epoch, index in batch if epoch == wanted] for wanted in range(3)]
    assert [sorted(order) for order in epochs] == [list(range(20))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches == list(make_sampler(20))
    assert batches != list(make_sampler(20, seed=2))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_comes_once_an_epoch_over_all_processes_and_workers(tmp_path: Path, world_size, num_workers):
    images = read_captions(*make_captions(tmp_path, size=(8, 8))).images
    config = load_data_config()
    epochs = [Counter(), Counter()]
    orders = []
    for rank in range(world_size):
        sampler = make_order(24, 4, rank=rank, world_size=world_size, seed=5)
        tokens = TokenTable([image.captions for image in images], 77)
        source = PackedStrings(image.path for image in images)
        dataset = CaptionDataset(source, tokens, Augmentation(config, 8), seed=5)
        batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda x: x, num_workers=num_workers))
        assert len(batches) == len(sampler)
        for number, batch in enumerate(batches):
            epochs[number // (len(sampler) // 2)].update(batch.indices.tolist())
        orders.append([batch.indices.tolist() for batch in batches])
    assert epochs == [Counter(range(24))] * 2
    whole = make_order(24, 4 * world_size, seed=5)
    together = [sum(parts, []) for parts in zip(*orders, strict=True)]
    assert together == [[index for _, index in batch] for batch in whole]  # as one process would have it


def test_what_does_not_fill_a_step_is_dropped():
    assert [len(batch) for batch in make_sampler(23, num_epochs=1)] == [5, 5, 5, 5]


def test_tokens_are_dropped_anew_each_epoch_and_nothing_else_changes(caption_files):
    plain, varied = (list(make_loader(caption_files, token_dropout=share)) for share in (0.0, 0.5))
    kept = set()
    for batch, expected in zip(varied, plain, strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.indices, expected.indices)
        is_kept = batch.tokens == expected.tokens
        assert (batch.tokens[~is_kept] == 0).all() and not is_kept.all()
        kept.update((int(index), tuple(row.tolist())) for index, row in zip(batch.indices, is_kept, strict=True))
    assert len(kept) > 24  # more than one way an image


def test_the_number_of_workers_does_not_change_the_data(caption_files):
    runs = [list(make_loader(caption_files, num_workers=num_workers)) for num_workers in (0, 1, 2)]
    assert len(runs[0]) == 8
    for run in runs[1:]:
        for batch, expected in zip(run, runs[0], strict=True):
            assert torch.equal(batch.indices, expected.indices)
            assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.images, expected.images)


def test_a_batch_holds_the_images_and_one_of_each_ones_captions(caption_files):
    caption_set = read_captions(*caption_files)
    batches = list(make_loader(caption_files, num_epochs=6))
    assert batches[0].tokens.dtype == torch.int64 and batches[0].tokens.shape[1] % 8 == 0
    for index, pixels in zip(batches[0].indices.tolist(), batches[0].images, strict=True):
        expected = to_tensor(load_image(caption_set.images[index].path, 16))
        torch.testing.assert_close(pixels, normalize(expected[None], MEAN, STD)[0])
    lengths = Counter(int((row > 0).sum()) for batch in batches for row in batch.tokens)
    assert len(lengths) > 1  # both wordings are drawn


def test_an_unreadable_image_is_replaced_and_told_once(tmp_path: Path):
    files = make_captions(tmp_path)
    (files[0] / "000000000003.png").write_bytes(b"")
    told = []
    batches = list(make_loader(files, num_workers=2, num_epochs=3, share=0.05, told=told))
    assert len(batches) == 12 and all(len(batch.images) == 5 and 3 not in batch.indices for batch in batches)
    assert len(told) == 1 and "000000000003.png" in told[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_images_end_the_run(tmp_path: Path, num_workers):
    files = make_captions(tmp_path)
    for index in range(4):
        (files[0] / f"{index:012}.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read .* more than max_unreadable_share"):
        list(make_loader(files, num_workers=num_workers, share=0.1))


def test_only_unreadable_images_end_the_run_before_a_blank_is_used(tmp_path: Path):
    files = make_captions(tmp_path)
    for file in files[0].iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        next(iter(make_loader(files, share=0.5)))


def test_waiting_is_measured(caption_files):
    loader = make_loader(caption_files)
    list(loader)
    assert 0 < loader.wait_seconds < 60


def image_loader(sources, num_workers=0):
    return ImageLoader(
        sources, image_size=16, image_mean=MEAN, image_std=STD, batch_size=4, num_workers=num_workers, device=CPU
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_to_evaluate_keep_their_order_and_failures_their_names(caption_files, num_workers):
    files = sorted(caption_files[0].iterdir())[:10]
    files[6].write_bytes(b"damaged")
    loader = image_loader([*files, Image.new("RGB", (20, 30))], num_workers)
    indices, images = (torch.cat(column) for column in zip(*loader, strict=True))
    assert indices.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10] and images.shape == (10, 3, 16, 16)
    expected = normalize(to_tensor(load_image(files[3], 16))[None], MEAN, STD)[0]
    assert np.array_equal(images[3], expected)
    assert [Path(failure.path) for failure in loader.failures] == [files[6]]


def test_nothing_readable_is_an_error(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="a.jpg: cannot be read as an image"):
        list(image_loader([tmp_path / "a.jpg"]))

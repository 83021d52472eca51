import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataloader.augment import Augmentation
from dataloader.captions import read_captions
from dataloader.config import load_data_config
from dataloader.data_loaders import MAX_REPLACEMENTS, CaptionDataset, OpenedData, TrainLoader, open_data
from dataloader.sampler import Position
from dataloader.sources import EncodedImages, ImageSource
from dataloader.token_table import tokenize
from tests.conftest import make_captions, make_sampler, open_loader
from utils.errors import UserError
from utils.images import UnreadableImageError, load_image, normalize, to_tensor

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def make_loader(files, *, seed=3, num_epochs=2, share=0.0, **options) -> TrainLoader:
    caption_set = read_captions(*files)
    sampler = make_sampler(caption_set.num_images, 5, num_epochs=num_epochs, seed=seed)
    return open_loader(
        caption_set, sampler, size=16, image_mean=MEAN, image_std=STD, max_unreadable_share=share, **options
    )


def test_every_image_comes_once_an_epoch_in_a_new_order():
    sampler = make_sampler(20, 5, num_epochs=3, seed=1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 12
    epochs = [[index for batch in batches for epoch, index in batch if epoch == wanted] for wanted in range(3)]
    assert [sorted(order) for order in epochs] == [list(range(20))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches == list(sampler) != list(make_sampler(20, 5, num_epochs=3, seed=2))


def test_a_training_set_is_identified_by_names_sizes_and_captions(tmp_path: Path):
    def identify(folder: Path) -> str:
        return OpenedData(read_captions(folder / "images", folder / "captions.json"), None, None).identify()

    make_captions(tmp_path / "a", num_images=4)
    original = identify(tmp_path / "a")
    assert original.startswith("4 images, 8 captions, fingerprint ")
    assert identify(shutil.copytree(tmp_path / "a", tmp_path / "moved")) == original
    names = [f"{number:012}.png" for number in range(5)]
    for number, change in enumerate([
        lambda folder: (folder / "images" / names[3]).write_bytes(b"damaged"),
        lambda folder: (folder / "captions.json").write_text(edited(folder, "colour", "color")),
        lambda folder: (folder / "images" / names[3]).rename(folder / "images" / names[4])
        and (folder / "captions.json").write_text(edited(folder, names[3], names[4])),
    ]):  # fmt: skip
        folder = shutil.copytree(tmp_path / "a", tmp_path / str(number))
        change(folder)
        assert identify(folder) != original


def edited(folder: Path, old: str, new: str) -> str:
    return (folder / "captions.json").read_text().replace(old, new)


def test_a_sampler_continues_at_its_start():
    whole = list(make_sampler(23, 2, batches_per_step=2, world_size=2, rank=1))
    sampler = make_sampler(23, 2, batches_per_step=2, world_size=2, rank=1, start=Position(0, 8))
    assert (sampler.layout.pairs_per_step, sampler.steps_per_epoch, sampler.num_steps) == (8, 2, 3)
    assert list(sampler) == whole[2:] and len(sampler) == 6
    assert [sampler.steps_left(Position(*position)) for position in ((0, 0), (0, 16), (1, 8), (2, 0))] == [2, 0, 1, 0]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 3), (2, 1), (3, 2)])
def test_every_image_comes_once_an_epoch_over_all_processes_and_workers(tmp_path: Path, world_size, num_workers):
    caption_set = read_captions(*make_captions(tmp_path, size=(8, 8)))
    tokens = tokenize([image.captions for image in caption_set.images], 77)
    dataset = CaptionDataset(
        EncodedImages(caption_set.files, 8, None), tokens, Augmentation(load_data_config(), 8, MEAN, STD), seed=5
    )
    epochs = [Counter(), Counter()]
    orders = []
    for rank in range(world_size):
        sampler = make_sampler(24, 4, rank=rank, world_size=world_size, seed=5)
        batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda x: x, num_workers=num_workers))
        assert len(batches) == len(sampler)
        for number, batch in enumerate(batches):
            epochs[number // (len(sampler) // 2)].update(batch.indices.tolist())
        orders.append([batch.indices.tolist() for batch in batches])
    assert epochs == [Counter(range(24))] * 2
    whole = make_sampler(24, 4 * world_size, seed=5)
    together = [sum(parts, []) for parts in zip(*orders, strict=True)]
    assert together == [[index for _, index in batch] for batch in whole]  # the order of one process


def test_images_that_do_not_fill_a_step_are_dropped():
    assert [len(batch) for batch in make_sampler(23, 5, num_epochs=1)] == [5, 5, 5, 5]


def test_tokens_are_masked_anew_each_epoch_and_nothing_else_changes(caption_files):
    plain, varied = (list(make_loader(caption_files, token_dropout=share)) for share in (0.0, 0.5))
    kept = set()
    for batch, expected in zip(varied, plain, strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.indices, expected.indices)
        is_kept = batch.tokens == expected.tokens
        assert (batch.tokens[~is_kept] == 0).all() and not is_kept.all()
        kept.update((int(index), tuple(row.tolist())) for index, row in zip(batch.indices, is_kept, strict=True))
    assert len(kept) > 24  # images have several masks


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


def test_an_unreadable_image_is_replaced_and_logged_once(tmp_path: Path):
    files = make_captions(tmp_path)
    (files[0] / "000000000003.png").write_bytes(b"")
    messages = []
    batches = list(make_loader(files, num_workers=2, num_epochs=3, share=0.05, messages=messages))
    assert len(batches) == 12 and all(len(batch.images) == 5 and 3 not in batch.indices for batch in batches)
    assert len(messages) == 1 and "000000000003.png" in messages[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_images_end_the_run(tmp_path: Path, num_workers):
    files = make_captions(tmp_path)
    for index in range(4):
        (files[0] / f"{index:012}.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="4 training images are unreadable.* --set dataloader.max_unreadable_share"):
        list(make_loader(files, num_workers=num_workers, share=0.1))


def test_a_run_without_readable_images_ends_before_the_first_batch(tmp_path: Path):
    files = make_captions(tmp_path)
    for file in files[0].iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="unreadable"):
        next(iter(make_loader(files, share=0.5)))


def test_waiting_is_measured(caption_files):
    loader = make_loader(caption_files)
    list(loader)
    assert 0 < loader.wait.seconds() < 60


class Numbers(ImageSource):
    """Squares of one pixel, whose value is the index; some are unreadable."""

    side = 1

    def __init__(self, unreadable: set[int]) -> None:
        self.unreadable = unreadable

    def __len__(self) -> int:
        return 24

    def read(self, index: int) -> torch.Tensor:
        if index in self.unreadable:
            raise UnreadableImageError("unreadable")
        return torch.full((3, 1, 1), index, dtype=torch.uint8)

    def name(self, index: int) -> str:
        return f"number {index}"


def test_a_replacement_depends_on_seed_epoch_and_index_alone():
    tokens = tokenize([(f"number {index}",) for index in range(24)], 77)
    dataset = CaptionDataset(
        Numbers(set(range(1, 24, 2))), tokens, Augmentation(load_data_config(), 1, MEAN, STD), seed=7
    )
    batch = dataset.__getitems__([(2, index) for index in range(24)])
    for index, read in enumerate(batch.indices.tolist()):
        rng, expected = np.random.default_rng((7, 2, index)), index
        while expected % 2:
            expected = int(rng.integers(24))
        assert read == expected
    assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.indices)
    assert torch.equal(batch.tokens, tokens.draw(batch.indices.numpy(), batch.draws[:, 0]))
    assert {failure.path for failure in batch.failures} == {f"number {index}" for index in range(1, 24, 2)}
    (alone,) = dataset.__getitems__([(2, 5)]).indices.tolist()
    assert alone == batch.indices[5]


def test_the_search_for_a_replacement_ends():
    tokens = tokenize([("a number",)] * 24, 77)
    dataset = CaptionDataset(Numbers(set(range(24))), tokens, Augmentation(load_data_config(), 1, MEAN, STD), seed=7)
    batch = dataset.__getitems__([(0, 3)])
    assert len(batch.failures) == MAX_REPLACEMENTS and batch.images.shape == (1, 3, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "jpeg", "pixels"])
def test_spawned_workers_read_the_same_batches(tmp_path: Path, cache):
    loader = make_loader(make_captions(tmp_path), num_epochs=1, cache=cache, cache_dir=str(tmp_path / "cache"))
    spawned = DataLoader(
        loader.dataset,
        batch_sampler=loader.loader.batch_sampler,
        collate_fn=loader.loader.collate_fn,
        num_workers=1,
        multiprocessing_context="spawn",
        worker_init_fn=loader.loader.worker_init_fn,
    )
    for batch, expected in zip(spawned, loader.loader, strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.tokens, expected.tokens)


def test_the_data_of_a_configuration_are_opened(tmp_path: Path):
    train, val = make_captions(tmp_path / "train"), make_captions(tmp_path / "val", num_images=3)
    names = ("img_dir", "annotation_file")
    paths = {f"train_{name}": str(path) for name, path in zip(names, train, strict=True)}
    data = open_data(load_data_config(paths))
    assert (data.train.num_images, data.val, data.classes) == (24, None, None)
    paths |= {f"val_{name}": str(path) for name, path in zip(names, val, strict=True)}
    data = open_data(load_data_config({**paths, "val_class_dir": str(tmp_path / "train")}))
    assert (data.val.num_images, data.classes.classnames) == (3, ["images"])
    with pytest.raises(UserError, match="--set dataloader.val_class_dir .* does not exist"):
        open_data(load_data_config({**paths, "val_class_dir": str(tmp_path / "gone")}))

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloader.captions import read_captions
from dataloader.data_loaders import TrainLoader
from dataloader.sources import GPUPixels
from model.config import COCO_MEAN, COCO_STD
from tests.conftest import make_captions, make_sampler, open_loader
from utils.errors import UserError
from utils.images import load_image, normalize, to_tensor


def make_loader(files, folder, cache, **options) -> TrainLoader:
    caption_set = read_captions(*files)
    options = {"cache": cache, "cache_dir": str(folder), "max_unreadable_share": 0.1, **options}
    return open_loader(caption_set, make_sampler(caption_set.num_images, 8), **options)


@pytest.mark.slow
def test_the_pixel_cache_equals_the_references_preprocessing_on_photographs(data_dir, tmp_path: Path):
    coco = data_dir / "coco_mini"
    for split in ("train2017", "val2017"):
        files = (coco / split, coco / "annotations" / f"captions_{split}.json")
        loader = make_loader(files, tmp_path / split, "pixels", size=224)
        cache, images = loader.dataset.source, read_captions(*files).images
        stored = cache.read_squares(np.arange(len(images)))
        for pixels, image in zip(stored, images, strict=True):
            assert torch.equal(pixels, to_tensor(load_image(image.path, 224)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_pixel_cache_gives_the_batches_of_the_files(tmp_path: Path, num_workers):
    files = make_captions(tmp_path)
    cached = list(make_loader(files, tmp_path / "cache", "pixels", num_workers=num_workers))
    for batch, expected in zip(cached, make_loader(files, tmp_path, "none"), strict=True):
        assert torch.equal(batch.indices, expected.indices) and torch.equal(batch.tokens, expected.tokens)
        torch.testing.assert_close(batch.images, expected.images, atol=0.03, rtol=0)  # one grey level


@pytest.mark.parametrize("cache", ["jpeg", "pixels"])
def test_random_crops_of_a_cache_change_with_the_epoch_only(tmp_path: Path, cache):
    files = make_captions(tmp_path)
    for image in files[0].iterdir():
        Image.effect_noise((80, 60), 80).convert("RGB").save(image)
    runs = [
        list(make_loader(files, tmp_path / "cache", cache, num_workers=workers, augmentation="standard"))
        for workers in (0, 2)
    ]
    for batch, expected in zip(*runs, strict=True):
        assert torch.equal(batch.images, expected.images)
    by_epoch = [
        torch.cat([batch.images for batch in part])[torch.cat([batch.indices for batch in part]).argsort()]
        for part in (runs[0][:3], runs[0][3:])
    ]
    assert (by_epoch[0] != by_epoch[1]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("cache", ["jpeg", "pixels"])
def test_a_stale_cache_is_refused(tmp_path: Path, cache):
    files = make_captions(tmp_path)
    messages = []
    make_loader(files, tmp_path / "cache", cache, messages=messages)
    make_loader(files, tmp_path / "cache", cache, messages=messages)
    assert len([line for line in messages if "building the cache" in line]) == 1
    Image.effect_noise((48, 40), 90).save(files[0] / "000000000004.png")
    with pytest.raises(UserError, match="a pack of other images"):
        make_loader(files, tmp_path / "cache", cache)


@pytest.mark.parametrize("cache", ["jpeg", "pixels"])
def test_an_image_that_the_cache_could_not_read_is_replaced_with_its_captions(tmp_path: Path, cache):
    files = make_captions(tmp_path)
    (files[0] / "000000000023.png").write_bytes(b"damaged")
    messages = []
    loader = make_loader(files, tmp_path / "cache", cache, messages=messages)
    assert len([line for line in messages if "000000000023.png" in line]) == 1
    images = read_captions(*files).images
    seen = 0
    for batch in loader:
        for index, pixels, tokens in zip(batch.indices.tolist(), batch.images, batch.tokens, strict=True):
            shown = images[0 if index == 23 else index]  # the next one that can be read
            expected = normalize(to_tensor(load_image(shown.path, 32))[None], COCO_MEAN, COCO_STD)[0]
            assert (pixels - expected).abs().mean() < 0.05
            seen += index == 23
            assert tokens.max() == 49407
    assert seen == 2


def test_too_many_unreadable_images_are_refused(tmp_path: Path):
    files = make_captions(tmp_path)
    for number in range(5):
        (files[0] / f"{number:012}.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="5 of the 24 images were unreadable"):
        make_loader(files, tmp_path / "cache", "pixels")


def test_a_gpu_cache_without_a_gpu_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="there is no GPU"):
        make_loader(make_captions(tmp_path), tmp_path / "cache", "pixels", cache_device="gpu")


@pytest.mark.parametrize("augmentation", ["reference", "standard"])
def test_a_cache_that_the_device_holds_gives_the_same_batches(tmp_path: Path, augmentation):
    files = make_captions(tmp_path)
    held, read = (make_loader(files, tmp_path / "cache", "pixels", augmentation=augmentation) for _ in range(2))
    dataset = held.dataset  # as `CaptionDataset.on` makes it for a GPU with enough memory
    dataset.source, dataset.crop_on_device = GPUPixels(dataset.source, torch.device("cpu")), True
    for batch, expected in zip(held, read, strict=True):
        assert torch.equal(batch.indices, expected.indices) and torch.equal(batch.tokens, expected.tokens)
        torch.testing.assert_close(batch.images, expected.images, atol=0.03, rtol=0)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert pickle.loads(pickle.dumps(dataset)).source.gpu_pixels is None


def test_shards_are_not_cached_again(tmp_path: Path):
    files = make_captions(tmp_path)
    make_loader(files, tmp_path / "cache", "jpeg")
    shards = read_captions(tmp_path / "cache" / "shards_37")
    with pytest.raises(UserError, match="shards_37 contains shards"):
        open_loader(shards, make_sampler(24, 8), cache="pixels", cache_dir=str(tmp_path / "other"))

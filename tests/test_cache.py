import os
import pickle
import shutil
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


def built(messages: list[str]) -> list[str]:
    """Return why the cache was built, and forget the messages."""
    lines = [line.partition("since ")[2] for line in messages if line.startswith("building the cache")]
    messages.clear()
    return lines


def shows(loader: TrainLoader, files: tuple[Path, Path]) -> bool:
    """Return whether a loader's images are those of the files."""
    colours = [np.asarray(Image.open(image.path).convert("RGB"))[0, 0] for image in read_captions(*files).images]
    pixels = [loader.dataset.source.read(number)[:, 5, 5].tolist() for number in range(len(colours))]
    return np.abs(np.array(pixels) - np.array(colours, dtype=int)).max() <= 4  # JPEG


@pytest.mark.parametrize("cache", ["jpeg", "pixels"])
def test_a_cache_belongs_to_its_images(tmp_path: Path, cache):
    files, messages = make_captions(tmp_path / "a"), []
    for image in files[0].iterdir():
        Image.open(image).save(image, "BMP")  # of equal sizes
    folder, options = tmp_path / "cache", {"messages": messages}
    make_loader(files, folder, cache, **options)
    make_loader(files, folder, cache, **options)
    assert built(messages) == [""]
    shutil.copytree(tmp_path / "a", tmp_path / "copy")  # the same contents at other times
    (tmp_path / "copy").rename(tmp_path / "moved")
    files = tmp_path / "moved" / "images", tmp_path / "moved" / "captions.json"
    make_loader(files, folder, cache, **options)
    assert messages == [f"comparing 24 images, whose times have changed, with those of {next(folder.glob('*_3?'))}"]
    make_loader(files, folder, cache, **options)
    assert len(messages) == 1
    changed, before = files[0] / "000000000004.png", (files[0] / "000000000004.png").stat()
    shutil.copy(files[0] / "000000000005.png", changed)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shows(make_loader(files, folder, cache, **options), files)
    assert built(messages) == ["1 of 24 images have changed, e.g. 000000000004.png"]
    changed.write_bytes(changed.read_bytes() + b"0")
    make_loader(files, folder, cache, **options)
    assert len(messages) == 1 and built(messages) == ["1 of 24 images have changed, e.g. 000000000004.png"]
    other = make_captions(tmp_path / "b", num_images=20)
    assert shows(make_loader(other, folder, cache, **options), other)
    assert built(messages) == ["num_images was 24, is 20"]


@pytest.mark.parametrize("cache", ["jpeg", "pixels"])
def test_a_copied_cache_is_used_and_a_damaged_one_built_anew(tmp_path: Path, cache):
    files, messages = make_captions(tmp_path / "a"), []
    make_loader(files, tmp_path / "cache", cache)
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    (folder,) = (path for path in (tmp_path / "copy").iterdir() if path.is_dir())
    make_loader(files, tmp_path / "copy", cache, messages=messages)
    assert messages == [f"comparing {folder}, whose times have changed, with its checksums"]
    make_loader(files, tmp_path / "copy", cache, messages=messages)
    assert len(messages) == 1
    content = {"jpeg": "000000.tar", "pixels": "pixels.npy"}[cache]
    for name, reason in {content: "its ", "pack.json": "its pack.json", "sources.npz": "its sources.npz"}.items():
        (folder / name).write_bytes((folder / name).read_bytes()[:-3_000])
        messages.clear()
        assert shows(make_loader(files, tmp_path / "copy", cache, messages=messages), files)
        assert [line.startswith(reason) for line in built(messages)] == [True]


def test_a_pixel_cache_that_another_run_replaced_is_not_mapped(tmp_path: Path):
    loader = make_loader(make_captions(tmp_path / "a"), tmp_path / "cache", "pixels")
    make_loader(make_captions(tmp_path / "b", num_images=20), tmp_path / "cache", "pixels")
    with pytest.raises(UserError, match=r"another run replaced .*pixels.npy"):
        next(iter(loader))


def test_a_cache_that_cannot_be_written_is_refused_with_the_setting(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written .* --set dataloader.cache_dir=DIR"):
        make_loader(make_captions(tmp_path), tmp_path / "file", "pixels")


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
    with pytest.raises(UserError, match="shards_37 holds packed images"):
        open_loader(shards, make_sampler(24, 8), cache="pixels", cache_dir=str(tmp_path / "other"))

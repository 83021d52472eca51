"""Images per second that one core reads, in each way of this project and of its peers.

python -m benchmarks.data [--img_dir DIR --annotation_file FILE] [--json FILE] [--png FILE]

Without a data set it takes COCO's photographs from CLIP_TEST_DATA. Rows, all of 224-pixel images in batches:
  reference             Pillow decodes at full size, torchvision resizes and normalizes: float32
  originals             the files, as `train.py` reads them: uint8
  shards                256-pixel JPEGs in tar files, decoded to squares that a GPU resizes or crops
  shards_to_224         the same, resized on the core, as on a machine without a GPU
  pixels_exact          the pixel cache at 224
  pixels_crop           the pixel cache at 256, with a random-resized crop on the core
  streaming             the shards through `webdataset`, resized on the core
  open_clip_csv, open_clip_webdataset   open_clip's own loaders, on the files and on the shards: float32
  bare_decode           only libjpeg-turbo, on the bytes of the shards
  bare_decode_originals the same on the files
Then the whole loader with 2 workers and no training, relative to one core.
"""

import argparse
import logging
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import count, cycle
from pathlib import Path

import simplejpeg
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/data.py` from any folder

from benchmarks.common import add_output_flags, find_test_data, measure_rates, report, to_rows
from dataloader.augment import Augmentation
from dataloader.captions import CaptionSet, read_captions
from dataloader.config import load_data_config
from dataloader.data_loaders import TrainLoader, open_dataset
from dataloader.sampler import BatchLayout, EpochSampler
from dataloader.storage.packing import make_spec, pack
from dataloader.storage.stream import ShardStream, StreamDataset
from utils.errors import run_script

SIZE, BATCH_SIZE = 224, 32
NUM_CACHED = 2_000
MEAN, STD = (0.4225, 0.4012, 0.3659), (0.2681, 0.2635, 0.2763)
LOGGER = logging.Logger("benchmark")


def read_data(args: argparse.Namespace) -> CaptionSet:
    """Find the images of the flags, or COCO's in the test data."""
    if args.img_dir:
        return read_captions(args.img_dir, args.annotation_file)
    coco = find_test_data("give --img_dir and --annotation_file, or ") / "coco_mini"
    parts = [
        read_captions(coco / name, coco / f"annotations/captions_{name}.json") for name in ("train2017", "val2017")
    ]
    return CaptionSet([image for part in parts for image in part.images], [])


def make_sampler(num_images: int) -> EpochSampler:
    return EpochSampler(num_images, BatchLayout(BATCH_SIZE), num_epochs=10_000, seed=0)


def make_loader(data: CaptionSet, cache_dir: Path, num_workers: int = 0, **changes: object) -> TrainLoader:
    config = load_data_config({"cache_dir": str(cache_dir), **changes})
    sampler = make_sampler(data.num_images)
    options = {"image_size": SIZE, "image_mean": MEAN, "image_std": STD, "context_length": 77}
    options |= {"num_workers": 2, "logger": LOGGER}
    dataset = open_dataset(data, config, sampler, **options)
    return TrainLoader(dataset, sampler, torch.device("cpu"), num_workers, LOGGER)


def batches_of(loader: TrainLoader, *, crop_on_device: bool = False) -> Callable[[], int]:
    """Return a row that reads one batch on this core, like a worker; squares where a GPU would crop them."""
    dataset, keys = loader.dataset, iter(loader.loader.batch_sampler)
    dataset.crop_on_device = crop_on_device
    return lambda: len(dataset.__getitems__(next(keys)).images)


def reference(files: list[str]) -> Callable[[], int]:
    """Return a row that reads like the reference, one image at a time."""
    transform = transforms.Compose(
        [
            transforms.Resize(SIZE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    endless = cycle(files)

    def work() -> int:
        torch.stack([transform(Image.open(next(endless)).convert("RGB")) for _ in range(BATCH_SIZE)])
        return BATCH_SIZE

    return work


def bare_decode(jpegs: list[bytes]) -> Callable[[], int]:
    """Return a row that only decodes."""

    def work() -> int:
        for jpeg in jpegs:
            simplejpeg.decode_jpeg(jpeg, "RGB")
        return len(jpegs)

    return work


def streaming(shards: str, num_images: int) -> Callable[[], int]:
    """Return a row that reads the shards through `webdataset`."""
    augmentation = Augmentation(load_data_config(), SIZE, MEAN, STD)
    stream = ShardStream(shards, num_images)
    batches = iter(StreamDataset(stream.urls, augmentation, make_sampler(num_images), context_length=77))
    return lambda: len(next(batches).images)


def open_clip_rows(data: CaptionSet, shards: str, folder: Path) -> dict[str, Callable[[], int]]:
    """Return the rows of open_clip's loaders, in this process; none if its training package cannot be imported."""
    try:
        import open_clip
        from open_clip_train.data import get_csv_dataset, get_wds_dataset
    except ImportError as error:
        print(f"open_clip's loaders are left out: {error}")
        return {}
    transform = open_clip.image_transform(SIZE, is_train=False, mean=MEAN, std=STD)  # resize and centre crop
    tokenizer = open_clip.get_tokenizer("RN50")
    table = folder / "captions.csv"
    lines = ["filepath\ttitle", *(f"{Path(image.path).resolve()}\t{image.captions[0]}" for image in data.images)]
    table.write_text("\n".join(line.replace('"', "") for line in lines))
    common = {"batch_size": BATCH_SIZE, "workers": 0, "world_size": 1, "distributed": False, "seed": 0}
    from_csv = get_csv_dataset(
        Namespace(train_data=str(table), csv_img_key="filepath", csv_caption_key="title", csv_separator="\t", **common),
        transform,
        is_train=True,
        tokenizer=tokenizer,
    )
    from_shards = get_wds_dataset(
        Namespace(
            train_data=shards,
            train_data_upsampling_factors=None,
            train_num_samples=10_000_000,
            dataset_resampled=True,
            **common,
        ),
        transform,
        is_train=True,
        tokenizer=tokenizer,
    )

    def endless(loader: object) -> Iterator:
        for _ in count():
            yield from loader

    def row(loader: object) -> Callable[[], int]:
        batches = endless(loader)
        return lambda: len(next(batches)[0])

    return {"open_clip_csv": row(from_csv.dataloader), "open_clip_webdataset": row(from_shards.dataloader)}


def with_workers(loader: TrainLoader) -> Callable[[], int]:
    """Return a row that takes batches from a loader's worker processes and discards them."""
    batches = iter(loader.loader)
    return lambda: len(next(batches).images)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img_dir", metavar="DIR")
    parser.add_argument("--annotation_file", metavar="FILE")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row and round")
    parser.add_argument("--rounds", type=int, default=5)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    data = read_data(args)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = make_spec(data, "shards", 256, images_per_chunk=max(1, data.num_images // 2))
        pack(data, folder / "shards", spec, num_workers=2, logger=LOGGER)
        packed = read_captions(folder / "shards")
        shards = str(folder / "shards" / "{000000..000001}.tar")
        files = [image.path for image in data.images]
        repeats = -(-NUM_CACHED // data.num_images)
        many = data._replace(images=data.images * repeats)  # more pixels than the processor's cache holds
        rows = {
            "reference": reference(files),
            "originals": batches_of(make_loader(data, folder)),
            "shards": batches_of(make_loader(packed, folder), crop_on_device=True),
            "shards_to_224": batches_of(make_loader(packed, folder)),
            "pixels_exact": batches_of(make_loader(many, folder, cache="pixels")),
            "pixels_crop": batches_of(make_loader(many, folder, cache="pixels", augmentation="standard")),
            "streaming": streaming(shards, data.num_images),
            **open_clip_rows(data, shards, folder),
            "bare_decode": bare_decode([packed.shards[number].getvalue() for number in range(len(packed.shards))]),
            "bare_decode_originals": bare_decode([Path(file).read_bytes() for file in files]),
        }
        rates = measure_rates(rows, seconds=args.seconds, rounds=args.rounds)
        report(to_rows(rates, "images/s/core"), "Reading 224-pixel training images on one core", args)

        pairs = {"originals": (data, {}), "shards": (packed, {})}
        for row, (source, changes) in pairs.items():
            one = batches_of(make_loader(source, folder, **changes))
            two = with_workers(make_loader(source, folder, num_workers=2, **changes))
            both = to_rows(measure_rates({"one": one, "two": two}, seconds=2 * args.seconds, rounds=args.rounds), "")
            print(f"{row} with 2 workers: {both[1].value:,.0f} images/s, {both[1].ratio:.2f} of one core's")


if __name__ == "__main__":
    run_script(main)

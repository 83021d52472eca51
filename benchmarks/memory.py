"""Memory of the data loader's workers over three epochs of 100,000 images, which should not grow.

python -m benchmarks.memory [--num_images N] [--num_workers N]

A few small files stand for all images; only the records and captions could make the memory grow.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/memory.py` from any folder

from dataloader.captions import CaptionedImage, CaptionSet
from dataloader.config import load_data_config
from dataloader.data_loaders import TrainLoader, open_dataset
from dataloader.sampler import BatchLayout, EpochSampler
from model.config import COCO_MEAN, COCO_STD
from utils.errors import run_script

BATCH_SIZE = 250


def memory_of(pid: int) -> float:
    """Return the private memory of a process in MiB, or all of it if the system does not report private memory."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024
    except OSError:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=100_000)
    parser.add_argument("--num_workers", type=int, default=4)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{number}.jpg") for number in range(20)]
        for number, file in enumerate(files):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
        images = [
            CaptionedImage(number, files[number % 20], tuple(f"caption {k} of image number {number}" for k in range(5)))
            for number in range(args.num_images)
        ]
        config, logger = load_data_config(), logging.Logger("benchmark")
        sampler = EpochSampler(args.num_images, BatchLayout(BATCH_SIZE), num_epochs=3, seed=0)
        options = {"image_size": 16, "image_mean": COCO_MEAN, "image_std": COCO_STD, "context_length": 77}
        options |= {"num_workers": 0, "logger": logger}
        dataset = open_dataset(CaptionSet(images, []), config, sampler, **options)
        loader = TrainLoader(dataset, sampler, torch.device("cpu"), 0, logger).loader
        loader = DataLoader(  # with more workers than `TrainLoader` would use
            loader.dataset,
            batch_sampler=loader.batch_sampler,
            collate_fn=loader.collate_fn,
            num_workers=args.num_workers,
            worker_init_fn=loader.worker_init_fn,
        )
        batches = iter(loader)
        per_epoch = args.num_images // BATCH_SIZE
        print(f"{args.num_images:,} images, {args.num_workers} workers; MiB of each worker")
        for epoch in range(3):
            for batch in range(per_epoch):
                next(batches)
                if batch in (per_epoch // 10, per_epoch - 1):
                    each = [memory_of(worker.pid) for worker in batches._workers if worker.is_alive()]
                    when = "early" if batch < per_epoch - 1 else "end"
                    print(f"epoch {epoch} {when:<6}", " ".join(f"{value:7.1f}" for value in each))


if __name__ == "__main__":
    run_script(main)

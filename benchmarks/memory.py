"""Memory of the data loader's workers over three epochs of 100,000 images: it should not grow.

python -m benchmarks.memory [--num_images N] [--num_workers N]

The images are a few small files under many names' worth of records; what could grow is the records and captions.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataloader.captions import CaptionedImage, CaptionSet
from dataloader.config import load_data_config
from dataloader.data_loaders import TrainLoader
from dataloader.order import EpochBatchSampler
from utils.errors import run_script

BATCH_SIZE = 250


def memory_of(pid: int) -> float:
    """Return what a process holds for itself, in MiB: its private pages where the system tells them, or all."""
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
        order = EpochBatchSampler(args.num_images, batch_size=BATCH_SIZE, num_epochs=3, seed=0)
        loader = TrainLoader(
            CaptionSet(images, []), load_data_config(), order, image_size=16, context_length=77, num_workers=0,
            device=torch.device("cpu"), tell=print, warn=print,
        ).loader  # fmt: skip
        loader = DataLoader(
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

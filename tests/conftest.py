"""Small models and datasets for the tests. Tests on real data find it through CLIP_TEST_DATA."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dataloader.captions import CaptionSet
from dataloader.config import load_data_config
from dataloader.data_loaders import TrainLoader, open_dataset
from dataloader.sampler import START, BatchLayout, EpochSampler, Position
from dataloader.storage.stream import ShardStream
from model import CLIP, CLIPConfig
from model.config import COCO_MEAN, COCO_STD
from utils import errors

torch.cpu._is_avx512_bf16_supported = lambda: False  # the same precision on every machine

ROOT = Path(__file__).resolve().parents[1]
SCRIPT_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

TINY = CLIPConfig(
    name="tiny",
    embed_dim=32,
    image_resolution=32,
    vision_layers=(1, 1, 1, 1),
    vision_width=8,
    vision_patch_size=None,
    context_length=77,
    vocab_size=49408,
    transformer_width=64,
    transformer_heads=1,
    transformer_layers=1,
)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real COCO and Flickr8k images, or skip the test."""
    folder = os.environ.get("CLIP_TEST_DATA")
    if not folder:
        pytest.skip("CLIP_TEST_DATA does not name a folder with coco_mini/ and flickr8k/")
    return Path(folder)


@pytest.fixture
def tiny_model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(TINY).eval()


def make_captions(folder: Path, num_images: int = 24, size: tuple[int, int] = (48, 40)) -> tuple[Path, Path]:
    """Write plain images of distinct colors with captions in COCO's format; return (img_dir, annotation_file)."""
    img_dir = folder / "images"
    img_dir.mkdir(parents=True)
    images, annotations = [], []
    for index in range(num_images):
        colour = tuple(np.random.default_rng(index).integers(0, 256, 3).tolist())
        name = f"{index:012}.png"
        Image.new("RGB", size, colour).save(img_dir / name)
        images.append({"id": index, "file_name": name, "width": size[0], "height": size[1]})
        for wording in ("a picture of", "this is"):
            caption = f"{wording} colour number {index}"
            annotations.append({"id": len(annotations), "image_id": index, "caption": caption})
    annotation_file = folder / "captions.json"
    annotation_file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return img_dir, annotation_file


def make_sampler(
    num_images: int, batch_size: int, *, num_epochs: int = 2, seed: int = 3, start: Position = START, **layout: int
) -> EpochSampler:
    """Return the order of the data in the tests of the loaders; `layout` are fields of `BatchLayout`."""
    return EpochSampler(num_images, BatchLayout(batch_size, **layout), num_epochs=num_epochs, seed=seed, start=start)


def message_logger(messages: list[str]) -> logging.Logger:
    """Return a logger that appends its messages to a list."""
    logger, handler = logging.Logger("test"), logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    return logger


def open_loader(
    train_set: CaptionSet | ShardStream,
    sampler: EpochSampler,
    *,
    size: int = 32,
    num_workers: int = 0,
    messages: list[str] | None = None,
    image_mean: tuple[float, ...] = COCO_MEAN,
    image_std: tuple[float, ...] = COCO_STD,
    **changes: object,
) -> TrainLoader:
    """Return the loader of a training set on the CPU; `changes` are keys of data_config.yaml."""
    config, logger = load_data_config(changes), message_logger([] if messages is None else messages)
    options = {"image_size": size, "image_mean": image_mean, "image_std": image_std, "context_length": 77}
    options |= {"num_workers": num_workers, "logger": logger}
    dataset = open_dataset(train_set, config, sampler, **options)
    return TrainLoader(dataset, sampler, torch.device("cpu"), num_workers, logger)


@pytest.fixture
def caption_files(tmp_path: Path) -> tuple[Path, Path]:
    return make_captions(tmp_path)


def run_script(script: str, *flags: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user does, in the folder `cwd`."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=SCRIPT_ENVIRONMENT, capture_output=True, text=True, timeout=600)


class Output(NamedTuple):
    """The output and exit status of a script."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_here(monkeypatch, capfd) -> Callable[..., Output]:
    """Run a script of the repository in this process, in a tenth of the time: run_here(script, *flags, cwd=...)."""

    def run(script: str, *flags: object, cwd: Path) -> Output:
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        code, message = 0, ""
        try:
            errors.run_script(lambda: import_module(script.removesuffix(".py")).main(list(map(str, flags))))
        except SystemExit as end:
            code, message = (end.code, "") if isinstance(end.code, int) else (1, end.code)
        printed = capfd.readouterr()
        return Output(code, printed.out, printed.err + message)

    return run


@pytest.fixture
def recorder(monkeypatch):
    """Watch the training runs of this process: a `tests.runs.Recorder`."""
    from tests.runs import Recorder  # its imports take seconds

    return Recorder(monkeypatch)

"""Small models and datasets that the tests share. Tests on real data find it through CLIP_TEST_DATA."""

import json
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

from dataloader.order import EpochBatchSampler
from model import CLIP, CLIPConfig
from utils import errors

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
TINY_KEYS = ("embed_dim", "image_resolution", "vision_width", "transformer_width", "transformer_heads")
TINY_FLAGS = [flag for key in TINY_KEYS for flag in ("--set", f"model.{key}={getattr(TINY, key)}")]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real COCO and Flickr8k images; the tests that need them are skipped where they are not."""
    folder = os.environ.get("CLIP_TEST_DATA")
    if not folder:
        pytest.skip("CLIP_TEST_DATA does not name a folder with coco_mini/ and flickr8k/")
    return Path(folder)


@pytest.fixture
def tiny_model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(TINY).eval()


def make_captions(folder: Path, num_images: int = 24, size: tuple[int, int] = (48, 40)) -> tuple[Path, Path]:
    """Write plain images of distinct colours with captions in COCO's format; return (img_dir, annotation_file)."""
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


def make_order(num_images: int, batch_size: int, num_epochs: int = 2, seed: int = 3, **place) -> EpochBatchSampler:
    """Return the order of the data that the loaders' tests go through."""
    return EpochBatchSampler(num_images, batch_size=batch_size, num_epochs=num_epochs, seed=seed, **place)


@pytest.fixture
def caption_files(tmp_path: Path) -> tuple[Path, Path]:
    return make_captions(tmp_path)


def run_script(script: str, *flags: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, with `cwd` as the working directory."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=SCRIPT_ENVIRONMENT, capture_output=True, text=True, timeout=600)


class Output(NamedTuple):
    """What a script printed, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_here(monkeypatch, capfd) -> Callable[..., Output]:
    """Run a script of the repository in this process, which takes a tenth of the time: run_here(script, *flags)."""

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


def tiny_training_flags(img_dir: Path, annotation_file: Path, output_dir: Path) -> list[object]:
    """Return `train.py` flags that train the tiny model for two epochs of three steps."""
    return [
        "--train_img_dir", img_dir, "--train_annotation_file", annotation_file, "--output_dir", output_dir,
        "--model", "RN-small", *TINY_FLAGS, "--epochs", 2, "--batch_size", 8,
        "--set", "trainer.num_workers=0", "--set", "trainer.logging_steps=2",
    ]  # fmt: skip

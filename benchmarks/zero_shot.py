"""Images and prompts per second of a zero-shot evaluation, for this project and its peers, on a GPU if there is one.

python -m benchmarks.zero_shot [--model RN50] [--img_dir DIR] [--json FILE] [--png FILE]

Three tables: images from memory, as CIFAR's are; photographs from files, COCO's in CLIP_TEST_DATA unless --img_dir
names others; and prompts, ImageNet's names in OpenAI's templates. The rows of each table:
  reference     one at a time: Pillow and torchvision's transform, a batch of 1; texts padded to 77 tokens
  project       the step of zero_shot_eval.py
  open_clip     its model, its preprocessing in a DataLoader, batches; its tokenizer, texts padded to 77 tokens
  bare_forward  the project's model on prepared batches
  bare_loading  images alone: preprocessing on one core, no model
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/zero_shot.py` from any folder

from benchmarks.common import Row, add_output_flags, find_test_data, measure_rates, report, to_rows
from model import CLIP, TrainedCLIP, load_model_config
from model.export import open_clip_config
from utils import imagenet
from utils.device import choose_device
from utils.errors import run_script
from utils.images import ImageLike, find_images, load_image, normalize, to_tensor

MEAN, STD = (0.4225, 0.4012, 0.3659), (0.2681, 0.2635, 0.2763)
BATCH_SIZE, TEXT_BATCH_SIZE = 128, 512
Work = Callable[[], int]


class Preprocessed(Dataset):
    """Images after a torchvision transform."""

    def __init__(self, images: list[ImageLike], transform: Callable) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.images[index]
        return self.transform(image if isinstance(image, Image.Image) else Image.open(image))


def image_rows(clip: TrainedCLIP, peer: nn.Module, images: list[ImageLike], num_workers: int) -> dict[str, Work]:
    """Return the rows that encode images."""
    size = clip.model.config.image_resolution
    preprocess = open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD)
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    to_rgb = transforms.Lambda(lambda image: image.convert("RGB"))
    crop, finish = transforms.CenterCrop(size), [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    one_by_one = Preprocessed(images, transforms.Compose([resize, crop, to_rgb, *finish]))
    indices = cycle(range(len(images)))
    device = clip.model.logit_scale.device
    first_batch = [to_tensor(load_image(image, size)) for image in images[:BATCH_SIZE]]
    prepared = normalize(torch.stack(first_batch), MEAN, STD).to(device)

    def reference() -> int:
        F.normalize(peer.encode_image(one_by_one[next(indices)][None].to(device)), dim=-1).cpu()
        return 1

    def project() -> int:
        clip.encode_readable(images, batch_size=BATCH_SIZE, num_workers=num_workers)
        return len(images)

    def peers() -> int:
        loader = DataLoader(Preprocessed(images, preprocess), batch_size=BATCH_SIZE, num_workers=num_workers)
        return sum(len(peer.encode_image(batch.to(device), normalize=True).cpu()) for batch in loader)

    def bare_forward() -> int:
        return len(F.normalize(clip.model.encode_image(prepared), dim=-1).cpu())

    def bare_loading() -> int:
        to_tensor(load_image(images[next(indices)], size))
        return 1

    return {
        "reference": reference,
        "project": project,
        "open_clip": peers,
        "bare_forward": bare_forward,
        "bare_loading": bare_loading,
    }


def text_rows(clip: TrainedCLIP, peer: nn.Module, texts: list[str]) -> dict[str, Work]:
    """Return the rows that encode prompts."""
    tokenizer = open_clip.get_tokenizer("RN50")
    ordered = sorted(texts, key=len)
    starts = range(0, len(texts), TEXT_BATCH_SIZE)
    device = clip.model.logit_scale.device
    prepared = [clip.model.tokenize(ordered[start : start + TEXT_BATCH_SIZE]).to(device) for start in starts]
    endless = cycle(texts)

    def reference() -> int:
        F.normalize(peer.encode_text(tokenizer([next(endless)]).to(device)), dim=-1).cpu()
        return 1

    def project() -> int:
        return len(clip.encode_text(texts, batch_size=TEXT_BATCH_SIZE))

    def peers() -> int:
        for start in starts:
            peer.encode_text(tokenizer(texts[start : start + TEXT_BATCH_SIZE]).to(device), normalize=True).cpu()
        return len(texts)

    def bare_forward() -> int:
        return sum(len(F.normalize(clip.model.encode_text(tokens), dim=-1).cpu()) for tokens in prepared)

    return {"reference": reference, "project": project, "open_clip": peers, "bare_forward": bare_forward}


def cifar_like(count: int) -> Iterator[Image.Image]:
    """Yield random pictures of CIFAR's size."""
    for pixels in np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8):
        yield Image.fromarray(pixels)


def photographs(img_dir: Path | None) -> list[Path]:
    """Return the images of a folder, or COCO's."""
    if img_dir:
        return find_images(img_dir)
    coco = find_test_data("give --img_dir, or ") / "coco_mini"
    return [file for part in ("train2017", "val2017") for file in find_images(coco / part)]


@torch.no_grad()
def measure(
    name: str,
    device: torch.device,
    *,
    img_dir: Path | None = None,
    num_images: int = 2048,
    num_texts: int = 2048,
    num_workers: int = 4,
    seconds: float,
    rounds: int,
) -> list[Row]:
    """Return the rows of the three tables for the architecture `name` with random weights."""
    torch.manual_seed(0)
    config = load_model_config([("name", name)])
    clip = TrainedCLIP(CLIP(config).eval().to(device))
    peer = open_clip.CLIP(**open_clip_config(config)).eval().to(device)
    peer.load_state_dict(clip.model.state_dict())
    files = (photographs(img_dir) * num_images)[:num_images]
    names, templates = imagenet.classnames().values(), imagenet.templates("openai")
    texts = [template.replace("{}", name) for name in names for template in templates][:: 80_000 // num_texts]
    num_workers = min(num_workers, os.cpu_count() or 1)

    tables = {
        "images from memory": (image_rows(clip, peer, list(cifar_like(num_images)), num_workers), "images/s"),
        "photographs from files": (image_rows(clip, peer, files, num_workers), "images/s"),
        "prompts": (text_rows(clip, peer, texts), "prompts/s"),
    }
    rows: list[Row] = []
    for title, (works, unit) in tables.items():
        part = to_rows(measure_rates(works, seconds=seconds, rounds=rounds), unit)
        rows += [row._replace(name=f"{title}: {row.name}") for row in part]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="RN-small", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--img_dir", type=Path, metavar="DIR", help="photographs (default: COCO's in CLIP_TEST_DATA)")
    parser.add_argument("--num_images", type=int, default=2048, metavar="N", help="per pass (default: %(default)s)")
    parser.add_argument("--num_texts", type=int, default=2048, metavar="N", help="per pass (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=4, metavar="N", help="at most one per core (default: 4)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per row and round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    options = {key: value for key, value in vars(args).items() if key not in ("model", "json", "png")}
    report(measure(args.model, choose_device(), **options), f"Zero-shot evaluation with {args.model}", args)


if __name__ == "__main__":
    run_script(main)

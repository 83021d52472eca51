"""Zero-shot classification (Radford et al. 2021, section 3.1): class names, prompts, probabilities and accuracy."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils import imagenet
from utils.errors import UserError

TEMPLATE = "a photo of a {}."
TEMPLATE_SETS = ("single", "simple", "openai")
LOGIT_SCALE = 35.0  # the reference demo's: softer probabilities than the learned scale gives, and the same ranking
CIFAR100_FILE = Path(__file__).with_name("cifar100_classnames.txt")


class ZeroShotAccuracy(NamedTuple):
    """Counts of predictions by class index, so that classes with the same name stay apart."""

    confusion: Tensor  # int64 [num_classes, num_classes]: images of a class (row) by predicted class (column)
    top5: Tensor  # int64 [num_classes]: images of a class with that class among their five best

    @property
    def top1(self) -> Tensor:
        return self.confusion.diagonal()

    @property
    def total(self) -> Tensor:
        return self.confusion.sum(dim=1)

    def percentages(self) -> tuple[float, float]:
        """Return the top-1 and top-5 accuracy over all images, in percent."""
        total = self.total.sum().item()
        return 100 * self.top1.sum().item() / total, 100 * self.top5.sum().item() / total


def class_probabilities(image_features: Tensor, classifier: Tensor, logit_scale: float = LOGIT_SCALE) -> Tensor:
    """Return the softmax over classes of `logit_scale` times the cosine similarity, [num_images, num_classes]."""
    return (logit_scale * image_features @ classifier.t()).softmax(dim=1)


def zero_shot_accuracy(image_features: Tensor, labels: Tensor, classifier: Tensor) -> ZeroShotAccuracy:
    """Count top-1 and top-5 hits.

    `image_features`: [num_images, embed_dim], `labels`: int64 [num_images], `classifier`: [num_classes, embed_dim].
    """
    num_classes = len(classifier)
    confusion, top5 = labels.new_zeros(num_classes**2), labels.new_zeros(num_classes)
    for features, targets in zip(image_features.split(4096), labels.split(4096), strict=True):
        best = (features @ classifier.t()).topk(min(5, num_classes), dim=1).indices
        confusion += (targets * num_classes + best[:, 0]).bincount(minlength=num_classes**2)
        top5 += targets[(best == targets[:, None]).any(dim=1)].bincount(minlength=num_classes)
    return ZeroShotAccuracy(confusion.view(num_classes, num_classes).cpu(), top5.cpu())


def best_classes(image_features: Tensor, classifier: Tensor, num_best: int = 5) -> tuple[Tensor, Tensor]:
    """Return the classes most similar to each image, int64 [num_images, num_best], and their `class_probabilities`."""
    parts = []
    for features in image_features.split(4096):
        best = (features @ classifier.t()).topk(min(num_best, len(classifier)), dim=1).indices
        parts.append((best, class_probabilities(features, classifier).gather(1, best)))
    classes, probabilities = map(torch.cat, zip(*parts, strict=True))
    return classes, probabilities


def wilson_interval(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the bounds of the confidence interval of hits / total, in percent: 95 % for z = 1.96 (Wilson 1927)."""
    share, spread = hits / total, z * z / total
    center = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


def read_class_names(values: Sequence[str]) -> list[str]:
    """Return class names: the `values`, or the lines of the one text file they name; underscores become spaces.

    Raises UserError if the file is missing, not UTF-8, or empty.
    """
    values = _expand(values[0]) if len(values) == 1 else values
    names = [name.replace("_", " ").strip() for name in values if name.strip()]
    if not names:
        raise UserError("--class_names: no class names are given; list some, or a text file with one per line")
    return names


def read_templates(values: Sequence[str]) -> list[str]:
    """Return sentences with {} for the class name. Each value is a sentence, a text file of them, or the name of a set.

    `single` is the reference's one prompt, `openai` the 80 for ImageNet, `simple` 7 of these. Raises UserError for a
    file that is missing, not UTF-8, or empty.
    """
    templates = []
    for value in values:
        if value in TEMPLATE_SETS:
            templates += [TEMPLATE] if value == "single" else imagenet.templates(value)
        else:
            templates += [value] if "{}" in value else [line.strip() for line in _expand(value) if line.strip()]
    if not templates:
        raise UserError(f"--templates: {values[0]} is empty; write one sentence per line, with {{}} for the class name")
    return templates


def _expand(value: str) -> list[str]:
    """Return the lines of a text file, or the value itself if it is not the name of a file."""
    try:
        return Path(value).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{value} is not UTF-8 text; save it as UTF-8, one entry per line") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        if not value.endswith(".txt"):
            return [value]
        raise UserError(f"{value} cannot be read ({getattr(error, 'strerror', error)}); check the path") from None

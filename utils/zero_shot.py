"""Zero-shot classification (Radford et al. 2021, section 3.1): each class becomes a sentence, the nearest one wins."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError
from utils.tokenizer import get_tokenizer

TEMPLATE = "a photo of a {}."
CIFAR100_FILE = Path(__file__).with_name("cifar100_classnames.txt")


class ZeroShotAccuracy(NamedTuple):
    """Correct images a class: int64 [num_classes] each, so that classes that share a name stay apart."""

    top1: Tensor
    top5: Tensor
    total: Tensor

    def percentages(self) -> tuple[float, float]:
        """Return the top-1 and top-5 accuracy over all images, in %."""
        total = self.total.sum().item()
        return 100 * self.top1.sum().item() / total, 100 * self.top5.sum().item() / total


@torch.inference_mode()
def encode_images(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the indices [num_images] and the L2-normalized features [num_images, embed_dim] of all `batches`.

    `batches` yields (indices [batch], normalized images [batch, 3, size, size]) on the model's device.
    """
    encoded = [(indices, F.normalize(model.encode_image(images), dim=-1)) for indices, images in batches]
    indices, features = zip(*encoded, strict=True)
    return torch.cat(indices), torch.cat(features)


@torch.inference_mode()
def encode_texts(model: nn.Module, texts: Sequence[str], *, batch_size: int = 512) -> Tensor:
    """Return the L2-normalized features [num_texts, embed_dim] of `texts`, on the model's device."""
    device, context_length = model.logit_scale.device, model.config.context_length
    features = []
    for start in range(0, len(texts), batch_size):
        tokens = get_tokenizer()(texts[start : start + batch_size], context_length=context_length)
        features.append(F.normalize(model.encode_text(tokens.to(device)), dim=-1))
    return torch.cat(features)


def build_classifier(model: nn.Module, classnames: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> Tensor:
    """Return one L2-normalized text feature a class, [num_classes, embed_dim]: the mean over its sentences.

    Each template is a sentence with {} where the class's name goes. Raises UserError for one without.
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the template {template!r} has no {{}} where the class's name should go")
    sentences = [template.replace("{}", name) for name in classnames for template in templates]
    features = encode_texts(model, sentences).unflatten(0, (len(classnames), len(templates)))
    return F.normalize(features.mean(dim=1), dim=-1)


def zero_shot_accuracy(image_features: Tensor, labels: Tensor, classifier: Tensor) -> ZeroShotAccuracy:
    """Count top-1 and top-5 hits. Image features [num_images, embed_dim], labels int64 [num_images]."""
    num_classes = len(classifier)
    top1, top5, total = (torch.zeros(num_classes, dtype=torch.int64, device=labels.device) for _ in range(3))
    for features, targets in zip(image_features.split(4096), labels.split(4096), strict=True):
        nearest = (features @ classifier.t()).topk(min(5, num_classes), dim=1).indices
        hits = nearest == targets[:, None]
        total += targets.bincount(minlength=num_classes)
        top1 += targets[hits[:, 0]].bincount(minlength=num_classes)
        top5 += targets[hits.any(dim=1)].bincount(minlength=num_classes)
    return ZeroShotAccuracy(top1.cpu(), top5.cpu(), total.cpu())


def read_class_names(values: Sequence[str]) -> list[str]:
    """Return class names given as words, or as one text file with a name a line; underscores read as spaces.

    Raises UserError if that file is missing, not text or empty.
    """
    if len(values) == 1 and (Path(values[0]).is_file() or values[0].endswith(".txt")):
        try:
            values = Path(values[0]).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"the class names {values[0]} cannot be read ({error.strerror}); check the path") from None
        except UnicodeDecodeError:
            raise UserError(f"the class names {values[0]} are not UTF-8 text, one name a line") from None
    names = [name.replace("_", " ").strip() for name in values if name.strip()]
    if not names:
        raise UserError("no class names are given; write some words, or a text file with one name a line")
    return names

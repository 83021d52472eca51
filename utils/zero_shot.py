"""Zero-shot classification (Radford et al. 2021, section 3.1): each class becomes a sentence, the nearest one wins."""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils import imagenet
from utils.errors import UserError
from utils.files import open_whole

TEMPLATE = "a photo of a {}."
TEMPLATE_SETS = ("single", "simple", "openai")
LOGIT_SCALE = 35.0  # the reference demo's, for softer probabilities than the learned one's; the ranking is the same
CIFAR100_FILE = Path(__file__).with_name("cifar100_classnames.txt")
SENTENCES_AT_ONCE = 8192  # whose features are held until their classes' means are taken


class ZeroShotAccuracy(NamedTuple):
    """What the images of each class were taken for; by class index, so that classes that share a name stay apart."""

    confusion: Tensor  # int64 [num_classes, num_classes]: images of a class, its row, by the class that came first
    top5: Tensor  # int64 [num_classes]: images of a class that had it among their five nearest

    @property
    def top1(self) -> Tensor:
        return self.confusion.diagonal()

    @property
    def total(self) -> Tensor:
        return self.confusion.sum(dim=1)

    def percentages(self) -> tuple[float, float]:
        """Return the top-1 and top-5 accuracy over all images, in %."""
        total = self.total.sum().item()
        return 100 * self.top1.sum().item() / total, 100 * self.top5.sum().item() / total


@torch.no_grad()
def encode_images(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the indices [num_images] and the L2-normalized features [num_images, embed_dim] of all `batches`.

    `batches` yields (indices [batch], normalized images [batch, 3, size, size]) on the model's device.
    """
    encoded = [(indices, F.normalize(model.encode_image(images), dim=-1)) for indices, images in batches]
    indices, features = zip(*encoded, strict=True)
    return torch.cat(indices), torch.cat(features)


@torch.no_grad()
def encode_texts(model: nn.Module, texts: Sequence[str], *, batch_size: int = 512) -> Tensor:
    """Return the L2-normalized features [num_texts, embed_dim] of `texts`, on the model's device.

    Texts of about the same length share a batch, since a batch is as long as its longest. Raises UserError for none.
    """
    if not texts:
        raise UserError("no text is given")
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    features = []
    for batch in batches:
        tokens = model.tokenize([texts[index] for index in batch]).to(model.logit_scale.device)
        features.append(F.normalize(model.encode_text(tokens), dim=-1))
    features = torch.cat(features)
    return torch.empty_like(features).index_copy_(0, torch.tensor(order, device=features.device), features)


def build_classifier(
    model: nn.Module,
    classnames: Sequence[str],
    templates: Sequence[str] = (TEMPLATE,),
    *,
    cache_dir: Path | None = None,
) -> Tensor:
    """Return one L2-normalized text feature a class, [num_classes, embed_dim]: the mean over its sentences.

    Each template is a sentence with {} where the class's name goes. What an earlier call computed from the same
    weights and sentences is read from `cache_dir`. Raises UserError for no class, or a template without {}.
    """
    if not classnames:
        raise UserError("no class names are given")
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"the template {template!r} has no {{}} where the class's name should go, and is neither a file "
                f"nor one of {', '.join(TEMPLATE_SETS)}"
            )
    sentences = [[template.replace("{}", name) for template in templates] for name in classnames]
    file = cache_dir and cache_dir / f"{_fingerprint(model, sentences)}.pt"
    if file:
        with contextlib.suppress(Exception):  # there is none, or it is damaged: it is written anew
            stored = torch.load(file, weights_only=True)
            if stored["digest"] == hashlib.sha256(_bytes(stored["classifier"])).hexdigest():
                return stored["classifier"].to(model.logit_scale.device)
    step = max(1, SENTENCES_AT_ONCE // len(templates))
    starts = range(0, len(classnames), step)
    means = []
    for start in tqdm(starts, "encoding texts", unit="part", disable=len(starts) == 1 or None, leave=False):
        part = sentences[start : start + step]
        features = encode_texts(model, [sentence for own in part for sentence in own])
        means.append(features.unflatten(0, (len(part), len(templates))).mean(dim=1))
    classifier = F.normalize(torch.cat(means), dim=-1)
    if file:
        with contextlib.suppress(OSError):  # without a cache the next call takes longer, no more
            file.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(_bytes(classifier)).hexdigest()
            with open_whole(file) as out:
                torch.save({"classifier": classifier.cpu(), "digest": digest}, out)
    return classifier


def class_probabilities(image_features: Tensor, classifier: Tensor, logit_scale: float = LOGIT_SCALE) -> Tensor:
    """Return the softmax over the classes of `logit_scale` times the cosine similarity, [num_images, num_classes]."""
    return (logit_scale * image_features @ classifier.t()).softmax(dim=1)


def zero_shot_accuracy(image_features: Tensor, labels: Tensor, classifier: Tensor) -> ZeroShotAccuracy:
    """Count top-1 and top-5 hits. Image features [num_images, embed_dim], labels int64 [num_images]."""
    num_classes = len(classifier)
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=labels.device)
    top5 = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)
    for features, targets in zip(image_features.split(4096), labels.split(4096), strict=True):
        nearest = (features @ classifier.t()).topk(min(5, num_classes), dim=1).indices
        confusion += (targets * num_classes + nearest[:, 0]).bincount(minlength=num_classes**2)
        top5 += targets[(nearest == targets[:, None]).any(dim=1)].bincount(minlength=num_classes)
    return ZeroShotAccuracy(confusion.view(num_classes, num_classes).cpu(), top5.cpu())


def wilson_interval(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the bounds of a share, in %, that hold it with a probability of 95 % (Wilson 1927)."""
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def read_class_names(values: Sequence[str]) -> list[str]:
    """Return class names given as words, or as one text file with a name a line; underscores read as spaces.

    Raises UserError if that file is missing, not text or empty.
    """
    if len(values) == 1 and (_is_file(values[0]) or values[0].endswith(".txt")):
        values = _read_lines(values[0], "class names")
    names = [name.replace("_", " ").strip() for name in values if name.strip()]
    if not names:
        raise UserError("no class names are given; write some words, or a text file with one name a line")
    return names


def read_templates(values: Sequence[str]) -> list[str]:
    """Return sentences with {} where a class's name goes: each value is one, a text file of them, or a set's name.

    `single` is the reference's one prompt, `openai` the 80 for ImageNet, `simple` 7 of them. Raises UserError for
    anything else.
    """
    templates = []
    for value in values:
        if value in TEMPLATE_SETS:
            templates += [TEMPLATE] if value == "single" else imagenet.templates(value)
        elif "{}" not in value and (_is_file(value) or value.endswith(".txt")):
            templates += [line.strip() for line in _read_lines(value, "templates") if line.strip()]
        else:
            templates.append(value)
    if not templates:
        raise UserError(f"{values[0]}: holds no template; write a sentence a line, {{}} for the class's name")
    return templates


def _is_file(value: str) -> bool:
    with contextlib.suppress(OSError, ValueError):  # too long for a path, or with a zero byte
        return Path(value).is_file()
    return False


def _read_lines(file: str, what: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"the {what} {file} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"the {what} {file} are not UTF-8 text, one a line") from None


def _fingerprint(model: nn.Module, sentences: Sequence[Sequence[str]]) -> str:
    """Return a hash of what the sentences' features depend on."""
    digest = hashlib.blake2b(repr((model.config, sentences)).encode("utf-8", "surrogatepass"), digest_size=16)
    for name, tensor in model.state_dict().items():
        if "visual." not in name:
            digest.update(name.encode() + _bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()

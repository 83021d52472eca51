"""A trained model with its preprocessing: scripts, validation and the Python API encode images and texts here."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import UserError
from utils.image_loader import Failure, ImageLoader, Preprocessing
from utils.images import ImageLike, load_image
from utils.zero_shot import LOGIT_SCALE, TEMPLATE, TEMPLATE_SETS, class_probabilities

MAX_SENTENCES = 8192  # that `build_classifier` encodes at a time


class EncodedImages(NamedTuple):
    """The features of the readable images, in order, and the images that could not be read."""

    indices: Tensor  # int64 [num_readable], positions in the given sequence
    features: Tensor  # float32 [num_readable, embed_dim], L2-normalized
    failures: list[Failure]


class CaptionFeatures(NamedTuple):
    """The features of captioned images and of all their captions."""

    images: Tensor  # float32 [num_images, embed_dim], L2-normalized
    texts: Tensor  # float32 [num_texts, embed_dim], L2-normalized
    image_of_text: Tensor  # int64 [num_texts], the row of each text's image in `images`


@dataclass(frozen=True)
class TrainedCLIP:
    """A model in evaluation mode, on its device, with the preprocessing that its images need.

    >>> clip = load_clip("saved_checkpoints")
    >>> clip.classify("a.jpg", ["dog", "cat"])
    """

    model: nn.Module  # a CLIP, or a `Baseline`
    source: str = ""  # the file or name that the weights were loaded from
    load: Callable[[ImageLike, int], Image.Image] = load_image  # (image, size) -> square RGB picture
    notes: tuple[str, ...] = ()  # what was assumed or left out when the weights were loaded

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Of RGB in [0, 1], as is `image_std`."""
        return self.model.config.image_mean

    @property
    def image_std(self) -> tuple[float, float, float]:
        return self.model.config.image_std

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of a checksum over the weights, the configuration and the preprocessing."""
        checksum = hashlib.sha256(repr((self.model.config, self.image_mean, self.image_std)).encode())
        for name, tensor in self.model.state_dict().items():
            checksum.update(name.encode())
            checksum.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return checksum.hexdigest()[:16]

    @torch.no_grad()
    def encode_readable(
        self, images: Sequence[ImageLike], *, batch_size: int = 128, num_workers: int = 4, show_progress: bool = False
    ) -> EncodedImages:
        """Encode images, skip the unreadable ones, and list them. The tensors are on the model's device.

        `images` and `num_workers` as in `ImageLoader`. `show_progress` draws a bar if stderr is a terminal. Raises
        UserError if no image can be read.
        """
        if not len(images):
            raise UserError("no image is given")
        preprocessing = Preprocessing(self.model.config.image_resolution, self.image_mean, self.image_std, self.load)
        loader = ImageLoader(images, preprocessing, batch_size, num_workers, self.device)
        bar = tqdm(loader, "encoding images", unit="batch", disable=None if show_progress else True, leave=False)
        batches = [(indices, F.normalize(self.model.encode_image(pixels), dim=-1)) for indices, pixels in bar]
        if not batches:
            path, reason = loader.failures[0]
            others = f", nor can the other {len(images) - 1:,}" if len(images) > 1 else ""
            raise UserError(f"{path}: cannot be read as an image ({reason}){others}; check the path and the file")
        indices, features = map(torch.cat, zip(*batches, strict=True))
        return EncodedImages(indices, features, loader.failures)

    def encode_image(self, images: ImageLike | Sequence[ImageLike], *, batch_size: int = 128) -> Tensor:
        """Return L2-normalized features, float32 [num_images, embed_dim], on the model's device.

        `images`: one or several paths, Pillow pictures, or `BytesIO`s of files. Raises UserError for none, or if one
        cannot be read.
        """
        images = [images] if isinstance(images, str | Path | io.BytesIO | Image.Image) else list(images)
        num_workers = 4 if self.device.type == "cpu" else 0  # no processes: the caller's script may lack a main guard
        encoded = self.encode_readable(images, batch_size=batch_size, num_workers=num_workers)
        for path, reason in encoded.failures:
            raise UserError(f"{path}: cannot be read as an image ({reason}); remove it, or use encode_readable")
        return encoded.features

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str], *, batch_size: int = 512) -> Tensor:
        """Return L2-normalized features, float32 [num_texts, embed_dim], on the model's device.

        Texts are truncated to the model's context length. Raises UserError if there is none.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("no text is given")
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # a batch is as long as its longest text
        features = []
        for start in range(0, len(texts), batch_size):
            tokens = self.model.tokenize([texts[index] for index in order[start : start + batch_size]])
            features.append(F.normalize(self.model.encode_text(tokens.to(self.device)), dim=-1))
        features = torch.cat(features)
        return torch.empty_like(features).index_copy_(0, torch.tensor(order, device=self.device), features)

    def encode_captioned(
        self, images: Sequence[ImageLike], captions: Sequence[Sequence[str]], **options: Any
    ) -> tuple[CaptionFeatures, EncodedImages]:
        """Encode images and the captions of each one; `options` go to `encode_readable`.

        Captions of unreadable images are left out. Raises UserError if no image can be read.
        """
        encoded = self.encode_readable(images, **options)
        kept = [captions[index] for index in encoded.indices.tolist()]
        texts = self.encode_text([caption for group in kept for caption in group])
        rows = torch.tensor([row for row, group in enumerate(kept) for _ in group], device=texts.device)
        return CaptionFeatures(encoded.features, texts, rows), encoded

    def build_classifier(self, classnames: Sequence[str], templates: Sequence[str] = (TEMPLATE,)) -> Tensor:
        """Return a text feature for each class, L2-normalized, [num_classes, embed_dim].

        It is the mean over the `templates` with {} replaced by the class name (Radford et al. 2021, section 3.1.4).
        Raises UserError without classes, or for a template without {}.
        """
        if not classnames or not templates:
            raise UserError("no class names or templates are given")
        if wrong := [template for template in templates if "{}" not in template]:
            sets = ", ".join(TEMPLATE_SETS)
            raise UserError(f"the template {wrong[0]!r} has no {{}} for the class name, and is no file or set ({sets})")
        step = max(1, MAX_SENTENCES // len(templates))
        parts = [classnames[start : start + step] for start in range(0, len(classnames), step)]
        means = []
        for part in tqdm(parts, "encoding texts", unit="part", disable=len(parts) == 1 or None, leave=False):
            features = self.encode_text([template.replace("{}", name) for name in part for template in templates])
            means.append(features.unflatten(0, (len(part), len(templates))).mean(dim=1))
        return F.normalize(torch.cat(means), dim=-1)

    def classify(
        self,
        images: ImageLike | Sequence[ImageLike],
        classnames: Sequence[str],
        *,
        templates: Sequence[str] = (TEMPLATE,),
        logit_scale: float = LOGIT_SCALE,
    ) -> Tensor:
        """Return each image's class probabilities, float32 [num_images, num_classes].

        They are the softmax over `logit_scale` times the cosine similarity of image and class features (Radford et al.
        2021, section 3.1.2). Raises UserError as `encode_image` and `build_classifier` do.
        """
        classifier = self.build_classifier(classnames, templates)
        return class_probabilities(self.encode_image(images), classifier, logit_scale)

"""A trained model with all that its images and texts need, for scripts and for interactive use."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from utils.errors import UserError
from utils.images import ImageSource, UnreadableImageError, load_image, normalize, to_tensor
from utils.zero_shot import LOGIT_SCALE, TEMPLATE, build_classifier, class_probabilities, encode_images, encode_texts

BATCH_SIZE = 128


@dataclass(frozen=True)
class TrainedCLIP:
    """A model in eval mode, on its device, and the preprocessing that its images need.

    >>> clip = load_clip("saved_checkpoints")
    >>> clip.classify("a.jpg", ["dog", "cat"])
    """

    model: nn.Module  # a CLIP, or an open_clip model in its place
    image_mean: tuple[float, float, float]  # of RGB in [0, 1]
    image_std: tuple[float, float, float]
    source: str = ""  # where the weights came from
    load: Callable[..., Image.Image] = load_image  # an image source to the model's square of pixels

    def encode_image(self, images: ImageSource | Sequence[ImageSource], *, batch_size: int = BATCH_SIZE) -> Tensor:
        """Return L2-normalized features, float32 [num_images, embed_dim], on the model's device.

        `images`: one or several files' names, Pillow pictures, or `BytesIO`s of files. Raises UserError if one of them
        cannot be read, or if there are none.
        """
        sources = [images] if isinstance(images, str | Path | io.BytesIO | Image.Image) else list(images)
        if not sources:
            raise UserError("no image is given")
        return encode_images(self.model, self._batches(sources, batch_size))[1]

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Return L2-normalized features, float32 [num_texts, embed_dim], on the model's device.

        A text that is too long for the model is cut. Raises UserError if there are none.
        """
        return encode_texts(self.model, [texts] if isinstance(texts, str) else list(texts))

    def classify(
        self,
        images: ImageSource | Sequence[ImageSource],
        classnames: Sequence[str],
        *,
        templates: Sequence[str] = (TEMPLATE,),
        logit_scale: float = LOGIT_SCALE,
    ) -> Tensor:
        """Return each image's probabilities of the classes, float32 [num_images, num_classes].

        A class is the mean of the features of its sentences, the `templates` with its name in place of {}; the
        probabilities are a softmax over `logit_scale` times the cosine similarity (Radford et al. 2021, section 3.1.2).
        Raises UserError as `encode_image` does, for no class, and for a template without {}.
        """
        classifier = build_classifier(self.model, classnames, templates)
        return class_probabilities(self.encode_image(images), classifier, logit_scale)

    def _batches(self, sources: Sequence[ImageSource], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        size, device = self.model.config.image_resolution, self.model.logit_scale.device
        for start in range(0, len(sources), batch_size):
            pictures = []
            for index, source in enumerate(sources[start : start + batch_size], start):
                try:
                    pictures.append(to_tensor(self.load(source, size)))
                except UnreadableImageError as error:
                    name = source if isinstance(source, str | Path) else f"image {index}"
                    raise UserError(f"{name}: cannot be read as an image ({error})") from None
            indices = torch.arange(start, start + len(pictures))
            yield indices, normalize(torch.stack(pictures).to(device), self.image_mean, self.image_std)

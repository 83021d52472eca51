"""The losses. Under torchrun each process compares its own rows with those of all, in both directions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import CLIP
from trainer.config import TrainConfig
from trainer.parallel import gather
from trainer.words import WordLoss

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    gathers: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Symmetric cross-entropy over all pairs of the batch (Radford et al. 2021, figure 3), in float32.

    `image_features`, `text_features`: [batch, embed_dim], L2-normalized, row by row a pair. `logit_scale`: scalar
    multiplier of the cosine similarities, already exponentiated. Returns the scalar loss, and detached scalars to
    log: `loss`, and the shares of images and texts whose own partner is the most similar of the batch. The mean of
    the processes' losses is the loss of the whole batch; without `gathers` each process has a loss of its own pairs.
    """
    logits_per_image, logits_per_text, partners = _logits(image_features, text_features, logit_scale, gathers)
    loss = (F.cross_entropy(logits_per_image, partners) + F.cross_entropy(logits_per_text, partners)) / 2
    return loss, _scalars(loss, logits_per_image, logits_per_text, partners)


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    gathers: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every pair of the batch as a yes-or-no question of its own (Zhai et al. 2023, section 3.2), in float32.

    The summed loss of all pairs over the number of images. Arguments and results are `contrastive_loss`'s;
    `logit_bias` is the scalar added to each logit.
    """
    logits_per_image, logits_per_text, partners = _logits(image_features, text_features, logit_scale, gathers)
    signs = 2 * F.one_hot(partners, logits_per_image.shape[1]) - 1
    loss = -F.logsigmoid(signs * (logits_per_image + logit_bias.float())).sum() / len(logits_per_image)
    return loss, _scalars(loss, logits_per_image, logits_per_text, partners)


LOSSES: dict[str, Loss] = {"softmax": contrastive_loss, "sigmoid": sigmoid_loss}


class Objective:
    """What a run minimizes: the contrastive loss that its config names, and `word_loss_weight` times the words'."""

    def __init__(self, model: CLIP, config: TrainConfig, word_loss: WordLoss | None) -> None:
        self.model = model
        self.contrast = LOSSES[config.loss]
        self.word_loss = word_loss
        self.word_loss_weight = config.word_loss_weight

    def __call__(
        self, image_features: Tensor, text_features: Tensor, indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimize, and detached scalars to log: the contrastive loss's, and `word_loss`.

        Features are as the losses take them; `indices`: int64 [batch], of the images in the training set.
        """
        model = self.model
        loss, scalars = self.contrast(image_features, text_features, model.logit_scale.exp(), model.logit_bias)
        if self.word_loss is None:
            return loss, scalars
        word_loss = self.word_loss(model, image_features, text_features, indices)
        return loss + self.word_loss_weight * word_loss, {**scalars, "word_loss": word_loss.detach()}


def _logits(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, gathers: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this process's rows of both directions' logits [batch, global_batch], and the columns of the partners."""
    with torch.autocast(image_features.device.type, enabled=False):
        image_features, text_features = image_features.float(), text_features.float()
        all_images, first = gather(image_features) if gathers else (image_features, 0)
        all_texts, _ = gather(text_features) if gathers else (text_features, 0)
        logits_per_image = logit_scale.float() * image_features @ all_texts.t()
        logits_per_text = logit_scale.float() * text_features @ all_images.t()
    partners = torch.arange(first, first + len(image_features), device=image_features.device)
    return logits_per_image, logits_per_text, partners


@torch.no_grad()
def _scalars(loss: Tensor, logits_per_image: Tensor, logits_per_text: Tensor, partners: Tensor) -> dict[str, Tensor]:
    return {
        "loss": loss.detach(),
        "image_to_text_accuracy": (logits_per_image.argmax(dim=1) == partners).float().mean(),
        "text_to_image_accuracy": (logits_per_text.argmax(dim=1) == partners).float().mean(),
    }

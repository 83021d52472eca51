"""The contrastive losses, and the sum that a run minimizes.

Under torchrun each process compares its own rows with the rows of all processes, in both directions.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloader.token_table import TokenTable
from model import CLIP
from trainer.config import TrainConfig
from trainer.optional.word_loss import WordLoss
from trainer.parallel import gather

Scalars = dict[str, Tensor]  # detached, by the names that the log gives them


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    across_ranks: bool = True,
) -> tuple[Tensor, Scalars]:
    """Symmetric cross-entropy over all pairs of the batch, in float32 (Radford et al. 2021, figure 3).

    `image_features`, `text_features`: [batch, embed_dim], L2-normalized; row i of both is a pair. `logit_scale`: scalar
    multiplier of the cosine similarities, already exponentiated. Returns the scalar loss, and scalars to log: `loss`
    and the in-batch top-1 accuracy in both directions. The mean of the processes' losses is the loss of the global
    batch; with `across_ranks=False` each process has the loss of its own pairs alone.
    """
    logits_per_image, logits_per_text, targets = _logits(image_features, text_features, logit_scale, across_ranks)
    loss = (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_text, targets)) / 2
    return loss, _scalars(loss, logits_per_image, logits_per_text, targets)


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    *,
    across_ranks: bool = True,
) -> tuple[Tensor, Scalars]:
    """Binary classification of every image-text combination of the batch, in float32 (Zhai et al. 2023, section 3.2).

    Returns the sum over all combinations divided by the number of images. `logit_bias`: scalar added to every logit.
    The other arguments and the results are those of `contrastive_loss`.
    """
    logits_per_image, logits_per_text, targets = _logits(image_features, text_features, logit_scale, across_ranks)
    signs = 2 * F.one_hot(targets, logits_per_image.shape[1]) - 1
    loss = -F.logsigmoid(signs * (logits_per_image + logit_bias.float())).sum() / len(logits_per_image)
    return loss, _scalars(loss, logits_per_image, logits_per_text, targets)


LOSSES: dict[str, Callable[..., tuple[Tensor, Scalars]]] = {"softmax": contrastive_loss, "sigmoid": sigmoid_loss}


class Objective:
    """What a run minimizes: the configured contrastive loss plus `word_loss_weight` times the word loss, if any."""

    def __init__(self, model: CLIP, config: TrainConfig, word_loss: WordLoss | None) -> None:
        self.model = model
        self.contrastive_loss = LOSSES[config.loss]
        self.word_loss = word_loss
        self.word_loss_weight = config.word_loss_weight

    def __call__(self, image_features: Tensor, text_features: Tensor, indices: Tensor) -> tuple[Tensor, Scalars]:
        """Return the scalar to minimize, and scalars to log: those of the contrastive loss, and `word_loss`.

        Features: [batch, embed_dim], L2-normalized. `indices`: int64 [batch], the images' indices in the training set.
        """
        model = self.model
        loss, scalars = self.contrastive_loss(image_features, text_features, model.logit_scale.exp(), model.logit_bias)
        if self.word_loss is None:
            return loss, scalars
        word_loss = self.word_loss(model, image_features, text_features, indices)
        return loss + self.word_loss_weight * word_loss, {**scalars, "word_loss": word_loss.detach()}


def build_objective(model: CLIP, config: TrainConfig, captions: TokenTable | None) -> Objective:
    """Return what the run minimizes. The word loss counts the words of `captions`, those of the training set."""
    word_loss = WordLoss(captions, model.logit_scale.device) if config.word_loss_weight else None
    return Objective(model, config, word_loss)


def _logits(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, across_ranks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this process's rows of both logit matrices, [batch, global_batch], and the column of each row's pair."""
    with torch.autocast(image_features.device.type, enabled=False):
        image_features, text_features = image_features.float(), text_features.float()
        all_images, first = gather(image_features) if across_ranks else (image_features, 0)
        all_texts, _ = gather(text_features) if across_ranks else (text_features, 0)
        logits_per_image = logit_scale.float() * image_features @ all_texts.t()
        logits_per_text = logit_scale.float() * text_features @ all_images.t()
    targets = torch.arange(first, first + len(image_features), device=image_features.device)
    return logits_per_image, logits_per_text, targets


@torch.no_grad()
def _scalars(loss: Tensor, logits_per_image: Tensor, logits_per_text: Tensor, targets: Tensor) -> Scalars:
    return {
        "loss": loss.detach(),
        "image_to_text_accuracy": (logits_per_image.argmax(dim=1) == targets).float().mean(),
        "text_to_image_accuracy": (logits_per_text.argmax(dim=1) == targets).float().mean(),
    }

"""The contrastive loss."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Symmetric cross-entropy over all pairs of the batch (Radford et al. 2021, figure 3), in float32.

    `image_features`, `text_features`: [batch, embed_dim], L2-normalized, row by row a pair. `logit_scale`: scalar
    multiplier of the cosine similarities, already exponentiated. Returns the scalar loss, and detached scalars to
    log: `loss`, and the shares of images and texts whose own partner is the most similar of the batch.
    """
    logits_per_image = logit_scale.float() * image_features.float() @ text_features.float().t()
    partners = torch.arange(len(logits_per_image), device=logits_per_image.device)
    loss = (F.cross_entropy(logits_per_image, partners) + F.cross_entropy(logits_per_image.t(), partners)) / 2
    with torch.no_grad():
        scalars = {
            "loss": loss.detach(),
            "image_to_text_accuracy": (logits_per_image.argmax(dim=1) == partners).float().mean(),
            "text_to_image_accuracy": (logits_per_image.argmax(dim=0) == partners).float().mean(),
        }
    return loss, scalars

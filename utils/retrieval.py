"""Image-text retrieval recall with any number of captions an image."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.inference_mode()
def retrieval_recall(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Return recall@k in [0, 1] both ways, e.g. {"text_to_image_R@1": 0.31, "image_to_text_R@1": 0.42, ...}.

    `image_features`: [num_images, embed_dim], `text_features`: [num_texts, embed_dim], L2-normalized;
    `image_of_text`: int64 [num_texts], each text's row in `image_features`. A text is a hit if its image is among
    its k most similar; an image if any one of its texts is. Of equal similarities the wrong one counts as first.
    Computed in chunks, so that no num_images x num_texts matrix is held.
    """
    text_ranks = []
    for texts, owners in zip(text_features.split(chunk_size), image_of_text.split(chunk_size), strict=True):
        similarities = texts @ image_features.t()
        own = similarities.gather(1, owners[:, None])
        text_ranks.append((similarities >= own).sum(dim=1) - 1)  # its own image is among them

    image_ranks = []
    for start in range(0, len(image_features), chunk_size):
        images = image_features[start : start + chunk_size]
        rows = torch.arange(start, start + len(images), device=images.device)
        similarities = images @ text_features.t()
        is_own = image_of_text[None, :] == rows[:, None]
        best_own = similarities.masked_fill(~is_own, -torch.inf).amax(dim=1, keepdim=True)
        image_ranks.append(((similarities >= best_own) & ~is_own).sum(dim=1))

    recalls = {}
    for direction, ranks in (
        ("text_to_image", torch.cat(text_ranks)),
        ("image_to_text", torch.cat(image_ranks)),
    ):
        recalls |= {f"{direction}_R@{k}": (ranks < k).float().mean().item() for k in ks}
    return recalls

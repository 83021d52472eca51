"""Image-text retrieval with any number of captions per image: ranks, recall, median rank, folds of 1,000 images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FOLD_SIZE = 1000  # images, as in COCO's "1k" protocol (Karpathy & Fei-Fei 2015, section 4.1)


class RetrievalRanks(NamedTuple):
    """The number of wrong items that are at least as similar to a query as the right one; 0 is best."""

    image_to_text: Tensor  # int64 [num_images], for the best-placed caption of each image
    text_to_image: Tensor  # int64 [num_texts]


@torch.no_grad()
def retrieval_ranks(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, *, chunk_size: int = 1024
) -> RetrievalRanks:
    """Rank all texts for every image, and all images for every text.

    `image_features`: [num_images, embed_dim], `text_features`: [num_texts, embed_dim], both L2-normalized;
    `image_of_text`: int64 [num_texts], the row of each text's image in `image_features`. Ties count against the right
    item, and so do similarities that are NaN. Works in chunks of `chunk_size` queries, so that the num_images x
    num_texts matrix is never in memory.
    """
    text_ranks = []
    for texts, rows in zip(text_features.split(chunk_size), image_of_text.split(chunk_size), strict=True):
        similarities = texts @ image_features.t()
        right = similarities.gather(1, rows[:, None])
        text_ranks.append((~(similarities < right)).sum(dim=1) - 1)  # the count includes the right image

    image_ranks = []
    for start in range(0, len(image_features), chunk_size):
        images = image_features[start : start + chunk_size]
        rows = torch.arange(start, start + len(images), device=images.device)
        similarities = images @ text_features.t()
        is_right = image_of_text[None, :] == rows[:, None]
        best = similarities.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        image_ranks.append((~(similarities < best) & ~is_right).sum(dim=1))
    return RetrievalRanks(torch.cat(image_ranks), torch.cat(text_ranks))


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, *, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return recall@k in [0, 1] and the median rank, counted from 1, in both directions.

    {"text_to_image_R@1": 0.31, "image_to_text_R@1": 0.42, ..., "text_to_image_median_rank": 3.0, ...}. A text is a hit
    if its image is among the k most similar; an image is a hit if any of its texts is. Arguments as `retrieval_ranks`.
    """
    metrics = {}
    for name, ranks in retrieval_ranks(image_features, text_features, image_of_text)._asdict().items():
        metrics |= {f"{name}_R@{k}": (ranks < k).float().mean().item() for k in ks}
        metrics[f"{name}_median_rank"] = 1 + ranks.double().quantile(0.5).item()
    return metrics


def fold_metrics(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> tuple[dict[str, float], int]:
    """Return the means of `retrieval_metrics` over folds of 1,000 images with their texts, and the number of folds.

    Needs at least 1,000 images. Folds follow the order of the images; the remainder of the last one is left out.
    """
    folds = []
    for start in range(0, len(image_features) - FOLD_SIZE + 1, FOLD_SIZE):
        is_in = (image_of_text >= start) & (image_of_text < start + FOLD_SIZE)
        fold = image_features[start : start + FOLD_SIZE], text_features[is_in], image_of_text[is_in] - start
        folds.append(retrieval_metrics(*fold))
    return {key: sum(fold[key] for fold in folds) / len(folds) for key in folds[0]}, len(folds)


def format_metrics(metrics: dict[str, float]) -> str:
    """Return a table of recall@1, 5 and 10 in percent, with the median ranks if `metrics` has them."""
    lines = [f"{'':<15} {'R@1':>7} {'R@5':>7} {'R@10':>7}"]
    for name in RetrievalRanks._fields:
        columns = [f"{100 * metrics[f'{name}_R@{k}']:6.1f}%" for k in (1, 5, 10)]
        median = metrics.get(f"{name}_median_rank")
        columns += [] if median is None else [f"  median rank {median:g}"]
        lines.append(f"{name.replace('_', ' '):<15} {' '.join(columns)}")
    return "\n".join(lines)

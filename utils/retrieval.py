"""Image-text retrieval with any number of captions an image: ranks, recall, COCO's folds, nearest neighbours."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FOLD_SIZE = 1000  # images, as in COCO's "1k" protocol (Karpathy & Fei-Fei 2015, section 4.1)


class RetrievalRanks(NamedTuple):
    """How many wrong ones are as similar as, or more similar than, the right one; 0 is best."""

    image_to_text: Tensor  # int64 [num_images], to the best of an image's own texts
    text_to_image: Tensor  # int64 [num_texts]


@torch.no_grad()
def retrieval_ranks(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, *, chunk_size: int = 1024
) -> RetrievalRanks:
    """Rank every image's texts and every text's image.

    `image_features`: [num_images, embed_dim], `text_features`: [num_texts, embed_dim], L2-normalized;
    `image_of_text`: int64 [num_texts], each text's row in `image_features`. Of equal similarities the wrong one counts
    as first, and so does one that is not a number. Computed in chunks, so that no num_images x num_texts matrix is
    held.
    """
    text_ranks = []
    for texts, owners in zip(text_features.split(chunk_size), image_of_text.split(chunk_size), strict=True):
        similarities = texts @ image_features.t()
        own = similarities.gather(1, owners[:, None])
        text_ranks.append((~(similarities < own)).sum(dim=1) - 1)  # its own image is among them

    image_ranks = []
    for start in range(0, len(image_features), chunk_size):
        images = image_features[start : start + chunk_size]
        rows = torch.arange(start, start + len(images), device=images.device)
        similarities = images @ text_features.t()
        is_own = image_of_text[None, :] == rows[:, None]
        best_own = similarities.masked_fill(~is_own, -torch.inf).amax(dim=1, keepdim=True)
        image_ranks.append((~(similarities < best_own) & ~is_own).sum(dim=1))
    return RetrievalRanks(torch.cat(image_ranks), torch.cat(text_ranks))


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, *, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return recall@k in [0, 1] and the median rank, counted from 1, both ways.

    {"text_to_image_R@1": 0.31, "image_to_text_R@1": 0.42, ..., "text_to_image_median_rank": 3.0, ...}. A text is a hit
    if its image is among its k most similar; an image if any one of its texts is. The tensors are those of
    `retrieval_ranks`.
    """
    metrics = {}
    for name, ranks in retrieval_ranks(image_features, text_features, image_of_text)._asdict().items():
        metrics |= {f"{name}_R@{k}": (ranks < k).float().mean().item() for k in ks}
        metrics[f"{name}_median_rank"] = 1 + ranks.double().quantile(0.5).item()
    return metrics


def fold_metrics(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> tuple[dict[str, float], int]:
    """Return the means of `retrieval_metrics` over folds of 1,000 images and their texts, and how many folds there are.

    The folds are in the order of the images; what is left over is not counted. There must be one at least.
    """
    folds = []
    for start in range(0, len(image_features) - FOLD_SIZE + 1, FOLD_SIZE):
        is_in = (image_of_text >= start) & (image_of_text < start + FOLD_SIZE)
        images = image_features[start : start + FOLD_SIZE]
        folds.append(retrieval_metrics(images, text_features[is_in], image_of_text[is_in] - start))
    return {key: sum(fold[key] for fold in folds) / len(folds) for key in folds[0]}, len(folds)


def format_metrics(metrics: dict[str, float]) -> str:
    """Return recall@1, 5 and 10 both ways, in %, and the median ranks if there are any, as a small table."""
    lines = [f"{'':<15} {'R@1':>7} {'R@5':>7} {'R@10':>7}"]
    for name in RetrievalRanks._fields:
        figures = [f"{100 * metrics[f'{name}_R@{k}']:6.1f}%" for k in (1, 5, 10)]
        median = metrics.get(f"{name}_median_rank")
        figures += [] if median is None else [f"  median rank {median:g}"]
        lines.append(f"{name.replace('_', ' '):<15} {' '.join(figures)}")
    return "\n".join(lines)

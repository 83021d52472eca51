"""Images and captions through a trained model, and what retrieval makes of them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from dataloader.batch import Failure
from dataloader.captions import CaptionSet
from dataloader.image_loader import ImageLoader
from model import TrainedCLIP
from utils.images import ImageSource
from utils.retrieval import retrieval_recall
from utils.zero_shot import encode_images, encode_texts


def encode_sources(
    clip: TrainedCLIP, sources: Sequence[ImageSource], *, batch_size: int, num_workers: int
) -> tuple[Tensor, Tensor, list[Failure]]:
    """Encode image files or pictures, with a progress bar.

    Returns the indices [num_readable] of the sources that could be read, their L2-normalized features
    [num_readable, embed_dim], and the others. Raises UserError if nothing can be read.
    """
    loader = ImageLoader(
        sources,
        image_size=clip.model.config.image_resolution,
        image_mean=clip.image_mean,
        image_std=clip.image_std,
        batch_size=batch_size,
        num_workers=num_workers,
        device=clip.model.logit_scale.device,
    )
    bar = tqdm(loader, "encoding images", unit="batch", disable=None, leave=False)
    indices, features = encode_images(clip.model, bar)
    return indices, features, loader.failures


def evaluate_retrieval(
    clip: TrainedCLIP, val_set: CaptionSet, *, batch_size: int, num_workers: int
) -> dict[str, float]:
    """Return recall@1, 5 and 10 both ways over all images of `val_set` and all their captions.

    Unreadable images are left out with their captions. Call it with the bare model, which is set to eval mode.
    """
    clip.model.eval()
    sources = val_set.shards or [image.path for image in val_set.images]
    indices, image_features, _ = encode_sources(clip, sources, batch_size=batch_size, num_workers=num_workers)
    captions = [val_set.images[index].captions for index in indices.tolist()]
    text_features = encode_texts(clip.model, [caption for own in captions for caption in own])
    image_of_text = torch.tensor([row for row, own in enumerate(captions) for _ in own], device=indices.device)
    return retrieval_recall(image_features, text_features, image_of_text)


def describe_recall(recalls: dict[str, float], val_set: CaptionSet) -> str:
    """Return the recalls as a small table of percentages."""
    lines = [f"retrieval on {len(val_set.images):,} held-out images, {val_set.num_captions:,} captions"]
    lines += [f"{'':<15} {'R@1':>7} {'R@5':>7} {'R@10':>7}"]
    for direction in ("text_to_image", "image_to_text"):
        figures = [f"{100 * recalls[f'{direction}_R@{k}']:6.1f}%" for k in (1, 5, 10)]
        lines.append(f"{direction.replace('_', ' '):<15} {' '.join(figures)}")
    return "\n".join(lines)

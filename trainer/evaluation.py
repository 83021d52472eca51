"""Images and captions through a trained model, and what retrieval makes of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dataloader.batch import Failure
from dataloader.captions import CaptionSet
from dataloader.image_loader import ImageLoader
from model import TrainedCLIP
from utils.images import ImageSource
from utils.zero_shot import encode_images


def encode_sources(
    clip: TrainedCLIP,
    sources: Sequence[ImageSource],
    *,
    batch_size: int,
    num_workers: int,
    shows_progress: bool = True,
) -> tuple[Tensor, Tensor, list[Failure]]:
    """Encode image files or pictures, with a progress bar where there is a terminal and `shows_progress`.

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
        load=clip.load,
    )
    bar = tqdm(loader, "encoding images", unit="batch", disable=None if shows_progress else True, leave=False)
    indices, features = encode_images(clip.model, bar)
    return indices, features, loader.failures


class CaptionFeatures(NamedTuple):
    """The features of a captioned set's readable images and all their captions."""

    images: Tensor  # float32 [num_images, embed_dim], L2-normalized
    texts: Tensor  # float32 [num_texts, embed_dim], L2-normalized
    image_of_text: Tensor  # int64 [num_texts], each text's row in `images`


def encode_captions(
    clip: TrainedCLIP, caption_set: CaptionSet, **options: Any
) -> tuple[CaptionFeatures, list[int], list[Failure]]:
    """Encode the images of `caption_set` and their captions; the options are those of `encode_sources`.

    Returns the features, the numbers of the images that could be read, in the order of the features, and the others.
    """
    sources = caption_set.shards or [image.path for image in caption_set.images]
    indices, image_features, failures = encode_sources(clip, sources, **options)
    captions = [caption_set.images[index].captions for index in indices.tolist()]
    text_features = clip.encode_text([caption for own in captions for caption in own])
    image_of_text = torch.tensor([row for row, own in enumerate(captions) for _ in own], device=indices.device)
    return CaptionFeatures(image_features, text_features, image_of_text), indices.tolist(), failures

"""A second loss: predict the words of all captions of an image, from the image and from one of its captions."""

import numpy as np
import torch
from torch import Tensor

from dataloader.token_table import TokenTable
from model import CLIP
from utils.errors import UserError

LOGIT_SCALE = 30.0  # multiplier of L2-normalized features


class WordLoss:
    """Cross-entropy between the tokens of an image's captions and the tokens predicted from its features.

    As in SuperClass (Huang et al. 2024, section 3), the labels are tokens weighted by their inverse document
    frequency. Two differences: the text features predict the tokens too, so that a caption learns what the image's
    other captions say; and the classifier is not a new layer but the transposed text projection and token embedding
    (weight tying, Press & Wolf 2017) plus the log prior of each token.
    """

    def __init__(self, captions: TokenTable, device: torch.device) -> None:
        """Count the tokens of the training captions. Raises UserError if no two images share a word."""
        images, tokens, counts = _count_tokens(captions)
        num_images = len(captions.first) - 1
        document_frequency = np.bincount(tokens)  # of each token: the number of images whose captions have it
        vocabulary = np.flatnonzero((document_frequency > 1) & (document_frequency < num_images))
        if not len(vocabulary):
            raise UserError("the captions of no two training images share a word; set word_loss_weight to 0")
        is_known = np.isin(tokens, vocabulary)
        images, tokens, counts = images[is_known], tokens[is_known], counts[is_known]
        weights = counts * np.log(num_images / document_frequency[tokens])
        weights /= np.bincount(images, weights, num_images)[images]
        columns = np.searchsorted(vocabulary, tokens)
        prior = np.bincount(columns, weights, len(vocabulary)) / num_images
        self.first = torch.from_numpy(np.cumsum([0, *np.bincount(images, minlength=num_images)]))  # of each image
        self.columns = torch.from_numpy(columns).to(device)
        self.weights = torch.from_numpy(weights.astype(np.float32)).to(device)
        self.vocabulary = torch.from_numpy(vocabulary).to(device)
        self.log_prior = torch.from_numpy(prior).log().float().to(device)

    def __call__(self, model: CLIP, image_features: Tensor, text_features: Tensor, indices: Tensor) -> Tensor:
        """Return the mean loss of both encoders, a float32 scalar.

        `image_features`, `text_features`: [batch, embed_dim], L2-normalized. `indices`: int64 [batch], the images'
        indices in the training set.
        """
        columns, weights = self.labels(indices)
        with torch.autocast(image_features.device.type, enabled=False):
            features = LOGIT_SCALE * torch.stack([image_features, text_features]).float()
            embedding = model.token_embedding.weight[self.vocabulary]
            logits = features @ model.text_projection.t() @ embedding.t() + self.log_prior  # [2, batch, num_words]
            log_probs = logits.log_softmax(dim=-1).gather(2, columns.expand(2, -1, -1))
        return -(weights * log_probs).sum(dim=-1).mean()

    def labels(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return each image's labels, int64 columns [batch, max_labels], and their weights, which sum to 1 per row.

        `indices` is on the CPU, which knows `max_labels` without waiting for the device that has the labels.
        """
        spans = torch.stack([self.first[indices], self.first[indices + 1]])
        max_labels = max(1, int((spans[1] - spans[0]).max()))
        device = self.columns.device
        starts, ends = spans.to(device, non_blocking=True)[:, :, None]
        places = starts + torch.arange(max_labels, device=device)
        is_label = places < ends
        places = places.clamp(max=len(self.columns) - 1)
        return self.columns[places], torch.where(is_label, self.weights[places], 0)


def _count_tokens(captions: TokenTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (image, token, count), int64 each, of the tokens between the markers of each image's captions."""
    lengths = np.diff(captions.ends)
    image_of_caption = np.repeat(np.arange(len(captions.first) - 1), np.diff(captions.first))
    is_word = np.ones(len(captions.ids), dtype=bool)
    is_word[captions.ends[:-1]] = is_word[captions.ends[1:] - 1] = False
    pairs = np.repeat(image_of_caption, lengths) << 16 | captions.ids
    pairs, counts = np.unique(pairs[is_word], return_counts=True)
    return pairs >> 16, pairs & 0xFFFF, counts

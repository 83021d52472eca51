"""Strings, token ids and random numbers as arrays, which worker processes share with the main process.

A forked worker that reads a list of Python objects copies its memory page by page, because every access changes a
reference count. Arrays are read without being written to, so memory stays constant over the epochs.
"""

import logging
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataloader.storage.identity import fingerprint
from utils.files import atomic_open
from utils.tokenizer import get_tokenizer

LOGGER = logging.getLogger(__name__)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class PackedStrings(Sequence[str]):
    """A sequence of strings in one byte array."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)])

    @classmethod
    def from_arrays(cls, data: np.ndarray, ends: np.ndarray) -> "PackedStrings":
        """Return the strings with the bytes data[ends[i] : ends[i + 1]]."""
        strings = cls(())
        strings.data, strings.ends = data, ends
        return strings

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self.ends[index], self.ends[index + 1]
        return self.data[start:end].tobytes().decode("utf-8", "surrogatepass")


class TokenTable(NamedTuple):
    """The token ids of every image's captions, with start and end markers. `tokenize` makes it."""

    ids: np.ndarray  # uint16 [num_tokens]
    ends: np.ndarray  # int64 [num_captions + 1]: caption i is ids[ends[i] : ends[i + 1]]
    first: np.ndarray  # int64 [num_images + 1]: image i has the captions first[i] .. first[i + 1] - 1
    context_length: int

    def draw(self, images: np.ndarray, draws: np.ndarray, multiple: int = 8) -> Tensor:
        """Return one caption of each image as ids, int64 [num_images, length], zero after each end marker.

        `images`: int [num_images]. `draws`: float [num_images] in [0, 1), which choose the captions. `length` is that
        of the longest caption, rounded up to a `multiple` to limit the number of different lengths.
        """
        first, counts = self.first[images], self.first[images + 1] - self.first[images]
        chosen = first + (draws * counts).astype(np.int64)
        starts, lengths = self.ends[chosen], self.ends[chosen + 1] - self.ends[chosen]
        length = min(-(-int(lengths.max()) // multiple) * multiple, self.context_length)
        columns = np.arange(length)
        positions = np.minimum(starts[:, None] + columns, len(self.ids) - 1)
        return torch.from_numpy(np.where(columns < lengths[:, None], self.ids[positions], 0).astype(np.int64))


def tokenize(
    captions: Sequence[Sequence[str]],
    context_length: int,
    cache_file: Path | None = None,
    logger: logging.Logger = LOGGER,
) -> TokenTable:
    """Tokenize the captions of each image; captions longer than `context_length` tokens are truncated.

    With `cache_file`, return what an earlier call stored there for the same captions, or store the result.
    """
    texts = [caption for captions_of_image in captions for caption in captions_of_image]
    first = np.cumsum([0, *map(len, captions)])
    identity = fingerprint([str(context_length)], texts) if cache_file else ""
    if cache_file and cache_file.is_file():
        try:
            with np.load(cache_file) as stored:
                if str(stored["fingerprint"]) == identity:
                    return TokenTable(stored["ids"], stored["ends"], first, context_length)
            reason = "is of other captions or another context length"
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            reason = "is damaged"
        logger.info(f"{cache_file} {reason}: tokenizing the captions again")
    encode = get_tokenizer().encode_with_markers
    encoded = [np.array(encode(text, context_length), dtype=np.uint16) for text in texts]
    table = TokenTable(np.concatenate(encoded), np.cumsum([0, *map(len, encoded)]), first, context_length)
    if cache_file:
        try:
            with atomic_open(cache_file) as file:
                np.savez(file, ids=table.ids, ends=table.ends, fingerprint=identity)
        except OSError as error:
            logger.info(f"{cache_file} cannot be written ({error.strerror}): each run tokenizes the captions")
    return table


def random_numbers(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Return `count` uniform random numbers in [0, 1) for each sample, float64 [num_indices, count].

    Each number is a hash of (seed, epoch, index, column) and depends on nothing else: SplitMix64 (Steele et al. 2014,
    figure 16).
    """
    key = _mix(np.array([seed], dtype=np.uint64) + GOLDEN)
    key = _mix(key ^ np.uint64(epoch))
    key = _mix(key ^ np.asarray(indices).astype(np.uint64))
    return (_mix(key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

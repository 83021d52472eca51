"""What workers share: strings, token ids and random numbers as arrays.

A forked worker that reads a list of Python objects copies it, page by page, because reading counts references.
Arrays are read without being written, so memory stays flat over the epochs.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.files import open_whole
from utils.tokenizer import get_tokenizer

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class PackedStrings(Sequence):
    """Strings in one byte array, by their number from 0."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)])

    @classmethod
    def from_arrays(cls, data: np.ndarray, ends: np.ndarray) -> "PackedStrings":
        """Return the strings whose bytes `data` holds, each up to its place in `ends`."""
        strings = cls(())
        strings.data, strings.ends = data, ends
        return strings

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> str:
        start, end = self.ends[number], self.ends[number + 1]
        return self.data[start:end].tobytes().decode("utf-8", "surrogatepass")


class TokenTable:
    """The captions of every image as token ids: 2 bytes an id, both markers included."""

    def __init__(self, captions: Sequence[Sequence[str]], context_length: int, cache_file: Path | None = None) -> None:
        """Tokenize the captions of each image, or read what an earlier call wrote to `cache_file` for the same."""
        self.context_length = context_length
        self.first = np.cumsum([0, *map(len, captions)])  # of each image, and one past the last
        texts = [text for own in captions for text in own]
        fingerprint = _fingerprint(texts, context_length) if cache_file else ""
        if cache_file and cache_file.is_file():
            with np.load(cache_file) as stored:
                if str(stored["fingerprint"]) == fingerprint:
                    self.ids, self.ends = stored["ids"], stored["ends"]
                    return
        encode = get_tokenizer().encode_with_markers
        encoded = [np.array(encode(text, context_length), dtype=np.uint16) for text in texts]
        self.ids = np.concatenate(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)])
        if cache_file:
            with open_whole(cache_file) as file:
                np.savez(file, ids=self.ids, ends=self.ends, fingerprint=fingerprint)

    def draw(self, images: np.ndarray, draws: np.ndarray, multiple: int = 8) -> Tensor:
        """Return one caption of each image as int64 ids [num_images, length], zeros after each end marker.

        `draws`, in [0, 1), choose among an image's captions. `length` is the longest text's, rounded up to a
        `multiple` so that few lengths occur.
        """
        first, counts = self.first[images], self.first[images + 1] - self.first[images]
        chosen = first + (draws * counts).astype(np.int64)
        starts, lengths = self.ends[chosen], self.ends[chosen + 1] - self.ends[chosen]
        length = min(-(-int(lengths.max()) // multiple) * multiple, self.context_length)
        columns = np.arange(length)
        places = np.minimum(starts[:, None] + columns, len(self.ids) - 1)
        return torch.from_numpy(np.where(columns < lengths[:, None], self.ids[places], 0).astype(np.int64))


def random_numbers(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Return `count` uniform numbers in [0, 1) for each sample, float64 [num_indices, count].

    A hash of (seed, epoch, index, column), so that a sample's numbers depend on nothing else: SplitMix64's
    (Steele et al. 2014, figure 16).
    """
    key = _mix(np.array([seed], dtype=np.uint64) + GOLDEN)
    key = _mix(key ^ np.uint64(epoch))
    key = _mix(key ^ np.asarray(indices).astype(np.uint64))
    return (_mix(key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _fingerprint(texts: Sequence[str], context_length: int) -> str:
    digest = hashlib.sha256(str(context_length).encode())
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()

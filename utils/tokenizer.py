"""CLIP's byte-pair encoding (Radford et al. 2021, section 2.4): lower-case text, 49,408 ids, start and end markers."""

import gzip
import html
from collections.abc import Sequence
from functools import lru_cache

import ftfy
import numpy as np
import regex
import torch
from tokenizers.models import BPE
from torch import Tensor

from utils.packages import package_file

VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
VOCAB_SIZE = 49_408
NUM_MERGES = 49152 - 256 - 2  # the file lists 262,144; CLIP uses the first ones
START, END = "<start_of_text>", "<end_of_text>"
WORD = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


class CLIPTokenizer:
    """Convert texts to token ids, equal to those of open_clip's `SimpleTokenizer`. `get_tokenizer` builds it."""

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        self._symbol_of_byte = _symbol_of_byte()
        # OpenAI's order of ids: bytes, bytes at the end of a word, merges, the two markers.
        symbols = self._symbol_of_byte.values()
        vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), START, END]
        ids = {token: index for index, token in enumerate(vocabulary)}
        self.start, self.end = ids[START], ids[END]
        self._bpe = BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>")
        self._encode_word = lru_cache(maxsize=1 << 16)(self._encode_word)  # captions share most of their words

    def __call__(self, texts: Sequence[str], *, context_length: int = 77, multiple: int = 8) -> Tensor:
        """Tokenize `texts` to ids, int64 [num_texts, length], zero after each end marker.

        `length` is that of the longest text, rounded up to a `multiple`. A text with more than `context_length` tokens
        is truncated and keeps its end marker.
        """
        encoded = [self.encode_with_markers(text, context_length) for text in texts]
        longest = max(map(len, encoded), default=0)
        length = min(-(-longest // multiple) * multiple, context_length)
        tokens = np.zeros((len(encoded), length), dtype=np.int64)
        for row, ids in zip(tokens, encoded, strict=True):
            row[: len(ids)] = ids
        return torch.from_numpy(tokens)

    def encode_with_markers(self, text: str, context_length: int) -> list[int]:
        """Return the ids of a text between its markers, truncated to `context_length` ids in total."""
        return [self.start, *self.encode(text)[: context_length - 2], self.end]

    def encode(self, text: str) -> list[int]:
        """Return all ids of a text, without markers."""
        return [token_id for word in WORD.findall(clean(text)) for token_id in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        if word in (START, END):
            return [self.start if word == START else self.end]
        symbols = "".join(self._symbol_of_byte[byte] for byte in word.encode("utf-8"))
        return [token.id for token in self._bpe.tokenize(symbols)]


def clean(text: str) -> str:
    """Repair broken Unicode, decode HTML entities twice (web text is often encoded twice), lower, collapse spaces."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # most captions need no repair
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1)
def get_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer from the vocabulary of the installed `open_clip_torch`. Raises UserError without it."""
    file = package_file("open_clip", VOCABULARY_FILE)
    with gzip.open(file, mode="rt", encoding="utf-8") as lines:
        next(lines)  # a version line
        return CLIPTokenizer([tuple(next(lines).split()) for _ in range(NUM_MERGES)])


def _symbol_of_byte() -> dict[int, str]:
    """Return GPT-2's printable character for each byte, in the order of CLIP's first 256 ids."""
    printable = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}

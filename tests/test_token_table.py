from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataloader import token_table
from dataloader.token_table import PackedStrings, random_numbers, tokenize
from tests.conftest import message_logger
from utils.tokenizer import get_tokenizer

CAPTIONS = [("a cat", "a black cat on a very long red sofa"), ("two dogs",), ("a bird", "ein Vögelchen", "birds")]


@given(st.lists(st.text(st.characters())))  # also lone surrogates, which JSON may contain
def test_packed_strings_come_back(strings):
    packed = PackedStrings(strings)
    assert len(packed) == len(strings) and list(packed) == strings


def test_drawn_captions_have_the_tokenizers_ids():
    table, tokenizer = tokenize(CAPTIONS, 77), get_tokenizer()
    for draw in (0.0, 0.4, 0.6, 0.999):
        images = np.array([2, 0, 1, 0])
        wanted = [CAPTIONS[image][int(draw * len(CAPTIONS[image]))] for image in images]
        assert torch.equal(table.draw(images, np.full(4, draw)), tokenizer(wanted))


def test_a_long_caption_is_truncated_and_keeps_its_end_marker():
    table, text = tokenize([("cat " * 100,)], 20), "cat " * 100
    assert torch.equal(table.draw(np.array([0]), np.array([0.5])), get_tokenizer()([text], context_length=20))


def test_stored_tokens_are_read_again_unless_the_captions_changed(tmp_path: Path, monkeypatch):
    file = tmp_path / "tokens.npz"
    first = tokenize(CAPTIONS, 77, file)
    with monkeypatch.context() as patch:
        patch.setattr(token_table, "get_tokenizer", lambda: None)  # a stored table needs no tokenizer
        again = tokenize(CAPTIONS, 77, file)
    assert np.array_equal(first.ids, again.ids) and np.array_equal(first.ends, again.ends)
    changed = tokenize([("a dog",), *CAPTIONS[1:]], 77, file)
    assert not np.array_equal(changed.ids, first.ids)
    assert tokenize(CAPTIONS, 5, file).ids.max() == first.ids.max() and len(tokenize(CAPTIONS, 5, file).ids) < 31


def test_stored_tokens_that_are_damaged_are_made_again(tmp_path: Path):
    file, messages = tmp_path / "tokens.npz", []
    first = tokenize(CAPTIONS, 77, file)
    file.write_bytes(file.read_bytes()[:-200])
    again = tokenize(CAPTIONS, 77, file, message_logger(messages))
    assert np.array_equal(first.ids, again.ids) and messages == [f"{file} is damaged: tokenizing the captions again"]
    tokenize(CAPTIONS, 77, file, message_logger(messages))
    tokenize(CAPTIONS, 77, file / "tokens.npz", message_logger(messages))
    assert len(messages) == 2 and "cannot be written" in messages[1]


def test_random_numbers_depend_on_seed_epoch_and_index_alone():
    indices = np.arange(2_000)
    numbers = random_numbers(3, 5, indices, 9)
    shuffled = np.random.default_rng(0).permutation(indices)
    assert np.array_equal(random_numbers(3, 5, shuffled, 9), numbers[shuffled])
    assert np.array_equal(random_numbers(3, 5, indices[7:8], 4), numbers[7:8, :4])
    for other in (random_numbers(4, 5, indices, 9), random_numbers(3, 6, indices, 9)):
        assert not np.isin(other, numbers).any()


def test_random_numbers_are_uniform_and_uncorrelated():
    numbers = np.stack([random_numbers(11, epoch, np.arange(4_000), 9) for epoch in range(5)])
    assert numbers.min() >= 0 and numbers.max() < 1
    histogram = np.histogram(numbers, bins=20, range=(0, 1))[0] / numbers.size
    assert np.abs(histogram - 0.05).max() < 0.002  # 4 standard deviations
    columns = np.corrcoef(numbers.transpose(0, 2, 1).reshape(45, -1))
    assert np.abs(columns - np.eye(45)).max() < 0.08

"""The word loss: its labels, its value, and its place in a run."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from dataloader.token_table import tokenize
from tests.runs import last_checkpoint, read_rows, tiny_flags
from trainer.config import load_train_config
from trainer.loss import Objective
from trainer.optional.word_loss import WordLoss
from utils.errors import UserError
from utils.tokenizer import get_tokenizer

CAPTIONS = [["a dog runs", "the dog and a dog"], ["a cat runs"], ["a blue cat", "a zebra"], ["a"]]


def make_word_loss(captions: list[list[str]] = CAPTIONS) -> WordLoss:
    return WordLoss(tokenize(captions, 77), torch.device("cpu"))


def words_of(word_loss: WordLoss, index: int) -> dict[str, float]:
    """Return the labels of an image as words with their weights."""
    columns, weights = word_loss.labels(torch.tensor([index]))
    encode = get_tokenizer().encode_with_markers
    names = {encode(word, 77)[1]: word for word in ("a", "and", "bird", "blue", "cat", "dog", "runs", "the", "zebra")}
    words = (names[token] for token in word_loss.vocabulary[columns[0]].tolist())
    return {word: weight for word, weight in zip(words, weights[0].tolist(), strict=True) if weight}


def test_labels_are_words_of_several_but_not_all_images_weighted_by_count_and_rarity():
    word_loss = make_word_loss()
    assert words_of(word_loss, 1) == pytest.approx({"runs": 0.5, "cat": 0.5})
    assert words_of(word_loss, 0) == pytest.approx({"runs": 1.0})  # "dog" is in one image only, "a" in all
    assert words_of(word_loss, 3) == {}
    captions = [["dog dog dog cat"], ["dog"], ["cat"], ["cat"], ["bird"]]
    dog, cat = 3 * math.log(5 / 2), math.log(5 / 3)
    assert words_of(make_word_loss(captions), 0) == pytest.approx({"dog": dog / (dog + cat), "cat": cat / (dog + cat)})


def test_labels_follow_the_order_of_the_indices():
    word_loss = make_word_loss()
    columns, weights = word_loss.labels(torch.tensor([3, 1, 2, 1]))
    assert weights.sum(dim=1).tolist() == pytest.approx([0, 1, 1, 1])
    assert torch.equal(columns[1], columns[3]) and torch.equal(weights[1], weights[3])


def test_zero_features_cost_the_entropy_of_the_words(tiny_model):
    word_loss = make_word_loss([["dog"], ["dog"], ["cat"], ["cat"], ["cat"]])
    zeros = torch.zeros(5, tiny_model.config.embed_dim)
    loss = word_loss(tiny_model, zeros, zeros, torch.arange(5))
    assert loss.item() == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)), rel=1e-5)


def test_minimizing_it_aligns_images_and_captions_of_the_same_words(tiny_model):
    word_loss = make_word_loss([["dog"], ["dog"], ["cat"], ["cat"]])
    features = torch.nn.Parameter(torch.randn(2, 4, tiny_model.config.embed_dim, generator=torch.manual_seed(1)))
    optimizer = torch.optim.Adam([features], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        loss = word_loss(tiny_model, *F.normalize(features, dim=-1), torch.arange(4))
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * math.log(2)
    similarity = F.cosine_similarity(features[0][:, None], features[1][None], dim=-1).detach()
    assert similarity[:2, :2].min() > similarity[:2, 2:].max()


def test_the_objective_adds_it_by_its_weight_and_logs_it_separately(tiny_model):
    word_loss = make_word_loss([["dog"], ["dog"], ["cat"], ["cat"]])
    images, texts = F.normalize(torch.randn(2, 4, tiny_model.config.embed_dim), dim=-1)
    plain, scalars = Objective(tiny_model, load_train_config(), None)(images, texts, torch.arange(4))
    assert "word_loss" not in scalars
    objective = Objective(tiny_model, load_train_config({"word_loss_weight": 0.5}), word_loss)
    loss, scalars = objective(images, texts, torch.arange(4))
    words = word_loss(tiny_model, images, texts, torch.arange(4))
    assert loss.item() == pytest.approx((plain + 0.5 * words).item())
    assert (scalars["loss"], scalars["word_loss"]) == (plain, words) and not scalars["word_loss"].requires_grad


@pytest.mark.slow
def test_a_run_of_the_best_recipe_minimizes_and_logs_it(tmp_path: Path, caption_files):
    settings = {"trainer.logging_steps": 3, "trainer.optimizer.decay_timescale": 100}
    train.main([*tiny_flags(caption_files, tmp_path, epochs=10, **settings), "--recipe", "best"])
    losses = [row["word_loss"] for row in read_rows(tmp_path, "word_loss")]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.05
    groups = last_checkpoint(tmp_path)["optimizer_state_dict"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == pytest.approx([1 / (1e-3 * 100 * 3), 0])


def test_captions_without_a_common_word_are_refused():
    with pytest.raises(UserError, match="word_loss_weight"):
        make_word_loss([["dog"], ["cat"]])

"""The labels that captions give their images."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from dataloader.tables import TokenTable
from model import read_checkpoint
from tests.conftest import tiny_training_flags
from trainer.checkpoint import list_checkpoints
from trainer.config import load_train_config
from trainer.loss import Objective
from trainer.words import WordLoss
from utils.errors import UserError
from utils.tokenizer import get_tokenizer

CAPTIONS = [["a dog runs", "the dog and a dog"], ["a cat runs"], ["a blue cat", "a zebra"], ["a"]]


def make_word_loss(captions: list[list[str]] = CAPTIONS) -> WordLoss:
    return WordLoss(TokenTable(captions, 77), torch.device("cpu"))


def words_of(word_loss: WordLoss, index: int) -> dict[str, float]:
    columns, weights = word_loss.labels(torch.tensor([index]))
    encode = get_tokenizer().encode_with_markers
    names = {encode(word, 77)[1]: word for word in ("a", "and", "bird", "blue", "cat", "dog", "runs", "the", "zebra")}
    words = (names[token] for token in word_loss.vocabulary[columns[0]].tolist())
    return {word: weight for word, weight in zip(words, weights[0].tolist(), strict=True) if weight}


def test_labels_are_the_words_that_some_images_share_weighted_by_how_rare_they_are():
    word_loss = make_word_loss()
    assert words_of(word_loss, 1) == pytest.approx({"runs": 0.5, "cat": 0.5})
    assert words_of(word_loss, 0) == pytest.approx({"runs": 1.0})  # a dog is in one image only, "a" in all
    assert words_of(word_loss, 3) == {}
    captions = [["dog dog dog cat"], ["dog"], ["cat"], ["cat"], ["bird"]]
    dog, cat = 3 * math.log(5 / 2), math.log(5 / 3)
    assert words_of(make_word_loss(captions), 0) == pytest.approx({"dog": dog / (dog + cat), "cat": cat / (dog + cat)})


def test_any_order_of_images_has_each_its_own_labels():
    word_loss = make_word_loss()
    columns, weights = word_loss.labels(torch.tensor([3, 1, 2, 1]))
    assert weights.sum(dim=1).tolist() == pytest.approx([0, 1, 1, 1])
    assert torch.equal(columns[1], columns[3]) and torch.equal(weights[1], weights[3])


def test_features_that_say_nothing_cost_the_entropy_of_the_words(tiny_model):
    word_loss = make_word_loss([["dog"], ["dog"], ["cat"], ["cat"], ["cat"]])
    nothing = torch.zeros(5, tiny_model.config.embed_dim)
    loss = word_loss(tiny_model, nothing, nothing, torch.arange(5))
    assert loss.item() == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)), rel=1e-5)


def test_images_and_captions_of_the_same_words_come_to_have_similar_features(tiny_model):
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


def test_it_is_added_by_its_weight_and_logged_apart(tiny_model):
    word_loss = make_word_loss([["dog"], ["dog"], ["cat"], ["cat"]])
    images, texts = F.normalize(torch.randn(2, 4, tiny_model.config.embed_dim), dim=-1)
    plain, scalars = Objective(tiny_model, load_train_config(), None)(images, texts, torch.arange(4))
    assert "word_loss" not in scalars
    objective = Objective(tiny_model, load_train_config([("word_loss_weight", 0.5)]), word_loss)
    loss, scalars = objective(images, texts, torch.arange(4))
    words = word_loss(tiny_model, images, texts, torch.arange(4))
    assert loss.item() == pytest.approx((plain + 0.5 * words).item())
    assert (scalars["loss"], scalars["word_loss"]) == (plain, words) and not scalars["word_loss"].requires_grad


def test_a_run_of_the_best_recipe_minimizes_and_logs_it(tmp_path: Path, caption_files):
    flags = [*tiny_training_flags(*caption_files, tmp_path), "--epochs", 10, "--batch_size", 8]
    settings = ("recipe=best", "logging_steps=3", "optimizer.decay_timescale=100", "per_gpu_eval_batch_size=8")
    train.main([*map(str, flags), *(flag for setting in settings for flag in ("--set", f"trainer.{setting}"))])
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["word_loss"] for row in rows if "word_loss" in row]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.05
    checkpoint = read_checkpoint(list_checkpoints(tmp_path / "saved_checkpoints")[-1])
    decays = [group["weight_decay"] for group in checkpoint["optimizer_state_dict"]["param_groups"]]
    assert decays == pytest.approx([1 / (1e-3 * 100 * 3), 0])


def test_captions_that_share_no_words_are_refused():
    with pytest.raises(UserError, match="no two training images share a word; set word_loss_weight to 0"):
        make_word_loss([["dog"], ["cat"]])

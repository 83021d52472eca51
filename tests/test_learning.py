"""The benchmark of recipes: its plans, tables and drawings, without training."""

import json

import pytest
import torch

from benchmarks import learning
from benchmarks.learning import Plan, draw_curves, find_result, format_table
from dataloader.token_table import tokenize
from model import load_model_config
from trainer.optional.word_loss import WordLoss
from trainer.run.configs import load_configs
from trainer.run.flags import parse_args


def test_every_recipe_costs_what_the_reference_does(monkeypatch):
    costs = {True: 0.3, False: 0.25}
    monkeypatch.setattr(learning, "gflop_per_pair", lambda config, has_words: costs[has_words])
    reference, best, alone = (Plan("RN-small", name, 60) for name in ("reference", "best", "augmentation alone"))
    assert (reference.epochs, best.epochs, alone.epochs) == (60, 50, 60)
    ends = [plan.tflop(plan.epochs * learning.STEPS_PER_EPOCH) for plan in (reference, best, alone)]
    assert ends == pytest.approx([60 * 5952 * 0.25 / 1e3] * 3)


@pytest.mark.slow
def test_the_word_loss_costs_its_matrix_products(data_dir):
    config = load_model_config({"name": "RN-small"})
    captions = [image.captions for image in learning.read_split("train").images]
    num_words = len(WordLoss(tokenize(captions, config.context_length), torch.device("cpu")).vocabulary)
    more = learning.gflop_per_pair(config, True) - learning.gflop_per_pair(config, False)
    width = config.embed_dim + num_words  # of both products: text_projection, then the token embedding
    assert more == pytest.approx(2 * 6 * config.transformer_width * width / 1e9, rel=0.02)


def test_each_part_of_the_best_recipe_is_trained_alone_and_left_out():
    assert learning.RECIPES["reference"] == {}
    assert sorted(key for keys in learning.PARTS.values() for key in keys) == sorted(learning.RECIPES["best"])
    for part in learning.PARTS:
        rest, alone = learning.RECIPES[f"best without {part}"], learning.RECIPES[f"{part} alone"]
        assert rest | alone == learning.RECIPES["best"] and not rest.keys() & alone.keys()


def test_the_flags_of_all_parts_give_the_best_recipe():
    by_name, by_key = (
        load_configs(parse_args(flags, "")) for flags in (["--recipe", "best"], learning.set_flags(learning.BEST))
    )
    assert by_name.dataloader == by_key.dataloader
    assert by_name.trainer.optimizer == by_key.trainer.optimizer
    assert by_name.trainer.word_loss_weight == by_key.trainer.word_loss_weight == 1


def make_result(recipe: str, seed: int, recall: float) -> dict:
    return {
        "recipe": recipe, "seed": seed, "epochs": 10, "tflop": 2.0, "seconds": 5.0, "train_loss": 0.5,
        "val": dict.fromkeys(learning.RECALLS, recall), "curve": [[1.0, recall / 2], [2.0, recall]],
    }  # fmt: skip


def test_the_table_has_mean_and_spread_over_seeds_and_the_drawing_is_written(tmp_path):
    results = [make_result("reference", 1, 0.1), make_result("reference", 2, 0.3), make_result("best", 1, 0.4)]
    rows = format_table(results, "val").splitlines()
    assert rows[2].startswith("| reference | 2 | 10 | 2.0 | 5 | 0.50 ± 0.00 | 20.0 ± 14.1 |")
    assert rows[3].startswith("| best | 1 | 10 | 2.0 | 5 | 0.50 | 40.0 |")
    assert len(format_table(results, "test").splitlines()) == 2
    draw_curves(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_finished_run_is_found_and_its_newest_line_counts(tmp_path):
    file = tmp_path / "results.jsonl"
    assert find_result(file, {"recipe": "best", "seed": 1}) is None
    lines = [make_result("best", 1, 0.4), make_result("best", 2, 0.5), make_result("best", 1, 0.4) | {"test": {}}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert find_result(file, {"recipe": "best", "seed": 1}) == lines[2]
    assert find_result(file, {"recipe": "reference", "seed": 1}) is None

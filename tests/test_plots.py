import json
from pathlib import Path

import pytest
from PIL import Image

from utils.errors import UserError
from utils.plots import plot_loss_curve, plot_predictions, plot_similarity

RANKING = [
    ("a class with a very long name that does not fit", 0.6),
    ("$x_1$ <b>", 0.3),
    ("語", 0.05),
    ("d", 0.03),
    ("e", 0.02),
]


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), (3 * index, 90, 200)) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 12, pytest.param(50, marks=pytest.mark.slow)])
def test_predictions_fit_a_page_for_any_number_of_images(tmp_path: Path, count):
    path = plot_predictions(pictures(count), [RANKING] * count, tmp_path / "new" / "demo.png")
    width, height = Image.open(path).size
    assert 0.4 < width / height < 3 and max(width, height) < 6_000


@pytest.mark.parametrize(("num_images", "num_texts"), [(1, 1), (8, 8), (23, 3)])
def test_similarities_are_drawn_for_any_numbers(tmp_path: Path, num_images, num_texts):
    similarities = [[0.1 * text - 0.2 for text in range(num_texts)] for _ in range(num_images)]
    path = plot_similarity(pictures(num_images), ["a $caption" * 30] * num_texts, similarities, tmp_path / "s.png")
    assert Image.open(path).size[0] > 400


@pytest.mark.parametrize("losses", [[], [4.0], [4.2, 3.0, float("nan"), 2.0]])
def test_a_loss_curve_is_drawn_from_any_log(tmp_path: Path, losses):
    rows = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    assert plot_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "c.png", batch_size=64).stat().st_size > 5_000


def test_a_figure_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        plot_predictions(pictures(1), [RANKING], tmp_path / "file" / "demo.png")

"""The contrastive losses against their definitions in plain Python; test_parallel.py checks their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from trainer.loss import contrastive_loss, sigmoid_loss


def plain_logits(images: torch.Tensor, texts: torch.Tensor, scale: float) -> list[list[float]]:
    rows, columns = images.tolist(), texts.tolist()
    return [[scale * sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in rows]


def plain_contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: float) -> float:
    """Radford et al. 2021, figure 3."""
    logits = plain_logits(images, texts, scale)
    size = len(logits)
    columns = list(zip(*logits, strict=True))

    def cross_entropy(row: list[float], target: int) -> float:
        return math.log(sum(math.exp(value) for value in row)) - row[target]

    by_image = sum(cross_entropy(logits[i], i) for i in range(size)) / size
    by_text = sum(cross_entropy(columns[i], i) for i in range(size)) / size
    return (by_image + by_text) / 2


def plain_sigmoid_loss(images: torch.Tensor, texts: torch.Tensor, scale: float, bias: float) -> float:
    """Zhai et al. 2023, section 3.2."""
    logits = plain_logits(images, texts, scale)
    size = len(logits)
    total = 0.0
    for i in range(size):
        for j in range(size):
            sign = 1 if i == j else -1
            total += math.log(1 + math.exp(-sign * (logits[i][j] + bias)))
    return total / size


def make_features(seed: int, size: int = 7, dim: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(size, dim, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 100.0])
def test_contrastive_loss_equals_its_definition(scale):
    images, texts = make_features(1), make_features(2)
    loss, scalars = contrastive_loss(images, texts, torch.tensor(scale))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_contrastive_loss(images, texts, scale), rel=1e-5)
    assert scalars["loss"].item() == loss.item() and not scalars["loss"].requires_grad


def test_sigmoid_loss_equals_its_definition():
    images, texts = make_features(1), make_features(2)
    loss, scalars = sigmoid_loss(images, texts, torch.tensor(10.0), torch.tensor(-5.0))
    assert loss.dtype == torch.float32 and scalars["loss"].item() == loss.item()
    assert loss.item() == pytest.approx(plain_sigmoid_loss(images, texts, 10.0, -5.0), rel=1e-5)


def test_equal_features_give_the_loss_of_guessing_and_matching_ones_an_accuracy_of_one():
    same = make_features(3)[:1].expand(8, -1)
    assert contrastive_loss(same, same, torch.tensor(10.0))[0].item() == pytest.approx(math.log(8), rel=1e-5)
    images = make_features(4)
    loss, scalars = contrastive_loss(images, images, torch.tensor(100.0))
    assert scalars["image_to_text_accuracy"] == scalars["text_to_image_accuracy"] == 1
    assert loss < 0.1


def test_accuracy_is_counted_in_each_direction():
    images = torch.eye(3)
    texts = F.normalize(torch.tensor([[1.0, 0.9, 0.0], [0.0, 1.0, 0.0], [0.0, 0.99, 1.0]]), dim=-1)
    _, scalars = contrastive_loss(images, texts, torch.tensor(1.0))
    assert scalars["image_to_text_accuracy"].item() == pytest.approx(1.0)
    _, scalars = contrastive_loss(images, texts[[1, 0, 2]], torch.tensor(1.0))
    assert scalars["image_to_text_accuracy"].item() == pytest.approx(1 / 3)
    assert scalars["text_to_image_accuracy"].item() == pytest.approx(1 / 3)


def test_half_precision_features_are_compared_in_float32():
    images, texts = make_features(5).bfloat16(), make_features(6).bfloat16()
    expected = plain_contrastive_loss(images.double(), texts.double(), 100.0)
    assert contrastive_loss(images, texts, torch.tensor(100.0))[0].item() == pytest.approx(expected, rel=1e-5)

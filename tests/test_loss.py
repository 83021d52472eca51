import math

import pytest
import torch
import torch.nn.functional as F

from trainer.loss import contrastive_loss


def reference_loss(images: torch.Tensor, texts: torch.Tensor, scale: float) -> float:
    """The loss of figure 3 of the paper in plain Python numbers."""
    size = len(images)
    logits = [
        [scale * sum(a * b for a, b in zip(images[i], texts[j], strict=True)) for j in range(size)] for i in range(size)
    ]
    columns = list(zip(*logits, strict=True))
    log_sum_exp = lambda row: math.log(sum(math.exp(value) for value in row))  # noqa: E731
    by_image = sum(log_sum_exp(logits[i]) - logits[i][i] for i in range(size)) / size
    by_text = sum(log_sum_exp(columns[i]) - columns[i][i] for i in range(size)) / size
    return (by_image + by_text) / 2


def features(seed: int, size: int = 7, dim: int = 5) -> torch.Tensor:
    return F.normalize(
        torch.randn(size, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 100.0])
def test_loss_equals_the_papers(scale):
    images, texts = features(1), features(2)
    loss, scalars = contrastive_loss(images, texts, torch.tensor(scale))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_loss(images.tolist(), texts.tolist(), scale), rel=1e-5)
    assert scalars["loss"].item() == loss.item() and not scalars["loss"].requires_grad


def test_unrelated_features_give_chance_and_partners_give_accuracy_one():
    same = features(3)[:1].expand(8, -1)
    assert contrastive_loss(same, same, torch.tensor(10.0))[0].item() == pytest.approx(math.log(8), rel=1e-5)
    images = features(4)
    loss, scalars = contrastive_loss(images, images, torch.tensor(100.0))
    assert scalars["image_to_text_accuracy"] == scalars["text_to_image_accuracy"] == 1
    assert loss < 0.1


def test_accuracies_are_counted_each_way():
    images = torch.eye(3)
    texts = F.normalize(torch.tensor([[1.0, 0.9, 0.0], [0.0, 1.0, 0.0], [0.0, 0.99, 1.0]]), dim=-1)
    _, scalars = contrastive_loss(images, texts, torch.tensor(1.0))
    assert scalars["image_to_text_accuracy"].item() == pytest.approx(1.0)
    _, scalars = contrastive_loss(images, texts[[1, 0, 2]], torch.tensor(1.0))
    assert scalars["image_to_text_accuracy"].item() == pytest.approx(1 / 3)
    assert scalars["text_to_image_accuracy"].item() == pytest.approx(1 / 3)


def test_half_precision_features_are_compared_in_float32():
    images, texts = features(5).bfloat16(), features(6).bfloat16()
    expected = reference_loss(images.double().tolist(), texts.double().tolist(), 100.0)
    assert contrastive_loss(images, texts, torch.tensor(100.0))[0].item() == pytest.approx(expected, rel=1e-5)

import pytest
import torch
import torch.nn.functional as F

from utils.retrieval import fold_metrics, format_metrics, retrieval_metrics, retrieval_ranks


def retrieval_recall(*case) -> dict[str, float]:
    return {name: value for name, value in retrieval_metrics(*case).items() if "R@" in name}


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return integer features, so that similarities are exact and often equal, with 1 or more captions per image."""
    generator = torch.Generator().manual_seed(seed)
    num_images = 1 + seed % 13
    extra = torch.randint(num_images, (seed % 21,), generator=generator)
    image_of_text = torch.cat([torch.arange(num_images), extra])
    image_of_text = image_of_text[torch.randperm(len(image_of_text), generator=generator)]
    images = torch.randint(-1, 2, (num_images, 4), generator=generator).float()
    texts = torch.randint(-1, 2, (len(image_of_text), 4), generator=generator).float()
    return images, texts, image_of_text


def slow_ranks(images, texts, image_of_text) -> dict[str, list[int]]:
    """Rank by sorting whole rows, with wrong items first among equal similarities."""
    similarities = (texts @ images.t()).tolist()
    owners = image_of_text.tolist()
    text_to_image, image_to_text = [], []
    for row, owner in zip(similarities, owners, strict=True):
        order = sorted(range(len(row)), key=lambda image: (-row[image], image == owner))
        text_to_image.append(order.index(owner))
    for image in range(len(images)):
        order = sorted(range(len(owners)), key=lambda text: (-similarities[text][image], owners[text] == image))
        image_to_text.append(next(place for place, text in enumerate(order) if owners[text] == image))
    return {"image_to_text": image_to_text, "text_to_image": text_to_image}


def torchmetrics_recall(preds: torch.Tensor, target: torch.Tensor, k: int) -> torch.Tensor:
    """Return the share of a query's relevant items in the top k, as torchmetrics' `retrieval_recall` does."""
    order = preds.topk(min(k, len(preds))).indices
    return target[order].sum() / target.sum()


@pytest.mark.parametrize("hundred", range(4))
def test_metrics_equal_sorting_with_ties(hundred):
    for seed in range(100 * hundred, 100 * hundred + 100):
        case = random_case(seed)
        expected = slow_ranks(*case)
        ranks = retrieval_ranks(*case, chunk_size=1 + seed % 5)
        metrics = retrieval_metrics(*case)
        for name, values in expected.items():
            assert getattr(ranks, name).tolist() == values
            for k in (1, 5, 10):
                assert metrics[f"{name}_R@{k}"] == pytest.approx(sum(rank < k for rank in values) / len(values))
            middle = sorted(values)[len(values) // 2], sorted(values)[(len(values) - 1) // 2]
            assert metrics[f"{name}_median_rank"] == pytest.approx(1 + sum(middle) / 2)


@pytest.mark.parametrize("hundred", range(4))
def test_recall_equals_that_of_torchmetrics(hundred):
    """Wrong items get a little more, so that ties count against the right one; any share above 0 is a hit."""
    for seed in range(100 * hundred, 100 * hundred + 100):
        images, texts, image_of_text = random_case(seed)
        recalls = retrieval_recall(images, texts, image_of_text)
        is_own = image_of_text[None] == torch.arange(len(images))[:, None]
        preds = images @ texts.t() + torch.where(is_own, 0.0, 0.5)
        for k in (1, 5, 10):
            hits = [torchmetrics_recall(row, own, k) > 0 for row, own in zip(preds, is_own, strict=True)]
            assert recalls[f"image_to_text_R@{k}"] == pytest.approx(sum(hits).item() / len(hits))
            shares = [torchmetrics_recall(row, own, k) for row, own in zip(preds.t(), is_own.t(), strict=True)]
            assert recalls[f"text_to_image_R@{k}"] == pytest.approx(sum(shares).item() / len(shares))


def test_recall_is_one_for_perfect_features_and_zero_for_equal_ones():
    images = F.normalize(torch.randn(30, 16), dim=-1)
    image_of_text = torch.arange(30).repeat_interleave(5)
    assert set(retrieval_recall(images, images[image_of_text], image_of_text).values()) == {1.0}
    assert set(retrieval_recall(torch.ones(30, 4), torch.ones(150, 4), image_of_text).values()) == {0.0}


def test_recall_is_zero_for_nan_features():
    image_of_text = torch.arange(30).repeat_interleave(5)
    nothing = torch.full((150, 4), torch.nan)
    assert set(retrieval_recall(torch.ones(30, 4), nothing, image_of_text).values()) == {0.0}
    assert set(retrieval_recall(nothing[:30], torch.ones(150, 4), image_of_text).values()) == {0.0}


def test_the_order_of_captions_does_not_matter():
    images, texts, owners = torch.randn(10, 8), torch.randn(40, 8), torch.arange(10).repeat(4)
    order = torch.randperm(40)
    assert retrieval_recall(images, texts, owners) == retrieval_recall(images, texts[order], owners[order])


def test_folds_are_means_over_a_thousand_images_each():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2500, 8, generator=generator)
    image_of_text = torch.randperm(2500, generator=generator).repeat(2)
    texts = images[image_of_text] + torch.randn(5000, 8, generator=generator)
    metrics, num_folds = fold_metrics(images, texts, image_of_text)
    assert num_folds == 2
    parts = []
    for start in (0, 1000):
        own = [text for text, image in enumerate(image_of_text.tolist()) if start <= image < start + 1000]
        parts.append(retrieval_metrics(images[start : start + 1000], texts[own], image_of_text[own] - start))
    assert metrics == pytest.approx({key: (parts[0][key] + parts[1][key]) / 2 for key in metrics})
    assert metrics["text_to_image_R@1"] > retrieval_metrics(images, texts, image_of_text)["text_to_image_R@1"]


def test_the_table_has_recalls_in_percent_and_the_median_rank():
    metrics = {f"{way}_R@{k}": k / 100 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert "median" not in format_metrics(metrics)
    lines = format_metrics(
        {**metrics, "image_to_text_median_rank": 12.5, "text_to_image_median_rank": 3.0}
    ).splitlines()
    assert lines[1].split() == ["image", "to", "text", "1.0%", "5.0%", "10.0%", "median", "rank", "12.5"]
    assert lines[2].endswith("median rank 3")

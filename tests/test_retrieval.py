import pytest
import torch
import torch.nn.functional as F

from utils.retrieval import retrieval_recall


def slow_recall(images, texts, image_of_text, k):
    """By sorting whole rows; of equal similarities the wrong one comes first."""
    similarities = (texts @ images.t()).tolist()
    owners = image_of_text.tolist()
    hits = 0
    for row, owner in zip(similarities, owners, strict=True):
        order = sorted(range(len(row)), key=lambda image: (-row[image], image == owner))
        hits += owner in order[:k]
    text_to_image, hits = hits / len(owners), 0
    for image in range(len(images)):
        order = sorted(range(len(owners)), key=lambda text: (-similarities[text][image], owners[text] == image))
        hits += any(owners[text] == image for text in order[:k])
    return text_to_image, hits / len(images)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("chunk_size", [3, 1024])
def test_recall_equals_sorting_with_ties_and_any_number_of_captions(seed, chunk_size):
    generator = torch.Generator().manual_seed(seed)
    num_images = 12
    image_of_text = torch.cat([torch.arange(num_images), torch.randint(num_images, (20,), generator=generator)])
    # Integers, so that similarities are exact and many of them equal.
    images = torch.randint(-1, 2, (num_images, 4), generator=generator).float()
    texts = torch.randint(-1, 2, (len(image_of_text), 4), generator=generator).float()
    recalls = retrieval_recall(images, texts, image_of_text, chunk_size=chunk_size)
    for k in (1, 5, 10):
        expected = slow_recall(images, texts, image_of_text, k)
        assert (recalls[f"text_to_image_R@{k}"], recalls[f"image_to_text_R@{k}"]) == pytest.approx(expected)


def test_perfect_features_give_one_and_equal_ones_zero():
    images = F.normalize(torch.randn(30, 16), dim=-1)
    image_of_text = torch.arange(30).repeat_interleave(5)
    assert set(retrieval_recall(images, images[image_of_text], image_of_text).values()) == {1.0}
    assert set(retrieval_recall(torch.ones(30, 4), torch.ones(150, 4), image_of_text).values()) == {0.0}


def test_the_order_of_captions_does_not_matter():
    images, texts, owners = torch.randn(10, 8), torch.randn(40, 8), torch.arange(10).repeat(4)
    order = torch.randperm(40)
    assert retrieval_recall(images, texts, owners) == retrieval_recall(images, texts[order], owners[order])

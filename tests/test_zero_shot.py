import dataclasses
import math
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from model import CLIP, TrainedCLIP
from tests.conftest import TINY
from utils import imagenet
from utils.errors import UserError
from utils.zero_shot import (
    CIFAR100_FILE,
    TEMPLATE,
    read_class_names,
    read_templates,
    wilson_interval,
    zero_shot_accuracy,
)


def trained(model: CLIP) -> TrainedCLIP:
    return TrainedCLIP(model)


def test_a_class_is_the_normalized_mean_of_its_sentences(tiny_model):
    clip = trained(tiny_model)
    classifier = clip.build_classifier(["cat", "palm tree"], ["a photo of a {}.", "{} or {{}}"])
    sentences = [["a photo of a cat.", "cat or {cat}"], ["a photo of a palm tree.", "palm tree or {palm tree}"]]
    expected = torch.stack([F.normalize(clip.encode_text(group).mean(0), dim=0) for group in sentences])
    torch.testing.assert_close(classifier, expected)


def test_the_batch_size_does_not_change_text_features(tiny_model):
    clip, texts = trained(tiny_model), ["a cat", "a much longer sentence about a dog", "birds"] * 3
    torch.testing.assert_close(clip.encode_text(texts, batch_size=2), clip.encode_text(texts))


def test_a_template_without_braces_is_refused(tiny_model):
    with pytest.raises(UserError, match="has no {} for the class name"):
        trained(tiny_model).build_classifier(["cat"], ["a {}", "a photo"])


def test_accuracy_is_counted_by_class_index():
    classifier = torch.eye(7)
    features = F.normalize(torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [0, 9, 8, 7, 6, 5, 4]]), dim=1)
    accuracy = zero_shot_accuracy(features, torch.tensor([0, 4, 6]), classifier)
    assert accuracy.top1.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert accuracy.top5.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert accuracy.total.tolist() == [1, 0, 0, 0, 1, 0, 1]
    assert accuracy.percentages() == pytest.approx((100 / 3, 200 / 3))


def test_fewer_than_five_classes_are_all_among_the_top_five():
    accuracy = zero_shot_accuracy(torch.eye(3), torch.tensor([1, 1, 2]), torch.eye(3))
    assert accuracy.percentages() == pytest.approx((200 / 3, 100))


def test_class_names_are_words_or_the_lines_of_a_file(tmp_path: Path):
    (tmp_path / "names.txt").write_text("pine_tree\n\n  café \n", encoding="utf-8")
    assert read_class_names([str(tmp_path / "names.txt")]) == ["pine tree", "café"]
    assert read_class_names(["cat", "pickup_truck"]) == ["cat", "pickup truck"]
    names = read_class_names([str(CIFAR100_FILE)])
    assert len(set(names)) == 100 and names == sorted(names) and {"aquarium fish", "worm"} <= set(names)


def test_bad_class_name_files_are_named(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("absent.txt", "cannot be read"),
        ("binary.txt", "not UTF-8"),
        ("empty.txt", "no class names"),
    ):
        with pytest.raises(UserError, match=message):
            read_class_names([str(tmp_path / name)])


def test_the_confusion_counts_predictions_by_class():
    labels = torch.tensor([0, 0, 2, 1])
    accuracy = zero_shot_accuracy(torch.eye(3)[[0, 2, 2, 0]], labels, torch.eye(3))
    assert accuracy.confusion.tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 1]]


def test_the_interval_equals_wilsons():
    """Both bounds p solve |share - p| = 1.96 sqrt(p (1 - p) / n)."""
    for hits, total in ((3, 20), (1, 1000), (480, 500)):
        for bound in wilson_interval(hits, total):
            p = bound / 100
            assert abs(hits / total - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / total), rel=1e-9)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 100


def test_templates_are_sets_files_and_sentences(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a {}\n\n the {} \n", encoding="utf-8")
    assert read_templates(["single"]) == [TEMPLATE]
    assert len(read_templates(["openai"])) == 80 and len(set(read_templates(["openai"]))) == 80
    assert read_templates(["simple"])[:2] == ["itap of a {}.", "a bad photo of the {}."]
    assert read_templates([str(tmp_path / "prompts.txt"), "x {}"]) == ["a {}", "the {}", "x {}"]
    (tmp_path / "empty.txt").touch()
    for value, message in (("absent.txt", "absent.txt cannot be read"), ("empty.txt", "empty.txt is empty")):
        with pytest.raises(UserError, match=message):
            read_templates([value if value == "absent.txt" else str(tmp_path / value)])


@pytest.mark.slow
@torch.no_grad()
def test_all_of_imagenet_with_80_templates_equals_open_clips_classifier():
    """1,000 classes x 80 templates: compares names, templates, tokens, means and normalization."""
    torch.manual_seed(0)
    ours = CLIP(dataclasses.replace(TINY, transformer_width=16)).eval()
    model = OpenClipTokens(ours)
    tokenizer = open_clip.get_tokenizer("RN50")
    expected = open_clip.build_zero_shot_classifier(
        model, tokenizer, open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES, num_classes_per_batch=50
    )
    classifier = trained(ours).build_classifier(list(imagenet.classnames().values()), read_templates(["openai"]))
    assert classifier.shape == (1000, 32)
    torch.testing.assert_close(classifier, expected.t(), atol=1e-5, rtol=0)


class OpenClipTokens(torch.nn.Module):
    """A model of ours with the interface that open_clip's builder needs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def encode_text(self, tokens, normalize):
        assert normalize
        return F.normalize(self.model.encode_text(tokens[:, :32]), dim=-1)  # no prompt of ImageNet is longer

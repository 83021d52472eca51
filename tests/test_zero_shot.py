from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from utils.errors import UserError
from utils.zero_shot import (
    CIFAR100_FILE,
    build_classifier,
    encode_texts,
    read_class_names,
    zero_shot_accuracy,
)


@torch.inference_mode()
def test_a_class_is_the_normalized_mean_of_its_sentences(tiny_model):
    classifier = build_classifier(tiny_model, ["cat", "palm tree"], ["a photo of a {}.", "{} or {{}}"])
    sentences = [["a photo of a cat.", "cat or {cat}"], ["a photo of a palm tree.", "palm tree or {palm tree}"]]
    expected = torch.stack([F.normalize(encode_texts(tiny_model, own).mean(0), dim=0) for own in sentences])
    torch.testing.assert_close(classifier, expected)


def test_texts_are_encoded_alike_in_any_batch_size(tiny_model):
    texts = ["a cat", "a much longer sentence about a dog", "birds"] * 3
    torch.testing.assert_close(encode_texts(tiny_model, texts, batch_size=2), encode_texts(tiny_model, texts))


def test_a_template_needs_a_place_for_the_name(tiny_model):
    with pytest.raises(UserError, match="has no {} where"):
        build_classifier(tiny_model, ["cat"], ["a photo"])


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


def test_class_names_come_as_words_or_as_a_file(tmp_path: Path):
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

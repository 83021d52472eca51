import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloader.captions import CaptionSet, read_captions
from dataloader.sample import make_sample, make_test_images, scenes
from dataloader.sample.drawings import BACKGROUNDS, COLORS, THINGS
from dataloader.sample.scenes import TEST_SCENES
from utils.zero_shot import CIFAR100_FILE, read_class_names


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, num_train=60, num_val=30)
    return folder


def read_split(folder: Path, split: str) -> CaptionSet:
    return read_captions(folder / split, folder / f"annotations/captions_{split}.json")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_the_sample_is_in_cocos_format(drawn):
    for split, count in (("train", 60), ("val", 30)):
        caption_set = read_split(drawn, split)
        assert len(caption_set.images) == count and caption_set.missing == []
        assert all(len(set(image.captions)) == 5 for image in caption_set.images)
        assert Image.open(caption_set.images[0].path).size == (224, 224)
    train, val = (read_split(drawn, split).images for split in ("train", "val"))
    assert not {image.image_id for image in train} & {image.image_id for image in val}
    assert any(caption.startswith("a photo of a") for image in train for caption in image.captions)


def test_objects_are_twenty_cifar100_classes():
    assert len(THINGS) == 20
    assert set(THINGS) <= set(read_class_names([str(CIFAR100_FILE)]))


def test_no_two_images_of_the_full_dataset_show_the_same_scene(tmp_path: Path):
    pictures = scenes.plan(tmp_path, 2000, 200, 11)
    shown = [picture.scene for picture in pictures]
    assert len({*shown, *TEST_SCENES}) == 2000 + 200 + 12
    assert [picture.path.parent.name for picture in pictures] == ["train"] * 2000 + ["val"] * 200
    for attribute, values in (("thing", THINGS), ("color", COLORS), ("background", BACKGROUNDS)):
        counts = [sum(getattr(scene, attribute) == value for scene in shown[:2000]) for value in values]
        assert min(counts) > 0.7 * 2000 / len(values)
    assert 0.2 < np.mean([scene.other != "" for scene in shown]) < 0.4


def test_held_out_captions_describe_the_whole_scene(tmp_path: Path):
    for picture in scenes.plan(tmp_path, 0, 50, 11):
        for caption in scenes.captions(picture):
            scene = picture.scene
            words = [scene.size, scene.thing, scene.color, scene.position, scene.other, scene.other_color]
            assert all(word in caption for word in words)


@pytest.mark.slow
def test_the_same_seed_draws_the_same_files_and_another_does_not(drawn, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scenes.os, "cpu_count", lambda: 1)
    make_sample(tmp_path / "same", num_train=60, num_val=30)
    assert files(tmp_path / "same") == files(drawn)
    make_sample(tmp_path / "other", num_train=3, num_val=2, seed=12)
    first = "train/000000000001.jpg"
    assert files(tmp_path / "other")[first] != files(drawn)[first]


@pytest.mark.slow
def test_a_finished_dataset_is_kept_and_an_unfinished_one_is_completed(drawn):
    before = {file: file.stat().st_mtime_ns for file in drawn.rglob("*.jpg")}
    make_sample(drawn, num_train=60, num_val=30)
    assert {file: file.stat().st_mtime_ns for file in drawn.rglob("*.jpg")} == before
    content = files(drawn)
    next((drawn / "val").iterdir()).unlink()
    make_sample(drawn, num_train=60, num_val=30)
    assert files(drawn) == content
    assert json.loads((drawn / "sample.json").read_text())["num_train"] == 60


def test_the_test_images_are_those_in_the_repository(tmp_path: Path):
    make_test_images(tmp_path)
    committed = Path(__file__).resolve().parents[1] / "test_images"
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == sorted(file.name for file in committed.iterdir()) and len(names) == 12
    for name in names:  # versions of Pillow may round differently
        drawn, kept = (np.asarray(Image.open(folder / name), dtype=float) for folder in (tmp_path, committed))
        assert np.abs(drawn - kept).mean() < 2

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from dataloader.classification import load_cifar, load_class_folders, load_imagenet
from utils.errors import UserError
from utils.images import find_images


def write_cifar100(folder: Path, monkeypatch, images: np.ndarray, labels: list[int], classnames: list[str]) -> Path:
    """Write a test split in CIFAR100's format and give torchvision its checksums."""
    files = folder / "CIFAR100" / CIFAR100.base_folder
    files.mkdir(parents=True)
    contents = {
        "test": {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), "fine_labels": labels},
        "meta": {"fine_label_names": classnames},
        "train": {},
    }
    sums = {}
    for name, content in contents.items():
        (files / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((files / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return folder / "CIFAR100"


def test_cifar_is_read_with_spaces_for_underscores(tmp_path: Path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    folder = write_cifar100(tmp_path, monkeypatch, images, [1, 0, 2, 2, 1], ["apple", "palm_tree", "whale"])
    dataset = load_cifar(folder)
    assert dataset.classnames == ["apple", "palm tree", "whale"] and dataset.labels == [1, 0, 2, 2, 1]
    assert all(np.array_equal(picture, pixels) for picture, pixels in zip(dataset.images, images, strict=True))


def test_cifar_that_cannot_be_downloaded_names_the_address(tmp_path: Path, monkeypatch):
    def no_network(self):
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", no_network)
    with pytest.raises(UserError, match="CIFAR10.* download https://.*cifar-10-python.tar.gz"):
        load_cifar(tmp_path / "CIFAR10")
    with pytest.raises(UserError, match="CIFAR10 or CIFAR100"):
        load_cifar(tmp_path / "cifar")


def make_folders(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "1.png")
        (root / name / "notes.txt").touch()
    return root


def test_each_folder_is_a_class(tmp_path: Path):
    dataset = load_class_folders(make_folders(tmp_path, ["palm_tree", "apple", ".hidden"]))
    assert dataset.classnames == ["apple", "palm tree"] and dataset.labels == [0, 1]
    assert [image.parent.name for image in dataset.images] == ["apple", "palm_tree"]
    assert load_class_folders(tmp_path, ["fruit", "plant"]).classnames == ["fruit", "plant"]


@pytest.mark.parametrize(
    ("names", "classnames", "message"),
    [
        (["n01440764", "n01443537"], None, "numbers or ids .* --class_names"),
        (["0", "1", "10"], None, "numbers or ids"),
        (["a", "b"], ["x"], "1 names for the 2 folders"),
        ([], None, "contains no folder"),
    ],
)
def test_folders_without_usable_names_are_refused(tmp_path: Path, names, classnames, message):
    with pytest.raises(UserError, match=message):
        load_class_folders(make_folders(tmp_path, names), classnames)


def test_folders_without_images_are_refused(tmp_path: Path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    for load, message in ((load_class_folders, "contain no image"), (find_images, "contains no image")):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "set")
        with pytest.raises(UserError, match="does not exist"):
            load(tmp_path / "absent")


def test_macos_leftovers_are_no_classes_and_no_images(tmp_path: Path):
    for name in ("cat/1.png", "dog/1.png", "__MACOSX/cat/._1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "cat/._1.png")
    found = load_class_folders(tmp_path)
    assert found.classnames == ["cat", "dog"] and len(found.images) == 2


def make_classes(folder: Path, *names: str) -> Path:
    """Write pictures of these names; return the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def test_numbered_folders_take_their_names_in_numerical_order(tmp_path: Path):
    make_classes(tmp_path, *(f"{number}/{k}.png" for number in range(12) for k in range(number + 1)))
    found = load_class_folders(tmp_path, [f"name{number}" for number in range(12)])
    assert [found.labels.count(label) for label in range(12)] == list(range(1, 13))
    assert found.classnames[10] == "name10" and found.class_ids[10] == "10"


@pytest.mark.parametrize(
    ("folders", "classnames"),
    [
        (("n02085620-Chihuahua", "n02085782-Japanese_spaniel"), ["Chihuahua", "Japanese spaniel"]),
        (("001.Black_footed_Albatross", "002.ak47"), ["Black footed Albatross", "ak47"]),
        (("1-room", "2-room"), ["1-room", "2-room"]),  # without their numbers two classes would be one
        (("747-cockpit", "tram"), ["747-cockpit", "tram"]),  # a number that only one class has is part of its name
    ],
)
def test_a_number_before_every_name_is_no_part_of_it(tmp_path: Path, folders, classnames):
    found = load_class_folders(make_classes(tmp_path, *(f"{folder}/1.png" for folder in folders)))
    assert found.classnames == classnames and found.class_ids == list(folders)
    assert any(folders[0] in note for note in found.notes) == (classnames[0] != folders[0])


@pytest.mark.parametrize(
    "folders", [("1_cat", "2_dog", "10_bird"), ("class1", "class2", "class10"), ("1.cat", "2.dog", "10.bird")]
)
def test_names_of_a_file_follow_the_numbers_in_the_folders_names(tmp_path: Path, folders):
    make_classes(tmp_path, *(f"{folder}/1.png" for folder in folders))
    found = load_class_folders(tmp_path, ["cat", "dog", "bird"])
    assert found.class_ids == list(folders) and any("order of their numbers" in note for note in found.notes)
    assert [found.class_ids[label] for label in found.labels] == [image.parent.name for image in found.images]


def test_folders_of_splits_are_no_classes(tmp_path: Path):
    make_classes(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/1.png")
    with pytest.raises(UserError, match=f"are splits .*--data_dir {tmp_path / 'val'}"):
        load_class_folders(tmp_path)


def test_a_name_that_two_folders_have_is_noted(tmp_path: Path):
    found = load_class_folders(make_classes(tmp_path, "palm_tree/1.png", "palm tree/1.png", "oak/1.png"))
    assert any("1 class names belong to several folders (e.g. 'palm tree')" in note for note in found.notes)


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
def test_what_is_left_out_is_counted_by_reason(tmp_path: Path):
    make_classes(tmp_path, "cat/1.png", "dog/1.png", "stray.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat/._1.png")
    (tmp_path / "cat/broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat/link").symlink_to(tmp_path / "dog")
    os.mkfifo(tmp_path / "cat/pipe.png")
    (tmp_path / "dog/photo.heic").touch()
    notes = load_class_folders(tmp_path).notes
    for reason, example in (
        ("1 images outside of the folders that are read", "stray.png"),
        ("1 leftovers of macOS", "cat/._1.png"),
        ("1 broken links", "cat/broken.png"),
        ("1 links to folders", "cat/link"),
        ("1 pipes or devices", "cat/pipe.png"),
        ("1 files that are not images", "dog/photo.heic"),
    ):
        assert any(note.startswith(f"left out: {reason}") and f"(e.g. {example})" in note for note in notes), reason
    assert len(notes) == 6


def test_nested_images_count_and_what_is_left_out_is_noted(tmp_path: Path):
    make_classes(tmp_path, "bird/images/1.png", "bird/2.png", "cat/1.png", "cat/__MACOSX/3.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "cat/list.txt").touch()
    found = load_class_folders(tmp_path)
    assert found.labels == [0, 0, 1] and found.classnames == ["bird", "cat", "dog"]
    assert any("1 class folders" in note and "dog" in note for note in found.notes)
    assert any("not images" in note and "list.txt" in note for note in found.notes)


def test_a_variant_of_imagenet_under_another_name_is_noted(tmp_path: Path):
    found = load_imagenet(make_classes(tmp_path / "imagenet-a-mini", "n01498041/1.png"))
    assert found.title == "ImageNet val" and any("1,000 classes" in note for note in found.notes)
    link = tmp_path / "imagenet-a"
    link.symlink_to(tmp_path / "imagenet-a-mini")
    assert load_imagenet(link).title == "ImageNet-A" and "among 200 classes" in load_imagenet(link).notes[0]

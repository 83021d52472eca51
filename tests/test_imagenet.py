"""The ImageNet family: the class of each folder, and the candidate classes of each data set."""

from pathlib import Path

import open_clip
import pytest
from PIL import Image
from timm.data import ImageNetInfo

from dataloader.classification import load_imagenet
from utils import imagenet
from utils.errors import UserError


def make_set(root: Path, folders: list[str]) -> Path:
    for name in folders:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "1.JPEG")
    (root / "README.txt").touch()
    return root


def test_names_and_ids_equal_those_of_open_clip_and_timm():
    names = imagenet.classnames()
    assert list(names) == ImageNetInfo().label_names()
    assert list(names.values()) == list(open_clip.IMAGENET_CLASSNAMES)
    assert (names["n01440764"], names["n15075141"]) == ("tench", "toilet paper")
    assert names["n02012849"] == "crane bird" and names["n03126707"] == "construction crane"
    for name, templates in (
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert [template.replace("{}", "x") for template in imagenet.templates(name)] == [f("x") for f in templates]


@pytest.mark.parametrize(
    ("subset", "members", "others"),
    [  # by the published lists, goldfish is only in R, American robin only in A, tench in neither
        ("A", {"n01498041", "n01558993", "n12267677"}, {"n01443537", "n01440764"}),
        ("R", {"n01443537", "n01484850"}, {"n01558993", "n01440764"}),
    ],
)
def test_a_subset_has_its_200_classes(subset, members, others):
    ids = imagenet.subset_ids(subset)
    assert len(ids) == len(set(ids)) == 200 and set(ids) < set(imagenet.classnames())
    assert members < set(ids) and not others & set(ids)


@pytest.mark.parametrize(
    ("folder", "title", "num_classes"),
    [
        ("imagenet-a", "ImageNet-A", 200),
        ("imagenet-r", "ImageNet-R", 200),
        ("ImageNet-Sketch", "ImageNet-Sketch", 1000),
        ("ILSVRC2012_val", "ImageNet val", 1000),
    ],
)
def test_folders_named_by_wordnet_id(tmp_path: Path, folder, title, num_classes):
    ids = imagenet.subset_ids(title[-1]) if num_classes == 200 else list(imagenet.classnames())
    some = [ids[3], ids[0], ids[-1]]
    dataset = load_imagenet(make_set(tmp_path / folder, some))
    assert dataset.title == title and len(dataset.classnames) == len(dataset.class_ids) == num_classes
    found = {path.parent.name: label for path, label in zip(dataset.images, dataset.labels, strict=True)}
    assert found == {some[0]: 3, some[1]: 0, some[2]: num_classes - 1}
    for class_id, label in found.items():
        assert dataset.class_ids[label] == class_id and dataset.classnames[label] == imagenet.classnames()[class_id]


def test_folders_named_by_index_are_numbers_not_strings(tmp_path: Path):
    """V2's folders, sorted as strings, are 0, 1, 10, 100, ...: by position, folder 10 would become class 2."""
    names = ["0", "1", "10", "100", "2", "999"]
    dataset = load_imagenet(make_set(tmp_path / "imagenetv2-matched-frequency-format-val", names))
    assert dataset.title == "ImageNetV2"
    for path, label in zip(dataset.images, dataset.labels, strict=True):
        assert label == int(path.parent.name)
        assert dataset.classnames[label] == open_clip.IMAGENET_CLASSNAMES[int(path.parent.name)]


def test_classes_that_share_a_name_stay_apart(tmp_path: Path):
    """In WordNet two classes are named crane and two maillot; in open_clip two missile and two sunglasses."""
    names = imagenet.classnames()
    shared = [class_id for class_id, name in names.items() if name in ("missile", "sunglasses")]
    assert len(shared) == 4
    ids = [*shared, "n02012849", "n03126707", "n03710637", "n03710721"]
    dataset = load_imagenet(make_set(tmp_path / "val", ids))
    assert len(set(dataset.labels)) == 8 and len(set(dataset.class_ids)) == 1000


@pytest.mark.parametrize(
    ("folder", "names", "message"),
    [
        ("imagenet-a", ["n01498041", "n01443537"], "n01443537 is no class of ImageNet-A"),
        ("val", ["n01440764", "n99999999"], "n99999999 is no class of ImageNet val"),
        ("val", ["tench"], "imagenet-a, imagenet-r, imagenet-sketch"),
        ("val", ["1000"], "1000 is no class"),
        ("val", [], "contains no folder"),
    ],
)
def test_folders_of_unknown_classes_are_refused(tmp_path: Path, folder, names, message):
    (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match=message):
        load_imagenet(make_set(tmp_path / folder, names))

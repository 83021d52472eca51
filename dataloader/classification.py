"""Labelled images for zero-shot evaluation: CIFAR, the ImageNet family, and any folder with one sub-folder a class."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils import imagenet
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, list_images

CIFAR = ("CIFAR10", "CIFAR100")
IMAGENET = {  # by the folder's name, in lower case; any other is the validation set
    "imagenet-a": "ImageNet-A",
    "imagenet-r": "ImageNet-R",
    "imagenet-sketch": "ImageNet-Sketch",
    "imagenetv2-matched-frequency-format-val": "ImageNetV2",
}
NUMBERED_FOLDER = re.compile(r"n\d{8}|\d+")  # WordNet ids (ImageNet), class indices (ImageNetV2)


class ClassificationSet(NamedTuple):
    """Images with the index of their class in `classnames`."""

    images: list[Path | Image.Image]
    labels: list[int]
    classnames: list[str]  # two classes may share one
    class_ids: list[str]  # no two do: WordNet ids, or what the data set or its folders call the classes
    title: str = ""


def load_cifar(data_dir: Path) -> ClassificationSet:
    """Read the test split of CIFAR10 or CIFAR100, whichever `data_dir` is called; fetch it if it is not there.

    Raises UserError for another name, or if it can neither be read nor fetched.
    """
    name = data_dir.resolve().name
    if name not in CIFAR:
        raise UserError(f"--data_dir {data_dir}: the folder's name says which set it is; call it CIFAR10 or CIFAR100")
    from torchvision import datasets  # a second or two, which no other set takes

    dataset_class = getattr(datasets, name)
    try:
        dataset = dataset_class(data_dir, train=False, download=True)
    except Exception as error:  # torchvision lets through whatever the network or the disk raises
        raise UserError(
            f"{name} is not in {data_dir} and cannot be fetched ({error}); download {dataset_class.url} "
            f"and unpack it there, so that {data_dir / dataset_class.base_folder} exists"
        ) from None
    classnames = [classname.replace("_", " ") for classname in dataset.classes]
    images = [Image.fromarray(pixels) for pixels in dataset.data]
    return ClassificationSet(images, dataset.targets, classnames, dataset.classes, name)


def load_imagenet(data_dir: Path) -> ClassificationSet:
    """Read ImageNet's validation set, V2, A, R or Sketch, whichever `data_dir` is called, with OpenAI's class names.

    Its folders are called by WordNet id or by the class's index. A and R have 200 classes, and are told apart among
    these. Raises UserError if it holds anything else.
    """
    title = IMAGENET.get(data_dir.resolve().name.lower(), "ImageNet val")
    names = imagenet.classnames()
    all_ids = list(names)
    class_ids = imagenet.subset_ids(title[-1]) if title[-1] in imagenet.SUBSETS else all_ids
    labels = {class_id: label for label, class_id in enumerate(class_ids)}
    folders = {}
    for folder in _class_folders(data_dir):
        name = folder.name
        class_id = all_ids[int(name)] if re.fullmatch(r"\d{1,3}", name) else name
        if class_id not in labels:
            raise UserError(
                f"--data_dir {data_dir}: {name} is no class of {title} (ids such as {class_ids[0]}, or indices); the "
                f"folder's name says which set it is: {', '.join(IMAGENET)}, or any other for ImageNet val"
            )
        folders[folder] = labels[class_id]
    classnames = [names[class_id] for class_id in class_ids]
    return _read_class_folders(data_dir, folders, classnames, class_ids, title)


def load_class_folders(data_dir: Path, classnames: Sequence[str] | None = None) -> ClassificationSet:
    """Read a folder that has one sub-folder a class. A class is called as its folder, underscores read as spaces.

    `classnames` renames the classes, in the sorted order of their folders. Raises UserError if there is no such
    folder, no image in it, or if its folders are only numbered and `classnames` is not given.
    """
    folders = _class_folders(data_dir)
    if classnames is None:
        if all(NUMBERED_FOLDER.fullmatch(folder.name) for folder in folders):
            raise UserError(
                f"--data_dir {data_dir}: its folders are numbers or ids (e.g. {folders[0].name}), not names; "
                "give --class_names FILE, one name a line in the sorted order of the folders"
            )
        classnames = [folder.name.replace("_", " ") for folder in folders]
    if len(classnames) != len(folders):
        raise UserError(f"--class_names: {len(classnames)} names for the {len(folders)} folders of {data_dir}")
    labels = {folder: label for label, folder in enumerate(folders)}
    return _read_class_folders(data_dir, labels, list(classnames), [folder.name for folder in folders])


def _class_folders(data_dir: Path) -> list[Path]:
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir}: the folder does not exist; check the path")
    folders = sorted(entry for entry in data_dir.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise UserError(f"--data_dir {data_dir}: holds no folder; it should hold one folder of images a class")
    return folders


def _read_class_folders(
    data_dir: Path, label_of_folder: dict[Path, int], classnames: list[str], class_ids: list[str], title: str = ""
) -> ClassificationSet:
    images, labels = [], []
    for folder, label in label_of_folder.items():
        files = list_images(folder)
        images += files
        labels += [label] * len(files)
    if not images:
        raise UserError(f"--data_dir {data_dir}: its folders hold no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return ClassificationSet(images, labels, classnames, class_ids, title or data_dir.resolve().name)

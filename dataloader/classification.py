"""Labelled images for zero-shot evaluation: CIFAR, and any folder with one sub-folder a class."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, list_images

CIFAR = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}
NUMBERED_FOLDER = re.compile(r"n\d{8}|\d+")  # WordNet ids (ImageNet), class indices (ImageNetV2)


class ClassificationSet(NamedTuple):
    """Images with the index of their class in `classnames`."""

    images: list[Path | Image.Image]
    labels: list[int]
    classnames: list[str]


def load_cifar(data_dir: Path) -> ClassificationSet:
    """Read the test split of CIFAR10 or CIFAR100, whichever `data_dir` is called; fetch it if it is not there.

    Raises UserError for another name, or if it can neither be read nor fetched.
    """
    name = data_dir.resolve().name
    if name not in CIFAR:
        raise UserError(f"--data_dir {data_dir}: the folder's name says which set it is; call it CIFAR10 or CIFAR100")
    dataset_class = CIFAR[name]
    try:
        dataset = dataset_class(data_dir, train=False, download=True)
    except Exception as error:  # torchvision lets through whatever the network or the disk raises
        raise UserError(
            f"{name} is not in {data_dir} and cannot be fetched ({error}); download {dataset_class.url} "
            f"and unpack it there, so that {data_dir / dataset_class.base_folder} exists"
        ) from None
    classnames = [classname.replace("_", " ") for classname in dataset.classes]
    return ClassificationSet([Image.fromarray(pixels) for pixels in dataset.data], dataset.targets, classnames)


def load_class_folders(data_dir: Path, classnames: Sequence[str] | None = None) -> ClassificationSet:
    """Read a folder that has one sub-folder a class. A class is called as its folder, underscores read as spaces.

    `classnames` renames the classes, in the sorted order of their folders. Raises UserError if there is no such
    folder, no image in it, or if its folders are only numbered and `classnames` is not given.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir}: the folder does not exist; check the path")
    folders = sorted(entry for entry in data_dir.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise UserError(f"--data_dir {data_dir}: holds no folder; it should hold one folder of images a class")
    if classnames is None:
        if all(NUMBERED_FOLDER.fullmatch(folder.name) for folder in folders):
            raise UserError(
                f"--data_dir {data_dir}: its folders are numbers or ids (e.g. {folders[0].name}), not names; "
                "give --class_names FILE, one name a line in the sorted order of the folders"
            )
        classnames = [folder.name.replace("_", " ") for folder in folders]
    if len(classnames) != len(folders):
        raise UserError(f"--class_names: {len(classnames)} names for the {len(folders)} folders of {data_dir}")
    images, labels = [], []
    for label, folder in enumerate(folders):
        files = list_images(folder)
        images += files
        labels += [label] * len(files)
    if not images:
        raise UserError(f"--data_dir {data_dir}: its folders hold no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return ClassificationSet(images, labels, list(classnames))

"""Labeled images for zero-shot evaluation: CIFAR, the ImageNet family, and folders with one subfolder per class."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from utils import imagenet
from utils.errors import UserError
from utils.images import describe_left_out, image_suffixes, list_images

CIFAR = ("CIFAR10", "CIFAR100")
IMAGENET = {  # by the name of the folder in lower case; any other name is the validation set
    "imagenet-a": "ImageNet-A",
    "imagenet-r": "ImageNet-R",
    "imagenet-sketch": "ImageNet-Sketch",
    "imagenetv2-matched-frequency-format-val": "ImageNetV2",
}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
NUMBERED_FOLDER = re.compile(r"n\d{8}|\d+")  # WordNet ids (ImageNet), class indices (ImageNetV2)
NUMBERED_NAME = re.compile(r"(?:n\d{8}|\d+)[-._ ]+(\D.*)")  # n02085620-Chihuahua, 001.Black_footed_Albatross


class ClassificationSet(NamedTuple):
    """Images with the index of their class in `classnames`."""

    images: list[Path | Image.Image]
    labels: list[int]
    classnames: list[str]  # may repeat
    class_ids: list[str]  # unique: WordNet ids, or the names in the data set or of the folders
    title: str = ""
    notes: Sequence[str] = ()  # what a reader of the results should know: changed names, what was left out


def load_cifar(data_dir: Path) -> ClassificationSet:
    """Read the test split of CIFAR10 or CIFAR100, whichever is the name of `data_dir`; download it if it is missing.

    Raises UserError for another name, or if the data can be neither read nor downloaded.
    """
    name = data_dir.resolve().name
    if name not in CIFAR:
        raise UserError(
            f"--data_dir {data_dir}: the name of the folder selects the data set; call it CIFAR10 or CIFAR100"
        )
    from torchvision import datasets  # takes a second or two to import

    dataset_class = getattr(datasets, name)
    try:
        dataset = dataset_class(data_dir, train=False, download=True)
    except Exception as error:  # torchvision passes on whatever the network or the disk raises
        raise UserError(
            f"{name} is not in {data_dir} and cannot be downloaded ({error}); download {dataset_class.url} "
            f"and unpack it there, so that {data_dir / dataset_class.base_folder} exists"
        ) from None
    classnames = [classname.replace("_", " ") for classname in dataset.classes]
    images = [Image.fromarray(pixels) for pixels in dataset.data]
    return ClassificationSet(images, dataset.targets, classnames, dataset.classes, name)


def load_imagenet(data_dir: Path) -> ClassificationSet:
    """Read ImageNet's validation set, V2, A, R or Sketch, whichever is the name of `data_dir`.

    The subfolders are named by WordNet id or class index; the class names are OpenAI's. A and R have 200 classes, and
    only those are candidates. Raises UserError for other folders.
    """
    titles = (IMAGENET.get(path.name.lower()) for path in (data_dir.absolute(), data_dir.resolve()))
    title = next(filter(None, titles), "ImageNet val")
    names = imagenet.classnames()
    all_ids = list(names)
    class_ids = imagenet.subset_ids(title[-1]) if title[-1] in imagenet.SUBSETS else all_ids
    labels = {class_id: label for label, class_id in enumerate(class_ids)}
    folders = {}
    for folder in _class_folders(data_dir, "--data_dir"):
        name = folder.name
        class_id = all_ids[int(name)] if re.fullmatch(r"\d{1,3}", name) else name
        if class_id not in labels:
            raise UserError(
                f"--data_dir {data_dir}: {name} is no class of {title} (ids such as {class_ids[0]}, or indices); the "
                f"name of the folder selects the data set: {', '.join(IMAGENET)}, or any other for ImageNet val"
            )
        folders[folder] = labels[class_id]
    notes = []
    has_other_name = title == "ImageNet val" and re.search("sketch|v2", data_dir.resolve().name.lower())
    if len(folders) < len(class_ids) or has_other_name:
        notes.append(
            f"{len(folders):,} class folders are scored as {title}, among {len(class_ids):,} classes; the name of the "
            f"folder or of a link to it selects the set: {', '.join(IMAGENET)}, or any other for ImageNet val"
        )
    classnames = [names[class_id] for class_id in class_ids]
    empty = ClassificationSet([], [], classnames, class_ids, title, notes)
    return _read_images(data_dir, "--data_dir", folders, empty)


def load_class_folders(
    data_dir: Path, classnames: Sequence[str] | None = None, *, flag: str = "--data_dir"
) -> ClassificationSet:
    """Read a folder with one subfolder per class. A class has the name of its folder, with underscores as spaces.

    A number or WordNet id before every name is not part of the names. `classnames` replaces the names, in the sorted
    order of the folders, in which numbers count by their value: 2 before 10. `flag`: how messages name `data_dir`.
    Raises UserError if there is no folder or no image, and, unless `classnames` is given, if the names of all folders
    are numbers or those of splits (train, val).
    """
    folders, notes = _class_folders(data_dir, flag), []
    if classnames is None:
        if all(folder.name.lower() in SPLITS for folder in folders):
            raise UserError(
                f"{flag} {data_dir}: its folders are splits (e.g. {folders[0].name}), not classes; give one of them, "
                f"{flag} {folders[-1]}"
            )
        if all(NUMBERED_FOLDER.fullmatch(folder.name) for folder in folders):
            raise UserError(
                f"{flag} {data_dir}: its folders are named by numbers or ids (e.g. {folders[0].name}), not by class; "
                "rename them, or evaluate with --class_names FILE, one name per line in the sorted order of the folders"
            )
        matches = [NUMBERED_NAME.fullmatch(folder.name) for folder in folders]
        classnames = [match[1] for match in matches if match]
        if len(set(classnames)) == len(folders):
            notes.append(f"classes are named without their numbers (e.g. {folders[0].name} is {classnames[0]!r})")
        else:
            classnames = [folder.name for folder in folders]
        classnames = [name.replace("_", " ") for name in classnames]
    elif len(classnames) != len(folders):
        raise UserError(f"--class_names: {len(classnames)} names for the {len(folders)} folders of {data_dir}")
    elif moved := [number for number, folder in enumerate(sorted(folders)) if folder != folders[number]]:
        example = f"{folders[moved[0]].name} is {classnames[moved[0]]!r}"
        notes.append(
            f"--class_names: the folders are in the order of their numbers, not of their text (e.g. {example})"
        )
    if repeated := [name for name, count in Counter(classnames).items() if count > 1]:
        notes.append(f"{len(repeated)} class names belong to several folders (e.g. {repeated[0]!r})")
    labels = {folder: label for label, folder in enumerate(folders)}
    class_ids, title = [folder.name for folder in folders], data_dir.resolve().name
    return _read_images(data_dir, flag, labels, ClassificationSet([], [], list(classnames), class_ids, title, notes))


def _class_folders(data_dir: Path, flag: str) -> list[Path]:
    if not data_dir.is_dir():
        raise UserError(f"{flag} {data_dir}: the folder does not exist; check the path")
    names = (entry for entry in data_dir.iterdir() if not entry.name.startswith((".", "__MACOSX")))
    folders = sorted((entry for entry in names if entry.is_dir()), key=_natural_key)
    if not folders:
        raise UserError(f"{flag} {data_dir}: contains no folder; it should contain one folder of images per class")
    return folders


def _natural_key(folder: Path) -> tuple[list[str | int], str]:
    """Return the texts and the numbers in a folder's name, in turn; the name itself tells 1 from 01."""
    parts = re.split(r"(\d+)", folder.name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], folder.name


def _read_images(
    data_dir: Path, flag: str, label_of_folder: dict[Path, int], empty: ClassificationSet
) -> ClassificationSet:
    images, labels, notes = [], [], list(empty.notes)
    for folder, label in label_of_folder.items():
        files = list_images(folder, nested=True)
        images += files
        labels += [label] * len(files)
    if not images:
        suffixes = ", ".join(sorted(image_suffixes()))
        raise UserError(f"{flag} {data_dir}: its folders contain no image ({suffixes})")
    found = set(labels)
    if without := [folder.name for folder, label in label_of_folder.items() if label not in found]:
        notes.append(f"{len(without)} class folders contain no image (e.g. {without[0]})")
    notes += describe_left_out(data_dir, images, nested=True)
    return empty._replace(images=images, labels=labels, notes=notes)

"""Evaluate a trained CLIP without further training: zero-shot accuracy on labeled images, or retrieval of captions.

python zero_shot_eval.py --checkpoint_path F --dataset_type cifar --data_dir data/CIFAR100
python zero_shot_eval.py --checkpoint_path F --dataset_type imagenet --data_dir data/imagenet-a
python zero_shot_eval.py --checkpoint_path F --dataset_type folder --data_dir DIR_WITH_A_FOLDER_PER_CLASS
python zero_shot_eval.py --checkpoint_path F --dataset_type retrieval --data_dir IMAGES --annotation_file CAPTIONS
python zero_shot_eval.py --compare F open_clip:RN50/openai --dataset_type ...    several models in one table
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from dataloader.config import add_caption_flags, caption_spec
from utils.flags import Parser, add_checkpoint_flag, add_inference_flags

DATASET_TYPES = ("cifar", "imagenet", "folder", "retrieval")
CAPTION_FLAGS = {"annotation_file", "format", "csv_image_column", "csv_caption_column"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    models = parser.add_mutually_exclusive_group(required=True)
    add_checkpoint_flag(models)
    models.add_argument("--compare", nargs="+", metavar="PATH", help="several models, in one table")
    type_help = "images of classes (folder: a subfolder per class), or images with captions (retrieval)"
    parser.add_argument("--dataset_type", required=True, choices=DATASET_TYPES, help=type_help)
    parser.add_argument(
        "--data_dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="the images; for cifar and imagenet its name selects the data set: CIFAR10, CIFAR100, imagenet-a, "
        "imagenet-r, ImageNet-Sketch, imagenetv2-matched-frequency-format-val, any other name for ImageNet val",
    )
    caption_help = "for retrieval: the captions, in any format that train.py reads"
    parser.add_argument("--annotation_file", type=Path, metavar="FILE", help=caption_help)
    add_caption_flags(parser)
    class_help = "for folder: the classes in the sorted order of the folders, or a text file with one per line"
    parser.add_argument("--class_names", nargs="+", metavar="NAME", help=f"{class_help} (default: the folders' names)")
    add_inference_flags(parser, templates="openai for imagenet, else single")
    args = parser.parse_args(argv)
    unused = {"class_names"} if args.dataset_type != "folder" else set()
    unused |= {"templates"} if args.dataset_type == "retrieval" else CAPTION_FLAGS
    for flag in sorted(unused):
        if getattr(args, flag):
            parser.error(f"--{flag} has no effect with --dataset_type {args.dataset_type}; remove it")
    return args


if __name__ == "__main__":
    parse_args(None)  # `--help` and mistyped flags end here: importing PyTorch takes seconds

from dataloader.captions import CaptionSet, open_captions
from dataloader.classification import ClassificationSet, load_cifar, load_class_folders, load_imagenet
from model import TrainedCLIP, load_clip
from utils.device import choose_device
from utils.errors import UserError, run_script
from utils.image_loader import Failure
from utils.reports import format_comparison, write_classification, write_retrieval
from utils.text import one_line
from utils.zero_shot import read_class_names, read_templates, zero_shot_accuracy

OUTPUT_DIR = Path("zero_shot_eval_output")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoints = args.compare or [args.checkpoint_path]
    labels, device = label_models(checkpoints), choose_device(args.device)
    dataset = open_dataset(args)
    clips = [load_clip(checkpoint, device) for checkpoint in checkpoints]
    make_output_dir()

    evaluate = evaluate_captions if args.dataset_type == "retrieval" else evaluate_classes
    name = args.annotation_file.stem if args.annotation_file else args.data_dir.resolve().name or "root"
    summaries = {}
    for label, clip in zip(labels, clips, strict=True):
        stem = OUTPUT_DIR / (f"{name}-{label}" if args.compare else name)
        summaries[label] = evaluate(clip, dataset, stem, args)
    if args.compare:
        print(f"\n{format_comparison(summaries)}")


def evaluate_classes(
    clip: TrainedCLIP, dataset: ClassificationSet, stem: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Classify the images, write the report, and return its summary."""
    names = args.templates or ["openai" if args.dataset_type == "imagenet" else "single"]
    templates = read_templates(names)
    print(f"{clip.source} on {dataset.title}: {len(dataset.images):,} images of {len(dataset.classnames):,} classes")
    for note in dataset.notes:
        print(f"note: {one_line(note)}")
    classifier = clip.build_classifier(dataset.classnames, templates)
    indices, image_features, failures = clip.encode_readable(
        dataset.images, batch_size=args.batch_size, num_workers=args.num_workers, show_progress=True
    )
    print_skipped(failures)
    labels = indices.new_tensor(dataset.labels)[indices]
    accuracy = zero_shot_accuracy(image_features, labels, classifier)
    classes = list(zip(dataset.class_ids, dataset.classnames, strict=True))
    protocol = {"templates": names, "num_templates": len(templates), "skipped_images": len(failures)}
    protocol["notes"] = list(dataset.notes)
    return write_classification(stem, dataset.title, classes, accuracy, {"checkpoint": clip.source, **protocol})


def evaluate_captions(clip: TrainedCLIP, dataset: CaptionSet, stem: Path, args: argparse.Namespace) -> dict[str, float]:
    """Retrieve captions by image and images by caption, write the report, and return its summary."""
    print(f"{clip.source} on {dataset.describe()}")
    captions = [image.captions for image in dataset.images]
    features, (indices, _, failures) = clip.encode_captioned(
        dataset.files, captions, batch_size=args.batch_size, num_workers=args.num_workers, show_progress=True
    )
    print_skipped(failures)
    readable = dataset.take(indices.tolist())
    captions = [image.captions for image in readable.images]
    protocol = {"checkpoint": clip.source, "skipped_images": len(failures) + len(dataset.missing)}
    return write_retrieval(stem, features, readable.files, captions, protocol)


def print_skipped(failures: Sequence[Failure]) -> None:
    for path, reason in failures:
        print(f"skipped {one_line(path)}: {reason}")


def open_dataset(args: argparse.Namespace) -> ClassificationSet | CaptionSet:
    """Find the images that the flags name. Raises UserError if they are missing or not of the type."""
    match args.dataset_type:
        case "cifar":
            return load_cifar(args.data_dir)
        case "imagenet":
            return load_imagenet(args.data_dir)
        case "retrieval":
            return open_captions(caption_spec(args, "--data_dir", "test"))
    return load_class_folders(args.data_dir, args.class_names and read_class_names(args.class_names))


def make_output_dir() -> None:
    """Create the output folder before the work starts. Raises UserError if nothing can be written there."""
    try:
        OUTPUT_DIR.mkdir(exist_ok=True)
        (OUTPUT_DIR / ".writable").touch()
        (OUTPUT_DIR / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{OUTPUT_DIR}/ cannot be written ({error.strerror}); start from another folder") from None


def label_models(checkpoints: Sequence[str]) -> list[str]:
    """Return short, distinct names for files: the last parts of each path, as many as it takes.

    Raises UserError if a checkpoint is given twice.
    """
    paths = []
    for checkpoint in checkpoints:
        name = re.sub(r"^open_clip:([^/]+)/(.*/)?", r"\2\1-", checkpoint)  # the model's name joins the file's
        paths.append(Path(re.sub(r"\.(pt|pth|bin|safetensors)$", "", name)).resolve().parts)
    for count in range(1, max(map(len, paths)) + 1):
        labels = [re.sub(r"[^\w.]+", "-", "-".join(parts[-count:])).strip("-") for parts in paths]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError(f"--compare: a model is given twice ({', '.join(checkpoints)}); give each one once")


if __name__ == "__main__":
    run_script(main)

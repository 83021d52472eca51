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
from tempfile import TemporaryFile
from typing import Any

from dataloader.config import add_caption_flags, caption_spec, load_data_config
from utils.flags import Parser, add_checkpoint_flag, add_inference_flags, add_model_flags, model_settings

DATASET_TYPES = ("cifar", "imagenet", "folder", "retrieval")
CAPTION_FLAGS = {"annotation_file", "format", "csv_image_column", "csv_caption_column"}
NO_OPTIONS = {"checkpoint_path", "compare", "data_dir", "output", "predictions"}  # named apart, or only where to write
NO_OPTIONS |= {"batch_size", "num_workers", "device"}  # change results by rounding at most


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
    add_model_flags(parser)
    missing_help = "give figures although more than 1 %% of the images are missing or unreadable"
    parser.add_argument("--allow_missing", action="store_true", help=missing_help)
    output_help = "folder for the results (default: %(default)s)"
    parser.add_argument("--output", type=Path, metavar="DIR", default="zero_shot_eval_output", help=output_help)
    predictions_help = "write a new CSV table: each image's file, label, and five best classes with probabilities"
    parser.add_argument("--predictions", type=Path, metavar="FILE", help=predictions_help)
    args = parser.parse_args(argv)
    unused = {"class_names"} if args.dataset_type != "folder" else set()
    unused |= {"templates", "predictions"} if args.dataset_type == "retrieval" else CAPTION_FLAGS
    for flag in sorted(unused):
        if getattr(args, flag):
            parser.error(f"--{flag} has no effect with --dataset_type {args.dataset_type}; remove it")
    if args.predictions and args.compare:
        parser.error("--predictions takes one model: give it with --checkpoint_path")
    return args


if __name__ == "__main__":
    parse_args(None)  # `--help` and mistyped flags end here: importing PyTorch takes seconds

from dataloader.captions import CaptionSet, open_captions
from dataloader.classification import ClassificationSet, load_cifar, load_class_folders, load_imagenet
from dataloader.counts import count_captions, describe_counts, require_complete
from model import TrainedCLIP, load_clip
from utils.device import choose_device
from utils.errors import UserError, run_script
from utils.image_loader import Failure
from utils.reports import format_comparison, write_classification, write_predictions, write_retrieval
from utils.text import one_line
from utils.zero_shot import best_classes, read_class_names, read_templates, zero_shot_accuracy


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoints = args.compare or [args.checkpoint_path]
    labels, device = label_models(checkpoints), choose_device(args.device)
    dataset = open_dataset(args)
    clips = [load_clip(checkpoint, device, **model_settings(args)) for checkpoint in checkpoints]
    check_outputs(args)

    evaluate = evaluate_captions if args.dataset_type == "retrieval" else evaluate_classes
    name = args.annotation_file.stem if args.annotation_file else args.data_dir.resolve().name or "root"
    summaries = {}
    for label, clip in zip(labels, clips, strict=True):
        file_name = one_line(f"{name}-{label}" if args.compare else name)
        stem = args.output / file_name.encode()[:200].decode(errors="ignore")  # a longer name may not be a file's
        summaries[label] = evaluate(clip, dataset, stem, args)
    if args.compare:
        print(f"\n{format_comparison(summaries)}")


def evaluate_classes(
    clip: TrainedCLIP, dataset: ClassificationSet, stem: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Classify the images, write the report, and return its summary."""
    names = args.templates or ["openai" if args.dataset_type == "imagenet" else "single"]
    templates = read_templates(names)
    sizes = f"{len(dataset.images):,} images of {len(dataset.classnames):,} classes"
    print(one_line(f"{clip.source} on {dataset.title}: {sizes}"))
    for note in dataset.notes:
        print(f"note: {one_line(note)}")
    classifier = clip.build_classifier(dataset.classnames, templates)
    indices, image_features, failures = clip.encode_readable(
        dataset.images, batch_size=args.batch_size, num_workers=args.num_workers, show_progress=True
    )
    print_skipped(failures)
    check_complete(len(dataset.images), [failure.path for failure in failures], args)
    labels = indices.new_tensor(dataset.labels)[indices]
    accuracy = zero_shot_accuracy(image_features, labels, classifier)
    classes = list(zip(dataset.class_ids, dataset.classnames, strict=True))
    protocol = {"templates": names, "num_templates": len(templates), "skipped_images": len(failures)}
    protocol |= {"notes": list(dataset.notes), **describe_measurement(clip, args)}
    summary = write_classification(stem, dataset.title, classes, accuracy, protocol)
    if args.predictions:
        best = best_classes(image_features, classifier)
        write_predictions(args.predictions, dataset.images, dataset.labels, classes, indices, *best)
    return summary


def evaluate_captions(clip: TrainedCLIP, dataset: CaptionSet, stem: Path, args: argparse.Namespace) -> dict[str, float]:
    """Retrieve captions by image and images by caption, write the report, and return its summary."""
    counts = count_captions(dataset, clip.model.config.context_length)
    print(one_line(f"{clip.source} on {describe_counts(dataset, counts)}"))
    num_images = dataset.num_images + len(dataset.missing)
    check_complete(num_images, dataset.missing, args)
    captions = [image.captions for image in dataset.images]
    features, (indices, _, failures) = clip.encode_captioned(
        dataset.files, captions, batch_size=args.batch_size, num_workers=args.num_workers, show_progress=True
    )
    print_skipped(failures)
    check_complete(num_images, [*dataset.missing, *(failure.path for failure in failures)], args)
    readable = dataset.take(indices.tolist())
    captions = [image.captions for image in readable.images]
    protocol = {
        "skipped_images": len(failures) + len(dataset.missing),
        "counts": counts,
        **describe_measurement(clip, args),
    }
    return write_retrieval(stem, features, readable.files, captions, protocol)


def describe_measurement(clip: TrainedCLIP, args: argparse.Namespace) -> dict[str, Any]:
    """Return the model, the data and the flags that distinguish results from others."""
    options = {flag: value for flag, value in vars(args).items() if value and flag not in NO_OPTIONS}
    options = {flag: str(value.resolve()) if isinstance(value, Path) else value for flag, value in options.items()}
    data = str(args.data_dir.resolve())
    return {"checkpoint": clip.source, "digest": clip.digest, "data": data, "options": options}


def check_complete(num_images: int, left_out: Sequence[str], args: argparse.Namespace) -> None:
    """Raise UserError if too many of the images are missing or unreadable for a figure."""
    if not args.allow_missing:
        require_complete(num_images, left_out, load_data_config().max_unreadable_share)


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


def check_outputs(args: argparse.Namespace) -> None:
    """Create the folders of the results before the work starts.

    Raises UserError if nothing can be written there, or if the file of the predictions exists.
    """
    folders = {"--output": args.output}
    if args.predictions:
        folders["--predictions"] = args.predictions.parent
        if args.predictions.exists():
            raise UserError(f"--predictions {args.predictions} already exists; move it away, or name another file")
    for flag, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"{folder}/ cannot be written ({error.strerror}); name another place with {flag}") from None


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

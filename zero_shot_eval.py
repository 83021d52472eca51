"""Measure a trained CLIP without training it further: zero-shot accuracy on labelled images, retrieval of captions.

python zero_shot_eval.py --checkpoint_path F --dataset_type cifar --data_dir data/CIFAR100
python zero_shot_eval.py --checkpoint_path F --dataset_type imagenet --data_dir data/imagenet-a
python zero_shot_eval.py --checkpoint_path F --dataset_type folder --data_dir DIR_WITH_A_FOLDER_A_CLASS
python zero_shot_eval.py --checkpoint_path F --dataset_type retrieval --data_dir IMAGES --annotation_file CAPTIONS
python zero_shot_eval.py --compare F open_clip:RN50/openai --dataset_type ...    several models, one table
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from dataloader.captions import CaptionSet, read_captions
from dataloader.classification import ClassificationSet, load_cifar, load_class_folders, load_imagenet
from model import TrainedCLIP, load_clip
from trainer.evaluation import encode_captions, encode_sources
from trainer.parallel import default_device
from trainer.reports import format_comparison, write_classification, write_retrieval
from utils.errors import UserError, run_script
from utils.flags import add_checkpoint_flag, add_inference_flags
from utils.text import printable
from utils.zero_shot import build_classifier, read_class_names, read_templates, zero_shot_accuracy

OUTPUT_DIR = Path("zero_shot_eval_output")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoints = args.compare or [args.checkpoint_path]
    labels = label_models(checkpoints)
    dataset = open_dataset(args)
    clips = [load_clip(checkpoint, default_device()) for checkpoint in checkpoints]
    make_output_dir()

    evaluate = evaluate_captions if args.dataset_type == "retrieval" else evaluate_classes
    name = args.annotation_file.stem if args.annotation_file else args.data_dir.resolve().name or "root"
    figures = {}
    for label, clip in zip(labels, clips, strict=True):
        stem = OUTPUT_DIR / (f"{name}-{label}" if args.compare else name)
        figures[label] = evaluate(clip, dataset, stem, args)
    if args.compare:
        print(f"\n{format_comparison(figures)}")


def evaluate_classes(
    clip: TrainedCLIP, dataset: ClassificationSet, stem: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Classify the images, write what came out, and return its figures."""
    sets = args.templates or ["openai" if args.dataset_type == "imagenet" else "single"]
    templates = read_templates(sets)
    print(f"{clip.source} on {dataset.title}: {len(dataset.images):,} images of {len(dataset.classnames):,} classes")
    classifier = build_classifier(clip.model, dataset.classnames, templates, cache_dir=OUTPUT_DIR / "cache")
    indices, image_features, failures = encode_sources(
        clip, dataset.images, batch_size=args.batch_size, num_workers=args.num_workers
    )
    for path, reason in failures:
        print(f"skipped {printable(path)}: {reason}")
    labels = torch.tensor(dataset.labels, device=indices.device)[indices]
    accuracy = zero_shot_accuracy(image_features, labels, classifier)
    protocol = {
        "checkpoint": clip.source,
        "templates": sets,
        "num_templates": len(templates),
        "skipped_images": len(failures),
    }
    return write_classification(stem, dataset, accuracy, protocol)


def evaluate_captions(clip: TrainedCLIP, dataset: CaptionSet, stem: Path, args: argparse.Namespace) -> dict[str, float]:
    """Find captions by images and images by captions, write what came out, and return its figures."""
    print(f"{clip.source} on {dataset.describe()}")
    features, readable, failures = encode_captions(
        clip, dataset, batch_size=args.batch_size, num_workers=args.num_workers
    )
    for path, reason in failures:
        print(f"skipped {printable(path)}: {reason}")
    protocol = {"checkpoint": clip.source, "skipped_images": len(failures) + len(dataset.missing)}
    return write_retrieval(stem, features, dataset, readable, protocol)


def open_dataset(args: argparse.Namespace) -> ClassificationSet | CaptionSet:
    """Find the images that the flags name. Raises UserError if they are not there."""
    match args.dataset_type:
        case "cifar":
            return load_cifar(args.data_dir)
        case "imagenet":
            return load_imagenet(args.data_dir)
        case "retrieval":
            return read_captions(args.data_dir, args.annotation_file, split="test")
    return load_class_folders(args.data_dir, args.class_names and read_class_names(args.class_names))


def make_output_dir() -> None:
    """Make it before the work, so that no result is lost. Raises UserError if nothing can be written there."""
    try:
        OUTPUT_DIR.mkdir(exist_ok=True)
        (OUTPUT_DIR / ".writable").touch()
        (OUTPUT_DIR / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{OUTPUT_DIR}/ cannot be written ({error.strerror})") from None


def label_models(checkpoints: Sequence[str]) -> list[str]:
    """Return names that tell them apart, fit for files: as many of the last parts of their paths as that needs.

    Raises UserError if one is given twice.
    """
    parts = []
    for checkpoint in checkpoints:
        baseline, _, weights = checkpoint.removeprefix("open_clip:").partition("/")
        is_baseline = checkpoint.startswith("open_clip:")
        path = Path(weights if is_baseline else checkpoint).resolve()
        path = path.with_suffix("") if path.suffix in (".pt", ".pth", ".bin", ".safetensors") else path
        *folders, last = path.parts
        parts.append([*folders, f"{baseline}-{last}" if is_baseline else last])
    for count in range(1, max(map(len, parts)) + 1):
        labels = [re.sub(r"[^\w.]+", "-", "-".join(own[-count:])).strip("-") for own in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError(f"--compare: a model is given twice ({', '.join(checkpoints)})")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    models = parser.add_mutually_exclusive_group(required=True)
    add_checkpoint_flag(models)
    models.add_argument("--compare", nargs="+", metavar="PATH", help="several of these, in one table")
    parser.add_argument(
        "--dataset_type",
        required=True,
        choices=["cifar", "imagenet", "folder", "retrieval"],
        help="CIFAR10/100; ImageNet val, V2, A, R or Sketch; a folder a class; images and captions",
    )
    parser.add_argument(
        "--data_dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="the images; for cifar and imagenet its name says which set it is: CIFAR10, CIFAR100, imagenet-a, "
        "imagenet-r, ImageNet-Sketch, imagenetv2-matched-frequency-format-val, any other for ImageNet val",
    )
    parser.add_argument(
        "--annotation_file", type=Path, metavar="FILE", help="for retrieval: the captions, in any format of train.py's"
    )
    parser.add_argument(
        "--class_names",
        nargs="+",
        metavar="NAME",
        help="for folder: names of the sorted folders, or a text file with one a line (default: the folders' own)",
    )
    add_inference_flags(parser, templates="openai for imagenet, else single")
    args = parser.parse_args(argv)
    for flag, types in (
        ("annotation_file", ["retrieval"]),
        ("class_names", ["folder"]),
        ("templates", ["cifar", "imagenet", "folder"]),
    ):
        if getattr(args, flag) and args.dataset_type not in types:
            parser.error(f"--{flag} belongs to --dataset_type {' or '.join(types)}")
    return args


if __name__ == "__main__":
    run_script(main)

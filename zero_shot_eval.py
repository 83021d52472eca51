"""Measure the zero-shot accuracy of a trained CLIP on labelled images.

python zero_shot_eval.py --checkpoint_path F --dataset_type cifar --data_dir data/CIFAR100
python zero_shot_eval.py --checkpoint_path F --dataset_type folder --data_dir DIR_WITH_A_FOLDER_A_CLASS
"""

import argparse
import json
from pathlib import Path

import torch

from dataloader.classification import load_cifar, load_class_folders
from model import load_clip
from trainer.evaluation import encode_sources
from trainer.parallel import default_device
from utils.errors import UserError, run_script
from utils.zero_shot import TEMPLATE, ZeroShotAccuracy, build_classifier, read_class_names, zero_shot_accuracy

OUTPUT_DIR = Path("zero_shot_eval_output")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    name = args.data_dir.resolve().name
    if args.dataset_type == "cifar":
        dataset = load_cifar(args.data_dir)
    else:
        dataset = load_class_folders(args.data_dir, args.class_names and read_class_names(args.class_names))
    clip = load_clip(args.checkpoint_path, default_device())

    print(f"{name}: {len(dataset.images):,} images of {len(dataset.classnames)} classes")
    classifier = build_classifier(clip.model, dataset.classnames, [args.template])
    indices, image_features, failures = encode_sources(
        clip, dataset.images, batch_size=args.batch_size, num_workers=args.num_workers
    )
    for path, reason in failures:
        print(f"skipped {path}: {reason}")
    labels = torch.tensor(dataset.labels, device=indices.device)[indices]
    accuracy = zero_shot_accuracy(image_features, labels, classifier)

    protocol = {"checkpoint": args.checkpoint_path, "template": args.template, "skipped_images": len(failures)}
    text_file = write_results(name, dataset.classnames, accuracy, protocol)
    top1, top5 = accuracy.percentages()
    print(f"top-1 accuracy: {top1:.2f} %\ntop-5 accuracy: {top5:.2f} %\nwrote {text_file} and .json")


def write_results(name: str, classnames: list[str], accuracy: ZeroShotAccuracy, protocol: dict) -> Path:
    """Write `{name}.txt` and `{name}.json` into OUTPUT_DIR and return the first.

    Raises UserError if they cannot be written.
    """
    rows = [
        {"top1": percentage(top1, total), "top5": percentage(top5, total), "num_images": total, "class": classname}
        for top1, top5, total, classname in zip(*(column.tolist() for column in accuracy), classnames, strict=True)
    ]
    top1, top5 = accuracy.percentages()
    table = [f"{row['top1']:8.2f} {row['top5']:8.2f}  {row['class']}" for row in rows]
    summary = [f"Top-1 accuracy: {top1:.2f} %", f"Top-5 accuracy: {top5:.2f} %", "", "   Top-1    Top-5  Class name"]
    num_images = int(accuracy.total.sum())
    content = {"dataset": name, "num_images": num_images, "top1": top1, "top5": top5, **protocol, "classes": rows}
    text_file, json_file = OUTPUT_DIR / f"{name}.txt", OUTPUT_DIR / f"{name}.json"
    try:
        OUTPUT_DIR.mkdir(exist_ok=True)
        text_file.write_text("\n".join(summary + table) + "\n", encoding="utf-8")
        json_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{OUTPUT_DIR}/{name}.txt cannot be written ({error.strerror})") from None
    return text_file


def percentage(hits: int, total: int) -> float:
    """Return hits in % of total; a class without images has 0."""
    return 100 * hits / total if total else 0.0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint_path", required=True, metavar="PATH", help="a checkpoint, or a directory: its newest one"
    )
    parser.add_argument(
        "--dataset_type", required=True, choices=["cifar", "folder"], help="CIFAR10/100, or a folder a class"
    )
    parser.add_argument(
        "--data_dir", required=True, type=Path, metavar="DIR", help="for cifar, a folder called CIFAR10 or CIFAR100"
    )
    parser.add_argument(
        "--class_names",
        nargs="+",
        metavar="NAME",
        help="names for the sorted folders, or one text file with a name a line (default: the folders' own names)",
    )
    parser.add_argument("--template", default=TEMPLATE, help="the sentence around a class name (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--num_workers", type=int, default=4, metavar="N", help="default: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)

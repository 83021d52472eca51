"""Classify images zero-shot with a trained CLIP, into CIFAR100's classes or any others.

python zero_shot_demo.py --checkpoint_path F --img_path test_images/bicycle.jpeg --show_predictions
python zero_shot_demo.py --checkpoint_path F --img_dir DIR --class_names cat dog bird
python zero_shot_demo.py --checkpoint_path F --texts "a red bus" "a castle at night"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from model import load_clip
from trainer.evaluation import encode_sources
from trainer.parallel import default_device
from utils.errors import run_script
from utils.images import find_images, load_image
from utils.plots import plot_predictions, plot_similarity
from utils.zero_shot import CIFAR100_FILE, TEMPLATE, build_classifier, encode_texts, read_class_names

LOGIT_SCALE = 35  # the reference demo's, for softer probabilities than the learned one's; the ranking is the same
OUTPUT_DIR = Path("demo_output")
PICTURE_SIZE = 224  # pixels a side, in the figures

Ranking = list[tuple[str, float]]  # (class name, probability), most probable first


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    files = [args.img_path] if args.img_path else find_images(args.img_dir)
    classnames = read_class_names(args.class_names)
    clip = load_clip(args.checkpoint_path, default_device())

    indices, image_features, failures = encode_sources(
        clip, files, batch_size=args.batch_size, num_workers=args.num_workers
    )
    files = [files[index] for index in indices.tolist()]

    if args.texts:
        similarities = (image_features @ encode_texts(clip.model, args.texts).t()).tolist()
        print_similarities(files, args.texts, similarities)
        print("drew", plot_similarity(load_pictures(files), args.texts, similarities, OUTPUT_DIR / "similarity.png"))
    else:
        classifier = build_classifier(clip.model, classnames, [args.template])
        rankings = rank((LOGIT_SCALE * image_features @ classifier.t()).softmax(dim=1), classnames)
        print_rankings(files, rankings)
        if args.show_predictions:
            name = "single_img_demo.png" if args.img_path else "demo.png"
            print("drew", plot_predictions(load_pictures(files), rankings, OUTPUT_DIR / name))
    for path, reason in failures:
        print(f"skipped {path}: {reason}")


def rank(probabilities: Tensor, classnames: Sequence[str], num_best: int = 5) -> list[Ranking]:
    """Return each image's most probable classes; `probabilities` is [num_images, num_classes]."""
    best = probabilities.topk(min(num_best, len(classnames)), dim=1)
    return [
        [(classnames[label], probability) for probability, label in zip(values, labels, strict=True)]
        for values, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def print_rankings(files: Sequence[Path], rankings: Sequence[Ranking]) -> None:
    """Print each image's classes, one line an image."""
    width = max(len(file.name) for file in files)
    for file, ranking in zip(files, rankings, strict=True):
        print(f"{file.name:<{width}}  " + "   ".join(f"{name} {probability:.1%}" for name, probability in ranking))


def print_similarities(files: Sequence[Path], texts: Sequence[str], similarities: Sequence[Sequence[float]]) -> None:
    """Print each image's cosine similarity to each text; `similarities` has a row an image."""
    for number, text in enumerate(texts, start=1):
        print(f"({number}) {text}")
    width = max(len(file.name) for file in files)
    print(" " * width + "".join(f"{f'({number})':>7}" for number in range(1, len(texts) + 1)))
    for file, row in zip(files, similarities, strict=True):
        print(f"{file.name:<{width}}" + "".join(f"{value:7.2f}" for value in row))


def load_pictures(files: Sequence[Path]) -> list[Image.Image]:
    """Return the images as a figure shows them: square, and larger than a small model sees them."""
    return [load_image(file, PICTURE_SIZE) for file in files]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint_path", required=True, metavar="PATH", help="a checkpoint, or a directory: its newest one"
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--img_path", type=Path, metavar="FILE", help="one image")
    images.add_argument("--img_dir", type=Path, metavar="DIR", default="test_images", help="default: test_images")
    parser.add_argument(
        "--class_names",
        nargs="+",
        metavar="NAME",
        default=[str(CIFAR100_FILE)],
        help="class names, or one text file with a name a line (default: the 100 of CIFAR100)",
    )
    parser.add_argument("--template", default=TEMPLATE, help="the sentence around a class name (default: %(default)s)")
    parser.add_argument(
        "--texts", nargs="+", metavar="TEXT", help="draw the similarity of these sentences to the images instead"
    )
    parser.add_argument(
        "--show_predictions", "--show_prediction", action="store_true", help=f"draw a figure into {OUTPUT_DIR}/"
    )
    parser.add_argument("--batch_size", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--num_workers", type=int, default=4, metavar="N", help="default: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)

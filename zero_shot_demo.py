"""Classify images zero-shot with a trained CLIP, into CIFAR100's classes or any others.

python zero_shot_demo.py --checkpoint_path F --img_path test_images/bicycle.jpeg --show_predictions
python zero_shot_demo.py --checkpoint_path F --img_dir DIR --class_names cat dog bird
python zero_shot_demo.py --checkpoint_path F --texts "a red bus" "a castle at night"
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from PIL import Image
from torch import Tensor

from model import load_clip
from trainer.evaluation import encode_sources
from trainer.parallel import default_device
from utils.errors import run_script
from utils.flags import add_checkpoint_flag, add_inference_flags, positive
from utils.images import find_images, load_image
from utils.plots import plot_predictions, plot_similarity
from utils.text import printable
from utils.zero_shot import CIFAR100_FILE, build_classifier, class_probabilities, read_class_names, read_templates

PICTURE_SIZE = 224  # pixels a side, in the figures

Ranking = list[tuple[str, float]]  # (class name, probability), most probable first


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    files = [args.img_path] if args.img_path else find_images(args.img_dir)
    classnames, templates = read_class_names(args.class_names), read_templates(args.templates or ["single"])
    clip = load_clip(args.checkpoint_path, default_device())
    classifier = None if args.texts else build_classifier(clip.model, classnames, templates)

    indices, image_features, failures = encode_sources(
        clip, files, batch_size=args.batch_size, num_workers=args.num_workers
    )
    files = [files[index] for index in indices.tolist()]
    out = sys.stderr if args.json else sys.stdout

    if args.texts:
        similarities = (image_features @ clip.encode_text(args.texts).t()).tolist()
        results = [{"similarities": row} for row in similarities]
        print_similarities(files, args.texts, similarities, out)
        figure = plot_similarity(load_pictures(files), args.texts, similarities, args.output / "similarity.png")
        print("drew", figure, file=out)
    else:
        rankings = rank(class_probabilities(image_features, classifier), classnames, args.top_k)
        results = [
            {"predictions": [{"class": name, "probability": probability} for name, probability in ranking]}
            for ranking in rankings
        ]
        print_rankings(files, rankings, out)
        if args.show_predictions:
            name = "single_img_demo.png" if args.img_path else "demo.png"
            print("drew", plot_predictions(load_pictures(files), rankings, args.output / name), file=out)
    for path, reason in failures:
        print(f"skipped {printable(path)}: {reason}", file=out)
    if args.json:
        images = [{"file": str(file), **result} for file, result in zip(files, results, strict=True)]
        skipped = [{"file": path, "reason": reason} for path, reason in failures]
        content = {"checkpoint": clip.source, "texts": args.texts, "images": images, "skipped": skipped}
        print(json.dumps(content, indent=2))


def rank(probabilities: Tensor, classnames: Sequence[str], num_best: int) -> list[Ranking]:
    """Return each image's most probable classes; `probabilities` is [num_images, num_classes]."""
    best = probabilities.topk(min(num_best, len(classnames)), dim=1)
    return [
        [(classnames[label], probability) for probability, label in zip(values, labels, strict=True)]
        for values, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def print_rankings(files: Sequence[Path], rankings: Sequence[Ranking], out: TextIO) -> None:
    """Print each image's classes, one line an image."""
    names = [printable(file.name) for file in files]
    width = max(map(len, names))
    for name, ranking in zip(names, rankings, strict=True):
        classes = "   ".join(f"{printable(classname)} {probability:.1%}" for classname, probability in ranking)
        print(f"{name:<{width}}  {classes}", file=out)


def print_similarities(
    files: Sequence[Path], texts: Sequence[str], similarities: Sequence[Sequence[float]], out: TextIO
) -> None:
    """Print each image's cosine similarity to each text; `similarities` has a row an image."""
    for number, text in enumerate(texts, start=1):
        print(f"({number}) {printable(text)}", file=out)
    names = [printable(file.name) for file in files]
    width = max(map(len, names))
    print(" " * width + "".join(f"{f'({number})':>7}" for number in range(1, len(texts) + 1)), file=out)
    for name, row in zip(names, similarities, strict=True):
        print(f"{name:<{width}}" + "".join(f"{value:7.2f}" for value in row), file=out)


def load_pictures(files: Sequence[Path]) -> list[Image.Image]:
    """Return the images as a figure shows them: square, and larger than a small model sees them."""
    return [load_image(file, PICTURE_SIZE) for file in files]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_checkpoint_flag(parser, required=True)
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
    parser.add_argument(
        "--texts", nargs="+", metavar="TEXT", help="draw the similarity of these sentences to the images instead"
    )
    parser.add_argument(
        "--show_predictions", "--show_prediction", action="store_true", help="draw a figure of the predictions"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default="demo_output", help="where figures go (default: %(default)s)"
    )
    parser.add_argument("--top_k", type=positive, metavar="K", default=5, help="classes to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON; all else goes to stderr")
    add_inference_flags(parser, templates="single")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main)

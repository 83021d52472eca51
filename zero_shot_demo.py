"""Classify images zero-shot with a trained CLIP, into the classes of CIFAR100 or any others.

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

from utils.flags import Parser, add_checkpoint_flag, add_inference_flags, add_model_flags, model_settings, positive

TEST_IMAGES = Path(__file__).with_name("test_images")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flag(parser, required=True)
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--img_path", type=Path, metavar="FILE", help="one image")
    images.add_argument("--img_dir", type=Path, metavar="DIR", default=TEST_IMAGES, help="default: test_images")
    add = parser.add_argument
    class_help = "class names, or a text file with one per line (default: the 100 of CIFAR100)"
    add("--class_names", nargs="+", metavar="NAME", help=class_help)
    add("--texts", nargs="+", metavar="TEXT", help="draw the similarity of the images to these sentences instead")
    add("--show_predictions", "--show_prediction", action="store_true", help="draw a figure of the predictions")
    add("--output", type=Path, metavar="DIR", default="demo_output", help="folder for figures (default: %(default)s)")
    add("--top_k", type=positive, metavar="K", default=5, help="classes to show (default: %(default)s)")
    add("--json", action="store_true", help="print the results as JSON, and everything else to stderr")
    add_inference_flags(parser, templates="single")
    add_model_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args(None)  # `--help` and mistyped flags end here: importing PyTorch takes seconds

from model import load_clip
from utils.device import choose_device
from utils.errors import run_script
from utils.images import describe_left_out, find_images, load_image
from utils.text import one_line
from utils.zero_shot import CIFAR100_FILE, class_probabilities, read_class_names, read_templates

PICTURE_SIZE = 224  # pixels per side, in figures

Ranking = list[tuple[str, float]]  # (class name, probability), most probable first


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    files = [args.img_path] if args.img_path else find_images(args.img_dir)
    left_out = [] if args.img_path else describe_left_out(args.img_dir, files)
    classnames = read_class_names(args.class_names or [str(CIFAR100_FILE)])
    templates = read_templates(args.templates or ["single"])
    clip = load_clip(args.checkpoint_path, choose_device(args.device), **model_settings(args))
    classifier = None if args.texts else clip.build_classifier(classnames, templates)
    indices, image_features, failures = clip.encode_readable(
        files, batch_size=args.batch_size, num_workers=args.num_workers, show_progress=True
    )
    files = [files[index] for index in indices.tolist()]
    out = sys.stderr if args.json else sys.stdout

    if args.texts:
        similarities = (image_features @ clip.encode_text(args.texts).t()).tolist()
        results = [{"similarities": row} for row in similarities]
        print_similarities(files, args.texts, similarities, out)
    else:
        rankings = rank(class_probabilities(image_features, classifier).tolist(), classnames, args.top_k)
        results = [{"predictions": [{"class": c, "probability": p} for c, p in ranking]} for ranking in rankings]
        print_rankings(files, rankings, out)
    if args.texts or args.show_predictions:
        from utils.plots import own_figure, plot_predictions, plot_similarity  # Matplotlib takes a second to import
        from utils.reports import describe_origin

        data = (args.img_path or args.img_dir).resolve()
        note = describe_origin({"checkpoint": clip.source, "digest": clip.digest, "data": data})
        name = "similarity.png" if args.texts else "single_img_demo.png" if args.img_path else "demo.png"
        figure = own_figure(args.output / name, note)
        pictures = [load_image(file, PICTURE_SIZE) for file in files]
        if args.texts:
            plot_similarity(pictures, args.texts, similarities, figure, note)
        else:
            plot_predictions(pictures, rankings, figure, note)
        print("drew", one_line(figure), file=out)
    for path, reason in failures:
        print(f"skipped {one_line(path)}: {reason}", file=out)
    for line in left_out:
        print(one_line(line), file=out)
    if args.json:
        images = [{"file": str(file), **result} for file, result in zip(files, results, strict=True)]
        skipped = [{"file": path, "reason": reason} for path, reason in failures]
        content = {"checkpoint": clip.source, "texts": args.texts, "images": images, "skipped": skipped}
        print(json.dumps(content, indent=2))


def rank(probabilities: Sequence[Sequence[float]], classnames: Sequence[str], num_best: int) -> list[Ranking]:
    """Return the `num_best` most probable classes of each image; `probabilities`: [num_images][num_classes]."""
    pairs = (zip(classnames, row, strict=True) for row in probabilities)
    return [sorted(row, key=lambda pair: -pair[1])[:num_best] for row in pairs]


def print_rankings(files: Sequence[Path], rankings: Sequence[Ranking], out: TextIO) -> None:
    """Print one line per image with its classes and probabilities."""
    names = [one_line(file.name) for file in files]
    width = max(map(len, names))
    for name, ranking in zip(names, rankings, strict=True):
        classes = "   ".join(f"{one_line(classname)} {probability:.1%}" for classname, probability in ranking)
        print(f"{name:<{width}}  {classes}", file=out)


def print_similarities(
    files: Sequence[Path], texts: Sequence[str], similarities: Sequence[Sequence[float]], out: TextIO
) -> None:
    """Print a table of the cosine similarities, [num_images][num_texts]."""
    for number, text in enumerate(texts, start=1):
        print(f"({number}) {one_line(text)}", file=out)
    names = [one_line(file.name) for file in files]
    width = max(map(len, names))
    print(" " * width + "".join(f"{f'({number})':>7}" for number in range(1, len(texts) + 1)), file=out)
    for name, row in zip(names, similarities, strict=True):
        print(f"{name:<{width}}" + "".join(f"{value:7.2f}" for value in row), file=out)


if __name__ == "__main__":
    run_script(main)

"""train.py's flags. Nothing here imports PyTorch, so that `--help` and a mistyped flag answer at once."""

import argparse
from pathlib import Path

from utils.flags import parse_duration


def parse_args(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Parse the command line. Exits with status 2 and a usage line for unknown flags and impossible values."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sample", action="store_true", help="train a small model on drawings; downloads nothing")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with sections model, trainer, dataloader")
    parser.add_argument("--recipe", metavar="NAME", help="a file in trainer/recipes (default: reference)")
    parser.add_argument("--train_img_dir", metavar="DIR", help="training images")
    parser.add_argument("--train_annotation_file", metavar="FILE", help="their captions, in COCO's JSON or as a table")
    parser.add_argument("--val_img_dir", metavar="DIR", help="held-out images: measure retrieval while training")
    parser.add_argument("--val_annotation_file", metavar="FILE", help="their captions")
    parser.add_argument("--model", metavar="NAME", help="an architecture in model/model_config.yaml")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the images")
    parser.add_argument("--batch_size", type=int, metavar="N", help="pairs per GPU, or on the CPU")
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="folder of checkpoints and logs (default: . or sample_run)"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue from a checkpoint; auto: from the newest in --output_dir, or start if there is none",
    )
    parser.add_argument(
        "--time_limit", type=parse_duration, metavar="TIME", help="save and stop before it: 90m, 11.5h or 11:30:00"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override any key of a YAML file, e.g. trainer.optimizer.params.lr=1e-3 or model.embed_dim=512",
    )
    args = parser.parse_args(argv)
    if args.sample and (args.train_img_dir or args.train_annotation_file):
        parser.error("--sample draws its own data: omit --train_img_dir and --train_annotation_file")
    if args.output_dir is None:
        args.output_dir = Path("sample_run" if args.sample else ".")
    return args

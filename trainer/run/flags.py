"""train.py's flags. Nothing here imports PyTorch, so that `--help` and a mistyped flag answer at once."""

import argparse
from pathlib import Path

from utils.flags import Parser, parse_duration


def parse_args(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Parse the command line. Exits with status 2 and a usage line for unknown flags and impossible values."""
    parser = Parser(description)
    add = parser.add_argument
    add("--sample", action="store_true", help="train a small model on drawings; downloads nothing")
    add("--config", type=Path, metavar="FILE", help="YAML with sections model, trainer, dataloader")
    add("--recipe", metavar="NAME", help="a file in trainer/recipes (default: reference)")
    add("--train_img_dir", metavar="DIR", help="training images")
    add("--train_annotation_file", metavar="FILE", help="their captions, in COCO's JSON or as a table")
    add("--val_img_dir", metavar="DIR", help="held-out images: measure retrieval while training")
    add("--val_annotation_file", metavar="FILE", help="their captions")
    add("--model", metavar="NAME", help="an architecture in model/model_config.yaml")
    add("--epochs", type=int, metavar="N", help="passes over the images")
    add("--batch_size", type=int, metavar="N", help="pairs per GPU, or on the CPU")
    add("--output_dir", type=Path, metavar="DIR", help="folder of checkpoints and logs (default: . or sample_run)")
    resume = "continue from a checkpoint; auto: from the newest in --output_dir, or start if there is none"
    add("--resume", metavar="auto|PATH", help=resume)
    add("--allow_missing", action="store_true", default=None, help="validate although held-out images are missing")
    add("--allow_other_data", action="store_true", help="resume although the training images or captions changed")
    add("--time_limit", type=parse_duration, metavar="TIME", help="save and stop before it: 90m, 11.5h or 11:30:00")
    override = "override any key of a YAML file, e.g. trainer.optimizer.params.lr=1e-3 or model.embed_dim=512"
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=override)
    args = parser.parse_args(argv)
    if args.sample and (args.train_img_dir or args.train_annotation_file):
        parser.error("--sample draws its own data: omit --train_img_dir and --train_annotation_file")
    if args.output_dir is None:
        args.output_dir = Path("sample_run" if args.sample else ".")
    return args

"""The command-line flags that the demo and the evaluation share."""

import argparse

from utils.zero_shot import TEMPLATE


def positive(text: str) -> int:
    """Convert a flag's value to a number of at least 1; argparse tells what is wrong with any other."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def add_checkpoint_flag(parser: argparse._ActionsContainer, **options: bool) -> None:
    """Add --checkpoint_path."""
    parser.add_argument(
        "--checkpoint_path",
        metavar="PATH",
        help="a checkpoint; a directory: its newest one; or a model of open_clip, e.g. open_clip:RN50/openai",
        **options,
    )


def add_inference_flags(parser: argparse.ArgumentParser, *, templates: str) -> None:
    """Add --templates, with what it defaults to, --batch_size and --num_workers."""
    parser.add_argument(
        "--templates",
        "--template",
        nargs="+",
        metavar="T",
        help=f'the sentences around a class name: single ("{TEMPLATE}"), simple (7), openai (80), a text file with one '
        f"a line, or sentences with {{}} (default: {templates})",
    )
    parser.add_argument("--batch_size", type=positive, default=128, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=4, metavar="N", help="default: %(default)s")

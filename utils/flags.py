"""Command-line flags that several scripts share. Nothing here imports PyTorch, so that `--help` answers at once."""

import argparse
import re
from typing import NoReturn

from utils.text import one_line


class Parser(argparse.ArgumentParser):
    """A script's flags, which are not abbreviated; the description, the script's docstring, keeps its lines."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message, which may quote what was given."""
        super().error(one_line(message))


def positive(text: str) -> int:
    """Convert a flag's value to an integer of at least 1; argparse reports a ValueError as a wrong value."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_duration(text: str) -> float:
    """Return the seconds of "90s", "45m", "11.5h" or "11:30:00"; argparse reports anything else as a wrong value."""
    if clock := re.fullmatch(r"([0-9]+):([0-5][0-9]):([0-5][0-9])", text):
        hours, minutes, seconds = map(int, clock.groups())
        return 3600 * hours + 60 * minutes + seconds
    if amount := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text):
        return float(amount[1]) * {"s": 1, "m": 60, "h": 3600}[amount[2]]
    raise argparse.ArgumentTypeError(f"{text!r} should read 90s, 45m, 11.5h or 11:30:00")


def add_checkpoint_flag(parser: argparse._ActionsContainer, **options: bool) -> None:
    """Add --checkpoint_path; `options` go to `add_argument`."""
    help_text = "a checkpoint, a directory (its newest checkpoint), or a model of open_clip: open_clip:RN50/openai"
    parser.add_argument("--checkpoint_path", metavar="PATH", help=help_text, **options)


def add_inference_flags(parser: argparse.ArgumentParser, *, templates: str) -> None:
    """Add --templates, whose help names the default `templates`, --batch_size, --num_workers and --device."""
    parser.add_argument(
        "--templates",
        "--template",
        nargs="+",
        metavar="T",
        help='sentences with the class name: single ("a photo of a {}."), simple (7), openai (80), a text file with '
        f"one per line, or sentences with {{}} (default: {templates})",
    )
    add = parser.add_argument
    add("--batch_size", type=positive, default=128, metavar="N", help="images per batch (default: %(default)s)")
    add("--num_workers", type=int, default=4, metavar="N", help="threads or processes that read (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: a GPU if there is one")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what the weights of a checkpoint do not; `model_settings` reads them."""
    add = parser.add_argument_group("what weights do not say (a warning tells if it had to be assumed)").add_argument
    add("--activation", choices=["quick_gelu", "gelu"], help="OpenAI's models: quick_gelu; LAION's: gelu")
    add("--vision_head_width", type=positive, metavar="N", help="channels of an attention head of the image encoder")
    add("--transformer_heads", type=positive, metavar="N", help="attention heads of the text encoder")
    add("--image_mean", type=float, nargs=3, metavar=("R", "G", "B"), help="mean of the images, in [0, 1]")
    add("--image_std", type=float, nargs=3, metavar=("R", "G", "B"), help="their standard deviation")


def model_settings(args: argparse.Namespace) -> dict[str, object]:
    """Return the flags of `add_model_flags` that were given, as the keywords of `load_clip`."""
    names = ("activation", "vision_head_width", "transformer_heads", "image_mean", "image_std")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

"""Pack a captioned data set, so that training reads it fast.

python -m dataloader.pack --img_dir DIR --annotation_file FILE --output DIR                 WebDataset shards
python -m dataloader.pack --img_dir DIR --annotation_file FILE --output DIR --form pixels --size 224
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dataloader.captions import open_captions
from dataloader.config import add_caption_flags, caption_spec
from dataloader.storage.packing import make_spec, pack, read_manifest
from utils.errors import UserError, run_script
from utils.flags import Parser, positive
from utils.text import one_line


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--img_dir", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--annotation_file", type=Path, metavar="FILE", help="not for a folder of name.jpg and name.txt"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--form", choices=("shards", "pixels"), default="shards")
    parser.add_argument(
        "--size",
        type=positive,
        default=256,
        metavar="N",
        help="pixels of the short side (shards), of both sides (pixels)",
    )
    parser.add_argument("--images_per_shard", type=positive, default=1000, metavar="N")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), metavar="N")
    add_caption_flags(parser)
    args = parser.parse_args(argv)
    train_set = open_captions(caption_spec(args, "--img_dir", "train"))
    if train_set.shards:
        raise UserError(f"{train_set.shards.folder}: contains packed images already; give a folder of image files")
    print(train_set.describe())
    spec = make_spec(train_set, args.form, args.size, args.images_per_shard)
    logger = logging.Logger("pack")
    logger.addHandler(logging.StreamHandler(sys.stdout))
    if read_manifest(train_set, args.output, spec, logger) is not None:
        print(f"{one_line(args.output)} is packed already")
        return
    unreadable = pack(train_set, args.output, spec, num_workers=args.num_workers, logger=logger)
    num_bytes = sum(file.stat().st_size for file in args.output.iterdir())
    sides = "a short side" if args.form == "shards" else "two sides"
    print(
        f"packed {spec.num_images - len(unreadable):,} images with {sides} of {args.size} pixels into "
        f"{one_line(args.output)}: {num_bytes / 2**20:,.1f} MiB"
    )


if __name__ == "__main__":
    run_script(main)

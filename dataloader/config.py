"""The keys of `data_config.yaml`, and the flags of other commands that read captions."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveInt

from utils.config import Config, Overrides, PositiveShare, Share, load_config

CONFIG_FILE = Path(__file__).with_name("data_config.yaml")
FORMATS = ("auto", "coco", "karpathy", "csv", "json", "parquet", "folder", "shards")  # captions.py reads them


class CaptionFlags(NamedTuple):
    """How messages name the flags of a command."""

    img_dir: str = "--img_dir"
    annotation_file: str = "--annotation_file"
    prefix: str = "--"  # of format, csv_image_column and csv_caption_column


class CaptionSpec(NamedTuple):
    """Where images and captions are, and in which format."""

    img_dir: str | Path
    annotation_file: str | Path | None = None  # None if the captions are beside the images
    format: str = "auto"  # one of FORMATS
    csv_image_column: str = "filepath"
    csv_caption_column: str = "title"
    split: str = "train"  # of a file that has splits: train (includes restval), val or test
    flags: CaptionFlags = CaptionFlags()
    cache_dir: str | None = None  # for the index of shards on a disk that cannot be written


@dataclass(frozen=True)
class DataConfig(Config):
    """Paths and preprocessing of the training and validation data; `data_config.yaml` explains each key."""

    train_img_dir: str
    train_annotation_file: str | None
    val_img_dir: str | None
    val_annotation_file: str | None
    val_class_dir: str | None
    format: Literal[(*FORMATS, "stream")]
    val_format: Literal[FORMATS] | None
    csv_image_column: str
    csv_caption_column: str
    stream_num_images: PositiveInt | None
    cache: Literal["none", "jpeg", "pixels"]
    cache_dir: str
    cache_device: Literal["auto", "cpu", "gpu"]
    augmentation: Literal["reference", "standard"]
    crop_scale: tuple[PositiveShare, PositiveShare]
    flip: bool
    color_jitter: Share
    token_dropout: Annotated[float, Field(ge=0, lt=1)]
    max_unreadable_share: Annotated[float, Field(ge=0, le=0.5)]
    allow_missing: bool  # figures of incomplete held-out images

    def __post_init__(self) -> None:
        if self.val_img_dir is None and self.val_annotation_file is not None:
            raise ValueError("val_img_dir is missing: --val_img_dir gives the folder of the validation images")
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale should be [least, most], found {list(self.crop_scale)}")
        if self.cache != "none" and self.format in ("shards", "stream"):
            raise ValueError(f"cache should be none for format {self.format}: shards are packed images already")

    @property
    def default_format(self) -> str:
        """The format of files other than the training set's: `format` if it is an annotation file's, else auto."""
        return self.format if self.format in ("coco", "karpathy", "csv", "json", "parquet") else "auto"

    def captions(self, split: Literal["train", "val"]) -> CaptionSpec | None:
        """Return where the training or validation captions are, or None for no validation set."""
        if split == "train":
            files = self.train_img_dir, self.train_annotation_file, self.format
        else:
            files = self.val_img_dir, self.val_annotation_file, self.val_format or self.default_format
        flags = CaptionFlags(f"--{split}_img_dir", f"--{split}_annotation_file", "--set dataloader.")
        columns = self.csv_image_column, self.csv_caption_column
        return files[0] and CaptionSpec(*files, *columns, split, flags, self.cache_dir)


def load_data_config(overrides: Overrides = ()) -> DataConfig:
    """Read `data_config.yaml` and apply the overrides. Raises UserError for an unknown key or a wrong value."""
    return load_config(DataConfig, CONFIG_FILE, overrides)


def add_caption_flags(parser: argparse.ArgumentParser) -> None:
    """Add --format, --csv_image_column and --csv_caption_column; `caption_spec` reads them."""
    default = "default: that of data_config.yaml"
    parser.add_argument("--format", choices=FORMATS, help=f"of the captions ({default})")
    parser.add_argument("--csv_image_column", metavar="NAME", help=f"of a table: the image's file name ({default})")
    parser.add_argument("--csv_caption_column", metavar="NAME", help=f"of a table: the caption ({default})")


def caption_spec(args: argparse.Namespace, img_dir_flag: str, split: str) -> CaptionSpec:
    """Return the captions that a command's flags describe: `img_dir_flag`, --annotation_file, `add_caption_flags`.

    `data_config.yaml` sets the flags that are not given. Raises UserError.
    """
    config = load_data_config()
    return CaptionSpec(
        getattr(args, img_dir_flag.removeprefix("--")),
        args.annotation_file,
        args.format or config.default_format,
        args.csv_image_column or config.csv_image_column,
        args.csv_caption_column or config.csv_caption_column,
        split,
        CaptionFlags(img_dir_flag),
        config.cache_dir,
    )

"""What `data_config.yaml` holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.config import load_config

CONFIG_FILE = Path(__file__).with_name("data_config.yaml")


@dataclass(frozen=True)
class DataConfig:
    """Paths and preprocessing. Raises ValueError for an impossible value."""

    train_img_dir: str
    train_annotation_file: str | None  # None for folders and shards, whose captions lie beside the images
    val_img_dir: str | None
    val_annotation_file: str | None
    val_class_dir: str | None
    format: Literal["auto", "coco", "karpathy", "csv", "folder", "shards", "stream"]
    csv_image_column: str
    csv_caption_column: str
    stream_num_images: int | None  # of an epoch, where the shards do not tell
    cache: Literal["none", "jpeg", "pixels"]
    cache_dir: str
    cache_device: Literal["auto", "cpu", "gpu"]
    augmentation: Literal["reference", "standard"]
    crop_scale: tuple[float, float]  # share of the image's area that a random crop covers, least and most
    flip: bool
    color_jitter: float
    token_dropout: float  # share of a caption's tokens, in [0, 1)
    image_mean: tuple[float, float, float]  # of RGB in [0, 1]
    image_std: tuple[float, float, float]
    max_unreadable_share: float  # of the training images, in [0, 0.5]

    def __post_init__(self) -> None:
        if self.val_img_dir is None and self.val_annotation_file is not None:
            raise ValueError("val_img_dir belongs with val_annotation_file: set it too")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale should be two rising numbers in (0, 1], found {list(self.crop_scale)}")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter should be in [0, 1], found {self.color_jitter}")
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"token_dropout should be in [0, 1), found {self.token_dropout}")
        if self.cache != "none" and self.format in ("shards", "stream"):
            raise ValueError(f"cache should be none for format {self.format}: shards need no other")
        if not all(0 <= mean <= 1 for mean in self.image_mean):
            raise ValueError(f"image_mean should be three numbers in [0, 1], found {list(self.image_mean)}")
        if not all(0 < std <= 1 for std in self.image_std):
            raise ValueError(f"image_std should be three numbers in (0, 1], found {list(self.image_std)}")
        if not 0 <= self.max_unreadable_share <= 0.5:
            raise ValueError(f"max_unreadable_share should be in [0, 0.5], found {self.max_unreadable_share}")


def load_data_config(overrides: Iterable[tuple[str, Any]] = ()) -> DataConfig:
    """Read the YAML file, each (key, value) override applied. Raises UserError for an unknown key or bad value."""
    return load_config(DataConfig, CONFIG_FILE, overrides)

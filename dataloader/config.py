"""What `data_config.yaml` holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import load_config

CONFIG_FILE = Path(__file__).with_name("data_config.yaml")


@dataclass(frozen=True)
class DataConfig:
    """Paths and preprocessing. Raises ValueError for an impossible value."""

    train_img_dir: str
    train_annotation_file: str
    val_img_dir: str | None
    val_annotation_file: str | None
    image_mean: tuple[float, float, float]  # of RGB in [0, 1]
    image_std: tuple[float, float, float]
    max_unreadable_share: float  # of the training images, in [0, 0.5]

    def __post_init__(self) -> None:
        if (self.val_img_dir is None) != (self.val_annotation_file is None):
            raise ValueError("val_img_dir and val_annotation_file belong together: set both or neither")
        if not all(0 <= mean <= 1 for mean in self.image_mean):
            raise ValueError(f"image_mean should be three numbers in [0, 1], found {list(self.image_mean)}")
        if not all(0 < std <= 1 for std in self.image_std):
            raise ValueError(f"image_std should be three numbers in (0, 1], found {list(self.image_std)}")
        if not 0 <= self.max_unreadable_share <= 0.5:
            raise ValueError(f"max_unreadable_share should be in [0, 0.5], found {self.max_unreadable_share}")


def load_data_config(overrides: Iterable[tuple[str, Any]] = ()) -> DataConfig:
    """Read the YAML file, each (key, value) override applied. Raises UserError for an unknown key or bad value."""
    return load_config(DataConfig, CONFIG_FILE, overrides)

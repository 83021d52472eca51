"""The sizes of a CLIP model, and the named architectures of `model_config.yaml`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import build_config, nearest, read_yaml, short_name
from utils.errors import UserError

CONFIG_FILE = Path(__file__).with_name("model_config.yaml")


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the two encoders, named as in OpenAI's CLIP. Raises ValueError where they do not fit together."""

    embed_dim: int  # length of an image or text feature
    image_resolution: int  # pixels a side
    vision_layers: tuple[int, int, int, int] | int  # ResNet: blocks a stage; Vision Transformer: layers
    vision_width: int  # channels: ResNet's after the stem, the Vision Transformer's everywhere
    vision_patch_size: int | None  # pixels a side; None for a ResNet
    context_length: int  # tokens, both markers included
    vocab_size: int
    transformer_width: int
    transformer_heads: int
    transformer_layers: int
    name: str = "custom"
    logit_bias: bool = False  # a learned scalar that SigLIP's loss adds to the logits

    def __post_init__(self) -> None:
        sizes = {key: value for key, value in vars(self).items() if type(value) is int}
        if isinstance(self.vision_layers, tuple):
            sizes["vision_layers"] = min(self.vision_layers)
        for key, value in sizes.items():
            if value < 1:
                raise ValueError(f"{key} must be at least 1, found {value}")
        if self.is_resnet and self.vision_patch_size is not None:
            raise ValueError("vision_patch_size must be null for a ResNet (vision_layers is a list)")
        if not self.is_resnet and self.vision_patch_size is None:
            raise ValueError("vision_patch_size must be a number of pixels for a Vision Transformer")
        stride = 32 if self.is_resnet else self.vision_patch_size
        if self.image_resolution % stride:
            raise ValueError(f"image_resolution must be a multiple of {stride}, found {self.image_resolution}")
        if self.vision_width % (2 if self.is_resnet else 64):
            raise ValueError(f"vision_width {self.vision_width} does not divide into attention heads of 64")
        if self.transformer_width % self.transformer_heads:
            raise ValueError(
                f"transformer_width {self.transformer_width} does not divide into {self.transformer_heads} heads"
            )

    @property
    def is_resnet(self) -> bool:
        return isinstance(self.vision_layers, tuple)

    @property
    def vision_heads(self) -> int:
        """Attention heads of 64 channels: in a ResNet's pool, which sees 32 times its width, or in each layer."""
        return self.vision_width * (32 if self.is_resnet else 1) // 64


def load_model_config(overrides: Iterable[tuple[str, Any]] = ()) -> CLIPConfig:
    """Read the architecture that `name` names in the YAML file, each (key, value) override applied.

    Raises UserError for an unknown name, key or value.
    """
    architectures, overrides, file = read_yaml(CONFIG_FILE), dict(overrides), short_name(CONFIG_FILE)
    name = overrides.pop("name", architectures.pop("name", None))
    if name not in architectures:
        raise UserError(f"{file}: no architecture is called {name!r}; {nearest(str(name), architectures)}")
    if not isinstance(architectures[name], dict):
        raise UserError(f"{file}: {name} should be an architecture's block of keys")
    values = {"name": name, **architectures[name]}
    return build_config(CLIPConfig, values, f"{file} ({name})", overrides.items())

"""The sizes of a CLIP model, and the named architectures of `model_config.yaml`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.config import Config, Overrides, PositiveShare, Setting, Share, build_config, nearest, read_yaml, short_name
from utils.errors import UserError

CONFIG_FILE = Path(__file__).with_name("model_config.yaml")
RESNET_STRIDE = 32  # pixels per side of the input for each position of a ResNet's output
COCO_MEAN, COCO_STD = (0.4225, 0.4012, 0.3659), (0.2681, 0.2635, 0.2763)  # the reference's


@dataclass(frozen=True)
class CLIPConfig(Config):
    """Sizes of both encoders, with the names of OpenAI's CLIP. Raises ValueError if they do not fit together."""

    embed_dim: int  # length of an image or text feature
    image_resolution: int  # pixels per side
    vision_layers: tuple[int, int, int, int] | int  # ResNet: blocks per stage; Vision Transformer: layers
    vision_width: int  # channels: after a ResNet's stem, or in every layer of a Vision Transformer
    vision_patch_size: int | None  # pixels per side; None for a ResNet
    context_length: int  # tokens, including both markers
    vocab_size: int
    transformer_width: int
    transformer_heads: int
    transformer_layers: int
    name: str = "custom"
    logit_bias: bool = False  # whether the model has SigLIP's learned bias of the logits
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"  # of both transformers
    vision_head_width: int = 64  # channels of an attention head
    vision_variant: Literal["clip", "timm"] = "clip"  # timm's ViT: GELU, eps 1e-6, no LayerNorm before the blocks
    image_mean: tuple[Share, Share, Share] = COCO_MEAN  # of RGB in [0, 1]
    image_std: tuple[PositiveShare, PositiveShare, PositiveShare] = COCO_STD

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            smallest = min(value) if isinstance(value, tuple) else value
            if type(smallest) is int and smallest < 1:
                raise ValueError(f"{key} should be at least 1, found {value}")
        if self.is_resnet != (self.vision_patch_size is None):
            raise ValueError(
                "vision_patch_size should be null for a ResNet (vision_layers is a list), and a number of pixels for a "
                f"Vision Transformer (vision_layers is a number), found {self.vision_patch_size}"
            )
        stride = self.vision_patch_size or RESNET_STRIDE
        if self.image_resolution % stride:
            raise ValueError(f"image_resolution should be a multiple of {stride}, found {self.image_resolution}")
        if self.is_resnet and self.vision_width % 2:
            raise ValueError(f"vision_width should be a multiple of 2, found {self.vision_width}")
        if self._attention_width % self.vision_head_width:
            raise ValueError(
                f"vision_head_width should divide the {self._attention_width} channels of the image encoder's "
                f"attention, found {self.vision_head_width}"
            )
        if self.transformer_width % self.transformer_heads:
            raise ValueError(
                f"transformer_width should be a multiple of transformer_heads, {self.transformer_heads}, "
                f"found {self.transformer_width}"
            )

    @property
    def is_resnet(self) -> bool:
        return isinstance(self.vision_layers, tuple)

    @property
    def _attention_width(self) -> int:
        return self.vision_width * (32 if self.is_resnet else 1)  # the last stage of a ResNet is 32 times as wide

    @property
    def vision_heads(self) -> int:
        """The number of attention heads in every layer of a Vision Transformer, or in a ResNet's attention pooling."""
        return self._attention_width // self.vision_head_width


def load_model_config(overrides: Overrides = ()) -> CLIPConfig:
    """Read the architecture that the key `name` selects in the YAML file, then apply the (key, value) overrides.

    Raises UserError for an unknown name or key, or a wrong value.
    """
    architectures, overrides, file = read_yaml(CONFIG_FILE), dict(overrides), short_name(CONFIG_FILE)
    default = Setting(architectures.pop("name", None), file)
    choice = overrides.pop("name", default)
    name, origin = choice if isinstance(choice, Setting) else Setting(choice, "--set")
    values = architectures.get(str(name))
    if not isinstance(values, dict):
        raise UserError(f"{origin}: no architecture is named {name!r}; {nearest(str(name), architectures)}")
    return build_config(CLIPConfig, {"name": name, **values}, f"{file} ({name})", overrides)

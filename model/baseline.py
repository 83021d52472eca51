"""Models of open_clip in a CLIP's place, to compare with."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from model.trained import TrainedCLIP
from utils.config import nearest
from utils.errors import UserError
from utils.images import load_image
from utils.packages import quiet

PREFIX = "open_clip:"


class BaselineConfig(NamedTuple):
    """What the callers of a CLIP ask of its config."""

    name: str
    image_resolution: int


class Baseline(nn.Module):
    """An open_clip model with a CLIP's interface: its own tokenizer and context length, unnormalized features."""

    def __init__(self, model: nn.Module, tokenizer: object, config: BaselineConfig) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.encode_image = model.encode_image
        self.encode_text = model.encode_text

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token ids [num_texts, context_length]."""
        return self.tokenizer(list(texts))


def load_open_clip(name: str, device: str | torch.device = "cpu") -> TrainedCLIP:
    """Load `open_clip:MODEL/TAG`, pretrained weights that open_clip fetches, or `open_clip:MODEL/FILE`.

    With a tag the activation is the one that the weights were trained with; with a file it is the model's, so that
    OpenAI's weights need e.g. RN50-quickgelu. Raises UserError for an unknown model or tag, and for weights that cannot
    be fetched or do not fit.
    """
    import open_clip  # seconds, which only a baseline takes
    from open_clip.pretrained import get_pretrained_cfg

    model_name, _, weights = name.removeprefix(PREFIX).partition("/")
    models = open_clip.list_models()
    if model_name not in models:
        raise UserError(f"{name}: open_clip has no model {model_name!r}; {nearest(model_name, models)}")
    tag = get_pretrained_cfg(model_name, weights)
    if not tag and not Path(weights).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise UserError(f"{name}: {weights!r} is neither a file nor a tag of {model_name}; its tags: {tags}")
    try:
        with quiet():
            model = open_clip.create_model(model_name, weights, force_quick_gelu=bool(tag.get("quick_gelu")))
        tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:  # open_clip lets through whatever the network, the file or torch raises
        reason = " ".join(str(error).split())[:300]
        if tag:
            raise UserError(f"{name}: cannot be fetched ({reason}); {_how_to_fetch(model_name, tag)}") from None
        raise UserError(f"{name}: cannot be loaded into open_clip's {model_name} ({reason})") from None

    rules = model.visual.preprocess_cfg
    size = rules["size"] if isinstance(rules["size"], int) else rules["size"][0]
    load = partial(
        load_image,
        resample=Image.Resampling[rules["interpolation"].upper()],
        is_squashed=rules["resize_mode"] == "squash",
    )
    baseline = Baseline(model, tokenizer, BaselineConfig(model_name, size)).eval().to(device)
    return TrainedCLIP(baseline, tuple(rules["mean"]), tuple(rules["std"]), name, load)


def _how_to_fetch(model_name: str, tag: dict) -> str:
    repository, file = tag.get("hf_hub", "").rpartition("/")[::2]
    address = f"https://huggingface.co/{repository}/resolve/main/{file or 'open_clip_model.safetensors'}"
    if not repository:
        address = tag["url"]
    suffix = "-quickgelu" if tag.get("quick_gelu") and not model_name.endswith("-quickgelu") else ""
    return (
        f"download {address} to saved_checkpoints/ on a machine with a network, and give "
        f"{PREFIX}{model_name}{suffix}/saved_checkpoints/{address.rpartition('/')[2]}"
    )

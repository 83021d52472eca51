"""Models of open_clip with the interface of ours, for comparison."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from model.pretrained.inference import TrainedCLIP
from utils.config import nearest
from utils.errors import UserError
from utils.images import ImageLike, load_image
from utils.packages import quiet

PREFIX = "open_clip:"


class Baseline(nn.Module):
    """An open_clip model with the methods of a `CLIP`, its own tokenizer and its own context length."""

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor], config: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.open_clip_config = config  # with the keys of open_clip's `open_clip_config.json`
        rules = config["preprocess_cfg"]
        size = rules["size"] if isinstance(rules["size"], int) else rules["size"][0]
        mean, std = tuple(rules["mean"]), tuple(rules["std"])
        length = config["model_cfg"]["text_cfg"].get("context_length", 77)
        self.config = SimpleNamespace(image_resolution=size, image_mean=mean, image_std=std, context_length=length)
        self.encode_image = model.encode_image
        self.encode_text = model.encode_text

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token ids, int64 [num_texts, context_length]."""
        return self.tokenizer(list(texts))


def load_open_clip(name: str, device: str | torch.device = "cpu") -> TrainedCLIP:
    """Load `open_clip:MODEL/TAG`, whose weights open_clip downloads, or `open_clip:MODEL/FILE`.

    A tag selects the activation that its weights were trained with. A file does not: OpenAI's weights need a model such
    as RN50-quickgelu. Raises UserError for an unknown model or tag, a failed download, or weights that do not fit.
    """
    import open_clip  # takes seconds
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
    except Exception as error:  # open_clip passes on every error of the network, the file and torch
        reason = " ".join(str(error).split())[:300]
        if tag:
            raise UserError(f"{name}: cannot be downloaded ({reason}); {_download_steps(model_name, tag)}") from None
        raise UserError(f"{name}: cannot be loaded into open_clip's {model_name} ({reason}); give its model") from None

    architecture = open_clip.get_model_config(model_name)
    architecture["quick_gelu"] = bool(architecture.get("quick_gelu") or tag.get("quick_gelu"))
    config = {"model_cfg": architecture, "preprocess_cfg": model.visual.preprocess_cfg}
    baseline = Baseline(model, tokenizer, config).eval().to(device)
    return TrainedCLIP(baseline, name, image_loader(config["preprocess_cfg"]))


def image_loader(rules: Mapping[str, Any]) -> Callable[[ImageLike, int], Image.Image]:
    """Return the function that reads an image, (file, size) -> picture, by `interpolation` and `resize_mode`."""
    resample = Image.Resampling[rules.get("interpolation", "bicubic").upper()]
    return partial(load_image, resample=resample, is_squashed=rules.get("resize_mode") == "squash")


def _download_steps(model_name: str, tag: dict) -> str:
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    address = f"https://huggingface.co/{repository}/resolve/main/{file or 'open_clip_model.safetensors'}"
    address = address if repository else tag["url"]
    suffix = "-quickgelu" if tag.get("quick_gelu") and not model_name.endswith("-quickgelu") else ""
    return (
        f"download {address} to saved_checkpoints/ on a machine with a network, and give "
        f"{PREFIX}{model_name}{suffix}/saved_checkpoints/{address.rpartition('/')[2]}"
    )

"""The layouts in which CLIPs are published: their weights' names, and the configuration that stands beside them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.packages import package_file

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OTHER_ARCHITECTURES = {"hf_model_name", "hf_tokenizer_name", "timm_model_name", "no_ln_pre"}  # keys of open_clip
OPENAI = {"activation": "quick_gelu", "vision_head_width": 64, "head_width": 64}
OPENAI |= {"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD}
SLIP_CONFIG = OPENAI | {"vision_variant": "timm", "image_mean": (0.485, 0.456, 0.406)}  # ImageNet's
SLIP_CONFIG |= {"image_std": (0.229, 0.224, 0.225)}
BLOCK_NAMES = ((r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."))


@dataclass(frozen=True)
class Layout:
    """The names of a CLIP's weights, as the model `name` has them.

    `marker` is a name that only this layout has. `renames` are pairs (regular expression, replacement) that lead to
    OpenAI's names, applied in order; None leaves the weight out.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, str | None], ...] = ()


HUGGING_FACE = Layout(
    "Hugging Face's CLIPModel",
    "text_model.embeddings.token_embedding.weight",
    (
        (r"\.position_ids$", None),
        (r"^vision_model\.", "visual."),
        (r"^text_model\.", ""),
        (r"\bencoder\.layers\.", "transformer.resblocks."),
        (r"\bembeddings\.position_embedding\.weight$", "positional_embedding"),
        (r"\bembeddings\.patch_embedding\.", "conv1."),
        (r"\bembeddings\.", ""),
        (r"\.self_attn\.", ".attn."),
        (r"\.layer_norm(\d)\.", r".ln_\1."),
        *BLOCK_NAMES,
        (r"\.pre_layrnorm\.", ".ln_pre."),
        (r"\.post_layernorm\.", ".ln_post."),
        (r"^final_layer_norm\.", "ln_final."),
        (r"^visual_projection\.weight$", "visual.proj"),
        (r"^text_projection\.weight$", "text_projection"),
    ),
)
SLIP = Layout(
    "SLIP",
    "image_projection",
    (
        (r"^image_mlp\.", None),  # the head of its self-supervised loss
        (r"^visual\.blocks\.", "visual.transformer.resblocks."),
        (r"^visual\.cls_token$", "visual.class_embedding"),
        (r"^visual\.pos_embed$", "visual.positional_embedding"),
        (r"^visual\.patch_embed\.proj\.", "visual.conv1."),
        (r"^visual\.norm\.", "visual.ln_post."),
        (r"\.norm(\d)\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".attn.in_proj_"),
        (r"\.attn\.proj\.", ".attn.out_proj."),
        *BLOCK_NAMES,
        (r"^image_projection$", "visual.proj"),
    ),
)
LAYOUTS = (HUGGING_FACE, SLIP, Layout("OpenAI's CLIP", "token_embedding.weight"))


def to_openai_names(weights: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under OpenAI's names and in their shapes, and the names of those that are left out."""
    renamed, left_out = {}, []
    for key, tensor in weights.items():
        name = key
        for pattern, replacement in layout.renames:
            if re.search(pattern, name):
                name = "" if replacement is None else re.sub(pattern, replacement, name)
        if name:
            renamed[name] = tensor
        elif not key.endswith("position_ids"):  # only counts positions
            left_out.append(key)
    if layout is HUGGING_FACE:
        for name in renamed.keys() & {"visual.proj", "text_projection"}:
            renamed[name] = renamed[name].t().contiguous()
        for name in [name for name in renamed if ".attn.q_proj." in name]:
            parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            if all(part in renamed for part in parts):
                renamed[name.replace("q_proj.", "in_proj_")] = torch.cat([renamed.pop(part) for part in parts])
    if layout is SLIP and "visual.positional_embedding" in renamed:
        positions = renamed["visual.positional_embedding"].flatten(0, 1).clone()
        if "visual.conv1.bias" in renamed:  # added to every patch, as its position is
            positions[1:] += renamed.pop("visual.conv1.bias")
        renamed["visual.positional_embedding"] = positions
        renamed["visual.class_embedding"] = renamed["visual.class_embedding"].flatten()
    return renamed, left_out


def read_companion(folder: Path, layout: Layout) -> dict[str, Any]:
    """Return what the configuration files beside the weights say, with the names of `CLIPConfig`; {} without them.

    They are Hugging Face's `config.json` and `preprocessor_config.json`, or open_clip's `open_clip_config.json`. Raises
    UserError if one is damaged, or asks for what `CLIP` does not compute.
    """
    try:
        if layout is not HUGGING_FACE:
            return from_open_clip(_read_json(folder / "open_clip_config.json"))
        return _from_hugging_face(_read_json(folder / "config.json"), _read_json(folder / "preprocessor_config.json"))
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise UserError(
            f"{folder}: its configuration file cannot be used ({error}); correct it or move it away"
        ) from None


def from_open_clip(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's `model_cfg` and `preprocess_cfg` with the names of `CLIPConfig`. Raises KeyError."""
    if not content:
        return {}
    model, images = content["model_cfg"], content.get("preprocess_cfg", {})
    vision, text = model["vision_cfg"], model["text_cfg"]
    layers = vision["layers"]
    return {
        "embed_dim": model["embed_dim"],
        "image_resolution": vision["image_size"],
        "vision_layers": tuple(layers) if isinstance(layers, list) else layers,
        "vision_width": vision["width"],
        "vision_patch_size": vision.get("patch_size"),
        "vision_head_width": vision.get("head_width", 64),
        "context_length": text.get("context_length", 77),
        "vocab_size": text.get("vocab_size", 49408),
        "transformer_width": text["width"],
        "transformer_heads": text["heads"],
        "transformer_layers": text["layers"],
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        **{f"image_{key}": tuple(images[key]) for key in ("mean", "std") if key in images},
        **{key: images[key] for key in ("interpolation", "resize_mode") if key in images},
    }


def _from_hugging_face(model: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a `CLIPModel` and of its images with the names of `CLIPConfig`."""
    fields = {key: tuple(images[key]) for key in ("image_mean", "image_std") if key in images}
    if "resample" in images:
        fields["interpolation"] = {2: "bilinear", 3: "bicubic"}[images["resample"]]  # Pillow's numbers
    if "vision_config" not in model:
        return fields
    vision = {"hidden_size": 768, "num_attention_heads": 12} | model["vision_config"]  # transformers' defaults
    text = {"hidden_size": 512, "num_attention_heads": 8} | model["text_config"]
    activations = {part.get("hidden_act", "quick_gelu") for part in (vision, text)}
    epsilons = {part.get("layer_norm_eps", 1e-5) for part in (vision, text)}
    if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"} or epsilons != {1e-5}:
        raise ValueError(f"hidden_act {sorted(activations)} and layer_norm_eps {sorted(epsilons)} are not supported")
    return fields | {
        "activation": activations.pop(),
        "vision_width": vision["hidden_size"],
        "vision_head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "transformer_width": text["hidden_size"],
        "transformer_heads": text["num_attention_heads"],
    }


@cache
def open_clip_architectures() -> list[dict[str, Any]]:
    """Return open_clip's architectures that are OpenAI's, as `from_open_clip` does."""
    architectures = []
    for file in sorted((package_file("open_clip", "__init__.py").parent / "model_configs").glob("*.json")):
        model = _read_json(file)
        if not OTHER_ARCHITECTURES & {*model["text_cfg"], *model["vision_cfg"]}:
            architectures.append(from_open_clip({"model_cfg": model}))
    return architectures


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

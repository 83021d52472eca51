"""Load CLIP weights of any layout: detect it, rename the weights, derive the configuration, load.

Reads our checkpoints, the reference's, OpenAI's, open_clip's, Hugging Face's and SLIP's.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.clip import CLIP
from model.config import COCO_MEAN, COCO_STD, RESNET_STRIDE, CLIPConfig
from model.pretrained.baseline import PREFIX, image_loader, load_open_clip
from model.pretrained.files import read_checkpoint
from model.pretrained.inference import TrainedCLIP
from model.pretrained.layouts import (
    LAYOUTS,
    OPENAI,
    OPENAI_MEAN,
    OPENAI_STD,
    SLIP,
    SLIP_CONFIG,
    Layout,
    from_open_clip,
    open_clip_architectures,
    read_companion,
    to_openai_names,
)
from utils.config import Setting, build_config
from utils.errors import UserError
from utils.text import one_line
from utils.tokenizer import VOCAB_SIZE

LOGGER = logging.getLogger(__name__)
WRAPPERS = ("model_state_dict", "state_dict", "model", "module", "_orig_mod")  # names that a training script adds
OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}  # stand among OpenAI's weights
NOT_WEIGHTS = OPENAI_SIZES | {"attn_mask"}
FILES = ("*.pt", "model.safetensors", "pytorch_model.bin", "*.index.json", "*.safetensors", "*.bin", "*.ckpt", "*.pth")
ARCHITECTURE = ("embed_dim", "vision_layers", "vision_width", "vision_patch_size")  # tell one from another, with:
ARCHITECTURE += ("context_length", "vocab_size", "transformer_width", "transformer_layers")
OTHERS = "use a checkpoint of a CLIP with OpenAI's architecture; open_clip:MODEL/FILE loads open_clip's others"
UNSAID = {"activation", "vision_head_width", "transformer_heads", "image_mean", "image_std"}  # by shapes


def load_clip(path: str | Path, device: str | torch.device = "cpu", **settings: Any) -> TrainedCLIP:
    """Load a trained model as `load_pretrained` does, onto `device`, and log a warning of what had to be assumed.

    `open_clip:MODEL/TAG` may be any model of open_clip; it stays open_clip's (`load_open_clip`).
    """
    if not str(path).startswith(PREFIX):
        clip = load_pretrained(path, **settings)
        for note in clip.notes:
            LOGGER.warning(f"warning: {one_line(note)}")
        return replace(clip, model=clip.model.to(device))
    if settings:
        raise UserError(f"{path} says its own configuration; remove --{' --'.join(settings)}")
    return load_open_clip(str(path), device)


def load_pretrained(path: str | Path, **settings: Any) -> TrainedCLIP:
    """Load a `CLIP` in evaluation mode and float32, on the CPU.

    `path` is a file, a directory (its newest checkpoint), or `open_clip:MODEL/TAG`. The weights have the names of
    OpenAI's CLIP, of open_clip, Hugging Face's `CLIPModel` or SLIP, with any common prefix, inside of the dictionaries
    that training scripts save. Their shapes give the sizes. Activation, attention heads, mean and standard deviation of
    the images come from `settings` (fields of `CLIPConfig`), or else from the configuration in or beside the file, or
    else from open_clip's architectures of these sizes. What is still open is assumed, and `notes` say it. Raises
    UserError if the file is missing or damaged, contains no CLIP, or leaves open what cannot be assumed.
    """
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    source = str(path) if str(path).startswith(PREFIX) else str(_find_file(Path(path)))
    weights, layout, said, notes = (_read_open_clip if source.startswith(PREFIX) else _read_file)(source)
    if "name" in said and (changed := [key for key, value in settings.items() if said.get(key) != value]):
        raise UserError(f"{source} says that its {changed[0]} is {said.get(changed[0])}; remove --{changed[0]}")
    named = f"{source} (with the names of {layout.name})"
    sizes = infer_sizes(weights, named)
    if "name" not in said and sizes["vocab_size"] < VOCAB_SIZE:
        raise UserError(f"{source}: has {sizes['vocab_size']:,} tokens, not CLIP's {VOCAB_SIZE:,}; {OTHERS}")
    config, assumed = _configure(sizes, said, settings, source)
    if assumed:
        notes.append(f"{source} does not say all of its configuration; assumed {assumed}; correct it with these flags")
    model = CLIP(config)
    load_weights(model, weights, named)
    return TrainedCLIP(model.eval(), source, image_loader(said), tuple(notes))


def _age(file: Path) -> tuple[int, float]:
    """Return the step that ends a checkpoint's name, -1 for another name, and the time, which copying may change."""
    step = file.stem.rpartition("_")[2]
    return int(step) if step.isascii() and step.isdecimal() else -1, file.stat().st_mtime


def load_weights(model: CLIP, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state_dict` into `model`. Raises UserError if it does not fit, or if a weight is not finite."""
    expected = model.state_dict()
    problems = {
        "missing": [key for key in expected if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in expected],
        "of another shape or type": [
            f"{key} is {tensor.dtype} {list(tensor.shape)}, not {list(expected[key].shape)}"
            for key, tensor in state_dict.items()
            if key in expected and (tensor.shape != expected[key].shape or tensor.dtype != expected[key].dtype)
        ],
    }
    if any(problems.values()):
        found = ", ".join(f"{len(keys)} {kind} (first: {keys[0]})" for kind, keys in problems.items() if keys)
        raise UserError(f"{source}: its weights do not fit the architecture {model.config.name}: {found}; {OTHERS}")
    if broken := [key for key, tensor in state_dict.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{source}: {len(broken)} of its weights are not finite (first: {broken[0]}); use another file")
    model.load_state_dict(state_dict)


def infer_sizes(weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return the fields of `CLIPConfig` that the shapes of the weights tell. Raises UserError if they are no CLIP."""
    try:
        if "visual.proj" in weights:
            layers = _count_blocks(weights, "visual.transformer.resblocks.")
            width, _, _, patch_size = weights["visual.conv1.weight"].shape
            positions = weights["visual.positional_embedding"]
        else:
            layers = tuple(_count_blocks(weights, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
            width, patch_size = weights["visual.layer1.0.conv1.weight"].shape[0], None
            positions = weights["visual.attnpool.positional_embedding"]
        grid_side = round((positions.shape[0] - 1) ** 0.5)  # the first position is the class or mean token
        text_width, embed_dim = weights["text_projection"].shape
        return {
            "embed_dim": embed_dim,
            "image_resolution": (patch_size or RESNET_STRIDE) * grid_side,
            "vision_layers": layers,
            "vision_width": width,
            "vision_patch_size": patch_size,
            "context_length": weights["positional_embedding"].shape[0],
            "vocab_size": weights["token_embedding.weight"].shape[0],
            "transformer_width": text_width,
            "transformer_layers": _count_blocks(weights, "transformer.resblocks."),
            "logit_bias": "logit_bias" in weights,
        }
    except KeyError as error:
        raise UserError(f"{source}: has no weight {error}; {OTHERS}") from None
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{source}: its weights are not those of a CLIP model ({error}); use another file") from None


def _read_open_clip(name: str) -> tuple[dict[str, Tensor], Layout, dict[str, Any], list[str]]:
    """Return what `_read_file` does for a model of open_clip. Raises UserError if it is not OpenAI's CLIP."""
    baseline = load_open_clip(name).model
    try:
        said = from_open_clip(baseline.open_clip_config) | {"name": name}
    except KeyError as error:
        raise UserError(f"{name}: is not a CLIP with OpenAI's architecture (it has no {error}); use another") from None
    return _to_float32(baseline.model.state_dict(), name), LAYOUTS[-1], said, []


def _read_file(source: str) -> tuple[dict[str, Tensor], Layout, dict[str, Any], list[str]]:
    """Return the weights of a file, their layout, what is said of the configuration, and notes of what is left out."""
    path = Path(source)
    checkpoint = _read_parts(path)
    weights, layout, notes = _select_weights(checkpoint, source)
    if "configs" in checkpoint:  # ours
        return weights, layout, _read_configs(checkpoint["configs"], source), notes
    said = {}
    if layout is SLIP:
        said = SLIP_CONFIG | ({"vision_head_width": 32} if weights["visual.proj"].shape[:1] == (384,) else {})
    elif OPENAI_SIZES.issubset(checkpoint):
        said = OPENAI
    elif {"model_state_dict", "global_step"}.issubset(checkpoint):  # the reference's
        said = OPENAI | {"image_mean": COCO_MEAN, "image_std": COCO_STD}
    elif {"epoch", "name", "state_dict"}.issubset(checkpoint):  # of open_clip's training
        said = {"usual_activation": "quick_gelu" if "quickgelu" in str(checkpoint["name"]).lower() else "gelu"}
    return weights, layout, said | read_companion(path.parent, layout), notes


def _configure(
    sizes: dict[str, Any], said: dict[str, Any], settings: dict[str, Any], source: str
) -> tuple[CLIPConfig, str]:
    """Complete the configuration. Return it, and the flags of what had to be assumed."""
    if wrong := [key for key in sizes if said.get(key, sizes[key]) != sizes[key]]:
        key = wrong[0]
        raise UserError(
            f"{source}: its configuration says {key} {said[key]}, and its weights {sizes[key]}; it is damaged, or the "
            "configuration is another model's"
        )
    known = {"name": "inferred from the weights"} | said | sizes | settings
    width, text_width = sizes["vision_width"], sizes["transformer_width"]
    if isinstance(sizes["vision_layers"], tuple):
        known.setdefault("vision_head_width", 64)  # of every published ResNet
    if "head_width" in known:
        known.setdefault("transformer_heads", text_width // known["head_width"])
    assumed = {}
    if not known.keys() >= UNSAID:
        peers = open_clip_architectures()
        same = [peer for peer in peers if all(peer[key] == sizes[key] for key in ARCHITECTURE)]
        for key in ("activation", "vision_head_width", "transformer_heads"):
            if len(values := {peer[key] for peer in same}) == 1:
                known.setdefault(key, *values)
        widths = {(peer["vision_width"], peer["vision_head_width"]) for peer in peers if peer["vision_patch_size"]}
        head_widths = {head for other, head in widths if other == width}
        head_widths = head_widths or {head for _, head in widths if width % head == 0}
        assumed = {
            "activation": known.get("usual_activation", "gelu" if same and width > 1024 else "quick_gelu"),
            "vision_head_width": head_widths.pop() if len(head_widths) == 1 else None,
            "transformer_heads": None if text_width % 64 else text_width // 64,
            "image_mean": OPENAI_MEAN,
            "image_std": OPENAI_STD,
        }
        assumed = {key: value for key, value in assumed.items() if key not in known}
        if unknown := [key for key, value in assumed.items() if value is None]:
            key, options = unknown[0], sorted(head_widths) if unknown[0] == "vision_head_width" else []
            raise UserError(
                f"{source}: the shapes of its weights do not say its {key} (its image encoder has {width} channels and "
                f"its text encoder {text_width}); add {' or '.join(f'--{key} {n}' for n in options or 'N')}, as the "
                "model was trained"
            )
    values = {key: value for key, value in (known | assumed).items() if key in CLIPConfig.__dataclass_fields__}
    config = build_config(CLIPConfig, values, source, {key: Setting(settings[key], f"--{key}") for key in settings})
    return config, " ".join(f"--{key} {str(value).strip('()').replace(',', '')}" for key, value in assumed.items())


def _find_file(path: Path) -> Path:
    """Return the file itself, or of the first of `FILES` that a directory holds, the one of the highest step."""
    if not path.is_dir():
        return path
    for pattern in FILES:
        if files := sorted(path.glob(pattern), key=_age):
            return files[-1]
    raise UserError(
        f"the directory {path} holds no checkpoint (*.pt, or {', '.join(FILES[1:3])}, ...); train one: python train.py "
        "--sample"
    )


def _read_parts(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or all parts of one that an `*.index.json` lists. Raises UserError."""
    if not path.name.endswith(".index.json"):
        return read_checkpoint(path)
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"{path}: does not list the parts of a checkpoint ({error}); give the file of weights"
        ) from None
    return {key: value for name in sorted(names) for key, value in read_checkpoint(path.with_name(name)).items()}


def _select_weights(checkpoint: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], Layout, list[str]]:
    """Find the CLIP in a checkpoint. Return its weights, float32 with OpenAI's names, its layout, and what is left out.

    Whatever stands before a layout's marker, of enclosing dictionaries and of names, is the prefix of all its weights.
    """
    state_dicts = dict(_state_dicts(checkpoint))
    found: list[tuple[str, str, Layout]] = []  # (the dictionary's prefix, the names' prefix, layout)
    for layout in LAYOUTS:
        for place, weights in state_dicts.items():
            keys = [key for key in weights if key == layout.marker or key.endswith(f".{layout.marker}")]
            found += [(place, key.removesuffix(layout.marker), layout) for key in keys]
        if found:
            break
    if not found:
        names = [key for weights in state_dicts.values() for key in weights] or [str(key) for key in checkpoint]
        names = ", ".join(map(one_line, names[:5])) or "none"
        raise UserError(f"{source}: holds no weights of a CLIP (its names: {names}); {OTHERS}")
    plain = [place for place in found if set(f"{place[0]}{place[1]}".split(".")) <= {"", *WRAPPERS}]
    if len(found) > 1 and not plain:
        prefixes = ", ".join(f"{place}{prefix}" for place, prefix, _ in found)
        raise UserError(f"{source}: holds {len(found)} CLIPs ({prefixes}); save the one to use as a file of its own")
    place, prefix, layout = chosen = (plain or found)[0]
    others = ", ".join(f"{other[0]}{other[1]}*" for other in found if other != chosen)
    notes = [f"{source} holds {len(found)} CLIPs; used {place}{prefix}*, not {others}"] if others else []
    named = {key.removeprefix(prefix): value for key, value in state_dicts[place].items() if key.startswith(prefix)}
    weights = {key: value for key, value in named.items() if key.rpartition(".")[2] not in NOT_WEIGHTS}
    weights = _to_float32(weights, source)
    try:
        weights, left_out = to_openai_names(weights, layout)
    except (RuntimeError, IndexError, KeyError) as error:  # of weights that are missing or of impossible shapes
        raise UserError(f"{source}: its weights are not those of {layout.name} ({error}); use another file") from None
    left_out += [key for key in state_dicts[place] if not key.startswith(prefix)]
    if left_out:
        notes.append(f"{source}: {len(left_out)} weights are not CLIP's and were left out (first: {left_out[0]})")
    return weights, layout, notes


def _state_dicts(
    content: Mapping[str, Any], prefix: str = "", depth: int = 3
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (prefix, the tensors by name) of a dictionary and of the dictionaries in it."""
    yield prefix, {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for key, value in content.items():
        if isinstance(value, Mapping) and depth:
            yield from _state_dicts(value, f"{prefix}{key}.", depth - 1)


def _to_float32(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the weights with floats as float32 and a scalar temperature. Raises UserError if one lacks its data."""
    result = {}
    for key, value in weights.items():
        is_dense = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        if not is_dense or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise UserError(f"{source}: {key} is not a dense tensor with all of its data; the file is damaged")
        value = value.float() if value.is_floating_point() else value
        is_scalar = key in ("logit_scale", "logit_bias") and value.numel() == 1  # some of open_clip's are [1]
        result[key] = value.reshape(()) if is_scalar else value
    return result


def _read_configs(configs: Any, source: str) -> dict[str, Any]:
    """Return the configuration that our checkpoints store. Raises UserError if it is damaged."""
    try:
        model, data = dict(configs["model"]), configs["dataloader"]
        if "image_mean" not in model:  # earlier versions stored them with the data
            model |= {key: data[key] for key in ("image_mean", "image_std")}
        return asdict(build_config(CLIPConfig, model, source))
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{source}: its configuration is damaged ({error}); use another checkpoint") from None


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Count the numbered submodules under `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})

"""One loader for CLIP weights: our checkpoints, the reference's, and bare state dicts of OpenAI and open_clip.

The architecture comes from the file: ours store it, from any other it is read off the shapes.
"""

import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.baseline import PREFIX, load_open_clip
from model.clip import CLIP
from model.config import CLIPConfig
from model.trained import TrainedCLIP
from utils.config import build_config
from utils.errors import UserError

COCO_MEAN, COCO_STD = (0.4225, 0.4012, 0.3659), (0.2681, 0.2635, 0.2763)
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}  # in OpenAI's archives


def load_clip(path: str | Path, device: str | torch.device = "cpu") -> TrainedCLIP:
    """Load a checkpoint file, or the newest checkpoint of a directory: in eval mode, float32, on `device`.

    Takes our checkpoints; the reference's (weights under `model_state_dict`, preprocessed with COCO's mean and
    std); and state dicts in OpenAI's or open_clip's layout, bare or under `state_dict`, `module.` prefixes or not,
    in any float type (preprocessed with OpenAI's mean and std). Nothing but tensors and plain containers is
    unpickled. `open_clip:MODEL/TAG` is a model of open_clip itself (`load_open_clip`). Raises UserError if the file is
    missing, is no checkpoint, or its weights make no CLIP.
    """
    if str(path).startswith(PREFIX):
        return load_open_clip(str(path), device)
    path = _find(Path(path))
    checkpoint = read_checkpoint(path)
    state_dict = _state_dict(checkpoint, path)
    config = infer_config(state_dict, path)
    configs = checkpoint.get("configs")
    if configs is not None:
        try:
            stored = build_config(CLIPConfig, dict(configs["model"]), str(path))
            mean, std = (tuple(map(float, configs["dataloader"][key])) for key in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"{path}: its configuration is damaged ({error})") from None
        if stored != replace(config, name=stored.name, transformer_heads=stored.transformer_heads):
            raise UserError(f"{path}: its configuration ({stored.name}) is not that of its weights; it is damaged")
        config = stored
    else:
        mean, std = (COCO_MEAN, COCO_STD) if "model_state_dict" in checkpoint else (OPENAI_MEAN, OPENAI_STD)
    model = CLIP(config)
    load_weights(model, state_dict, path)
    return TrainedCLIP(model.eval().to(device), tuple(mean), tuple(std), str(path))


def load_weights(model: CLIP, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state_dict` into `model`. Raises UserError if it does not fit, or holds numbers that are not finite."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state_dict]
    unexpected = [key for key in state_dict if key not in expected]
    misshapen = [
        f"{key} is {tensor.dtype} {list(tensor.shape)}, not {list(expected[key].shape)}"
        for key, tensor in state_dict.items()
        if key in expected and (tensor.shape != expected[key].shape or tensor.dtype != expected[key].dtype)
    ]
    problems = [
        f"{len(keys)} {kind} (first: {keys[0]})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape or type", misshapen))
        if keys
    ]
    if problems:
        raise UserError(
            f"{source}: its weights do not fit the architecture {model.config.name}: {', '.join(problems)}; "
            "is it a checkpoint of this model?"
        )
    broken = [key for key, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{source}: {len(broken)} of its weights are not finite (first: {broken[0]}); use another one")
    model.load_state_dict(state_dict)


def infer_config(state_dict: Mapping[str, Tensor], source: str | Path) -> CLIPConfig:
    """Read the architecture off the shapes of a state dict with OpenAI's names. Attention heads are 64 wide.

    Raises UserError if they do not describe a CLIP.
    """
    try:
        text_width = state_dict["ln_final.weight"].shape[0]
        common = {
            "embed_dim": state_dict["text_projection"].shape[1],
            "context_length": state_dict["positional_embedding"].shape[0],
            "vocab_size": state_dict["token_embedding.weight"].shape[0],
            "transformer_width": text_width,
            "transformer_heads": max(1, text_width // 64),
            "transformer_layers": _count(state_dict, "transformer.resblocks."),
            "name": "read from the weights",
            "logit_bias": "logit_bias" in state_dict,
        }
        if "visual.proj" in state_dict:
            patch_size = state_dict["visual.conv1.weight"].shape[-1]
            return CLIPConfig(
                vision_layers=_count(state_dict, "visual.transformer.resblocks."),
                vision_width=state_dict["visual.conv1.weight"].shape[0],
                vision_patch_size=patch_size,
                image_resolution=patch_size * _grid(state_dict["visual.positional_embedding"]),
                **common,
            )
        return CLIPConfig(
            vision_layers=tuple(_count(state_dict, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
            vision_width=state_dict["visual.layer1.0.conv1.weight"].shape[0],
            vision_patch_size=None,
            image_resolution=32 * _grid(state_dict["visual.attnpool.positional_embedding"]),
            **common,
        )
    except KeyError as error:
        raise UserError(f"{source}: has no weight {error}; is it a CLIP checkpoint?") from None
    except (ValueError, IndexError) as error:
        raise UserError(f"{source}: its weights describe no CLIP of OpenAI's kind ({error})") from None


def _find(path: Path) -> Path:
    if path.is_dir():
        checkpoints = sorted(path.glob("*.pt"), key=lambda file: file.stat().st_mtime)
        if not checkpoints:
            raise UserError(f"the directory {path} holds no checkpoint (*.pt); train one: python train.py --sample")
        return checkpoints[-1]
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist; check the path, or train one: python train.py --sample")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's dictionary, on the CPU. Nothing but tensors and plain containers is unpickled.

    Of files that tell their `format_version`, as ours do, every record's checksum is compared. Raises UserError.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of a strange file is told below, if it matters
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            if isinstance(checkpoint, dict) and "format_version" in checkpoint:
                damaged = zipfile.ZipFile(file).testzip()
                if damaged:
                    raise ValueError(f"the checksum of {damaged} is wrong")
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist; check the path") from None
    except PermissionError as error:
        raise UserError(f"the checkpoint {path} cannot be read ({error.strerror})") from None
    except Exception as error:  # unpickling a file that is no checkpoint raises anything
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise UserError(
            f"{path}: is not a checkpoint of tensors and plain containers ({reason[:200]}); it is damaged, of another "
            "kind, or holds code, which is not run"
        ) from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint's dictionary")
    return checkpoint


def _state_dict(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the weights alone, in float32, under OpenAI's names."""
    weights = checkpoint.get("model_state_dict", checkpoint.get("state_dict", checkpoint))
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: holds no model weights (its keys: {', '.join(map(str, list(checkpoint)[:5]))})")
    state_dict = {}
    for key, value in weights.items():
        key = str(key).removeprefix("module.")
        if key not in NOT_WEIGHTS and isinstance(value, Tensor):
            is_dense = value.layout is torch.strided and not value.is_quantized and not value.is_meta
            if not is_dense or value.untyped_storage().nbytes() < value.numel() * value.element_size():
                raise UserError(f"{path}: {key} is no plain array of numbers, or smaller than it claims; it is damaged")
            state_dict[key] = value.float() if value.is_floating_point() else value
    for key in ("logit_scale", "logit_bias"):
        if key in state_dict:
            state_dict[key] = state_dict[key].reshape(())  # open_clip's may be [1]
    return state_dict


def _count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many numbered submodules there are under `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)})


def _grid(positional_embedding: Tensor) -> int:
    """Return the side of the square grid that the positions, less the class or mean token, make."""
    return round((positional_embedding.shape[0] - 1) ** 0.5)

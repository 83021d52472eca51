"""Load CLIP weights of any layout: our checkpoints, the reference's, and state dicts of OpenAI and open_clip."""

import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.clip import CLIP
from model.config import HEAD_WIDTH, RESNET_STRIDE, CLIPConfig
from model.pretrained.baseline import PREFIX, load_open_clip
from model.pretrained.inference import TrainedCLIP
from utils.config import build_config
from utils.errors import UserError

NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}  # in OpenAI's archives
COCO_MEAN, COCO_STD = (0.4225, 0.4012, 0.3659), (0.2681, 0.2635, 0.2763)
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_clip(path: str | Path, device: str | torch.device = "cpu") -> TrainedCLIP:
    """Load a trained model in evaluation mode and float32 from a file, or from the `*.pt` file of a directory
    whose name has the highest step.

    Reads our checkpoints; the reference's (`model_state_dict`, COCO's mean and std); and state dicts of OpenAI or
    open_clip (bare or under `state_dict`, with or without `module.`, of any float type, OpenAI's mean and std). The
    architecture comes from the stored configuration, or else from the weights' shapes. `open_clip:MODEL/TAG` loads a
    model of open_clip (`load_open_clip`). Raises UserError if the file is missing or damaged, or contains no CLIP.
    """
    if str(path).startswith(PREFIX):
        return load_open_clip(str(path), device)
    path = Path(path)
    if path.is_dir():
        checkpoints = sorted(path.glob("*.pt"), key=_age)
        if not checkpoints:
            raise UserError(f"the directory {path} holds no checkpoint (*.pt); train one: python train.py --sample")
        path = checkpoints[-1]
    checkpoint = read_checkpoint(path)
    state_dict = _extract_weights(checkpoint, path)
    config = infer_config(state_dict, path)
    mean, std = (COCO_MEAN, COCO_STD) if "model_state_dict" in checkpoint else (OPENAI_MEAN, OPENAI_STD)
    if "configs" in checkpoint:
        stored, mean, std = _read_configs(checkpoint["configs"], path)
        if stored != replace(config, name=stored.name, transformer_heads=stored.transformer_heads):
            raise UserError(f"{path}: its configuration ({stored.name}) is not that of its weights; it is damaged")
        config = stored
    model = CLIP(config)
    load_weights(model, state_dict, path)
    return TrainedCLIP(model.eval().to(device), mean, std, str(path))


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
        raise UserError(f"{source}: its weights do not fit the architecture {model.config.name}: {found}; use another")
    if broken := [key for key, tensor in state_dict.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{source}: {len(broken)} of its weights are not finite (first: {broken[0]}); use another file")
    model.load_state_dict(state_dict)


def infer_config(state_dict: Mapping[str, Tensor], source: str | Path) -> CLIPConfig:
    """Derive the architecture from the shapes of weights with OpenAI's names. Raises UserError if they are no CLIP."""
    try:
        if "visual.proj" in state_dict:
            layers = _count_blocks(state_dict, "visual.transformer.resblocks.")
            width, _, _, patch_size = state_dict["visual.conv1.weight"].shape
            positions = state_dict["visual.positional_embedding"]
        else:
            layers = tuple(_count_blocks(state_dict, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
            width, patch_size = state_dict["visual.layer1.0.conv1.weight"].shape[0], None
            positions = state_dict["visual.attnpool.positional_embedding"]
        grid_side = round((positions.shape[0] - 1) ** 0.5)  # the first position is the class or mean token
        text_width, embed_dim = state_dict["text_projection"].shape
        return CLIPConfig(
            embed_dim=embed_dim,
            image_resolution=(patch_size or RESNET_STRIDE) * grid_side,
            vision_layers=layers,
            vision_width=width,
            vision_patch_size=patch_size,
            context_length=state_dict["positional_embedding"].shape[0],
            vocab_size=state_dict["token_embedding.weight"].shape[0],
            transformer_width=text_width,
            transformer_heads=max(1, text_width // HEAD_WIDTH),
            transformer_layers=_count_blocks(state_dict, "transformer.resblocks."),
            name="inferred from the weights",
            logit_bias="logit_bias" in state_dict,
        )
    except KeyError as error:
        raise UserError(f"{source}: has no weight {error}; use a checkpoint of a CLIP model") from None
    except (ValueError, IndexError, TypeError) as error:
        raise UserError(f"{source}: its weights are not those of a CLIP model ({error}); use another file") from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's dictionary onto the CPU, unpickling only tensors and plain containers.

    Verifies the checksums of files with a `format_version`, as ours have. Raises UserError.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever matters about a damaged file is raised below
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            is_ours = isinstance(checkpoint, dict) and "format_version" in checkpoint
            if is_ours and (damaged := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"the checksum of {damaged} is wrong")
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist; check the path, or train: python train.py") from None
    except PermissionError as error:
        raise UserError(f"the checkpoint {path} cannot be read ({error.strerror}); check its permissions") from None
    except Exception as error:  # unpickling a damaged file raises errors of any kind
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise UserError(
            f"{path}: is not a checkpoint of tensors and plain containers ({reason[:200]}); it is damaged, of another "
            "kind, or holds code, which is not run"
        ) from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not the dictionary of a checkpoint")
    return checkpoint


def _extract_weights(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return only the weights, in float32, under OpenAI's names."""
    weights = checkpoint.get("model_state_dict", checkpoint.get("state_dict", checkpoint))
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: holds no model weights (its keys: {', '.join(map(str, list(checkpoint)[:5]))})")
    state_dict = {}
    for key, value in weights.items():
        key = str(key).removeprefix("module.")
        if key not in NOT_WEIGHTS and isinstance(value, Tensor):
            is_dense = value.layout is torch.strided and not value.is_quantized and not value.is_meta
            if not is_dense or value.untyped_storage().nbytes() < value.numel() * value.element_size():
                raise UserError(f"{path}: {key} is not a dense tensor with all of its data; the file is damaged")
            state_dict[key] = value.float() if value.is_floating_point() else value
    for key in ("logit_scale", "logit_bias"):
        if key in state_dict and state_dict[key].numel() == 1:
            state_dict[key] = state_dict[key].reshape(())  # some of open_clip's are [1]
    return state_dict


def _read_configs(configs: Any, path: Path) -> tuple[CLIPConfig, tuple[float, ...], tuple[float, ...]]:
    """Return the configuration, image mean and standard deviation that our checkpoints store."""
    try:
        mean, std = (tuple(map(float, configs["dataloader"][key])) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or not all(0 <= value <= 1 for value in mean + std) or 0 in std:
            raise ValueError("image_mean and image_std should be three numbers in [0, 1] each")
        return build_config(CLIPConfig, dict(configs["model"]), str(path)), mean, std
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its configuration is damaged ({error}); use another checkpoint") from None


def _count_blocks(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Count the numbered submodules under `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)})

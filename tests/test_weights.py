import dataclasses
import os
import pickle
from pathlib import Path

import pytest
import torch

from model import CLIP, load_clip, load_model_config
from model.pretrained.weights import infer_sizes
from tests.conftest import TINY
from utils.errors import UserError

PREPROCESSING = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def our_checkpoint(model: CLIP) -> dict:
    configs = {"model": dataclasses.asdict(model.config) | PREPROCESSING, "dataloader": {}}
    return {"model_state_dict": model.state_dict(), "configs": configs}


def our_earlier_checkpoint(model: CLIP) -> dict:
    """Return a checkpoint from before the model's configuration had the mean and std of images."""
    config = {key: value for key, value in dataclasses.asdict(model.config).items() if not key.startswith("image_m")}
    return {**our_checkpoint(model), "configs": {"model": config, "dataloader": PREPROCESSING}}


def reference_checkpoint(model: CLIP) -> dict:
    return {"epoch": 34, "global_step": 16205, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}}


def openai_archive(model: CLIP) -> dict:
    """Return a state dict like OpenAI's: half precision, with three sizes among the weights."""
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    return half | {key: torch.tensor(value) for key, value in sizes.items()}


def open_clip_checkpoint(model: CLIP) -> dict:
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    weights["module.logit_scale"] = weights["module.logit_scale"].reshape(1)
    return {"epoch": 3, "name": "run", "state_dict": weights}


LAYOUTS = {  # with the first number of the mean of the images
    "ours": (our_checkpoint, 0.1),
    "our earlier": (our_earlier_checkpoint, 0.1),
    "the reference's": (reference_checkpoint, 0.4225),
    "bare": (CLIP.state_dict, 0.48145466),
    "OpenAI's": (openai_archive, 0.48145466),
    "open_clip's": (open_clip_checkpoint, 0.48145466),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_every_layout_gives_the_same_features(tmp_path: Path, tiny_model, layout):
    content, mean = LAYOUTS[layout]
    torch.save(content(tiny_model), tmp_path / "c.pt")
    clip = load_clip(tmp_path / "c.pt")
    assert not clip.model.training and clip.image_mean[0] == mean
    assert all(parameter.dtype == torch.float32 for parameter in clip.model.parameters())
    images = torch.randn(2, 3, 32, 32)
    atol = 2e-3 if layout == "OpenAI's" else 0
    torch.testing.assert_close(clip.model.encode_image(images), tiny_model.encode_image(images), atol=atol, rtol=atol)


@pytest.mark.parametrize("name", ["RN50", "RN50-OpenAI", "RN101", "ViT-B-32", "ViT-B-16"])
def test_the_architecture_is_inferred_from_the_shapes(name):
    config = load_model_config([("name", name)])
    with torch.device("meta"):
        state_dict = CLIP(config).state_dict()
    assert infer_sizes(state_dict, "a file").items() <= dataclasses.asdict(config).items()


def test_a_directory_means_its_newest_checkpoint(tmp_path: Path, tiny_model):
    for age, name in ((20, "checkpoint_0_9.pt"), (30, "checkpoint_0_10.pt"), (10, "best.pt")):  # copied in any order
        tiny_model.logit_scale.data.fill_(age)
        torch.save(our_checkpoint(tiny_model), tmp_path / name)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert load_clip(tmp_path).model.logit_scale == 30
    for name in ("checkpoint_0_9.pt", "checkpoint_0_10.pt"):
        (tmp_path / name).rename(tmp_path / name.replace("_0_", "-"))
    assert load_clip(tmp_path).model.logit_scale == 10  # by time, where no name has a step


def test_weights_that_do_not_fit_are_named(tmp_path: Path, tiny_model):
    content = our_checkpoint(tiny_model)
    weights = content["model_state_dict"] = dict(content["model_state_dict"])
    del weights["ln_final.bias"]
    weights["extra"] = torch.zeros(1)
    weights["visual.bn1.weight"] = torch.zeros(9)
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(UserError) as error:
        load_clip(tmp_path / "c.pt")
    for part in (
        "1 missing (first: ln_final.bias)",
        "1 unexpected (first: extra)",
        "1 of another shape or type (first: visual.bn1.weight is torch.float32 [9], not [4])",
    ):
        assert part in str(error.value)


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("code_was_run"),))


def bad_files(folder: Path) -> dict[str, Path]:
    torch.save({"model_state_dict": {"weight": torch.zeros(2)}}, folder / "other_model.pt")
    torch.save({"model_state_dict": {}, "payload": Exploit()}, folder / "code.pt")
    torch.save([torch.zeros(2)], folder / "list.pt")
    torch.save({"epoch": 1}, folder / "no_weights.pt")
    torch.save(CLIP(TINY).state_dict(), folder / "whole.pt")
    content = (folder / "whole.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(content[: len(content) // 2])
    (folder / "text.pt").write_text("hello")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "pickle.pt").write_bytes(pickle.dumps({"a": Exploit()}))
    (folder / "empty_folder").mkdir()
    return {file.name: file for file in folder.iterdir() if file.name != "whole.pt"}


BAD_FILES = {
    "other_model.pt": "holds no weights of a CLIP (its names: weight)",
    "code.pt": "which is neither a tensor nor plain data, and may be code",
    "list.pt": "holds a list",
    "no_weights.pt": "holds no weights of a CLIP (its names: epoch)",
    "truncated.pt": "is not a checkpoint",
    "text.pt": "is not a checkpoint",
    "empty.pt": "is not a checkpoint",
    "pickle.pt": "is not a checkpoint",
    "empty_folder": "holds no checkpoint",
    "absent.pt": "does not exist",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence_and_runs_no_code(tmp_path: Path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    with pytest.raises(UserError) as error:
        load_clip(tmp_path / name)
    assert BAD_FILES[name] in str(error.value) and "\n" not in str(error.value)
    assert not Path("code_was_run").exists()


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("dataloader", {"image_mean": [0.1, 0.2], "image_std": [0.4, 0.5, 0.6]}),
        ("dataloader", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.0, 0.6]}),
        ("dataloader", {"image_mean": [0.1, float("nan"), 0.3], "image_std": [0.4, 0.5, 0.6]}),
        ("model", {**dataclasses.asdict(TINY), "transformer_layers": 10**9}),
        ("model", {**dataclasses.asdict(TINY), "embed_dim": 10**400}),
        ("model", {"embed_dim": 32}),
        ("model", 3),
    ],
)
def test_a_damaged_configuration_is_one_sentence(tmp_path: Path, tiny_model, section, values):
    content = our_earlier_checkpoint(tiny_model)
    content["configs"][section] = values
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(UserError, match="c.pt: ") as error:
        load_clip(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(0, 64), (3,), ()])
@pytest.mark.parametrize("key", ["visual.attnpool.positional_embedding", "text_projection", "logit_scale"])
def test_weights_of_any_shape_are_loaded_or_refused(tmp_path: Path, tiny_model, key, shape):
    content = {**tiny_model.state_dict(), key: torch.zeros(shape)}
    torch.save(content, tmp_path / "c.pt")
    if (key, shape) == ("logit_scale", ()):
        assert load_clip(tmp_path / "c.pt").model.logit_scale == 0
    else:
        with pytest.raises(UserError):
            load_clip(tmp_path / "c.pt")

"""Weights as other programs save them give those programs' features, and what a file does not say is never silent."""

import argparse
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import zero_shot_demo
from model import CLIP, export, load_clip
from model.pretrained.layouts import OPENAI_MEAN, open_clip_architectures
from model.pretrained.weights import load_pretrained
from tests.conftest import TINY
from utils.errors import UserError
from utils.tokenizer import get_tokenizer

TEXTS = ["a dog", "a red bus in the rain", "two cats on a sofa"]
VIT = replace(TINY, vision_layers=2, vision_width=64, vision_patch_size=16, transformer_width=128, transformer_heads=2)


def spread(model: nn.Module) -> nn.Module:
    """Make the weights as large as trained ones, so that activations and heads matter, and no bias zero."""
    for parameter in model.parameters():
        parameter.data.mul_(3) if parameter.ndim == 2 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def assert_same_features(clip, images: torch.Tensor, encode_image, encode_text) -> None:
    """Compare the features with those of another program's functions, to 1e-5 of their length."""
    tokens = get_tokenizer()(TEXTS)
    tokens = F.pad(tokens, (0, clip.model.config.context_length - tokens.shape[1]))
    for ours, theirs in (
        (clip.model.encode_image(images), encode_image(images)),
        (clip.model.encode_text(tokens), encode_text(tokens)),
    ):
        torch.testing.assert_close(F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "activation"),
    [("RN50", "gelu"), ("RN50", "quick_gelu"), ("ViT-B-32", "gelu"), ("ViT-B-32", "quick_gelu"), ("ViT-S-32", None)],
)
def test_features_are_open_clips(tmp_path: Path, caplog, name, activation):
    torch.manual_seed(1)
    peer = spread(open_clip.create_model(name, force_quick_gelu=activation == "quick_gelu"))
    save_file(peer.state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = load_clip(tmp_path, **({"activation": activation} if activation else {}))
    assert clip.model.config.activation == (activation or "gelu")  # open_clip has no ViT-S-32 with QuickGELU
    assert "--image_mean" in caplog.text and "--activation" not in caplog.text and "_head" not in caplog.text
    assert_same_features(clip, torch.randn(2, 3, 224, 224), peer.encode_image, peer.encode_text)


def open_clip_model(*, quick_gelu: bool, width: int, head_width: int) -> nn.Module:
    torch.manual_seed(1)
    vision = {"layers": 2, "width": width, "patch_size": 16, "image_size": 64, "head_width": head_width}
    text = {"width": 128, "heads": 4, "layers": 2, "context_length": 77, "vocab_size": 49408}
    return spread(open_clip.CLIP(64, vision, text, quick_gelu=quick_gelu))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_heads_and_activation_are_what_the_flags_or_the_configuration_say(tmp_path: Path, quick_gelu):
    peer = open_clip_model(quick_gelu=quick_gelu, width=96, head_width=32)
    torch.save(peer.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    activation = "quick_gelu" if quick_gelu else "gelu"
    with pytest.raises(UserError, match="do not say its vision_head_width .* add --vision_head_width N"):
        load_clip(tmp_path, activation=activation)
    clip = load_clip(tmp_path, activation=activation, vision_head_width=32, transformer_heads=4)
    images = torch.randn(2, 3, 64, 64)
    assert_same_features(clip, images, peer.encode_image, peer.encode_text)
    export.main(["--checkpoint_path", str(tmp_path), "--output", str(tmp_path / "out"), "--activation", activation]
                + ["--vision_head_width", "32", "--transformer_heads", "4"])  # fmt: skip
    clip = load_pretrained(tmp_path / "out")
    assert clip.notes == ()
    assert_same_features(clip, images, peer.encode_image, peer.encode_text)


def test_open_clips_architectures_settle_what_shapes_do_not():
    """ViT-H-14 has heads of 80, ViT-bigG-14 of 104."""
    from model.pretrained.weights import _configure

    keys = {"embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size", "context_length"}
    keys |= {"vocab_size", "transformer_width", "transformer_layers"}
    for embed_dim, head_width, heads in ((1024, 80, 16), (1280, 104, 20)):
        found = [peer for peer in open_clip_architectures() if peer["embed_dim"] == embed_dim]
        peer = next(peer for peer in found if peer["vision_head_width"] == head_width)
        config, assumed = _configure({key: peer[key] for key in keys}, {}, {}, "a file")
        assert (config.vision_head_width, config.transformer_heads) == (head_width, heads)
        assert "head" not in assumed and "--activation gelu" in assumed  # both activations were trained


def test_what_is_assumed_is_a_warning_with_its_flags(tmp_path: Path, caplog):
    peer = open_clip_model(quick_gelu=False, width=128, head_width=64)
    weights = {f"module.{key}": value for key, value in peer.state_dict().items()}
    torch.save({"epoch": 1, "name": "2025-model_ViT-B-32", "state_dict": weights}, tmp_path / "epoch_1.pt")
    clip = load_clip(tmp_path / "epoch_1.pt", image_std=[0.5, 0.5, 0.5])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and clip.notes[0] in record.getMessage()
    for flag in ("--activation gelu", "--vision_head_width 64", "--transformer_heads 2", "--image_mean 0.481"):
        assert flag in clip.notes[0]
    assert "--image_std" not in clip.notes[0] and clip.image_std == (0.5, 0.5, 0.5)
    torch.save({"epoch": 1, "name": "x-ViT-B-32-quickgelu", "state_dict": weights}, tmp_path / "epoch_1.pt")
    assert load_clip(tmp_path / "epoch_1.pt").model.config.activation == "quick_gelu"
    with pytest.raises(UserError, match="0.0"):
        load_clip(tmp_path / "epoch_1.pt", image_std=[0.5, 0.0, 0.5])


def test_flags_of_the_demo_correct_it_and_never_contradict_a_checkpoint_of_ours(tmp_path: Path, run_here, tiny_model):
    torch.save(tiny_model.state_dict(), tmp_path / "bare.pt")
    flags = ["--img_dir", Path(zero_shot_demo.__file__).with_name("test_images"), "--class_names", "cat", "dog"]
    said = ["--activation", "quick_gelu", "--transformer_heads", "1", "--image_mean", *"111", "--image_std", *"111"]
    warned = run_here("zero_shot_demo.py", "--checkpoint_path", "bare.pt", *flags, cwd=tmp_path)
    assert warned.returncode == 0
    assert run_here("zero_shot_demo.py", "--checkpoint_path", "bare.pt", *flags, *said, cwd=tmp_path).stderr == ""
    content = {"model_state_dict": tiny_model.state_dict(), "configs": {"model": vars(TINY), "dataloader": {}}}
    torch.save(content, tmp_path / "ours.pt")
    refused = run_here(
        "zero_shot_demo.py", "--checkpoint_path", "ours.pt", *flags, "--activation", "gelu", cwd=tmp_path
    )
    assert refused.returncode == 1 and "says that its activation is quick_gelu; remove --activation" in refused.stderr


@pytest.mark.parametrize("shape", ["safetensors", "bin", "sharded"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_features_are_hugging_faces(tmp_path: Path, shape, activation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 3, "num_hidden_layers": 2}
    vision = sizes | {"image_size": 64, "patch_size": 16, "hidden_act": activation}
    text = sizes | {"hidden_act": activation, "eos_token_id": 49407}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    peer = spread(transformers.CLIPModel(config))
    peer.save_pretrained(tmp_path, max_shard_size="9MB" if shape == "sharded" else "1GB")
    if shape == "bin":
        torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    clip = load_pretrained(tmp_path)
    assert clip.notes == () and clip.image_mean == (0.5, 0.5, 0.5) and clip.model.config.vision_heads == 3
    encoders = (peer.get_image_features, peer.get_text_features)
    features = [lambda x, f=f: getattr(f(x), "pooler_output", f(x)) for f in encoders]
    assert_same_features(clip, torch.randn(2, 3, 64, 64), *features)


def to_hugging_face(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights of ours under the names of Hugging Face's CLIPModel."""
    names = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
        "visual.proj": "visual_projection.weight",
    }
    parts = {"visual.": "vision_model.", "transformer.resblocks.": "encoder.layers.", "ln_pre": "pre_layrnorm"}
    parts |= {
        "ln_post": "post_layernorm",
        "ln_final": "final_layer_norm",
        ".ln_": ".layer_norm",
        ".attn.": ".self_attn.",
    }
    parts |= {"c_fc": "fc1", "c_proj": "fc2"}
    result = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    for key, value in weights.items():
        name = names.get(key, key)
        if key not in names and key != "logit_scale":
            name = name if name.startswith("visual.") else f"text_model.{name}"
            for old, new in parts.items():
                name = name.replace(old, new)
        if "in_proj" in name:
            kind = name.rpartition("_")[2]
            result |= {name.replace(f"in_proj_{kind}", f"{part}_proj.{kind}"): chunk
                       for part, chunk in zip("qkv", value.chunk(3), strict=True)}  # fmt: skip
        else:
            result[name] = value.t() if name.endswith("projection.weight") else value
    return result


def test_hugging_faces_names_become_openais(tmp_path: Path):
    torch.manual_seed(1)
    model = spread(CLIP(VIT))
    torch.save(to_hugging_face(model.state_dict()), tmp_path / "pytorch_model.bin")
    clip = load_pretrained(tmp_path / "pytorch_model.bin")
    assert_same_features(clip, torch.randn(2, 3, 32, 32), model.encode_image, model.encode_text)
    assert "--activation quick_gelu" in clip.notes[0]
    part = {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu_new"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": part, "vision_config": part}))
    with pytest.raises(UserError, match="hidden_act.*gelu_new.* not supported"):
        load_pretrained(tmp_path)
    part["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps({"text_config": part, "vision_config": part}))
    with pytest.raises(UserError, match="says vision_width 128, and its weights 64"):
        load_pretrained(tmp_path)


def test_slips_vision_transformer_is_timms(tmp_path: Path):
    torch.manual_seed(1)
    vit = spread(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=384, depth=2, num_heads=12,
                                   num_classes=0))  # fmt: skip
    text = spread(CLIP(VIT))
    weights = {key: value for key, value in text.state_dict().items() if not key.startswith("visual.")}
    weights |= {f"visual.{key}": value for key, value in vit.state_dict().items()}
    projection = weights["image_projection"] = torch.randn(384, 32)
    weights["image_mlp.layer1.weight"] = torch.zeros(8, 384)
    content = {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in weights.items()}}
    torch.save(content | {"args": argparse.Namespace(lr=1e-3), "best_acc1": np.float64(38.3)}, tmp_path / "slip.pt")
    clip = load_pretrained(tmp_path / "slip.pt")
    assert clip.notes == (
        f"{tmp_path}/slip.pt: 1 weights are not CLIP's and were left out (first: image_mlp.layer1.weight)",
    )
    assert clip.image_mean == (0.485, 0.456, 0.406)
    assert_same_features(clip, torch.randn(2, 3, 32, 32), lambda images: vit(images) @ projection, text.encode_text)


class Holder(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchscript_archive_is_read_without_its_code(tmp_path: Path, tiny_model, monkeypatch):
    root = Holder()
    sizes = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    for key, value in (tiny_model.state_dict() | sizes).items():
        *path, name = key.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, Holder())
            module = module._modules[part]
        module.register_buffer(name, value.half() if value.is_floating_point() else value)
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), tmp_path / "RN50.pt")
    monkeypatch.setattr(torch.jit, "load", None)
    clip = load_pretrained(tmp_path / "RN50.pt")
    assert clip.notes == () and clip.image_mean == OPENAI_MEAN
    for key, value in tiny_model.state_dict().items():
        assert torch.equal(clip.model.state_dict()[key], value.half().float() if value.is_floating_point() else value)


WRAPPED = {  # a layout of weights in a checkpoint, and what the note says
    "_orig_mod.": ({"_orig_mod.": 1}, ""),
    "nested prefixes": ({"state_dict": {"module._orig_mod.model.": 1}}, ""),
    "Lightning": ({"state_dict": {"net.clip.": 1}, "hyper_parameters": argparse.Namespace(lr=1)}, ""),
    "DeepSpeed": ({"module": 1}, ""),
    "average": ({"model": 1, "model_ema": 1}, "holds 2 CLIPs; used model.*, not model_ema.*"),
    "teacher": ({"state_dict": {"student.": 1, "teacher.": 1}}, None),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_weights_are_found(tmp_path: Path, tiny_model, name):
    content, note = WRAPPED[name]

    def fill(content):
        if content == 1:
            return tiny_model.state_dict()
        filled = {}
        for key, value in content.items():
            if key.endswith("."):
                filled |= {f"{key}{name}": tensor for name, tensor in tiny_model.state_dict().items()}
            else:
                filled[key] = fill(value) if value == 1 or isinstance(value, dict) else value
        return filled

    torch.save(fill(content), tmp_path / "c.ckpt")
    if note is None:
        with pytest.raises(UserError, match="holds 2 CLIPs .*student.*teacher"):
            load_pretrained(tmp_path / "c.ckpt")
        return
    clip = load_pretrained(tmp_path / "c.ckpt")
    assert note in clip.notes[0]
    assert torch.equal(clip.model.text_projection, tiny_model.text_projection)


def test_weights_that_are_not_the_models_are_counted(tmp_path: Path, tiny_model):
    weights = {f"model.{key}": value for key, value in tiny_model.state_dict().items()}
    torch.save({"state_dict": weights | {"loss.weight": torch.zeros(1)}}, tmp_path / "c.ckpt")
    assert (
        "1 weights are not CLIP's and were left out (first: loss.weight)"
        in load_pretrained(tmp_path / "c.ckpt").notes[0]
    )


class Code:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_harmless_objects_are_read_and_code_is_named(tmp_path: Path, tiny_model, monkeypatch, is_zip):
    monkeypatch.chdir(tmp_path)
    harmless = {"args": argparse.Namespace(path=Path("a")), "loss": np.float32(1), "curve": np.zeros(3)}
    for extra, refused in ((harmless, ""), ({"x": Code()}, "mkdir"), ({"x": VIT}, "model.config.CLIPConfig")):
        content = {"state_dict": tiny_model.state_dict(), **extra}
        torch.save(content, "c.pt", _use_new_zipfile_serialization=is_zip)
        if refused:
            with pytest.raises(UserError, match=f"holds .*{refused}, which is neither a tensor nor plain data"):
                load_pretrained("c.pt")
        else:
            assert torch.equal(load_pretrained("c.pt").model.text_projection, tiny_model.text_projection)
    assert not Path("code_was_run").exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x08\0\0\0\0\0\0\0{\"a\": 1}", "is not a checkpoint"),
    ],
)  # fmt: skip
def test_another_file_is_named_by_its_content(tmp_path: Path, content, found):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=found):
        load_pretrained(tmp_path)


def test_another_vocabulary_is_refused(tmp_path: Path):
    torch.save(CLIP(replace(TINY, vocab_size=500)).state_dict(), tmp_path / "c.pt")
    with pytest.raises(UserError, match="has 500 tokens, not CLIP's 49,408"):
        load_pretrained(tmp_path / "c.pt")


@pytest.mark.slow
def test_a_model_of_open_clip_becomes_ours(tmp_path: Path):
    torch.manual_seed(1)
    peer = spread(open_clip.create_model("ViT-S-32"))
    torch.save(peer.state_dict(), tmp_path / "w.pt")
    clip = load_pretrained(f"open_clip:ViT-S-32/{tmp_path}/w.pt")
    assert isinstance(clip.model, CLIP) and clip.notes == () and clip.model.config.activation == "gelu"
    assert_same_features(clip, torch.randn(2, 3, 224, 224), peer.encode_image, peer.encode_text)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3)])
@pytest.mark.parametrize(
    "key", ["visual_projection.weight", "text_model.encoder.layers.0.self_attn.k_proj.weight", "logit_scale"]
)
def test_impossible_shapes_in_hugging_faces_names_are_one_sentence(tmp_path: Path, key, shape):
    weights = to_hugging_face(CLIP(VIT).state_dict()) | {key: torch.zeros(shape)}
    torch.save(weights, tmp_path / "c.bin")
    if (key, shape) == ("logit_scale", ()):
        assert load_pretrained(tmp_path / "c.bin").model.logit_scale == 0
    else:
        with pytest.raises(UserError, match="Hugging Face's CLIPModel"):
            load_pretrained(tmp_path / "c.bin")

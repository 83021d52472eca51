"""Exported models give the same features in other programs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model import CLIP, CLIPConfig, export, load_clip
from tests.conftest import TINY
from utils.errors import UserError

SIX_LAYERS = dataclasses.replace(TINY, transformer_layers=6)
VIT = dataclasses.replace(TINY, vision_layers=2, vision_width=64, vision_patch_size=16, context_length=32)
PREPROCESSING = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
TEXTS = ["a dog", "two cats on a red sofa", "a very long sentence " * 30]


def save(config: CLIPConfig, folder: Path) -> Path:
    """Write a checkpoint of random weights in which every buffer and bias differs from its initial value."""
    torch.manual_seed(0)
    model = CLIP(config)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim < 2:
            tensor.add_(0.1 * torch.rand_like(tensor) if "var" in name else 0.1 * torch.randn_like(tensor))
    configs = {"model": dataclasses.asdict(config) | PREPROCESSING, "dataloader": {}}
    torch.save({"model_state_dict": model.state_dict(), "configs": configs}, folder / "c.pt")
    return folder / "c.pt"


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [SIX_LAYERS, VIT, dataclasses.replace(TINY, logit_bias=True)], ids=["resnet", "vit", "sigmoid"]
)
def test_open_clip_builds_the_same_model(tmp_path: Path, config):
    checkpoint = save(config, tmp_path)
    export.main(["--checkpoint_path", str(checkpoint), "--output", str(tmp_path / "out")])
    clip = load_clip(checkpoint)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    model.eval()
    images = [Image.effect_noise((60 + index, 50), 90).convert("RGB") for index in range(3)]
    pixels = torch.stack([preprocess(image) for image in images])
    torch.testing.assert_close(model.encode_image(pixels, normalize=True), clip.encode_image(images), atol=1e-5, rtol=0)
    text_features = model.encode_text(tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(text_features, clip.encode_text(TEXTS), atol=1e-5, rtol=0)
    assert model.logit_scale.item() == clip.model.logit_scale.item()
    if config.logit_bias:
        assert model.logit_bias.item() == clip.model.logit_bias.item()
    assert tuple(model.visual.preprocess_cfg["mean"]) == (0.1, 0.2, 0.3)
    assert isinstance(model.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert len(model.transformer.resblocks) == config.transformer_layers


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, VIT], ids=["resnet", "vit"])
def test_onnx_gives_the_same_features_for_any_batch(tmp_path: Path, config):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    checkpoint = save(config, tmp_path)
    export.main(["--checkpoint_path", str(checkpoint), "--output", str(tmp_path / "out"), "--format", "onnx"])
    clip = load_clip(checkpoint)
    image_encoder, text_encoder = (
        runtime.InferenceSession(tmp_path / "out" / f"{kind}_encoder.onnx", providers=["CPUExecutionProvider"])
        for kind in ("image", "text")
    )
    tokenizer = open_clip.get_tokenizer("RN50", context_length=config.context_length)
    for batch in (1, 2, 5):
        pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        (features,) = image_encoder.run(["features"], {"pixels": pixels.numpy()})
        expected = F.normalize(clip.model.encode_image(pixels), dim=-1)
        np.testing.assert_allclose(features, expected, atol=1e-5)
        texts = (TEXTS * 2)[:batch]
        (features,) = text_encoder.run(["features"], {"tokens": tokenizer(texts).numpy()})
        np.testing.assert_allclose(features, clip.encode_text(texts), atol=1e-5)
    preprocessing = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert preprocessing["mean"] == [0.1, 0.2, 0.3] and preprocessing["std"] == [0.4, 0.5, 0.6]
    assert (preprocessing["image_size"], preprocessing["context_length"]) == (32, config.context_length)
    assert preprocessing["logit_scale"] == pytest.approx(clip.model.logit_scale.exp().item())


def test_onnx_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch):
    checkpoint = save(TINY, tmp_path)
    monkeypatch.setattr(export, "find_spec", lambda package: None)
    with pytest.raises(UserError, match="needs onnx and onnxscript; pip install onnx onnxscript"):
        export.main(["--checkpoint_path", str(checkpoint), "--output", str(tmp_path / "out"), "--format", "onnx"])


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "open_clip_config.json").write_text("mine")
    with pytest.raises(UserError, match="open_clip_config.json already exists"):
        export.main(["--checkpoint_path", str(save(TINY, tmp_path)), "--output", str(tmp_path)])
    assert (tmp_path / "open_clip_config.json").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        export.main(["--checkpoint_path", str(tmp_path / "c.pt"), "--output", str(tmp_path / "file")])

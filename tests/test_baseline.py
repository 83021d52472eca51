"""Models of open_clip, loaded like ours."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import zero_shot_demo
from model import load_clip
from utils.errors import UserError

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch) -> Path:
    """Return a file with random weights of `small-test`, an architecture that open_clip knows."""
    (tmp_path / "small-test.json").write_text(json.dumps(SMALL))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    open_clip.add_model_config(tmp_path / "small-test.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("small-test").state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


@torch.no_grad()
def test_the_features_are_open_clips_own(weights):
    clip = load_clip(f"open_clip:small-test/{weights}")
    model, _, preprocess = open_clip.create_model_and_transforms("small-test", str(weights))
    tokenizer = open_clip.get_tokenizer("small-test")
    images = [Image.effect_noise((90 + index, 70), 60).convert("RGB") for index in range(5)]
    texts = ["a dog", "a sentence that is too long for a model of twenty tokens " * 3, "two cats"]
    expected = model.eval().encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
    torch.testing.assert_close(clip.encode_image(images), expected, atol=1e-6, rtol=1e-5)
    expected = model.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(clip.encode_text(texts), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rule", [("squash", "bicubic"), ("squash", "bilinear"), ("shortest", "bilinear")])
def test_images_are_resized_by_the_models_own_rule(weights, monkeypatch, rule):
    changes = {"resize_mode": rule[0], "interpolation": rule[1], "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
    create = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: create(*a, **k, force_preprocess_cfg=changes))
    clip = load_clip(f"open_clip:small-test/{weights}")
    model = create("small-test", str(weights), force_preprocess_cfg=changes).eval()
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    image = Image.effect_noise((130, 70), 60).convert("RGB")
    expected = model.encode_image(preprocess(image)[None], normalize=True)
    torch.testing.assert_close(clip.encode_image(image), expected, atol=1e-6, rtol=1e-5)


def test_a_tag_selects_the_activation_of_its_training(weights, monkeypatch):
    """In open_clip, RN50 is a model with GELU, while OpenAI's weights for it need QuickGELU."""
    asked = {}

    def create_model(name: str, tag: str, **options):
        asked[name, tag] = options
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for name in ("RN50/openai", "ViT-B-32/laion2b_s34b_b79k"):
        with pytest.raises(UserError) as error:
            load_clip(f"open_clip:{name}")
        assert "cannot be downloaded (no network); download https://huggingface.co/" in str(error.value)
    assert asked["RN50", "openai"] == {"force_quick_gelu": True}
    assert asked["ViT-B-32", "laion2b_s34b_b79k"] == {"force_quick_gelu": False}


def test_without_a_network_the_message_says_what_to_download_and_where_to_put_it(monkeypatch):
    def no_network(*args, **options):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    with pytest.raises(UserError) as error:
        load_clip("open_clip:RN50/openai")
    assert str(error.value).endswith(
        "download https://huggingface.co/timm/resnet50_clip.openai/resolve/main/open_clip_model.safetensors to "
        "saved_checkpoints/ on a machine with a network, and give "
        "open_clip:RN50-quickgelu/saved_checkpoints/open_clip_model.safetensors"
    )
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_unknown_models_and_tags_are_named(weights, tmp_path: Path):
    (tmp_path / "text.pt").write_text("hello")
    for name, message in (
        ("RN5/openai", "has no model 'RN5'; did you mean RN50"),
        ("RN50/opena", "'opena' is neither a file nor a tag of RN50; its tags: openai"),
        ("RN50", "'' is neither a file nor a tag of RN50"),
        (f"RN50/{weights}", "cannot be loaded into open_clip's RN50"),
        (f"small-test/{tmp_path}/text.pt", "cannot be loaded into open_clip's small-test"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_clip(f"open_clip:{name}")
        assert "\n" not in str(error.value)


def test_the_demo_runs_on_it(weights, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((90, 70), 60).save("a.png")
    zero_shot_demo.main(["--checkpoint_path", f"open_clip:small-test/{weights}", "--img_path", "a.png"])
    assert capsys.readouterr().out.count("%") == 5

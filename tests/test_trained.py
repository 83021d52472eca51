"""The Python API: every way to encode gives the same features."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model import CLIP, TrainedCLIP, load_clip
from tests.conftest import TINY
from utils.errors import UserError
from utils.images import load_image, normalize, to_tensor

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture
def clip() -> TrainedCLIP:
    torch.manual_seed(0)
    return TrainedCLIP(CLIP(replace(TINY, image_mean=MEAN, image_std=STD)).eval())


def pictures(count: int) -> list[Image.Image]:
    return [Image.effect_noise((50 + index, 40), 20 + 10 * index).convert("RGB") for index in range(count)]


def test_batches_of_any_kind_of_image_equal_single_images(clip, tmp_path: Path):
    images = pictures(5)
    images[0].save(tmp_path / "a.png")
    images[1].save(tmp_path / "b.png")
    sources = [str(tmp_path / "a.png"), tmp_path / "b.png", images[2], io.BytesIO((tmp_path / "a.png").read_bytes())]
    features = clip.encode_image(sources, batch_size=3)
    assert features.shape == (4, 32) and features.dtype == torch.float32
    with torch.no_grad():
        for feature, image in zip(features, [*images[:3], images[0]], strict=True):
            pixels = normalize(to_tensor(load_image(image, 32))[None], MEAN, STD)
            torch.testing.assert_close(feature, F.normalize(clip.model.encode_image(pixels), dim=-1)[0])
    torch.testing.assert_close(clip.encode_image(images[2]), features[2:3])


def test_unreadable_images_are_skipped_and_named(clip, tmp_path: Path):
    first, *others = readable = pictures(3)
    images = [first, tmp_path / "absent.jpg", *others, io.BytesIO(b"x")]
    indices, features, failures = clip.encode_readable(images, batch_size=2, num_workers=2)
    assert indices.tolist() == [0, 2, 3]
    torch.testing.assert_close(features, clip.encode_image(readable))
    assert [failure.path for failure in failures] == [str(tmp_path / "absent.jpg"), "image 4"]


def test_captions_follow_their_readable_images(clip, tmp_path: Path):
    *first, last = readable = pictures(3)
    images, captions = [*first, tmp_path / "absent.jpg", last], [["a", "b"], ["c"], ["d"], ["e", "f"]]
    features, encoded = clip.encode_captioned(images, captions, batch_size=3)
    assert encoded.indices.tolist() == [0, 1, 3] and features.image_of_text.tolist() == [0, 0, 1, 2, 2]
    torch.testing.assert_close(features.texts, clip.encode_text(["a", "b", "c", "e", "f"]))
    torch.testing.assert_close(features.images, clip.encode_image(readable))


def test_probabilities_are_a_softmax_over_the_scaled_cosine_similarity(clip):
    images, classnames = pictures(3), ["dog", "cat", "palm tree"]
    probabilities = clip.classify(images, classnames, templates=["a {}.", "the {}."])
    sentences = torch.stack([clip.encode_text([f"a {name}.", f"the {name}."]).mean(dim=0) for name in classnames])
    expected = (35 * clip.encode_image(images) @ F.normalize(sentences, dim=1).t()).softmax(dim=1)
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
    assert clip.classify(images[0], classnames).shape == (1, 3)
    assert torch.allclose(clip.classify(images, classnames, logit_scale=0.0), torch.full((3, 3), 1 / 3))


def test_a_single_text_needs_no_list(clip):
    torch.testing.assert_close(clip.encode_text("a dog"), clip.encode_text(["a dog", "birds"])[:1])


def test_features_can_be_trained_on(clip):
    head = torch.nn.Linear(32, 2)
    head(clip.encode_image(pictures(2))).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_invalid_inputs_are_named(clip, tmp_path: Path):
    (tmp_path / "text.jpg").write_text("x")
    for call, message in (
        (lambda: clip.encode_image([pictures(1)[0], tmp_path / "text.jpg"]), "text.jpg: cannot be read"),
        (lambda: clip.encode_image([pictures(1)[0], io.BytesIO(b"x")]), "image 1: cannot be read"),
        (lambda: clip.encode_readable([tmp_path / "text.jpg", "absent.png"]), "text.jpg: cannot be read as an image"),
        (lambda: clip.encode_image([]), "no image is given"),
        (lambda: clip.encode_text([]), "no text is given"),
        (lambda: clip.classify(pictures(1), []), "no class names"),
        (lambda: clip.classify(pictures(1), ["a"], templates=["x"]), "has no {} for the class name"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_loaded_checkpoint_has_its_preprocessing_and_source(tiny_model, tmp_path: Path):
    torch.save({"model_state_dict": tiny_model.state_dict(), "global_step": 1}, tmp_path / "checkpoint_0_1.pt")
    clip = load_clip(tmp_path)  # a folder
    assert clip.source == str(tmp_path / "checkpoint_0_1.pt") and clip.image_mean == (0.4225, 0.4012, 0.3659)
    assert not clip.model.training

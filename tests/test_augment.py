import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataloader.augment import (
    AREA,
    ASPECT,
    BRIGHTNESS,
    FLIP,
    NUM_DRAWS,
    SATURATION,
    Augmentation,
    crop_boxes,
    drop_tokens,
)
from dataloader.config import load_data_config
from dataloader.token_table import random_numbers
from utils.images import resize_and_crop
from utils.tokenizer import get_tokenizer


def augmentation(size=32, image_mean=(0.5,) * 3, image_std=(0.25,) * 3, **changes) -> Augmentation:
    return Augmentation(load_data_config({"augmentation": "standard", **changes}), size, image_mean, image_std)


def picture(height=60, width=80, seed=0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


DRAWS = random_numbers(1, 2, np.arange(5_000), NUM_DRAWS)


def test_dropped_tokens_are_between_the_markers_and_have_the_given_share():
    tokens = get_tokenizer()(["a dog", "a black cat on a very long red sofa"] * 500)
    draws = random_numbers(1, 0, np.arange(1000), tokens.shape[1])
    dropped = drop_tokens(tokens, draws, 0.2)
    is_word = (tokens > 0) & (tokens < 49406)
    assert torch.equal(dropped[~is_word], tokens[~is_word])
    changed = dropped != tokens
    assert set(dropped[changed].tolist()) == {0} and 0.18 < (changed.sum() / is_word.sum()).item() < 0.22
    assert torch.equal(drop_tokens(tokens, draws, 0.0), tokens)


def test_the_reference_crops_the_center_whatever_the_numbers():
    image = picture()
    crops = [augmentation(augmentation="reference", flip=True).crop(image, own) for own in DRAWS[:3]]
    assert all(torch.equal(crop, resize_and_crop(image, 32)) for crop in crops)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (300, 200), (30, 400), (1, 1)])
def test_random_crops_stay_inside_the_image(height, width):
    top, left, crop_height, crop_width = crop_boxes(DRAWS, height, width, (0.3, 0.9))
    assert min(top.min(), left.min()) >= 0 and min(crop_height.min(), crop_width.min()) >= 1
    assert (top + crop_height).max() <= height and (left + crop_width).max() <= width
    if height == width == 256:
        shares = crop_height * crop_width / 256**2
        assert shares.min() > 0.29 and shares.max() < 0.91 and abs(np.mean(shares) - 0.6) < 0.02
        assert top.min() == left.min() == 0 and (top + crop_height).max() == (left + crop_width).max() == 256
        assert abs(np.mean(crop_width > crop_height) - 0.5) < 0.03


def test_a_full_crop_is_the_resized_image():
    draws = np.full(NUM_DRAWS, 0.5)
    draws[AREA], draws[ASPECT] = 1, 0.5
    square = picture(64, 64)
    expected = F.interpolate(square[None], (32, 32), mode="bilinear", antialias=True)[0]
    assert torch.equal(augmentation(crop_scale=(1.0, 1.0)).crop(square, draws), expected)


def test_squares_are_cropped_like_single_images():
    smooth = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(smooth, (48, 48), mode="bicubic") * 255).clamp(0, 255).to(torch.uint8)
    for kind in ("standard", "reference"):
        augment = augmentation(augmentation=kind)
        expected = torch.stack([augment.crop(image, own) for image, own in zip(images, DRAWS, strict=False)]).float()
        difference = (augment.crop_squares(images, DRAWS[:4]) - expected).abs()
        shifted = (expected.roll(1, dims=3) - expected).abs()
        assert (
            difference.mean() < 1 < shifted.mean()
        )  # grey levels: the filters differ by less than a shift of one pixel
    same_size = augmentation(augmentation="reference", size=48)
    assert same_size.crop_squares(images, DRAWS[:4]) is images  # nothing is left to do for an exact cache


def test_half_of_the_images_are_flipped():
    images = torch.stack([picture(32, 32, seed) for seed in range(50)])
    flipped = augmentation(flip=True).recolor(images, DRAWS[:50])
    for image, result, own in zip(images, flipped, DRAWS, strict=False):
        assert torch.equal(result, image.flip(2) if own[FLIP] < 0.5 else image)
    assert torch.equal(augmentation().recolor(images, DRAWS[:50]), images)
    assert torch.equal(augmentation(augmentation="reference", flip=True).recolor(images, DRAWS[:50]), images)


def test_color_jitter_changes_brightness_and_saturation():
    grey = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    draws = np.full((2, NUM_DRAWS), 0.5)
    draws[:, BRIGHTNESS] = 0, 1
    darker, brighter = augmentation(color_jitter=0.2).recolor(grey, draws)
    torch.testing.assert_close(darker, torch.full((3, 8, 8), 80.0))
    torch.testing.assert_close(brighter, torch.full((3, 8, 8), 120.0))
    red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 200
    draws = np.full((1, NUM_DRAWS), 0.5)
    draws[:, SATURATION] = 0
    (paler,) = augmentation(color_jitter=1.0).recolor(red, draws)
    torch.testing.assert_close(paler, torch.full((3, 8, 8), 200 * 0.299), atol=1e-3, rtol=0)


def test_finished_images_are_recolored_and_normalized():
    images, draws = torch.stack([picture(32, 32, seed) for seed in range(4)]), DRAWS[:4]
    augment = augmentation(flip=True, color_jitter=0.3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    expected = (augment.recolor(images, draws) / 255 - mean) / std
    torch.testing.assert_close(augment.finish(images, draws), expected, atol=1e-5, rtol=1e-5)

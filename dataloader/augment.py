"""Random crops, flips, colors and masked tokens of training samples, in a worker or on the device."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataloader.config import DataConfig
from dataloader.token_table import random_numbers
from utils.images import normalize, resize_and_crop

# The columns of a sample's random numbers.
CAPTION, AREA, ASPECT, TOP, LEFT, FLIP, BRIGHTNESS, CONTRAST, SATURATION = range(9)
NUM_DRAWS = 9
LOG_ASPECT_RATIOS = (math.log(3 / 4), math.log(4 / 3))
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Augmentation:
    """How images become the model's input of `size` x `size` pixels, and which tokens it sees.

    `reference`: resize the short side, crop the center. `standard`: random-resized crop, flip and color jitter. The
    random numbers `draws` [batch, NUM_DRAWS] of a sample give the same crop in a worker and on the device.
    """

    def __init__(self, config: DataConfig, size: int, image_mean: Sequence[float], image_std: Sequence[float]) -> None:
        self.size = size
        self.is_random = config.augmentation == "standard"
        self.crop_scale = config.crop_scale
        self.flip = config.flip and self.is_random
        self.color_jitter = config.color_jitter if self.is_random else 0.0
        self.token_dropout = config.token_dropout
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)

    def crop(self, image: Tensor, draws: np.ndarray) -> Tensor:
        """Crop and resize one image, uint8 [3, height, width] on the CPU, to [3, size, size]. `draws`: [NUM_DRAWS]."""
        if not self.is_random:
            return resize_and_crop(image, self.size)
        top, left, height, width = crop_boxes(draws, image.shape[1], image.shape[2], self.crop_scale).tolist()
        part = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
        return F.interpolate(part, (self.size, self.size), mode="bilinear", antialias=True)[0]

    def crop_squares(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Crop and resize squares, uint8 [batch, 3, side, side], to [batch, 3, size, size] in 0..255 on their device.

        A GPU crops the whole batch at once. The result is float32 and not rounded, and otherwise that of `crop`.
        Squares that need neither are returned unchanged.
        """
        side = images.shape[-1]
        if not self.is_random:
            if side == self.size:
                return images
            return F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        from torchvision.ops import roi_align  # torchvision takes over a second to import

        top, left, height, width = crop_boxes(draws, side, side, self.crop_scale)
        boxes = np.stack([np.arange(len(draws)), left, top, left + width, top + height], axis=1)
        boxes = torch.from_numpy(boxes).float().to(images.device, non_blocking=True)
        return roi_align(images.float(), boxes, self.size, aligned=True)

    def finish(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Flip, jitter and normalize cropped images, [batch, 3, size, size] in 0..255, on their device: float32."""
        mean, std = (_on_device(values, images.device) for values in (self.image_mean, self.image_std))
        return normalize(self.recolor(images, draws), mean, std)

    def recolor(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Flip images and jitter their colors, [batch, 3, size, size] in 0..255, on their device."""
        if not (self.flip or self.color_jitter):
            return images
        draws = torch.from_numpy(draws).float().to(images.device, non_blocking=True)
        if self.flip:
            images = torch.where(draws[:, FLIP, None, None, None] < 0.5, images.flip(3), images)
        return self._jitter(images.float(), draws) if self.color_jitter else images

    def mask_tokens(self, tokens: Tensor, seed: int, epoch: int, indices: np.ndarray) -> Tensor:
        """Set a random share `token_dropout` of the tokens of each text, int64 [batch, length], to 0."""
        if not self.token_dropout:
            return tokens
        draws = random_numbers(seed, epoch, indices, NUM_DRAWS + tokens.shape[1])[:, NUM_DRAWS:]
        return drop_tokens(tokens, draws, self.token_dropout)

    def _jitter(self, images: Tensor, draws: Tensor) -> Tensor:
        """Scale brightness, contrast (about the mean grey of each image) and saturation by 1 +- color_jitter each.

        All three are linear in the color (red, green, blue), so one matrix and one offset per image do their work.
        """
        factors = 1 + self.color_jitter * (2 * draws - 1)
        brightness, contrast, saturation = (factors[:, row, None, None] for row in (BRIGHTNESS, CONTRAST, SATURATION))
        luma = _on_device(LUMA, images.device)
        mean_grey = (images.mean(dim=(2, 3)) @ luma)[:, None, None]
        offset = (1 - contrast) * brightness * mean_grey  # contrast keeps the mean grey, and saturation keeps grey
        to_grey = luma[:, None].expand(3, 3)  # maps a color to its grey
        saturate = saturation * torch.eye(3, device=images.device) + (1 - saturation) * to_grey
        colors = images.permute(0, 2, 3, 1).flatten(1, 2)  # [batch, pixels, 3], a view of channels_last memory
        colors = torch.baddbmm(offset, colors, brightness * contrast * saturate).clamp_(0, 255)
        return colors.unflatten(1, images.shape[2:]).permute(0, 3, 1, 2)


def drop_tokens(tokens: Tensor, draws: np.ndarray, share: float) -> Tensor:
    """Return texts, int64 [batch, length], with a `share` of the tokens between the markers set to 0, the padding id.

    `draws`: [batch, length] in [0, 1). Word dropout (Iyyer et al. 2015, section 3.2).
    """
    columns = torch.arange(tokens.shape[1])
    is_between = (columns > 0) & (columns < tokens.argmax(dim=1, keepdim=True))  # the end marker has the highest id
    return tokens.masked_fill(is_between & torch.from_numpy(draws < share), 0)


def crop_boxes(draws: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    """Return (top, left, height, width) of random-resized crops, int64 [4, ...] for `draws` [..., NUM_DRAWS].

    A crop covers a uniformly drawn share of the image's area, within `scale`, at a log-uniform aspect ratio in
    3/4 .. 4/3 (Szegedy et al. 2015, section 6). A side longer than the image's is cut to it.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., AREA])
    low, high = LOG_ASPECT_RATIOS
    aspect = np.exp(low + (high - low) * draws[..., ASPECT])
    crop_height = np.maximum(1, np.minimum(height, np.rint(np.sqrt(area / aspect))))
    crop_width = np.maximum(1, np.minimum(width, np.rint(np.sqrt(area * aspect))))
    top = (height - crop_height + 1) * draws[..., TOP]  # astype rounds down
    left = (width - crop_width + 1) * draws[..., LEFT]
    return np.array([top, left, crop_height, crop_width]).astype(np.int64)


@lru_cache(maxsize=16)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return constants as a tensor, copied to the device once."""
    return torch.tensor(values, device=device)

"""What the model sees of a training image and its caption: drawn per sample, applied in a worker or on the device."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataloader.config import DataConfig
from dataloader.tables import random_numbers
from utils.images import resize_and_crop

# The columns of a sample's random numbers.
CAPTION, AREA, ASPECT, TOP, LEFT, FLIP, BRIGHTNESS, CONTRAST, SATURATION = range(9)
NUM_DRAWS = 9
LOG_ASPECT_RATIOS = (math.log(3 / 4), math.log(4 / 3))
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Augmentation:
    """`reference`: short side to `size`, centre crop. `standard`: random-resized crop, flip and colour jitter.

    The same random numbers `draws` [batch, NUM_DRAWS] give the same crop wherever it is made.
    """

    def __init__(self, config: DataConfig, size: int) -> None:
        self.size = size
        self.is_random = config.augmentation == "standard"
        self.crop_scale = config.crop_scale
        self.flip = config.flip and self.is_random
        self.color_jitter = config.color_jitter if self.is_random else 0.0
        self.token_dropout = config.token_dropout

    def crop(self, image: Tensor, draws: np.ndarray) -> Tensor:
        """Take one image, uint8 [3, height, width] on the CPU, to [3, size, size]; `draws` [NUM_DRAWS]."""
        if not self.is_random:
            return resize_and_crop(image, self.size)
        top, left, height, width = crop_boxes(draws, image.shape[1], image.shape[2], self.crop_scale).tolist()
        part = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
        return F.interpolate(part, (self.size, self.size), mode="bilinear", antialias=True)[0]

    def crop_squares(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Take squares, uint8 [batch, 3, side, side], to [batch, 3, size, size] in 0..255 where they lie.

        For GPUs, which do in a moment what `crop` does to one image after the other: float32, not rounded, else the
        same. Squares that are of `size` already come back as they are.
        """
        side = images.shape[-1]
        if not self.is_random:
            if side == self.size:
                return images
            return F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        from torchvision.ops import roi_align  # here, since importing torchvision takes over a second

        top, left, height, width = crop_boxes(draws, side, side, self.crop_scale)
        boxes = np.stack([np.arange(len(draws)), left, top, left + width, top + height], axis=1)
        boxes = torch.from_numpy(boxes).float().to(images.device, non_blocking=True)
        return roi_align(images.float(), boxes, self.size, aligned=True)

    def recolour(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Flip and jitter [batch, 3, size, size] with values in 0..255, where they lie."""
        if not (self.flip or self.color_jitter):
            return images
        draws = torch.from_numpy(draws).float().to(images.device, non_blocking=True)[:, :, None, None, None]
        if self.flip:
            images = torch.where(draws[:, FLIP] < 0.5, images.flip(3), images)
        return self._jitter(images.float(), draws) if self.color_jitter else images

    def vary_texts(self, tokens: Tensor, seed: int, epoch: int, indices: np.ndarray) -> Tensor:
        """Blank a share of the tokens of texts [batch, length], drawn per sample as the images' numbers are."""
        if not self.token_dropout:
            return tokens
        draws = random_numbers(seed, epoch, indices, NUM_DRAWS + tokens.shape[1])[:, NUM_DRAWS:]
        return drop_tokens(tokens, draws, self.token_dropout)

    def _jitter(self, images: Tensor, draws: Tensor) -> Tensor:
        """Scale brightness, contrast (about the image's mean grey) and saturation by 1 +- color_jitter each."""
        factors = 1 + self.color_jitter * (2 * draws - 1)
        luma = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
        images = images * factors[:, BRIGHTNESS]
        grey = (images * luma).sum(dim=1, keepdim=True)
        images = torch.lerp(grey.mean(dim=(2, 3), keepdim=True), images, factors[:, CONTRAST])
        grey = (images * luma).sum(dim=1, keepdim=True)
        return torch.lerp(grey, images, factors[:, SATURATION]).clamp(0, 255)


def drop_tokens(tokens: Tensor, draws: np.ndarray, share: float) -> Tensor:
    """Return texts, int64 [batch, length], in which a `share` of the tokens between the markers is 0, as padding is.

    `draws`: [batch, length] in [0, 1). Word dropout (Iyyer et al. 2015, section 3.2).
    """
    columns = torch.arange(tokens.shape[1])
    is_between = (columns > 0) & (columns < tokens.argmax(dim=1, keepdim=True))  # the end marker has the highest id
    return tokens.masked_fill(is_between & torch.from_numpy(draws < share), 0)


def crop_boxes(draws: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    """Return (top, left, height, width) of random-resized crops, int64 [4, ...] for draws [..., NUM_DRAWS].

    A crop covers a uniform share in `scale` of the image's area, at a log-uniform aspect ratio in 3/4 .. 4/3
    (Szegedy et al. 2015, section 6); where it would not fit, its longer side is cut.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[..., AREA])
    low, high = LOG_ASPECT_RATIOS
    aspect = np.exp(low + (high - low) * draws[..., ASPECT])
    crop_height = np.maximum(1, np.minimum(height, np.rint(np.sqrt(area / aspect))))
    crop_width = np.maximum(1, np.minimum(width, np.rint(np.sqrt(area * aspect))))
    top = (height - crop_height + 1) * draws[..., TOP]  # rounded down below
    left = (width - crop_width + 1) * draws[..., LEFT]
    return np.array([top, left, crop_height, crop_width]).astype(np.int64)

"""CLIP's modified ResNet image encoder (Radford et al. 2021, section 2.4), with OpenAI's parameter names."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import RESNET_STRIDE, CLIPConfig
from model.recompute import recomputed


class AveragePool(nn.Module):
    """Average 2 x 2 pixels: [batch, channels, height, width], both sides even, to half the height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return _AveragePool.apply(x) if x.requires_grad else F.avg_pool2d(x, 2)


class _AveragePool(torch.autograd.Function):
    """The backward pass is a copy. PyTorch's own gives the same bits, but takes 15 % of a GPU's step (RN50, bf16)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        batch, channels, height, width = gradient.shape
        gradient = (gradient / 4).permute(0, 2, 3, 1)[:, :, None, :, None]  # channels_last, as the activations
        gradient = gradient.expand(batch, height, 2, width, 2, channels)
        return gradient.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    """A ResNet bottleneck that strides by average pooling; every convolution has stride 1 (anti-aliasing).

    Maps [batch, in_channels, height, width] to [batch, 4 * channels, height / stride, width / stride].
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = AveragePool() if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            conv, norm = nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            pool = AveragePool() if stride > 1 else nn.Identity()
            self.downsample = nn.Sequential(OrderedDict({"-1": pool, "0": conv, "1": norm}))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return self.relu(x + identity)


class AttentionPool2d(nn.Module):
    """Multi-head attention pooling: the mean over positions attends to itself and to all positions.

    Maps [batch, channels, height, width] to [batch, output_dim]. There is one query, so the key and value projections
    can move off the positions: q (W_k x) = (q W_k) x, and sum_i a_i (W_v x_i) = W_v sum_i a_i x_i. Projecting one
    vector instead of all positions gives the same result with less work.
    """

    def __init__(self, spatial_dim: int, channels: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.positional_embedding = nn.Parameter(torch.randn(spatial_dim**2 + 1, channels) / channels**0.5)
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # [batch, height * width, channels]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q = self.q_proj(x[:, 0]).unflatten(-1, (self.heads, -1)) * self.scale  # [batch, heads, 64]
        k_weight, v_weight = (proj.weight.unflatten(0, (self.heads, -1)) for proj in (self.k_proj, self.v_proj))
        query = torch.einsum("bhd,hdc->bhc", q, k_weight)
        k_bias = self.k_proj.bias.unflatten(0, (self.heads, -1))
        scores = query @ x.transpose(1, 2) + (q * k_bias).sum(dim=-1, keepdim=True)  # [batch, heads, positions]
        attended = scores.float().softmax(dim=-1).to(x.dtype) @ x  # [batch, heads, channels]
        pooled = torch.einsum("bhc,hdc->bhd", attended, v_weight).flatten(1) + self.v_proj.bias
        return self.c_proj(pooled)


class ModifiedResNet(nn.Module):
    """A ResNet with a stem of three convolutions, anti-aliased strides and attention pooling.

    Maps images [batch, 3, resolution, resolution] to features [batch, embed_dim].
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        layers, width = config.vision_layers, config.vision_width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = AveragePool()
        self.recompute = False

        channels = [width, *(width * 2**stage * Bottleneck.expansion for stage in range(4))]
        self.layer1 = self._stage(channels[0], width, layers[0], stride=1)
        self.layer2 = self._stage(channels[1], width * 2, layers[1], stride=2)
        self.layer3 = self._stage(channels[2], width * 4, layers[2], stride=2)
        self.layer4 = self._stage(channels[3], width * 8, layers[3], stride=2)
        grid_side = config.image_resolution // RESNET_STRIDE
        self.attnpool = AttentionPool2d(grid_side, channels[4], config.vision_heads, config.embed_dim)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        out_channels = channels * Bottleneck.expansion
        return nn.Sequential(
            Bottleneck(in_channels, channels, stride),
            *(Bottleneck(out_channels, channels) for _ in range(1, blocks)),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(self.relu(self.bn3(self.conv3(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = recomputed(stage, x) if self.recompute and self.training else stage(x)
        return self.attnpool(x)

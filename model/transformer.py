"""Pre-norm transformer blocks and the Vision Transformer image encoder, with OpenAI's parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import CLIPConfig
from model.recompute import recomputed


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU in OpenAI's CLIP (Hendrycks & Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.Module):
    """Multi-head self-attention on [batch, length, width], with `nn.MultiheadAttention`'s parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [batch, heads, length, 64] each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def forward_one_position(self, x: Tensor, positions: Tensor, *, causal: bool) -> Tensor:
        """Return only the output at `positions` [batch], one per sequence: [batch, width]."""
        width = x.shape[2]
        row = x[torch.arange(x.shape[0], device=x.device), positions]
        q = F.linear(row, self.in_proj_weight[:width], self.in_proj_bias[:width])
        kv = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:])
        q = q.unflatten(-1, (self.heads, -1))[:, :, None]  # [batch, heads, 1, 64]
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        is_visible = torch.arange(x.shape[1], device=x.device) <= positions[:, None]  # [batch, length]
        mask = is_visible[:, None, None] if causal else None
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1))


class MLP(nn.Module):
    """Two linear layers with a hidden layer four times as wide."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """One pre-norm transformer layer on [batch, length, width]."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, *, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal=causal)
        return x + self.mlp(self.ln_2(x))

    def forward_one_position(self, x: Tensor, positions: Tensor, *, causal: bool) -> Tensor:
        """Return only the output at `positions` [batch], one per sequence: [batch, width]."""
        row = x[torch.arange(x.shape[0], device=x.device), positions]
        row = row + self.attn.forward_one_position(self.ln_1(x), positions, causal=causal)
        return row + self.mlp(self.ln_2(row))


class Transformer(nn.Module):
    """A stack of blocks. With `causal`, each position attends only to itself and to earlier ones.

    Maps [batch, length, width] to the outputs at `positions` [batch], one per sequence: [batch, width]. The last block
    computes only these.
    """

    def __init__(self, width: int, layers: int, heads: int, activation: str, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.recompute = False
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, activation) for _ in range(layers))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for block in self.resblocks[:-1]:
            is_recomputed = self.recompute and self.training
            x = recomputed(block, x, causal=self.causal) if is_recomputed else block(x, causal=self.causal)
        return self.resblocks[-1].forward_one_position(x, positions, causal=self.causal)


class VisionTransformer(nn.Module):
    """ViT with a class token (Dosovitskiy et al. 2021) and CLIP's additional LayerNorm before the blocks.

    Maps images [batch, 3, resolution, resolution] to features [batch, embed_dim]. The variant `timm` is the encoder of
    SLIP (Mu et al. 2022), a Vision Transformer of timm: GELU, no LayerNorm before the blocks, and an epsilon of 1e-6.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        patch_size, width, is_timm = config.vision_patch_size, config.vision_width, config.vision_variant == "timm"
        num_patches = (config.image_resolution // patch_size) ** 2
        activation = "gelu" if is_timm else config.activation
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(num_patches + 1, width))
        self.ln_pre = nn.Identity() if is_timm else nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads, activation, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))
        if is_timm:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = 1e-6

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [batch, num_patches, width]
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.positional_embedding
        first = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        return self.ln_post(self.transformer(self.ln_pre(x), first)) @ self.proj

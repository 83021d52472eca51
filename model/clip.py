"""CLIP: an image encoder and a text encoder that meet in one space (Radford et al. 2021)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import CLIPConfig
from model.resnet import Bottleneck, ModifiedResNet
from model.transformer import Transformer, VisionTransformer
from utils.tokenizer import get_tokenizer

INITIAL_TEMPERATURE = 0.07  # section 2.5
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # Zhai et al. 2023, section 3.2


class CLIP(nn.Module):
    """OpenAI's CLIP with its state-dict names. `logit_scale` is the log of the multiplier, as there."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        vision = {
            "resolution": config.image_resolution,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "heads": config.vision_heads,
            "embed_dim": config.embed_dim,
        }
        if config.is_resnet:
            self.visual = ModifiedResNet(**vision)
        else:
            self.visual = VisionTransformer(**vision, patch_size=config.vision_patch_size)

        width = config.transformer_width
        self.transformer = Transformer(width, config.transformer_layers, config.transformer_heads, causal=True)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        scale = SIGMOID_SCALE if config.logit_bias else 1 / INITIAL_TEMPERATURE
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_BIAS)) if config.logit_bias else None
        self._initialize()

    def _initialize(self) -> None:
        """Draw the weights as OpenAI's code does, where that differs from torch's defaults."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

        if self.config.is_resnet:
            attnpool = self.visual.attnpool
            for projection in (attnpool.q_proj, attnpool.k_proj, attnpool.v_proj, attnpool.c_proj):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
            for module in self.visual.modules():
                if isinstance(module, Bottleneck):  # each residual branch starts as the identity
                    nn.init.zeros_(module.bn3.weight)

        width, layers = self.config.transformer_width, self.config.transformer_layers
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def recompute_activations(self) -> None:
        """In training, keep what is between the stages of both encoders only; the backward pass computes the rest."""
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = True

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode normalized images [batch, 3, resolution, resolution] to features [batch, embed_dim], any length.

        Raises ValueError if the images are not of the model's resolution.
        """
        resolution = self.config.image_resolution
        if images.shape[1:] != (3, resolution, resolution):
            raise ValueError(f"images are {list(images.shape)}, the model takes [batch, 3, {resolution}, {resolution}]")
        return self.visual(images.contiguous(memory_format=torch.channels_last))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token ids [num_texts, length] for `encode_text`; longer texts than context_length are cut."""
        return get_tokenizer()(texts, context_length=self.config.context_length)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode token ids [batch, length], length up to context_length, to features [batch, embed_dim].

        The feature is read at the end-of-text marker, the highest id. Attention is causal, so what follows the
        marker cannot change it: padding a text, or trimming its padding, leaves its feature as it is.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.transformer(x, positions=tokens.argmax(dim=-1))
        return self.ln_final(x) @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return L2-normalized (image_features, text_features), each [batch, embed_dim].

        The logits are left to the loss: it needs the features of every device at once.
        """
        return F.normalize(self.encode_image(images), dim=-1), F.normalize(self.encode_text(tokens), dim=-1)

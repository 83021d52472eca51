"""CLIP: an image encoder and a text encoder with a common feature space (Radford et al. 2021)."""

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
    """CLIP with the state-dict names of OpenAI's code. As there, `logit_scale` stores log(scale)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = (ModifiedResNet if config.is_resnet else VisionTransformer)(config)
        width, layers, heads = config.transformer_width, config.transformer_layers, config.transformer_heads
        self.transformer = Transformer(width, layers, heads, config.activation, causal=True)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        scale = SIGMOID_SCALE if config.logit_bias else 1 / INITIAL_TEMPERATURE
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(SIGMOID_BIAS)) if config.logit_bias else None
        self._initialize()

    def _initialize(self) -> None:
        """Initialize as OpenAI's code does, where it differs from PyTorch's defaults."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

        if self.config.is_resnet:
            attnpool = self.visual.attnpool
            for projection in (attnpool.q_proj, attnpool.k_proj, attnpool.v_proj, attnpool.c_proj):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
            for module in self.visual.modules():
                if isinstance(module, Bottleneck):  # each residual branch starts as zero
                    nn.init.zeros_(module.bn3.weight)

        width, layers = self.config.transformer_width, self.config.transformer_layers
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    @property
    def temperature(self) -> list[nn.Parameter]:
        """The parameters that the loss applies to the similarities: `logit_scale`, and `logit_bias` if there is one."""
        return [self.logit_scale] if self.logit_bias is None else [self.logit_scale, self.logit_bias]

    def recompute_activations(self) -> None:
        """In training, keep activations only between the stages of both encoders and recompute the rest."""
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = True

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode normalized images [batch, 3, resolution, resolution] to unnormalized features [batch, embed_dim].

        Raises ValueError for images of another shape.
        """
        resolution = self.config.image_resolution
        if images.shape[1:] != (3, resolution, resolution):
            raise ValueError(f"images should be [batch, 3, {resolution}, {resolution}], found {list(images.shape)}")
        return self.visual(images.contiguous(memory_format=torch.channels_last))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token ids, int64 [num_texts, length], for `encode_text`; texts are truncated to `context_length`."""
        return get_tokenizer()(texts, context_length=self.config.context_length)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode token ids [batch, length], length <= context_length, to unnormalized features [batch, embed_dim].

        The feature is the output at the end marker, which has the highest id. Attention is causal, so padding after
        the end marker does not change the feature.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.transformer(x, positions=tokens.argmax(dim=-1))
        return self.ln_final(x) @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return L2-normalized (image_features, text_features), each [batch, embed_dim].

        The loss computes the logits: it needs the features of all devices at once.
        """
        return F.normalize(self.encode_image(images), dim=-1), F.normalize(self.encode_text(tokens), dim=-1)

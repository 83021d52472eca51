"""Training steps of this project and its peers: forward pass, loss, backward pass and update, on data in memory.

python -m benchmarks.train_step [--device cpu] [--model RN50] [--batch 16] [--json FILE] [--png FILE]

The captions are COCO's if CLIP_TEST_DATA has them, or else texts of the same lengths. Rows:
  open_clip         its model of the same sizes, its loss, AdamW; on a GPU amp_bf16; texts padded to 77 tokens
  open_clip_best    the same with channels_last, fused AdamW, and on a GPU torch.compile
  reference         OpenAI's computation: float32, texts padded to 77 tokens, every query of attention pooling, NCHW,
                    unfused AdamW; open_clip's classes keep it, so on a CPU this row is nearly open_clip's
  project           the step of train.py; on a GPU bf16
  project_compiled  with compile: true (on a GPU, or with --compile)
  without_...       the project's step without one saving: texts trimmed to the batch, the last text layer at one
                    position only, folded attention pooling, channels_last, fused AdamW; or without all of them
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/train_step.py` from any folder

from benchmarks.common import Row, add_output_flags, measure_rates, report
from model import CLIP, CLIPConfig, load_model_config
from model.resnet import AttentionPool2d
from model.transformer import Transformer
from trainer.loss import contrastive_loss
from utils.errors import UserError, run_script
from utils.tokenizer import get_tokenizer

# Percentage of COCO's captions (val2017) with 10, 11, ... tokens, including both markers.
LENGTH_SHARES = (4, 12, 20, 19, 15, 10, 7, 4, 3, 2, 1, 1, 1, 1)
Step = Callable[[], int]


def make_tokens(count: int) -> Tensor:
    """Return token ids [count, length] of COCO's captions, or of texts of the same lengths."""
    folder = os.environ.get("CLIP_TEST_DATA")
    file = Path(folder or ".") / "coco_mini/annotations/captions_val2017_all5000.json"
    if file.is_file():
        captions = [annotation["caption"] for annotation in json.loads(file.read_text())["annotations"][:5_000]]
    else:
        captions = [
            "a " * (number - 2) for length, share in enumerate(LENGTH_SHARES, 10) for number in [length] * share
        ]
    chosen = np.random.default_rng(0).choice(len(captions), count)
    return get_tokenizer()([captions[number] for number in chosen])


def padded(tokens: Tensor) -> Tensor:
    """Pad token ids to [count, 77]."""
    return F.pad(tokens, (0, 77 - tokens.shape[1]))


def make_step(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    tokens: Tensor,
    *,
    is_fused: bool,
    has_amp: bool,
) -> Step:
    """Return a function that trains one step and returns its number of pairs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=is_fused, foreach=False)
    model.train()

    def step() -> int:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=has_amp):
            loss = loss_of(images, tokens)
        loss.backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        return len(images)

    return step


def project_step(
    config: CLIPConfig,
    images: Tensor,
    tokens: Tensor,
    *,
    has_amp: bool,
    is_fused: bool = True,
    channels_last: bool = True,
    is_compiled: bool = False,
) -> Step:
    """Return the project's step. Without `channels_last` the images keep their memory format."""
    model = CLIP(config).to(images.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    else:
        model.encode_image = model.visual
    if is_compiled:
        model.compile()

    def loss_of(images: Tensor, tokens: Tensor) -> Tensor:
        return contrastive_loss(*model(images, tokens), model.logit_scale.exp())[0]

    return make_step(model, loss_of, images, tokens, is_fused=is_fused, has_amp=has_amp)


def open_clip_step(config: CLIPConfig, images: Tensor, tokens: Tensor, *, has_amp: bool, is_best: bool) -> Step:
    """Return open_clip's step on a model of the same sizes."""
    from open_clip import model as peer
    from open_clip.loss import ClipLoss

    layers = list(config.vision_layers) if config.is_resnet else config.vision_layers
    vision = peer.CLIPVisionCfg(
        layers=layers,
        width=config.vision_width,
        patch_size=config.vision_patch_size,
        image_size=config.image_resolution,
    )
    text = peer.CLIPTextCfg(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.transformer_width,
        heads=config.transformer_heads,
        layers=config.transformer_layers,
    )
    model = peer.CLIP(config.embed_dim, vision, text, quick_gelu=True).to(images.device)
    if is_best:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        if images.is_cuda:
            model.compile()
    criterion = ClipLoss()

    def loss_of(images: Tensor, tokens: Tensor) -> Tensor:
        image_features, text_features, logit_scale = model(images, tokens)[:3]
        return criterion(image_features, text_features, logit_scale)

    return make_step(model, loss_of, images, padded(tokens), is_fused=is_best, has_amp=has_amp)


def pool_unfolded(self: AttentionPool2d, x: Tensor) -> Tensor:
    """Compute keys and values at every position."""
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
    q, k, v = (
        projection.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        for projection in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
    )
    return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


def all_positions(self: Transformer, x: Tensor, positions: Tensor) -> Tensor:
    """Run every block at every position."""
    for block in self.resblocks:
        x = block(x, causal=self.causal)
    return x[torch.arange(len(x), device=x.device), positions]


def patched(step: Step, owner: type, forward: Callable) -> Step:
    """Return the step with another forward pass of one class of modules."""
    original = owner.forward

    def run() -> int:
        owner.forward = forward
        try:
            return step()
        finally:
            owner.forward = original

    return run


def matmul_speed(device: torch.device, has_amp: bool) -> float:
    """Return the FLOP/s of a large matrix product on this device."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (
        torch.randn(size, size, device=device, dtype=torch.bfloat16 if has_amp else torch.float32) for _ in range(2)
    )
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="RN50", metavar="NAME")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row and round, at least one step")
    parser.add_argument("--compile", action="store_true", help="measure a compiled row on a CPU too")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; use --device cpu")
    config, has_amp = load_model_config({"name": args.model}), device.type == "cuda"
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, config.image_resolution, config.image_resolution, device=device)
    tokens = make_tokens(args.batch).to(device)

    def project(tokens: Tensor = tokens, **changes: bool) -> Step:
        return project_step(config, images, tokens, has_amp=has_amp, **changes)

    bare = project(padded(tokens), is_fused=False, channels_last=False)
    rows = {
        "open_clip": open_clip_step(config, images, tokens, has_amp=has_amp, is_best=False),
        "open_clip_best": open_clip_step(config, images, tokens, has_amp=has_amp, is_best=True),
        "reference": open_clip_step(config, images, tokens, has_amp=False, is_best=False),
        "project": project(),
        "without_trimming": project(padded(tokens)),
        "without_single_position": patched(project(), Transformer, all_positions),
        "without_folding": patched(project(), AttentionPool2d, pool_unfolded),
        "without_channels_last": project(channels_last=False),
        "without_fused_adamw": project(is_fused=False),
        "without_all_of_these": patched(patched(bare, AttentionPool2d, pool_unfolded), Transformer, all_positions),
    }
    if args.compile or device.type == "cuda":
        rows["project_compiled"] = project(is_compiled=True)
    if not config.is_resnet:
        del rows["without_folding"]

    memory = {}
    for name, step in rows.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step()
        memory[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    rates = measure_rates(rows, seconds=args.seconds, rounds=args.rounds)
    base = rates["open_clip"]
    table = [
        Row(
            name,
            statistics.median(values),
            "pairs/s",
            statistics.median(a / b for a, b in zip(values, base, strict=True)),
        )
        for name, values in rates.items()
    ]
    report(table, f"A training step, {args.model}, {args.batch} pairs of at most {tokens.shape[1]} tokens", args)

    with FlopCounterMode(display=False) as counter:
        rows["project"]()
    per_pair = counter.get_total_flops() / args.batch
    limit, speed = matmul_speed(device, has_amp), statistics.median(rates["project"])
    print(
        f"\nproject: {per_pair / 1e9:.1f} GFLOP per pair, {per_pair * speed / 1e9:.0f} GFLOP/s, "
        f"{per_pair * speed / limit:.0%} of the {limit / 1e9:.0f} GFLOP/s of a matrix product on this device"
    )
    if device.type == "cuda":
        print(
            "peak memory in GiB, including the parameters of all rows: "
            + ", ".join(f"{n} {m:.1f}" for n, m in memory.items())
        )


if __name__ == "__main__":
    run_script(main)

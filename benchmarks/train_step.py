"""Training steps of this project and its peers: forward pass, loss, backward pass and update, on data in memory.

python -m benchmarks.train_step [--device cpu] [--model RN50] [--batch 16] [--json FILE] [--png FILE]

The captions are COCO's if CLIP_TEST_DATA has them, or else texts of the same lengths. Rows:
  open_clip         its model of the same sizes, its loss, AdamW, its default precision: fp16 with a scaler on a GPU,
                    fp32 on a CPU; texts padded to 77 tokens
  open_clip_bf16    the same in bfloat16, on a CPU that computes in it
  open_clip_best    open_clip with bfloat16 where it is native, channels_last, fused AdamW, and on a GPU torch.compile
  reference         OpenAI's computation: float32, texts padded to 77 tokens, every query of attention pooling, NCHW,
                    unfused AdamW; open_clip's classes keep it, so on a CPU this row is nearly open_clip's
  project           the loop of train.py with `precision: auto`
  project_...       the same with another precision, compiled, or with activation checkpointing
  without_...       the project's loop without one saving: texts trimmed to the batch, the last text layer at one
                    position only, folded attention pooling, channels_last, fused AdamW; or without all of them
  with_...          the project's loop with cuDNN's search for the fastest algorithms, on a GPU
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/train_step.py` from any folder

from benchmarks.common import add_output_flags, measure_rates, report, to_rows
from dataloader.sampler import Batch
from model import CLIP, CLIPConfig, load_model_config
from model.resnet import AttentionPool2d
from model.transformer import Transformer
from train import train_one_epoch
from trainer.config import load_train_config
from trainer.loss import build_objective
from trainer.optim import build_optimizer
from trainer.parallel import Runtime, choose_precision, wrap
from trainer.run.checkpoint import TrainState
from trainer.run.configs import Configs
from trainer.schedule import Schedule, make_sampler
from utils.device import has_native_bf16
from utils.errors import UserError, run_script
from utils.tokenizer import get_tokenizer

# Percentage of COCO's captions (val2017) with 10, 11, ... tokens, including both markers.
LENGTH_SHARES = (4, 12, 20, 19, 15, 10, 7, 4, 3, 2, 1, 1, 1, 1)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STEPS_PER_CALL = 5  # on a GPU, which the host waits for only after them, as in a run
MANY_STEPS = 1_000_000
Step = Callable[[], int]


class Inputs(NamedTuple):
    """A batch on its device: images float32 [batch, 3, size, size], tokens int64 [batch, length]."""

    images: Tensor
    tokens: Tensor

    @property
    def steps_per_call(self) -> int:
        """Number of steps between two synchronizations."""
        return STEPS_PER_CALL if self.images.is_cuda else 1


def make_inputs(config: CLIPConfig, batch_size: int, device: torch.device) -> Inputs:
    """Return noise with captions as long as COCO's."""
    size = config.image_resolution
    return Inputs(torch.randn(batch_size, 3, size, size, device=device), make_tokens(batch_size).to(device))


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


def padded(inputs: Inputs) -> Inputs:
    """Pad the texts to 77 tokens."""
    return inputs._replace(tokens=F.pad(inputs.tokens, (0, 77 - inputs.tokens.shape[1])))


def repeated(
    inputs: Inputs, steps: Iterable, *, tf32: bool = False, cudnn_tf32: bool = False, cudnn_benchmark: bool = False
) -> Step:
    """Return a function that takes some of the `steps` under these switches of cuDNN and returns its pairs."""
    endless = iter(steps)

    def run() -> int:
        torch.backends.cudnn.benchmark = cudnn_benchmark
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32, tf32 or cudnn_tf32
        for _ in range(inputs.steps_per_call):
            next(endless)
        if inputs.images.is_cuda:
            torch.cuda.synchronize()
        return inputs.steps_per_call * len(inputs.images)

    return run


def project_step(
    config: CLIPConfig,
    inputs: Inputs,
    precision: str = "auto",
    *,
    is_fused: bool = True,
    channels_last: bool = True,
    cudnn_benchmark: bool = False,
    **settings: object,
) -> tuple[Step, CLIP]:
    """Return train.py's loop on one batch, and its model. `settings` are keys of train_config.yaml."""
    images, device = inputs.images, inputs.images.device
    keys = {"per_gpu_train_batch_size": len(images), "num_train_epochs": 1, "optimizer.params.lr": 1e-5}
    trainer = load_train_config(keys | settings)
    precision, _ = choose_precision(precision, device)
    runtime = Runtime(device, num_devices=1, precision=precision)
    model = CLIP(config).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        model.encode_image = model.visual
    if trainer.activation_checkpointing:
        model.recompute_activations()
    optimizer = build_optimizer(model, trainer.optimizer, steps_per_epoch=1)
    if not is_fused:
        optimizer = torch.optim.AdamW(optimizer.param_groups, foreach=None if images.is_cuda else False)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    state = TrainState(model, optimizer, scaler, Configs(config, trainer, None))
    schedule = Schedule(trainer, make_sampler(MANY_STEPS * len(images), trainer, runtime), 0)
    batches = repeat(Batch(images, inputs.tokens, torch.arange(len(images)), np.empty(0), []))
    objective = build_objective(model, trainer, None)
    steps = train_one_epoch(state, wrap(model, runtime, trainer), batches, objective, schedule)
    return repeated(inputs, steps, tf32=precision == "tf32", cudnn_benchmark=cudnn_benchmark), model


def open_clip_step(config: CLIPConfig, inputs: Inputs, precision: str, *, is_best: bool = False) -> Step:
    """Return open_clip's step on a model of the same sizes, and with texts of 77 tokens."""
    from open_clip import model as peer
    from open_clip.loss import ClipLoss

    from model.export import open_clip_config

    images, tokens = padded(inputs)
    model = peer.CLIP(**open_clip_config(config)).to(images.device).train()
    if is_best:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        if images.is_cuda:
            model.compile()
    switches = {"fused": True} if is_best else {"foreach": None if images.is_cuda else False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, **switches)
    scaler = torch.amp.GradScaler(images.device.type, enabled=precision == "fp16")
    criterion = ClipLoss()

    def steps() -> Iterable[None]:
        while True:
            optimizer.zero_grad()
            with torch.autocast(images.device.type, dtype=DTYPES.get(precision), enabled=precision in DTYPES):
                loss = criterion(*model(images, tokens)[:3])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            yield

    return repeated(inputs, steps(), cudnn_tf32=True, cudnn_benchmark=True)  # as open_clip sets them


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


def builders(config: CLIPConfig, inputs: Inputs) -> dict[str, Callable[[], Step]]:
    """Return a function for each row that builds its step."""
    device, short, long = inputs.images.device, inputs, padded(inputs)
    has_gpu, has_bf16 = device.type == "cuda", has_native_bf16(device)

    def peer(precision: str, is_best: bool = False) -> Callable[[], Step]:
        return lambda: open_clip_step(config, inputs, precision, is_best=is_best)

    def project(inputs: Inputs = short, **changes: object) -> Callable[[], Step]:
        return lambda: project_step(config, inputs, **changes)[0]

    def with_forward(step: Callable[[], Step], *patches: tuple[type, Callable]) -> Callable[[], Step]:
        def build() -> Step:
            patched_step = step()
            for owner, forward in patches:
                patched_step = patched(patched_step, owner, forward)
            return patched_step

        return build

    bare = project(long, is_fused=False, channels_last=False)
    pooling, positions = (AttentionPool2d, pool_unfolded), (Transformer, all_positions)
    rows = {
        "open_clip": peer("fp16" if has_gpu else "fp32"),
        "open_clip_bf16": peer("bf16"),
        "open_clip_best": peer("bf16" if has_bf16 else "fp32", is_best=True),
        "reference": peer("fp32"),
        "project": project(),
        "project_fp32": project(precision="fp32"),
        "project_tf32": project(precision="tf32"),
        "project_fp16": project(precision="fp16"),
        "project_compiled": project(compile=True),
        "project_checkpointing": project(activation_checkpointing=True),
        "without_trimming": project(long),
        "without_single_position": with_forward(project(), positions),
        "without_folding": with_forward(project(), pooling),
        "without_channels_last": project(channels_last=False),
        "without_fused_adamw": project(is_fused=False),
        "with_cudnn_benchmark": project(cudnn_benchmark=True),
        "without_all_of_these": with_forward(bare, pooling, positions),
    }
    if not config.is_resnet:
        del rows["without_folding"]
    if not has_bf16:
        del rows["open_clip_bf16"], rows["project_fp32"]  # the rows of these names without it
    if not has_gpu:
        for name in ("project_tf32", "project_fp16", "project_compiled", "project_checkpointing"):
            del rows[name]
        del rows["with_cudnn_benchmark"]
    return rows


class Measured(NamedTuple):
    """The rates of each row in each round, in pairs per second, and on a GPU its peak memory in GiB."""

    rates: dict[str, list[float]]
    memory: dict[str, float]


def measure_steps(
    rows: dict[str, Callable[[], Step]], *, seconds: float, rounds: int, deadline: float = math.inf
) -> Measured:
    """Build the steps and let them take turns. A row's memory is its own: other rows' weights are not counted.

    Rows that are not built 20 s before `deadline`, a time of `time.monotonic`, are left out.
    """
    steps, memory = {}, {}
    for name, build in rows.items():
        if steps and time.monotonic() > deadline - 20:
            break
        if not torch.cuda.is_available():
            steps[name] = build()
            continue
        print(f"building {name}", flush=True)
        before = torch.cuda.memory_allocated()
        steps[name] = build()
        steps[name]()  # once before: cuDNN's search for the fastest algorithm takes memory
        torch.cuda.reset_peak_memory_stats()
        steps[name]()
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        start = time.monotonic()
        pairs = steps[name]()
        print(f"{name}: {pairs / (time.monotonic() - start):,.0f} pairs/s, {memory[name]:.1f} GiB", flush=True)
    return Measured(measure_rates(steps, seconds=seconds, rounds=rounds, deadline=deadline), memory)


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product on this device."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
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
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="measure these alone, and open_clip")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; use --device cpu")
    config = load_model_config({"name": args.model})
    torch.manual_seed(0)
    inputs = make_inputs(config, args.batch, device)
    rows = builders(config, inputs)
    unknown = set(args.rows or ()) - set(rows)
    if unknown:
        raise UserError(f"--rows {min(unknown)}: this machine has the rows {', '.join(rows)}")
    rows = {name: rows[name] for name in rows if not args.rows or name in ("open_clip", *args.rows)}
    measured = measure_steps(rows, seconds=args.seconds, rounds=args.rounds)
    title = f"A training step, {args.model}, {args.batch} pairs of at most {inputs.tokens.shape[1]} tokens"
    report(to_rows(measured.rates, "pairs/s"), title, args)

    if "project" in rows:
        with FlopCounterMode(display=False) as counter:
            pairs = rows["project"]()()
        per_pair, dtype = counter.get_total_flops() / pairs, DTYPES.get(choose_precision("auto", device)[0])
        limit, speed = matmul_speed(device, dtype or torch.float32), statistics.median(measured.rates["project"])
        print(
            f"\nproject: {per_pair / 1e9:.1f} GFLOP per pair, {per_pair * speed / 1e9:.0f} GFLOP/s, "
            f"{per_pair * speed / limit:.0%} of the {limit / 1e9:.0f} GFLOP/s of a matrix product on this device"
        )
    if measured.memory:
        print("peak memory in GiB: " + ", ".join(f"{name} {gib:.1f}" for name, gib in measured.memory.items()))


if __name__ == "__main__":
    run_script(main)

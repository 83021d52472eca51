"""What a run reports: its plan before the first step, its rows, and its results."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dataloader.counts import describe_counts
from dataloader.data_loaders import OpenedData
from trainer.config import TrainConfig
from trainer.parallel import Runtime
from trainer.run.checkpoint import TrainState, list_checkpoints
from trainer.run.folder import RunFolder
from trainer.run.train_meter import SpeedMeter
from trainer.schedule import Schedule
from utils.device import peak_memory
from utils.errors import UserError
from utils.retrieval import format_metrics
from utils.text import one_line

USABLE_MEMORY = 0.9  # of a GPU: the rest is fragments, libraries and other programs


def describe_run(
    schedule: Schedule, runtime: Runtime, state: TrainState, data: OpenedData, counts: dict[str, dict[str, Any]]
) -> str:
    """Return the lines that state what is about to happen. `counts`: what `data.count` returned."""
    config, model = schedule.config, state.model
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    batch = f"{config.per_gpu_train_batch_size} pairs"
    if runtime.num_devices > 1:
        batch += f" x {runtime.num_devices} GPUs"
    if runtime.world_size > 1:
        batch += f" x {runtime.world_size} processes"
    if config.gradient_accumulation_steps > 1:
        batch += f", x {config.gradient_accumulation_steps} accumulated = {schedule.pairs_per_step} per step"
    optimizer = config.optimizer
    weight_decay = optimizer.weight_decay(schedule.steps_per_epoch)
    rows = {
        "recipe": config.recipe,
        "data": describe_counts(data.train, counts["train"]) if "train" in counts else data.train.describe(),
        "model": f"{model.config.name}, {num_parameters:,} parameters, {model.config.image_resolution} px",
        "device": runtime.description,
        "batch": f"{batch}, {schedule.pairs_per_loss} in each loss",
        "steps": f"{schedule.total_steps:,} ({config.num_train_epochs} epochs of {schedule.steps_per_epoch:,}), "
        f"{schedule.warmup_steps:,} of them warmup",
        "optimizer": f"{optimizer.type}, peak lr {optimizer.params.lr:g}, weight decay {weight_decay:.3g}",
    }
    if data.val:
        rows["validation"] = describe_counts(data.val, counts["val"])
    if data.classes:
        sizes = f"{len(data.classes.images):,} images of {len(data.classes.classnames):,} classes"
        rows["zero-shot"] = "; ".join([sizes, *data.classes.notes])
    return "\n".join(f"{name:<10} {one_line(value)}" for name, value in rows.items())


def describe_memory(config: TrainConfig, runtime: Runtime) -> str:
    """Return the peak memory of the first steps, and on a GPU about how many pairs would fit.

    It is called after the second step, the first that has AdamW's moments and activations at once.
    """
    peak = peak_memory(runtime.device)
    text = f"peak memory of the first steps: {peak:.1f} GiB"
    if runtime.device.type != "cuda":
        return text
    total = torch.cuda.get_device_properties(runtime.device).total_memory / 2**30
    constant = torch.cuda.memory_allocated(runtime.device) / 2**30  # weights, gradients, moments, held pixels
    activations = peak - constant
    if activations > 0.1 * peak:  # else a larger batch is limited by something else
        fitting = config.per_gpu_train_batch_size * (USABLE_MEMORY * total - constant) / activations
        text += f" of {total:.0f}; about --batch_size {int(fitting)} would fit"
    return text


@contextlib.contextmanager
def explain_out_of_memory(config: TrainConfig, runtime: Runtime) -> Iterator[None]:
    """Turn PyTorch's error about a full GPU into a UserError that names what helps."""
    try:
        yield
    except torch.OutOfMemoryError:
        used, total = peak_memory(runtime.device), torch.cuda.get_device_properties(runtime.device).total_memory / 2**30
        batch_size = config.per_gpu_train_batch_size
        raise UserError(
            f"the GPU's memory is full ({used:.1f} of {total:.1f} GiB in use); use a smaller batch (--batch_size "
            f"{max(2, batch_size // 2)}), --set trainer.activation_checkpointing=true, for one loss over several "
            "batches --set trainer.accumulation=contrastive and trainer.gradient_accumulation_steps, or, if the GPU "
            "holds the pixel cache, --set dataloader.cache_device=cpu"
        ) from None


def training_row(state: TrainState, grad_norm: torch.Tensor, speed: SpeedMeter, runtime: Runtime) -> dict[str, float]:
    """Return a row of the log: means since the last one, over all processes. Every process calls it.

    Reading the values waits for the device: the only synchronization of the loop.
    """
    scalars = state.meter.means()
    scalars["logit_scale"] = state.model.logit_scale.detach().exp()
    scalars["grad_norm"] = grad_norm
    values = runtime.mean(torch.stack(list(scalars.values()))).tolist()
    row = {"step": state.global_step, "epoch": state.epoch, **dict(zip(scalars, values, strict=True))}
    row["lr"] = state.optimizer.param_groups[0]["lr"]
    row["skipped_steps"] = state.meter.reported
    return {**row, **speed.read(state.global_step)}


def describe_results(folder: RunFolder, curve: Path, data: OpenedData, metrics: dict[str, float]) -> str:
    """Return what a finished run leaves behind, and its last validation as a small table."""
    lines = [f"saved {path}" for path in list_checkpoints(folder.checkpoints)[-1:]]
    lines.append(f"drew {curve}")
    if "loss" in metrics:
        lines.append(f"retrieval on {data.val.num_images:,} held-out images, {data.val.num_captions:,} captions")
        lines.append(format_metrics(metrics))
    if "zero_shot_top1" in metrics:
        lines.append(f"zero-shot top-1 accuracy {metrics['zero_shot_top1']:.2f} %")
    return "\n".join(lines)

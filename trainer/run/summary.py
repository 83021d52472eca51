"""What a run reports: its plan before the first step, its rows, and its results."""

from pathlib import Path

import torch

from dataloader.data_loaders import OpenedData
from trainer.parallel import Runtime
from trainer.run.checkpoint import TrainState, list_checkpoints
from trainer.run.folder import RunFolder
from trainer.schedule import Schedule
from utils.retrieval import format_metrics
from utils.text import one_line


def describe_run(schedule: Schedule, runtime: Runtime, state: TrainState, data: OpenedData) -> str:
    """Return the lines that state what is about to happen."""
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
        "data": data.train.describe(),
        "model": f"{model.config.name}, {num_parameters:,} parameters, {model.config.image_resolution} px",
        "device": runtime.description,
        "batch": f"{batch}, {schedule.pairs_per_loss} in each loss",
        "steps": f"{schedule.total_steps:,} ({config.num_train_epochs} epochs of {schedule.steps_per_epoch:,}), "
        f"{schedule.warmup_steps:,} of them warmup",
        "optimizer": f"{optimizer.type}, peak lr {optimizer.params.lr:g}, weight decay {weight_decay:.3g}",
    }
    if data.val:
        rows["validation"] = data.val.describe()
    if data.classes:
        sizes = f"{len(data.classes.images):,} images of {len(data.classes.classnames):,} classes"
        rows["zero-shot"] = one_line("; ".join([sizes, *data.classes.notes]))
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def training_row(
    state: TrainState, grad_norm: torch.Tensor, speed: dict[str, float], runtime: Runtime
) -> dict[str, float]:
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
    return {**row, **speed}


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

"""What a run is about to do: its steps, its schedule, its folders, told before the first step."""

from dataclasses import dataclass, replace
from pathlib import Path

from dataloader.captions import CaptionSet
from dataloader.stream import ShardStream
from model import CLIP
from trainer.checkpoint import list_checkpoints
from trainer.config import TrainConfig
from trainer.lock import RunLock
from trainer.optim import cosine_warmup_lr
from trainer.parallel import Runtime
from utils.errors import UserError


@dataclass(frozen=True)
class RunPlan:
    """The steps of a run. A step is one optimizer update, of `pairs_per_step` image-text pairs."""

    batch_size: int  # pairs that this process sees at once, over all its devices
    contrast_size: int  # pairs in one loss
    pairs_per_step: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    base_lr: float
    weight_decay: float
    extra_steps: int = 0  # that a resumed run did more than it would have with this batch size; less if below 0

    def resumed(self, global_step: int, steps_left: int) -> "RunPlan":
        """Return the plan after `global_step` steps, some of them perhaps of another batch size."""
        total_steps = global_step + steps_left
        return replace(self, total_steps=total_steps, extra_steps=total_steps - self.total_steps)

    def lr(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        return cosine_warmup_lr(
            step - self.extra_steps,
            base_lr=self.base_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps - self.extra_steps,
        )

    def is_due(self, every: int, step: int) -> bool:
        """Return whether what is done every so many steps, and at the last, is due after `step` of them."""
        return step % every == 0 or step == self.total_steps


@dataclass(frozen=True)
class RunFolders:
    """Where a run writes."""

    checkpoints: Path
    logs: Path
    lock: RunLock | None = None  # of the main process

    def leave(self) -> None:
        """Let another run in."""
        if self.lock:
            self.lock.release()


def make_plan(num_images: int, config: TrainConfig, runtime: Runtime) -> RunPlan:
    """Count the steps. An image is seen once an epoch; what is left over of a step is dropped.

    Raises UserError if the images do not fill one step.
    """
    batch_size = config.per_gpu_train_batch_size * runtime.num_devices
    global_batch_size = batch_size * runtime.world_size
    pairs_per_step = global_batch_size * config.gradient_accumulation_steps
    steps_per_epoch = num_images // pairs_per_step
    if steps_per_epoch == 0:
        smaller = max(2, num_images // (2 * runtime.num_devices * runtime.world_size))
        raise UserError(
            f"the {num_images} training images do not fill one step of {pairs_per_step} pairs; "
            f"use a smaller batch, e.g. --batch_size {smaller}"
        )
    total_steps = steps_per_epoch * config.num_train_epochs
    return RunPlan(
        batch_size=batch_size,
        contrast_size=pairs_per_step if config.accumulation == "contrastive" else global_batch_size,
        pairs_per_step=pairs_per_step,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=round(total_steps * config.warmup_share),
        base_lr=config.optimizer.params.lr,
        weight_decay=config.optimizer.weight_decay(steps_per_epoch),
    )


def make_folders(output_dir: Path, config: TrainConfig, runtime: Runtime, resume: str | None = None) -> RunFolders:
    """Create the run's folders, in its main process, and keep other runs out of them.

    Raises UserError if they cannot be written, are in use, or hold another run's checkpoints and nothing is to be
    resumed, or what is to be does not exist.
    """
    folders = RunFolders(output_dir / config.saved_checkpoints, output_dir / config.logs)
    if not runtime.is_main:
        return folders
    earlier = list_checkpoints(folders.checkpoints)
    if resume not in (None, "auto") and not Path(resume).exists():
        raise UserError(f"the checkpoint {resume} does not exist; check the path, or use --resume auto")
    if earlier and not resume:
        raise UserError(
            f"{folders.checkpoints} already holds a run's checkpoints (e.g. {earlier[-1].name}), which would be "
            "overwritten; go on from them with --resume auto, move them away, or choose another --output_dir"
        )
    try:
        for folder in (folders.checkpoints, folders.logs):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        lock = RunLock(output_dir, heartbeat=folders.logs / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output_dir") from None
    return replace(folders, lock=lock)


def describe_run(
    plan: RunPlan, config: TrainConfig, runtime: Runtime, model: CLIP, train_set: CaptionSet | ShardStream
) -> str:
    """Return the block of lines that says what is about to happen."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    batch = f"{config.per_gpu_train_batch_size} pairs"
    if runtime.num_devices > 1:
        batch += f" x {runtime.num_devices} GPUs"
    if runtime.world_size > 1:
        batch += f" x {runtime.world_size} processes"
    if config.gradient_accumulation_steps > 1:
        batch += f", x {config.gradient_accumulation_steps} accumulated = {plan.pairs_per_step} a step"
    batch += f", {plan.contrast_size} in each loss"
    optimizer = config.optimizer
    rows = {
        "recipe": config.recipe,
        "data": train_set.describe(),
        "model": f"{model.config.name}, {num_parameters:,} parameters, {model.config.image_resolution} px",
        "device": runtime.description,
        "batch": batch,
        "steps": f"{plan.total_steps:,} ({config.num_train_epochs} epochs of {plan.steps_per_epoch:,}), "
        f"the first {plan.warmup_steps:,} warm up",
        "optimizer": f"{optimizer.type}, peak lr {plan.base_lr:g}, weight decay {plan.weight_decay:.3g}",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())

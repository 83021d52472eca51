"""All arithmetic of steps: how many there are, the learning rate of each, and what is due after it."""

import math
from typing import Any

import torch

from dataloader.sampler import BatchLayout, EpochSampler, Position
from trainer.config import TrainConfig
from trainer.parallel import Runtime
from utils.errors import UserError


def cosine_warmup_lr(step: int, *, base_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0: linear warmup, then a cosine to 0.

    The first step has base_lr / warmup_steps, not 0, so that no step is wasted.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_sampler(
    num_images: int, config: TrainConfig, runtime: Runtime, checkpoint: dict[str, Any] | None = None
) -> EpochSampler:
    """Return the order of this process's data, from the start or from the position of a checkpoint.

    Raises UserError if the images do not fill one step.
    """
    layout = BatchLayout(
        batch_size=config.per_gpu_train_batch_size * runtime.num_devices,
        batches_per_step=config.gradient_accumulation_steps,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    if num_images < layout.pairs_per_step:
        smaller = max(2, num_images // (2 * runtime.num_devices * runtime.world_size))
        raise UserError(
            f"the {num_images} training images do not fill one step of {layout.pairs_per_step} pairs; "
            f"use a smaller batch, e.g. --batch_size {smaller}"
        )
    start = Position(checkpoint["epoch"], checkpoint["samples_seen"]) if checkpoint else Position()
    return EpochSampler(num_images, layout, num_epochs=config.num_train_epochs, seed=config.seed, start=start)


class Schedule:
    """The steps of a run; a step is one optimizer update.

    A run that is resumed with another batch size has done more or fewer steps than it would have with this one.
    `shift` is that difference: the learning rate continues at the same place of the cosine.
    """

    def __init__(self, config: TrainConfig, sampler: EpochSampler, global_step: int) -> None:
        layout = sampler.layout
        planned_steps = sampler.steps_per_epoch * config.num_train_epochs
        self.config = config
        self.sampler = sampler
        self.steps_per_epoch = sampler.steps_per_epoch
        self.first_step = global_step
        self.total_steps = global_step + sampler.num_steps
        self.shift = self.total_steps - planned_steps
        self.warmup_steps = round(planned_steps * config.warmup_share)
        self.pairs_per_step = layout.pairs_per_step
        is_contrastive = config.accumulation == "contrastive"
        self.pairs_per_loss = layout.pairs_per_step if is_contrastive else layout.batch_size * layout.world_size

    def steps_left(self, position: Position) -> int:
        """Return the number of steps left in the epoch of a position."""
        return self.sampler.steps_left(position)

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate of step `step` in every parameter group."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(step)

    def seconds_left(self, global_step: int, pairs_per_second: float) -> float:
        """Return the expected time of the remaining steps."""
        return (self.total_steps - global_step) * self.pairs_per_step / pairs_per_second

    def lr(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        return cosine_warmup_lr(
            step - self.shift,
            base_lr=self.config.optimizer.params.lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps - self.shift,
        )

    def is_due(self, interval: int | None, global_step: int) -> bool:
        """Return whether `global_step` is a multiple of `interval` (None for an epoch), or the last step."""
        return global_step % (interval or self.steps_per_epoch) == 0 or global_step == self.total_steps

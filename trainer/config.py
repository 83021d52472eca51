"""What `train_config.yaml` holds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.config import load_config

CONFIG_FILE = Path(__file__).with_name("train_config.yaml")


@dataclass(frozen=True)
class OptimizerParams:
    """What AdamW takes. Raises ValueError for an impossible value."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float | None  # None where decay_timescale says it

    def __post_init__(self) -> None:
        for key in ("lr", "eps"):
            value = getattr(self, key)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{key} should be above 0, found {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas should be in [0, 1), found {list(self.betas)}")
        if self.weight_decay is not None and not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay should be 0 or more, found {self.weight_decay}")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, how much and which parameters it decays. Raises ValueError for an impossible value."""

    type: Literal["AdamW"]
    params: OptimizerParams
    decay_timescale: float | None  # of AdamW's moving average of updates, in epochs
    decay_all: bool  # the reference's way; CLIP's (section 2.5) spares gains, biases and logit_scale

    def __post_init__(self) -> None:
        if self.decay_timescale is not None and not (self.decay_timescale > 0 and math.isfinite(self.decay_timescale)):
            raise ValueError(f"decay_timescale should be above 0 or null, found {self.decay_timescale}")
        if (self.decay_timescale is None) == (self.params.weight_decay is None):
            raise ValueError("params.weight_decay or decay_timescale should be null, and not both")

    def weight_decay(self, steps_per_epoch: int) -> float:
        """Return the weight decay where an epoch has so many steps.

        AdamW's weights are a moving average of its updates over 1 / (lr x weight_decay) steps, and that timescale,
        counted in epochs, carries over to data and batches of other sizes, where the weight decay does not (Wang &
        Aitchison 2024).
        """
        if self.params.weight_decay is not None:
            return self.params.weight_decay
        return 1 / (self.params.lr * self.decay_timescale * steps_per_epoch)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Raises ValueError for an impossible value."""

    recipe: Literal["reference", "best"]
    per_gpu_train_batch_size: int  # image-text pairs
    per_gpu_eval_batch_size: int
    n_gpu: int  # at most
    num_workers: int
    num_train_epochs: int
    gradient_accumulation_steps: int
    seed: int
    loss: Literal["softmax", "sigmoid"]
    word_loss_weight: float
    accumulation: Literal["plain", "contrastive"]
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"]
    compile: bool
    sync_batchnorm: bool
    activation_checkpointing: bool
    optimizer: OptimizerConfig
    warmup_share: float  # of all optimizer steps, in [0, 1]
    max_grad_norm: float | None
    max_skipped_steps: int  # in a row
    logging_steps: int
    save_steps: int
    eval_steps: int | None  # None for an epoch
    best_metric: Literal["mean_recall", "loss", "zero_shot_top1"]
    keep_best: bool
    keep_last: int  # checkpoints, 0 for all
    save_errors: Literal["stop", "continue"]
    saved_checkpoints: str  # directory, inside the output directory
    logs: str

    def __post_init__(self) -> None:
        at_least_one = (
            "per_gpu_train_batch_size", "per_gpu_eval_batch_size", "num_train_epochs", "gradient_accumulation_steps",
            "max_skipped_steps", "logging_steps", "save_steps",
        )  # fmt: skip
        for key in at_least_one:
            if getattr(self, key) < 1:
                raise ValueError(f"{key} should be at least 1, found {getattr(self, key)}")
        for key in ("n_gpu", "num_workers", "seed", "keep_last"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} should be 0 or more, found {getattr(self, key)}")
        if self.per_gpu_train_batch_size < 2:
            raise ValueError("per_gpu_train_batch_size should be at least 2: one pair has nothing to contrast with")
        if self.eval_steps is not None and self.eval_steps < 1:
            raise ValueError(f"eval_steps should be at least 1 or null, found {self.eval_steps}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm should be above 0 or null, found {self.max_grad_norm}")
        if not (self.word_loss_weight >= 0 and math.isfinite(self.word_loss_weight)):
            raise ValueError(f"word_loss_weight should be 0 or more, found {self.word_loss_weight}")
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share should be in [0, 1], found {self.warmup_share}")


def load_train_config(overrides: Iterable[tuple[str, Any]] = ()) -> TrainConfig:
    """Read the YAML file, each (key, value) override applied. Raises UserError for an unknown key or bad value."""
    return load_config(TrainConfig, CONFIG_FILE, overrides)

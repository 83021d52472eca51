"""The schema of `train_config.yaml`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from utils.config import Config, Overrides, Share, load_config

CONFIG_FILE = Path(__file__).with_name("train_config.yaml")


@dataclass(frozen=True)
class OptimizerParams(Config):
    """AdamW's parameters."""

    lr: PositiveFloat  # the peak of the schedule
    betas: tuple[float, float]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat | None  # None where decay_timescale determines it

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas should be in [0, 1), found {list(self.betas)}")


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The optimizer, its weight decay, and the parameters that decay."""

    type: Literal["AdamW"]
    params: OptimizerParams
    decay_timescale: PositiveFloat | None  # of AdamW's moving average of updates, in epochs
    decay_all: bool  # as the reference does; CLIP (section 2.5) excludes gains, biases and logit_scale

    def __post_init__(self) -> None:
        if (self.decay_timescale is None) == (self.params.weight_decay is None):
            raise ValueError("params.weight_decay or decay_timescale should be null, and not both")

    def weight_decay(self, steps_per_epoch: int) -> float:
        """Return AdamW's weight decay.

        AdamW's weights are a moving average of its updates over 1 / (lr x weight_decay) steps. That timescale,
        counted in epochs, transfers to other data and batch sizes; the weight decay itself does not (Wang & Aitchison
        2024, section 3).
        """
        if self.params.weight_decay is not None:
            return self.params.weight_decay
        return 1 / (self.params.lr * self.decay_timescale * steps_per_epoch)


@dataclass(frozen=True)
class TrainConfig(Config):
    """One training run."""

    recipe: str  # a file in trainer/recipes
    per_gpu_train_batch_size: PositiveInt  # image-text pairs
    per_gpu_eval_batch_size: PositiveInt
    device: Literal["auto", "cpu", "cuda", "mps"]
    n_gpu: NonNegativeInt  # at most; 0 is the CPU
    num_workers: NonNegativeInt
    num_train_epochs: PositiveInt
    gradient_accumulation_steps: PositiveInt
    accumulation: Literal["plain", "contrastive"]
    seed: NonNegativeInt
    loss: Literal["softmax", "sigmoid"]
    word_loss_weight: NonNegativeFloat
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"]
    compile: bool
    sync_batchnorm: bool
    activation_checkpointing: bool
    optimizer: OptimizerConfig
    warmup_share: Share  # of all optimizer steps
    max_grad_norm: PositiveFloat | None
    max_skipped_steps: PositiveInt  # in a row
    logging_steps: PositiveInt
    save_steps: PositiveInt
    eval_steps: PositiveInt | None  # None for one epoch
    best_metric: Literal["mean_recall", "loss", "zero_shot_top1"]
    keep_best: bool
    keep_last: NonNegativeInt  # checkpoints; 0 keeps all
    save_errors: Literal["stop", "continue"]
    saved_checkpoints: str  # folder, inside the output folder
    logs: str  # folder, inside the output folder

    def __post_init__(self) -> None:
        if self.per_gpu_train_batch_size < 2:
            raise ValueError("per_gpu_train_batch_size should be at least 2: one pair has nothing to contrast with")


def load_train_config(overrides: Overrides = ()) -> TrainConfig:
    """Read the YAML file and apply the overrides. Raises UserError for an unknown key or a bad value."""
    return load_config(TrainConfig, CONFIG_FILE, overrides)

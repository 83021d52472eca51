"""Checkpoints: the reference's layout, plus what explains the file and what a resume needs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import CLIP
from utils.errors import UserError

FORMAT_VERSION = 1


@dataclass
class TrainState:
    """What a run has reached: everything that a checkpoint carries on."""

    model: CLIP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of fp16's gradients; does nothing in any other precision
    configs: dict[str, Any]  # of all three packages, as plain values
    epoch: int = 0  # the one under way, counted from 0
    global_step: int = 0  # optimizer steps done


def checkpoint_path(directory: Path, state: TrainState) -> Path:
    """Return where the checkpoint of this state lies."""
    return directory / f"checkpoint_{state.epoch}_{state.global_step}.pt"


def save_checkpoint(directory: Path, state: TrainState) -> None:
    """Write `checkpoint_{epoch}_{global_step}.pt`.

    The file holds tensors and plain containers only, and gets its name when it is complete: a run killed while
    saving leaves the earlier checkpoints as they were. Raises UserError if it cannot be written.
    """
    path = checkpoint_path(directory, state)
    checkpoint = {
        "format_version": FORMAT_VERSION,
        "epoch": state.epoch,
        "global_step": state.global_step,
        "model_state_dict": state.model.state_dict(),
        "optimizer_state_dict": state.optimizer.state_dict(),
        "scaler_state_dict": state.scaler.state_dict(),
        "rng_state": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        "configs": state.configs,
    }
    unfinished = path.with_suffix(".tmp")
    try:
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        unfinished.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"the checkpoint {path} cannot be written ({reason}); free the disk or mend it") from None

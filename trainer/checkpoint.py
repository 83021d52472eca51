"""Checkpoints: the reference's layout, plus what explains the file and what an exact resume needs."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import CLIP, load_weights, read_checkpoint
from trainer.config import TrainConfig
from trainer.parallel import Runtime
from utils.errors import UserError
from utils.files import delete_unfinished, open_whole
from utils.logger import RunLogger

FORMAT_VERSION = 2
SUFFIX = ".pt"
CONTENT = {
    "epoch": int, "sample": int, "global_step": int, "validated_step": int, "best": float, "model_state_dict": dict,
    "optimizer_state_dict": dict, "scaler_state_dict": dict, "rank_states": list, "configs": dict,
}  # fmt: skip
BYTES_PER_SECOND = 100e6  # of a slow disk


@dataclass
class TrainState:
    """What a run has reached: everything that a checkpoint carries on."""

    model: CLIP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of fp16's gradients; does nothing in any other precision
    configs: dict[str, Any]  # of all three packages, as plain values
    epoch: int = 0  # the one under way, counted from 0
    sample: int = 0  # images of this epoch that were seen, by all processes together
    global_step: int = 0  # optimizer steps done
    validated_step: int = 0  # the last one whose model was validated
    best: float = -math.inf  # value of the best metric so far, larger is better
    meter: dict[str, Any] = field(default_factory=dict)  # this process's sums since the last row of the log

    @cached_property
    def num_parameters(self) -> int:
        """The model's, counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


class Checkpoints:
    """The checkpoints of a run: `checkpoint_{epoch}_{global_step}.pt`, the newest `keep_last` of them.

    A file gets its name when it is complete and on the disk: a run killed while saving leaves the earlier ones as
    they were. Its records carry CRC-32 checksums (zip's), which reading checks.
    """

    def __init__(self, folder: Path, config: TrainConfig, runtime: Runtime, logger: RunLogger) -> None:
        self.folder = folder
        self.keep_last = config.keep_last
        self.keeps_best = config.keep_best
        self.survives_errors = config.save_errors == "continue"
        self.runtime = runtime
        self.logger = logger
        self.saved: Path | None = None  # the newest that this run may be resumed from
        self.seconds: float | None = None  # that the slowest save took
        if runtime.is_main:
            delete_unfinished(folder)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, in the main process, and delete those that `keep_last` does not keep.

        Every process calls it. Raises UserError if it cannot be written, or warns where `save_errors` says so.
        """
        start = time.perf_counter()
        sums = {name: total.cpu() for name, total in state.meter["sums"].items()}
        rank_states = self.runtime.collect({"rng": _rng_state(), "meter": {**state.meter, "sums": sums}})
        path = self.folder / f"checkpoint_{state.epoch}_{state.global_step}{SUFFIX}"
        if not self.runtime.is_main or not self._write(_content(state, rank_states), path):
            return
        self.saved = path
        self.seconds = max(self.seconds or 0, time.perf_counter() - start)
        if self.keep_last:
            own = [file for file in list_checkpoints(self.folder) if _step_of(file) <= state.global_step]
            for old in own[: -self.keep_last]:
                old.unlink(missing_ok=True)

    def save_best(self, state: TrainState) -> None:
        """Write `best.pt`, weights without what a resume needs, in the main process. Raises as `save` does."""
        if self.keeps_best:
            content = _content(state, [])
            unneeded = ("optimizer_state_dict", "scaler_state_dict", "rank_states")
            self._write({key: value for key, value in content.items() if key not in unneeded}, self.folder / "best.pt")

    def _write(self, checkpoint: dict[str, Any], path: Path) -> bool:
        """Return whether the file could be written; if not, warn or raise UserError."""
        try:
            with open_whole(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
            reason = (error.strerror or error) if isinstance(error, OSError) else "no space for all of it"
            message = f"the checkpoint {path} cannot be written ({reason})"
            if not self.survives_errors:
                raise UserError(f"{message}; free the disk or mend it, and go on with --resume auto") from None
            self.logger.warning(f"{message}; training goes on, and saves again at the next save")
            return False
        return True

    def expected_seconds(self, state: TrainState) -> float:
        """Return how long a save takes: the slowest so far; before the first a guess from the size of the model."""
        return self.seconds or 12 * state.num_parameters / BYTES_PER_SECOND  # weights and two moments

    def find(self, resume: str | None) -> dict[str, Any] | None:
        """Read what `--resume` names: None without it, and for `auto` where nothing has been saved yet.

        `auto` takes the newest checkpoint that can be read, and warns of newer ones. Raises UserError where there is
        none such, the file is no checkpoint to resume from, or going on from it would overwrite newer ones.
        """
        if resume is None:
            return None
        if resume != "auto":
            path = Path(resume)
            checkpoint = _read(list_checkpoints(path)[-1] if path.is_dir() and list_checkpoints(path) else path)
            newer = [file for file in list_checkpoints(self.folder) if _step_of(file) > checkpoint["global_step"]]
            if newer:
                raise UserError(
                    f"{self.folder} holds checkpoints newer than {path} (e.g. {newer[-1].name}), which would be "
                    "overwritten; move them away, or choose another --output_dir"
                )
            self.saved = path
            return checkpoint
        files = list_checkpoints(self.folder)
        for path in reversed(files):
            try:
                checkpoint = _read(path)
            except UserError as error:
                self.logger.warning(f"passed over: {error}")
                continue
            self.saved = path
            return checkpoint
        if files:
            raise UserError(f"no checkpoint in {self.folder} can be read; to start anew choose another --output_dir")
        return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint files of a folder, oldest first."""
    return sorted((file for file in folder.glob(f"checkpoint_*_*{SUFFIX}") if _step_of(file) >= 0), key=_step_of)


def restore(state: TrainState, checkpoint: dict[str, Any], runtime: Runtime, tell: Callable[[str], None]) -> None:
    """Go on from a checkpoint: weights, optimizer, random states and place in the data. Tells what differs.

    Learning rate, decay and the like are the current configuration's. Raises UserError where it does not fit.
    """
    try:
        _restore(state, checkpoint, runtime, tell)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint cannot be resumed, it is damaged ({error}); use an earlier one") from None


def _restore(state: TrainState, checkpoint: dict[str, Any], runtime: Runtime, tell: Callable[[str], None]) -> None:
    load_weights(state.model, checkpoint["model_state_dict"], "the checkpoint")
    groups = state.optimizer.state_dict()["param_groups"]
    saved = checkpoint["optimizer_state_dict"]
    if [len(group["params"]) for group in saved["param_groups"]] != [len(group["params"]) for group in groups]:
        raise UserError("the checkpoint's optimizer has other parameter groups; set decay_all as it was")
    state.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    state.scaler.load_state_dict(checkpoint["scaler_state_dict"])
    state.epoch, state.sample = checkpoint["epoch"], checkpoint["sample"]
    state.global_step = checkpoint["global_step"]
    state.validated_step, state.best = checkpoint["validated_step"], checkpoint["best"]
    for difference in _differences(checkpoint["configs"], state.configs):
        tell(f"differs from the checkpoint: {difference}")
    rank_states = checkpoint["rank_states"]
    if len(rank_states) != runtime.world_size:
        tell(f"differs from the checkpoint: world_size was {len(rank_states)}, is {runtime.world_size}")
        return
    state.meter = rank_states[runtime.rank]["meter"]
    _set_rng_state(rank_states[runtime.rank]["rng"])


def _content(state: TrainState, rank_states: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "epoch": state.epoch,
        "sample": state.sample,
        "global_step": state.global_step,
        "validated_step": state.validated_step,
        "best": state.best,
        "model_state_dict": state.model.state_dict(),
        "optimizer_state_dict": state.optimizer.state_dict(),
        "scaler_state_dict": state.scaler.state_dict(),
        "rank_states": rank_states,
        "configs": state.configs,
    }


def _read(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    version = checkpoint.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        kind = f"is of format {version}" if type(version) is int else "has no optimizer or place in the data"
        raise UserError(f"{path}: {kind}, so that training cannot go on from it; start a new run")
    damaged = [key for key, kind in CONTENT.items() if not isinstance(checkpoint.get(key), kind)]
    if damaged:
        raise UserError(f"{path}: has no usable {damaged[0]}; it is damaged")
    return checkpoint


def _step_of(file: Path) -> int:
    """Return the step in a checkpoint's name, -1 if there is none."""
    step = file.stem.rpartition("_")[2]
    return int(step) if step.isdecimal() else -1


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Return "key was X, is Y" for every value that two configurations do not share."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for name in keys for line in _differences(old.get(name), new.get(name), f"{key}.{name}")]
    return [] if old == new else [f"{key.lstrip('.')} was {old}, is {new}"]


def _rng_state() -> dict[str, Any]:
    """Return every generator's state: the run itself draws from none, but what a user adds to it may."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])

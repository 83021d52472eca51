"""Checkpoints: the reference's layout, plus the configuration and what an exact resume needs."""

import math
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dataloader.sampler import Position
from model import CLIP, load_weights, read_checkpoint
from trainer.config import TrainConfig
from trainer.optim import BatchNormStatistics
from trainer.parallel import Runtime
from trainer.run.configs import Configs
from trainer.run.logger import RunLogger
from trainer.run.train_meter import TrainMeter
from utils.config import to_plain
from utils.errors import UserError
from utils.files import atomic_open
from utils.text import one_line

FORMAT_VERSION = 3
PROGRESS = {"epoch": int, "samples_seen": int, "global_step": int, "validated_step": int, "best": float}
ONLY_TO_RESUME = {"optimizer_state_dict": dict, "scaler_state_dict": dict, "rank_states": list}  # not in best.pt
CONTENT = PROGRESS | {"training_data": str, "model_state_dict": dict, "configs": dict} | ONLY_TO_RESUME
CHECKPOINT_NAMES = r"checkpoint_[0-9]+_([0-9]+)\.pt"
BYTES_PER_SECOND = 100e6  # of a slow disk
SCALE_SEARCH = 5  # skipped steps in a row that are fp16's normal search for its scale


@dataclass
class TrainState:
    """The progress of a run: everything that a checkpoint carries over."""

    model: CLIP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales fp16's gradients; disabled in any other precision
    configs: Configs
    epoch: int = 0  # the current one, counted from 0
    samples_seen: int = 0  # images of this epoch, over all processes
    global_step: int = 0  # optimizer steps done
    validated_step: int = 0  # the last one that was followed by a validation
    best: float = -math.inf  # score of the best validation so far; larger is better
    training_data: str = ""  # what `identify` returns of the training set
    meter: TrainMeter = field(init=False)
    batchnorm: BatchNormStatistics = field(init=False)

    def __post_init__(self) -> None:
        # fp16's scaler tries large scales first, and skips the steps in which they overflow
        self.meter = TrainMeter(self.model.logit_scale.device, SCALE_SEARCH if self.scaler.is_enabled() else 0)
        self.batchnorm = BatchNormStatistics(self.model)

    @property
    def position(self) -> Position:
        """The place in the data."""
        return Position(self.epoch, self.samples_seen)


class CheckpointWriter:
    """Writes `checkpoint_{epoch}_{global_step}.pt` and `best.pt`, and keeps the newest `keep_last` checkpoints.

    A save copies the state and returns; a thread writes the file while training goes on. The next save, and the end of
    the context, wait for it and raise its error. A file gets its name once it is complete and on the disk: a run that
    is killed while saving leaves the earlier files unchanged. Every record of a file has a CRC-32 checksum (zip's),
    which reading verifies.
    """

    def __init__(self, folder: Path, model: CLIP, config: TrainConfig, runtime: Runtime, logger: RunLogger) -> None:
        self.folder = folder
        self.config = config
        self.runtime = runtime
        self.logger = logger
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.estimate = 12 * num_parameters / BYTES_PER_SECOND  # weights and AdamW's two moments, 4 bytes each
        self.seconds = 0.0  # of the slowest save so far
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._unfinished: Future[None] | None = None
        self._copy: dict[str, Any] = {}  # of the last files; its memory is used again

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint on rank 0; `keep_last` then deletes older ones. Every process calls it.

        Raises UserError if the previous file could not be written; with `save_errors: continue`, a warning is logged
        instead.
        """
        start = time.perf_counter()
        rank_states = self.runtime.all_gather_object({"rng": _rng_state(), "meter": state.meter.state_dict()})
        if self.runtime.is_main:
            path = self.folder / f"checkpoint_{state.epoch}_{state.global_step}.pt"
            self._begin(self._write_and_tidy, _content(state, rank_states), path, start)

    def save_best(self, state: TrainState) -> None:
        """Begin to write `best.pt`, the weights without what only a resume needs, on rank 0. Raises as `save` does."""
        if self.config.keep_best and self.runtime.is_main:
            content = {key: value for key, value in _content(state, []).items() if key not in ONLY_TO_RESUME}
            self._begin(self._write, content, self.folder / "best.pt")

    def wait(self) -> None:
        """Wait until the last file is written. Raises as `save` does."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished:
            unfinished.result()

    @property
    def expected_seconds(self) -> float:
        """The duration of a save: the slowest so far; before the first, an estimate from the model's size."""
        return self.seconds or self.estimate

    def _begin(self, write: Callable[..., Any], content: dict[str, Any], *args: Any) -> None:
        """Copy the content to the memory of the CPU, and let the thread write it once the previous file is written."""
        self.wait()
        copy = _copied(content, self._copy)
        self._copy |= copy
        self._unfinished = self._thread.submit(write, copy, *args)

    def _write_and_tidy(self, content: dict[str, Any], path: Path, start: float) -> None:
        if not self._write(content, path):
            return
        self.seconds = max(self.seconds, time.perf_counter() - start)
        if self.config.keep_last:
            done = [file for file in list_checkpoints(self.folder) if _step_of(file) <= _step_of(path)]
            for old in done[: -self.config.keep_last]:
                old.unlink(missing_ok=True)

    def _write(self, content: dict[str, Any], path: Path) -> bool:
        """Return whether the file could be written."""
        try:
            with atomic_open(path) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = (error.strerror or error) if isinstance(error, OSError) else "not enough space"
            message = f"the checkpoint {path} cannot be written ({reason})"
            if self.config.save_errors == "stop":
                raise UserError(f"{message}; free some disk space, then continue with --resume auto") from None
            self.logger.warning(f"{message}; training continues until the next save")
            return False
        return True


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest step first."""
    return sorted((file for file in folder.glob("checkpoint_*_*.pt") if _step_of(file) >= 0), key=_step_of)


def find_checkpoint(
    resume: str | None, folder: Path, logger: RunLogger, *, training_data: str = "", allow_other_data: bool = False
) -> dict[str, Any] | None:
    """Read the checkpoint that `--resume` names: None without the flag, and for `auto` before the first save.

    `auto` takes the newest readable checkpoint of `folder` and warns about unreadable newer ones. `training_data`: what
    `identify` returns of the training set. Raises UserError if there is no readable one, if the file is not a
    checkpoint to resume from, if it is of other training data (a warning with `allow_other_data`), or if resuming from
    it would overwrite newer checkpoints.
    """
    checkpoint = _find(resume, folder, logger)
    if checkpoint and checkpoint["training_data"] != training_data:
        change = f"the training data was {one_line(checkpoint['training_data'])}, is now {training_data}"
        if not checkpoint["training_data"]:
            logger.warning("the checkpoint does not record its training data, so it is not known whether they changed")
        elif not allow_other_data:
            raise UserError(f"{change}; resume with that run's data, or allow other data with --allow_other_data")
        else:
            logger.warning(change)
    return checkpoint


def _find(resume: str | None, folder: Path, logger: RunLogger) -> dict[str, Any] | None:
    if resume is None:
        return None
    files = list_checkpoints(folder)
    if resume == "auto":
        for path in reversed(files):
            try:
                return _read(path)
            except UserError as error:
                logger.warning(f"skipped a checkpoint: {error}")
        if files:
            raise UserError(f"{folder} contains no readable checkpoint; choose another --output_dir to start anew")
        return None
    path = Path(resume)
    checkpoint = _read(list_checkpoints(path)[-1] if path.is_dir() and list_checkpoints(path) else path)
    newer = [file for file in files if _step_of(file) > checkpoint["global_step"]]
    if newer:
        raise UserError(
            f"{folder} contains checkpoints newer than {path} (e.g. {newer[-1].name}), which this run would overwrite; "
            "move them away, or choose another --output_dir"
        )
    return checkpoint


def restore(state: TrainState, checkpoint: dict[str, Any], runtime: Runtime, logger: RunLogger) -> None:
    """Load weights, optimizer, random state and progress from a checkpoint, and log what differs.

    Learning rate, weight decay and the like come from the current configuration. Raises UserError if the checkpoint
    does not fit.
    """
    load_weights(state.model, checkpoint["model_state_dict"], "the checkpoint")
    saved, rank_states = checkpoint["optimizer_state_dict"], checkpoint["rank_states"]
    groups = state.optimizer.state_dict()["param_groups"]
    try:
        if [len(group["params"]) for group in saved["param_groups"]] != [len(group["params"]) for group in groups]:
            raise UserError("the checkpoint's optimizer has other parameter groups; set decay_all as in that run")
        state.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        state.scaler.load_state_dict(checkpoint["scaler_state_dict"])
        if len(rank_states) == runtime.world_size:
            state.meter.load_state_dict(rank_states[runtime.rank]["meter"])
            _set_rng_state(rank_states[runtime.rank]["rng"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint is damaged ({error}); resume from an earlier one") from None
    for key in PROGRESS:
        setattr(state, key, checkpoint[key])
    old = checkpoint["configs"] | {"world_size": len(rank_states)}
    new = to_plain(state.configs) | {"world_size": runtime.world_size}
    for difference in _differences(old, new):
        logger.info(f"differs from the checkpoint: {difference}")


def _content(state: TrainState, rank_states: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        **{key: getattr(state, key) for key in PROGRESS},
        "training_data": state.training_data,
        "model_state_dict": state.model.state_dict(),
        "optimizer_state_dict": state.optimizer.state_dict(),
        "scaler_state_dict": state.scaler.state_dict(),
        "rank_states": rank_states,
        "configs": to_plain(state.configs),
    }


def _copied(content: Any, earlier: Any = None) -> Any:
    """Return checkpoint content with all tensors copied to the CPU: into those of an `earlier` copy where they fit.

    New memory for each copy would leave gaps in the process's memory, which then grows.
    """
    if isinstance(content, dict):
        earlier = earlier if isinstance(earlier, dict) else {}
        return {key: _copied(value, earlier.get(key)) for key, value in content.items()}
    if isinstance(content, list):
        return [_copied(value) for value in content]
    if not isinstance(content, torch.Tensor):
        return content
    if isinstance(earlier, torch.Tensor) and (earlier.shape, earlier.dtype) == (content.shape, content.dtype):
        return earlier.copy_(content.detach())
    return content.detach().to("cpu", copy=True)


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint to resume from. Raises UserError if it is not one."""
    checkpoint = read_checkpoint(path)
    version = checkpoint.get("format_version")
    if type(version) is int and version < FORMAT_VERSION:
        raise UserError(
            f"{path}: was written by an earlier version of this code and can only be evaluated, not resumed; finish "
            "that run with that version, or start a new one"
        )
    if type(version) is not int or version > FORMAT_VERSION:
        raise UserError(f"{path}: contains no training state of this version; start a new run")
    checkpoint.setdefault("training_data", "")  # an earlier version did not record it
    damaged = [key for key, kind in CONTENT.items() if not isinstance(checkpoint.get(key), kind)]
    if damaged and all(key in ONLY_TO_RESUME for key in damaged):
        raise UserError(
            f"{path}: contains weights alone, of a run's best validation, to use and evaluate with --checkpoint_path; "
            "resume from a checkpoint_*.pt"
        )
    if damaged:
        raise UserError(f"{path}: is damaged ({damaged[0]}); resume from an earlier checkpoint")
    return checkpoint


def _step_of(file: Path) -> int:
    """Return the step in a checkpoint's name, or -1 if it is not the name of one."""
    match = re.fullmatch(CHECKPOINT_NAMES, file.name)
    return int(match[1]) if match else -1


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Return "key was X, is Y" for every value in which two configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for name in keys for line in _differences(old.get(name), new.get(name), f"{key}.{name}")]
    return [] if old == new else [f"{key.lstrip('.')} was {old}, is {new}"]


def _rng_state() -> dict[str, Any]:
    """Return PyTorch's generators. The project draws nothing from them in a step; a dropout layer would."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])

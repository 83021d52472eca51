"""The figures of a run, gathered on the device and read once every few steps."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dataloader.data_loaders import TrainLoader
from trainer.checkpoint import Checkpoints, TrainState
from trainer.config import TrainConfig
from trainer.parallel import Runtime
from trainer.plan import RunPlan
from utils.errors import UserError
from utils.logger import RunLogger, duration

MUCH_WAITING = 0.1  # of the time: caching the images is then worth its space
LEARNED, DIVERGED = 0.9, 0.98  # of the loss of guessing: a loss once below the first and now above the second


class StepMeter:
    """Means of the losses' scalars, speed and memory between two rows of the log; and the steps that were skipped.

    What a resumed run goes on with lies in `state.meter`, the sums as tensors on the device.
    """

    def __init__(
        self,
        state: TrainState,
        logger: RunLogger,
        loader: TrainLoader,
        checkpoints: Checkpoints,
        plan: RunPlan,
        config: TrainConfig,
        runtime: Runtime,
    ) -> None:
        self.logger = logger
        self.loader = loader
        self.checkpoints = checkpoints
        self.plan = plan
        self.max_skipped_steps = config.max_skipped_steps
        self.chance = math.log(plan.contrast_size) if config.loss == "softmax" else math.inf
        self.runtime = runtime
        self.has_told_time = False
        self.indices: list[Tensor] = []  # of the step under way
        self.unread: list[tuple[int, Tensor, list[Tensor]]] = []  # step, whether it was skipped, its images
        state.meter = {"sums": {}, "skipped": 0, "in_a_row": 0, "lowest_loss": math.inf, **state.meter}
        state.meter["sums"] = {name: total.to(runtime.device) for name, total in state.meter["sums"].items()}
        self.logger.start_bar(plan.total_steps, state.global_step)
        self._restart_clock(state.global_step)

    def _restart_clock(self, step: int) -> None:
        self.first_step = step
        self.start = time.perf_counter()
        self.start_wait = self.loader.wait_seconds

    def update(self, state: TrainState, scalars: Mapping[str, Tensor], indices: Tensor) -> None:
        """Add the scalars of one loss over the images `indices`, without reading them; those of a NaN do not count."""
        self.indices.append(indices)
        is_finite = torch.isfinite(scalars["loss"])
        sums = state.meter["sums"]
        for name, value in {**scalars, "num_losses": torch.ones_like(scalars["loss"])}.items():
            value = torch.where(is_finite, value, 0)
            sums[name] = sums[name] + value if name in sums else value

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done in this context out of the speed."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def end_step(self, state: TrainState, grad_norm: Tensor, is_skipped: Tensor) -> None:
        """Note the step that was just taken or skipped, and move the progress bar on."""
        self.grad_norm = grad_norm
        self.unread.append((state.global_step, is_skipped, self.indices))
        self.indices = []
        self.logger.advance_bar()

    def check(self, state: TrainState) -> None:
        """Tell which steps were skipped since the last check. Raises UserError if the last so many all were."""
        flags = torch.stack([is_skipped for _, is_skipped, _ in self.unread]).tolist() if self.unread else []
        for (step, _, indices), is_skipped in zip(self.unread, flags, strict=True):
            state.meter["in_a_row"] = state.meter["in_a_row"] + 1 if is_skipped else 0
            if is_skipped:
                state.meter["skipped"] += 1
                everyones = self.runtime.collect([self._image_id(index) for index in torch.cat(indices).tolist()])
                ids = ", ".join(str(image_id) for own in everyones for image_id in own)
                self.logger.warning(f"step {step} was skipped, its gradients are not finite; its images: {ids}")
            if state.meter["in_a_row"] >= self.max_skipped_steps:
                saved = self.checkpoints.saved
                resume = f"--resume {saved} goes on from the last good checkpoint" if saved else "nothing was saved yet"
                raise UserError(
                    f"the last {self.max_skipped_steps} steps had gradients that are not finite; lower the learning "
                    f"rate, or set max_grad_norm: {resume}"
                )
        self.unread = []

    def report(self, state: TrainState) -> None:
        """Log one row of means since the last. Reading the values off the device is the loop's only sync.

        Every process calls it: losses and accuracies are the means over all of them.
        """
        self.check(state)
        scalars = dict(state.meter["sums"])
        num_losses = scalars.pop("num_losses")
        scalars = {name: total / num_losses for name, total in scalars.items()}
        scalars["logit_scale"] = state.model.logit_scale.detach().exp()
        scalars["grad_norm"] = self.grad_norm
        values = self.runtime.mean(torch.stack(list(scalars.values()))).tolist()
        seconds = time.perf_counter() - self.start
        num_steps = state.global_step - self.first_step
        row = {"step": state.global_step, "epoch": state.epoch, **dict(zip(scalars, values, strict=True))}
        row["lr"] = state.optimizer.param_groups[0]["lr"]
        row["skipped_steps"] = state.meter["skipped"]
        row["pairs_per_second"] = num_steps * self.plan.pairs_per_step / seconds
        row["data_wait_share"] = (self.loader.wait_seconds - self.start_wait) / seconds
        row["peak_memory_gib"] = peak_memory()
        self.logger.row(row)
        self._watch_loss(state, row["loss"])
        if not self.has_told_time:
            remaining = (self.plan.total_steps - state.global_step) * seconds / num_steps
            self.logger.info(f"expected time for the remaining steps: {duration(remaining)}")
            self.has_told_time = True
        elif self.loader.advice and row["data_wait_share"] > MUCH_WAITING:  # not in the first row: workers start there
            share = f"{row['data_wait_share']:.0%}"
            self.logger.info(f"{share} of the time goes into waiting for images; {self.loader.advice}")
            self.loader.advice = ""
        state.meter["sums"] = {}
        self._restart_clock(state.global_step)

    def _watch_loss(self, state: TrainState, loss: float) -> None:
        """Tell once that what was learned is lost again."""
        meter = state.meter
        meter["lowest_loss"] = min(meter["lowest_loss"], loss)  # a NaN changes nothing
        if meter["lowest_loss"] < LEARNED * self.chance and loss > DIVERGED * self.chance:
            self.logger.warning(
                f"the loss is back at that of guessing, ln({self.plan.contrast_size}) = {self.chance:.2f}: training "
                "has diverged; use a lower learning rate or max_grad_norm, from an earlier checkpoint"
            )
            meter["lowest_loss"] = math.inf

    def _image_id(self, index: int) -> int | str:
        ids = self.loader.image_ids
        return ids[index] if 0 <= index < len(ids) else "unknown, from a stream"


def peak_memory() -> float:
    """Return the most memory held so far in GiB: the first GPU's, or this process's on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

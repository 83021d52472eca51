"""The figures of a run, gathered on the device and read once every few steps."""

import resource
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from dataloader.data_loaders import TrainLoader
from trainer.checkpoint import TrainState
from trainer.optim import gradient_norm
from trainer.parallel import Runtime
from trainer.plan import RunPlan
from utils.logger import RunLogger, duration

MUCH_WAITING = 0.1  # of the time: caching the images is then worth its space


class StepMeter:
    """Means of the losses' scalars, speed and memory between two rows of the log."""

    def __init__(self, logger: RunLogger, loader: TrainLoader, plan: RunPlan, runtime: Runtime) -> None:
        self.logger = logger
        self.loader = loader
        self.plan = plan
        self.runtime = runtime
        self.has_told_time = False
        self.logger.start_bar(plan.total_steps)
        self._restart(step=0)

    def _restart(self, step: int) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_updates = 0
        self.first_step = step
        self.start = time.perf_counter()
        self.start_wait = self.loader.wait_seconds

    def update(self, scalars: Mapping[str, Tensor]) -> None:
        """Add one batch's scalars, without reading them."""
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.num_updates += 1

    def end_step(self) -> None:
        """Move the progress bar on."""
        self.logger.advance_bar()

    def report(self, state: TrainState) -> None:
        """Log one row of means since the last. Reading the values off the device is the loop's only sync.

        Every process calls it: losses and accuracies are the means over all of them.
        """
        scalars = {name: total / self.num_updates for name, total in self.sums.items()}
        scalars["logit_scale"] = state.model.logit_scale.detach().exp()
        scalars["grad_norm"] = gradient_norm(state.model)
        values = self.runtime.mean(torch.stack(list(scalars.values()))).tolist()
        seconds = time.perf_counter() - self.start
        num_steps = state.global_step - self.first_step
        row = {"step": state.global_step, "epoch": state.epoch, **dict(zip(scalars, values, strict=True))}
        row["lr"] = state.optimizer.param_groups[0]["lr"]
        row["pairs_per_second"] = num_steps * self.plan.pairs_per_step / seconds
        row["data_wait_share"] = (self.loader.wait_seconds - self.start_wait) / seconds
        row["peak_memory_gib"] = peak_memory()
        self.logger.row(row)
        if not self.has_told_time:
            remaining = (self.plan.total_steps - state.global_step) * seconds / num_steps
            self.logger.info(f"expected time for the remaining steps: {duration(remaining)}")
            self.has_told_time = True
        elif self.loader.advice and row["data_wait_share"] > MUCH_WAITING:  # not in the first row: workers start there
            share = f"{row['data_wait_share']:.0%}"
            self.logger.info(f"{share} of the time goes into waiting for images; {self.loader.advice}")
            self.loader.advice = ""
        self._restart(state.global_step)


def peak_memory() -> float:
    """Return the most memory held so far in GiB: the first GPU's, or this process's on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

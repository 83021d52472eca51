"""Averages of a run: the loss's scalars on the device, and the speed on the clock."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dataloader.data_loaders import TrainLoader
from trainer.loss import Scalars
from utils.device import peak_memory
from utils.errors import UserError

MUCH_WAITING = 0.1  # of the time: an image cache is then worth its disk space


class TrainMeter:
    """Means of the scalars of the losses since the last `reset`, and counts of skipped steps.

    Everything stays on the device until it is read: an update does not synchronize. `expected_row`: this many skipped
    steps in a row are not worth a warning.
    """

    def __init__(self, device: torch.device, expected_row: int = 0) -> None:
        self.device = device
        self.expected_row = expected_row
        self.sums: Scalars = {}  # and num_losses, their number
        self.skipped, self.skipped_in_a_row, self.longest_row = torch.zeros(3, dtype=torch.int64, device=device)
        self.reported = 0  # skipped steps that were logged

    def update(self, losses: Sequence[Scalars], is_skipped: Tensor) -> None:
        """Add the losses of one step; non-finite ones are excluded. `is_skipped`: bool scalar on the device."""
        for scalars in losses:
            named = {**scalars, "num_losses": torch.ones_like(scalars["loss"])}
            values = torch.where(torch.isfinite(scalars["loss"]), torch.stack(list(named.values())), 0)
            totals = torch.stack([*self.sums.values()]) + values if self.sums else values  # one kernel for all of them
            self.sums = dict(zip(named, totals.unbind(), strict=True))
        self.skipped = self.skipped + is_skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * is_skipped
        self.longest_row = torch.maximum(self.longest_row, self.skipped_in_a_row)

    def means(self) -> Scalars:
        """Return the means, scalars on the device: NaN if every loss was non-finite."""
        return {name: total / self.sums["num_losses"] for name, total in self.sums.items() if name != "num_losses"}

    def reset(self) -> None:
        """Begin new means; the counts go on."""
        self.sums = {}

    def check_skipped(self, max_in_a_row: int, logger: logging.Logger) -> None:
        """Log the number of newly skipped steps. Raises UserError after `max_in_a_row` consecutive skipped steps."""
        skipped, longest_row = torch.stack([self.skipped, self.longest_row]).tolist()
        if skipped > self.reported:
            if longest_row > self.expected_row:
                logger.warning(f"skipped {skipped - self.reported} steps with non-finite gradients ({skipped} in all)")
            self.reported = skipped
        if longest_row >= max_in_a_row:
            raise UserError(
                f"{max_in_a_row} consecutive steps had non-finite gradients; lower the learning rate or set "
                "max_grad_norm, and continue from the newest checkpoint with --resume auto"
            )
        self.longest_row = self.skipped_in_a_row

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run continues with, on the CPU."""
        counts = {"skipped": self.skipped.item(), "skipped_in_a_row": self.skipped_in_a_row.item()}
        return {"sums": {name: total.cpu() for name, total in self.sums.items()}, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.sums = {name: total.to(self.device) for name, total in state["sums"].items()}
        self.skipped, self.skipped_in_a_row = torch.tensor(
            [state["skipped"], state["skipped_in_a_row"]], device=self.device
        )
        self.reported, self.longest_row = state["skipped"], self.skipped_in_a_row


class SpeedMeter:
    """Pairs per second, the share of time spent waiting for data, and peak memory, since the last `read`."""

    def __init__(self, batches: TrainLoader, pairs_per_step: int, global_step: int) -> None:
        self.batches = batches
        self.pairs_per_step = pairs_per_step
        self.num_reads = 0
        self._restart(global_step)

    def _restart(self, global_step: int) -> None:
        self.first_step = global_step
        self.start = time.perf_counter()
        self.start_wait = self.batches.wait.seconds()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the time."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def read(self, global_step: int) -> dict[str, float]:
        """Return the columns of the log and begin anew."""
        seconds = time.perf_counter() - self.start
        row = {
            "pairs_per_second": (global_step - self.first_step) * self.pairs_per_step / seconds,
            "data_wait_share": (self.batches.wait.seconds() - self.start_wait) / seconds,
            "peak_memory_gib": peak_memory(self.batches.device),
        }
        self.num_reads += 1
        self._restart(global_step)
        return row

    def advice(self, row: dict[str, float]) -> str:
        """Return once what would help a run that waits for its data, else nothing."""
        is_warm = self.num_reads > 1  # the first row includes the start of the workers
        if not (is_warm and self.batches.advice and row["data_wait_share"] > MUCH_WAITING):
            return ""
        advice, self.batches.advice = self.batches.advice, ""
        return f"{row['data_wait_share']:.0%} of the time is spent waiting for images; {advice}"

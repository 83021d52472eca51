"""Why a run should stop before its last step: a signal, or a limit of its time."""

import os
import re
import signal
import time
from types import FrameType

from trainer.parallel import Runtime

STOPPED = 75  # the exit status: EX_TEMPFAIL, "try again later"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption:
    """Within this context SIGTERM, SIGINT and SIGUSR1 ask the run to stop after its step; a second Ctrl-C ends it.

    `reason` says what stopped it, empty while nothing has. `time_limit` is in seconds from `start`, a time of
    `time.monotonic`; the run stops early enough to save within it.
    """

    def __init__(self, time_limit: float | None, start: float) -> None:
        self.deadline = None if time_limit is None else start + time_limit
        self.limit_reason = "" if time_limit is None else f"the time limit of {time_limit:.0f} s"
        self.reason = ""
        self._signal = ""
        self._last_check: float | None = None
        self._longest_step = 0.0

    def __enter__(self) -> "Interruption":
        self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def is_due(self, runtime: Runtime, save_seconds: float) -> bool:
        """Return whether to save, which takes `save_seconds`, and stop. Each process calls it, and all agree."""
        now = time.monotonic()
        if self._last_check is not None:
            self._longest_step = max(self._longest_step, now - self._last_check)
        self._last_check = now
        reserve = 2 * (self._longest_step + save_seconds)
        reason = self._signal
        if not reason and self.deadline is not None and now + reserve > self.deadline:
            reason = self.limit_reason
        if runtime.any(bool(reason)):
            self.reason = reason or "a signal to another process"
        return bool(self.reason)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == "SIGINT":
            os._exit(130)
        self._signal = signal.Signals(number).name


def parse_duration(text: str) -> float:
    """Return the seconds of "90s", "45m", "11.5h" or "11:30:00". Raises ValueError for anything else."""
    if clock := re.fullmatch(r"([0-9]+):([0-5][0-9]):([0-5][0-9])", text):
        hours, minutes, seconds = map(int, clock.groups())
        return 3600 * hours + 60 * minutes + seconds
    if amount := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh])", text):
        return float(amount[1]) * {"s": 1, "m": 60, "h": 3600}[amount[2]]
    raise ValueError(f"{text!r} is not a time")

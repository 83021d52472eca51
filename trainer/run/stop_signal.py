"""Stopping a run before its last step: a signal, or a limit on its time."""

import os
import signal
import time
from types import FrameType

from trainer.parallel import Runtime

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]  # Windows: two


class StopSignal:
    """Within this context SIGTERM, SIGINT and SIGUSR1 ask the run to stop after its step; a second Ctrl-C exits.

    `reason` states what stopped the run; it is empty until then. `time_limit` is in seconds from `start`, a time of
    `time.monotonic`; the run stops early enough to save within it.
    """

    def __init__(self, time_limit: float | None, start: float) -> None:
        self.deadline = None if time_limit is None else start + time_limit
        self.limit_reason = "" if time_limit is None else f"the time limit of {time_limit:.0f} s"
        self.reason = ""
        self._signal = ""
        self._last_check: float | None = None
        self._longest_step = 0.0

    @property
    def exit_status(self) -> int:
        """75 (EX_TEMPFAIL, "try again later") if the run was stopped, else 0."""
        return 75 if self.reason else 0

    def __enter__(self) -> "StopSignal":
        self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self, runtime: Runtime, save_seconds: float) -> bool:
        """Return whether to save, which takes `save_seconds`, and stop.

        Every process calls it after a step, and all of them get the same answer.
        """
        now = time.monotonic()
        if self._last_check is not None:
            self._longest_step = max(self._longest_step, now - self._last_check)
        self._last_check = now
        reserve = 2 * (self._longest_step + save_seconds)
        reason = self._signal
        if not reason and self.deadline is not None and now + reserve > self.deadline:
            reason = self.limit_reason
        if runtime.any_rank(bool(reason)):
            self.reason = reason or "a signal to another process"
        return bool(self.reason)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == "SIGINT":
            os._exit(130)
        self._signal = signal.Signals(number).name

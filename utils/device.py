"""Choose the device that a model runs on, and ask what it can do and what it does."""

import sys
import time

import torch

from utils.errors import UserError


def choose_device(name: str = "auto") -> torch.device:
    """Return `cpu`, `cuda` or `mps`; `auto` is the first GPU that CUDA lists, or else the CPU.

    Raises UserError if PyTorch has no such device on this machine.
    """
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = ("cuda" if usable["cuda"] else "cpu") if name == "auto" else name
    if not usable.get(name):
        raise UserError(f"the device {name} is not available to PyTorch on this machine; choose auto or cpu")
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)


def has_native_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16 itself. Emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # PyTorch has no public question
    return device.type == "cpu" and is_supported is not None and is_supported()


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in GiB: of the GPU, or of this process on a CPU (NaN on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class IdleClock:
    """Sums the time in which `device` had nothing to do within `with clock:`.

    A GPU still works on what was queued while the host waits: two events around the block, on the GPU's own timeline,
    are as far apart as it stood still. A CPU stands still for the whole block.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.total = 0.0

    def __enter__(self) -> None:
        self.start = self._now()

    def __exit__(self, *error: object) -> None:
        if self.is_cuda:
            self.events.append((self.start, self._now()))
        else:
            self.total += self._now() - self.start

    def seconds(self) -> float:
        """Return the sum so far. Waits for the GPU."""
        for start, end in self.events:
            end.synchronize()
            self.total += start.elapsed_time(end) / 1000
        self.events = []
        return self.total

    def _now(self) -> "float | torch.cuda.Event":
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

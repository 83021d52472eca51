"""Which devices and processes a run uses, in which precision, and how the model is spread over them.

One process: the CPU, one GPU, or several under DataParallel. `torchrun`: one process a GPU (or on CPUs), under
DistributedDataParallel.
"""

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import CLIP
from model.recompute import frozen_statistics
from trainer.config import TrainConfig
from utils.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Result = TypeVar("Result")
TIMEOUT = timedelta(hours=2)  # the other processes wait while the first builds a cache


@dataclass(frozen=True)
class Runtime:
    """What this process runs on: `num_devices` GPUs under DataParallel, one GPU, or the CPU."""

    device: torch.device  # where the loss is computed
    num_devices: int
    rank: int = 0
    local_rank: int = 0  # among the processes of this machine
    world_size: int = 1
    precision: str = "fp32"  # fp32, tf32, bf16 or fp16
    control: dist.ProcessGroup | None = None  # the processes' CPUs, so that agreeing does not wait for their GPUs

    @property
    def is_main(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    @property
    def description(self) -> str:
        if self.device.type == "cpu":
            text = f"CPU ({torch.get_num_threads()} threads)"
        else:
            text = torch.cuda.get_device_name(self.device)
        if self.num_devices > 1:
            text = f"{self.num_devices} x {text} (DataParallel; torchrun --nproc_per_node={self.num_devices} is faster)"
        if self.world_size > 1:
            text = f"{self.world_size} processes, each on {text}"
        return f"{text}, {self.precision}"

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do what the others then find done; then one a machine, whose disk may be another."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self._meet()
        yield
        for _ in range(2 - turn):
            self._meet()

    def _meet(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over all processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's BatchNorm statistics, as DistributedDataParallel does before each step."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def collect(self, value: Any) -> list[Any]:
        """Return every process's `value`, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, work: Callable[[], Result]) -> Result:
        """Do `work` in the main process alone, and return its result in every process."""
        results = [work() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(results, group=self.control)
        return results[0]

    def close(self, status: int = 0) -> None:
        """Leave the other processes, when all are done: with a status, and under torchrun, the process ends here.

        It ends without cleaning up, since gloo's threads hang or abort one orderly exit in some twenty.
        """
        if self.world_size > 1:
            dist.barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        if status:
            sys.exit(status)


def init_runtime(config: TrainConfig) -> Runtime:
    """Seed every generator, join the processes that torchrun started, choose the device and set its precision.

    Without torchrun: up to `n_gpu` of the visible GPUs, else the CPU. Raises UserError where the precision cannot be
    had.
    """
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    has_gpu = config.n_gpu > 0 and torch.cuda.is_available()
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if world_size > 1:
        if has_gpu and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes than this machine has GPUs, {torch.cuda.device_count()}; give that "
                "number to --nproc_per_node"
            )
        device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
        num_devices = 1
        if has_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if has_gpu else "gloo", timeout=TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    else:
        device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
        num_devices = max(1, min(config.n_gpu, torch.cuda.device_count()))
        control = None
    runtime = Runtime(device, num_devices, rank, local_rank, world_size, _precision(config, device), control)
    if config.compile and num_devices > 1:
        raise UserError("compile does not go with DataParallel; use torchrun, or n_gpu 1")
    if config.sync_batchnorm and (world_size == 1 or not has_gpu):
        raise UserError("sync_batchnorm is for several GPUs under torchrun; set it to false")
    return runtime


def _precision(config: TrainConfig, device: torch.device) -> str:
    """Choose, check and set the precision. bf16 is the default of a GPU that has it, fp32 of anything else."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision in ("tf32", "fp16") and device.type != "cuda":
        raise UserError(f"precision {precision} needs a GPU; use fp32")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


class Autocast(nn.Module):
    """A model whose forward pass runs in the run's precision, whichever thread or process calls it."""

    def __init__(self, model: CLIP, runtime: Runtime) -> None:
        super().__init__()
        self.model = model
        self.device_type = runtime.device.type
        self.dtype = DTYPES.get(runtime.precision)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.model(images, tokens)


def wrap(model: CLIP, runtime: Runtime, config: TrainConfig) -> nn.Module:
    """Return what the training loop calls: the model in its precision, compiled if asked for, over all devices.

    `model` itself stays the one that is saved and evaluated; its names do not change.
    """
    if config.sync_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.compile:
        model.compile()
    wrapped = Autocast(model, runtime)
    if runtime.world_size > 1:
        device_ids = [runtime.device.index] if runtime.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(wrapped, device_ids=device_ids, gradient_as_bucket_view=True)
        if runtime.device.type == "cpu":
            _settle_buckets(wrapped, model)
        return wrapped
    if runtime.num_devices > 1:
        return nn.DataParallel(wrapped, device_ids=list(range(runtime.num_devices)))
    return wrapped


def _settle_buckets(parallel_model: nn.Module, model: CLIP) -> None:
    """Let DistributedDataParallel see one backward pass, after which it orders its buckets of gradients anew.

    Else the first step of a resumed run would add them up in another order than the run that was not interrupted.
    """
    size = model.config.image_resolution
    with frozen_statistics(model):
        images, texts = parallel_model(torch.zeros(2, 3, size, size), torch.zeros(2, 8, dtype=torch.int64))
    temperature = [parameter for parameter in (model.logit_scale, model.logit_bias) if parameter is not None]
    (images.sum() + texts.sum() + sum(temperature)).backward()
    model.zero_grad()


def without_sync(parallel_model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Return a context in which gradients are summed over the processes only for the last batch of a step."""
    is_distributed = isinstance(parallel_model, nn.parallel.DistributedDataParallel)
    return parallel_model.no_sync() if is_distributed and not is_last else contextlib.nullcontext()


class _Gather(torch.autograd.Function):
    """Concatenate every process's rows; backward gives each the gradient that all of them have for its rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes, [world_size * batch, dim], and where this one's begin. Differentiable.

    Every process needs the same number of rows. A loss that is the mean of the processes' losses, which is how
    DistributedDataParallel combines their gradients, then has the gradients of one process with all rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    return _Gather.apply(rows), dist.get_rank() * len(rows)


def default_device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

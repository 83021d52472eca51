"""The devices and processes of a run, its precision, and how the model is spread over them.

One process: the CPU, one GPU, or several GPUs under DataParallel. Under `torchrun`: one process per GPU (or per share
of the CPU) with DistributedDataParallel.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import CLIP
from model.recompute import frozen_statistics
from trainer.config import TrainConfig
from utils.device import choose_device, has_native_bf16
from utils.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Result = TypeVar("Result")
TIMEOUT = timedelta(hours=2)  # the other processes wait while rank 0 builds a cache


@dataclass(frozen=True)
class Runtime:
    """What this process runs on: one device, or `num_devices` GPUs under DataParallel."""

    device: torch.device  # of the loss
    num_devices: int
    rank: int = 0
    local_rank: int = 0  # among the processes of this machine
    world_size: int = 1
    precision: str = "fp32"  # fp32, tf32, bf16 or fp16
    reason: str = ""  # for the precision, where `auto` chose it
    cpu_group: dist.ProcessGroup | None = None  # for agreements that should not wait for the GPUs

    @property
    def is_main(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    @property
    def description(self) -> str:
        """The devices, processes and precision in a line."""
        is_cuda = self.device.type == "cuda"
        cpu = f"{self.device.type.upper()} ({torch.get_num_threads()} threads)"
        text = torch.cuda.get_device_name(self.device) if is_cuda else cpu
        if self.num_devices > 1:
            text = f"{self.num_devices} x {text} (DataParallel; torchrun --nproc_per_node={self.num_devices} is faster)"
        if self.world_size > 1:
            text = f"{self.world_size} processes, each on {text}"
        return f"{text}, {self.precision}{self.reason and f' ({self.reason})'}"

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on one process per other machine (own disk), then on the rest."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for round_ in range(3):
            if round_ == turn:
                yield
            elif self.world_size > 1:
                dist.barrier(self.cpu_group)  # NCCL's barrier would keep the GPUs busy

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values`, of any shape, over all processes."""
        total = values.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total / self.world_size

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy rank 0's BatchNorm statistics to every process."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process."""
        flags = torch.tensor(int(flag))
        if self.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flags)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every process's `value`, ordered by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Call `work` on rank 0 alone and return its result in every process."""
        results = [work() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(results, group=self.cpu_group)
        return results[0]

    def close(self, status: int = 0) -> None:
        """Wait for all processes and exit with `status`; without torchrun and with status 0, return.

        Under torchrun the process skips Python's cleanup: gloo's threads hang or abort in about one of twenty exits.
        """
        if self.world_size > 1:
            dist.barrier(self.cpu_group)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        if status:
            sys.exit(status)


def init_runtime(config: TrainConfig) -> Runtime:
    """Seed PyTorch, join the processes that torchrun started, choose the device and set its precision.

    Without torchrun: up to `n_gpu` of the visible GPUs, or the CPU. Raises UserError if the device or the precision
    is not available, and for options that the devices do not support.
    """
    torch.manual_seed(config.seed)
    device = choose_device("cpu" if config.n_gpu == 0 else config.device)
    has_gpu = device.type == "cuda"
    rank, local_rank, world_size = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)
    if num_tasks > 1 and "RANK" not in os.environ:
        raise UserError(
            f"SLURM starts {num_tasks} tasks, each of which would be a run of its own; use srun --ntasks-per-node=1 "
            "torchrun ... train.py for one run on all GPUs, or srun --ntasks=1 python train.py for one process"
        )
    num_devices, cpu_group = 1, None
    if world_size > 1:
        if has_gpu:
            num_gpus = torch.cuda.device_count()
            if local_rank >= num_gpus:
                raise UserError(f"torchrun started more processes than GPUs; use --nproc_per_node={num_gpus}")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        device_id = device if has_gpu else None  # else NCCL guesses the GPU from the rank
        dist.init_process_group("nccl" if has_gpu else "gloo", timeout=TIMEOUT, device_id=device_id)
        cpu_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    elif has_gpu:
        num_devices = min(config.n_gpu, torch.cuda.device_count())
    precision, reason = choose_precision(config.precision, device)
    if has_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if config.compile and num_devices > 1:
        raise UserError("compile does not work with DataParallel; use torchrun, or n_gpu 1")
    if config.sync_batchnorm and (world_size == 1 or not has_gpu):
        raise UserError("sync_batchnorm needs several GPUs under torchrun; set it to false")
    return Runtime(device, num_devices, rank, local_rank, world_size, precision, reason, cpu_group)


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """Return fp32, tf32, bf16 or fp16, and why `auto` chose it. Raises UserError if the device does not have it."""
    if precision == "auto":
        if has_native_bf16(device):
            return "bf16", "the device computes it natively"
        if device.type == "cuda":
            return "fp16", "the GPU only emulates bf16"
        return "fp32", "the device has no native bf16"
    if precision in ("tf32", "fp16") and device.type != "cuda":
        raise UserError(f"precision {precision} needs a GPU; use fp32")
    return precision, ""


class Autocast(nn.Module):
    """A model whose forward pass runs in the run's precision, in whichever thread or process it is called."""

    def __init__(self, model: CLIP, runtime: Runtime) -> None:
        super().__init__()
        self.model = model
        self.device_type = runtime.device.type
        self.dtype = DTYPES.get(runtime.precision)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.model(images, tokens)


def wrap(model: CLIP, runtime: Runtime, config: TrainConfig) -> nn.Module:
    """Return what the training loop calls: the model in its precision, compiled if configured, on all devices.

    The parameters stay those of `model`, which keeps its names and is what a run saves and evaluates.
    """
    if config.sync_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.compile:
        model.compile()
    wrapped = Autocast(model, runtime)
    if runtime.world_size > 1:
        device_ids = [runtime.device.index] if runtime.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(
            wrapped,
            device_ids=device_ids,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # only evaluation uses BatchNorm's statistics: `Runtime.broadcast_buffers`
        )
        if runtime.device.type == "cpu":
            _settle_buckets(wrapped, model)
        return wrapped
    if runtime.num_devices > 1:
        return nn.DataParallel(wrapped, device_ids=list(range(runtime.num_devices)))
    return wrapped


def _settle_buckets(parallel_model: nn.Module, model: CLIP) -> None:
    """Run one backward pass, after which DistributedDataParallel reorders its gradient buckets.

    Without it the first step of a resumed run would sum gradients in another order than the uninterrupted run.
    """
    size = model.config.image_resolution
    with frozen_statistics(model):
        images, texts = parallel_model(torch.zeros(2, 3, size, size), torch.zeros(2, 8, dtype=torch.int64))
    (images.sum() + texts.sum() + sum(model.temperature)).backward()
    model.zero_grad()


def without_sync(parallel_model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Return a context in which processes sum their gradients only if this is the last batch of a step."""
    is_distributed = isinstance(parallel_model, nn.parallel.DistributedDataParallel)
    return parallel_model.no_sync() if is_distributed and not is_last else contextlib.nullcontext()


class _Gather(torch.autograd.Function):
    """Concatenate the rows of all processes; backward returns the sum of all processes' gradients for the own rows."""

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
    """Return the rows of all processes, [world_size * batch, dim], and the index of this process's first row.

    `rows`: [batch, dim], the same shape in every process. Differentiable: a loss that is the mean of the processes'
    losses, as DistributedDataParallel averages their gradients, has the gradients of one process with all rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    return _Gather.apply(rows), dist.get_rank() * len(rows)

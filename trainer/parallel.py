"""Which devices a run uses, and how the model is spread over them."""

from dataclasses import dataclass

import torch
from torch import nn

from trainer.config import TrainConfig


@dataclass(frozen=True)
class Runtime:
    """The devices of a run: `num_devices` GPUs under DataParallel, one GPU, or the CPU."""

    device: torch.device  # where the loss is computed
    num_devices: int

    @property
    def description(self) -> str:
        if self.device.type == "cpu":
            return f"CPU ({torch.get_num_threads()} threads)"
        name = torch.cuda.get_device_name(self.device)
        return f"{self.num_devices} x {name} (DataParallel)" if self.num_devices > 1 else name


def init_runtime(config: TrainConfig) -> Runtime:
    """Seed torch and choose the devices: up to `n_gpu` of the visible GPUs, else the CPU."""
    torch.manual_seed(config.seed)
    num_gpus = min(config.n_gpu, torch.cuda.device_count())
    return Runtime(torch.device("cuda", 0) if num_gpus else torch.device("cpu"), max(1, num_gpus))


def wrap(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Spread each batch over the devices. Both encoders run on each; features come back together, for one loss."""
    if runtime.num_devices == 1:
        return model
    return nn.DataParallel(model, device_ids=list(range(runtime.num_devices)))


def default_device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

"""Choose the device that a model runs on."""

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

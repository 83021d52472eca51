"""The optimizer's parameter groups, the learning-rate schedule, and the bound on the temperature."""

import math

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return fused AdamW that decays matrices and kernels only, or everything with `decay_all`."""
    decayed, spared = [], []
    for parameter in model.parameters():
        is_weight = parameter.ndim >= 2  # gains, biases, class_embedding and logit_scale have fewer axes
        (decayed if is_weight or config.decay_all else spared).append(parameter)
    params = config.params
    groups = [{"params": decayed, "weight_decay": params.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=params.lr, betas=params.betas, eps=params.eps, fused=True)


def cosine_warmup_lr(step: int, *, base_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0: linear warmup, then a cosine to 0.

    The warmup's first step has base_lr / warmup_steps, not 0, so that no step is wasted.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_logit_scale(logit_scale: Tensor) -> None:
    """Keep the log temperature in [0, ln 100], so that logits are never scaled by more than 100."""
    logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the L2 norm of all gradients as one scalar tensor, left on the device."""
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return torch.stack(norms).norm()

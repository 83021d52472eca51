"""The optimizer's parameter groups, the learning-rate schedule, and the bound on the temperature."""

import math

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


def build_optimizer(model: nn.Module, config: OptimizerConfig, weight_decay: float) -> torch.optim.AdamW:
    """Return fused AdamW that decays matrices and kernels only, or everything with `decay_all`."""
    decayed, spared = [], []
    for parameter in model.parameters():
        is_weight = parameter.ndim >= 2  # gains, biases, class_embedding and logit_scale have fewer axes
        (decayed if is_weight or config.decay_all else spared).append(parameter)
    params = config.params
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
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


class BatchNormStatistics:
    """A model's BatchNorm statistics, which a step that is skipped must not leave changed."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.sizes = [buffer.numel() for buffer in self.buffers]

    def keep(self) -> None:
        """Remember them as they are."""
        self.kept = self._flat()

    def put_back(self, where: Tensor) -> None:
        """Make them what they were if `where`, a bool scalar on their device, is true."""
        if self.buffers:
            parts = torch.where(where, self.kept, self._flat()).split(self.sizes)
            shaped = [part.view_as(buffer) for part, buffer in zip(parts, self.buffers, strict=True)]
            torch._foreach_copy_(self.buffers, shaped)  # one kernel rather than a hundred

    def _flat(self) -> Tensor | None:
        return torch.cat([buffer.flatten() for buffer in self.buffers]) if self.buffers else None


@torch.no_grad()
def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    statistics: BatchNormStatistics,
    max_grad_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """Update the weights, or leave the model as it was where a gradient is not finite.

    Returns the L2 norm of all gradients before any clipping, and whether the step was skipped: scalars on the device,
    which nothing here waits for. A loss that is not finite has such gradients too, and under torchrun all processes
    have the same.
    """
    scaler.unscale_(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    is_skipped = ~torch.isfinite(grad_norm)
    optimizer.found_inf = is_skipped.float()  # fused AdamW then does nothing
    scaler.step(optimizer)
    scaler.update()
    statistics.put_back(is_skipped)
    return grad_norm, is_skipped

"""The optimizer's parameter groups, one guarded update, and the bound on the temperature."""

import math

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


def build_optimizer(model: nn.Module, config: OptimizerConfig, steps_per_epoch: int) -> torch.optim.AdamW:
    """Return fused AdamW. Matrices and kernels decay; with `decay_all` every parameter does."""
    decayed, excluded = [], []
    for parameter in model.parameters():
        is_weight = parameter.ndim >= 2  # gains, biases, class_embedding and logit_scale have fewer axes
        (decayed if is_weight or config.decay_all else excluded).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay(steps_per_epoch)},
        {"params": excluded, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    params = config.params
    return torch.optim.AdamW(groups, lr=params.lr, betas=params.betas, eps=params.eps, fused=True)


@torch.no_grad()
def clip_logit_scale(logit_scale: Tensor) -> None:
    """Clamp the log temperature to [0, ln 100], so that logits are never scaled by more than 100."""
    logit_scale.clamp_(0, MAX_LOGIT_SCALE)


class BatchNormStatistics:
    """A model's BatchNorm statistics, so that a skipped step can restore them."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.sizes = [buffer.numel() for buffer in self.buffers]

    def snapshot(self) -> None:
        """Copy the current statistics."""
        self.copy = self._flat()

    def restore_where(self, condition: Tensor) -> None:
        """Restore the last snapshot if `condition`, a bool scalar on the buffers' device, is true."""
        if self.buffers:
            parts = torch.where(condition, self.copy, self._flat()).split(self.sizes)
            shaped = [part.view_as(buffer) for part, buffer in zip(parts, self.buffers, strict=True)]
            torch._foreach_copy_(self.buffers, shaped)  # one kernel instead of a hundred

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
    """Update the weights, or leave the model unchanged if a gradient is not finite.

    Returns the L2 norm of all gradients before clipping (float32) and whether the step was skipped (bool): scalars on
    the device, without a synchronization. A non-finite loss has non-finite gradients, and under torchrun all
    processes have the same gradients, so all of them skip.
    """
    scaler.unscale_(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    is_skipped = ~torch.isfinite(grad_norm)
    optimizer.found_inf = is_skipped.float()  # fused AdamW does nothing where this is 1
    scaler.step(optimizer)
    scaler.update()
    statistics.restore_where(is_skipped)
    return grad_norm, is_skipped

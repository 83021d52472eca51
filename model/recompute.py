"""Run a forward pass a second time without counting the batch twice in BatchNorm's statistics."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of all BatchNorm layers in `module` unchanged, in training mode too."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches)


def recomputed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call `module` without storing its activations; the backward pass recomputes them (Chen et al. 2016)."""
    if torch.compiler.is_compiling():  # compiled code cannot enter contexts, and updates the statistics once anyway
        return checkpoint(module, *args, use_reentrant=False, **kwargs)
    contexts = lambda: (contextlib.nullcontext(), frozen_statistics(module))  # noqa: E731
    return checkpoint(module, *args, use_reentrant=False, context_fn=contexts, **kwargs)

"""Forward passes that are made twice: to save memory, or to see more pairs at once."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm in training mode leave its running averages alone: of two passes over a batch one counts."""
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
    """Call `module` without keeping what is inside: the backward pass computes it again (Chen et al. 2016)."""
    contexts = lambda: (contextlib.nullcontext(), frozen_statistics(module))  # noqa: E731
    return checkpoint(module, *args, use_reentrant=False, context_fn=contexts, **kwargs)

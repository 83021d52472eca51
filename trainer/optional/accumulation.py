"""One loss over more pairs than fit into memory at once."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dataloader.sampler import Batch
from model.recompute import frozen_statistics
from trainer.loss import Objective, Scalars
from trainer.parallel import without_sync


def backward_in_chunks(
    parallel_model: nn.Module, batches: Sequence[Batch], objective: Objective, scaler: torch.amp.GradScaler
) -> Scalars:
    """Add to `.grad` the gradients of one loss over the pairs of all batches; return its scalars to log.

    GradCache (Gao et al. 2021, section 3.2) uses the memory of one batch at the cost of a second forward pass. First
    the features of every batch without a graph; then the loss and its gradients with respect to features and
    temperature; then, batch by batch and under the same random state, the forward pass again and the backward pass
    from those gradients. The result equals one large batch except for BatchNorm, which normalizes each batch by its own
    statistics and updates its running averages once per batch.
    """
    model = objective.model
    random_states, features = [], []
    with torch.no_grad(), frozen_statistics(model):
        for batch in batches:
            random_states.append(_random_state(batch.images.device))
            features.append(parallel_model(batch.images, batch.tokens))
    images, texts = (torch.cat(part).requires_grad_() for part in zip(*features, strict=True))
    with without_sync(parallel_model, is_last=False):
        loss, scalars = objective(images, texts, torch.cat([batch.indices for batch in batches]))
        scaler.scale(loss).backward()

    start = 0
    for number, (batch, random_state) in enumerate(zip(batches, random_states, strict=True), start=1):
        is_last, end = number == len(batches), start + len(batch.tokens)
        with without_sync(parallel_model, is_last), _replayed(random_state, batch.images.device):
            own_images, own_texts = parallel_model(batch.images, batch.tokens)
            product = (own_images * images.grad[start:end]).sum() + (own_texts * texts.grad[start:end]).sum()
            if is_last:  # DistributedDataParallel waits for every parameter in the backward pass that it sums
                product = product + sum(0 * parameter for parameter in model.temperature)
            product.backward()
        start = end
    return scalars


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Run the block from an earlier random state, then continue from the present one."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield

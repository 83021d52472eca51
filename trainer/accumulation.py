"""One loss over more pairs than fit into memory at once."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dataloader.batch import Batch
from model import CLIP
from model.recompute import frozen_statistics
from trainer.loss import Objective
from trainer.parallel import without_sync


def backward_in_chunks(
    model: CLIP, parallel_model: nn.Module, chunks: Sequence[Batch], objective: Objective, scaler: torch.amp.GradScaler
) -> dict[str, Tensor]:
    """Leave in `.grad` the gradients of one loss over all pairs of all `chunks`, in the memory of one (GradCache).

    First every chunk's features without a graph (Gao et al. 2021, section 3.2), then the loss and its gradients to
    the features and the temperature, once; then chunk by chunk the forward pass again, under the same random state,
    and back from those gradients. Equal to one large batch, but for BatchNorm: it normalizes each chunk by its own
    statistics, and counts them in its running averages once.
    """
    states, features = [], []
    with torch.no_grad(), frozen_statistics(model):
        for chunk in chunks:
            states.append(_random_state(chunk.images.device))
            features.append(parallel_model(chunk.images, chunk.tokens))
    images, texts = (torch.cat(part).requires_grad_() for part in zip(*features, strict=True))
    with without_sync(parallel_model, is_last=False):
        loss, scalars = objective(images, texts, torch.cat([chunk.indices for chunk in chunks]))
        scaler.scale(loss).backward()

    start = 0
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        is_last = number == len(chunks) - 1
        end = start + len(chunk.tokens)
        with without_sync(parallel_model, is_last), _replayed(state, chunk.images.device):
            own_images, own_texts = parallel_model(chunk.images, chunk.tokens)
            product = (own_images * images.grad[start:end]).sum() + (own_texts * texts.grad[start:end]).sum()
            if is_last:  # DistributedDataParallel waits for every parameter in the backward pass that it sums
                product = product + sum(0 * parameter for parameter in _temperature(model))
            product.backward()
        start = end
    return scalars


def _temperature(model: CLIP) -> list[Tensor]:
    return [parameter for parameter in (model.logit_scale, model.logit_bias) if parameter is not None]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Run a block from an earlier random state, and go on after it from where the random numbers were."""
    now = _random_state(device)
    _set_random_state(state, device)
    yield
    _set_random_state(now, device)


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)

"""Fifty fixed steps: what makes them faster changes the loss by rounding only. The bounds are twice what was seen."""

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F

from model import CLIP
from tests.conftest import TINY
from trainer.config import load_train_config
from trainer.loss import contrastive_loss
from trainer.optim import build_optimizer, clip_logit_scale
from trainer.parallel import Autocast, Runtime

NUM_STEPS, BATCH_SIZE, VOCAB_SIZE = 50, 16, 500


def losses(
    *,
    is_padded: bool = False,
    channels_last: bool = True,
    is_compiled: bool = False,
    precision: str = "fp32",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Train a small ResNet and transformer on the same 50 batches; return the loss of each step."""
    torch.manual_seed(3)
    config = dataclasses.replace(TINY, transformer_layers=2, vocab_size=VOCAB_SIZE)
    model = CLIP(config).to(dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    else:
        model.encode_image = model.visual
    if is_compiled:
        model.compile()
    optimizer = build_optimizer(model, load_train_config({"optimizer.params.lr": 3e-4}).optimizer, steps_per_epoch=1)
    step_model = Autocast(model, Runtime(torch.device("cpu"), 1, precision=precision)).train()
    generator = torch.Generator().manual_seed(4)
    pool = torch.randn(BATCH_SIZE * 2, 3, 32, 32, generator=generator)  # small enough to be memorized
    texts = torch.randint(1, VOCAB_SIZE - 1, (BATCH_SIZE * 2, 16), generator=generator)
    texts[:, -4:] = 0
    texts[:, -5] = VOCAB_SIZE - 1  # the end marker
    curve = []
    for _ in range(NUM_STEPS):
        chosen = torch.randperm(len(pool), generator=generator)[:BATCH_SIZE]
        tokens = F.pad(texts[chosen], (0, 61)) if is_padded else texts[chosen]
        optimizer.zero_grad()
        loss, _ = contrastive_loss(*step_model(pool[chosen].to(dtype), tokens), model.logit_scale.exp())
        loss.backward()
        optimizer.step()
        clip_logit_scale(model.logit_scale)
        curve.append(loss.detach())
    return torch.stack(curve).float()


@pytest.fixture(scope="module")
def curve() -> torch.Tensor:
    return losses()


@pytest.mark.slow
def test_the_loss_falls(curve):
    assert curve[:5].mean() > 2.5 and curve[-5:].mean() < 0.7 * curve[:5].mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "bound"),
    [({"is_padded": True}, 1e-4), ({"channels_last": False}, 1e-4), ({"precision": "bf16"}, 0.06)],
    ids=["padded", "channels_first", "bf16"],
)
def test_savings_change_the_curve_by_rounding_only(curve, changes, bound):
    assert (losses(**changes) - curve).abs().max() < bound


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compilation_changes_the_curve_by_rounding_only(curve):
    assert (losses(is_compiled=True) - curve).abs().max() < 5e-4

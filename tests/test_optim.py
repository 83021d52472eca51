import math

import pytest
import torch
from torch import nn

from model import CLIP
from tests.conftest import TINY
from trainer.config import load_train_config
from trainer.optim import (
    BatchNormStatistics,
    build_optimizer,
    clip_logit_scale,
    cosine_warmup_lr,
    set_lr,
    take_step,
)


def lr(step: int) -> float:
    return cosine_warmup_lr(step, base_lr=1.0, warmup_steps=4, total_steps=20)


def test_the_schedule_warms_up_linearly_and_then_follows_a_cosine_to_zero():
    assert [lr(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr(4) == 1.0
    assert lr(12) == pytest.approx(0.5)
    assert lr(19) == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert lr(20) == pytest.approx(0.0)
    assert all(lr(step) > lr(step + 1) for step in range(4, 20))


def test_a_schedule_may_have_no_warmup_or_nothing_else():
    assert cosine_warmup_lr(0, base_lr=1.0, warmup_steps=0, total_steps=10) == 1.0
    assert cosine_warmup_lr(9, base_lr=1.0, warmup_steps=10, total_steps=10) == 1.0


def decayed_names(*, decay_all: bool) -> set[str]:
    config = load_train_config([("optimizer.decay_all", decay_all)]).optimizer
    model = CLIP(TINY)
    optimizer = build_optimizer(model, config, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    return {name for name, parameter in model.named_parameters() if id(parameter) in decayed}


def test_gains_biases_and_the_temperature_are_not_decayed():
    decayed = decayed_names(decay_all=False)
    assert not any(name.endswith("bias") for name in decayed)
    assert not decayed & {"logit_scale", "ln_final.weight", "visual.bn1.weight", "transformer.resblocks.0.ln_1.weight"}
    assert decayed >= {"visual.conv1.weight", "token_embedding.weight", "text_projection", "positional_embedding"}


def test_the_reference_decays_everything():
    assert decayed_names(decay_all=True) == {name for name, _ in CLIP(TINY).named_parameters()}


def test_a_timescale_is_the_weight_decay_that_forgets_as_much_in_as_many_epochs():
    fixed = load_train_config([("optimizer.params.weight_decay", 0.3)]).optimizer
    assert fixed.weight_decay(steps_per_epoch=100) == fixed.weight_decay(steps_per_epoch=1000) == 0.3
    params = [("optimizer.params.lr", 1e-3), ("optimizer.params.weight_decay", None)]
    config = load_train_config([*params, ("optimizer.decay_timescale", 2.5)]).optimizer
    for steps_per_epoch in (10, 1000):
        decay_per_step = 1e-3 * config.weight_decay(steps_per_epoch)
        assert (1 - decay_per_step) ** (2.5 * steps_per_epoch) == pytest.approx(math.exp(-1), rel=0.03)


def test_the_optimizer_takes_its_values_from_the_config():
    config = load_train_config([("optimizer.params.betas", [0.8, 0.98]), ("optimizer.params.eps", 1e-6)]).optimizer
    optimizer = build_optimizer(CLIP(TINY), config, weight_decay=0.1)
    assert optimizer.defaults["betas"] == (0.8, 0.98) and optimizer.defaults["eps"] == 1e-6
    set_lr(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize(("value", "expected"), [(-1.0, 0.0), (2.0, 2.0), (5.0, math.log(100))])
def test_the_log_temperature_is_kept_between_zero_and_ln_100(value, expected):
    logit_scale = nn.Parameter(torch.tensor(value))
    clip_logit_scale(logit_scale)
    assert logit_scale.item() == pytest.approx(expected) and logit_scale.requires_grad


def stepped(gradient: float, max_grad_norm: float | None = None) -> tuple[nn.Module, float, bool]:
    """Take one step of a layer and a BatchNorm whose gradients are all `gradient`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    statistics = BatchNormStatistics(model)
    statistics.keep()
    model(torch.full((4, 3), gradient))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer = build_optimizer(model, load_train_config().optimizer, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    grad_norm, is_skipped = take_step(model, optimizer, scaler, statistics, max_grad_norm)
    return model, grad_norm.item(), bool(is_skipped)


def test_the_gradient_norm_is_that_of_all_gradients_together_and_clipping_bounds_it():
    model, grad_norm, is_skipped = stepped(2.0)
    assert grad_norm == pytest.approx(math.sqrt(12 * 4)) and not is_skipped
    assert model[0].weight.grad.max() == 2.0
    model, grad_norm, _ = stepped(2.0, max_grad_norm=1.0)
    assert grad_norm == pytest.approx(math.sqrt(12 * 4))
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("gradient", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_whose_gradients_are_not_finite_changes_nothing(gradient, max_grad_norm):
    torch.manual_seed(0)
    untouched = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model, _, is_skipped = stepped(gradient, max_grad_norm)
    assert is_skipped
    for key, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[key], value) or key.endswith("num_batches_tracked"), key
    after, _, _ = stepped(1.0)
    assert not torch.equal(after[1].running_mean, model[1].running_mean)

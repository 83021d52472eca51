"""Parameter groups, the guarded update, and the bound on the temperature."""

import math

import pytest
import torch
from torch import nn

from model import CLIP
from tests.conftest import TINY
from trainer.config import load_train_config
from trainer.optim import BatchNormStatistics, build_optimizer, clip_logit_scale, take_step


def decayed_names(*, decay_all: bool) -> set[str]:
    model = CLIP(TINY)
    config = load_train_config({"optimizer.decay_all": decay_all}).optimizer
    groups = build_optimizer(model, config, steps_per_epoch=10).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decayed = {id(parameter) for group in groups if group["weight_decay"] > 0 for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in decayed}


def test_gains_biases_and_the_temperature_do_not_decay():
    decayed = decayed_names(decay_all=False)
    assert not any(name.endswith("bias") for name in decayed)
    assert not decayed & {"logit_scale", "ln_final.weight", "visual.bn1.weight", "transformer.resblocks.0.ln_1.weight"}
    assert decayed >= {"visual.conv1.weight", "token_embedding.weight", "text_projection", "positional_embedding"}


def test_decay_all_decays_every_parameter():
    assert decayed_names(decay_all=True) == {name for name, _ in CLIP(TINY).named_parameters()}


def test_a_timescale_forgets_equally_much_per_epoch_for_any_number_of_steps():
    fixed = load_train_config({"optimizer.params.weight_decay": 0.3}).optimizer
    assert fixed.weight_decay(steps_per_epoch=100) == fixed.weight_decay(steps_per_epoch=1000) == 0.3
    changes = {"optimizer.params.lr": 1e-3, "optimizer.params.weight_decay": None, "optimizer.decay_timescale": 2.5}
    config = load_train_config(changes).optimizer
    for steps_per_epoch in (10, 1000):
        decay_per_step = 1e-3 * config.weight_decay(steps_per_epoch)
        assert (1 - decay_per_step) ** (2.5 * steps_per_epoch) == pytest.approx(math.exp(-1), rel=0.03)


def test_the_optimizer_takes_its_values_from_the_config():
    changes = {"lr": 1e-3, "betas": [0.8, 0.98], "eps": 1e-6, "weight_decay": 0.25}
    config = load_train_config({f"optimizer.params.{key}": value for key, value in changes.items()}).optimizer
    optimizer = build_optimizer(CLIP(TINY), config, steps_per_epoch=10)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.98), 1e-6)


@pytest.mark.parametrize(("value", "expected"), [(-1.0, 0.0), (2.0, 2.0), (5.0, math.log(100))])
def test_the_log_temperature_stays_between_0_and_ln_100(value, expected):
    logit_scale = nn.Parameter(torch.tensor(value))
    clip_logit_scale(logit_scale)
    assert logit_scale.item() == pytest.approx(expected) and logit_scale.requires_grad


def step_with(gradient: float, max_grad_norm: float | None = None) -> tuple[nn.Module, float, bool]:
    """Take one step of a layer and a BatchNorm whose gradients are all `gradient`; return model, norm, is_skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    statistics = BatchNormStatistics(model)
    statistics.snapshot()
    model(torch.full((4, 3), gradient))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer = build_optimizer(model, load_train_config().optimizer, steps_per_epoch=10)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    grad_norm, is_skipped = take_step(model, optimizer, scaler, statistics, max_grad_norm)
    return model, grad_norm.item(), bool(is_skipped)


def test_clipping_bounds_the_norm_of_all_gradients_together():
    model, grad_norm, is_skipped = step_with(2.0)
    assert grad_norm == pytest.approx(math.sqrt(12 * 4)) and not is_skipped
    assert model[0].weight.grad.max() == 2.0
    model, grad_norm, _ = step_with(2.0, max_grad_norm=1.0)
    assert grad_norm == pytest.approx(math.sqrt(12 * 4))
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("gradient", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_with_non_finite_gradients_changes_nothing(gradient, max_grad_norm):
    torch.manual_seed(0)
    untouched = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model, _, is_skipped = step_with(gradient, max_grad_norm)
    assert is_skipped
    for key, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[key], value) or key.endswith("num_batches_tracked"), key
    after, _, _ = step_with(1.0)
    assert not torch.equal(after[1].running_mean, model[1].running_mean)

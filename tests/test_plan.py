from pathlib import Path

import pytest
import torch

from dataloader.captions import CaptionedImage, CaptionSet
from model import CLIP
from tests.conftest import TINY
from trainer.config import load_train_config
from trainer.parallel import Runtime, init_runtime, wrap
from trainer.plan import describe_run, make_folders, make_plan
from utils.errors import UserError

CPU = Runtime(torch.device("cpu"), 1)
FOUR_GPUS = Runtime(torch.device("cpu"), 4)  # only counted, never used


def test_cocos_plan_is_the_references():
    plan = make_plan(118_287, load_train_config(), FOUR_GPUS)
    assert (plan.batch_size, plan.pairs_per_step, plan.steps_per_epoch) == (256, 256, 462)
    assert (plan.total_steps, plan.warmup_steps) == (16_170, 3_234)
    assert plan.lr(plan.warmup_steps) == 5e-4 and plan.lr(0) == pytest.approx(5e-4 / 3_234)


def test_accumulation_multiplies_a_step_but_not_a_loss():
    plan = make_plan(1_000, load_train_config([("gradient_accumulation_steps", 3)]), CPU)
    assert (plan.batch_size, plan.pairs_per_step, plan.steps_per_epoch) == (64, 192, 5)


def test_processes_share_a_step_and_contrastive_accumulation_one_loss():
    runtime = Runtime(torch.device("cpu"), 1, rank=1, local_rank=1, world_size=2)
    changes = [("gradient_accumulation_steps", 3), ("per_gpu_train_batch_size", 10)]
    plan = make_plan(1_000, load_train_config(changes), runtime)
    assert (plan.batch_size, plan.contrast_size, plan.pairs_per_step) == (10, 20, 60)
    plan = make_plan(1_000, load_train_config([*changes, ("accumulation", "contrastive")]), runtime)
    assert (plan.batch_size, plan.contrast_size, plan.pairs_per_step) == (10, 60, 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("precision", "fp16"), "precision fp16 needs a GPU"),
        (("sync_batchnorm", True), "sync_batchnorm is for several"),
    ],
)
def test_what_needs_a_gpu_says_so_without_one(monkeypatch, change, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        init_runtime(load_train_config([change]))


def test_what_is_due_every_so_often_is_due_at_the_end_too():
    plan = make_plan(640, load_train_config([("num_train_epochs", 1)]), CPU)
    assert [step for step in range(1, 11) if plan.is_due(4, step)] == [4, 8, 10]


def test_too_few_images_for_one_step_are_told_with_a_batch_that_fits():
    with pytest.raises(UserError, match="the 40 training images do not fill one step of 256 .* --batch_size 5"):
        make_plan(40, load_train_config(), FOUR_GPUS)


def test_folders_are_made_and_an_earlier_run_is_not_overwritten(tmp_path: Path):
    folders = make_folders(tmp_path / "new", load_train_config(), CPU)
    assert folders.checkpoints.is_dir() and folders.logs.is_dir()
    make_folders(tmp_path / "new", load_train_config(), CPU)
    (folders.checkpoints / "checkpoint_0_10.pt").touch()
    with pytest.raises(UserError, match="already holds a run's checkpoints .*checkpoint_0_10.pt"):
        make_folders(tmp_path / "new", load_train_config(), CPU)


def test_the_description_holds_what_is_about_to_happen():
    train_set = CaptionSet([CaptionedImage(1, "a.jpg", ("a", "b"))] * 640, ["gone.jpg"])
    config = load_train_config([("gradient_accumulation_steps", 2)])
    text = describe_run(make_plan(640, config, CPU), config, CPU, CLIP(TINY), train_set)
    for part in ("640 images, 1,280 captions; 1 more images", "x 2 accumulated = 128 a step, 64 in each loss", "CPU",
                 "175 (35 epochs of 5), the first 35 warm up", "parameters", "peak lr 0.0005"):  # fmt: skip
        assert part in text


def test_without_a_gpu_the_cpu_is_used_and_the_model_is_not_wrapped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    runtime = init_runtime(load_train_config())
    model = CLIP(TINY)
    assert runtime == CPU and wrap(model, runtime, load_train_config()).model is model


def test_n_gpu_is_a_bound_on_the_visible_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert init_runtime(load_train_config()).num_devices == 4
    assert init_runtime(load_train_config([("n_gpu", 0)])).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert init_runtime(load_train_config()).num_devices == 2

"""The steps of a run, what is due after them, and the lines that announce them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dataloader.captions import read_captions
from dataloader.data_loaders import OpenedData
from model import CLIP
from tests.conftest import TINY
from trainer.config import load_train_config
from trainer.optim import build_optimizer
from trainer.parallel import Runtime, choose_precision, init_runtime, wrap
from trainer.run.summary import describe_run
from trainer.schedule import Schedule, cosine_warmup_lr, make_sampler
from utils.errors import UserError

CPU = Runtime(torch.device("cpu"), 1)
FOUR_GPUS = Runtime(torch.device("cpu"), 4)  # counted, not used
RANK_1_OF_2 = Runtime(torch.device("cpu"), 1, rank=1, local_rank=1, world_size=2)


def make_schedule(num_images: int, runtime: Runtime = CPU, **changes: object) -> Schedule:
    config = load_train_config(changes)
    return Schedule(config, make_sampler(num_images, config, runtime), global_step=0)


def lr(step: int) -> float:
    return cosine_warmup_lr(step, base_lr=1.0, warmup_steps=4, total_steps=20)


def test_lr_warms_up_linearly_then_follows_a_cosine_to_zero():
    assert [lr(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr(12) == pytest.approx(0.5)
    assert lr(19) == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert lr(20) == pytest.approx(0.0)
    assert all(lr(step) > lr(step + 1) for step in range(4, 20))


def test_warmup_may_be_absent_or_fill_the_run():
    assert cosine_warmup_lr(0, base_lr=1.0, warmup_steps=0, total_steps=10) == 1.0
    assert cosine_warmup_lr(9, base_lr=1.0, warmup_steps=10, total_steps=10) == 1.0


def test_coco_on_four_gpus_has_the_steps_of_the_reference():
    schedule = make_schedule(118_287, FOUR_GPUS)
    assert (schedule.sampler.layout.batch_size, schedule.pairs_per_step, schedule.steps_per_epoch) == (256, 256, 462)
    assert (schedule.total_steps, schedule.warmup_steps) == (16_170, 3_234)
    assert schedule.lr(schedule.warmup_steps) == 5e-4 and schedule.lr(0) == pytest.approx(5e-4 / 3_234)


def test_set_lr_changes_every_parameter_group():
    schedule = make_schedule(640, warmup_share=0.0)
    optimizer = build_optimizer(CLIP(TINY), schedule.config.optimizer, schedule.steps_per_epoch)
    schedule.set_lr(optimizer, 20)
    assert [group["lr"] for group in optimizer.param_groups] == [schedule.lr(20)] * 2 != [5e-4] * 2


def test_accumulation_enlarges_the_step_but_not_the_loss():
    schedule = make_schedule(1_000, gradient_accumulation_steps=3)
    assert (schedule.sampler.layout.batch_size, schedule.pairs_per_loss) == (64, 64)
    assert (schedule.pairs_per_step, schedule.steps_per_epoch) == (192, 5)


@pytest.mark.parametrize(("accumulation", "pairs_per_loss"), [("plain", 20), ("contrastive", 60)])
def test_a_loss_has_the_pairs_of_all_processes_and_with_contrastive_accumulation_of_the_step(
    accumulation, pairs_per_loss
):
    changes = {"gradient_accumulation_steps": 3, "per_gpu_train_batch_size": 10, "accumulation": accumulation}
    schedule = make_schedule(1_000, RANK_1_OF_2, **changes)
    assert (schedule.sampler.layout.batch_size, schedule.pairs_per_step) == (10, 60)
    assert schedule.pairs_per_loss == pairs_per_loss


def test_intervals_are_due_at_the_last_step_too():
    schedule = make_schedule(640, num_train_epochs=1)
    assert [step for step in range(1, 11) if schedule.is_due(4, step)] == [4, 8, 10]
    schedule = make_schedule(640, num_train_epochs=3)
    assert [step for step in range(1, 31) if schedule.is_due(None, step)] == [10, 20, 30]  # the ends of the epochs


def test_lr_continues_at_its_place_when_a_run_is_resumed_with_another_batch_size():
    config = load_train_config({"num_train_epochs": 2, "per_gpu_train_batch_size": 4, "warmup_share": 0.2})
    planned = Schedule(config, make_sampler(40, config, CPU), global_step=0)
    resumed = make_sampler(40, config, CPU, {"epoch": 0, "samples_seen": 32})
    unchanged = Schedule(config, resumed, global_step=8)
    assert [unchanged.lr(step) for step in range(8, 20)] == [planned.lr(step) for step in range(8, 20)]
    resumed = make_sampler(40, config, CPU, {"epoch": 1, "samples_seen": 0})
    changed = Schedule(config, resumed, global_step=30)  # a smaller batch took 30 steps for what takes 10
    assert (changed.total_steps, changed.warmup_steps) == (40, planned.warmup_steps)
    assert changed.lr(30) == planned.lr(10) and changed.lr(39) == planned.lr(19)


def test_too_few_images_are_refused_with_a_batch_size_that_fits():
    with pytest.raises(UserError, match="40 training images .* 256 pairs.*--batch_size 5$"):
        make_sampler(40, load_train_config(), FOUR_GPUS)


def test_the_description_states_data_model_device_and_steps(caption_files):
    (caption_files[0] / "000000000003.png").unlink()
    schedule = make_schedule(640, gradient_accumulation_steps=2)
    model = CLIP(TINY)
    data = OpenedData(read_captions(*caption_files), None, None)
    text = describe_run(schedule, CPU, SimpleNamespace(model=model), data, data.count(77))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    for part in ("23 images, 46 captions", f"{num_parameters:,} parameters", "CPU", "= 128 per step, 64 in each loss",
                 "175 (35 epochs of 5), 35 of them warmup", "peak lr 0.0005, weight decay 0.1"):  # fmt: skip
        assert part in text, part


def test_the_cpu_runs_the_bare_model_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("trainer.parallel.has_native_bf16", lambda device: False)
    runtime = init_runtime(load_train_config())
    model = CLIP(TINY)
    assert (
        runtime == replace(CPU, reason="the device has no native bf16")
        and wrap(model, runtime, load_train_config()).model is model
    )


@pytest.mark.parametrize(
    ("device", "is_native", "expected"),
    [
        ("cuda", True, "bf16"),
        ("cuda", False, "fp16"),
        ("cpu", True, "bf16"),
        ("cpu", False, "fp32"),
        ("mps", False, "fp32"),
    ],
)
def test_the_precision_is_what_the_device_computes_natively(monkeypatch, device, is_native, expected):
    asked = lambda including_emulation=True: is_native or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    precision, reason = choose_precision("auto", torch.device(device))
    assert precision == expected and reason
    assert choose_precision("bf16", torch.device(device)) == ("bf16", "")


def test_several_slurm_tasks_without_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(UserError, match="4 tasks.*torchrun"):
        init_runtime(load_train_config({"n_gpu": 0}))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun --ntasks=1 inside of the job
    assert init_runtime(load_train_config({"n_gpu": 0})).world_size == 1


def test_n_gpu_bounds_the_number_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert init_runtime(load_train_config()).num_devices == 4
    assert init_runtime(load_train_config({"n_gpu": 0})).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert init_runtime(load_train_config()).num_devices == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "precision fp16"),
        ({"precision": "tf32"}, "precision tf32"),
        ({"sync_batchnorm": True}, "sync_batchnorm"),
        ({"device": "cuda"}, "cuda"),
    ],
)
def test_options_that_need_a_gpu_are_refused_without_one(monkeypatch, change, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        init_runtime(load_train_config(change))


def test_compilation_is_refused_under_dataparallel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="compile"):
        init_runtime(load_train_config({"compile": True}))

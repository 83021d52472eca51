"""Runs that are stopped, killed or go wrong: a resumed run ends as the uninterrupted one, bit for bit."""

import math
import random
import re
import signal
import subprocess
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

import train
from benchmarks.soak import soak
from dataloader.sampler import BatchLayout, EpochSampler, Position
from model import read_checkpoint
from tests.conftest import make_captions
from tests.runs import (
    Captions,
    ForkedRun,
    last_checkpoint,
    read_rows,
    same_end,
    send,
    spoil_gradient,
    tiny_flags,
    torchrun,
    wait_for_rows,
)
from trainer.loss import LOSSES
from trainer.run.checkpoint import list_checkpoints
from utils.errors import UserError
from utils.flags import parse_duration


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Captions:
    return make_captions(tmp_path_factory.mktemp("resume"), num_images=28)


def flags_for(data: Captions, output: Path, *, epochs: int = 3, batch_size: int = 8, **changes: object) -> list[str]:
    """Return the flags of a run of 9 steps, 3 per epoch, that saves after steps 4, 8 and 9."""
    settings = {"model.transformer_width": 16, "trainer.save_steps": 4, "trainer.logging_steps": 3, **changes}
    return tiny_flags(data, output, epochs=epochs, batch_size=batch_size, **settings)


VARIANTS = {
    "two workers, random crops": {
        "trainer.num_workers": 2, "dataloader.augmentation": "standard", "dataloader.flip": True,
        "dataloader.token_dropout": 0.3,
    },
    "accumulation": {"trainer.gradient_accumulation_steps": 3, "batch_size": 2},
    "one loss over chunks": {
        "trainer.gradient_accumulation_steps": 2, "trainer.accumulation": "contrastive", "batch_size": 4,
        "trainer.word_loss_weight": 1.0, "trainer.max_grad_norm": 1.0,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "stops"), list(zip(VARIANTS, [(1, 5, 9), (5,), (5,)], strict=True)))
def test_a_run_stopped_after_any_step_continues_as_if_uninterrupted(tmp_path: Path, data, recorder, variant, stops):
    changes = VARIANTS[variant]
    train.main(flags_for(data, tmp_path / "whole", **changes))
    images, recorder.images = recorder.images, []
    losses_per_step = 3 if variant == "accumulation" else 1
    for stop in stops:
        output = tmp_path / f"stopped_{stop}"
        recorder.before[stop * losses_per_step] = send(signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            train.main(flags_for(data, output, **changes))
        assert stopped.value.code == 75
        assert list_checkpoints(output / "saved_checkpoints")[-1].stem.endswith(f"_{stop}")
        train.main([*flags_for(data, output, **changes), "--resume", "auto"])
        assert recorder.images == images
        assert same_end(output, tmp_path / "whole")
        recorder.images = []


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path: Path, data, recorder):
    train.main([*flags_for(data, tmp_path), "--resume", "auto"])
    assert len(recorder.images) == 9
    recorder.images, end, rows = [], last_checkpoint(tmp_path), read_rows(tmp_path)
    train.main([*flags_for(data, tmp_path), "--resume", "auto"])
    assert recorder.images == [] and read_rows(tmp_path) == rows
    assert last_checkpoint(tmp_path).keys() == end.keys()
    train.main([*flags_for(data, tmp_path / "other"), "--resume", str(tmp_path / "saved_checkpoints")])
    assert recorder.images == [] and not list_checkpoints(tmp_path / "other" / "saved_checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["pixels", "jpeg"])
def test_building_a_cache_and_finding_it_train_alike(tmp_path: Path, data, cache):
    changes = {"dataloader.cache": cache, "dataloader.cache_dir": tmp_path / "cache", "trainer.num_workers": 2}
    for name in ("builds", "finds"):
        train.main(flags_for(data, tmp_path / name, epochs=1, **changes))
    assert same_end(tmp_path / "builds", tmp_path / "finds")


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [12, 26, 40])
def test_a_run_on_fewer_or_more_images_continues_if_it_is_allowed(tmp_path: Path, data, recorder, num_images):
    recorder.before[2] = send(signal.SIGTERM)  # after 16 of 28 images
    with pytest.raises(SystemExit):
        train.main(flags_for(data, tmp_path))
    other = make_captions(tmp_path / "other", num_images)
    with pytest.raises(UserError, match=f"was 28 images, .*, is now {num_images} images"):
        train.main([*flags_for(other, tmp_path), "--resume", "auto"])
    train.main([*flags_for(other, tmp_path), "--resume", "auto", "--allow_other_data"])
    steps = 2 + max(0, num_images - 16) // 8 + 2 * (num_images // 8)
    assert last_checkpoint(tmp_path)["global_step"] == steps and len(recorder.images) == steps


@pytest.mark.slow
def test_a_run_may_be_made_longer(tmp_path: Path, data, recorder, capsys):
    train.main(flags_for(data, tmp_path, epochs=1))
    train.main([*flags_for(data, tmp_path), "--resume", str(tmp_path / "saved_checkpoints")])
    assert len(recorder.images) == 9 and last_checkpoint(tmp_path)["global_step"] == 9
    assert "trainer.num_train_epochs was 1, is 3" in capsys.readouterr().out


@pytest.mark.slow
def test_three_processes_continue_exactly_and_another_number_at_the_same_place(tmp_path: Path, data):
    """Three, since the order in which two gradients are added does not matter."""
    changes = {"trainer.logging_steps": 1, "batch_size": 2, "epochs": 4}
    whole, stopped = (flags_for(data, tmp_path / name, **changes) for name in ("whole", "stopped"))
    process = torchrun(stopped, 3)
    wait_for_rows(tmp_path / "stopped", 2)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    printed, _ = process.communicate(timeout=120)
    assert re.search("stopped by (SIGTERM|a signal to another process) after step", printed), printed
    place = last_checkpoint(tmp_path / "stopped")
    torch.save(place, tmp_path / "place.pt")

    for flags in (whole, [*stopped, "--resume", "auto"]):
        run = ForkedRun(flags, tmp_path / "log.txt", 3)
        assert run.wait() == [0, 0, 0], run.printed()
    assert same_end(tmp_path / "stopped", tmp_path / "whole")

    alone = [*stopped, "--resume", str(tmp_path / "place.pt"), "--output_dir", str(tmp_path / "alone")]
    run = ForkedRun(alone, tmp_path / "log.txt")
    assert run.wait() == [0] and "world_size was 3, is 1" in run.printed(), run.printed()
    steps_left = (28 - place["samples_seen"]) // 2 + (3 - place["epoch"]) * 14
    end = last_checkpoint(tmp_path / "alone")
    assert end["global_step"] == place["global_step"] + steps_left
    assert (end["epoch"], end["samples_seen"]) == (3, 28)


def test_the_order_continues_in_the_middle_of_an_epoch_for_any_number_of_processes():
    def indices_of(samples_seen: int, rank: int = 0, world_size: int = 1) -> tuple[EpochSampler, list[list[int]]]:
        layout = BatchLayout(batch_size=4, rank=rank, world_size=world_size)
        sampler = EpochSampler(24, layout, num_epochs=2, seed=3, start=Position(0, samples_seen))
        return sampler, [[index for _, index in batch] for batch in sampler]

    _, whole = indices_of(0)
    first_epoch = sum(whole[:6], [])
    for world_size in (1, 2, 3):
        for samples_seen in (0, 4, 10, 22, 24):
            ranks = [indices_of(samples_seen, rank, world_size) for rank in range(world_size)]
            samplers, parts = zip(*ranks, strict=True)
            seen = [index for batches in zip(*parts, strict=True) for batch in batches for index in batch]
            steps = (24 - samples_seen) // (4 * world_size)
            rest = first_epoch[samples_seen : samples_seen + steps * 4 * world_size]
            assert seen[: len(rest)] == rest and len(seen) == len(rest) + 24
            assert len(parts[0]) == len(samplers[0]) == samplers[0].num_steps == steps + 24 // (4 * world_size)
    assert EpochSampler(24, BatchLayout(4), num_epochs=2, seed=3, start=Position(2, 0)).num_steps == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_stops_with_status_75(tmp_path: Path, data, recorder, capsys, name):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    recorder.before[2] = send(number)
    with pytest.raises(SystemExit) as stopped:
        train.main(flags_for(data, tmp_path))
    assert stopped.value.code == 75 and signal.getsignal(number) is handler
    assert last_checkpoint(tmp_path)["global_step"] == 2
    assert f"stopped by {name} after step 2; continue with --resume auto" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("presses", "status"), [(1, 75), (2, 130)])
def test_ctrl_c_saves_and_a_second_one_exits_at_once(tmp_path: Path, data, presses, status):
    """The workers of the run, which a terminal interrupts as well, leave the first Ctrl-C to it."""
    slow = {"model.image_resolution": 256, "trainer.num_workers": 2, "trainer.logging_steps": 1}
    run = ForkedRun(flags_for(data, tmp_path / "out", epochs=100_000, **slow), tmp_path / "log.txt")
    wait_for_rows(tmp_path / "out", 2)
    for _ in range(presses):
        run.signal_group(signal.SIGINT)
        time.sleep(0.05)  # two at once would be one
    start = time.monotonic()
    assert run.wait() == [status], run.printed()
    assert time.monotonic() - start < 20 and "Traceback" not in run.printed()


@pytest.mark.slow
def test_a_time_limit_stops_the_run_before_it(tmp_path: Path, data):
    start = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        train.main([*flags_for(data, tmp_path, epochs=100_000), "--time_limit", "6s"])
    assert stopped.value.code == 75 and 1 < time.monotonic() - start < 6
    assert last_checkpoint(tmp_path)["global_step"] > 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("1.5h", 5400), ("11:30:00", 41_400), ("0:00:05", 5)]
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "1:30", "-5s", "1:99:00", "nan", "1e9h", "5 m", "٣s"])
def test_other_durations_are_refused(text):
    with pytest.raises(ArgumentTypeError):
        parse_duration(text)


def test_steps_with_non_finite_gradients_are_skipped_counted_and_logged(tmp_path, data, recorder, capsys):
    recorder.before |= {2: spoil_gradient, 5: spoil_gradient}
    train.main(flags_for(data, tmp_path))
    rows, checkpoint = read_rows(tmp_path), last_checkpoint(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [1, 2, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert capsys.readouterr().out.count("warning: skipped 1 steps") == 2
    assert all(bool(torch.isfinite(value).all()) for value in checkpoint["model_state_dict"].values())
    steps = {moments["step"].item() for moments in checkpoint["optimizer_state_dict"]["state"].values()}
    assert steps == {7.0}  # of 9


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_end_the_run_at_its_last_good_checkpoint(tmp_path, data, recorder):
    recorder.before |= dict.fromkeys((2, 5, 6, 7, 8), spoil_gradient)
    with pytest.raises(UserError, match="3 consecutive steps"):
        train.main(flags_for(data, tmp_path, **{"trainer.max_skipped_steps": 3}))
    saved = tmp_path / "saved_checkpoints" / "checkpoint_1_4.pt"
    assert list_checkpoints(saved.parent) == [saved]
    train.main([*flags_for(data, tmp_path), "--resume", "auto"])
    assert last_checkpoint(tmp_path)["global_step"] == 9


def test_skipped_steps_in_a_row_are_counted_across_a_resume(tmp_path, data, recorder):
    def spoil_and_stop(model):
        spoil_gradient(model)
        send(signal.SIGTERM)(model)

    recorder.before |= {3: spoil_gradient, 4: spoil_and_stop}
    flags = flags_for(data, tmp_path, **{"trainer.max_skipped_steps": 3})
    with pytest.raises(SystemExit):
        train.main(flags)
    recorder.before = {5: spoil_gradient}
    with pytest.raises(UserError, match="3 consecutive steps"):
        train.main([*flags, "--resume", "auto"])


def test_a_non_finite_loss_is_excluded_from_the_mean(tmp_path, data, recorder, monkeypatch):
    loss_function = LOSSES["softmax"]

    def nan_at_first(*arguments):
        loss, scalars = loss_function(*arguments)
        factor = math.nan if len(recorder.images) == 1 else 1.0
        return loss * factor, {**scalars, "loss": scalars["loss"] * factor}

    monkeypatch.setitem(LOSSES, "softmax", nan_at_first)
    train.main(flags_for(data, tmp_path))
    rows = read_rows(tmp_path)
    assert all(math.isfinite(row["loss"]) for row in rows) and rows[0]["skipped_steps"] == 1


@pytest.mark.slow
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, data, capsys):
    """On a full disk, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        changes = {"trainer.save_errors": "continue", "trainer.keep_last": 1, "trainer.save_steps": 2}
        train.main(flags_for(data, disk, **changes))  # a checkpoint takes 10 MB: there is room for one, not for two
        assert [file.name for file in list_checkpoints(disk / "saved_checkpoints")] == ["checkpoint_0_2.pt"]
        assert "checkpoint_2_9.pt cannot be written" in capsys.readouterr().out
        read_checkpoint(disk / "saved_checkpoints" / "checkpoint_0_2.pt")
        with pytest.raises(UserError, match="cannot be written .* --resume auto"):
            train.main([*flags_for(data, disk, **{"trainer.save_steps": 2}), "--resume", "auto"])
        read_checkpoint(disk / "saved_checkpoints" / "checkpoint_0_2.pt")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_run_whose_every_save_fails_ends_as_configured(tmp_path: Path, data, monkeypatch, capsys, policy):
    def fail(content, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    flags = flags_for(data, tmp_path, **{"trainer.save_errors": policy})
    if policy == "stop":
        with pytest.raises(UserError, match="checkpoint_1_4.pt"):
            train.main(flags)
    else:
        train.main(flags)
        assert capsys.readouterr().out.count("cannot be written") == 3
    assert not list_checkpoints(tmp_path / "saved_checkpoints")


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path: Path, data):
    flags = flags_for(data, tmp_path, epochs=20, **{"trainer.num_workers": 2})  # soak gives folders of its own
    soak(flags, tmp_path, kills=3, seed=random.randrange(1_000), is_measured=False)

"""Runs that are interrupted, and what they leave: nothing lost, nothing different."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from benchmarks.soak import TIMING, same, soak
from dataloader.order import EpochBatchSampler
from model import read_checkpoint
from tests.conftest import ROOT, SCRIPT_ENVIRONMENT, make_captions, make_order, tiny_training_flags
from tests.test_parallel import free_port
from trainer import interrupt
from trainer.checkpoint import list_checkpoints
from trainer.interrupt import parse_duration
from trainer.lock import RunLock
from trainer.loss import LOSSES
from trainer.metrics import StepMeter
from trainer.plan import RunPlan
from utils.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    return make_captions(tmp_path_factory.mktemp("resume"), num_images=28)


class Recorder:
    """Watches a run in this process: the images of every step, and what to do before which step."""

    def __init__(self, monkeypatch) -> None:
        self.images: list[list[int]] = []
        self.before: dict[int, callable] = {}
        update, take_step = StepMeter.update, train.take_step

        def watched_update(meter, state, scalars, indices):
            self.images.append(indices.tolist())
            update(meter, state, scalars, indices)

        def watched_step(model, *rest):
            self.before.pop(len(self.images), lambda _: None)(model)
            return take_step(model, *rest)

        monkeypatch.setattr(StepMeter, "update", watched_update)
        monkeypatch.setattr(train, "take_step", watched_step)


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


def flags_for(data: tuple[Path, Path], output: Path, *, epochs: int = 3, batch_size: int = 8, **changes) -> list[str]:
    changes = {"model.transformer_width": 16, "trainer.save_steps": 4, "trainer.logging_steps": 3, **changes}
    sets = [flag for key, value in changes.items() for flag in ("--set", f"{key}={value}")]
    flags = [*tiny_training_flags(*data, output), "--epochs", epochs, "--batch_size", batch_size, *sets]
    return list(map(str, flags))


def end_of(output: Path) -> tuple[dict, list[dict]]:
    """Return a run's last checkpoint and the rows of its log, without what is timed."""
    lines = (output / "logs" / "metrics.jsonl").read_text().splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]
    return read_checkpoint(list_checkpoints(output / "saved_checkpoints")[-1]), rows


def send(number: int):
    return lambda _: os.kill(os.getpid(), number)


VARIANTS = {
    "two workers, random crops": {
        "trainer.num_workers": 2, "dataloader.augmentation": "standard", "dataloader.flip": "true",
        "dataloader.token_dropout": 0.3,
    },
    "accumulation": {"trainer.gradient_accumulation_steps": 3, "batch_size": 2},
    "one loss over chunks": {
        "trainer.gradient_accumulation_steps": 2, "trainer.accumulation": "contrastive", "batch_size": 4,
        "trainer.word_loss_weight": 1.0,
        "trainer.max_grad_norm": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize(("variant", "stops"), list(zip(VARIANTS, [(1, 5, 9), (5,), (5,)], strict=True)))
def test_a_run_stopped_after_any_step_goes_on_as_if_it_had_not_been(tmp_path: Path, data, recorder, variant, stops):
    changes = VARIANTS[variant]
    train.main(flags_for(data, tmp_path / "whole", **changes))
    images, recorder.images = recorder.images, []
    per_step = 3 if variant == "accumulation" else 1
    for stop in stops:
        output = tmp_path / f"stopped_{stop}"
        recorder.before[stop * per_step] = send(signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            train.main(flags_for(data, output, **changes))
        assert stopped.value.code == interrupt.STOPPED
        assert list_checkpoints(output / "saved_checkpoints")[-1].stem.endswith(f"_{stop}")
        assert not (output / "run.lock").exists()
        train.main([*flags_for(data, output, **changes), "--resume", "auto"])
        assert recorder.images == images
        assert all(map(same, end_of(output), end_of(tmp_path / "whole")))
        recorder.images = []


def test_an_ended_run_may_be_resumed_and_changes_nothing(tmp_path: Path, data, recorder):
    train.main([*flags_for(data, tmp_path), "--resume", "auto"])
    images, end = recorder.images, end_of(tmp_path)
    recorder.images = []
    train.main([*flags_for(data, tmp_path), "--resume", "auto"])
    assert recorder.images == [] and len(images) == 9 and all(map(same, end_of(tmp_path), end))


@pytest.mark.parametrize("cache", ["pixels", "jpeg"])
def test_a_run_that_builds_its_cache_is_the_one_that_finds_it(tmp_path: Path, data, cache):
    changes = {"dataloader.cache": cache, "dataloader.cache_dir": tmp_path / "cache", "trainer.num_workers": 2}
    for name in ("builds", "finds"):
        train.main(flags_for(data, tmp_path / name, epochs=1, **changes))
    assert all(map(same, end_of(tmp_path / "builds"), end_of(tmp_path / "finds")))


def test_a_run_may_be_made_longer(tmp_path: Path, data, recorder, capsys):
    train.main(flags_for(data, tmp_path, epochs=1))
    train.main([*flags_for(data, tmp_path), "--resume", str(tmp_path / "saved_checkpoints")])
    assert len(recorder.images) == 9 and end_of(tmp_path)[0]["global_step"] == 9
    assert "trainer.num_train_epochs was 1, is 3" in capsys.readouterr().out


def launch(flags: list[str], num_processes: int) -> subprocess.Popen:
    run = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", f"--master_port={free_port()}"]
    command = [sys.executable, *(run if num_processes > 1 else []), str(ROOT / "train.py"), *flags]
    environment = {**SCRIPT_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def printed_by(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=300)
    return printed


def wait_for_rows(output: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    metrics = output / "logs" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_three_processes_go_on_exactly_and_another_number_at_the_same_place(tmp_path: Path, data):
    changes = {"trainer.logging_steps": 1, "batch_size": 2, "epochs": 8}
    whole, stopped = (flags_for(data, tmp_path / name, **changes) for name in ("whole", "stopped"))
    first = launch(whole, 3)
    printed = printed_by(first)
    assert first.returncode == 0, printed
    process = launch(stopped, 3)
    wait_for_rows(tmp_path / "stopped", 5)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM after step" in printed_by(process)
    place = read_checkpoint(list_checkpoints(tmp_path / "stopped" / "saved_checkpoints")[-1])
    process = launch([*stopped, "--resume", "auto"], 3)
    printed = printed_by(process)
    assert process.returncode == 0, printed
    assert all(map(same, end_of(tmp_path / "stopped"), end_of(tmp_path / "whole")))

    torch.save(place, tmp_path / "place.pt")
    alone = [*stopped, "--resume", str(tmp_path / "place.pt"), "--output_dir", str(tmp_path / "alone")]
    process = launch(alone, 1)
    printed = printed_by(process)
    assert process.returncode == 0 and "world_size was 3, is 1" in printed, printed
    left = (28 - place["sample"]) // 2 + (7 - place["epoch"]) * 14
    end = end_of(tmp_path / "alone")[0]
    assert end["global_step"] == place["global_step"] + left and (end["epoch"], end["sample"]) == (7, 28)


def test_the_order_goes_on_in_the_middle_of_an_epoch_for_any_number_of_processes():
    whole = [index for batch in make_order(24, 4) for _, index in batch]
    for world_size in (1, 2, 3):
        for start_sample in (0, 4, 10, 22, 24):
            parts = [
                list(make_order(24, 4, rank=rank, world_size=world_size, start_epoch=0, start_sample=start_sample))
                for rank in range(world_size)
            ]
            seen = [index for batches in zip(*parts, strict=True) for part in batches for _, index in part]
            steps = (24 - start_sample) // (4 * world_size)
            first = whole[start_sample : start_sample + steps * 4 * world_size]
            assert seen[: len(first)] == first and len(seen) == len(first) + 24
            order = make_order(24, 4, world_size=world_size, start_sample=start_sample)
            assert len(parts[0]) == len(order) == order.num_steps == steps + 24 // (4 * world_size)
    assert EpochBatchSampler(24, batch_size=4, num_epochs=2, seed=3, start_epoch=2).num_steps == 0


def test_the_schedule_goes_on_where_the_data_is_when_the_batch_size_changes():
    plan = RunPlan(batch_size=4, contrast_size=4, pairs_per_step=4, steps_per_epoch=10, total_steps=20, warmup_steps=4,
                   base_lr=1.0, weight_decay=0.1)  # fmt: skip
    assert plan.resumed(8, 12) == plan
    changed = plan.resumed(30, 10)  # with a smaller batch it took 30 steps to see what takes 10
    assert changed.total_steps == 40 and changed.lr(30) == plan.lr(10) and changed.lr(39) == plan.lr(19)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops_with_a_status_of_its_own(tmp_path: Path, data, recorder, capsys, number):
    handler = signal.getsignal(number)
    recorder.before[2] = send(number)
    with pytest.raises(SystemExit) as stopped:
        train.main(flags_for(data, tmp_path))
    assert stopped.value.code == 75 and signal.getsignal(number) is handler
    assert end_of(tmp_path)[0]["global_step"] == 2
    name = signal.Signals(number).name
    assert f"stopped by {name} after step 2; go on with --resume auto" in capsys.readouterr().out


def test_a_second_ctrl_c_ends_the_run_at_once_and_workers_leave_the_first_to_it(tmp_path: Path, data):
    for presses in (1, 2):
        output = tmp_path / str(presses)
        slow = {"model.image_resolution": 256, "trainer.num_workers": 2, "trainer.logging_steps": 1}
        flags = flags_for(data, output, epochs=100_000, **slow)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags],
            env=SCRIPT_ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        wait_for_rows(output, 2)
        for _ in range(presses):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
            time.sleep(0.05)  # two at once would be one
        start = time.monotonic()
        printed = printed_by(process)
        assert process.returncode == (75 if presses == 1 else 130), printed
        assert time.monotonic() - start < 20 and "Traceback" not in printed


def test_a_time_limit_stops_before_it(tmp_path: Path, data):
    start = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        train.main([*flags_for(data, tmp_path, epochs=100_000), "--time_limit", "12s"])
    assert stopped.value.code == 75 and 2 < time.monotonic() - start < 12
    assert end_of(tmp_path)[0]["global_step"] > 0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("1.5h", 5400), ("11:30:00", 41_400), ("0:00:05", 5)]
)
def test_times_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "1:30", "-5s", "1:99:00", "nan", "1e9h", "5 m", "٣s"])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError):
        parse_duration(text)


def spoil(model: torch.nn.Module) -> None:
    next(model.parameters()).grad.fill_(math.nan)


def test_steps_that_are_not_finite_are_skipped_counted_and_told_with_their_images(tmp_path, data, recorder, capsys):
    recorder.before |= {2: spoil, 5: spoil}
    train.main(flags_for(data, tmp_path))
    checkpoint, rows = end_of(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [1, 2, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    printed = capsys.readouterr().out
    for step in (2, 5):
        ids = ", ".join(map(str, recorder.images[step - 1]))
        assert f"step {step} was skipped, its gradients are not finite; its images: {ids}" in printed
    assert all(bool(torch.isfinite(value).all()) for value in checkpoint["model_state_dict"].values())
    steps = {moments["step"].item() for moments in checkpoint["optimizer_state_dict"]["state"].values()}
    assert steps == {7.0}  # of 9


def test_too_many_such_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tmp_path, data, recorder):
    recorder.before |= dict.fromkeys((2, 5, 6, 7, 8), spoil)
    with pytest.raises(UserError) as ended:
        train.main(flags_for(data, tmp_path, **{"trainer.max_skipped_steps": 3}))
    saved = tmp_path / "saved_checkpoints" / "checkpoint_1_4.pt"
    assert "the last 3 steps had gradients that are not finite" in str(ended.value) and str(saved) in str(ended.value)
    assert list_checkpoints(saved.parent) == [saved]
    train.main([*flags_for(data, tmp_path), "--resume", str(saved)])
    assert end_of(tmp_path)[0]["global_step"] == 9


def test_a_loss_that_is_not_finite_leaves_the_mean_of_the_others(tmp_path, data, recorder, monkeypatch):
    loss_fn = LOSSES["softmax"]

    def sometimes(*arguments):
        loss, scalars = loss_fn(*arguments)
        factor = math.nan if len(recorder.images) == 1 else 1.0
        return loss * factor, {**scalars, "loss": scalars["loss"] * factor}

    monkeypatch.setitem(LOSSES, "softmax", sometimes)
    train.main(flags_for(data, tmp_path))
    rows = end_of(tmp_path)[1]
    assert all(math.isfinite(row["loss"]) for row in rows) and rows[0]["skipped_steps"] == 1


def test_a_loss_back_at_that_of_guessing_is_told(tmp_path, data, monkeypatch, capsys):
    losses = iter([1.0, 1.0, 1.0, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1])
    loss_fn = LOSSES["softmax"]

    def scripted(*arguments):
        loss, scalars = loss_fn(*arguments)
        return loss, {**scalars, "loss": torch.tensor(next(losses))}

    monkeypatch.setitem(LOSSES, "softmax", scripted)
    train.main(flags_for(data, tmp_path))
    assert capsys.readouterr().out.count("the loss is back at that of guessing, ln(8) = 2.08") == 1


def test_a_second_run_in_the_same_folder_stops_with_a_sentence(tmp_path: Path):
    code = "import sys, time; from pathlib import Path; from trainer.lock import RunLock\n"
    code += "lock = RunLock(Path(sys.argv[1]), Path('none')); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=SCRIPT_ENVIRONMENT, text=True, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is in use by another run, process {holder.pid} on "):
        RunLock(tmp_path, tmp_path / "none")
    holder.kill()
    holder.wait()
    RunLock(tmp_path, tmp_path / "none").release()  # what a killed run left is no obstacle
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_holds_while_its_run_writes(tmp_path: Path):
    lock, heartbeat = tmp_path / "run.lock", tmp_path / "metrics.jsonl"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 5}))
    with pytest.raises(UserError, match="process 5 on elsewhere"):
        RunLock(tmp_path, heartbeat)
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))
    heartbeat.touch()
    with pytest.raises(UserError, match="process 5 on elsewhere"):
        RunLock(tmp_path, heartbeat)
    os.utime(heartbeat, (long_ago, long_ago))
    RunLock(tmp_path, heartbeat).release()


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\x00"])
def test_a_damaged_lock_of_nobody_is_no_obstacle(tmp_path: Path, content):
    (tmp_path / "run.lock").write_text(content)
    RunLock(tmp_path, tmp_path / "none").release()


def test_a_full_disk_of_its_own_is_survived(tmp_path: Path, data, capsys):
    """A real full disk, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        changes = {"trainer.save_errors": "continue", "trainer.keep_last": 1, "trainer.save_steps": 2}
        train.main(flags_for(data, disk, **changes))  # a checkpoint takes 10 MB: there is room for one, not for two
        assert [file.name for file in list_checkpoints(disk / "saved_checkpoints")] == ["checkpoint_0_2.pt"]
        assert "checkpoint_2_9.pt cannot be written (" in capsys.readouterr().out
        read_checkpoint(disk / "saved_checkpoints" / "checkpoint_0_2.pt")
        with pytest.raises(UserError, match="cannot be written .* --resume auto"):
            train.main([*flags_for(data, disk, **{"trainer.save_steps": 2}), "--resume", "auto"])
        read_checkpoint(disk / "saved_checkpoints" / "checkpoint_0_2.pt")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_five_kills_change_nothing(tmp_path: Path, data):
    flags = flags_for(data, tmp_path, epochs=40, **{"trainer.num_workers": 2})  # soak gives folders of its own
    soak(flags, tmp_path, kills=5, seed=int(np.random.default_rng().integers(1_000)), watches=False)

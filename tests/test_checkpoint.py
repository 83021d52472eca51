import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from model import CLIP, CLIPConfig, load_clip
from tests.conftest import TINY
from trainer.checkpoint import Checkpoints, TrainState, restore
from trainer.config import load_train_config
from trainer.optim import build_optimizer
from trainer.parallel import Runtime
from utils.config import to_plain
from utils.errors import UserError

CPU = Runtime(torch.device("cpu"), num_devices=1)


class Told(list):
    """A logger that keeps what it is told."""

    def warning(self, message: str) -> None:
        self.append(message)


def make_state(step: int = 120, seed: int = 0, config: CLIPConfig = TINY) -> TrainState:
    torch.manual_seed(seed)
    model = CLIP(config)
    preprocessing = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    configs = {"model": to_plain(config), "trainer": to_plain(load_train_config()), "dataloader": preprocessing}
    optimizer = build_optimizer(model, load_train_config().optimizer, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    meter = {"sums": {"loss": torch.tensor(seed + 0.5)}, "skipped": 1, "in_a_row": 0, "lowest_loss": 1.0}
    return TrainState(model, optimizer, scaler, configs, epoch=3, sample=40, global_step=step, meter=meter)


def make_checkpoints(folder: Path, told: Told | None = None, **changes) -> Checkpoints:
    config = load_train_config(list(changes.items()))
    return Checkpoints(folder, config, CPU, Told() if told is None else told)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_checkpoint_has_the_references_name_and_keys_and_explains_itself(tmp_path: Path):
    state = make_state()
    make_checkpoints(tmp_path).save(state)
    checkpoint = torch.load(tmp_path / "checkpoint_3_120.pt", weights_only=True)
    assert checkpoint["epoch"] == 3 and checkpoint["global_step"] == 120
    assert checkpoint["model_state_dict"].keys() == CLIP(TINY).state_dict().keys()
    assert checkpoint["optimizer_state_dict"].keys() == state.optimizer.state_dict().keys()
    assert checkpoint["configs"] == state.configs
    assert to_plain(load_clip(tmp_path).model.config) == to_plain(TINY)


def test_restoring_brings_everything_back(tmp_path: Path):
    state = make_state(seed=1)
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(state)
    expected = torch.rand(3)
    other, told = make_state(step=0, seed=2), []
    restore(other, make_checkpoints(tmp_path).find("auto"), CPU, told.append)
    assert torch.equal(torch.rand(3), expected)
    assert (other.epoch, other.sample, other.global_step, other.meter) == (3, 40, 120, state.meter) and not told
    for key, value in state.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[key], value)
    for number, moments in state.optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            assert torch.equal(other.optimizer.state_dict()["state"][number][key], value)


def test_what_differs_from_the_checkpoint_is_told_and_the_new_values_hold(tmp_path: Path):
    make_checkpoints(tmp_path).save(make_state())
    state, told = make_state(), []
    state.configs["trainer"]["seed"] = 5
    state.optimizer.param_groups[0]["weight_decay"] = 0.25
    checkpoint = make_checkpoints(tmp_path).find("auto")
    restore(state, checkpoint, Runtime(torch.device("cpu"), num_devices=1, world_size=2), told.append)
    assert told == [
        "differs from the checkpoint: trainer.seed was 11, is 5",
        "differs from the checkpoint: world_size was 1, is 2",
    ]
    assert state.optimizer.param_groups[0]["weight_decay"] == 0.25 and state.sample == 40


def test_the_newest_are_kept(tmp_path: Path):
    checkpoints = make_checkpoints(tmp_path, keep_last=2)
    for step in (5, 40, 120):
        checkpoints.save(make_state(step))
    assert names(tmp_path) == ["checkpoint_3_120.pt", "checkpoint_3_40.pt"]
    everything = make_checkpoints(tmp_path, keep_last=0)
    everything.save(make_state(130))
    assert len(names(tmp_path)) == 3 and everything.find("auto")["global_step"] == 130


def flip(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "other library", "weights alone"])
def test_a_damaged_newest_one_is_passed_over_and_the_one_before_is_taken(tmp_path: Path, damage):
    checkpoints = make_checkpoints(tmp_path)
    for step in (5, 40):
        checkpoints.save(make_state(step))
    newest = tmp_path / "checkpoint_3_40.pt"
    if damage == "flipped bit":
        flip(newest, 0.5)
    elif damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:-5_000])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "other library":
        newest.write_bytes(pickle.dumps({"weights": [1.0, 2.0]}))
    else:
        torch.save({"model_state_dict": {}}, newest)
    content, told = newest.read_bytes(), Told()
    resumed = make_checkpoints(tmp_path, told, keep_last=2)
    assert resumed.find("auto")["global_step"] == 5
    assert len(told) == 1 and "passed over" in told[0] and "checkpoint_3_40.pt" in told[0]
    for step in (10, 15):
        resumed.save(make_state(step))
    assert names(tmp_path) == ["checkpoint_3_10.pt", "checkpoint_3_15.pt", "checkpoint_3_40.pt"]
    assert newest.read_bytes() == content, "it is the user's, and no good one was deleted for it"
    resumed.save(make_state(40))
    assert resumed.find("auto")["global_step"] == 40 and len(told) == 1


def test_every_flipped_byte_of_a_weight_is_noticed(tmp_path: Path):
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(make_state())
    file = tmp_path / "checkpoint_3_120.pt"
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    whole = file.read_bytes()
    for share in (0.01, 0.3, 0.7, 0.99):
        file.write_bytes(whole)
        flip(file, (largest.header_offset + 200 + share * (largest.file_size - 200)) / len(whole))
        with pytest.raises(UserError, match="the checksum of .* is wrong"):
            checkpoints.find(str(file))


def test_only_damaged_ones_are_no_reason_to_start_anew(tmp_path: Path):
    (tmp_path / "checkpoint_0_5.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        make_checkpoints(tmp_path).find("auto")
    assert make_checkpoints(tmp_path / "new").find("auto") is None


def test_going_on_from_an_older_one_does_not_overwrite_newer_ones(tmp_path: Path):
    checkpoints = make_checkpoints(tmp_path)
    for step in (5, 40):
        checkpoints.save(make_state(step))
    with pytest.raises(UserError, match=r"newer than .*checkpoint_3_5.pt \(e.g. checkpoint_3_40.pt\)"):
        checkpoints.find(str(tmp_path / "checkpoint_3_5.pt"))
    assert make_checkpoints(tmp_path / "elsewhere").find(str(tmp_path / "checkpoint_3_5.pt"))["global_step"] == 5
    assert checkpoints.find(str(tmp_path))["global_step"] == 40


def test_what_is_no_checkpoint_to_resume_from_is_told(tmp_path: Path):
    torch.save({"model_state_dict": CLIP(TINY).state_dict(), "epoch": 3}, tmp_path / "reference.pt")
    with pytest.raises(UserError, match="has no optimizer or place in the data"):
        make_checkpoints(tmp_path).find(str(tmp_path / "reference.pt"))
    state = make_state()
    make_checkpoints(tmp_path).save(state)
    state.optimizer = torch.optim.AdamW(state.model.parameters())
    with pytest.raises(UserError, match="other parameter groups"):
        restore(state, make_checkpoints(tmp_path).find("auto"), CPU, print)


def test_what_a_killed_save_left_is_removed(tmp_path: Path):
    (tmp_path / "checkpoint_0_5.pt.part-7").write_bytes(b"half a checkpoint")
    make_checkpoints(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_failed_save_leaves_the_earlier_one_and_nothing_else(tmp_path: Path, monkeypatch, error, policy):
    told = Told()
    checkpoints = make_checkpoints(tmp_path, told, save_errors=policy)
    checkpoints.save(make_state(5))
    before = (tmp_path / "checkpoint_3_5.pt").read_bytes()

    def fail(_, file):
        file.write(b"half a checkpoint")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        if policy == "stop":
            with pytest.raises(UserError, match="checkpoint_3_40.pt cannot be written"):
                checkpoints.save(make_state(40))
        else:
            checkpoints.save(make_state(40))
            assert len(told) == 1 and "checkpoint_3_40.pt cannot be written" in told[0]
    assert names(tmp_path) == ["checkpoint_3_5.pt"]
    assert (tmp_path / "checkpoint_3_5.pt").read_bytes() == before and checkpoints.saved.name == "checkpoint_3_5.pt"
    checkpoints.save(make_state(60))
    assert checkpoints.find("auto")["global_step"] == 60


def test_a_full_disk_is_survived(tmp_path: Path):
    """The limit of a file's size stands in for a full disk; writing over it raises OSError too."""
    told = Told()
    checkpoints = make_checkpoints(tmp_path, told, save_errors="continue")
    checkpoints.save(make_state(5))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        checkpoints.save(make_state(40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["checkpoint_3_5.pt"] and "cannot be written (no space for all of it)" in told[0]
    checkpoints.save(make_state(60))
    assert checkpoints.find("auto")["global_step"] == 60


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_became_read_only_is_survived(tmp_path: Path):
    told = Told()
    checkpoints = make_checkpoints(tmp_path, told, save_errors="continue")
    tmp_path.chmod(0o500)
    checkpoints.save(make_state(5))
    tmp_path.chmod(0o700)
    assert "Permission denied" in told[0]


def test_the_file_and_its_name_reach_the_disk_before_the_save_is_done(tmp_path: Path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), real_fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append("replace"), real_replace(path, to)))
    make_checkpoints(tmp_path).save(make_state())
    assert events == ["fsync", "replace", "fsync"]

"""Checkpoints: what they contain, which one a run resumes from, and what damage or a full disk does to them."""

import logging
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.soak import same
from model import CLIP, CLIPConfig, load_clip
from tests.conftest import TINY
from trainer.config import load_train_config
from trainer.optim import build_optimizer
from trainer.parallel import Runtime
from trainer.run.checkpoint import CheckpointWriter, TrainState, find_checkpoint, restore
from trainer.run.configs import Configs, load_configs
from trainer.run.flags import parse_args
from utils.config import to_plain
from utils.errors import UserError

CPU = Runtime(torch.device("cpu"), num_devices=1)
BASE = load_configs(parse_args([], ""))
SMALL = CLIPConfig(**{**vars(TINY), "vocab_size": 500, "context_length": 8})  # a file of 1 MB


class ListLogger(logging.Logger):
    """Keeps its messages."""

    def __init__(self) -> None:
        super().__init__("test")
        self.messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.messages.append(record.getMessage())
        self.addHandler(handler)


def make_state(step: int = 120, rng_seed: int = 0, config: CLIPConfig = SMALL, **changes: object) -> TrainState:
    """Return a state in the middle of epoch 3, after one update by random gradients. `changes`: of the trainer."""
    torch.manual_seed(rng_seed)
    model = CLIP(config)
    trainer = load_train_config(changes)
    optimizer = build_optimizer(model, trainer.optimizer, steps_per_epoch=10)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    configs = Configs(config, trainer, BASE.dataloader)
    state = TrainState(model, optimizer, scaler, configs, epoch=3, samples_seen=40, global_step=step)
    state.meter.update([{"loss": torch.tensor(rng_seed + 0.5)}], torch.tensor(True))
    return state


def make_writer(folder: Path, logger: logging.Logger | None = None, **changes: object) -> CheckpointWriter:
    return CheckpointWriter(folder, make_state().model, load_train_config(changes), CPU, logger or ListLogger())


def save(writer: CheckpointWriter, state: TrainState) -> None:
    writer.save(state)
    writer.wait()


def save_best(writer: CheckpointWriter, state: TrainState) -> None:
    writer.save_best(state)
    writer.wait()


def find(folder: Path, resume: str = "auto", logger: logging.Logger | None = None) -> dict | None:
    return find_checkpoint(resume, folder, logger or ListLogger())


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_checkpoint_has_the_name_and_keys_of_the_reference_and_its_configuration(tmp_path: Path):
    state = make_state()
    save(make_writer(tmp_path), state)
    checkpoint = torch.load(tmp_path / "checkpoint_3_120.pt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["samples_seen"], checkpoint["global_step"]) == (3, 40, 120)
    assert checkpoint["model_state_dict"].keys() == CLIP(SMALL).state_dict().keys()
    assert checkpoint["optimizer_state_dict"].keys() == state.optimizer.state_dict().keys()
    assert checkpoint["configs"] == to_plain(state.configs)
    assert load_clip(tmp_path).model.config == SMALL


def test_restoring_brings_back_weights_optimizer_progress_meter_and_generator(tmp_path: Path):
    state = make_state(rng_seed=1)
    save(make_writer(tmp_path), state)
    expected = torch.rand(3)
    other, logger = make_state(step=0, rng_seed=2), ListLogger()
    restore(other, find(tmp_path), CPU, logger)
    assert torch.equal(torch.rand(3), expected)
    assert (other.epoch, other.samples_seen, other.global_step, other.position) == (3, 40, 120, (3, 40))
    assert same(other.meter.state_dict(), state.meter.state_dict()) and not logger.messages
    assert same(dict(other.model.state_dict()), dict(state.model.state_dict()))
    assert same(other.optimizer.state_dict(), state.optimizer.state_dict())


def test_differences_from_the_checkpoint_are_logged_and_the_new_values_hold(tmp_path: Path):
    save(make_writer(tmp_path), make_state())
    state, logger = make_state(**{"seed": 5, "optimizer.params.weight_decay": 0.25}), ListLogger()
    restore(state, find(tmp_path), Runtime(torch.device("cpu"), num_devices=1, world_size=2), logger)
    assert [message.partition(": ")[2] for message in logger.messages] == [
        "trainer.seed was 11, is 5",
        "trainer.optimizer.params.weight_decay was 0.1, is 0.25",
        "world_size was 1, is 2",
    ]
    assert state.optimizer.param_groups[0]["weight_decay"] == 0.25 and state.samples_seen == 40


def test_the_newest_checkpoints_are_kept(tmp_path: Path):
    writer = make_writer(tmp_path, keep_last=2)
    for step in (5, 40, 120):
        save(writer, make_state(step))
    assert names(tmp_path) == ["checkpoint_3_120.pt", "checkpoint_3_40.pt"]
    save(make_writer(tmp_path, keep_last=0), make_state(130))
    assert len(names(tmp_path)) == 3 and find(tmp_path)["global_step"] == 130
    (tmp_path / "checkpoint_of_may_5.pt").touch()
    save(writer, make_state(140))
    assert names(tmp_path) == ["checkpoint_3_130.pt", "checkpoint_3_140.pt", "checkpoint_of_may_5.pt"]


def test_best_pt_contains_the_weights_but_cannot_be_resumed(tmp_path: Path):
    writer = make_writer(tmp_path)
    save_best(writer, make_state())
    assert names(tmp_path) == ["best.pt"] and load_clip(tmp_path / "best.pt").model.config == SMALL
    assert find(tmp_path) is None
    with pytest.raises(UserError, match="best.pt: contains weights alone.* best validation.* --checkpoint_path"):
        find(tmp_path, str(tmp_path / "best.pt"))
    save_best(make_writer(tmp_path / "none", keep_best=False), make_state())
    assert not (tmp_path / "none").exists()


def flip_bit(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "other library", "weights alone"])
def test_a_damaged_newest_checkpoint_is_skipped_and_kept(tmp_path: Path, damage):
    writer = make_writer(tmp_path, keep_last=2)
    for step in (5, 40):
        save(writer, make_state(step))
    newest = tmp_path / "checkpoint_3_40.pt"
    if damage == "flipped bit":
        flip_bit(newest, 0.5)
    elif damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:-5_000])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "other library":
        newest.write_bytes(pickle.dumps({"weights": [1.0, 2.0]}))
    else:
        torch.save({"model_state_dict": {}}, newest)
    content, logger = newest.read_bytes(), ListLogger()
    assert find(tmp_path, logger=logger)["global_step"] == 5
    assert len(logger.messages) == 1 and "checkpoint_3_40.pt" in logger.messages[0]
    for step in (10, 15):
        save(writer, make_state(step))
    assert names(tmp_path) == ["checkpoint_3_10.pt", "checkpoint_3_15.pt", "checkpoint_3_40.pt"]
    assert newest.read_bytes() == content  # it does not count as one of the newest two
    save(writer, make_state(40))
    assert find(tmp_path, logger=logger)["global_step"] == 40 and len(logger.messages) == 1


def test_a_flipped_bit_anywhere_in_a_weight_is_noticed(tmp_path: Path):
    save(make_writer(tmp_path), make_state())
    file = tmp_path / "checkpoint_3_120.pt"
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    whole = file.read_bytes()
    for share in (0.01, 0.3, 0.7, 0.99):
        file.write_bytes(whole)
        flip_bit(file, (largest.header_offset + 200 + share * (largest.file_size - 200)) / len(whole))
        with pytest.raises(UserError, match="checksum"):
            find(tmp_path, str(file))


def test_a_folder_of_damaged_checkpoints_does_not_start_anew(tmp_path: Path):
    (tmp_path / "checkpoint_0_5.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no readable checkpoint"):
        find(tmp_path)
    assert find(tmp_path / "new") is None


def test_other_training_data_is_refused_unless_it_is_allowed(tmp_path: Path):
    state, logger = make_state(), ListLogger()
    save(make_writer(tmp_path), state)
    assert find_checkpoint("auto", tmp_path, logger, training_data="24 images")["training_data"] == ""
    assert "does not record its training data" in logger.messages.pop()
    state.training_data = "24 images, fingerprint 1"
    save(make_writer(tmp_path), state)
    same, other = {"training_data": "24 images, fingerprint 1"}, {"training_data": "9 images, fingerprint 2"}
    assert find_checkpoint("auto", tmp_path, logger, **same) and not logger.messages
    with pytest.raises(UserError, match="was 24 images, .*, is now 9 images, .*--allow_other_data"):
        find_checkpoint("auto", tmp_path, logger, **other)
    assert find_checkpoint("auto", tmp_path, logger, **other, allow_other_data=True)["global_step"] == 120
    assert "is now 9 images" in logger.messages[0]


def test_resuming_from_an_older_checkpoint_does_not_overwrite_newer_ones(tmp_path: Path):
    writer = make_writer(tmp_path)
    for step in (5, 40):
        save(writer, make_state(step))
    with pytest.raises(UserError, match=r"newer than .*checkpoint_3_5.pt \(e.g. checkpoint_3_40.pt\)"):
        find(tmp_path, str(tmp_path / "checkpoint_3_5.pt"))
    assert find(tmp_path / "elsewhere", str(tmp_path / "checkpoint_3_5.pt"))["global_step"] == 5
    assert find(tmp_path, str(tmp_path))["global_step"] == 40


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path):
    torch.save({"model_state_dict": CLIP(SMALL).state_dict(), "epoch": 3}, tmp_path / "reference.pt")
    with pytest.raises(UserError, match="reference.pt: contains no training state"):
        find(tmp_path, str(tmp_path / "reference.pt"))
    save(make_writer(tmp_path), make_state())
    with pytest.raises(UserError, match="decay_all"):
        restore(make_state(**{"optimizer.decay_all": True}), find(tmp_path), CPU, ListLogger())
    with pytest.raises(UserError, match="the checkpoint"):
        restore(make_state(config=TINY), find(tmp_path), CPU, ListLogger())


def test_a_checkpoint_of_an_earlier_format_is_refused_by_resume_alone(tmp_path: Path):
    save(make_writer(tmp_path), make_state())
    file = tmp_path / "checkpoint_3_120.pt"
    torch.save({**torch.load(file, weights_only=True), "format_version": 2}, file)
    with pytest.raises(UserError, match="checkpoint_3_120.pt.*earlier version"):
        find(tmp_path, str(file))
    assert load_clip(file).model.config == SMALL


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_failed_save_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch, error, policy):
    logger = ListLogger()
    writer = make_writer(tmp_path, logger, save_errors=policy)
    save(writer, make_state(5))
    before = (tmp_path / "checkpoint_3_5.pt").read_bytes()

    def fail(_, file):
        file.write(b"half a checkpoint")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        if policy == "stop":
            with pytest.raises(UserError, match="checkpoint_3_40.pt"):
                save(writer, make_state(40))
        else:
            save(writer, make_state(40))
            assert len(logger.messages) == 1 and "checkpoint_3_40.pt" in logger.messages[0]
    assert names(tmp_path) == ["checkpoint_3_5.pt"] and (tmp_path / "checkpoint_3_5.pt").read_bytes() == before
    save(writer, make_state(60))
    assert find(tmp_path)["global_step"] == 60


def test_a_disk_that_fills_up_is_survived(tmp_path: Path):
    """A limit on the size of files stands in for a full disk: writing beyond it raises OSError too."""
    resource = pytest.importorskip("resource")
    logger = ListLogger()
    writer = make_writer(tmp_path, logger, save_errors="continue")
    save(writer, make_state(5))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        save(writer, make_state(40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["checkpoint_3_5.pt"] and "checkpoint_3_40.pt" in logger.messages[0]
    save(writer, make_state(60))
    assert find(tmp_path)["global_step"] == 60


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_becomes_read_only_is_survived(tmp_path: Path):
    logger = ListLogger()
    tmp_path.chmod(0o500)
    save(make_writer(tmp_path, logger, save_errors="continue"), make_state(5))
    tmp_path.chmod(0o700)
    assert "Permission denied" in logger.messages[0]


@pytest.mark.skipif(os.name != "posix", reason="a folder cannot be flushed")
def test_the_file_and_its_name_are_on_the_disk_when_a_save_returns(tmp_path: Path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), real_fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append("replace"), real_replace(path, to)))
    save(make_writer(tmp_path), make_state())
    assert events == ["fsync", "replace", "fsync"]


def test_the_expected_duration_of_a_save_is_that_of_the_slowest(tmp_path: Path, monkeypatch):
    state, writer = make_state(), make_writer(tmp_path)
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    estimate = writer.expected_seconds
    assert estimate == pytest.approx(num_parameters * 12 / 100e6)
    save(writer, state)
    slowest = writer.expected_seconds
    assert slowest == writer.seconds != estimate  # an estimate never counts as a measurement
    save(writer, make_state(121))
    assert writer.expected_seconds >= slowest > 0

from pathlib import Path

import pytest
import torch

from model import CLIP, load_clip
from tests.conftest import TINY
from trainer.checkpoint import TrainState, save_checkpoint
from trainer.config import load_train_config
from trainer.optim import build_optimizer
from utils.config import to_plain
from utils.errors import UserError


def make_state() -> TrainState:
    model = CLIP(TINY)
    preprocessing = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    configs = {"model": to_plain(TINY), "trainer": to_plain(load_train_config()), "dataloader": preprocessing}
    optimizer = build_optimizer(model, load_train_config().optimizer)
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), configs, epoch=3, global_step=120)


def test_a_checkpoint_has_the_references_name_and_keys_and_explains_itself(tmp_path: Path):
    state = make_state()
    rng_state = torch.get_rng_state()
    save_checkpoint(tmp_path, state)
    checkpoint = torch.load(tmp_path / "checkpoint_3_120.pt", weights_only=True)
    assert checkpoint["epoch"] == 3 and checkpoint["global_step"] == 120
    assert checkpoint["model_state_dict"].keys() == CLIP(TINY).state_dict().keys()
    assert checkpoint["optimizer_state_dict"].keys() == state.optimizer.state_dict().keys()
    assert checkpoint["configs"] == state.configs
    assert torch.equal(checkpoint["rng_state"]["cpu"], rng_state)
    assert to_plain(load_clip(tmp_path).model.config) == to_plain(TINY)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_failed_save_leaves_the_earlier_one_and_nothing_else(tmp_path: Path, monkeypatch, error):
    state = make_state()
    save_checkpoint(tmp_path, state)
    before = (tmp_path / "checkpoint_3_120.pt").read_bytes()

    def fail(_, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="checkpoint_3_120.pt cannot be written"):
        save_checkpoint(tmp_path, state)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_3_120.pt"]
    assert (tmp_path / "checkpoint_3_120.pt").read_bytes() == before

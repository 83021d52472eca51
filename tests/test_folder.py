"""The output folder of a run: created, guarded against overwriting, and locked."""

import os
from pathlib import Path

import pytest

from tests.runs import SECONDS, start_forks, wait_until
from trainer.config import load_train_config
from trainer.run import folder as run_folder
from trainer.run.folder import open_run_folder
from utils.errors import UserError


def open_folder(path: Path, resume: str | None = None, *, is_main: bool = True):
    return open_run_folder(path, load_train_config(), resume, is_main=is_main)


def test_folders_are_created_and_unfinished_files_deleted(tmp_path: Path):
    with open_folder(tmp_path / "new") as folder:
        assert folder.checkpoints.is_dir() and folder.logs.is_dir()
        part = folder.checkpoints / "checkpoint_0_5.pt.part-7"
        part.write_bytes(b"half a checkpoint")
    with open_folder(tmp_path / "new", "auto"):
        assert not part.exists() and list(folder.checkpoints.iterdir()) == []


def test_files_that_no_run_writes_are_kept(tmp_path: Path):
    with open_folder(tmp_path) as folder:
        mine = [folder.checkpoints / name for name in ("backup.tar.part-1", ".writable", "checkpoint_of_may_5.pt")]
        for file in mine:
            file.touch()
    with open_folder(tmp_path):
        assert all(file.exists() for file in mine)


def test_other_ranks_name_the_folders_without_touching_them(tmp_path: Path):
    with open_folder(tmp_path / "new", is_main=False) as folder:
        assert folder.checkpoints.parent == tmp_path / "new" and not (tmp_path / "new").exists()


def test_the_checkpoints_of_an_earlier_run_are_not_overwritten(tmp_path: Path):
    with open_folder(tmp_path) as folder:
        (folder.checkpoints / "checkpoint_0_10.pt").touch()
    with pytest.raises(UserError, match="checkpoint_0_10.pt"), open_folder(tmp_path):
        pass
    with open_folder(tmp_path, "auto"):
        pass


def test_the_checkpoint_to_resume_from_must_exist(tmp_path: Path):
    with pytest.raises(UserError, match="--resume nowhere.pt"), open_folder(tmp_path / "new", "nowhere.pt"):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"), open_folder(tmp_path):
        pass
    tmp_path.chmod(0o700)


def hold(path: Path) -> None:
    """Hold the lock of a folder until killed."""
    with open_folder(path):
        (path / "held").touch()
        wait_until(lambda: False)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_runs(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    (holder,) = start_forks(hold, [(tmp_path,)])
    wait_until((tmp_path / "held").exists)
    with pytest.raises(UserError, match="in use by another run; choose another --output_dir"), open_folder(tmp_path):
        pass
    holder.kill()
    holder.join(SECONDS)
    with open_folder(tmp_path):  # the lock of a killed process is no obstacle
        pass
    with open_folder(tmp_path):  # nor is one that was released
        pass


@pytest.mark.parametrize("content", ["", "{", "12345", "\x00"])
def test_a_lock_file_that_nobody_holds_is_no_obstacle(tmp_path: Path, monkeypatch, content):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    (tmp_path / run_folder.LOCK_FILE).write_text(content)
    with open_folder(tmp_path):
        pass

"""Platforms without `fcntl`, `resource`, SIGUSR1 and flushing of folders, as Windows is, simulated in a process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SCRIPT_ENVIRONMENT
from tests.runs import SECONDS, last_checkpoint, read_rows, tiny_flags, val_flags

BARE_PLATFORM = """
import multiprocessing, os, signal, sys, types
sys.modules["fcntl"] = sys.modules["resource"] = None  # importing them fails
del signal.SIGUSR1
open_file = os.open

def open_no_folder(path, *arguments, **options):
    if isinstance(path, (str, bytes, os.PathLike)) and os.path.isdir(path) and "dir_fd" not in options:
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *arguments, **options)

os.open = open_no_folder
import utils.files
utils.files.os = types.SimpleNamespace(**{**vars(os), "name": "nt"})
multiprocessing.set_start_method("spawn")
import train, zero_shot_demo, zero_shot_eval
train.main(sys.argv[1:])
"""


LOCK_TWICE = """
from pathlib import Path
from trainer.config import load_train_config
from trainer.run import folder
from utils.errors import UserError
folder.LOCK_SECONDS = 0

def open_here():
    return folder.open_run_folder(Path("locked"), load_train_config(), None, is_main=True)

with open_here():
    try:
        with open_here():
            sys.exit("two runs at once")
    except UserError:
        pass
if not os.fork():
    with open_here():
        os._exit(0)  # as if killed
os.wait()
with open_here():
    pass
"""


@pytest.mark.slow
def test_training_and_locks_work_without_posix_features(tmp_path: Path, caption_files):
    flags = tiny_flags(caption_files, tmp_path / "out", epochs=1, **{"trainer.num_workers": 1})
    output = subprocess.run(
        [sys.executable, "-c", BARE_PLATFORM + LOCK_TWICE, *flags, *val_flags(caption_files)],
        cwd=tmp_path,
        env=SCRIPT_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert output.returncode == 0, output.stderr
    assert last_checkpoint(tmp_path / "out")["global_step"] == 3
    assert [row["peak_memory_gib"] for row in read_rows(tmp_path / "out", "loss")] == [None, None]  # unknown
    assert len(read_rows(tmp_path / "out", "val_loss")) == 1

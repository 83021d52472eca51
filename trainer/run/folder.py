"""The output folder of a run: created, locked against other runs, and released."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from trainer.config import TrainConfig
from trainer.run.checkpoint import CHECKPOINT_NAMES, list_checkpoints
from utils.errors import UserError
from utils.files import delete_unfinished

LOCK_FILE = "run.lock"
LOCK_SECONDS = 10  # the workers of a killed run may hold its lock for some seconds after it


class RunFolder(NamedTuple):
    """Where a run writes."""

    checkpoints: Path
    logs: Path


@contextlib.contextmanager
def open_run_folder(output_dir: Path, config: TrainConfig, resume: str | None, *, is_main: bool) -> Iterator[RunFolder]:
    """Create the folders of a run, and keep other runs out of them while the context lasts.

    Rank 0 does the work; in other processes the context only names the folders. Files that a killed run left
    unfinished are deleted. Raises UserError if the folders are not writable, are in use, or contain another run's
    checkpoints and nothing is resumed, and if the checkpoint to resume from does not exist.
    """
    folder = RunFolder(output_dir / config.saved_checkpoints, output_dir / config.logs)
    if not is_main:
        yield folder
        return
    if resume not in (None, "auto") and not Path(resume).exists():
        raise UserError(f"--resume {resume}: the checkpoint does not exist; check the path, or use --resume auto")
    earlier = list_checkpoints(folder.checkpoints)
    if earlier and resume is None:
        raise UserError(
            f"{folder.checkpoints} contains another run's checkpoints (e.g. {earlier[-1].name}), which this run would "
            "overwrite; continue that run with --resume auto, move them away, or choose another --output_dir"
        )
    lock = FileLock(output_dir / LOCK_FILE)
    try:
        for path in folder:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()  # raises OSError if the folder is not writable
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(f"{output_dir} is in use by another run; choose another --output_dir") from None
    except OSError as error:
        raise UserError(f"{output_dir} is not writable ({error.strerror}); choose another --output_dir") from None
    try:
        delete_unfinished(folder.checkpoints, rf"{CHECKPOINT_NAMES}|best\.pt")
        delete_unfinished(folder.logs, r"metrics\.jsonl")
        yield folder
    finally:
        lock.release()

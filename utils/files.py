"""Files that are there whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".part-"  # and the number of the process that writes


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when it is complete and on the disk.

    Until then `path` is what it was, and it stays so if the block raises. Raises OSError.
    """
    part = path.with_name(f"{path.name}{UNFINISHED}{os.getpid()}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all. Raises OSError."""
    with open_whole(path) as file:
        file.write(content)


def delete_unfinished(folder: Path) -> None:
    """Delete what killed processes left behind. Raises OSError."""
    for part in folder.glob(f"*{UNFINISHED}*"):
        part.unlink(missing_ok=True)

"""Write files that are either complete or absent."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".part-"  # in the name of a file that is being written, before the process id


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` once it is complete and on the disk.

    If the block raises, `path` stays unchanged. Raises OSError.
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
    if os.name == "posix":  # flush the new name too; Windows cannot open a directory
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which is replaced in one step. Raises OSError."""
    with atomic_open(path) as file:
        file.write(content)


def numbered(path: Path) -> Iterator[Path]:
    """Yield a path, then the same with -2, -3 and so on before its suffix."""
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number}")


def delete_unfinished(folder: Path, names: str) -> None:
    """Delete what killed processes left in `folder` of files whose names match a regular expression. Raises OSError."""
    for part in folder.iterdir():
        if re.fullmatch(f"({names}){re.escape(UNFINISHED)}[0-9]+", part.name):
            part.unlink(missing_ok=True)

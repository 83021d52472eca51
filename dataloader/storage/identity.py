"""What tells one data set from another, and the files that a cache or an index was made of from others."""

import hashlib
import os
import stat
import zlib
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np


def fingerprint(*columns: Sequence[str] | np.ndarray) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of texts and of arrays."""
    digest = hashlib.sha256()
    for column in columns:
        is_array = isinstance(column, np.ndarray)
        data = column.tobytes() if is_array else "\0".join(column).encode("utf-8", "surrogatepass")
        digest.update(b"%d texts or rows, %d bytes\0" % (len(column), len(data)))
        digest.update(data)
    return digest.hexdigest()[:16]


def relative_names(paths: Sequence[str]) -> list[str]:
    """Return the paths below the deepest folder that they share: the same wherever that folder is moved."""
    pairs = zip(min(paths, default=""), max(paths, default=""), strict=False)
    common = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = max(common.rfind("/"), common.rfind(os.sep)) + 1
    return [path[start:].replace(os.sep, "/") for path in paths]


def stamps(paths: Sequence[str | Path]) -> np.ndarray:
    """Return the size in bytes and the times of modification and of change (ns) of each file, int64 [num_files, 3].

    No program can set the second time on Linux or macOS; on Windows it is that of creation. -1 where there is no
    regular file.
    """
    rows = []
    for path in paths:
        try:
            info = os.stat(path)  # noqa: PTH116 (Path costs more than the call)
        except (OSError, ValueError):
            info = None
        is_file = info is not None and stat.S_ISREG(info.st_mode)
        rows.append((info.st_size, info.st_mtime_ns, info.st_ctime_ns) if is_file else (-1, -1, -1))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def checksum(path: str | Path) -> int:
    """Return the CRC-32 of a file, or -1 if it is not a regular file that can be read."""
    try:
        return zlib.crc32(Path(path).read_bytes()) if Path(path).is_file() else -1
    except (OSError, ValueError):
        return -1

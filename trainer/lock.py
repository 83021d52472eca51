"""One run at a time in an output folder."""

import atexit
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from utils.errors import UserError

LOCK_FILE = "run.lock"
SILENT_SECONDS = 900  # after which a lock of another machine, which cannot be asked, counts as left behind


class RunLock:
    """Holds `run.lock` in `folder` until the process ends; the file tells the machine and the process.

    The system frees the lock of a process that died. A lock of another machine counts as left behind when for a
    quarter of an hour nothing was written to its run's log, `heartbeat`. Raises UserError while another run holds it.
    """

    def __init__(self, folder: Path, heartbeat: Path) -> None:
        self.path = folder / LOCK_FILE
        host = socket.gethostname()
        while True:
            self._file = self.path.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_free = True
            except OSError:
                is_free = False
            if is_free and not self._is_current():
                continue  # its holder ended, and deleted it, in between
            owner = self._owner()
            signs = [file.stat().st_mtime for file in (self.path, heartbeat) if file.exists()]
            age = time.time() - max(signs, default=0)
            if not is_free or (owner.get("host", host) != host and age < SILENT_SECONDS):
                who = f"process {owner.get('pid', '?')} on {owner.get('host', 'some machine')}"
                raise UserError(
                    f"{folder} is in use by another run, {who}; choose another --output_dir, or if that run has ended "
                    f"delete {self.path}"
                )
            break
        self._file.truncate(0)
        self._file.write(json.dumps({"host": host, "pid": os.getpid()}))
        self._file.flush()
        atexit.register(self.release)

    def release(self) -> None:
        """Let another run begin; once is enough."""
        if not self._file.closed:
            self.path.unlink(missing_ok=True)
            self._file.close()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def _owner(self) -> dict:
        try:
            self._file.seek(0)
            owner = json.loads(self._file.read())
            return owner if isinstance(owner, dict) else {}
        except (ValueError, OSError):
            return {}

"""Errors that the user can correct."""

import sys
from collections.abc import Callable

from utils.text import one_line


class UserError(Exception):
    """An error that the user can correct.

    `message`: one sentence: what is wrong, where, and what to do. `steps`: lines of commands that follow it.
    """

    def __init__(self, message: str, steps: str = "") -> None:
        super().__init__(one_line(message), steps)

    def __str__(self) -> str:
        return "".join(self.args)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. On a `UserError`, print one line and exit with status 1; on Ctrl-C, with 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name need not be valid text
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped by the user", file=sys.stderr)
        sys.exit(130)

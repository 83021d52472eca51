"""Errors that the user can correct."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """An error that the user can correct. The message is one sentence: what is wrong, where, and what to do."""


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

"""Mistakes a user can mend, told in one sentence."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend. Its message is one sentence: what is wrong, where, and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` becomes one line on stderr and exit status 1, Ctrl-C status 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped by the user", file=sys.stderr)
        sys.exit(130)

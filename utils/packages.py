"""Installed packages: their data files, found without an import that can take seconds, and their chatter."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from utils.errors import UserError


def package_file(package: str, name: str) -> Path:
    """Return the file `name`, relative to the package's folder. Raises UserError if it is not installed."""
    spec = find_spec(package)
    file = Path(spec.origin).parent / name if spec and spec.origin else None
    if file is None or not file.is_file():
        raise UserError(f"{name} of the package {package} is not found; pip install -r requirements.txt")
    return file


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a package from printing, logging and warning; what goes wrong it raises, and the caller tells."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)

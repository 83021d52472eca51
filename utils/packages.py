"""Installed packages: locate their data files without importing them, and silence them."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from utils.errors import UserError


def package_file(package: str, name: str) -> Path:
    """Return the path of `name` in the package's folder. Raises UserError if it is not installed."""
    spec = find_spec(package)
    file = Path(spec.origin).parent / name if spec and spec.origin else None
    if file is None or not file.is_file():
        raise UserError(f"the package {package} with its file {name} is not installed; pip install -r requirements.txt")
    return file


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what a package prints, logs and warns of. Its exceptions still reach the caller."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)

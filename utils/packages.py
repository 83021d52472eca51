"""Data files of installed packages, found without importing the package: that can take seconds."""

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

"""Read the tensors of a checkpoint of any format, told by its content. Nothing that a file holds is executed."""

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.errors import UserError
from utils.text import one_line

# Classes of data that training scripts store beside the weights. They are read as `Foreign`.
DATA_CLASSES = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy*.multiarray.scalar",
    "types.SimpleNamespace",
)
DATA_CLASSES += ("numpy*.multiarray._reconstruct", "numpy.dtypes.*DType", "pathlib*Path", "*.AttributeDict")
DATA_CLASSES += ("datetime.datetime", "datetime.timedelta")
OTHER_CONTENT = {  # the first bytes of what is often taken for a checkpoint
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; run git lfs pull where it came from",
    b"<": "is a web page, not the weights; download the file itself",
    b"\x1f\x8b": "is compressed with gzip; unpack it",
}


class Foreign:
    """Stands for an object of a class in a pickle: keeps its attributes, and is never the class itself."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Foreign":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the dictionary of a checkpoint onto the CPU: tensors and plain containers.

    Reads what `torch.save` writes, safetensors, and the weights of TorchScript archives. Objects of `DATA_CLASSES`
    become `Foreign`; any other class or function is refused by name. Verifies the checksums of files with a
    `format_version`, as ours have. Raises UserError.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever matters about a damaged file is raised below
            checkpoint = _read(file, path)
            is_ours = isinstance(checkpoint, dict) and "format_version" in checkpoint
            if is_ours and (damaged := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"the checksum of {damaged} is wrong")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"the checkpoint {path} does not exist; check the path, or train: python train.py") from None
    except PermissionError as error:
        raise UserError(f"the checkpoint {path} cannot be read ({error.strerror}); check its permissions") from None
    except Exception as error:  # unpickling a damaged file raises errors of any kind
        reason = one_line(error) or type(error).__name__
        if refused := re.search(r"GLOBAL (\S+)", reason):
            raise UserError(
                f"{path}: holds {refused[1]}, which is neither a tensor nor plain data, and may be code, which is not "
                'run; if you trust the file, save its weights alone: python -c "import torch; torch.save(torch.load('
                "'IN', weights_only=False)['state_dict'], 'OUT')\""
            ) from None
        raise UserError(
            f"{path}: is not a checkpoint of tensors and plain containers ({reason.split('. ')[0][:200]}); it is "
            "damaged or of another kind; use another file"
        ) from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not the dictionary of a checkpoint")
    return checkpoint


def _read(file: BinaryIO, path: Path) -> Any:
    start = file.read(32)
    file.seek(0)
    for first_bytes, problem in OTHER_CONTENT.items():
        if start.startswith(first_bytes):
            raise UserError(f"{path}: {problem}")
    if start[8:9] == b"{":  # after the length of a JSON header
        if find_spec("safetensors") is None:
            raise UserError(f"{path}: is a safetensors file, which needs that package; pip install safetensors")
        from safetensors.torch import load_file

        return load_file(path)
    names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
    file.seek(0)
    is_torchscript = any(name.endswith("/constants.pkl") for name in names)
    if is_torchscript:
        file = _without_code(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        file.seek(0)
        foreign = [
            type(name, (Foreign,), {"__module__": module})
            for module, name in set(_classes(file))
            if (is_torchscript and module.startswith("__torch__"))
            or any(fnmatchcase(f"{module}.{name}", pattern) for pattern in DATA_CLASSES)
        ]
        file.seek(0)
        with torch.serialization.safe_globals(foreign):
            content = torch.load(file, map_location="cpu", weights_only=True)
        return dict(_tensors(content)) if is_torchscript else content


def _without_code(file: BinaryIO) -> BinaryIO:
    """Return the records of a TorchScript archive that `torch.save` would write: the pickle and its storages."""
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as records:
        for name in archive.namelist():
            if re.fullmatch(r"[^/]+/(data\.pkl|data/\d+|version|byteorder)", name):
                records.writestr(name, archive.read(name))
    copy.seek(0)
    return copy


def _classes(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of the classes and functions that a checkpoint's pickle refers to."""
    pickles = [file] * 4  # before zip archives: a magic number, a version, the system, and the content
    if zipfile.is_zipfile(file):
        archive = zipfile.ZipFile(file)
        pickles = [archive.open(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    else:
        file.seek(0)
    for content in pickles:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "GLOBAL":
                module, _, name = argument.partition(" ")
                yield module, name


def _tensors(module: Foreign, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a TorchScript module with the names of its state dict."""
    state = getattr(module, "state", None)
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Foreign):
            yield from _tensors(value, f"{prefix}{name}.")

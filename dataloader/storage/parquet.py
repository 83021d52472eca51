"""Read captions, and images if they are inside, from Parquet files through the package `pyarrow`."""

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.images import UnreadableImageError


class ParquetImages(Sequence[io.BytesIO]):
    """The encoded images in a binary column of a file, in memory. `rows`: the row of each image, counted from 0."""

    side, notes = None, ()  # as in `Shards`

    def __init__(self, file: Path, column: Any, rows: list[int]) -> None:
        self.folder = file
        self.column = column
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> io.BytesIO:
        data = self.column[self.rows[number]].as_py()
        if data is None:
            raise UnreadableImageError(f"{self.name(number)} has no image")
        return io.BytesIO(data)

    def name(self, number: int) -> str:
        """Return "FILE row 3", counted from 1."""
        return f"{self.folder} row {self.rows[number] + 1}"

    def contents(self) -> list[np.ndarray]:
        """Return the size in bytes and the CRC-32 of each image, int64 [num_images] each."""
        images = [self.column[row].as_py() or b"" for row in self.rows]
        return [np.array([function(image) for image in images], dtype=np.int64) for function in (len, zlib.crc32)]

    def take(self, numbers: Sequence[int]) -> "ParquetImages":
        """Return the images at these positions."""
        return ParquetImages(self.folder, self.column, [self.rows[number] for number in numbers])


def read_parquet(file: Path) -> Any:
    """Return the file as a `pyarrow.Table`. Raises UserError if it is damaged or pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{file}: is Parquet, which is not read without another package: pip install pyarrow, or convert it to CSV"
        ) from None
    try:
        return parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: is not Parquet, or is damaged ({reason}); complete the download") from None


def split_images(column: Any) -> tuple[Any, list[str | None]]:
    """Return a column's image bytes, or None if it has paths alone, and its paths.

    `column`: text, binary, or Hugging Face's struct of `bytes` and `path`.
    """
    from pyarrow import compute, types

    if types.is_struct(column.type) and {"bytes", "path"} <= {field.name for field in column.type}:
        images, paths = compute.struct_field(column, "bytes"), compute.struct_field(column, "path").to_pylist()
        return (None if images.null_count == len(images) else images), paths
    if types.is_binary(column.type) or types.is_large_binary(column.type):
        return column, [None] * len(column)
    return None, column.to_pylist()

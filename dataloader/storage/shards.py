"""Read WebDataset shards on a disk, tar files of `KEY.jpg` and `KEY.json` (or `KEY.txt`), by index.

An index of the images' positions makes shards as random-access as files: global shuffle, exact length, all captions.
`dataloader.pack` stores it with its shards; those of other tools are indexed on the first use.
"""

import contextlib
import io
import json
import mmap
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataloader.tables import split_lines
from dataloader.token_table import PackedStrings
from utils.errors import UserError
from utils.files import atomic_open
from utils.images import UnreadableImageError

INDEX_FILE, MANIFEST_FILE = "index.npz", "pack.json"
REPEATED = ""  # in a sample that has two members of one name: which caption is whose is unknown
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
Index = dict[str, np.ndarray]  # what `index_shards` returns


class Shards(Sequence[io.BytesIO]):
    """The encoded images of a folder of shards: image i is row rows[i] of the index.

    `unusable` lists damaged shards and samples. Reading an image whose bytes have changed since they were indexed
    raises UnreadableImageError, which names it.
    """

    def __init__(self, folder: Path, index: Index, rows: np.ndarray) -> None:
        self.folder = folder
        self.index = index
        self.rows = rows
        self.keys = PackedStrings.from_arrays(index["keys"], index["keys_ends"])
        self.unusable: list[str] = [*index["unusable"].tolist(), *_changed_shards(folder, index)]
        self.is_checked = np.zeros(len(index["crc"]), dtype=bool)  # each process checks an image once
        self._maps: dict[int, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: Path, rows: np.ndarray | None = None) -> "Shards":
        """Open all images of a folder, or those of `rows`. Raises UserError if it has no shards."""
        if not any(folder.glob("*.tar")):
            raise UserError(f"{folder} contains no shards (*.tar); python -m dataloader.pack makes them")
        index = _read_index(folder)
        if index is None:
            index = index_shards(folder)
            with contextlib.suppress(OSError):  # each run indexes the shards of a read-only folder anew
                write_index(folder, index)
        return cls(folder, index, np.arange(len(index["crc"])) if rows is None else rows)

    def take(self, numbers: Sequence[int]) -> "Shards":
        """Return the images at these positions."""
        return Shards(self.folder, self.index, self.rows[list(numbers)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> io.BytesIO:
        row = self.rows[number]
        shard, offset, size = (int(self.index[column][row]) for column in ("shard", "offset", "size"))
        data = self._map(shard)[offset : offset + size]
        if not self.is_checked[row] and zlib.crc32(data) != self.index["crc"][row]:
            raise UnreadableImageError(f"{self.name(number)} is damaged")
        self.is_checked[row] = True
        return io.BytesIO(data)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each process maps the files itself

    def name(self, number: int) -> str:
        """Return SHARD.tar/KEY."""
        row = self.rows[number]
        return f"{self.folder / self.index['files'][self.index['shard'][row]]}/{self.keys[row]}"

    @property
    def side(self) -> int | None:
        """The short side of every image in pixels if `dataloader.pack` made the shards, else None."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return json.loads((self.folder / MANIFEST_FILE).read_bytes())["size"]
        return None

    def samples(self) -> Iterator[tuple[int | str, str, tuple[str, ...]]]:
        """Yield the id, name and captions of each image."""
        texts = PackedStrings.from_arrays(self.index["texts"], self.index["texts_ends"])
        for number, row in enumerate(self.rows):
            image_id, captions = json.loads(texts[row])
            yield image_id, self.name(number), tuple(captions)

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            path = self.folder / str(self.index["files"][shard])
            try:
                with path.open("rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                raise UnreadableImageError(f"{path}: {error}") from None
        return self._maps[shard]


def index_shards(folder: Path) -> Index:
    """Find the position, checksum, id and captions of each image in a folder's shards; damaged parts are skipped."""
    rows, keys, texts, unusable = [], [], [], []
    files = sorted(folder.glob("*.tar"))
    for shard, file in enumerate(files):
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(file, "r:", ignore_zeros=True) as tar:  # also skips damaged headers
                for member in tar:
                    _read_member(tar, member, samples)
        except (tarfile.TarError, OSError) as error:
            unusable.append(f"{file} ({error})")
        for key, sample in samples.items():
            image = next((sample[suffix] for suffix in IMAGE_MEMBERS if suffix in sample), None)
            image_id, captions = texts_of(sample, key)
            if image is None or not captions or REPEATED in sample:
                problem = "is there twice" if REPEATED in sample else f"has no {'caption' if image else 'image'}"
                unusable.append(f"{file}/{key} ({problem})")
                continue
            rows.append((shard, *image))
            keys.append(key)
            texts.append(json.dumps([image_id, captions]))
    keys, texts = PackedStrings(keys), PackedStrings(texts)
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return {
        "files": np.array([file.name for file in files]),
        "file_sizes": np.array([file.stat().st_size for file in files]),
        **dict(zip(("shard", "offset", "size", "crc"), columns, strict=True)),
        **{"keys": keys.data, "keys_ends": keys.ends, "texts": texts.data, "texts_ends": texts.ends},
        "unusable": np.array(unusable, dtype=np.str_),
    }


def write_index(folder: Path, index: Index) -> None:
    """Store the index beside the shards. Raises OSError."""
    with atomic_open(folder / INDEX_FILE) as file:
        np.savez(file, **index)


def texts_of(content: Mapping[str, bytes], key: str) -> tuple[int | str, list[str]]:
    """Return the image id and captions in the `json` member of a sample, or the lines of its `txt` member."""
    try:
        record = json.loads(content.get("json", b"{}"))
    except (ValueError, RecursionError):
        record = {}
    record = record if isinstance(record, dict) else {}
    captions = record.get("captions", record.get("caption"))
    if not captions and "txt" in content:
        with contextlib.suppress(ValueError):  # no caption rather than a wrong one
            captions = split_lines(content["txt"])
    captions = [captions] if isinstance(captions, str) else captions if isinstance(captions, list) else []
    captions = [caption for caption in captions if isinstance(caption, str) and caption.strip()]
    image_id = record.get("image_id", key)
    return image_id if isinstance(image_id, int | str) else key, captions


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, dict[str, Any]]) -> None:
    """Add a member to its sample: an image as (offset, size, checksum), a text as bytes. Raises ReadError."""
    folder, _, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    if not member.isreg() or member.issparse():
        return
    if member.offset_data + member.size > Path(tar.name).stat().st_size:
        raise tarfile.ReadError("is cut short")
    suffix, value = suffix.lower(), None
    if suffix in ("json", "txt"):
        value = tar.extractfile(member).read()
    elif suffix in IMAGE_MEMBERS:
        value = member.offset_data, member.size, zlib.crc32(tar.extractfile(member).read())
    sample = samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})
    if suffix in sample:
        sample[REPEATED] = True
    sample[suffix] = value


def _read_index(folder: Path) -> Index | None:
    """Return the stored index, or None if there is none or it describes other files."""
    names = sorted(file.name for file in folder.glob("*.tar"))
    try:
        with np.load(folder / INDEX_FILE) as stored:
            index = dict(stored)
        is_packed = (folder / MANIFEST_FILE).is_file()  # by dataloader.pack: then a changed file is damaged
        is_current = index["files"].tolist() == names and (is_packed or not _changed_shards(folder, index))
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return index if is_current else None


def _changed_shards(folder: Path, index: Index) -> list[str]:
    """Describe the shards whose size differs from the indexed one."""
    sizes = [(folder / name).stat().st_size for name in index["files"].tolist()]
    return [
        f"{folder / name} (is {size:,} bytes long, not {expected:,})"
        for name, size, expected in zip(index["files"].tolist(), sizes, index["file_sizes"].tolist(), strict=True)
        if size != expected
    ]

"""Read WebDataset shards on a disk, tar files of `KEY.jpg` and `KEY.json` (or `KEY.txt`), by index.

An index of the images' positions makes shards as random-access as files: global shuffle, exact length, all captions.
`dataloader.pack` stores it with its shards; those of other tools are indexed on the first use. An index belongs to
shards of its sizes and times; shards with others are read anew.
"""

import contextlib
import io
import json
import mmap
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataloader.storage.identity import fingerprint, stamps
from dataloader.tables import split_lines
from dataloader.token_table import PackedStrings
from utils.errors import UserError
from utils.files import atomic_open
from utils.images import UnreadableImageError
from utils.text import one_line

INDEX_FILE, MANIFEST_FILE = "index.npz", "pack.json"
REPEATED = ""  # in a sample that has two members of one name: which caption is whose is unknown
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
Index = dict[str, np.ndarray]  # what `index_shards` returns


class Shards(Sequence[io.BytesIO]):
    """The encoded images of a folder of shards: image i is row rows[i] of the index.

    `unusable` lists damaged shards and samples; `notes` says why the index was made anew, and where it is if not beside
    the shards. Reading an image whose bytes have changed since they were indexed raises UnreadableImageError, which
    names it.
    """

    def __init__(self, folder: Path, index: Index, rows: np.ndarray, notes: Sequence[str] = ()) -> None:
        self.folder = folder
        self.index = index
        self.rows = rows
        self.notes = [one_line(note) for note in notes]
        self.keys = PackedStrings.from_arrays(index["keys"], index["keys_ends"])
        self.unusable: list[str] = index["unusable"].tolist()
        self.is_checked = np.zeros(len(index["crc"]), dtype=bool)  # each process checks an image once
        self._maps: dict[int, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: Path, rows: np.ndarray | None = None, cache_dir: str | Path | None = None) -> "Shards":
        """Open all images of a folder, or those of `rows`. Raises UserError if it has no shards.

        `cache_dir`: where the index goes if it cannot be written beside the shards.
        """
        if not any(folder.glob("*.tar")):
            raise UserError(f"{folder} contains no shards (*.tar); python -m dataloader.pack makes them")
        index, notes = _open_index(folder, cache_dir and Path(cache_dir))
        return cls(folder, index, np.arange(len(index["crc"])) if rows is None else rows, notes)

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

    def contents(self) -> list[np.ndarray]:
        """Return the size in bytes and the CRC-32 of each image, int64 [num_images] each."""
        return [self.index[column][self.rows] for column in ("size", "crc")]

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
    file_stamps = stamps(files)  # before they are read: a later change will differ
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
        "stamps": file_stamps,
        **dict(zip(("shard", "offset", "size", "crc"), columns, strict=True)),
        **{"keys": keys.data, "keys_ends": keys.ends, "texts": texts.data, "texts_ends": texts.ends},
        "unusable": np.array(unusable, dtype=np.str_),
    }


def write_index(file: Path, index: Index) -> None:
    """Store an index. Raises OSError."""
    with atomic_open(file) as out:
        np.savez(out, **index)


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


def _open_index(folder: Path, cache_dir: Path | None) -> tuple[Index, list[str]]:
    """Return the index of a folder's shards, read or made, and the notes about it."""
    shards = sorted(folder.glob("*.tar"))
    current = {"files": np.array([file.name for file in shards]), "stamps": stamps(shards)}
    files = [folder / INDEX_FILE]
    if cache_dir:  # an index of its own for each folder
        files.append(cache_dir / f"index_{fingerprint([str(folder.resolve())])}.npz")
    stored = {file: _read_index(file) for file in files if file.is_file()}
    for index in stored.values():
        if index and all(np.array_equal(index[column], current[column]) for column in current):
            return index, []
    index, notes = index_shards(folder), []
    for file, old in stored.items():
        if old is None:
            notes.append(f"{file} was damaged or of an earlier version, and was made anew")
        elif changed := _changed_shards(index, old):
            is_packed = (folder / MANIFEST_FILE).is_file() and np.array_equal(old["files"], current["files"])
            if is_packed and _rows(index).items() <= _rows(old).items():
                unusable = [f"{folder / name} (changed after it was packed)" for name in changed]
                index = old | current | {"unusable": np.array(unusable)}  # its checksums tell the damaged images
                break
            notes.append(f"{file} was of other shards, and was made anew ({changed[0]} has changed)")
    for file, place in zip(files, [*files[1:], "memory"], strict=True):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_index(file, index)
            break
        except OSError as error:
            notes.append(f"{file} cannot be written ({error.strerror}), so the index goes to {place}")
    return index, notes


def _read_index(file: Path) -> Index | None:
    """Return a stored index, or None if it is damaged or not of this version."""
    try:
        with np.load(file) as stored:
            index = dict(stored)
        lengths = {len(index[column]) for column in ("shard", "offset", "size", "crc")}
        lengths |= {len(index[column]) - 1 for column in ("keys_ends", "texts_ends")}
        is_whole = len(lengths) == 1 and index["stamps"].shape == (len(index["files"]), 3) and "unusable" in index
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    return index if is_whole else None


def _changed_shards(index: Index, old: Index) -> list[str]:
    """Return the names of the shards with other images or texts in one index than in the other."""

    def contents(index: Index) -> dict[str, list[bytes]]:
        first = np.searchsorted(index["shard"], np.arange(len(index["files"]) + 1))
        parts = {}
        for name, start, end in zip(index["files"].tolist(), first[:-1], first[1:], strict=True):
            parts[name] = [index[column][start:end].tobytes() for column in ("offset", "size", "crc")]
            for column in ("keys", "texts"):
                ends = index[f"{column}_ends"]
                parts[name].append(index[column][ends[start] : ends[end]].tobytes())
        return parts

    new, old = contents(index), contents(old)
    return [name for name in sorted({*new, *old}) if new.get(name) != old.get(name)]


def _rows(index: Index) -> dict[tuple[int, int], tuple[int, str, str]]:
    """Return the size, key and text of each image by its shard and offset."""
    strings = (PackedStrings.from_arrays(index[name], index[f"{name}_ends"]) for name in ("keys", "texts"))
    places, sizes = zip(index["shard"].tolist(), index["offset"].tolist(), strict=True), index["size"].tolist()
    return dict(zip(places, zip(sizes, *strings, strict=True), strict=True))

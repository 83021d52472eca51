"""WebDataset shards on a disk: tar files of `KEY.jpg` and `KEY.json` (or `KEY.txt`), read in place by number.

An index of where each JPEG lies makes training on shards as random as on files: a global shuffle, an exact length,
any of an image's captions. `dataloader.pack` writes it; for shards of other tools it is made on first use.
"""

import io
import json
import mmap
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataloader.tables import PackedStrings
from utils.errors import UserError
from utils.files import open_whole
from utils.images import ImageSource, UnreadableImageError

INDEX_FILE, MANIFEST_FILE = "index.npz", "pack.json"
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")


class Shards(Sequence):
    """The images of a folder of shards, by their number from 0. Raises UserError if it holds none.

    With `places`, number i is the image at places[i] of the files. What cannot be used is listed in `unusable`.
    An image whose bytes changed since they were indexed raises UnreadableImageError, which names its shard.
    """

    def __init__(self, folder: str | Path, places: np.ndarray | None = None) -> None:
        self.folder = Path(folder)
        self.files = sorted(file.name for file in self.folder.glob("*.tar"))
        if not self.files:
            raise UserError(f"{folder} holds no shards (*.tar); make them: python -m dataloader.pack --help")
        index = self._read_index()
        if index is None:
            index = index_shards(self.folder)
            write_index(self.folder, index)
        self.shard, self.offset, self.size, self.crc = (index[name] for name in ("shard", "offset", "size", "crc"))
        self.keys = PackedStrings.from_arrays(index["keys"], index["keys_ends"])
        self.unusable: list[str] = [*index["unusable"].tolist(), *self._changed(index["file_sizes"])]
        self.is_checked = np.zeros(len(self.shard), dtype=bool)  # once in each process
        self.places = np.arange(len(self.shard)) if places is None else places
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> io.BytesIO:
        place = self.places[number]
        shard, offset, size = int(self.shard[place]), int(self.offset[place]), int(self.size[place])
        data = self._map(shard)[offset : offset + size]
        if not self.is_checked[place] and zlib.crc32(data) != self.crc[place]:
            raise UnreadableImageError(f"{self.name(number)} is damaged")
        self.is_checked[place] = True
        return io.BytesIO(data)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each process maps the files itself

    def name(self, number: int) -> str:
        """Return SHARD.tar/KEY."""
        place = self.places[number]
        return f"{self.folder / self.files[self.shard[place]]}/{self.keys[place]}"

    @property
    def side(self) -> int | None:
        """The short side of every image in pixels, where `dataloader.pack` made the shards."""
        try:
            return json.loads((self.folder / MANIFEST_FILE).read_bytes())["size"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def samples(self) -> Iterator[tuple[int | str, str, tuple[str, ...]]]:
        """Yield each image's id, name and captions, in order."""
        with np.load(self.folder / INDEX_FILE) as index:
            texts = PackedStrings.from_arrays(index["texts"], index["texts_ends"])
        for number, text in enumerate(texts):
            image_id, captions = json.loads(text)
            yield image_id, self.name(number), tuple(captions)

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            try:
                with (self.folder / self.files[shard]).open("rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                raise UnreadableImageError(f"{self.folder / self.files[shard]}: {error}") from None
        return self._maps[shard]

    def _read_index(self) -> dict[str, np.ndarray] | None:
        """Return the stored index, or None if there is none or it is not of these files."""
        try:
            with np.load(self.folder / INDEX_FILE) as stored:
                index = dict(stored)
        except (OSError, ValueError, KeyError, EOFError):
            return None
        is_ours = (self.folder / MANIFEST_FILE).is_file()  # then a changed file is a damaged one
        try:
            same = index["files"].tolist() == self.files and (is_ours or not self._changed(index["file_sizes"]))
        except (KeyError, ValueError):
            return None
        return index if same else None

    def _changed(self, file_sizes: np.ndarray) -> list[str]:
        """Name the shards whose size is not the one that was indexed."""
        sizes = [(self.folder / file).stat().st_size for file in self.files]
        return [
            f"{self.folder / file} (is {size:,} bytes long, not {expected:,})"
            for file, size, expected in zip(self.files, sizes, file_sizes.tolist(), strict=True)
            if size != expected
        ]


def index_shards(folder: Path) -> dict[str, np.ndarray]:
    """Read where each image of a folder's shards lies, its checksum, id and captions. Damaged parts are passed over."""
    rows, keys, texts, unusable = [], [], [], []
    files = sorted(folder.glob("*.tar"))
    for shard, file in enumerate(files):
        with file.open("rb") as data:
            samples, problem = _members(file)
            if problem:
                unusable.append(f"{file} ({problem})")
            for key, members in samples.items():
                image = next((members[suffix] for suffix in IMAGE_MEMBERS if suffix in members), None)
                content = {suffix: _read(data, *members[suffix]) for suffix in ("json", "txt") if suffix in members}
                image_id, captions = texts_of(content, key)
                if image is None or not captions:
                    unusable.append(f"{file}/{key} (has no {'image' if image is None else 'caption'})")
                    continue
                rows.append((shard, *image, zlib.crc32(_read(data, *image))))
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


def write_index(folder: Path, index: dict[str, np.ndarray]) -> None:
    """Write the index beside the shards. Raises UserError if it cannot be written."""
    try:
        with open_whole(folder / INDEX_FILE) as file:
            np.savez(file, **index)
    except OSError as error:
        raise UserError(f"the index of the shards in {folder} cannot be written ({error.strerror})") from None


def _members(file: Path) -> tuple[dict[str, dict[str, tuple[int, int]]], str]:
    """Return for each key of a tar file the (offset, size) of its members by suffix, and what is wrong with it."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    length, problem = file.stat().st_size, ""
    try:
        with tarfile.open(file, "r:", ignore_zeros=True) as tar:  # which also steps over damaged headers
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > length:
                    problem = "is truncated"
                    continue
                samples.setdefault(f"{folder}/{stem}".lstrip("/"), {})[suffix.lower()] = (
                    member.offset_data,
                    member.size,
                )
    except (tarfile.TarError, OSError) as error:
        problem = str(error)
    return samples, problem


def _read(data: io.BufferedReader, offset: int, size: int) -> bytes:
    data.seek(offset)
    return data.read(size)


def texts_of(content: Mapping[str, bytes], key: str) -> tuple[int | str, list[str]]:
    """Return the image id and the captions that a sample's `json` member, else its `txt`, tells."""
    try:
        record = json.loads(content.get("json", b"{}"))
    except (ValueError, RecursionError):
        record = {}
    record = record if isinstance(record, dict) else {}
    captions = record.get("captions", record.get("caption"))
    if not captions and "txt" in content:
        captions = content["txt"].decode("utf-8", errors="replace")
    captions = [captions] if isinstance(captions, str) else captions if isinstance(captions, list) else []
    captions = [caption for caption in captions if isinstance(caption, str) and caption.strip()]
    image_id = record.get("image_id", key)
    return image_id if isinstance(image_id, (int, str)) else key, captions


def name_of(sources: Sequence[ImageSource], index: int) -> str:
    """Return what a message calls an image."""
    return sources.name(index) if isinstance(sources, Shards) else str(sources[index])

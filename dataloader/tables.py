"""Read captions from text: decode it, and find a table's delimiter, columns and quoting by its content."""

import ast
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dataloader.config import CaptionSpec
from utils.errors import UserError
from utils.images import image_suffixes
from utils.text import one_line

DELIMITERS = ",\t;|"
IMAGE_COLUMNS = {"filepath", "file_path", "image", "image_name", "image_path", "file_name", "filename", "path"}
CAPTION_COLUMNS = {"title", "caption", "captions", "text", "comment", "sentence", "sentences", "raw"}
NUMBERED_NAME = re.compile(r"(.+\.\w+)#\d+")  # Flickr8k's and Flickr30k's name.jpg#0
STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
LISTS = [  # of strings: Python's lists and tuples, and NumPy's arrays, which have no commas
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rf"\[\s*{STRING}(?:\s*,\s*{STRING})*\s*,?\s*\]",
        rf"\(\s*{STRING}\s*,(?:\s*{STRING}\s*,)*(?:\s*{STRING})?\s*\)",
        rf"\[\s*{STRING}(?:\s+{STRING})+\s*\]",
    )
]
Notes = dict[str, list[str]]  # what was changed or left out, and where
Row = tuple[int, list[str]]  # the line on which it ends, counted from 1, and its cells


class Columns(NamedTuple):
    """The positions of a table's columns."""

    image: int
    caption: int
    split: int | None
    folder: int | None  # in Karpathy's tables "filepath" is the folder of "filename"


def decode(content: bytes) -> str:
    """Decode UTF-8, or UTF-16 or UTF-32 with a byte order mark or an ASCII start. Raises ValueError for other bytes."""
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not {encoding.upper()} (byte 0x{content[error.start]:02x})") from None


def split_lines(content: bytes) -> list[str]:
    """Return the captions in the bytes of a text with one per line. Raises ValueError as `decode`."""
    return [line.rstrip("\r\n") for line in io.StringIO(decode(content), newline="") if line.strip()]


def captions_in(value: Any) -> list[str]:
    """Return the captions in a cell: a text, a list of texts (also in JSON's, Python's or NumPy's notation), or
    Karpathy's list of {"raw": text}. Anything else, and what begins as a list of texts and is none, has no captions.
    """
    if isinstance(value, str):
        cell = value.strip()
        if cell[:1] not in ("[", "(") or cell[-1:] not in ("]", ")"):
            return [value] if cell else []
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            try:
                if any(pattern.fullmatch(cell) for pattern in LISTS):
                    return [ast.literal_eval(text) for text in re.findall(STRING, cell, re.DOTALL)]
            except (ValueError, SyntaxError):
                return []
            return [] if re.match(r"\[\s*['\"\[{]", cell) else [cell]
    texts = [text.get("raw") if isinstance(text, dict) else text for text in value] if isinstance(value, list) else []
    return texts if all(isinstance(text, str) for text in texts) else []


def find_columns(names: Sequence[str], spec: CaptionSpec, notes: Notes) -> Columns:
    """Find columns by the names in `spec`, or else by the field's usual ones. Raises UserError if not one fits."""
    try:
        columns = _match_columns(names, spec)
    except ValueError as error:
        raise _no_columns(str(error), names, spec) from None
    read = names[columns.image], names[columns.caption]
    if read != (spec.csv_image_column, spec.csv_caption_column):
        notes["columns are recognized by their names"] = [" and ".join(read)] * 2
    return columns


def _match_columns(names: Sequence[str], spec: CaptionSpec) -> Columns:
    simple = [re.sub(r"[\s-]+", "_", name.casefold()) for name in names]

    def find(wanted: str, usual: set[str]) -> int:
        found = [number for number, name in enumerate(names) if name == wanted]
        found = found or [number for number, name in enumerate(simple) if name in usual | {wanted.casefold()}]
        if not found:
            raise ValueError(f"has no column {wanted!r}")
        if len(found) > 1:
            raise ValueError(f"has several columns that may be {wanted!r}")
        return found[0]

    split = simple.index("split") if "split" in simple else None
    if {"filepath", "filename"} <= set(simple) and spec.csv_image_column in ("filepath", "filename"):
        image, folder = simple.index("filename"), simple.index("filepath")
    else:
        image, folder = find(spec.csv_image_column, IMAGE_COLUMNS), None
    return Columns(image, find(spec.csv_caption_column, CAPTION_COLUMNS), split, folder)


def _no_columns(problem: str, names: Sequence[str], spec: CaptionSpec) -> UserError:
    flag = f"{spec.flags.prefix}csv_image_column"
    advice = f"set {flag} and {flag.replace('image', 'caption')}, or put a header like filepath,title above its rows"
    if any("://" in name for name in names):
        advice = "its images are web addresses: download them with img2dataset first"
    columns = one_line(", ".join(names))[:200] or "none"
    if len(names) == 1:
        problem, advice = "is neither JSON nor a table", f"give a file with a header like filepath,title; {advice}"
    return UserError(f"{spec.annotation_file}: {problem} (its columns: {columns}); {advice}")


class Table:
    """A table in text: its header, and how its rows are split into cells."""

    def __init__(self, text: str, spec: CaptionSpec, notes: Notes) -> None:
        """Find the header, or Flickr's `name.jpg#0<TAB>caption`. Raises UserError if not exactly one reading fits."""
        self.file, self.notes = spec.annotation_file, notes
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            notes["NUL characters are left out"] = [f"line {line}"] * text.count("\0")
            text = text.replace("\0", "")
        self.lines = io.StringIO(text, newline="").readlines()
        self.start = next((number for number, line in enumerate(self.lines) if line.strip()), None)  # of the rows
        if self.start is None:
            raise UserError(f"{self.file}: is empty; complete the download")
        header = self.lines[self.start]
        self.is_numbered = re.match(r"[^\t]+\.\w+#\d+\t", header) is not None
        if self.is_numbered:
            self.delimiter, self.names, self.columns = "\t", ["image", "caption"], Columns(0, 1, None, None)
        else:
            self.delimiter, self.names, self.columns = _read_header(header, spec, notes)
            self.start += 1
        mark = re.escape(self.delimiter)
        self.is_padded = re.search(f" {mark}|{mark} ", header) is not None or all(
            re.match(f"[^{mark}]*{mark} ", line) for line in self.lines[self.start :] if line.strip()
        )

    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises UserError for one that does not fit the header.

        Quotes have CSV's meaning (RFC 4180) where the whole table fits it. Where it does not, and in a tab-separated
        table whose quotes enclose nothing that needs them, they belong to the captions.
        """
        try:
            for number, cells in self._split(is_quoted=self._is_quoted()):
                if len(cells) != len(self.names):
                    if not "".join(cells).strip():
                        continue
                    cells = self._fit(number, cells)
                yield number, [cell.strip() for cell in cells] if self.is_padded else cells
        except csv.Error as error:
            raise UserError(f"{self.file} {error}; correct that line") from None

    def _split(self, *, is_quoted: bool) -> Iterator[Row]:
        """Split the lines into rows, with blank ones. Raises csv.Error, which names the line."""
        quoting = {"strict": True, "skipinitialspace": self.is_padded} if is_quoted else {"quoting": csv.QUOTE_NONE}
        reader = csv.reader(self.lines[self.start :], delimiter=self.delimiter, **quoting)
        try:
            for row in reader:
                yield self.start + reader.line_num, row
        except csv.Error as error:
            raise csv.Error(f"line {self.start + reader.line_num}: is not CSV ({error})") from None

    def _is_quoted(self) -> bool:
        """Return whether quotes have CSV's meaning. Raises UserError if neither reading fits."""
        opening = re.compile(f'(^|{re.escape(self.delimiter)}) *"')
        if self.is_numbered or not any('"' in line and opening.search(line) for line in self.lines[self.start :]):
            return False
        try:
            problem = self._swallowed_row()
        except csv.Error as error:
            problem = str(error)
        if self.delimiter == "\t":
            return not problem and self._needs_quotes()
        if problem:
            for _, cells in self._split(is_quoted=False):
                is_enclosed = any(cell.strip()[:1] == cell.strip()[-1:] == '"' for cell in cells)
                if is_enclosed or (len(cells) != len(self.names) and "".join(cells).strip()):
                    raise UserError(
                        f"{self.file} {problem}; correct the quotes (in a quoted caption, write two for one)"
                    )
        return not problem

    def _swallowed_row(self) -> str | None:
        """Return where a quoted cell contains what looks like a row of its own: a stray quote joined them.

        Counts the captions that contain a line break and a delimiter. Raises csv.Error if the quotes are not CSV's.
        """
        problem, joined, end = None, [], self.start
        for number, cells in self._split(is_quoted=True):
            if number > end + 1:
                for line in self.lines[end + 1 : number]:
                    parts = line.split(self.delimiter)
                    if len(parts) >= len(self.names) and is_image_name(parts[self.columns.image]):
                        problem = problem or f"line {end + 1}: a quote opens and closes in line {number}, around a row"
                if any("\n" in cell and self.delimiter in cell for cell in cells):
                    joined.append(f"line {end + 1}")
            end = number
        if joined and not problem:
            self.notes["captions contain a line break and a delimiter"] = joined
        return problem

    def _needs_quotes(self) -> bool:
        """Return whether quotes enclose a delimiter, a line break or another quote, or all captions."""
        is_all = True
        for (number, cells), (end, raw) in zip(self._split(is_quoted=True), self._split(is_quoted=False), strict=False):
            if number != end or len(cells) != len(raw):
                return True
            if cells != raw and any('"' in cell and cell != other for cell, other in zip(cells, raw, strict=True)):
                return True
            is_all &= cells != raw or not cells
        return is_all

    def _fit(self, number: int, cells: list[str]) -> list[str]:
        """Return a row with a cell for every name: a long one with its caption rejoined, a short one filled up."""
        width, line, mark = len(self.names), self.lines[number - 1].rstrip("\r\n"), self.delimiter
        found = f"{self.file} line {number}: has {len(cells)} fields, but the header {width}"
        if len(cells) < width:
            if self.columns.image >= len(cells) or not is_image_name(cells[self.columns.image]):
                raise UserError(f"{found}; put captions that contain a line break in quotes")
            return cells + [""] * (width - len(cells))
        *others, caption = line.split(mark, width - 1)
        is_clear = f"\\{mark}" not in caption and caption.lstrip()[:1] != '"' and others == cells[: width - 1]
        if not "".join(cells[width:]).strip():  # a caption that ends with a delimiter, or empty columns
            is_clear &= not all(line.rstrip("\r\n").endswith(mark) for line in self.lines[self.start :])
        if self.columns.caption != width - 1 or not is_clear:
            raise UserError(f"{found}; put captions that contain {mark!r} in quotes")
        self.notes.setdefault(f"captions that contain {mark!r} are rejoined", []).append(f"line {number}")
        return [*others, caption]


def is_image_name(cell: str) -> bool:
    """Return whether a text ends with the suffix of an image."""
    name = NUMBERED_NAME.sub(r"\1", cell.strip(' "'))
    return "." in name and f".{name.rpartition('.')[2].lower()}" in image_suffixes()


def _read_header(header: str, spec: CaptionSpec, notes: Notes) -> tuple[str, list[str], Columns]:
    """Return the delimiter, names and columns of the only reading that has both columns. Raises UserError."""
    fits, problems = [], []
    for delimiter in DELIMITERS:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter, skipinitialspace=True))]
        try:
            _match_columns(names, spec)
            fits.append((delimiter, names))
        except ValueError as error:
            problems.append((str(error), names))
    if len(fits) != 1:
        raise _no_columns(*max(problems, key=lambda found: len(found[1])), spec)
    return *fits[0], find_columns(fits[0][1], spec, notes)

"""Read captions from text: decode it, and find a table's delimiter, columns and quoting by its content."""

import ast
import csv
import io
import json
import re
from collections.abc import Sequence
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
    advice = f"set {flag} and {flag.replace('image', 'caption')}, or name its columns filepath and title"
    if any("://" in name for name in names):
        advice = "its images are web addresses: download them with img2dataset first"
    columns = one_line(", ".join(names))[:200] or "none"
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

    def rows(self) -> list[Row]:
        """Return the rows. Raises UserError for one that does not fit the header.

        Quotes have CSV's meaning (RFC 4180) where the whole table fits it. Where it does not, and in a tab-separated
        table whose quotes enclose nothing that needs them, they belong to the captions.
        """
        width = len(self.names)
        rows = [row if len(row[1]) == width else self._fit(*row) for row in self._split_all()]
        return [(line, [cell.strip() for cell in cells]) for line, cells in rows] if self.is_padded else rows

    def _split_all(self) -> list[Row]:
        has_quotes, is_tabbed, problem = any('"' in line for line in self.lines), self.delimiter == "\t", None
        if has_quotes and not self.is_numbered:
            try:
                rows = self._split(is_quoted=True)
                problem = self._swallowed_row(rows)
                rows = _without_blank(rows)
                if not problem and (not is_tabbed or self._needs_quotes(rows)):
                    return rows
            except csv.Error as error:
                problem = str(error)
        try:
            rows = _without_blank(self._split(is_quoted=False))
        except csv.Error as error:
            raise UserError(f"{self.file} {error}; correct that line") from None
        is_exact = all(len(cells) == len(self.names) for _, cells in rows)
        enclosed = any(cell.strip()[:1] == cell.strip()[-1:] == '"' for _, cells in rows for cell in cells)
        if problem and not is_tabbed and (not is_exact or enclosed):
            raise UserError(f'{self.file} {problem}; correct the quotes there (in a quoted caption write "" for one)')
        return rows

    def _split(self, *, is_quoted: bool) -> list[Row]:
        """Split the lines into rows. Raises csv.Error, which names the line."""
        quoting = {"strict": True, "skipinitialspace": self.is_padded} if is_quoted else {"quoting": csv.QUOTE_NONE}
        reader = csv.reader(self.lines[self.start :], delimiter=self.delimiter, **quoting)
        try:
            return [(self.start + reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise csv.Error(f"line {self.start + reader.line_num}: is not CSV ({error})") from None

    def _swallowed_row(self, rows: Sequence[Row]) -> str | None:
        """Return where a quoted cell contains what looks like a row of its own: a stray quote joined them.

        Counts the captions that contain a line break and a delimiter.
        """
        end = self.start
        for number, cells in rows:
            for line in self.lines[end + 1 : number] if number > end + 1 else ():
                parts = line.split(self.delimiter)
                if len(parts) >= len(self.names) and _is_image_name(parts[self.columns.image]):
                    return f"line {end + 1}: a quote opens there and closes in line {number}, around another row"
            if number > end + 1 and any("\n" in cell and self.delimiter in cell for cell in cells):
                self.notes.setdefault("captions contain a line break and a delimiter", []).append(f"line {end + 1}")
            end = number
        return None

    def _needs_quotes(self, rows: Sequence[Row]) -> bool:
        """Return whether quotes enclose a delimiter, a line break or another quote, or all captions."""
        plain = _without_blank(self._split(is_quoted=False))
        if len(plain) != len(rows):
            return True
        changed = [(cells, raw) for (_, cells), (_, raw) in zip(rows, plain, strict=True) if cells != raw]
        return len(changed) == len(rows) or any(
            len(cells) != len(raw) or any('"' in cell and cell != other for cell, other in zip(cells, raw, strict=True))
            for cells, raw in changed
        )

    def _fit(self, number: int, cells: list[str]) -> Row:
        """Return a row with a cell for every name: a long one with its caption rejoined, a short one filled up."""
        width, line, mark = len(self.names), self.lines[number - 1].rstrip("\r\n"), self.delimiter
        found = f"{self.file} line {number}: has {len(cells)} fields, but the header {width}"
        if len(cells) < width:
            if self.columns.image >= len(cells) or not _is_image_name(cells[self.columns.image]):
                raise UserError(f"{found}; put captions that contain a line break in quotes")
            return number, cells + [""] * (width - len(cells))
        *others, caption = line.split(mark, width - 1)
        is_clear = "".join(cells[width:]).strip() and f"\\{mark}" not in caption and caption.lstrip()[:1] != '"'
        if self.columns.caption != width - 1 or not is_clear or others != cells[: width - 1]:
            raise UserError(f"{found}; put captions that contain {mark!r} in quotes")
        self.notes.setdefault(f"captions that contain {mark!r} are rejoined", []).append(f"line {number}")
        return number, [*others, caption]


def _without_blank(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if len(row[1]) > 1 or "".join(row[1]).strip()]


def _is_image_name(cell: str) -> bool:
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

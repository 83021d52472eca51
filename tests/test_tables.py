"""Caption files of many shapes with known right answers, among them random tables (see test_fuzz.py)."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dataloader.captions import CaptionSet, read_captions
from dataloader.tables import captions_in
from tests.test_fuzz import fuzzed
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for name in ("a.jpg", "b.jpg", "c d.png", "sub/e.jpg"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).touch()
    return folder


def read(folder: Path, content: str | bytes, name: str = "captions.txt", **options) -> CaptionSet:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_captions(folder / "images", folder / name, **options)


def answer(caption_set: CaptionSet) -> list[tuple[str, tuple[str, ...]]]:
    """Return the images and captions in order, by the images' names in the file."""
    return [(image.image_id, image.captions) for image in caption_set.images]


HEADERS = st.tuples(
    st.sampled_from(["filepath", "image", "image_name", "file_name", "path", "Image"]),
    st.sampled_from(["title", "caption", "text", "comment", "sentence", "raw", "Caption"]),
)
WORDS = [
    "a dog",
    "red",
    '"Rex"',
    '"',
    '""',
    ",",
    ", ",
    "\t",
    ";",
    "|",
    "#0",
    "[",
    "]",
    "'",
    "\\",
    "naïve",
    "狗",
    "\u2028",
    " ",
]
CAPTION = st.lists(st.sampled_from([*WORDS, "\n", "\r\n", "b.jpg"]), min_size=1, max_size=6).map("".join)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252", "gb18030"])


def write_table(rows, delimiter: str, quoting: str, end: str) -> str:
    """Write a table with quotes where they are "needed" (RFC 4180), around "all" cells, or "never"."""

    def quoted(cell: str) -> str:
        is_quoted = quoting == "all" or (quoting == "needed" and not set(cell).isdisjoint(f'{delimiter}"\r\n'))
        return '"' + cell.replace('"', '""') + '"' if is_quoted else cell

    return "".join(delimiter.join(map(quoted, row)) + end for row in rows)


@fuzzed
@given(
    header=HEADERS, delimiter=st.sampled_from(",\t;|"), encoding=ENCODINGS,
    quoting=st.sampled_from(["needed", "all", "never"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]), cells=st.sampled_from(["text", "json", "python"]), data=st.data(),
    names=st.lists(st.sampled_from(["a.jpg", "b.jpg", "c d.png", "sub/e.jpg"]), min_size=1, max_size=6),
)  # fmt: skip
def test_a_table_is_read_to_the_right_answer_or_refused(
    folder: Path, header, delimiter, quoting, encoding, end, cells, data, names
):
    expected: dict[str, list[str]] = {}
    rows = [header]
    for name in names:
        captions = data.draw(st.lists(CAPTION, min_size=1, max_size=1 if cells == "text" else 3))
        assume(all(caption.strip() for caption in captions))
        cell = captions[0] if cells == "text" else json.dumps(captions) if cells == "json" else repr(captions)
        assume(cells != "text" or (captions_in(cell) == [cell] and cell[:1] != " "))  # one reading even for a person
        if quoting == "never":  # a cell cannot show where it ends
            assume(not {"\n", "\r"} & set(cell) and not (cell[:1] == cell[-1:] == '"'))
        rows.append((name, cell))
        expected.setdefault(name, []).extend(captions)
    try:
        content = write_table(rows, delimiter, quoting, end).encode(encoding)
    except UnicodeEncodeError:
        assume(False)
    try:
        found = answer(read(folder, content))
    except UserError as error:
        assert "captions.txt" in str(error) and "\n" not in str(error)
    else:
        assert found == [(name, tuple(captions)) for name, captions in expected.items()]


ROWS = [("a.jpg", "a dog, a cat"), ("b.jpg", 'it says "hi"'), ("a.jpg", "naïve")]
RIGHT = [("a.jpg", ("a dog, a cat", "naïve")), ("b.jpg", ('it says "hi"',))]
COMMENT = "\n".join(["image_name| comment_number| comment", "a.jpg| 0| a dog, a cat", 'b.jpg| 0| it says "hi"',
                     "b.jpg| 4   A dog runs .", "a.jpg| 1| naïve"])  # fmt: skip
LIST = [{"image": name, "caption": caption} for name, caption in ROWS]
FILES = {
    "comma": write_table([("image", "caption"), *ROWS], ",", "needed", "\r\n"),
    "all quoted": write_table([("image", "caption"), *ROWS], "\t", "all", "\n"),
    "unquoted commas": "Image,Caption\n" + "".join(f"{name},{caption}\n" for name, caption in ROWS),
    "tab, quotes needed": write_table([("image", "caption"), *ROWS], "\t", "needed", "\n"),
    "tab, no quoting": write_table([("image", "caption"), *ROWS], "\t", "never", "\n"),
    "semicolon, UTF-16": write_table([("path", "text"), *ROWS], ";", "needed", "\n").encode("utf-16"),
    "pipe and spaces": COMMENT,
    "old Mac": write_table([("image", "caption"), *ROWS], "\t", "never", "\r"),
    "token": "".join(f"{name}#{number}\t{caption}\n" for number, (name, caption) in enumerate(ROWS)),
    "lists": write_table([("image", "caption"), ("a.jpg", repr(["a dog, a cat", "naïve"])), ("b.jpg", ROWS[1][1])],
                         ",", "needed", "\n"),
    "NumPy's lists": write_table([("image", "caption"), ("a.jpg", "['a dog, a cat'\n 'naïve']"), ROWS[1]],
                                 ",", "needed", "\n"),
    "a split": write_table([("image", "split", "caption"), ("a.jpg", "train", ROWS[0][1]), ("b.jpg", "test", "no"),
                            ("b.jpg", "restval", ROWS[1][1]), ("a.jpg", "Train", ROWS[2][1])], ",", "needed", "\n"),
    "gzip": gzip.compress(write_table([("image", "caption"), *ROWS], "\t", "never", "\n").encode()),
    "JSON list": json.dumps(LIST),
    "JSON by name": '{"a.jpg": "a dog, a cat", "b.jpg": ["it says \\"hi\\""], "./a.jpg": "naïve"}',
    "JSON Lines": "".join(json.dumps(row) + "\n" for row in LIST),
    "an image a line": "".join(json.dumps({"file_name": name, "captions": texts}) + "\n" for name, texts in RIGHT),
    "JSON Lines of Karpathy": "".join(json.dumps({"filename": name, "filepath": "", "split": "train", "sentences": [
        {"raw": text} for text in texts]}) + "\n" for name, texts in RIGHT),
    "Windows": write_table([("image", "caption"), ("sub\\e.jpg", "a dog")], ",", "needed", "\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_recognized_by_its_content(folder: Path, name):
    found = answer(read(folder, FILES[name], "captions.data"))
    assert found == ([("sub\\e.jpg", ("a dog",))] if name == "Windows" else RIGHT)


NOTES = {
    "unquoted commas": "1 captions that contain ',' are rejoined (e.g. line 2)",
    "comma": "columns are recognized by their names (e.g. image and caption)",
    "pipe and spaces": "1 entries are unusable (e.g. ",
    "a split": "1 entries are of other splits (e.g. ",
    "Windows": "1 backslashes are read as folders (e.g. sub\\e.jpg)",
}


@pytest.mark.parametrize("name", NOTES)
def test_what_is_read_in_another_way_is_said(folder: Path, name):
    assert NOTES[name] in read(folder, FILES[name]).describe()


def test_a_quoted_caption_with_a_line_break_and_a_comma_is_said(folder: Path):
    found = read(folder, 'filepath,title\na.jpg,"one,\ntwo, three"\nb.jpg,four\n')
    assert answer(found) == [("a.jpg", ("one,\ntwo, three",)), ("b.jpg", ("four",))]
    assert "1 captions contain a line break and a delimiter (e.g. line 2)" in found.describe()


def test_stray_quotes_join_no_rows(folder: Path):
    rows = [("a.jpg", '"welcome home'), ("b.jpg", "a dog"), ("c d.png", 'a "cake"')]
    for delimiter in ",\t;|":
        found = read(folder, write_table([("image", "caption"), *rows], delimiter, "never", "\n"))
        assert answer(found) == [(name, (caption,)) for name, caption in rows]


REFUSED = {
    "no header": ("a.jpg,a dog\n", "no column 'filepath'"),
    "two image columns": ("image,path,caption\na.jpg,b.jpg,c\n", "several columns that may be 'filepath'"),
    "more cells after the caption": ("title,filepath\na dog, a cat,a.jpg\n", "line 2: has 3 fields, but the header 2"),
    "a caption over two lines": ("filepath,title\na.jpg,a dog\nand a cat\n", "line 3: has 1 fields"),
    "trailing commas": ("filepath,title\na.jpg,a dog,,\n", "line 2: has 4 fields"),
    "a row inside quotes": ('filepath,title\na.jpg,"a dog, x\nb.jpg,a cat\nb.jpg,d"\n', "line 2: a quote opens"),
    "backslashed quotes": ('filepath,title\na.jpg,"a \\"dog\\", x"\n', "line 2"),
    "another split": ("filepath,title,split\na.jpg,a dog,fold1\n", "its split is 'fold1'"),
    "no row of the split": ("filepath,title,split\na.jpg,a dog,val\n", "no captions of the split train"),
    "Windows-1252": ("filepath,title\na.jpg,café\n".encode("cp1252"), "line 2 is not UTF-8 .*iconv"),
    "a web page": ("<!DOCTYPE html><html>", "is a web page"),
    "a zip archive": (b"PK\x03\x04" + b"\0" * 99, "is a zip archive .*unzip"),
    "cut gzip": (gzip.compress(b"filepath,title\na.jpg,a dog\n")[:-9], "cut short"),
    "a pointer of Git LFS": ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "broken JSON Lines": ('{"image": "a.jpg", "caption": "a"}\n{"image": "b.j', "nor JSON Lines"),
    "empty": ("", "is empty"),
    "web addresses": ("a dog\thttp://x/a.jpg\n", "img2dataset"),
    "a moved folder": ("filepath,title\n/old/place/a.jpg,a dog\n", "a.jpg is in .*images: remove /old/place/ from"),
    "a moved folder of Windows": ("filepath,title\nE:\\x\\sub\\e.jpg,a dog\n", r"sub/e.jpg is in .*: remove E:.x."),
    "names from the folder above": ("filepath,title\nimages/a.jpg,a dog\n", "give --img_dir .*tables"),
    "names in a folder": ("filepath,title\ne.jpg,a dog\n", "e.jpg is in .*sub: give --img_dir"),
    "names without a suffix": ("filepath,title\na,a dog\n", "there is .*a.jpg: write the names"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_without_one_reading_is_refused(folder: Path, name):
    content, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        read(folder, content)
    assert "wget" not in str(error.value) and "\n" not in str(error.value)


def test_hugging_faces_metadata_is_found_in_the_folder(tmp_path: Path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,a dog\n")
    assert answer(read_captions(tmp_path)) == [("a.jpg", ("a dog",))]


def test_shards_beside_a_given_file_need_a_choice(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.tar").touch()
    with pytest.raises(UserError, match="say which to read with --format"):
        read(tmp_path, FILES["comma"])


@pytest.mark.parametrize("has_bytes", [True, False])
def test_parquet_with_paths_or_image_bytes(folder: Path, has_bytes):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    images = [{"bytes": name.encode(), "path": name} if has_bytes else name for name, _ in RIGHT]
    table = pyarrow.table({"image": images, "caption": [list(texts) for _, texts in RIGHT]})
    parquet.write_table(table, folder / "captions.csv")
    found = read_captions(folder / "images", folder / "captions.csv")
    assert answer(found) == RIGHT
    if has_bytes:
        assert [data.getvalue() for data in found.take([1, 0]).files] == [b"b.jpg", b"a.jpg"]


def test_parquet_without_pyarrow_is_one_sentence(folder: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow, or convert it to CSV"):
        read(folder, b"PAR1" + b"\0" * 20, "captions.csv")


@pytest.mark.slow
@pytest.mark.parametrize("annotations", ["coco_mini/annotations/captions_val2017_all5000.json",
                                         "flickr8k/annotations/captions_train.json"])  # fmt: skip
def test_real_captions_in_every_format_are_the_same(data_dir: Path, tmp_path: Path, annotations):
    content = json.loads((data_dir / annotations).read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    (tmp_path / "images").mkdir()
    for name in names.values():
        (tmp_path / "images" / name).touch()
    captions = [(names[row["image_id"]], row["caption"]) for row in content["annotations"]]
    found = read_captions(tmp_path / "images", data_dir / annotations)
    expected = [(Path(image.path).name, image.captions) for image in found.images]
    assert found.num_captions == len(captions) > 25_000 and not found.unusable
    one_line = [(name, caption) for name, caption in captions if not {"\n", "\r"} & set(caption)]
    header = [("filepath", "title")]
    files = {
        **{(d, q): write_table(header + captions, d, q, "\n") for d in ",\t;|" for q in ("needed", "all")},
        "JSON list": json.dumps([{"image": name, "caption": caption} for name, caption in captions]),
        "JSON Lines": "".join(json.dumps({"file_name": name, "text": texts}) + "\n" for name, texts in expected),
        "lists": write_table(header + [(name, repr(list(texts))) for name, texts in expected], ",", "needed", "\n"),
        "Karpathy": json.dumps({"images": [{"filename": name, "split": "train", "sentences": [
            {"raw": text} for text in texts]} for name, texts in expected]}),
    }  # fmt: skip
    for name, text in files.items():
        assert answer(read(tmp_path, text)) == expected, name
    grouped: dict[str, list[str]] = {}
    for name, caption in one_line:
        grouped.setdefault(name, []).append(caption)
    expected = [(name, tuple(texts)) for name, texts in grouped.items()]
    files = {
        "tab": write_table(header + one_line, "\t", "never", "\r\n"),
        "token": "".join(f"{name}#{number}\t{caption}\n" for number, (name, caption) in enumerate(one_line)),
        "comma, unquoted": write_table(header + one_line, ",", "never", "\n"),
    }
    for name, text in files.items():
        assert answer(read(tmp_path, text)) == expected, name
    for name, texts in expected:
        (tmp_path / "images" / name).with_suffix(".txt").write_text("\n".join(texts), encoding="utf-8")
    assert answer(read_captions(tmp_path / "images")) == sorted(expected)

from pathlib import Path

import pytest

from utils.files import atomic_open, delete_unfinished, write_atomic


def test_a_file_gets_its_name_when_it_is_complete(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    write_atomic(file, b"old")
    with atomic_open(file) as out:
        out.write(b"new")
        out.flush()
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_file_unchanged(tmp_path: Path, error):
    file = tmp_path / "rows.jsonl"
    write_atomic(file, b"old")
    with pytest.raises(error), atomic_open(file) as out:
        out.write(b"half of it")
        raise error
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_the_unfinished_files_of_killed_processes_are_deleted(tmp_path: Path):
    kept = ["film.part-1", "film.part-1.rar", "my.rows.jsonl.part-17", "rows.jsonl", "rows.jsonl.part-two"]
    for name in (*kept, "rows.jsonl.part-17"):
        (tmp_path / name).touch()
    delete_unfinished(tmp_path, r"rows\.jsonl|other")
    assert sorted(file.name for file in tmp_path.iterdir()) == kept

"""Counts of a data set, copies among its images, and figures of incomplete sets."""

from pathlib import Path

import pytest

from dataloader.captions import CaptionedImage, CaptionSet
from dataloader.counts import count_captions, describe_counts, find_copies, find_shared, require_complete
from utils.errors import UserError


def make_set(folder: Path, contents: dict[str, bytes], captions: tuple[str, ...] = ("a",)) -> CaptionSet:
    """Return a set of files with these contents, each with captions of its own."""
    folder.mkdir(exist_ok=True)
    images = []
    for number, (name, content) in enumerate(contents.items()):
        (folder / name).write_bytes(content)
        texts = tuple(f"{caption} {folder.name} {name}" for caption in captions)
        images.append(CaptionedImage(number, str(folder / name), texts))
    return CaptionSet(images, [])


def test_cut_and_repeated_captions_are_counted():
    exact, longer, accented = "a " * 75, "a " * 76, "é" * 77
    image = CaptionedImage(1, "a.jpg", ("a", "a", exact, longer, accented, "x" * 76))
    found = CaptionSet([image], ["b.jpg"], ["line 3"], notes={"captions are rejoined": ["line 2"]})
    counts = count_captions(found, context_length=77)
    assert (counts["captions"], counts["captions_cut"], counts["captions_repeated"]) == (6, 2, 1)
    assert (counts["images_missing"], counts["entries_unusable"]) == (1, 1)
    assert counts["notes"] == {"captions are rejoined": 1}
    line = describe_counts(found, counts)
    assert "2 captions (33.3%) are cut at 77 tokens" in line and "b.jpg" in line and "line 3" in line


def test_copies_are_files_of_equal_bytes(tmp_path: Path):
    base = bytes(range(256)) * 40  # longer than what is compared first
    contents = {"a": base, "b": b"x" + base[1:], "c": base[:-1] + b"x", "d": base, "e": b"", "f": b"", "g": base[1:]}
    found = make_set(tmp_path, contents)
    paths = [image.path for image in found.images]
    assert find_copies([*paths, str(tmp_path / "absent")]) == {3: 0}
    assert count_captions(found, 77)["images_repeated"] == 1


def test_shared_images_have_the_same_content_or_an_id_and_a_caption_in_common(tmp_path: Path):
    training = make_set(tmp_path / "train", {"a.jpg": b"one", "b.jpg": b"two"})
    held_out = make_set(tmp_path / "val", {"a.jpg": b"other", "b.jpg": b"three", "c.jpg": b"two", "d.jpg": b"six"})
    assert find_shared(held_out, training) == [2]
    same_caption = held_out.images[1]._replace(captions=training.images[1].captions)
    assert find_shared(held_out._replace(images=[same_caption]), training) == [1]
    assert find_shared(held_out._replace(images=[same_caption._replace(image_id=9)]), training) == []


def test_a_figure_of_an_incomplete_set_is_refused():
    require_complete(100, ["a.jpg"], max_share=0.01)
    with pytest.raises(UserError, match="2 of the 100 held-out images .*a.jpg.* --allow_missing"):
        require_complete(100, ["a.jpg", "b.jpg"], max_share=0.01)

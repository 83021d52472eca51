import argparse
import json
from pathlib import Path

import pytest

from dataloader.captions import READERS, open_captions, read_captions
from dataloader.config import FORMATS, add_caption_flags, caption_spec, load_data_config
from utils.errors import UserError

IMAGE = {"id": 1, "file_name": "a.jpg"}
CAPTION = {"image_id": 1, "caption": "a cat"}


def write(folder: Path, content: object, files: tuple[str, ...] = ("a.jpg",)) -> tuple[Path, Path]:
    (folder / "images").mkdir()
    for name in files:
        (folder / "images" / name).touch()
    annotation_file = folder / "captions.json"
    annotation_file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder / "images", annotation_file


def test_all_captions_of_an_image_are_kept_and_empty_ones_dropped(tmp_path: Path):
    captions = [CAPTION, {"image_id": 1, "caption": "ein Kätzchen"}, {"image_id": 1, "caption": "  "}]
    content = {"images": [IMAGE, {"id": 2, "file_name": "no_captions.jpg"}], "annotations": captions}
    caption_set = read_captions(*write(tmp_path, content))
    assert [(image.image_id, image.captions) for image in caption_set.images] == [(1, ("a cat", "ein Kätzchen"))]
    assert Path(caption_set.images[0].path).name == "a.jpg"
    assert caption_set.num_captions == 2 and caption_set.missing == []


def test_images_that_are_not_on_disk_are_left_out_and_listed(tmp_path: Path):
    content = {
        "images": [IMAGE, {"id": 2, "file_name": "gone.jpg"}],
        "annotations": [CAPTION, {"image_id": 2, "caption": "a dog"}],
    }
    caption_set = read_captions(*write(tmp_path, content))
    assert len(caption_set.images) == 1 and caption_set.missing == ["gone.jpg"]


def test_file_names_may_have_folders(tmp_path: Path):
    img_dir, annotation_file = write(
        tmp_path, {"images": [{"id": 1, "file_name": "sub/a.jpg"}], "annotations": [CAPTION]}, files=()
    )
    (img_dir / "sub").mkdir()
    (img_dir / "sub" / "a.jpg").touch()
    assert len(read_captions(img_dir, annotation_file).images) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "is not valid JSON"),
        ([], "has no list 'images'"),
        ({"images": []}, "has no list 'annotations'"),
        ({"images": [IMAGE], "annotations": []}, "holds no captions"),
        (
            {"images": [IMAGE], "annotations": [{"image_id": 1, "bbox": []}]},
            "entry 0 of 'annotations' has no usable 'caption'",
        ),
        ({"images": [{"id": 1}], "annotations": [CAPTION]}, "'images' has no usable 'file_name'"),
        ({"images": [{**IMAGE, "file_name": "b.jpg"}], "annotations": [CAPTION]}, "none of the 1 images"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, content, message):
    with pytest.raises(UserError) as error:
        read_captions(*write(tmp_path, content))
    assert message in str(error.value)


def test_a_missing_path_is_named_with_its_flag(tmp_path: Path):
    img_dir, annotation_file = write(tmp_path, {"images": [IMAGE], "annotations": [CAPTION]})
    with pytest.raises(UserError, match="--img_dir .*nowhere does not exist"):
        read_captions(tmp_path / "nowhere", annotation_file)
    with pytest.raises(UserError, match=r"--annotation_file .*nowhere.json cannot be read"):
        read_captions(img_dir, tmp_path / "nowhere.json")


def test_cocos_default_paths_come_with_the_download_steps(tmp_path: Path, monkeypatch):
    img_dir, _ = write(tmp_path, {})
    monkeypatch.chdir(tmp_path)
    for paths in (("data/mscoco/train2017", "a.json"), (img_dir, "data/mscoco/annotations/captions_train2017.json")):
        with pytest.raises(UserError) as error:
            read_captions(*paths)
        assert "wget http://images.cocodataset.org" in str(error.value) and "--sample" in str(error.value)
    with pytest.raises(UserError) as error:
        read_captions("data/my_photos", "a.json")
    assert "wget" not in str(error.value)


def test_real_annotations_are_read(data_dir):
    coco, flickr8k = data_dir / "coco_mini", data_dir / "flickr8k"
    caption_set = read_captions(coco / "train2017", coco / "annotations" / "captions_train2017.json")
    assert (len(caption_set.images), caption_set.num_captions, caption_set.missing) == (40, 200, [])
    caption_set = read_captions(flickr8k / "images", flickr8k / "annotations" / "captions_train.json")
    assert (len(caption_set.images), caption_set.num_captions) == (6_000, 30_000)


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).touch()
    return folder / "images"


def found(caption_set) -> dict[str, tuple[str, ...]]:
    return {Path(image.path).name: image.captions for image in caption_set.images}


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("csv", "\t")])
def test_csv_rows_of_one_image_are_put_together(tmp_path: Path, suffix, delimiter):
    img_dir = make_files(tmp_path, "a.jpg", "sub/b.jpg")
    rows = [("filepath", "id", "title"), ("a.jpg", "x", "a cat"), ("sub/b.jpg", "x", '"a dog, ""Rex"""')]
    rows += [("a.jpg", "x", "a black cat"), (str(img_dir / "a.jpg"), "x", "by its whole path")]
    (tmp_path / f"c.{suffix}").write_text("\n".join(map(delimiter.join, rows)))
    caption_set = read_captions(img_dir, tmp_path / f"c.{suffix}")
    captions = [image.captions for image in caption_set.images]
    assert captions == [("a cat", "a black cat"), ('a dog, "Rex"',), ("by its whole path",)]


def test_bad_csv_rows_are_left_out_and_counted(tmp_path: Path):
    img_dir = make_files(tmp_path, "a.jpg", "b.jpg")
    lines = [b"\xef\xbb\xbfimage,caption", b"a.jpg,caf\xc3\xa9", b"a.jpg", b",no image", b"b.jpg,  ", b"b.jpg,tea"]
    (tmp_path / "c.csv").write_bytes(b"\r\n".join([*lines, b"b.jpg,nul\x00", b"gone.jpg,a dog"]))
    caption_set = read_captions(img_dir, tmp_path / "c.csv", csv_columns=("image", "caption"))
    assert found(caption_set) == {"a.jpg": ("café",), "b.jpg": ("tea", "nul")}
    assert [entry.rpartition(" ")[2] for entry in caption_set.unusable] == ["3", "4", "5"]  # lines of the file
    assert caption_set.missing == ["gone.jpg"]
    for part in ("3 entries are unusable", "1 more images are not on", "1 NUL characters are left out (e.g. line 7)"):
        assert part in caption_set.describe()


def test_a_csv_without_the_columns_names_those_it_has(tmp_path: Path):
    img_dir = make_files(tmp_path, "a.jpg")
    (tmp_path / "c.csv").write_text("photo,words\na.jpg,a cat\n")
    with pytest.raises(UserError, match=r"no column 'filepath' \(its columns: photo, words\).* --csv_image_column"):
        read_captions(img_dir, tmp_path / "c.csv")


def test_karpathys_splits_are_kept_apart(tmp_path: Path):
    img_dir = make_files(tmp_path, "val2014/a.jpg", "b.jpg", "c.jpg")
    images = [
        {"filepath": "val2014", "filename": "a.jpg", "cocoid": 7, "split": "restval", "sentences": [{"raw": "one"}]},
        {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "two"}, {"raw": "three"}]},
        {"filename": "c.jpg", "split": "val", "sentences": [{"raw": "four"}]},
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"dataset": "x", "images": images}))
    assert found(read_captions(img_dir, tmp_path / "dataset.json")) == {"a.jpg": ("one",), "b.jpg": ("two", "three")}
    assert found(read_captions(img_dir, tmp_path / "dataset.json", split="val")) == {"c.jpg": ("four",)}
    del images[1]["split"]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    with pytest.raises(UserError, match="not in Karpathy's format"):
        read_captions(img_dir, tmp_path / "dataset.json")


def test_a_folder_of_images_and_texts_is_read(tmp_path: Path):
    img_dir = make_files(tmp_path, "a.jpg", "sub/b.PNG", "no_text.jpg", "empty.jpg", "empty.txt", "only.txt")
    (img_dir / "a.txt").write_text("a cat\n\n a black cat \n", encoding="utf-8")
    (img_dir / "sub" / "b.txt").write_text("café", encoding="utf-16")
    (make_files(tmp_path, "old.jpg") / "old.txt").write_bytes(b"caf\xe9")
    caption_set = read_captions(img_dir)
    assert found(caption_set) == {"a.jpg": ("a cat", " a black cat "), "b.PNG": ("café",)}
    assert caption_set.missing == []
    assert [entry.split()[0] for entry in caption_set.unusable] == ["empty.jpg", "no_text.jpg", "old.jpg:"]
    assert found(read_captions(img_dir, load_data_config().train_annotation_file)) == found(caption_set)
    with pytest.raises(UserError, match="nowhere.json cannot be read"):
        read_captions(img_dir, tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="neither shards"):
        read_captions(make_files(tmp_path / "other", "a.jpg"))
    with pytest.raises(UserError, match="images: holds no captions .* a.jpg without captions in a.txt"):
        read_captions(tmp_path / "other" / "images", format="folder")


def test_two_images_of_one_id_and_file_keep_their_captions(tmp_path: Path):
    content = {"images": [IMAGE, IMAGE], "annotations": [{**CAPTION, "id": 5}, {**CAPTION, "id": 5}]}
    assert [image.captions for image in read_captions(*write(tmp_path, content)).images] == [("a cat", "a cat")]


def test_two_images_of_one_id_and_other_files_are_refused(tmp_path: Path):
    content = {"images": [IMAGE, {**IMAGE, "file_name": "b.jpg"}], "annotations": [CAPTION]}
    with pytest.raises(UserError, match=r"two images have the same id 1 \(a.jpg and b.jpg\)"):
        read_captions(*write(tmp_path, content, files=("a.jpg", "b.jpg")))


def test_every_format_has_a_reader():
    assert ("auto", *READERS, "shards") == FORMATS


def write_tables(folder: Path) -> tuple[Path, Path]:
    """Write a captions table with another suffix and other columns than the defaults."""
    img_dir = make_files(folder, "a.jpg", "b.jpg")
    (folder / "captions.txt").write_text("image,caption\na.jpg,a cat\nb.jpg,a dog\n")
    return img_dir, folder / "captions.txt"


TABLE = {"csv_image_column": "image", "csv_caption_column": "caption"}


def test_training_and_validation_read_with_the_same_keys(tmp_path: Path):
    img_dir, table = write_tables(tmp_path)
    paths = {f"{split}_{name}": str(path) for split in ("train", "val")
             for name, path in (("img_dir", img_dir), ("annotation_file", table))}  # fmt: skip
    config = load_data_config({**paths, **TABLE, "format": "csv"})
    for split in ("train", "val"):
        assert found(open_captions(config.captions(split))) == {"a.jpg": ("a cat",), "b.jpg": ("a dog",)}
    for split, key in (("train", "format"), ("val", "val_format")):
        config = load_data_config({**paths, **TABLE, "format": "csv", key: "coco"})
        with pytest.raises(UserError, match="captions.txt: is not valid JSON.* --set dataloader.format"):
            open_captions(config.captions(split))


@pytest.mark.parametrize(
    ("format", "val_format", "expected"),
    [("auto", None, "auto"), ("csv", None, "csv"), ("csv", "coco", "coco"), ("shards", None, "auto"),
     ("folder", None, "auto"), ("stream", None, "auto"), ("stream", "karpathy", "karpathy")],
)  # fmt: skip
def test_the_format_of_the_validation_set(format, val_format, expected):
    config = load_data_config({"val_img_dir": "images", "format": format, "val_format": val_format})
    assert config.captions("val").format == expected and config.captions("val").split == "val"
    assert load_data_config().captions("val") is None


def test_the_flags_of_other_commands_override_data_config(tmp_path: Path):
    img_dir, table = write_tables(tmp_path)
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir")
    parser.add_argument("--annotation_file")
    add_caption_flags(parser)
    paths = ["--data_dir", str(img_dir), "--annotation_file", str(table)]
    flags = [*paths, "--format", "csv", "--csv_image_column", "image", "--csv_caption_column", "caption"]
    spec = caption_spec(parser.parse_args(flags), "--data_dir", "test")
    assert found(open_captions(spec)) == {"a.jpg": ("a cat",), "b.jpg": ("a dog",)} and spec.split == "test"
    spec = caption_spec(parser.parse_args(paths), "--data_dir", "test")
    assert spec[2:5] == ("auto", "filepath", "title")
    with pytest.raises(UserError, match="--data_dir gone does not exist"):
        open_captions(spec._replace(img_dir="gone"))

import json
from pathlib import Path

import pytest

from dataloader.captions import read_captions
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


def test_missing_paths_come_with_the_download_steps(tmp_path: Path):
    img_dir, annotation_file = write(tmp_path, {"images": [IMAGE], "annotations": [CAPTION]})
    for paths in ((tmp_path / "nowhere", annotation_file), (img_dir, tmp_path / "nowhere.json")):
        with pytest.raises(UserError, match="does not exist") as error:
            read_captions(*paths)
        assert "wget http://images.cocodataset.org" in str(error.value) and "--sample" in str(error.value)


def test_real_annotations_are_read(data_dir):
    coco, flickr8k = data_dir / "coco_mini", data_dir / "flickr8k"
    caption_set = read_captions(coco / "train2017", coco / "annotations" / "captions_train2017.json")
    assert (len(caption_set.images), caption_set.num_captions, caption_set.missing) == (40, 200, [])
    caption_set = read_captions(flickr8k / "images", flickr8k / "annotations" / "captions_train.json")
    assert (len(caption_set.images), caption_set.num_captions) == (6_000, 30_000)

import io
import json
import os
import pickle
import shutil
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import webdataset
from PIL import Image
from torchvision import transforms

from dataloader.captions import read_captions
from dataloader.storage.packing import make_spec, pack
from dataloader.storage.shards import INDEX_FILE, Shards
from tests.conftest import make_captions, message_logger
from utils.errors import UserError
from utils.images import UnreadableImageError, read_pixels
from utils.tokenizer import get_tokenizer


def make_shards(folder: Path, num_images: int = 24, images_per_shard: int = 10) -> tuple[Path, object]:
    caption_set = read_captions(*make_captions(folder, num_images))
    spec = make_spec(caption_set, "shards", 32, images_per_shard)
    pack(caption_set, folder / "shards", spec, num_workers=0, logger=message_logger([]))
    return folder / "shards", caption_set


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_shards_hold_every_image_and_all_its_captions(tmp_path: Path):
    folder, caption_set = make_shards(tmp_path)
    read = read_captions(folder)
    assert [file.name for file in sorted(folder.glob("*.tar"))] == ["000000.tar", "000001.tar", "000002.tar"]
    assert [(image.image_id, image.captions) for image in read.images] == [
        (image.image_id, image.captions) for image in caption_set.images
    ]
    for number in (23, 0, 11):
        pixels = read_pixels(read.shards[number], 32)
        assert min(pixels.shape[1:]) == 32
        expected = np.asarray(Image.open(caption_set.images[number].path).convert("RGB"))[0, 0]
        assert np.abs(pixels[:, 16, 16].numpy().astype(int) - expected).max() <= 3  # JPEG


def test_shards_cross_to_a_spawned_worker(tmp_path: Path):
    shards = Shards.open(make_shards(tmp_path)[0])
    shards[3]
    copy = pickle.loads(pickle.dumps(shards))
    assert copy[3].getvalue() == shards[3].getvalue() and copy.name(3) == shards.name(3)


def test_the_webdataset_library_reads_them(tmp_path: Path):
    folder, caption_set = make_shards(tmp_path)
    urls = str(folder / "{000000..000002}.tar")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 24
    for sample, image in zip(samples, caption_set.images, strict=True):
        assert sample["jpg"].shape[2] == 3 and tuple(sample["json"]["captions"]) == image.captions
        assert sample["json"]["image_id"] == image.image_id


@pytest.mark.slow
def test_open_clips_loader_reads_them(tmp_path: Path):
    pytest.importorskip("pandas", reason="open_clip's own training needs pandas, which is not installed")
    from open_clip_train.data import get_wds_dataset

    folder, caption_set = make_shards(tmp_path)
    urls = str(folder / "{000000..000002}.tar")
    args = Namespace(
        train_data=urls, train_data_upsampling_factors=None, train_num_samples=None, dataset_resampled=False,
        seed=0, batch_size=4, workers=1, world_size=1,
    )  # fmt: skip
    data = get_wds_dataset(args, transforms.ToTensor(), is_train=True, tokenizer=open_clip.get_tokenizer("RN50"))
    images, tokens = (torch.cat(column) for column in zip(*data.dataloader, strict=True))
    assert data.dataloader.num_samples == 24 == len(images)  # read from sizes.json
    expected = get_tokenizer()([image.captions[0] for image in caption_set.images], multiple=77)
    assert sorted(tokens.tolist()) == sorted(expected.tolist())


def test_shards_of_img2dataset_are_read(tmp_path: Path):
    members = {}
    for number in range(3):
        key = f"00000{number:04}"
        members |= {f"{key}.jpg": jpeg((200, number, 0)), f"{key}.txt": f"thing {number}".encode()}
        members[f"{key}.json"] = json.dumps({"caption": f"thing {number}", "url": "x", "status": "success"}).encode()
    write_tar(tmp_path / "00000.tar", members)
    write_tar(
        tmp_path / "00001.tar", {"dir/a.b.jpg": b"", "dir/c.JPG": jpeg((0, 9, 0)), "dir/c.txt": b"caf\xc3\xa9\n\ntea"}
    )
    read = read_captions(tmp_path)
    assert [image.captions for image in read.images] == [("thing 0",), ("thing 1",), ("thing 2",), ("café", "tea")]
    assert [image.image_id for image in read.images] == ["000000000", "000000001", "000000002", "dir/c"]
    assert read.unusable and "dir/a (has no" in read.unusable[0]
    assert read_pixels(read.shards[3], 16).shape == (3, 30, 40)


def test_two_samples_of_one_key_are_not_mixed(tmp_path: Path):
    write_tar(
        tmp_path / "0.tar", {"a.jpg": jpeg((1, 2, 3)), "a.txt": b"one", "b.jpg": jpeg((4, 5, 6)), "b.txt": b"two"}
    )
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    read = read_captions(tmp_path)
    assert [image.captions for image in read.images] == [("two",)] and "0.tar/a (is there twice)" in read.unusable[0]


def test_the_index_is_made_again_when_other_tools_shards_change(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg((1, 2, 3)), "a.txt": b"one"})
    assert len(read_captions(tmp_path).images) == 1 and (tmp_path / INDEX_FILE).is_file()
    write_tar(tmp_path / "1.tar", {"b.jpg": jpeg((1, 2, 3)), "b.txt": b"two"})
    assert len(read_captions(tmp_path).images) == 2


def test_a_shard_rewritten_at_the_same_size_is_indexed_anew(tmp_path: Path):
    for text in ("one", "two"):
        write_tar(tmp_path / "0.tar", {"a.jpg": jpeg((1, 2, 3)), "a.txt": text.encode()})
        os.utime(tmp_path / "0.tar", (1e9, 1e9))
        read = read_captions(tmp_path)
        assert read.images[0].captions == (text,)
    assert "was made anew (0.tar has changed)" in read.describe()
    assert read_captions(tmp_path).shards.notes == []
    (tmp_path / INDEX_FILE).write_bytes((tmp_path / INDEX_FILE).read_bytes()[:-30])
    assert "index.npz was damaged" in read_captions(tmp_path).describe()


def test_an_index_that_cannot_be_written_beside_its_shards_goes_to_the_cache(tmp_path: Path):
    for name in ("a", "b"):  # shards of the same name
        (tmp_path / name / INDEX_FILE).mkdir(parents=True)  # nothing can be written there
        write_tar(tmp_path / name / "0.tar", {"a.jpg": jpeg((1, 2, 3)), "a.txt": name.encode()})
    for notes in (1, 0):
        for name in ("a", "b"):
            shards = Shards.open(tmp_path / name, cache_dir=tmp_path / "cache")
            assert [captions for *_, captions in shards.samples()] == [(name,)] and len(shards.notes) == notes
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache").touch()
    assert "so the index goes to memory" in Shards.open(tmp_path / "a", cache_dir=tmp_path / "cache").notes[1]


def test_the_index_of_another_pack_is_not_believed(tmp_path: Path):
    folder, caption_set = make_shards(tmp_path / "a")
    other, _ = make_shards(tmp_path / "b")
    assert read_captions(shutil.copytree(folder, tmp_path / "copy")).describe() == "24 images, 48 captions"
    for file in other.glob("*.tar"):
        write_tar(file, {"0.jpg": jpeg((1, 2, 3)), "0.txt": f"of {file.name}".encode()})
        (folder / file.name).write_bytes(file.read_bytes())
    read = read_captions(folder)
    assert [image.captions for image in read.images] == [(f"of 00000{number}.tar",) for number in range(3)]
    assert "was of other shards" in read.describe()


@pytest.mark.parametrize("kept", [0, 700, 12_000])
def test_a_truncated_shard_is_named_and_its_other_samples_used(tmp_path: Path, kept):
    folder, _ = make_shards(tmp_path)
    shard = folder / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:kept])
    read = read_captions(folder)
    assert len(read.unusable) == 1 and "000001.tar" in read.unusable[0]
    readable = []
    for number in range(24):
        try:
            readable.append((number, read_pixels(read.shards[number], 32)))
        except UnreadableImageError as error:
            assert "000001.tar" in str(error) and 10 <= number < 20
    assert len(readable) >= 14 + (kept > 10_000)


def test_a_flipped_bit_is_found_and_named(tmp_path: Path):
    folder, _ = make_shards(tmp_path)
    shards = Shards.open(folder)
    content = bytearray((folder / "000001.tar").read_bytes())
    content[int(shards.index["offset"][12]) + 100] ^= 4
    (folder / "000001.tar").write_bytes(content)
    shards = Shards.open(folder)
    with pytest.raises(UnreadableImageError, match=r"000001.tar/000000012 is damaged"):
        shards[12]
    assert all(shards[number] for number in range(24) if number != 12)


def test_a_damaged_header_of_another_tools_shard_loses_one_sample(tmp_path: Path):
    members = {}
    for number in range(5):
        members |= {f"{number}.jpg": jpeg((number, 2, 3)), f"{number}.txt": b"a thing"}
    write_tar(tmp_path / "0.tar", members)
    content = bytearray((tmp_path / "0.tar").read_bytes())
    with tarfile.open(tmp_path / "0.tar") as tar:
        header = tar.getmember("2.jpg").offset
    content[header + 100] ^= 255
    (tmp_path / "0.tar").write_bytes(content)
    read = read_captions(tmp_path)
    assert [image.image_id for image in read.images] == ["0", "1", "3", "4"]
    assert "0.tar/2 (has no image)" in read.unusable[0]


def test_a_folder_without_shards_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="contains no shards"):
        read_captions(tmp_path, format="shards")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_shards_of_a_read_only_folder_are_indexed_in_memory(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg((1, 2, 3)), "a.txt": b"one"})
    tmp_path.chmod(0o500)
    assert read_captions(tmp_path).images[0].captions == ("one",)
    tmp_path.chmod(0o700)
    assert not (tmp_path / INDEX_FILE).exists()


def test_some_of_the_images_are_taken_in_order(tmp_path: Path):
    folder, _ = make_shards(tmp_path)
    whole = read_captions(folder)
    part = whole.take([20, 3])
    assert [image.path for image in part.images] == [part.shards.name(number) for number in range(2)]
    assert [data.getvalue() for data in part.files] == [whole.shards[number].getvalue() for number in (20, 3)]

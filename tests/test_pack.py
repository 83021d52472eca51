import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloader import pack as pack_command
from dataloader.captions import read_captions
from dataloader.storage.identity import stamps
from dataloader.storage.packing import PIXELS_FILE, make_spec, pack, read_manifest, shrink_jpeg
from tests.conftest import ROOT, SCRIPT_ENVIRONMENT, make_captions, message_logger
from utils.errors import UserError


def pack_flags(files: tuple[Path, Path], output: Path, *flags: object) -> list[str]:
    flags = ("--img_dir", files[0], "--annotation_file", files[1], "--output", output, "--num_workers", 0, *flags)
    return list(map(str, flags))


def contents(folder: Path) -> dict[str, object]:
    """Return the content of each file by its name, of .npz files the arrays but for the times of files."""
    read = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    for name in read:
        if name.endswith(".npz"):
            arrays = dict(np.load(folder / name))
            read[name] = {key: arrays[key].tobytes() for key in arrays if not key.endswith("stamps")}
    return read


def finished_chunks(folder: Path) -> int:
    return len(list(folder.glob("*_unreadable.json")))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["shards", "pixels"])
def test_a_pack_killed_three_times_equals_an_uninterrupted_one(tmp_path: Path, form):
    files = make_captions(tmp_path, num_images=90, size=(400, 300))
    (files[0] / "000000000007.png").write_bytes(b"damaged")
    flags = ("--form", form, "--size", 128, "--images_per_shard", 6)
    pack_command.main(pack_flags(files, tmp_path / "whole", *flags))
    rng = np.random.default_rng(0)
    for number in range(3):
        command = [sys.executable, "-m", "dataloader.pack", *pack_flags(files, tmp_path / "killed", *flags)]
        process = subprocess.Popen(
            [*command, "--num_workers", "2"], cwd=ROOT, env=SCRIPT_ENVIRONMENT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before = finished_chunks(tmp_path / "killed")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:  # until it has finished a chunk
            if finished_chunks(tmp_path / "killed") > before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if number == 0:
            assert 0 < finished_chunks(tmp_path / "killed") < 15
    time.sleep(0.1)  # workers of the last process may finish their chunk
    pack_command.main(pack_flags(files, tmp_path / "killed", *flags))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "killed" / "pack.json").read_bytes())["unreadable"] == [7]


def test_the_command_reports_its_result_and_unreadable_images(tmp_path: Path, capsys):
    files = make_captions(tmp_path)
    (files[0] / "000000000007.png").write_bytes(b"damaged")
    pack_command.main(pack_flags(files, tmp_path / "out", "--size", 32))
    output = capsys.readouterr().out
    assert "left out" in output and "000000000007.png" in output
    assert "packed 23 images with a short side of 32 pixels" in output
    before = contents(tmp_path / "out")
    pack_command.main(pack_flags(files, tmp_path / "out", "--size", 32))
    assert "is packed already" in capsys.readouterr().out
    with pytest.raises(UserError, match="another folder"):
        pack_command.main(pack_flags(files, tmp_path / "out", "--size", 40))
    assert contents(tmp_path / "out") == before


def test_a_table_with_other_columns_is_packed(tmp_path: Path):
    img_dir, _ = make_captions(tmp_path, num_images=2)
    table = tmp_path / "captions.txt"
    table.write_text("image,caption\n000000000000.png,a cat\n000000000001.png,a dog\n")
    flags = ["--format", "csv", "--csv_image_column", "image", "--csv_caption_column", "caption"]
    pack_command.main(pack_flags((img_dir, table), tmp_path / "out", *flags))
    assert [image.captions for image in read_captions(tmp_path / "out").images] == [("a cat",), ("a dog",)]
    with pytest.raises(UserError, match="contains packed images"):
        pack_command.main(["--img_dir", str(tmp_path / "out"), "--output", str(tmp_path / "again")])


def test_the_pixels_are_those_of_the_images(tmp_path: Path):
    caption_set = read_captions(*make_captions(tmp_path))
    spec = make_spec(caption_set, "pixels", 16, images_per_chunk=10)
    assert pack(caption_set, tmp_path / "out", spec, num_workers=2, logger=message_logger([])) == []
    pixels = np.load(tmp_path / "out" / PIXELS_FILE)
    assert pixels.shape == (24, 16, 16, 3)
    for row, image in zip(pixels, caption_set.images, strict=True):
        assert (row == np.asarray(Image.open(image.path))[0, 0]).all()


def test_part_of_another_pack_is_refused(tmp_path: Path):
    caption_set, output = read_captions(*make_captions(tmp_path)), tmp_path / "out"
    spec, logger = make_spec(caption_set, "shards", 32), message_logger([])
    pack(caption_set, output, spec, num_workers=0, logger=logger)
    (output / "pack.json").write_text(json.dumps({**spec._asdict(), "unreadable": None}))  # as while packing
    assert read_manifest(caption_set, output, spec, logger) is None
    for manifest, reason in {"": r"\(size was 32, is 40\)", None: r"\(its pack.json is damaged"}.items():
        with pytest.raises(UserError, match=f"a pack of other images .*{reason}"):
            pack(caption_set, output, spec._replace(size=40), num_workers=0, logger=logger)
        (output / "pack.json").unlink() if manifest is None else (output / "pack.json").write_text(manifest)


@pytest.mark.parametrize("name", ["sizes.json", "film.tar", "000000.tar"])
def test_a_users_own_files_are_neither_deleted_nor_overwritten(tmp_path: Path, name):
    files, output = make_captions(tmp_path), tmp_path / "out"
    output.mkdir()
    (output / "film.part-1.rar").write_text("mine")
    (output / name).write_text("mine")
    with pytest.raises(UserError, match=f"out contains {name} but no pack.json"):
        pack_command.main(pack_flags(files, output))
    (output / name).unlink()
    pack_command.main(pack_flags(files, output))
    assert (output / "film.part-1.rar").read_text() == "mine"


def test_no_readable_image_is_one_sentence(tmp_path: Path):
    files = make_captions(tmp_path)
    for file in files[0].iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="no image of 24 can be read"):
        pack_command.main(pack_flags(files, tmp_path / "out"))


def test_a_jpeg_of_the_right_size_keeps_its_bytes(tmp_path: Path):
    image = Image.effect_noise((60, 40), 50).convert("RGB")
    image.save(tmp_path / "a.jpg")
    assert shrink_jpeg(str(tmp_path / "a.jpg"), 40) == (tmp_path / "a.jpg").read_bytes()
    assert shrink_jpeg(str(tmp_path / "a.jpg"), 32) != (tmp_path / "a.jpg").read_bytes()
    image.convert("L").save(tmp_path / "grey.jpg")
    (tmp_path / "c.jpg").write_bytes(shrink_jpeg(str(tmp_path / "grey.jpg"), 40))
    assert Image.open(tmp_path / "c.jpg").mode == "RGB"


@pytest.mark.parametrize("form", ["shards", "pixels"])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, form):
    caption_set = read_captions(*make_captions(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        pack(caption_set, tmp_path / "file", make_spec(caption_set, form, 32), num_workers=0, logger=message_logger([]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_while_writing_is_one_sentence_and_the_pack_continues(tmp_path: Path, num_workers):
    caption_set, output = read_captions(*make_captions(tmp_path)), tmp_path / "out"
    spec, logger = make_spec(caption_set, "shards", 32, images_per_chunk=10), message_logger([])
    (output / "000001_unreadable.json").mkdir(parents=True)  # nothing can be written there
    (output / "pack.json").write_text(json.dumps({**spec._asdict(), "unreadable": None}))
    np.savez(output / "sources.npz", image_stamps=stamps([image.path for image in caption_set.images]))
    with pytest.raises(UserError, match="out cannot be written .* to continue"):
        pack(caption_set, output, spec, num_workers=num_workers, logger=logger)
    (output / "000001_unreadable.json").rmdir()
    pack(caption_set, output, spec, num_workers=num_workers, logger=logger)
    assert read_captions(output).num_images == 24

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloader.captions import read_captions
from dataloader.pack import PIXELS_FILE, make_spec, pack, shrink_jpeg
from tests.conftest import ROOT, SCRIPT_ENVIRONMENT, make_captions
from utils.errors import UserError


def pack_command(files: tuple[Path, Path], output: Path, *flags: object) -> list[str]:
    flags = ("--img_dir", files[0], "--annotation_file", files[1], "--output", output, *flags)
    return [sys.executable, "-m", "dataloader.pack", *map(str, flags)]


def run_pack(files, output, *flags) -> subprocess.CompletedProcess:
    command = pack_command(files, output, *flags)
    return subprocess.run(command, cwd=ROOT, env=SCRIPT_ENVIRONMENT, capture_output=True, text=True, timeout=300)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("form", ["shards", "pixels"])
def test_a_pack_killed_ten_times_equals_an_uninterrupted_one(tmp_path: Path, form):
    files = make_captions(tmp_path, num_images=120, size=(400, 300))
    (files[0] / "000000000007.png").write_bytes(b"damaged")
    flags = ("--form", form, "--size", 128, "--images_per_shard", 6, "--num_workers", 2)
    assert run_pack(files, tmp_path / "whole", *flags).returncode == 0
    rng = np.random.default_rng(0)
    finished = []
    for _ in range(10):
        process = subprocess.Popen(
            pack_command(files, tmp_path / "killed", *flags), cwd=ROOT, env=SCRIPT_ENVIRONMENT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before = len(list((tmp_path / "killed").glob("*_stats.json")))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:  # into the work, not into the imports
            if len(list((tmp_path / "killed").glob("*_stats.json"))) > before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished.append(len(list((tmp_path / "killed").glob("*_stats.json"))))
    assert finished[0] < 20  # killed in the midst of it
    output = run_pack(files, tmp_path / "killed", *flags)
    assert output.returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    if finished[-1] < 20:
        assert "left out" in output.stdout and "000000000007.png" in output.stdout


def test_a_pack_is_not_made_twice_nor_over_another(tmp_path: Path):
    files = make_captions(tmp_path)
    assert run_pack(files, tmp_path / "out", "--size", 32).returncode == 0
    before = contents(tmp_path / "out")
    assert "is packed already" in run_pack(files, tmp_path / "out", "--size", 32).stdout
    output = run_pack(files, tmp_path / "out", "--size", 40)
    assert output.returncode == 1 and "another folder" in output.stderr and "Traceback" not in output.stderr
    assert contents(tmp_path / "out") == before


def test_part_of_another_pack_is_refused(tmp_path: Path):
    caption_set = read_captions(*make_captions(tmp_path))
    pack(caption_set, tmp_path / "out", make_spec(caption_set, "shards", 32), num_workers=0, tell=print)
    (tmp_path / "out" / "pack.json").unlink()
    with pytest.raises(UserError, match="part of another pack"):
        pack(caption_set, tmp_path / "out", make_spec(caption_set, "shards", 40), num_workers=0, tell=print)


def test_no_readable_image_is_one_sentence(tmp_path: Path):
    files = make_captions(tmp_path)
    for file in files[0].iterdir():
        file.write_bytes(b"damaged")
    output = run_pack(files, tmp_path / "out")
    assert output.returncode == 1 and "no image of 24 can be read" in output.stderr


def test_a_jpeg_of_the_right_size_keeps_its_bytes(tmp_path: Path):
    image = Image.effect_noise((60, 40), 50).convert("RGB")
    image.save(tmp_path / "a.jpg")
    assert shrink_jpeg(str(tmp_path / "a.jpg"), 40) == (tmp_path / "a.jpg").read_bytes()
    assert shrink_jpeg(str(tmp_path / "a.jpg"), 32) != (tmp_path / "a.jpg").read_bytes()
    image.convert("L").save(tmp_path / "grey.jpg")
    (tmp_path / "grey.jpg").rename(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").write_bytes(shrink_jpeg(str(tmp_path / "b.jpg"), 40))
    assert Image.open(tmp_path / "c.jpg").mode == "RGB"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    caption_set = read_captions(*make_captions(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        pack(caption_set, tmp_path / "file", make_spec(caption_set, "pixels", 32), num_workers=0, tell=print)
    assert not (tmp_path / PIXELS_FILE).exists()

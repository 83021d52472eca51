"""Malformed and malicious files: each is read, skipped or refused; none runs code, hangs or writes elsewhere."""

import dataclasses
import io
import json
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloader.captions import read_captions
from dataloader.storage.shards import Shards
from model import CLIP
from tests.conftest import TINY, make_captions
from tests.runs import tiny_flags
from trainer.run.checkpoint import FORMAT_VERSION
from utils.config import parse_override, read_yaml
from utils.errors import UserError
from utils.images import UnreadableImageError, load_image, read_pixels, resize_short_side
from utils.text import one_line
from utils.tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with a good checkpoint and good captions."""
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    torch.save({"model_state_dict": CLIP(TINY).state_dict()}, folder / "good.pt")
    make_captions(folder)
    return folder


def paths_in(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (60, 50)) -> Image.Image:
    return Image.frombytes(mode, size, np.random.default_rng(0).bytes(size[0] * size[1] * len(mode)))


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header claims these sides."""
    data = bytearray(encoded(noise(), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


JPEG = encoded(noise(), "JPEG")
READ, REFUSED = True, False
IMAGES: dict[str, tuple[bytes | Callable[[Path], None], bool]] = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], REFUSED),
    "truncated.png": (encoded(noise(), "PNG")[:900], REFUSED),
    "empty.jpg": (b"", REFUSED),
    "text.jpg": (b"<html>not found</html>", REFUSED),
    "nul.jpg": (b"\0" * 5_000, REFUSED),
    "header.jpg": (JPEG[:4], REFUSED),
    "png_named.jpg": (encoded(noise(), "PNG"), READ),
    "jpeg_named.png": (JPEG, READ),
    "animated.gif": (encoded(noise(), "GIF", save_all=True, append_images=[noise().rotate(90)] * 3), READ),
    "animated.webp": (encoded(noise(), "WEBP", save_all=True, append_images=[noise().rotate(90)] * 3), READ),
    "animated.png": (encoded(noise(), "PNG", save_all=True, append_images=[noise().rotate(90)] * 3), READ),
    "one_pixel.png": (encoded(noise(size=(1, 1)), "PNG"), READ),
    "long.png": (encoded(noise(size=(20_000, 3)), "PNG"), READ),
    "tall.jpg": (encoded(noise(size=(3, 20_000)), "JPEG"), READ),
    "sixteen_bits.png": (encoded(Image.fromarray(np.arange(3_000, dtype=np.uint16).reshape(50, 60) * 21), "PNG"), READ),
    "floats.tiff": (encoded(Image.fromarray(np.random.default_rng(0).random((50, 60), np.float32)), "TIFF"), READ),
    "cmyk.jpg": (encoded(noise("CMYK"), "JPEG"), READ),
    "palette_with_alpha.png": (encoded(noise("RGBA").quantize(16), "PNG", transparency=3), READ),
    "gray_with_alpha.png": (encoded(noise("RGBA").convert("LA"), "PNG"), READ),
    "one_bit.png": (encoded(noise().convert("1"), "PNG"), READ),
    "exif_garbage.jpg": (encoded(noise(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40), READ),
    "rotated.jpg": (encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"),
                    READ),
    "bomb.png": (bomb(60_000, 60_000), REFUSED),
    "smaller_bomb.png": (bomb(10_000, 10_000), REFUSED),
    "symlink_loop.jpg": (lambda path: path.symlink_to(path.name), REFUSED),
    "directory.jpg": (lambda path: path.mkdir(), REFUSED),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere"), REFUSED),
    "größe_图片_🐢.jpg": (JPEG, READ),
    os.fsdecode(b"caf\xe9.jpg"): (JPEG, READ),
    "new\nline $x$ %s {} \x1b[31m.jpg": (JPEG, READ),
}  # fmt: skip


def make(path: Path, content: bytes | Callable[[Path], None]) -> Path:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", IMAGES, ids=ascii)
def test_an_image_is_classified_or_refused(folder: Path, tmp_path: Path, run_here, name):
    content, is_read = IMAGES[name]
    path = make(tmp_path / name, content)
    before = paths_in(folder, tmp_path)
    output = run_here("zero_shot_demo.py", "--checkpoint_path", folder / "good.pt", "--img_path", path, cwd=tmp_path)
    if is_read:
        assert output.returncode == 0 and output.stdout.count("%") >= 5
    else:
        assert output.returncode == 1 and name in output.stderr and output.stderr.count("\n") <= 1
    assert paths_in(folder, tmp_path) == before


@pytest.mark.parametrize("name", IMAGES, ids=ascii)
def test_training_reads_the_same_images(tmp_path: Path, name):
    content, is_read = IMAGES[name]
    path = make(tmp_path / name, content)
    if is_read:
        pixels = read_pixels(path, 32)
        assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3
        assert max(resize_short_side(pixels, 32).shape) <= 8 * 32 and load_image(path, 32).size == (32, 32)
    else:
        with pytest.raises(UnreadableImageError):
            read_pixels(path, 32)


def test_a_long_image_is_cropped_to_its_middle():
    pixels = np.zeros((4, 400, 3), np.uint8)
    pixels[:, 198:202] = 255
    image = load_image(Image.fromarray(pixels), 8)
    whole = Image.fromarray(pixels).resize((800, 8), Image.Resampling.BICUBIC).crop((396, 0, 404, 8))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(whole)).max() <= 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read anything")
def test_an_image_without_permission_is_refused(tmp_path: Path):
    path = make(tmp_path / "locked.jpg", JPEG)
    path.chmod(0)
    with pytest.raises(UnreadableImageError, match="Permission denied"):
        read_pixels(path, 32)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_every_unreadable_image(tmp_path: Path, run_here, num_workers):
    img_dir, annotation_file = make_captions(tmp_path, num_images=40)
    annotations = json.loads(annotation_file.read_text())
    for number, (name, (content, _)) in enumerate(IMAGES.items()):
        make(img_dir / name, content)
        annotations["images"].append({"id": 100 + number, "file_name": name})
        annotations["annotations"].append({"image_id": 100 + number, "caption": "a thing"})
    annotation_file.write_text(json.dumps(annotations))
    settings = {"dataloader.max_unreadable_share": 0.3, "trainer.logging_steps": 1, "trainer.num_workers": num_workers}
    flags = tiny_flags((img_dir, annotation_file), tmp_path / "out", epochs=1, **settings)
    output = run_here("train.py", *flags, cwd=tmp_path)
    assert output.returncode == 0, output.stderr
    for name, (content, is_read) in IMAGES.items():
        is_present = not callable(content) or (img_dir / name).is_dir() or (img_dir / name).is_symlink()
        assert not is_present or output.stdout.count(f"/{one_line(name)}: ") == (not is_read), name


GOOD = {"images": [{"id": 1, "file_name": "000000000000.png"}], "annotations": [{"image_id": 1, "caption": "a thing"}]}


def changed(section: str, **values) -> dict:
    return {**GOOD, section: [{**GOOD[section][0], **values}]}


ANNOTATIONS = {
    "truncated": (json.dumps(GOOD)[:60], "JSON"),
    "empty": ("", "is empty"),
    "not UTF-8": (b"\xff\xfe{}", "JSON"),
    "deep": ("[" * 100_000, "JSON"),
    "a list": ("[1, 2]", "'images'"),
    "a number": ("3", "neither JSON nor a table"),
    "null": ("null", "neither JSON nor a table"),
    "images of another type": ({**GOOD, "images": {"1": {}}}, "'images'"),
    "no annotations": ({"images": GOOD["images"]}, "'annotations'"),
    "a missing key": ({**GOOD, "annotations": [{"image_id": 1}]}, "entry 0 of 'annotations' has no usable 'caption'"),
    "null caption": (changed("annotations", caption=None), "'caption'"),
    "a list for a caption": (changed("annotations", caption=["a"]), "'caption'"),
    "a list for an id": (changed("images", id=[1]), "'id'"),
    "a number for a name": (changed("images", file_name=7), "'file_name'"),
    "null entries": ({**GOOD, "images": [None]}, "entry 0 of 'images' has no usable 'id'"),
    "ids of two types": (changed("images", id="1"), "image_id 1"),
    "captions without an image": (changed("annotations", image_id=9), "image_id 9"),
    "blank captions": (changed("annotations", caption=" \t\n"), "no captions"),
    "a name with a NUL": (changed("images", file_name="a/\0b"), "none of the 1 images"),
    "an endless name": (changed("images", file_name="a/" + 5_000 * "x"), "none of the 1 images"),
    "Karpathy's without sentences": ({"images": [{"sentences": 3, "split": "train", "filename": "a"}]}, "Karpathy"),
    "Karpathy's with a number": (
        {"images": [{"sentences": [{"raw": 3}], "split": "train", "filename": "a"}]}, "Karpathy"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_malformed_annotations_are_refused(folder: Path, tmp_path: Path, run_here, name):
    content, message = ANNOTATIONS[name]
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = paths_in(folder, tmp_path)
    flags = ["--train_img_dir", folder / "images", "--train_annotation_file", "a.json", "--output_dir", "out"]
    output = run_here("train.py", *flags, "--model", "RN-small", cwd=tmp_path)
    assert output.returncode == 1 and "a.json" in output.stderr and len(output.stderr) < 1_500
    assert message in output.stderr, output.stderr
    assert paths_in(folder, tmp_path) == before


def test_strange_captions_are_used(folder: Path, tmp_path: Path):
    captions = ["x" * 100_000, "a b " * 25_000, "a\0b\x1b[2J", "\u202eright to left \u05d0\u05d1", "half \ud83d a pair",
                "\u0301" * 500, "&" * 5_000, "<end_of_text>"]  # fmt: skip
    annotations = [{"image_id": 1, "caption": caption, "id": [1]} for caption in captions]
    content = {**GOOD, "annotations": annotations * 2, "categories": 5, "images": GOOD["images"] * 2}
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = read_captions(folder / "images", tmp_path / "a.json")
    assert found.num_images == 1 and found.num_captions == 2 * len(captions)
    for caption in found.images[0].captions:
        tokens = get_tokenizer()([caption])
        assert tokens.shape[1] <= 77 and tokens.max() == 49_407 and caption.encode()


def test_a_malformed_table_is_read_as_far_as_possible(folder: Path, tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(
        b"filepath,title\n000000000000.png,caf\xc3\xa9\n000000000001.png\n../../etc/passwd,x\n"
        b"\x00000000000002.png,b,c,d\n,\n"
    )
    found = read_captions(folder / "images", tmp_path / "a.csv")
    assert [image.image_id for image in found.images] == ["000000000000.png", "000000000002.png"]
    assert len(found.unusable) == 2 and found.missing == ["../../etc/passwd"]
    for content, message in (
        (b"", "is empty"),
        (b"a,b\n1,2\n", "no column"),
        (b'filepath,title\na,"b', "none of the"),
    ):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_captions(folder / "images", tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b'filepath,title\n000000000000.png,"' + b"x" * 200_000 + b'"\n')
    with pytest.raises(UserError, match="a.csv line"):
        read_captions(folder / "images", tmp_path / "a.csv")


def member(name: str, content: bytes = b"", **changes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


GOOD_SAMPLE = [member("good.jpg", JPEG), member("good.txt", b"a thing")]
SHARDS = {
    "names above the folder": [member("../../evil.jpg", JPEG), member("../../evil.txt", b"an evil thing")],
    "absolute names": [member("/tmp/evil.jpg", JPEG), member("/tmp/evil.txt", b"an evil thing")],
    "symbolic links": [member("evil.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("evil.txt", b"x")],
    "hard links": [member("evil.jpg", type=tarfile.LNKTYPE, linkname="good.jpg"), member("evil.txt", b"x")],
    "devices": [member("evil.jpg", type=tarfile.CHRTYPE), member("evil.txt", b"x")],
    "a huge size": [member("evil.jpg", size=1 << 40), member("evil.txt", b"x")],
    "a sparse member": [member("evil.jpg", pax_headers={"GNU.sparse.size": str(1 << 40)}), member("evil.txt", b"x")],
    "deep JSON": [member("evil.jpg", JPEG), member("evil.json", b"[" * 100_000)],
    "JSON of another type": [member("evil.jpg", JPEG), member("evil.json", b'{"captions": {"a": 1}, "image_id": []}')],
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_malicious_shard_gives_its_good_samples_and_writes_nowhere(tmp_path: Path, name):
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in [*GOOD_SAMPLE, *SHARDS[name]]:
            tar.fileobj.write(info.tobuf(tarfile.PAX_FORMAT))
            tar.fileobj.write(content + b"\0" * (-len(content) % 512))
            tar.offset = tar.fileobj.tell()
    found = read_captions(shards)
    assert found.images[0].captions == ("a thing",) and found.num_images <= 2
    for number in range(found.num_images):
        assert read_pixels(found.shards[number], 32).shape == (3, 50, 60)
    assert paths_in(tmp_path) == {shards, shards / "0.tar", shards / "index.npz"}


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + b"\0" * 18, b"\x80\x04evil", pickle.dumps({"files": 1})])
def test_a_malformed_index_is_rebuilt(tmp_path: Path, content):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for info, data in GOOD_SAMPLE:
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "index.npz").write_bytes(content)
    assert len(Shards.open(tmp_path)) == 1


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


TINY_PLAIN = dataclasses.asdict(TINY)


def checkpoint_with(**changes: object) -> dict:
    """Return a checkpoint of ours with some entries replaced."""
    model = {"model_state_dict": dict(CLIP(TINY).state_dict()), "format_version": FORMAT_VERSION}
    configs = {"model": TINY_PLAIN, "dataloader": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
    progress = {"epoch": 0, "samples_seen": 8, "global_step": 1, "validated_step": 0, "best": 0.0}
    rest = {"optimizer_state_dict": {}, "scaler_state_dict": {}, "rank_states": [], "configs": configs}
    return {**model, **progress, **rest, **changes}


def weights_with(**changes: object) -> dict:
    content = checkpoint_with()
    return {**content, "model_state_dict": {**content["model_state_dict"], **changes}}


def config_with(**changes: object) -> dict:
    content = checkpoint_with()
    return {**content, "configs": {**content["configs"], **changes}}


CHECKPOINTS = {
    "code": (lambda marker: {"model_state_dict": Evil(marker)}, "code"),
    "code beside weights": (lambda marker: checkpoint_with(extra=Evil(marker)), "code"),
    "a whole model": (lambda _: torch.nn.Linear(2, 2), "code"),
    "a list": (lambda _: [1, 2], "list"),
    "a tensor": (lambda _: torch.zeros(3), "Tensor"),
    "nothing": (lambda _: {}, "weights"),
    "NaN weights": (lambda _: weights_with(**{"ln_final.weight": torch.full((64,), torch.nan)}),
                    "not finite (first: ln_final.weight)"),
    "integer weights": (lambda _: weights_with(**{"ln_final.weight": torch.ones(64, dtype=torch.int64)}),
                        "ln_final.weight is torch.int64"),
    "complex weights": (lambda _: weights_with(**{"ln_final.weight": torch.ones(64, dtype=torch.complex64)}),
                        "ln_final.weight is torch.complex64"),
    "a sparse weight": (lambda _: weights_with(text_projection=torch.eye(64)[:, :32].to_sparse()), "text_projection"),
    "a weight of a terabyte": (
        lambda _: weights_with(**{"token_embedding.weight": torch.zeros(1).expand(1 << 28, 1 << 10)}),
        "token_embedding.weight"),
    "a weight larger than its file": (
        lambda _: weights_with(**{"token_embedding.weight": torch.zeros(1).expand(49_408, 64)}),
        "token_embedding.weight"),
    "a missing weight": (lambda _: weights_with(**{"ln_final.bias": "x"}), "1 missing (first: ln_final.bias)"),
    "an enormous model": (lambda _: config_with(model={**TINY_PLAIN, "transformer_width": 1 << 40}), "configuration"),
    "more layers than weights": (lambda _: config_with(model={**TINY_PLAIN, "transformer_layers": 1 << 40}),
                                 "configuration"),
    "no config": (lambda _: config_with(model=None), "configuration"),
    "a list of configs": (lambda _: checkpoint_with(configs=[1]), "configuration"),
    "a config of another type": (lambda _: config_with(model={**TINY_PLAIN, "embed_dim": "big"}), "embed_dim"),
    "no mean": (lambda _: config_with(model={**TINY_PLAIN, "image_mean": [0.5]}), "image_mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_malicious_checkpoint_is_refused_before_any_code_runs(folder: Path, tmp_path: Path, run_here, name):
    content, message = CHECKPOINTS[name]
    (tmp_path / "run").mkdir()
    marker = tmp_path / "code_was_run"
    torch.save(content(marker), tmp_path / "run" / "evil.pt")
    make(tmp_path / "a.jpg", JPEG)
    before = paths_in(folder, tmp_path)
    output = run_here("zero_shot_demo.py", "--checkpoint_path", "run", "--img_path", "a.jpg", cwd=tmp_path)
    assert output.returncode == 1 and "evil.pt" in output.stderr and message in output.stderr, output.stderr
    assert paths_in(folder, tmp_path) == before


@pytest.mark.parametrize("kind", ["bare pickle", "archive of another library", "truncated archive", "empty archive"])
def test_other_files_are_refused_as_checkpoints(folder: Path, tmp_path: Path, run_here, kind):
    file, marker = tmp_path / "evil.pt", tmp_path / "code_was_run"
    if kind == "bare pickle":
        file.write_bytes(pickle.dumps({"model_state_dict": Evil(marker)}))
    elif kind == "truncated archive":
        file.write_bytes((folder / "good.pt").read_bytes()[:100_000])
    else:
        with zipfile.ZipFile(file, "w") as archive:
            if kind != "empty archive":
                archive.writestr("data.pkl", pickle.dumps(Evil(marker)))
    make(tmp_path / "a.jpg", JPEG)
    before = paths_in(tmp_path)
    output = run_here("zero_shot_demo.py", "--checkpoint_path", file, "--img_path", "a.jpg", cwd=tmp_path)
    assert output.returncode == 1 and "evil.pt" in output.stderr and paths_in(tmp_path) == before


RESUMED = {
    "no optimizer": (lambda: checkpoint_with(optimizer_state_dict=3), "evil.pt"),
    "an empty optimizer": (checkpoint_with, "the checkpoint is damaged"),
    "a later format": (lambda: checkpoint_with(format_version=99), "evil.pt"),
    "an earlier format": (lambda: checkpoint_with(format_version=2), "earlier version"),
    "an epoch as text": (lambda: checkpoint_with(epoch="0"), "epoch"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_malformed_checkpoint_is_not_resumed(folder: Path, tmp_path: Path, run_here, name):
    content, message = RESUMED[name]
    torch.save(content(), tmp_path / "evil.pt")
    settings = {"model.vision_layers": [1, 1, 1, 1], "model.transformer_layers": 1}
    flags = tiny_flags((folder / "images", folder / "captions.json"), tmp_path / "out", **settings)
    output = run_here("train.py", *flags, "--resume", "evil.pt", cwd=tmp_path)
    assert output.returncode == 1 and message in output.stderr, output.stderr
    assert not list((tmp_path / "out" / "saved_checkpoints").iterdir())


YAML = {
    "a tag": "a: !!python/object/apply:os.system ['touch evil']",
    "a key twice": "a: 1\nb: 2\na: 3",
    "depth": "a: " + "[" * 1_500,
    "an impossible date": "a: 2001-99-99",
    "an endless number": "a: " + "9" * 10_000,
    "a list as key": "? [a]\n: 1",
    "control characters": "a: \x07",
    "text alone": "just words",
    "nothing": "",
}


@pytest.mark.parametrize("name", YAML)
def test_malformed_yaml_is_refused(tmp_path: Path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(YAML[name])
    with pytest.raises(UserError, match="a.yaml") as refused:
        read_yaml(tmp_path / "a.yaml")
    assert len(str(refused.value)) < 1_000
    assert [file.name for file in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize("value", ["!!python/name:os.system", "2001-99-99", "9" * 10_000, "[" * 1_500])
def test_a_malformed_value_on_the_command_line_is_refused(value):
    with pytest.raises(UserError, match="--set trainer.seed"):
        parse_override(f"trainer.seed={value}")

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms import functional as TF

from utils.images import (
    ORIENTATION_TAG,
    ORIENTATIONS,
    UnreadableImageError,
    find_images,
    load_image,
    normalize,
    plain_jpeg_size,
    read_pixels,
    resize_and_crop,
    to_tensor,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (224, 224), (100, 57), (225, 224)])
def test_preprocessing_equals_torchvisions(tmp_path: Path, size):
    noise(*size).save(tmp_path / "a.png")
    expected = CenterCrop(224)(Resize(224, InterpolationMode.BICUBIC)(Image.open(tmp_path / "a.png")))
    assert np.array_equal(load_image(tmp_path / "a.png", 224), expected)


@pytest.mark.parametrize(("size", "least"), [(40, 40), (64, 44), (224, 68)])
def test_training_reads_photographs_as_evaluation_does(data_dir, size, least):
    files = sorted((data_dir / "coco_mini").glob("*/*.jpg"))
    ratios = []
    for file in files:
        exact, fast = to_tensor(load_image(file, size)).float(), resize_and_crop(read_pixels(file, size), size).float()
        ratios.append(10 * torch.log10(255**2 / (exact - fast).square().mean().clamp(min=1e-9)))
    assert len(ratios) == 64
    assert min(ratios) > least  # dB: a shift by one pixel gives about 22, one grey level everywhere 48


@pytest.mark.parametrize("size", [(641, 480), (333, 500), (64, 64), (100, 57), (64, 65)])
def test_training_reads_a_jpeg_of_any_shape_within_one_grey_level(tmp_path: Path, size):
    noise(*size).save(tmp_path / "a.jpg")
    difference = (
        resize_and_crop(read_pixels(tmp_path / "a.jpg", 64), 64).int()
        - to_tensor(load_image(tmp_path / "a.jpg", 64)).int()
    )
    assert difference.abs().max() <= 1


def test_a_large_photograph_is_not_decoded_in_full(tmp_path: Path, monkeypatch):
    noise(640, 480).save(tmp_path / "a.jpg")
    decoded = []
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: decoded.append(self.size) or convert(self, mode))
    assert read_pixels(tmp_path / "a.jpg", 60).shape == (3, 120, 160)
    assert decoded == [(160, 120)]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_training_reads_jpegs_of_other_modes_as_evaluation_does(tmp_path: Path, mode):
    noise(80, 60).convert(mode).save(tmp_path / "a.jpg")
    difference = resize_and_crop(read_pixels(tmp_path / "a.jpg", 40), 40).int() - to_tensor(
        load_image(tmp_path / "a.jpg", 40)
    )
    assert difference.abs().max() <= 1


def _grey16() -> Image.Image:
    return Image.fromarray(np.full((40, 40), 0x8000, dtype=np.uint16))


def _palette_with_transparency() -> Image.Image:
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 20, 40))
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("L", (40, 40), 128), "png", (128, 128, 128)),
        (Image.new("1", (40, 40), 1), "png", WHITE),
        (_grey16(), "png", (128, 128, 128)),
        (Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "tif", RED),
        (Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "png", WHITE),
        (Image.new("RGBA", (40, 40), (255, 0, 0, 255)), "webp", RED),
        (Image.new("LA", (40, 40), (0, 0)), "png", WHITE),
        (Image.new("RGB", (40, 40), RED), "gif", RED),
    ],
)
def test_any_mode_becomes_rgb_on_white(tmp_path: Path, image, suffix, expected):
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    loaded = load_image(tmp_path / f"a.{suffix}", 32)
    assert loaded.mode == "RGB" and loaded.size == (32, 32)
    assert loaded.getpixel((16, 16)) == expected


def test_a_transparent_palette_is_drawn_on_white(tmp_path: Path):
    _palette_with_transparency().save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 40)
    assert loaded.getpixel((5, 20)) == WHITE and loaded.getpixel((35, 20)) == RED


RAMP = np.tile(np.linspace(0, 1, 40), (40, 1))


def read_both(path: Path) -> list[np.ndarray]:
    """Return the picture as evaluation and as training read it, uint8 [height, width, 3]."""
    return [np.asarray(load_image(path, 40)), read_pixels(path, 40).permute(1, 2, 0).numpy()]


def tiff12(values: np.ndarray) -> bytes:
    """Return a TIFF with 12 bits per value, which Pillow does not write."""
    height, width = values.shape
    rows = b"".join(int("".join(f"{value:012b}" for value in row), 2).to_bytes(width * 3 // 2, "big") for row in values)
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "white"),
    [
        (np.uint16, 0, 65_535, 255),
        (np.uint16, 0, 4_095, 255),
        (np.uint16, 0, 255, 255),
        (np.uint16, 0, 40_000, 255 * 40_000 / 65_535),
        (np.int32, 0, 16_383, 255),
        (np.int32, -1_024, 3_071, 255),
        (np.float32, 0, 1, 255),
        (np.float32, 0, 0.5, 127.5),
        (np.float32, 0, 255, 255),
        (np.float32, 0, 100, 100),
        (np.float32, -1, 1, 255),
        (np.float32, 0, 5e4, 255),
    ],
)
def test_grey_values_are_scaled_by_their_range(tmp_path: Path, dtype, low, high, white):
    for suffix in ("tif", "png") if dtype == np.uint16 else ("tif",):
        Image.fromarray((low + RAMP * (high - low)).astype(dtype)).save(tmp_path / f"a.{suffix}")
        for image in read_both(tmp_path / f"a.{suffix}"):
            assert np.abs(image - (RAMP * white)[..., None]).max() <= 1


def test_12_bits_white_as_zero_and_missing_values_are_read(tmp_path: Path):
    (tmp_path / "a.tif").write_bytes(tiff12((RAMP * 4_095).astype(int)))
    (tmp_path / "dark.tif").write_bytes(tiff12((RAMP * 100).astype(int)))
    Image.fromarray((RAMP * 65_535).astype(np.uint16)).save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    missing = RAMP.astype(np.float32)
    missing[0, 39] = np.nan
    Image.fromarray(missing).save(tmp_path / "missing.tif")
    expected = {"a": RAMP * 255, "dark": RAMP * 100 / 16, "inverted": 255 - RAMP * 255, "missing": RAMP * 255}
    expected["missing"][0, 39] = 0
    for name, grey in expected.items():
        for image in read_both(tmp_path / f"{name}.tif"):
            assert np.abs(image - grey[..., None]).max() <= 1, name


def test_a_transparent_16_bit_grey_is_drawn_on_white(tmp_path: Path):
    Image.fromarray((RAMP * 65_535).astype(np.uint16)).save(tmp_path / "a.png", transparency=0)
    for image in read_both(tmp_path / "a.png"):
        assert image[0, 0].tolist() == [255] * 3 and image[0, 1].tolist() == [7] * 3


def test_a_tiff_palette_of_8_bits_is_read(tmp_path: Path):
    """TIFF's color map has 16 bits, but some programs write 8."""
    image = Image.fromarray(np.full((40, 40), 1, dtype=np.uint8))
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "a.tif")
    map_of = Image.open(tmp_path / "a.tif").tag_v2[320]
    old, new = (struct.pack(f"<{len(map_of)}H", *values) for values in (map_of, [value >> 8 for value in map_of]))
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.tif").read_bytes().replace(old, new))
    for name in ("a", "b"):
        for pixels in read_both(tmp_path / f"{name}.tif"):
            assert pixels[20, 20].tolist() == [200, 100, 50], name


def png16(values: np.ndarray) -> bytes:
    """Return a PNG with 16 bits per color, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    rows = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bit_colors_are_read_or_refused_where_pillow_keeps_too_few_bits(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png16(RAMP * 65_535))
    (tmp_path / "black.png").write_bytes(png16(RAMP * 0))
    for name, white in (("a", 255), ("black", 0)):
        for image in read_both(tmp_path / f"{name}.png"):
            assert np.abs(image - (RAMP * white)[..., None]).max() <= 1
    (tmp_path / "dark.png").write_bytes(png16(RAMP * 4_095))
    for read in (load_image, read_pixels):
        with pytest.raises(UnreadableImageError, match="save it with 8 bits"):
            read(tmp_path / "dark.png", 40)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\x1b[2J", r"begins with b'\\x1b\[2J'"),
        (b"", "is empty"),
    ],
)
def test_a_file_of_another_kind_is_named_by_its_content(tmp_path: Path, content, kind):
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (load_image, read_pixels):
        with pytest.raises(UnreadableImageError, match=kind):
            read(tmp_path / "a.jpg", 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [10, 40])
def test_a_rotated_photograph_is_turned_upright(tmp_path: Path, orientation, size):
    image = noise(160, 120)
    tags = Image.Exif()
    tags[ORIENTATION_TAG] = orientation
    image.save(tmp_path / "a.jpg", exif=tags, quality=95)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    right, wrong = (to_tensor(load_image(picture, size)).float() for picture in (upright, upright.rotate(180)))
    fast = resize_and_crop(read_pixels(tmp_path / "a.jpg", size), size)
    for loaded in (to_tensor(load_image(tmp_path / "a.jpg", size)), fast):
        assert (loaded - right).abs().mean() < 6 < (loaded - wrong).abs().mean()


def jpeg_with(segments: bytes, image: Image.Image) -> bytes:
    """Return a JPEG with additional segments after its start marker."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()[:2] + segments + buffer.getvalue()[2:]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION_TAG] = orientation
    return segment(0xE1, tags.tobytes())


def xmp(orientation: int) -> bytes:
    text = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text.encode())


PROFILE = segment(0xE2, b"ICC_PROFILE\0\x01\x01" + bytes(8_000))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("tag", [exif, xmp], ids=["exif", "xmp"])
@pytest.mark.parametrize("size", [10, 40])
def test_an_orientation_behind_an_icc_profile_is_found(tmp_path: Path, orientation, tag, size):
    image = noise(160, 120)
    (tmp_path / "a.jpg").write_bytes(jpeg_with(PROFILE + tag(orientation), image))
    (tmp_path / "plain.jpg").write_bytes(jpeg_with(b"", image))
    turn = ORIENTATIONS.get(orientation)
    upright = Image.open(tmp_path / "plain.jpg")
    upright = upright if turn is None else upright.transpose(turn)
    right = to_tensor(load_image(upright, size)).int()
    wrong = to_tensor(load_image(upright.rotate(180), size)).int()
    pixels = read_pixels(tmp_path / "a.jpg", size)
    if size == 40:
        assert pixels.shape[1:] == (upright.height, upright.width)
    for loaded in (to_tensor(load_image(tmp_path / "a.jpg", size)), resize_and_crop(pixels, size)):
        assert (loaded.int() - right).abs().max() <= (1 if size == 40 else 30)  # 10: decoded at a quarter of the size
        assert (loaded.int() - wrong).abs().float().mean() > 6


def test_an_orientation_after_the_pixels_is_ignored(tmp_path: Path):
    """It belongs to a second picture in the file."""
    plain = jpeg_with(b"", noise(80, 60))
    (tmp_path / "a.jpg").write_bytes(plain + exif(6))
    assert torch.equal(read_pixels(tmp_path / "a.jpg", 40), read_pixels(io.BytesIO(plain), 40))
    assert load_image(tmp_path / "a.jpg", 40) == load_image(io.BytesIO(plain), 40)


def test_pillow_reads_files_with_unusual_segments(tmp_path: Path):
    image = noise(80, 60)
    (tmp_path / "a.jpg").write_bytes(jpeg_with(b"\xff\xff" + exif(6)[1:], image))  # a fill byte before the marker
    assert read_pixels(tmp_path / "a.jpg", 40).shape == (3, 80, 60)
    with pytest.raises(ValueError):
        plain_jpeg_size((tmp_path / "a.jpg").read_bytes())


def test_only_upright_ycbcr_jpegs_are_plain():
    image = noise(80, 60)
    assert plain_jpeg_size(jpeg_with(b"", image)) == (60, 80) == plain_jpeg_size(jpeg_with(PROFILE + exif(1), image))
    for data in (jpeg_with(PROFILE + exif(3), image), jpeg_with(b"", image.convert("L")), b"text"):
        with pytest.raises(ValueError):
            plain_jpeg_size(data)


DAMAGED = ["truncated.jpg", "empty.jpg", "text.jpg", "header_only.png", "folder.jpg", "absent.jpg"]


def damaged_files(folder: Path) -> dict[str, Path]:
    good = io.BytesIO()
    noise(200, 200).save(good, "JPEG")
    contents = {
        "truncated.jpg": good.getvalue()[: len(good.getvalue()) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not an image",
        "header_only.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    return {name: folder / name for name in DAMAGED}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_unreadable_file_says_why(tmp_path: Path, name):
    with pytest.raises(UnreadableImageError) as error:
        load_image(damaged_files(tmp_path)[name], 32)
    with pytest.raises(UnreadableImageError) as fast_error:
        read_pixels(tmp_path / name, 32)
    assert str(fast_error.value) == str(error.value)
    assert str(error.value) and "\n" not in str(error.value)


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, monkeypatch):
    Image.new("1", (400, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with warnings.catch_warnings(), pytest.raises(UnreadableImageError, match="decompression bomb"):
        warnings.simplefilter("ignore")
        load_image(tmp_path / "a.png", 32)
    noise(400, 400).save(tmp_path / "a.jpg")
    with warnings.catch_warnings(), pytest.raises(UnreadableImageError, match="decompression bomb"):
        warnings.simplefilter("ignore")
        read_pixels(tmp_path / "a.jpg", 300)


def test_a_50_megapixel_photograph_is_read_small(tmp_path: Path):
    Image.new("RGB", (8_000, 6_250), RED).save(tmp_path / "a.jpg")
    image = read_pixels(tmp_path / "a.jpg", 224)
    assert image.shape == (3, 448, 573) and abs(int(image[0].min()) - 255) < 3
    assert resize_and_crop(image, 224).shape == (3, 224, 224)


def test_normalization_equals_torchvisions_and_is_channels_last():
    mean, std = (0.4225, 0.4012, 0.3659), (0.2681, 0.2635, 0.2763)
    images = torch.stack([to_tensor(noise(32, 32, seed)) for seed in range(3)])
    normalized = normalize(images, mean, std)
    assert images.dtype == torch.uint8 and normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalized, TF.normalize(images / 255, mean, std), atol=1e-6, rtol=1e-5)


def test_pillows_raster_suffixes_are_found_and_macos_companions_are_not(tmp_path: Path):
    for name in ("a.jpg", "b.jfif", "c.JPE", "d.webp", "e.tif", "._a.jpg", "notes.txt", "f.eps", "g.pdf"):
        (tmp_path / name).touch()
    assert [file.name for file in find_images(tmp_path)] == ["a.jpg", "b.jfif", "c.JPE", "d.webp", "e.tif"]


@pytest.mark.parametrize("read", [lambda path: load_image(path, 8), lambda path: read_pixels(path, 8)])
def test_only_regular_raster_files_are_opened(tmp_path: Path, monkeypatch, read):
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("an external program was started"))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(UnreadableImageError, match="cannot identify"):
        read(tmp_path / "a.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "b.png")
        (tmp_path / "c.png").symlink_to("/dev/zero")
        for name in ("b.png", "c.png"):
            with pytest.raises(UnreadableImageError, match="not a regular file"):
                read(tmp_path / name)

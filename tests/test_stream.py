import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataloader.config import load_data_config
from dataloader.data_loaders import TrainLoader, open_data
from dataloader.sampler import START, Position
from tests.conftest import make_sampler, open_loader
from tests.test_shards import jpeg, make_shards, write_tar
from utils.errors import UserError
from utils.tokenizer import get_tokenizer


def stream(urls: object, *, num_epochs=2, start=START, num_workers=0, messages=None, **changes) -> TrainLoader:
    changes = {"format": "stream", "train_img_dir": str(urls), "max_unreadable_share": 0.1, **changes}
    train_set = open_data(load_data_config(changes)).train
    sampler = make_sampler(train_set.num_images, 4, num_epochs=num_epochs, start=start)
    return open_loader(train_set, sampler, num_workers=num_workers, messages=messages, **changes)


def texts(batches) -> Counter:
    return Counter(tuple(row[row > 0].tolist()) for batch in batches for row in batch.tokens)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_stream_shows_every_image_about_once_an_epoch(tmp_path: Path, num_workers):
    folder, caption_set = make_shards(tmp_path)
    batches = list(stream(folder / "{000000..000002}.tar", num_workers=num_workers))
    assert len(batches) == 12 and all(batch.images.shape == (4, 3, 32, 32) for batch in batches)
    number_of = {
        tuple(ids[ids > 0].tolist()): number
        for number, image in enumerate(caption_set.images)
        for ids in get_tokenizer()(image.captions)
    }
    seen = Counter(number_of[text] for text in texts(batches).elements())
    assert len(seen) >= 20 and max(seen.values()) <= 6  # workers with a short shard repeat it sooner


def test_a_stream_is_the_same_for_the_same_seed_and_workers(tmp_path: Path):
    urls = make_shards(tmp_path)[0] / "{000000..000002}.tar"
    first, second = (list(stream(urls, num_workers=2)) for _ in range(2))
    for batch, expected in zip(first, second, strict=True):
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.tokens, expected.tokens)


def test_a_stream_masks_tokens(tmp_path: Path):
    urls = make_shards(tmp_path)[0] / "{000000..000002}.tar"
    plain, varied = (list(stream(urls, token_dropout=share)) for share in (0.0, 0.5))
    for batch, expected in zip(varied, plain, strict=True):
        is_kept = batch.tokens == expected.tokens
        assert (batch.tokens[~is_kept] == 0).all() and not is_kept.all()
        assert torch.equal(batch.images, expected.images)


def test_a_pipe_is_a_stream(tmp_path: Path):
    folder, _ = make_shards(tmp_path)
    urls = f"pipe:cat {folder}/{{000000..000001}}.tar"
    assert len(list(stream(urls, stream_num_images=20, num_epochs=1))) == 5


def test_the_number_of_images_must_be_known(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg((1, 2, 3)), "a.txt": b"one"})
    with pytest.raises(UserError, match="--set dataloader.stream_num_images"):
        stream(tmp_path / "0.tar")


def test_an_unreadable_image_in_a_stream_is_skipped_and_logged(tmp_path: Path):
    members = {}
    for number in range(20):
        members |= {f"{number}.jpg": jpeg((number, 2, 3)) if number != 7 else b"no", f"{number}.txt": b"a thing"}
    write_tar(tmp_path / "0.tar", members)
    messages = []
    batches = list(stream(tmp_path / "0.tar", stream_num_images=20, num_epochs=10, messages=messages))
    assert len(batches) == 50 and len(messages) == 1 and "0.tar/7" in messages[0]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("members", [{"a.jpg": jpeg((1, 2, 3))}, {"a.jpg": b"no", "a.txt": b"a thing"}, {}])
def test_a_stream_without_a_usable_sample_ends(tmp_path: Path, members, num_workers):
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match="no sample of the stream has a readable image and a caption"):
        list(stream(tmp_path / "0.tar", stream_num_images=500, num_workers=num_workers))
    with pytest.raises(UserError, match="1 of the 1 shards do not exist"):
        stream(tmp_path / "1.tar", stream_num_images=8)


def test_images_of_a_stream_are_flipped(tmp_path: Path):
    members = {}
    for number in range(20):
        image, buffer = Image.new("RGB", (40, 40)), io.BytesIO()
        image.paste("white", (0, 0, 20, 40))
        image.save(buffer, "JPEG")
        members |= {f"{number}.jpg": buffer.getvalue(), f"{number}.txt": b"a thing"}
    write_tar(tmp_path / "0.tar", members)
    options = {"stream_num_images": 20, "augmentation": "standard", "crop_scale": [1.0, 1.0]}
    white = [
        [batch.images[:, :, :, column].mean() for batch in stream(tmp_path / "0.tar", **options, flip=flip)]
        for flip in (False, True)
        for column in (0, -1)
    ]
    left, right, left_of_flipped, right_of_flipped = (torch.stack(means) for means in white)
    assert (left > right + 3).all() and not torch.equal(left_of_flipped, left)
    torch.testing.assert_close(left_of_flipped + right_of_flipped, left + right, atol=1e-3, rtol=0)


def test_a_stream_cannot_continue_at_its_position(tmp_path: Path):
    urls, messages = make_shards(tmp_path)[0] / "{000000..000002}.tar", []
    resumed = list(stream(urls, start=Position(0, 8), messages=messages))
    assert len(resumed) == 10 and len(messages) == 1 and "new order" in messages[0]

"""Random damage to the files of users: every loader returns its result or raises UserError, and nothing else.

A hundred cases each; FUZZ_CASES=10000 for the long mode.
"""

import copy
import dataclasses
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataloader.captions import read_captions
from dataloader.config import load_data_config
from model import CLIP, load_clip, load_model_config
from tests.conftest import TINY, make_captions
from tests.test_checkpoint import CPU, ListLogger, make_state, make_writer, save
from trainer import config as train_config
from trainer.config import TrainConfig, load_train_config
from trainer.run.checkpoint import CONTENT, find_checkpoint, restore
from utils.config import build_config, load_config, parse_override
from utils.errors import UserError

NUM_CASES = int(os.environ.get("FUZZ_CASES", 100))
fuzzed = settings(max_examples=NUM_CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
SMALLEST = dataclasses.replace(TINY, vocab_size=50, context_length=8, transformer_width=8, embed_dim=8)
SNIPPETS = st.sampled_from(
    ["!!python/object:os.system ", ": ", "- ", "[", "]", "{", "}", "\t", "#", "null", "~", "1e999", ".nan",
     "0x", "1:2", "2001-99-99", '"', "'", "|", ">", "%", "@", "\0", "\x85", "\ufeff", "\ud800", "---\n", "...", "<<: ",
     "? ", "\n", "9" * 50]
)  # fmt: skip
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.one_of(SNIPPETS, st.text(max_size=4))), max_size=6)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("000000000000.png"), st.just(0)
)
KEYS = st.one_of(
    st.sampled_from(["images", "annotations", "id", "image_id", "file_name", "caption", "sentences", "raw"]),
    st.text(max_size=4),
)
JSON = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(KEYS, children, max_size=4),
    max_leaves=20,
)


def edited(text: str, edits) -> str:
    for place, length, new in edits:
        start = int(place * len(text))
        text = text[:start] + new + text[start + length :]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    make_captions(folder, num_images=3)
    save(make_writer(folder), make_state(config=SMALLEST))
    (folder / "checkpoint_3_120.pt").rename(folder / "good.pt")
    return folder


@pytest.mark.slow
@fuzzed
@given(edits=EDITS)
def test_the_config_loader(folder: Path, edits):
    file = folder / "train_config.yaml"
    file.write_text(edited(train_config.CONFIG_FILE.read_text(), edits), errors="surrogatepass")
    try:
        assert isinstance(load_config(TrainConfig, file), TrainConfig)
    except UserError as error:
        assert len(str(error)) < 1_000


@pytest.mark.slow
@fuzzed
@given(values=st.dictionaries(st.sampled_from(list(TrainConfig.__annotations__)), JSON, max_size=3), text=st.text())
def test_values_in_a_config_and_on_the_command_line(values, text):
    good = dataclasses.asdict(load_train_config())
    for build in (lambda: build_config(TrainConfig, {**good, **values}, "f.yaml"), lambda: parse_override(text)):
        try:
            build()
        except UserError as error:
            assert len(str(error)) < 1_000
    for key, value in values.items():
        for load in (load_train_config, load_data_config, load_model_config):
            try:
                load([(key, value)])
            except UserError as error:
                assert len(str(error)) < 1_000


@pytest.mark.slow
@fuzzed
@given(content=st.one_of(JSON, st.fixed_dictionaries({"images": JSON, "annotations": JSON})), edits=EDITS)
def test_the_annotation_loader(folder: Path, content, edits):
    texts = [json.dumps(content), edited((folder / "captions.json").read_text(), edits)]
    for text in texts:
        (folder / "a.json").write_text(text, errors="surrogatepass")
        for format in ("auto", "coco", "karpathy"):
            with suppress(UserError):
                assert read_captions(folder / "images", folder / "a.json", format=format).num_images > 0


ROWS = st.lists(st.sampled_from(["filepath", "title", "000000000000.png", ",", "\t", "\n", '"', "\r", "\0", "a b"]))


@fuzzed
@given(content=st.one_of(st.binary(), ROWS.map(lambda row: "filepath,title\n" + "".join(row)).map(str.encode)))
def test_the_csv_loader(folder: Path, content):
    (folder / "a.csv").write_bytes(content)
    with suppress(UserError):
        assert read_captions(folder / "images", folder / "a.csv", format="csv").num_images > 0


DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=40)), min_size=1, max_size=4)


@pytest.mark.slow
@fuzzed
@given(damage=DAMAGE, length=st.floats(0, 1.2))
def test_the_checkpoint_loader_on_damaged_bytes(folder: Path, damage, length):
    whole = (folder / "good.pt").read_bytes()
    pickled = whole.index(b"data.pkl")  # most of the file is numbers: damage the part that describes them
    head = bytearray(whole[: pickled + 8_000])
    for place, new in damage:
        start = int(place * len(head))
        head[start : start + len(new)] = new
    data = bytes(head) + whole[len(head) :]
    (folder / "a.pt").write_bytes(data[: int(length * len(data))] if length < 1 else data)
    load(folder / "a.pt")


NAMES = KEYS | st.sampled_from(
    [*CONTENT, "format_version", "model", "dataloader", "image_mean", "state", "rng", "meter"]
)
PATHS = st.lists(NAMES, min_size=1, max_size=3)
TENSORS = st.sampled_from([torch.zeros(3), torch.zeros(()), torch.ones(2, 2, dtype=torch.bool), torch.zeros(0, 5)])


@pytest.mark.slow
@settings(fuzzed, max_examples=NUM_CASES // 4)  # each takes a tenth of a second
@given(changes=st.lists(st.tuples(PATHS, JSON | TENSORS), min_size=1, max_size=3))
def test_the_checkpoint_loader_on_other_contents(folder: Path, changes):
    content = torch.load(folder / "good.pt", weights_only=True)
    for path, value in changes:
        place = content
        for key in path[:-1]:
            if not isinstance(place.get(key), dict):
                break
            place = place[key]
        place[path[-1]] = copy.deepcopy(value)
    torch.save(content, folder / "a.pt")
    load(folder / "a.pt")


def load(file: Path) -> None:
    """Load a checkpoint to use it and to resume from it; UserError is a correct answer."""
    try:
        assert isinstance(load_clip(file).model, CLIP)
    except UserError as error:
        assert len(str(error)) < 2_000
    try:
        checkpoint = find_checkpoint(str(file), file.parent / "none", ListLogger())
        restore(make_state(config=SMALLEST), checkpoint, CPU, ListLogger())
    except UserError as error:
        assert len(str(error)) < 2_000

"""Mistakes of users: one sentence that names the flag, key or file, exit status 1 or 2, nothing written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import CLIP
from tests.conftest import ROOT, TINY, make_captions, run_script

PACKAGES = ("model", "trainer", "dataloader", "utils")
TRAIN = ["train.py", "--model", "RN-small", "--set", "trainer.num_workers=0", "--output_dir", "out"]
DATA = ["--train_img_dir", "images", "--train_annotation_file", "captions.json"]
CHECKPOINT = ["zero_shot_demo.py", "--img_path", "whole.jpg", "--checkpoint_path"]
DEMO = ["zero_shot_demo.py", "--checkpoint_path", "tiny.pt"]
EVALUATE = ["zero_shot_eval.py", "--checkpoint_path", "tiny.pt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with good data, a good checkpoint, and files of the wrong kind."""
    folder = tmp_path_factory.mktemp("mistakes")
    make_captions(folder)
    torch.save({"model_state_dict": CLIP(TINY).state_dict()}, folder / "tiny.pt")
    torch.save({"model_state_dict": torch.nn.Linear(2, 2).state_dict()}, folder / "other_model.pt")
    (folder / "truncated.pt").write_bytes((folder / "tiny.pt").read_bytes()[:5_000])
    (folder / "malformed.json").write_text('{"images": [')
    (folder / "list.json").write_text("[]")
    (folder / "instances.json").write_text(json.dumps({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}))
    (folder / "no_captions.json").write_text(json.dumps({"images": [], "annotations": []}))
    captions = json.loads((folder / "captions.json").read_text())
    captions["images"] = [{**image, "file_name": "x" + image["file_name"]} for image in captions["images"]]
    (folder / "elsewhere.json").write_text(json.dumps(captions))
    (folder / "empty").mkdir()
    (folder / "text.jpg").write_text("not an image")
    (folder / "zero.jpg").touch()
    Image.effect_noise((300, 300), 90).save(folder / "whole.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:9_000])
    (folder / "no_images").mkdir()
    (folder / "no_images" / "notes.txt").touch()
    (folder / "numbered" / "0").mkdir(parents=True)
    (folder / "earlier" / "saved_checkpoints").mkdir(parents=True)
    (folder / "earlier" / "saved_checkpoints" / "checkpoint_0_5.pt").touch()
    (folder / "a_file").touch()
    (folder / "mine.yaml").write_text("trainer:\n  learning_rate: 1\n")
    return folder


MISTAKES = {
    "no image directory": ([*TRAIN, "--train_img_dir", "nowhere", *DATA[2:]], ["nowhere", "--train_img_dir"]),
    "no annotation file": ([*TRAIN, *DATA[:3], "nowhere.json"], ["nowhere.json", "--train_annotation_file"]),
    "nothing downloaded": (["train.py"], ["data/mscoco/train2017", "--train_img_dir"]),
    "empty image directory": ([*TRAIN, "--train_img_dir", "empty", *DATA[2:]], ["24", "captions.json", "empty"]),
    "annotations of other images": ([*TRAIN, *DATA[:3], "elsewhere.json"], ["24", "elsewhere.json", "images"]),
    "malformed JSON": ([*TRAIN, *DATA[:3], "malformed.json"], ["malformed.json"]),
    "JSON of another kind": ([*TRAIN, *DATA[:3], "list.json"], ["list.json", "'images'"]),
    "annotations without captions": ([*TRAIN, *DATA[:3], "instances.json"], ["instances.json", "'caption'"]),
    "no annotations": ([*TRAIN, *DATA[:3], "no_captions.json"], ["no_captions.json"]),
    "validation captions alone": ([*TRAIN, *DATA, "--val_annotation_file", "captions.json"],
                                  ["val_img_dir", "--val_img_dir"]),
    "resume from nothing": ([*TRAIN, *DATA, "--batch_size", "4", "--resume", "nowhere.pt"], ["--resume nowhere.pt"]),
    "time without a unit": ([*TRAIN, *DATA, "--time_limit", "90"], ["argument --time_limit"]),
    "unknown model": ([*TRAIN, *DATA, "--model", "RN-smal"], ["--model", "did you mean RN-small?"]),
    "unknown recipe": ([*TRAIN, *DATA, "--recipe", "bset"], ["--recipe", "did you mean best?"]),
    "word loss of a stream": ([*TRAIN, "--set", "dataloader.format=stream", "--set", "trainer.word_loss_weight=1"],
                              ["word_loss_weight", "stream"]),
    "two weight decays": ([*TRAIN, "--set", "trainer.optimizer.decay_timescale=10"],
                          ["weight_decay", "decay_timescale"]),
    "unknown key": ([*TRAIN, *DATA, "--set", "trainer.optimizer.params.learning_rate=1"],
                    ["--set: optimizer.params.learning_rate"]),
    "unknown key in a file": ([*TRAIN, *DATA, "--config", "mine.yaml"], ["--config mine.yaml: learning_rate"]),
    "no such file": ([*TRAIN, *DATA, "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "unknown section": ([*TRAIN, *DATA, "--set", "optimizer.lr=1"], ["--set: optimizer.lr", "trainer."]),
    "wrong type": ([*TRAIN, *DATA, "--set", "trainer.num_train_epochs=many"], ["--set: num_train_epochs", "'many'"]),
    "no epochs": ([*TRAIN, *DATA, "--epochs", "0"], ["--epochs: num_train_epochs"]),
    "impossible value": ([*TRAIN, *DATA, "--set", "trainer.warmup_share=2"], ["--set: warmup_share"]),
    "sizes that do not fit": ([*TRAIN, *DATA, "--set", "model.image_resolution=50"], ["image_resolution", "32"]),
    "no value": ([*TRAIN, *DATA, "--set", "trainer.seed"], ["--set trainer.seed", "section.key=value"]),
    "batch larger than the data": ([*TRAIN, *DATA, "--batch_size", "500"], ["24", "500", "--batch_size 12"]),
    "sample and data": ([*TRAIN, *DATA, "--sample"], ["--sample", "--train_img_dir"]),
    "unknown flag": ([*TRAIN, *DATA, "--epoch", "3"], ["--epoch"]),
    "earlier run": ([*TRAIN, *DATA, "--batch_size", "4", "--output_dir", "earlier"],
                    ["checkpoint_0_5.pt", "--resume auto", "--output_dir"]),
    "output directory is a file": ([*TRAIN, *DATA, "--batch_size", "4", "--output_dir", "a_file"],
                                   ["a_file", "--output_dir"]),
    "no checkpoint": ([*CHECKPOINT, "nowhere.pt"], ["nowhere.pt"]),
    "no checkpoint in the folder": ([*CHECKPOINT, "empty"], ["empty"]),
    "checkpoint of another model": ([*CHECKPOINT, "other_model.pt"], ["other_model.pt"]),
    "truncated checkpoint": ([*CHECKPOINT, "truncated.pt"], ["truncated.pt"]),
    "no image": ([*DEMO, "--img_path", "nowhere.jpg"], ["nowhere.jpg"]),
    "text as image": ([*DEMO, "--img_path", "text.jpg"], ["text.jpg"]),
    "zero-byte image": ([*DEMO, "--img_path", "zero.jpg"], ["zero.jpg"]),
    "truncated image": ([*DEMO, "--img_path", "truncated.jpg"], ["truncated.jpg"]),
    "folder without images": ([*DEMO, "--img_dir", "no_images"], ["no_images"]),
    "no image folder": ([*DEMO, "--img_dir", "nowhere"], ["nowhere"]),
    "image and folder": ([*DEMO, "--img_path", "whole.jpg", "--img_dir", "images"], ["--img_path", "--img_dir"]),
    "no class file": ([*DEMO, "--img_path", "whole.jpg", "--class_names", "nowhere.txt"], ["nowhere.txt"]),
    "template without a name": ([*DEMO, "--img_path", "whole.jpg", "--template", "a photo"], ["'a photo'", "{}"]),
    "CIFAR by another name": ([*EVALUATE, "--dataset_type", "cifar", "--data_dir", "images"],
                              ["images", "CIFAR10", "CIFAR100"]),
    "no class folders": ([*EVALUATE, "--dataset_type", "folder", "--data_dir", "images"], ["images"]),
    "numbered class folders": ([*EVALUATE, "--dataset_type", "folder", "--data_dir", "numbered"],
                               ["numbered", "--class_names"]),
}  # fmt: skip


LATE = {"batch larger than the data"}  # noticed when the output folder is open; it then contains an empty log


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(folder: Path, run_here, mistake):
    (script, *flags), parts = MISTAKES[mistake]
    before = files_in(folder)
    output = run_here(script, *flags, cwd=folder)
    assert output.returncode in (1, 2)
    assert all(part in output.stderr for part in parts), output.stderr
    if mistake in LATE:
        assert not list((folder / "out" / "saved_checkpoints").iterdir())
        shutil.rmtree(folder / "out")
    assert files_in(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["no image directory", "unknown flag", "text as image", "no class folders"])
def test_a_mistake_leaves_no_traceback_in_a_process_of_its_own(folder: Path, mistake):
    (script, *flags), parts = MISTAKES[mistake]
    output = run_script(script, *flags, cwd=folder)
    assert output.returncode == (2 if mistake == "unknown flag" else 1)
    assert all(part in output.stderr for part in parts) and output.stderr.splitlines()[-1].count("error: ") == 1
    assert "Traceback" not in output.stdout + output.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission_is_one_sentence(folder: Path, tmp_path: Path, run_here):
    (tmp_path / "locked").mkdir(mode=0o500)
    output = run_here(*TRAIN[:-1], tmp_path / "locked", *DATA, "--batch_size", "4", cwd=folder)
    assert output.returncode == 1 and "locked" in output.stderr and "Permission denied" in output.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("num_train_epochs: 35", "num_train_epoch: 35"), ("num_train_epoch ", "did you mean num_train_epochs?")),
        (("seed: 11", "seed: eleven"), ("seed ", "'eleven'")),
        (("seed: 11", "seed: [11"), ("is not valid YAML",)),
    ],
)
def test_a_mistake_in_a_yaml_file_names_the_file(tmp_path: Path, change, parts):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "train.py", tmp_path)
    file = tmp_path / "trainer" / "train_config.yaml"
    file.write_text(file.read_text().replace(*change))
    output = run_script(str(tmp_path / "train.py"), cwd=tmp_path)
    assert output.returncode == 1 and "Traceback" not in output.stderr
    assert output.stderr.startswith("error: trainer/train_config.yaml: ")
    assert all(part in output.stderr for part in parts), output.stderr

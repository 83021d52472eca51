"""What a user gets wrong: one clear sentence, exit status 1 or 2, no traceback, nothing written."""

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
SPOILT = ["zero_shot_demo.py", "--img_path", "whole.jpg", "--checkpoint_path"]
DEMO = ["zero_shot_demo.py", "--checkpoint_path", "tiny.pt"]
EVALUATE = ["zero_shot_eval.py", "--checkpoint_path", "tiny.pt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with good data, a good checkpoint, and files that are not what they seem."""
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
    return folder


MISTAKES = {
    "no image directory": ([*TRAIN, "--train_img_dir", "nowhere", "--train_annotation_file", "captions.json"],
                           "the image directory nowhere does not exist"),
    "no annotation file": ([*TRAIN, "--train_img_dir", "images", "--train_annotation_file", "nowhere.json"],
                           "the annotation file nowhere.json does not exist"),
    "nothing downloaded": (["train.py"], "data/mscoco/train2017 does not exist"),
    "empty image directory": ([*TRAIN, "--train_img_dir", "empty", "--train_annotation_file", "captions.json"],
                              "none of the 24 images of captions.json is in empty"),
    "resume from nothing": ([*TRAIN, *DATA, "--batch_size", "4", "--resume", "nowhere.pt"],
                            "the checkpoint nowhere.pt does not exist"),
    "time without a unit": ([*TRAIN, *DATA, "--time_limit", "90"], "argument --time_limit"),
    "annotations of other images": ([*TRAIN, *DATA[:3], "elsewhere.json"], "none of the 24 images"),
    "malformed JSON": ([*TRAIN, *DATA[:3], "malformed.json"], "malformed.json: is not valid JSON"),
    "JSON of another kind": ([*TRAIN, *DATA[:3], "list.json"], "has no list 'images'"),
    "annotations without captions": ([*TRAIN, *DATA[:3], "instances.json"], "no usable 'caption'"),
    "no annotations": ([*TRAIN, *DATA[:3], "no_captions.json"], "holds no captions"),
    "unknown model": ([*TRAIN, *DATA, "--model", "RN-smal"], "did you mean RN-small?"),
    "words of a stream": ([*TRAIN, "--set", "dataloader.format=stream", "--set", "trainer.word_loss_weight=1"],
                          "word_loss_weight needs all captions at the start, which a stream has not; set it to 0"),
    "two weight decays": ([*TRAIN, "--set", "trainer.optimizer.decay_timescale=10"],
                          "optimizer.params.weight_decay or decay_timescale should be null, and not both"),
    "unknown key": ([*TRAIN, *DATA, "--set", "trainer.optimizer.params.learning_rate=1"],
                    "--set: optimizer.params.learning_rate is not a known key"),
    "unknown section": ([*TRAIN, *DATA, "--set", "optimizer.lr=1"], "should begin with model., trainer., dataloader."),
    "wrong type": ([*TRAIN, *DATA, "--set", "trainer.num_train_epochs=many"], "should be integer, found 'many'"),
    "impossible value": ([*TRAIN, *DATA, "--set", "trainer.warmup_share=2"], "warmup_share should be in [0, 1]"),
    "sizes that do not fit": ([*TRAIN, *DATA, "--set", "model.image_resolution=50"], "must be a multiple of 32"),
    "no value": ([*TRAIN, *DATA, "--set", "trainer.seed"], "should read section.key=value"),
    "batch larger than the data": ([*TRAIN, *DATA, "--batch_size", "500"], "use a smaller batch"),
    "sample and data": ([*TRAIN, *DATA, "--sample"], "--sample draws its own data"),
    "unknown flag": ([*TRAIN, *DATA, "--epoch", "3"], "unrecognized arguments: --epoch"),
    "earlier run": ([*TRAIN, *DATA, "--batch_size", "4", "--output_dir", "earlier"],
                    "already holds a run's checkpoints"),
    "output directory is a file": ([*TRAIN, *DATA, "--batch_size", "4", "--output_dir", "a_file"], "cannot be written"),
    "no checkpoint": ([*SPOILT, "nowhere.pt"],
                      "the checkpoint nowhere.pt does not exist"),
    "no checkpoint in the folder": ([*SPOILT, "empty"],
                                    "the directory empty holds no checkpoint"),
    "checkpoint of another model": ([*SPOILT, "other_model.pt"],
                                    "other_model.pt: has no weight"),
    "truncated checkpoint": ([*SPOILT, "truncated.pt"],
                             "truncated.pt: is not a checkpoint"),
    "no image": ([*DEMO, "--img_path", "nowhere.jpg"], "nowhere.jpg: cannot be read as an image"),
    "text as image": ([*DEMO, "--img_path", "text.jpg"], "text.jpg: cannot be read as an image"),
    "zero-byte image": ([*DEMO, "--img_path", "zero.jpg"], "zero.jpg: cannot be read as an image"),
    "truncated image": ([*DEMO, "--img_path", "truncated.jpg"], "truncated.jpg: cannot be read as an image"),
    "folder without images": ([*DEMO, "--img_dir", "no_images"], "no_images holds no image"),
    "no image folder": ([*DEMO, "--img_dir", "nowhere"], "the image folder nowhere does not exist"),
    "image and folder": ([*DEMO, "--img_path", "whole.jpg", "--img_dir", "images"], "not allowed with argument"),
    "class file that is not there": ([*DEMO, "--img_path", "whole.jpg", "--class_names", "nowhere.txt"],
                                     "nowhere.txt cannot be read"),
    "template without a name": ([*DEMO, "--img_path", "whole.jpg", "--template", "a photo"], "has no {} where"),
    "CIFAR by another name": ([*EVALUATE, "--dataset_type", "cifar", "--data_dir", "images"],
                              "call it CIFAR10 or CIFAR100"),
    "no class folders": ([*EVALUATE, "--dataset_type", "folder", "--data_dir", "images"], "holds no folder"),
    "numbered class folders": ([*EVALUATE, "--dataset_type", "folder", "--data_dir", "numbered"],
                               "give --class_names FILE"),
}  # fmt: skip


def contents(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_sentence(folder: Path, run_here, mistake):
    (script, *flags), message = MISTAKES[mistake]
    before = contents(folder)
    output = run_here(script, *flags, cwd=folder)
    assert output.returncode in (1, 2) and message in output.stderr
    assert contents(folder) == before


@pytest.mark.parametrize("mistake", ["no image directory", "unknown flag", "text as image", "no class folders"])
def test_a_mistake_leaves_no_traceback_in_a_process_of_its_own(folder: Path, mistake):
    (script, *flags), message = MISTAKES[mistake]
    output = run_script(script, *flags, cwd=folder)
    assert output.returncode in (1, 2)
    assert message in output.stderr and "Traceback" not in output.stdout + output.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_clear_sentence(folder: Path, tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    output = run_script(*TRAIN[:-1], tmp_path / "locked", *DATA, "--batch_size", "4", cwd=folder)
    assert output.returncode == 1 and "cannot be written (Permission denied)" in output.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_train_epochs: 35", "num_train_epoch: 35"), "did you mean num_train_epochs?"),
        (("seed: 11", "seed: eleven"), "trainer/train_config.yaml: seed should be integer, found 'eleven'"),
        (("seed: 11", "seed: [11"), "trainer/train_config.yaml: is not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_yaml_file_names_the_file(tmp_path: Path, change, message):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "train.py", tmp_path)
    file = tmp_path / "trainer" / "train_config.yaml"
    file.write_text(file.read_text().replace(*change))
    output = run_script(str(tmp_path / "train.py"), cwd=tmp_path)
    assert output.returncode == 1 and message in output.stderr and "Traceback" not in output.stderr

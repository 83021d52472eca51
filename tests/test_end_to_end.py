"""The three scripts, as a user runs them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
import zero_shot_eval
from model import CLIP, load_clip, load_model_config
from tests.conftest import make_captions, run_script
from tests.runs import Captions, last_checkpoint, read_rows, tiny_flags
from tests.test_classification import write_cifar100
from utils.images import load_image, normalize, to_tensor

pytestmark = pytest.mark.slow
CLASSES = ["apple", "bus", "clock", "palm tree", "rocket", "snail", "train"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, Path]:
    """Run train.py on plain colors; return its output and the folder with data/ and out/."""
    folder = tmp_path_factory.mktemp("trained")
    output = run_script("train.py", *tiny_flags(make_captions(folder / "data"), folder / "out"), cwd=folder)
    assert output.returncode == 0, output.stderr
    return output.stdout, folder


def data_of(folder: Path) -> Captions:
    return folder / "data" / "images", folder / "data" / "captions.json"


def test_training_logs_draws_and_saves(trained):
    printed, folder = trained
    assert "24 images, 48 captions" in printed and "6 (2 epochs of 3), 1 of them warmup" in printed
    rows = read_rows(folder / "out")
    assert [row["step"] for row in rows] == [2, 4, 6] and [row["epoch"] for row in rows] == [0, 1, 1]
    for row in rows:
        assert row.keys() >= {
            "loss", "image_to_text_accuracy", "text_to_image_accuracy", "lr", "logit_scale", "grad_norm",
            "skipped_steps", "pairs_per_second", "data_wait_share", "peak_memory_gib",
        }  # fmt: skip
        assert 0 < row["loss"] < 10 and row["grad_norm"] > 0 and 0 <= row["data_wait_share"] <= 1
        assert 1 <= row["logit_scale"] <= 100
    assert Image.open(folder / "out" / "logs" / "loss_curve.png").size[0] > 500
    log = (folder / "out" / "logs" / "training_logs.txt").read_text()
    for text in (printed, log):
        assert sum(line.endswith(" left") for line in text.splitlines()) == 3  # each row states the time left
    assert "num_train_epochs: 2" in log and "num_train_epochs: 2" not in printed
    assert [file.name for file in (folder / "out" / "saved_checkpoints").iterdir()] == ["checkpoint_1_6.pt"]


def test_the_same_seed_gives_the_same_weights_bit_for_bit(trained, tmp_path: Path):
    _, folder = trained
    train.main(tiny_flags(data_of(folder), tmp_path / "same", **{"trainer.num_workers": 2}))
    train.main(tiny_flags(data_of(folder), tmp_path / "other", **{"trainer.seed": 12}))
    first, second, other = (
        last_checkpoint(output)["model_state_dict"]
        for output in (folder / "out", tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["text_projection"], other["text_projection"])


def test_the_loss_falls_when_a_few_pairs_are_memorized(tmp_path: Path, caption_files):
    changes = {"optimizer.params.lr": 3e-3, "warmup_share": 0.1, "logging_steps": 15}
    settings = {f"trainer.{key}": value for key, value in changes.items()}
    train.main(tiny_flags(caption_files, tmp_path, epochs=40, **settings))
    losses = [row["loss"] for row in read_rows(tmp_path)]
    assert losses[0] > 1.5 and losses[-1] < 0.5 * losses[0]  # guessing has ln(8) = 2.08


def test_accumulation_takes_one_step_for_several_batches(tmp_path: Path, caption_files):
    train.main(tiny_flags(caption_files, tmp_path, **{"trainer.gradient_accumulation_steps": 3}))
    assert (tmp_path / "saved_checkpoints" / "checkpoint_1_2.pt").is_file()


def test_the_demo_classifies_a_folder_and_draws(trained, run_here):
    _, folder = trained
    checkpoint = folder / "out" / "saved_checkpoints"
    (folder / "pictures").mkdir()
    for index in range(3):
        Image.new("RGB", (50, 70), (80 * index, 0, 0)).save(folder / "pictures" / f"{index}.jpg")
    (folder / "pictures" / "notes.txt").touch()
    (folder / "pictures" / "damaged.png").write_bytes(b"x")
    flags = ["--checkpoint_path", checkpoint, "--img_dir", "pictures", "--show_prediction"]
    output = run_script("zero_shot_demo.py", *flags, cwd=folder)
    assert output.returncode == 0, output.stderr
    lines = output.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["0.jpg", "1.jpg", "2.jpg"]
    assert lines[0].count("%") == 5 and "pictures/damaged.png" in output.stdout
    assert Image.open(folder / "demo_output" / "demo.png").size[0] > 400

    flags = ["--checkpoint_path", checkpoint, "--img_path", "pictures/1.jpg", "--show_predictions"]
    flags += ["--class_names", "red", "dark_red", "--template", "{}"]
    output = run_here("zero_shot_demo.py", *flags, cwd=folder)
    assert output.returncode == 0, output.stderr
    assert "dark red" in output.stdout and (folder / "demo_output" / "single_img_demo.png").is_file()


def test_the_demo_draws_similarities(trained, run_here):
    _, folder = trained
    Image.new("RGB", (50, 70)).save(folder / "one.jpg")
    flags = ["--checkpoint_path", folder / "out" / "saved_checkpoints", "--img_path", "one.jpg"]
    output = run_here("zero_shot_demo.py", *flags, "--texts", "a cat", "a dog", cwd=folder)
    assert output.returncode == 0, output.stderr
    assert "(2) a dog" in output.stdout and (folder / "demo_output" / "similarity.png").is_file()


@torch.inference_mode()
def count_accuracies(checkpoint: Path, images: list, labels: list[int], classnames: list[str]) -> tuple[float, float]:
    """Classify one image at a time; return top-1 and top-5 accuracy in %."""
    clip = load_clip(checkpoint)
    classifier = clip.build_classifier(classnames)
    top1 = top5 = 0
    for image, label in zip(images, labels, strict=True):
        pixels = to_tensor(load_image(image, clip.model.config.image_resolution))[None]
        feature = F.normalize(clip.model.encode_image(normalize(pixels, clip.image_mean, clip.image_std)), dim=-1)
        ranking = (feature @ classifier.t())[0].argsort(descending=True).tolist()
        top1, top5 = top1 + (ranking[0] == label), top5 + (label in ranking[:5])
    return 100 * top1 / len(images), 100 * top5 / len(images)


def test_evaluation_on_folders_has_the_accuracies_counted_one_by_one(trained):
    _, folder = trained
    images, labels = [], []
    for index in range(40):
        file = folder / "labelled" / CLASSES[index % 7].replace(" ", "_") / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(file)
        images.append(file)
        labels.append(index % 7)
    checkpoint = folder / "out" / "saved_checkpoints"
    flags = ["--checkpoint_path", checkpoint, "--dataset_type", "folder", "--data_dir", "labelled/", "--batch_size", 16]
    output = run_script("zero_shot_eval.py", *flags, cwd=folder)
    assert output.returncode == 0, output.stderr
    top1, top5 = count_accuracies(checkpoint, images, labels, CLASSES)
    result = json.loads((folder / "zero_shot_eval_output" / "labelled.json").read_text())
    assert (result["top1"], result["top5"], result["num_images"]) == (top1, top5, 40)
    text = (folder / "zero_shot_eval_output" / "labelled.txt").read_text().splitlines()
    text = text[text.index("") + 1 :]
    for line, key, value in zip(text, ("top1", "top5"), (top1, top5), strict=False):
        low, high = result[f"{key}_interval_95"]
        assert low < value < high and all(f"{number:.2f}" in line for number in (value, low, high))
    assert [line.split(maxsplit=2)[2] for line in text[4:]] == CLASSES
    assert 0 < top5 < 100


def test_evaluation_on_cifar100_has_the_accuracies_counted_one_by_one(trained, tmp_path: Path, monkeypatch):
    _, folder = trained
    names = ["apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle"]
    images = np.random.default_rng(1).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    images[::2] //= 3
    labels = [index % 8 for index in range(60)]
    data_dir = write_cifar100(tmp_path, monkeypatch, images, labels, names)
    monkeypatch.chdir(tmp_path)
    checkpoint = folder / "out" / "saved_checkpoints" / "checkpoint_1_6.pt"
    zero_shot_eval.main(["--checkpoint_path", str(checkpoint), "--dataset_type", "cifar", "--data_dir", str(data_dir)])
    pictures = [Image.fromarray(pixels) for pixels in images]
    expected = count_accuracies(checkpoint, pictures, labels, [name.replace("_", " ") for name in names])
    result = json.loads((tmp_path / "zero_shot_eval_output" / "CIFAR100.json").read_text())
    assert (result["top1"], result["top5"]) == expected
    assert [row["class"] for row in result["classes"]][:2] == ["apple", "aquarium fish"]
    assert [row["num_images"] for row in result["classes"]] == [8, 8, 8, 8, 7, 7, 7, 7]


def test_a_checkpoint_of_the_reference_runs_through_demo_and_evaluation(tmp_path: Path, run_here):
    torch.manual_seed(0)
    weights = CLIP(load_model_config()).state_dict()
    checkpoint = {"epoch": 34, "global_step": 16205, "model_state_dict": weights, "optimizer_state_dict": {}}
    torch.save(checkpoint, tmp_path / "trained_checkpoint.pt")
    (tmp_path / "set" / "bicycle").mkdir(parents=True)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "set" / "bicycle" / "1.jpg")
    for script, *flags in (
        ("zero_shot_demo.py", "--img_path", "set/bicycle/1.jpg", "--class_names", "bicycle", "bus"),
        ("zero_shot_eval.py", "--dataset_type", "folder", "--data_dir", "set"),
    ):
        output = run_here(script, "--checkpoint_path", "trained_checkpoint.pt", *flags, cwd=tmp_path)
        assert output.returncode == 0, output.stderr


def test_the_small_model_learns_from_flickr8k(data_dir, tmp_path: Path):
    content = json.loads((data_dir / "flickr8k" / "annotations" / "captions_train.json").read_text())
    ids = {image["id"] for image in content["images"][:1_600]}
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    flags = ["--train_img_dir", data_dir / "flickr8k" / "images", "--train_annotation_file", tmp_path / "captions.json"]
    flags += ["--output_dir", tmp_path, "--model", "RN-small", "--epochs", 1, "--batch_size", 32]
    flags += ["--set", "trainer.num_workers=2", "--set", "trainer.logging_steps=10"]
    train.main(list(map(str, flags)))
    losses = [row["loss"] for row in read_rows(tmp_path)]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.1

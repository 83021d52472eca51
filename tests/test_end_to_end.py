"""The three scripts as a user runs them."""

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
from tests.conftest import ROOT, make_captions, run_script, tiny_training_flags
from tests.test_classification import write_cifar100
from utils.images import load_image, normalize, to_tensor
from utils.zero_shot import build_classifier


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of train.py on a sample of plain colours: its output, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("trained")
    files = make_captions(folder / "data")
    output = run_script("train.py", *tiny_training_flags(*files, folder / "out"), cwd=folder)
    assert output.returncode == 0, output.stderr
    return output.stdout, folder


def test_training_writes_what_it_promises(trained):
    printed, folder = trained
    assert "24 images, 48 captions" in printed and "6 (2 epochs of 3), the first 1 warm up" in printed
    assert "expected time" in printed
    rows = [json.loads(line) for line in (folder / "out" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6] and [row["epoch"] for row in rows] == [0, 1, 1]
    for row in rows:
        assert row.keys() >= {
            "loss", "image_to_text_accuracy", "text_to_image_accuracy", "lr", "logit_scale", "grad_norm",
            "pairs_per_second", "data_wait_share", "peak_memory_gib",
        }  # fmt: skip
        assert 0 < row["loss"] < 10 and row["grad_norm"] > 0 and 0 <= row["data_wait_share"] <= 1
        assert 1 <= row["logit_scale"] <= 100
    assert Image.open(folder / "out" / "logs" / "loss_curve.png").size[0] > 500
    log = (folder / "out" / "logs" / "training_logs.txt").read_text()
    assert "expected time" in log and "num_train_epochs: 2" in log
    assert [file.name for file in (folder / "out" / "saved_checkpoints").iterdir()] == ["checkpoint_1_6.pt"]


def test_the_same_seed_gives_the_same_weights_bit_for_bit(trained, tmp_path: Path):
    _, folder = trained
    flags = tiny_training_flags(folder / "data" / "images", folder / "data" / "captions.json", tmp_path)
    train.main([*map(str, flags), "--set", "trainer.num_workers=2"])
    first, second = (
        torch.load(path / "saved_checkpoints" / "checkpoint_1_6.pt", weights_only=True)["model_state_dict"]
        for path in (folder / "out", tmp_path)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    train.main([*map(str, flags), "--output_dir", str(tmp_path / "other"), "--set", "trainer.seed=12"])
    other = torch.load(tmp_path / "other" / "saved_checkpoints" / "checkpoint_1_6.pt", weights_only=True)
    assert not torch.equal(first["text_projection"], other["model_state_dict"]["text_projection"])


def test_the_loss_falls_when_a_few_pairs_are_learned_by_heart(tmp_path: Path, caption_files):
    flags = tiny_training_flags(*caption_files, tmp_path)
    changes = ["trainer.optimizer.params.lr=1e-3", "trainer.warmup_share=0.1", "trainer.logging_steps=30"]
    train.main([*map(str, flags), "--epochs", "120", *(flag for change in changes for flag in ("--set", change))])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 1.5 and losses[-1] < 0.5 * losses[0]  # chance is ln(8) = 2.08


def test_accumulation_takes_one_step_for_several_batches(tmp_path: Path, caption_files):
    flags = tiny_training_flags(*caption_files, tmp_path)
    train.main([*map(str, flags), "--set", "trainer.gradient_accumulation_steps=3"])
    assert (tmp_path / "saved_checkpoints" / "checkpoint_1_2.pt").is_file()


def test_the_demo_classifies_a_folder_and_draws(trained):
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
    assert lines[0].count("%") == 5 and "skipped pictures/damaged.png" in lines[-1]
    assert Image.open(folder / "demo_output" / "demo.png").size[0] > 400

    flags = ["--checkpoint_path", checkpoint, "--img_path", "pictures/1.jpg", "--show_predictions"]
    output = run_script("zero_shot_demo.py", *flags, "--class_names", "red", "dark_red", "--template", "{}", cwd=folder)
    assert output.returncode == 0, output.stderr
    assert "dark red" in output.stdout and (folder / "demo_output" / "single_img_demo.png").is_file()


def test_the_demo_draws_similarities(trained):
    _, folder = trained
    Image.new("RGB", (50, 70)).save(folder / "one.jpg")
    flags = ["--checkpoint_path", folder / "out" / "saved_checkpoints", "--img_path", "one.jpg"]
    output = run_script("zero_shot_demo.py", *flags, "--texts", "a cat", "a dog", cwd=folder)
    assert output.returncode == 0, output.stderr
    assert "(2) a dog" in output.stdout and (folder / "demo_output" / "similarity.png").is_file()


@torch.inference_mode()
def accuracies_by_hand(checkpoint: Path, images: list, labels: list[int], classnames: list[str]) -> tuple[float, float]:
    """Classify one image at a time and count."""
    clip = load_clip(checkpoint)
    classifier = build_classifier(clip.model, classnames)
    top1 = top5 = 0
    for image, label in zip(images, labels, strict=True):
        pixels = to_tensor(load_image(image, clip.model.config.image_resolution))[None]
        feature = F.normalize(clip.model.encode_image(normalize(pixels, clip.image_mean, clip.image_std)), dim=-1)
        order = (feature @ classifier.t())[0].argsort(descending=True).tolist()
        top1, top5 = top1 + (order[0] == label), top5 + (label in order[:5])
    return 100 * top1 / len(images), 100 * top5 / len(images)


def test_evaluation_on_folders_gives_the_accuracies_counted_by_hand(trained):
    _, folder = trained
    names = ["apple", "bus", "clock", "palm_tree", "rocket", "snail", "train"]
    images, labels = [], []
    for index in range(40):
        file = folder / "labelled" / names[index % 7] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (2, 2, 3), dtype=np.uint8)).resize((40, 40)).save(
            file
        )
        images.append(file)
        labels.append(index % 7)
    checkpoint = folder / "out" / "saved_checkpoints"
    flags = ["--checkpoint_path", checkpoint, "--dataset_type", "folder", "--data_dir", "labelled/", "--batch_size", 16]
    output = run_script("zero_shot_eval.py", *flags, cwd=folder)
    assert output.returncode == 0, output.stderr
    top1, top5 = accuracies_by_hand(checkpoint, images, labels, [name.replace("_", " ") for name in names])
    result = json.loads((folder / "zero_shot_eval_output" / "labelled.json").read_text())
    assert (result["top1"], result["top5"], result["num_images"]) == (top1, top5, 40)
    text = (folder / "zero_shot_eval_output" / "labelled.txt").read_text().splitlines()
    for line, key, value in zip(text, ("top1", "top5"), (top1, top5), strict=False):
        low, high = result[f"{key}_interval_95"]
        assert line == f"Top-{key[3]} accuracy: {value:.2f} %  (95 % interval {low:.2f} to {high:.2f})"
        assert low < value < high
    assert [line.split(maxsplit=2)[2] for line in text[4:]] == [name.replace("_", " ") for name in names]
    assert 0 < top5 < 100


def test_evaluation_on_cifar100_gives_the_accuracies_counted_by_hand(trained, tmp_path: Path, monkeypatch):
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
    expected = accuracies_by_hand(checkpoint, pictures, labels, [name.replace("_", " ") for name in names])
    result = json.loads((tmp_path / "zero_shot_eval_output" / "CIFAR100.json").read_text())
    assert (result["top1"], result["top5"]) == expected
    assert [row["class"] for row in result["classes"]][:2] == ["apple", "aquarium fish"]
    assert [row["num_images"] for row in result["classes"]] == [8, 8, 8, 8, 7, 7, 7, 7]


def test_a_checkpoint_in_the_references_layout_runs_through_demo_and_evaluation(tmp_path: Path):
    torch.manual_seed(0)
    weights = CLIP(load_model_config()).state_dict()
    checkpoint = {"epoch": 34, "global_step": 16205, "model_state_dict": weights, "optimizer_state_dict": {}}
    torch.save(checkpoint, tmp_path / "trained_checkpoint.pt")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "bicycle.jpeg")
    (tmp_path / "set" / "bicycle").mkdir(parents=True)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "set" / "bicycle" / "1.jpg")
    flags = ["--checkpoint_path", "trained_checkpoint.pt"]
    for script, more in (
        ("zero_shot_demo.py", ["--img_path", "bicycle.jpeg"]),
        ("zero_shot_eval.py", ["--dataset_type", "folder", "--data_dir", "set"]),
    ):
        output = run_script(script, *flags, *more, cwd=tmp_path)
        assert output.returncode == 0, output.stderr


def test_flickr8k_teaches_the_small_model_something(data_dir, tmp_path: Path):
    flickr8k = data_dir / "flickr8k"
    annotation_file = flickr8k / "annotations" / "captions_train.json"
    flags = [
        "--train_img_dir", flickr8k / "images", "--train_annotation_file", annotation_file,
        "--output_dir", tmp_path, "--model", "RN-small", "--epochs", 1, "--batch_size", 64,
        "--set", "trainer.num_workers=2", "--set", "trainer.logging_steps=31",
    ]  # fmt: skip
    output = run_script("train.py", *flags, cwd=ROOT)
    assert output.returncode == 0, output.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.1

"""Validation while training: the figures are those of the saved model, whoever measured them."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from dataloader.captions import CaptionedImage, CaptionSet, read_captions
from model import load_clip
from tests.conftest import make_captions
from tests.test_resume import flags_for, launch, printed_by, recorder  # noqa: F401
from trainer.checkpoint import list_checkpoints
from trainer.evaluation import encode_captions
from trainer.validation import Validation, shared_images
from utils.retrieval import retrieval_metrics
from utils.zero_shot import build_classifier


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    return make_captions(tmp_path_factory.mktemp("validation"), num_images=28)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> tuple[Path, Path]:
    img_dir, annotation_file = make_captions(tmp_path_factory.mktemp("held_out"), num_images=13, size=(40, 60))
    (img_dir / "000000000004.png").write_bytes(b"damaged")
    return img_dir, annotation_file


def validated(held_out: tuple[Path, Path]) -> list[str]:
    return ["--val_img_dir", str(held_out[0]), "--val_annotation_file", str(held_out[1])]


def rows_of(output: Path, kind: str = "val_loss") -> list[dict]:
    rows = [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in row]


@torch.no_grad()
def check(row: dict, checkpoint: Path, held_out: tuple[Path, Path]) -> None:
    """Measure the saved model anew, and compare."""
    clip = load_clip(checkpoint)
    caption_set = read_captions(*held_out)
    features, readable, _ = encode_captions(clip, caption_set, batch_size=5, num_workers=0)
    assert len(readable) == 12
    for name, value in retrieval_metrics(*features).items():
        assert row[f"val_{name}"] == pytest.approx(value), name
    recalls = [value for name, value in row.items() if "R@" in name]
    assert row["val_mean_recall"] == pytest.approx(sum(recalls) / 6) and len(recalls) == 6
    images, texts = features.images[:8], features.texts[::2][:8]  # the first batch of 8 pairs; each first caption
    logits = clip.model.logit_scale.exp() * images @ texts.t()
    loss = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.t(), torch.arange(8))) / 2
    assert row["val_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_the_figures_are_those_of_the_saved_model(tmp_path: Path, data, held_out, capsys):
    train.main([*flags_for(data, tmp_path, **{"trainer.keep_last": 0, "trainer.save_steps": 3}), *validated(held_out)])
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 9] and [row["epoch"] for row in rows] == [0, 1, 2]
    saved = list_checkpoints(tmp_path / "saved_checkpoints")
    for row, checkpoint in zip(rows, saved, strict=True):
        check(row, checkpoint, held_out)
    best = max(rows, key=lambda row: row["val_mean_recall"])  # the first of equals
    weights = load_clip(tmp_path / "saved_checkpoints" / "best.pt").model.state_dict()
    expected = load_clip(saved[rows.index(best)]).model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    printed = capsys.readouterr().out
    assert "retrieval on 13 held-out images, 26 captions" in printed and "median rank" in printed


def test_two_processes_measure_what_one_does(tmp_path: Path, data, held_out):
    flags = [*flags_for(data, tmp_path, batch_size=4, epochs=1), *validated(held_out)]
    process = launch(flags, 2)
    printed = printed_by(process)
    assert process.returncode == 0, printed
    (row,) = rows_of(tmp_path)
    check(row, list_checkpoints(tmp_path / "saved_checkpoints")[-1], held_out)


def test_a_run_stopped_just_before_a_validation_makes_it_when_it_goes_on(tmp_path, data, held_out, recorder):  # noqa: F811
    from tests.test_resume import end_of, same, send, signal

    flags = lambda output: [*flags_for(data, output), *validated(held_out)]  # noqa: E731
    train.main(flags(tmp_path / "whole"))
    recorder.images = []
    recorder.before[3] = send(signal.SIGTERM)
    with pytest.raises(SystemExit):
        train.main(flags(tmp_path / "stopped"))
    assert rows_of(tmp_path / "stopped") == []
    train.main([*flags(tmp_path / "stopped"), "--resume", "auto"])
    assert all(map(same, end_of(tmp_path / "stopped"), end_of(tmp_path / "whole")))
    best = [
        load_clip(tmp_path / run / "saved_checkpoints" / "best.pt").model.state_dict() for run in ("whole", "stopped")
    ]
    assert same(*map(dict, best))


def test_zero_shot_accuracy_is_measured_and_may_choose_the_best(tmp_path: Path, data, monkeypatch):
    for number in range(12):
        file = tmp_path / "classes" / f"colour_{number % 4}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (60 * (number % 4), 10 * number, 0)).save(file)
    changes = {"dataloader.val_class_dir": tmp_path / "classes", "trainer.best_metric": "zero_shot_top1"}
    train.main(flags_for(data, tmp_path / "out", epochs=1, **changes))
    (row,) = rows_of(tmp_path / "out", "val_zero_shot_top1")
    clip = load_clip(tmp_path / "out" / "saved_checkpoints" / "best.pt")
    files = [tmp_path / "classes" / f"colour_{number % 4}" / f"{number}.png" for number in range(12)]
    classifier = build_classifier(clip.model, [f"colour {number}" for number in range(4)])
    nearest = (clip.encode_image(files) @ classifier.t()).argmax(dim=1)
    expected = 100 * (nearest == torch.arange(12) % 4).float().mean().item()
    assert row["val_zero_shot_top1"] == pytest.approx(expected)


@pytest.mark.parametrize(("metric", "best_step"), [("mean_recall", 6), ("loss", 3)])
def test_the_best_metric_decides_and_a_nan_never_wins(tmp_path: Path, data, held_out, monkeypatch, metric, best_step):
    figures = iter([(0.5, 1.0), (0.9, 2.0), (math.nan, math.nan)])

    def scripted(self, state, features):
        recall, loss = next(figures)
        names = [f"{direction}_R@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
        return {"loss": loss, "mean_recall": recall, **dict.fromkeys(names, recall)}

    monkeypatch.setattr(Validation, "_retrieval", scripted)
    train.main([*flags_for(data, tmp_path, **{"trainer.best_metric": metric}), *validated(held_out)])
    assert torch.load(tmp_path / "saved_checkpoints" / "best.pt", weights_only=True)["global_step"] == best_step
    last = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["val_loss"] is None  # which JSON can hold, and NaN not


def test_images_that_are_trained_on_are_found_by_id_and_caption():
    training = CaptionSet([CaptionedImage(1, "a.jpg", ("a", "b")), CaptionedImage(2, "b.jpg", ("c",))], [])
    held_out = CaptionSet([CaptionedImage(1, "x/a.jpg", ("b", "z")), CaptionedImage(2, "other.jpg", ("d",))], [])
    assert shared_images(held_out, training) == [1]


def test_training_on_the_validation_images_is_warned_of(tmp_path: Path, data, capsys):
    train.main([*flags_for(data, tmp_path, epochs=1), *validated(data)])
    assert "28 of the 28 validation images are trained on (e.g. 0)" in capsys.readouterr().out


def test_tensorboard_gets_the_rows(tmp_path: Path, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main(flags_for(data, tmp_path, epochs=1))
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    rows = rows_of(tmp_path, "loss")
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])

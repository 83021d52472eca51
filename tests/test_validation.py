"""Validation while training: its metrics are those of the saved model, whichever processes measure them."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from benchmarks.soak import same
from dataloader.captions import read_captions
from model import load_clip
from tests.conftest import make_captions
from tests.runs import Captions, ForkedRun, read_rows, same_end, send, tiny_flags, val_flags
from trainer.run.checkpoint import list_checkpoints
from trainer.run.validation import Validation
from utils.errors import UserError
from utils.retrieval import retrieval_metrics

NUM_HELD_OUT, UNREADABLE = 13, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Captions:
    return make_captions(tmp_path_factory.mktemp("validation"), num_images=28)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Captions:
    """Thirteen images, one of which cannot be read."""
    img_dir, annotation_file = make_captions(tmp_path_factory.mktemp("held_out"), NUM_HELD_OUT, size=(40, 60))
    (img_dir / f"{UNREADABLE:012}.png").write_bytes(b"damaged")
    return img_dir, annotation_file


def flags_for(data: Captions, output: Path, *, epochs: int = 3, batch_size: int = 8, **changes: object) -> list[str]:
    settings = {"model.transformer_width": 16, "trainer.logging_steps": 3, "trainer.save_steps": 3}
    settings |= {"dataloader.allow_missing": True, **changes}
    return tiny_flags(data, output, epochs=epochs, batch_size=batch_size, **settings)


@torch.no_grad()
def check_row(row: dict, checkpoint: Path, held_out: Captions) -> None:
    """Compare a row with the metrics of the saved model, measured anew."""
    clip = load_clip(checkpoint)
    captions = read_captions(*held_out)
    features, encoded = clip.encode_captioned(
        captions.files, [image.captions for image in captions.images], batch_size=5, num_workers=0
    )
    assert encoded.indices.tolist() == [number for number in range(NUM_HELD_OUT) if number != UNREADABLE]
    for name, value in retrieval_metrics(*features).items():
        assert row[f"val_{name}"] == pytest.approx(value), name
    recalls = [value for name, value in row.items() if "R@" in name]
    assert row["val_mean_recall"] == pytest.approx(sum(recalls) / 6) and len(recalls) == 6
    images, texts = features.images[:8], features.texts[::2][:8]  # one batch of 8; the first caption of each image
    logits = clip.model.logit_scale.exp() * images @ texts.t()
    loss = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.t(), torch.arange(8))) / 2
    assert row["val_loss"] == pytest.approx(loss.item(), rel=1e-4)


def weights_of(checkpoint: Path) -> dict:
    return dict(load_clip(checkpoint).model.state_dict())


@pytest.mark.slow
def test_the_metrics_are_those_of_the_saved_model(tmp_path: Path, data, held_out, capsys):
    train.main([*flags_for(data, tmp_path, **{"trainer.keep_last": 0}), *val_flags(held_out)])
    rows = read_rows(tmp_path, "val_loss")
    assert [(row["step"], row["epoch"]) for row in rows] == [(3, 0), (6, 1), (9, 2)]
    saved = list_checkpoints(tmp_path / "saved_checkpoints")
    for row, checkpoint in zip(rows, saved, strict=True):
        check_row(row, checkpoint, held_out)
    best = max(rows, key=lambda row: row["val_mean_recall"])  # the first of equals
    assert same(weights_of(tmp_path / "saved_checkpoints" / "best.pt"), weights_of(saved[rows.index(best)]))
    printed = capsys.readouterr().out
    assert "13 held-out images, 26 captions" in printed and "median rank" in printed


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path, data, held_out):
    flags = [*flags_for(data, tmp_path, batch_size=4, epochs=1), *val_flags(held_out)]
    run = ForkedRun(flags, tmp_path / "log.txt", 2)
    assert run.wait() == [0, 0], run.printed()
    (row,) = read_rows(tmp_path, "val_loss")
    check_row(row, list_checkpoints(tmp_path / "saved_checkpoints")[-1], held_out)


@pytest.mark.slow
def test_a_run_stopped_just_before_a_validation_catches_up_when_resumed(tmp_path: Path, data, held_out, recorder):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.main([*flags_for(data, whole, epochs=2), *val_flags(held_out)])
    recorder.images = []
    recorder.before[3] = send(signal.SIGTERM)
    flags = [*flags_for(data, stopped, epochs=2), *val_flags(held_out)]
    with pytest.raises(SystemExit):
        train.main(flags)
    assert read_rows(stopped, "val_loss") == []
    train.main([*flags, "--resume", "auto"])
    assert same_end(stopped, whole)
    assert same(*(weights_of(output / "saved_checkpoints" / "best.pt") for output in (whole, stopped)))


@pytest.mark.slow
def test_zero_shot_accuracy_is_measured_and_may_select_the_best(tmp_path: Path, data):
    files = [tmp_path / "classes" / f"colour_{number % 4}" / f"{number}.png" for number in range(12)]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (60 * (number % 4), 10 * number, 0)).save(file)
    changes = {"dataloader.val_class_dir": tmp_path / "classes", "trainer.best_metric": "zero_shot_top1"}
    train.main(flags_for(data, tmp_path / "out", epochs=1, **changes))
    (row,) = read_rows(tmp_path / "out", "val_zero_shot_top1")
    clip = load_clip(tmp_path / "out" / "saved_checkpoints" / "best.pt")
    classifier = clip.build_classifier([f"colour {number}" for number in range(4)])
    nearest = (clip.encode_image(files) @ classifier.t()).argmax(dim=1)
    expected = 100 * (nearest == torch.arange(12) % 4).float().mean().item()
    assert row["val_zero_shot_top1"] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "best_step"), [("mean_recall", 6), ("loss", 3)])
def test_the_best_metric_selects_and_nan_never_wins(tmp_path: Path, data, held_out, monkeypatch, metric, best_step):
    results = iter([(0.5, 1.0), (0.9, 2.0), (math.nan, math.nan)])

    def scripted(self, logger):
        recall, loss = next(results)
        names = [f"{direction}_R@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
        return {"loss": loss, "mean_recall": recall, "text_to_image_median_rank": 1.0,
                "image_to_text_median_rank": 1.0, **dict.fromkeys(names, recall)}  # fmt: skip

    monkeypatch.setattr(Validation, "run", scripted)
    train.main([*flags_for(data, tmp_path, **{"trainer.best_metric": metric}), *val_flags(held_out)])
    assert torch.load(tmp_path / "saved_checkpoints" / "best.pt", weights_only=True)["global_step"] == best_step
    last = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()[-1]
    assert "NaN" not in last and json.loads(last)["val_loss"] is None  # JSON has no NaN


def test_too_many_unreadable_held_out_images_give_no_figure(tmp_path: Path, data, held_out, capsys):
    flags = flags_for(data, tmp_path / "run", epochs=1, **{"dataloader.allow_missing": False})
    train.main([*flags, *val_flags(held_out)])
    assert "1 of the 13 held-out images are missing or unreadable" in capsys.readouterr().out
    assert not [row for row in read_rows(tmp_path / "run") if "val_loss" in row]
    assert not (tmp_path / "run/saved_checkpoints/best.pt").exists()


def test_missing_held_out_images_are_refused_before_training(tmp_path: Path, data):
    img_dir, annotation_file = make_captions(tmp_path, num_images=10)
    next(img_dir.iterdir()).unlink()
    flags = [*tiny_flags(data, tmp_path / "run", epochs=1), *val_flags((img_dir, annotation_file))]
    with pytest.raises(UserError, match="1 of the 10 held-out images .* --allow_missing"):
        train.main(flags)
    train.main([*flags, "--allow_missing"])
    row = read_rows(tmp_path / "run", "val_loss")[-1]
    assert (row["val_images"], row["val_images_left_out"]) == (9, 1)


def test_training_on_the_validation_images_is_warned_about(tmp_path: Path, data, capsys):
    train.main([*flags_for(data, tmp_path, epochs=1), *val_flags(data)])
    assert "warning: 28 of the 28 validation images are also training images (e.g. 0)" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorboard_receives_the_rows(tmp_path: Path, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main(flags_for(data, tmp_path, epochs=1))
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    rows = read_rows(tmp_path, "loss")
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])

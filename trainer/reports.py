"""What an evaluation writes: a table, JSON and pictures, all under one name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dataloader.captions import CaptionSet
from dataloader.classification import ClassificationSet
from trainer.evaluation import CaptionFeatures
from utils.errors import UserError
from utils.images import load_image
from utils.plots import Match, plot_class_accuracies, plot_confusion, plot_retrieval
from utils.retrieval import FOLD_SIZE, RetrievalRanks, fold_metrics, format_metrics, retrieval_metrics
from utils.text import printable
from utils.zero_shot import ZeroShotAccuracy, wilson_interval

NUM_QUERIES, NUM_MATCHES = 3, 5  # in the picture of a retrieval, each way
PICTURE_SIZE = 192  # pixels a side, in figures


def write_classification(
    stem: Path, dataset: ClassificationSet, accuracy: ZeroShotAccuracy, protocol: dict[str, Any]
) -> dict[str, float]:
    """Write `stem`.txt, .json, _confusion.png and _classes.png; return the accuracies by their names.

    Classes without images are in the tables, with 0 images. Raises UserError if something cannot be written.
    """
    columns = [column.tolist() for column in (accuracy.top1, accuracy.top5, accuracy.total)]
    rows = [
        {"id": class_id, "class": name, "top1": percentage(top1, n), "top5": percentage(top5, n), "num_images": n}
        for class_id, name, top1, top5, n in zip(dataset.class_ids, dataset.classnames, *columns, strict=True)
    ]
    num_images = int(accuracy.total.sum())
    content = {
        "dataset": dataset.title,
        "num_images": num_images,
        "num_classes": len(rows),
        "chance_top1": 100 / len(rows),
    }
    figures, lines = {}, []
    hits = (accuracy.top1, accuracy.top5)
    for k, value, count in zip((1, 5), accuracy.percentages(), hits, strict=True):
        low, high = wilson_interval(int(count.sum()), num_images)
        content |= {f"top{k}": value, f"top{k}_interval_95": [low, high]}
        figures[f"top-{k} %"] = value
        lines.append(f"Top-{k} accuracy: {value:.2f} %  (95 % interval {low:.2f} to {high:.2f})")
    print("\n".join(lines))
    lines += ["", "   Top-1    Top-5  Class name"]
    for row in rows:
        name, class_id = printable(row["class"]), printable(row["id"])
        suffix = "" if class_id.replace("_", " ") == name else f"  {class_id}"
        lines.append(f"{row['top1']:8.2f} {row['top5']:8.2f}  {name}{suffix}")
    _write(stem, lines, {**content, **protocol, "classes": rows})

    title = f"{dataset.title}: top-1 accuracy {content['top1']:.1f} % of {num_images:,} images"
    plot_confusion(accuracy.confusion.numpy(), dataset.classnames, beside(stem, "_confusion.png"), title=title)
    bars = [(row["class"], row["top1"]) for row in rows if row["num_images"]]
    plot_class_accuracies(bars, beside(stem, "_classes.png"), title=title, average=content["top1"])
    print(f"wrote {stem}.txt and .json, {stem.name}_confusion.png and {stem.name}_classes.png")
    return figures


def write_retrieval(
    stem: Path, features: CaptionFeatures, dataset: CaptionSet, readable: Sequence[int], protocol: dict[str, Any]
) -> dict[str, float]:
    """Write `stem`.txt, .json and .png; return the recalls, in %, and the median ranks by their names.

    `readable`: the numbers in `dataset` of the images that the features are of. Raises UserError if something cannot
    be written.
    """
    metrics = retrieval_metrics(*features)
    lines = [f"{len(readable):,} images, {len(features.texts):,} captions", format_metrics(metrics)]
    content = {"dataset": stem.name, "num_images": len(readable), "num_captions": len(features.texts), **metrics}
    if len(readable) > FOLD_SIZE:
        folds, num_folds = fold_metrics(*features)
        lines += ["", f"mean over {num_folds} folds of {FOLD_SIZE:,} images", format_metrics(folds)]
        content["folds"] = {"num_folds": num_folds, "images_each": FOLD_SIZE, **folds}
    print("\n".join(lines))
    _write(stem, lines, {**content, **protocol})
    _draw_matches(features, dataset, readable, beside(stem, ".png"))
    print(f"wrote {stem}.txt, .json and .png")
    figures = {}
    for direction, short in zip(RetrievalRanks._fields, ("i2t", "t2i"), strict=True):
        figures |= {f"{short} R@{k}": 100 * metrics[f"{direction}_R@{k}"] for k in (1, 5, 10)}
        figures[f"{short} median"] = metrics[f"{direction}_median_rank"]
    return figures


def format_comparison(figures: dict[str, dict[str, float]]) -> str:
    """Return a table of each model's figures, a row a model."""
    width = max(map(len, figures))
    names = list(next(iter(figures.values())))
    lines = [" ".join([" " * width, *(f"{name:>10}" for name in names)])]
    for model, row in figures.items():
        lines.append(" ".join([f"{model:<{width}}", *(f"{row[name]:10.2f}" for name in names)]))
    return "\n".join(lines)


def beside(stem: Path, ending: str) -> Path:
    """Return the file of that ending; unlike `with_suffix` it leaves dots in the name alone."""
    return stem.parent / (stem.name + ending)


def percentage(hits: int, total: int) -> float:
    """Return hits in % of total; a class without images has 0."""
    return 100 * hits / total if total else 0.0


def _write(stem: Path, lines: Sequence[str], content: dict[str, Any]) -> None:
    try:
        beside(stem, ".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = json.dumps(content, indent=2, ensure_ascii=False)
        beside(stem, ".json").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{stem}.txt cannot be written ({error.strerror})") from None


def _draw_matches(features: CaptionFeatures, dataset: CaptionSet, readable: Sequence[int], path: Path) -> None:
    """Draw a few captions with their nearest images, and as many images with their nearest captions."""
    captions = [caption for index in readable for caption in dataset.images[index].captions]
    owners = features.image_of_text.tolist()

    def picture(row: int) -> Image.Image:
        index = readable[row]
        return load_image(dataset.shards[index] if dataset.shards else dataset.images[index].path, PICTURE_SIZE)

    def nearest(query: Tensor, candidates: Tensor) -> list[tuple[int, float]]:
        best = (candidates @ query).topk(min(NUM_MATCHES, len(candidates)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    text_queries, image_queries = [], []
    for text in _spread(len(captions), 0.1):
        found = nearest(features.texts[text], features.images)
        matches = [Match(picture(row), similarity, row == owners[text]) for row, similarity in found]
        text_queries.append((captions[text], matches))
    for row in _spread(len(readable), 0.3):
        found = nearest(features.images[row], features.texts)
        matches = [Match(captions[text], similarity, owners[text] == row) for text, similarity in found]
        image_queries.append((picture(row), matches))
    plot_retrieval(text_queries, image_queries, path)


def _spread(count: int, first: float) -> list[int]:
    """Return up to NUM_QUERIES numbers below `count`, evenly spread; `first` is where the first one lies, in [0, 1)."""
    return sorted({int(count * (first + place / NUM_QUERIES) % count) for place in range(NUM_QUERIES)})

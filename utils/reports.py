"""Write an evaluation's results: a text table, JSON and figures with a common file name."""

import contextlib
import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.errors import UserError
from utils.files import numbered, write_atomic
from utils.images import ImageLike, load_image
from utils.plots import Match, plot_class_accuracies, plot_confusion, plot_retrieval
from utils.retrieval import FOLD_SIZE, fold_metrics, format_metrics, retrieval_metrics
from utils.text import one_line
from utils.zero_shot import ZeroShotAccuracy, wilson_interval

NUM_QUERIES, NUM_MATCHES = 3, 5  # in the figure of a retrieval, in each direction
PICTURE_SIZE = 192  # pixels per side, in figures
SUFFIXES = (".json", ".txt", ".png", "_confusion.png", "_classes.png")
IDENTITY = ("checkpoint", "digest", "data", "options")  # results replace those with the same values, and no others


def write_classification(
    stem: Path, title: str, classes: Sequence[tuple[str, str]], accuracy: ZeroShotAccuracy, protocol: dict[str, Any]
) -> dict[str, float]:
    """Write `stem`.txt, .json, _confusion.png and _classes.png; return the accuracies by column name, in percent.

    `title`: the data set; `classes`: the (id, name) of each class; `protocol`: what was measured and how, for all
    files; its IDENTITY decides whether -2, -3 and so on is added to `stem`. Classes without images are listed with 0
    images. Raises UserError if a file cannot be written.
    """
    num_images = int(accuracy.total.sum())
    content = {
        "dataset": title,
        "num_images": num_images,
        "num_classes": len(classes),
        "chance_top1": 100 / len(classes),
    }
    summary, lines = {}, []
    for k, hits, value in zip((1, 5), (accuracy.top1, accuracy.top5), accuracy.percentages(), strict=True):
        low, high = wilson_interval(int(hits.sum()), num_images)
        content |= {f"top{k}": value, f"top{k}_interval_95": [low, high]}
        summary[f"top-{k} %"] = value
        lines.append(f"Top-{k} accuracy: {value:.2f} %  (95 % interval {low:.2f} to {high:.2f})")
    print("\n".join(lines))

    lines += ["", "   Top-1    Top-5  Class name"]
    rows = []
    counts = zip(accuracy.top1.tolist(), accuracy.top5.tolist(), accuracy.total.tolist(), strict=True)
    for (class_id, name), (top1, top5, total) in zip(classes, counts, strict=True):
        top1, top5 = 100 * top1 / max(total, 1), 100 * top5 / max(total, 1)
        rows.append({"id": class_id, "class": name, "top1": top1, "top5": top5, "num_images": total})
        name, class_id = one_line(name), one_line(class_id)
        suffix = "" if class_id.replace("_", " ") == name else f"  {class_id}"
        lines.append(f"{top1:8.2f} {top5:8.2f}  {name}{suffix}")
    stem, note = _write(stem, lines, {**content, **protocol, "classes": rows})

    heading = f"{title}: top-1 accuracy {content['top1']:.1f} % of {num_images:,} images"
    names = [name for _, name in classes]
    plot_confusion(accuracy.confusion.numpy(), names, Path(f"{stem}_confusion.png"), title=heading, note=note)
    bars = [(row["class"], row["top1"]) for row in rows if row["num_images"]]
    plot_class_accuracies(bars, Path(f"{stem}_classes.png"), title=heading, average=content["top1"], note=note)
    print(one_line(f"wrote {stem}.txt and .json, {stem.name}_confusion.png and {stem.name}_classes.png"))
    return summary


def write_retrieval(
    stem: Path,
    features: tuple[Tensor, Tensor, Tensor],
    images: Sequence[ImageLike],
    captions: Sequence[Sequence[str]],
    protocol: dict[str, Any],
) -> dict[str, float]:
    """Write `stem`.txt, .json and .png; return recalls in percent and median ranks by column name.

    `features`: the arguments of `retrieval_metrics`; `images` and `captions`: of each row of the image features, in
    order; `protocol` as in `write_classification`. Raises UserError if a file cannot be written.
    """
    num_images, num_captions = len(images), len(features[1])
    metrics = retrieval_metrics(*features)
    lines = [f"{num_images:,} images, {num_captions:,} captions", format_metrics(metrics)]
    content = {"dataset": stem.name, "num_images": num_images, "num_captions": num_captions, **metrics}
    if num_images > FOLD_SIZE:
        folds, num_folds = fold_metrics(*features)
        lines += ["", f"mean over {num_folds} folds of {FOLD_SIZE:,} images", format_metrics(folds)]
        content["folds"] = {"num_folds": num_folds, "images_each": FOLD_SIZE, **folds}
    print("\n".join(lines))
    stem, note = _write(stem, lines, {**content, **protocol})
    _draw_matches(features, images, captions, Path(f"{stem}.png"), note)
    print(one_line(f"wrote {stem}.txt, .json and .png"))
    summary = {}
    for direction, short in (("image_to_text", "i2t"), ("text_to_image", "t2i")):
        summary |= {f"{short} R@{k}": 100 * metrics[f"{direction}_R@{k}"] for k in (1, 5, 10)}
        summary[f"{short} median"] = metrics[f"{direction}_median_rank"]
    return summary


def format_comparison(summaries: dict[str, dict[str, float]]) -> str:
    """Return a table with a row for each model's summary."""
    width = max(map(len, summaries))
    names = list(next(iter(summaries.values())))
    lines = [" ".join([" " * width, *(f"{name:>10}" for name in names)])]
    lines += [
        " ".join([f"{model:<{width}}", *(f"{row[name]:10.2f}" for name in names)]) for model, row in summaries.items()
    ]
    return "\n".join(lines)


def describe_origin(protocol: dict[str, Any]) -> list[str]:
    """Return the lines of a report or a figure that name the model, the data and the date."""
    date = datetime.now().astimezone().isoformat(" ", "seconds")
    values = {"model": protocol.get("checkpoint"), "data": protocol.get("data"), "date": date}
    values["model"] = f"{values['model']} (digest {protocol.get('digest')})"
    if captions := protocol.get("options", {}).get("annotation_file"):
        values["data"] = f"{values['data']}, {captions}"
    return [f"{name:<6} {one_line(value)}" for name, value in values.items()]


def write_predictions(
    path: Path,
    images: Sequence[ImageLike],
    labels: Sequence[int],
    classes: Sequence[tuple[str, str]],
    indices: Tensor,
    best: Tensor,
    probabilities: Tensor,
) -> None:
    """Write a CSV table with a row for each image: its file or its number, its class, its most probable classes.

    `labels`: the class of each image; `classes`: the (id, name) of each class; `indices`: int64 [num_readable], the
    positions of the readable images; `best` and `probabilities`: [num_readable, k], of their classes. For the other
    images these columns are empty. Raises UserError if the file cannot be written.
    """
    counts = Counter(name for _, name in classes)
    names = [one_line(f"{name} ({class_id})" if counts[name] > 1 else name) for class_id, name in classes]
    found = dict(zip(indices.tolist(), zip(best.tolist(), probabilities.tolist(), strict=True), strict=True))
    table = io.StringIO()
    write_row = csv.writer(table, lineterminator="\n").writerow
    write_row(
        ["file", "label"] + [f"{column}_{k + 1}" for k in range(best.shape[1]) for column in ("class", "probability")]
    )
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        pairs = zip(*found[number], strict=True) if number in found else ()
        cells = [cell for place, value in pairs for cell in (names[place], f"{value:.6f}")]
        file = image if isinstance(image, str | Path) else number
        write_row([file, names[label], *cells] + [""] * (2 * best.shape[1] - len(cells)))
    try:
        write_atomic(path, table.getvalue().encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); check the folder") from None
    print(one_line(f"wrote {path}"))


def _write(stem: Path, lines: Sequence[str], content: dict[str, Any]) -> tuple[Path, list[str]]:
    """Write the JSON file and the text; return the stem that they got and the lines of `describe_origin`."""
    note = describe_origin(content)
    content = {"date": note[-1].split(maxsplit=1)[1], **content}
    header = [*note, *(f"note   {one_line(text)}" for text in content.get("notes", ())), ""]
    try:
        for own in numbered(stem):
            file = Path(f"{own}.json")
            is_free = not any(Path(f"{own}{suffix}").exists() for suffix in SUFFIXES)
            if is_free or _identity(file) == {key: content.get(key) for key in IDENTITY}:
                with (
                    contextlib.suppress(FileExistsError),
                    file.open("x" if is_free else "w", encoding="utf-8") as opened,
                ):
                    opened.write(json.dumps(content, indent=2) + "\n")
                    break
        Path(f"{own}.txt").write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{stem}.txt or .json cannot be written ({error.strerror}); check the folder") from None
    return own, note


def _identity(file: Path) -> dict[str, Any] | None:
    """Return the IDENTITY of earlier results, or None if the file holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {key: content.get(key) for key in IDENTITY}
    except (OSError, ValueError, AttributeError):
        return None


def _draw_matches(
    features: tuple[Tensor, Tensor, Tensor],
    images: Sequence[ImageLike],
    captions: Sequence[Sequence[str]],
    path: Path,
    note: Sequence[str],
) -> None:
    """Draw a few captions with the most similar images, and as many images with the most similar captions."""
    image_features, text_features, image_of_text = features
    texts, rows = [caption for group in captions for caption in group], image_of_text.tolist()

    def most_similar(query: Tensor, candidates: Tensor) -> list[tuple[int, float]]:
        best = (candidates @ query).topk(min(NUM_MATCHES, len(candidates)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    text_queries, image_queries = [], []
    for text in _spread(len(texts), 0.1):
        found = most_similar(text_features[text], image_features)
        matches = [Match(load_image(images[row], PICTURE_SIZE), value, row == rows[text]) for row, value in found]
        text_queries.append((texts[text], matches))
    for row in _spread(len(images), 0.3):
        found = most_similar(image_features[row], text_features)
        matches = [Match(texts[text], value, rows[text] == row) for text, value in found]
        image_queries.append((load_image(images[row], PICTURE_SIZE), matches))
    plot_retrieval(text_queries, image_queries, path, note=note)


def _spread(count: int, first: float) -> list[int]:
    """Return up to NUM_QUERIES integers below `count`, evenly spaced, from `first` * count on; `first` is in [0, 1)."""
    return sorted({int(count * (first + step / NUM_QUERIES) % count) for step in range(NUM_QUERIES)})

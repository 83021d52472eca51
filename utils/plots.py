"""Every figure that the scripts draw."""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.text import printable

matplotlib.use("Agg")  # files only: no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

INK, GRID, ACCENT, QUIET = "#22303c", "#e3e7ea", "#2f7ed8", "#b9c6d2"
RIGHT = "#2a9d4a"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 150,
    "text.parse_math": False,  # a $ in a caption is a $
}


@plt.rc_context(STYLE)
def plot_loss_curve(metrics_file: Path, path: Path, *, batch_size: int) -> Path:
    """Draw the losses of a run's `metrics.jsonl` against the step, with the loss of guessing, ln(batch_size)."""
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    curves = {
        name: [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        for name, key in (("training", "loss"), ("validation", "val_loss"))
    }
    chance = math.log(batch_size)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(chance, color=QUIET, linestyle="--", linewidth=1)
    axes.annotate(f"chance: ln({batch_size}) = {chance:.2f}", (1, chance), xycoords=("axes fraction", "data"),
                  ha="right", va="bottom", fontsize=8,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    for (name, points), colour in zip(curves.items(), (ACCENT, INK), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, marker=".", label=name)
    highest = max([chance, *(loss for points in curves.values() for _, loss in points)])
    axes.set(xlabel="step", ylabel="contrastive loss", ylim=(0, 1.08 * highest))
    if curves["validation"]:
        axes.legend(frameon=False, loc="lower left")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    return _save(figure, path)


@plt.rc_context(STYLE)
def plot_predictions(
    images: Sequence[Image.Image], predictions: Sequence[Sequence[tuple[str, float]]], path: Path
) -> Path:
    """Draw each image beside a bar chart of its (class name, probability) pairs, most probable first, in a grid."""
    num_columns = max(1, min(6, round((0.75 * len(images)) ** 0.5)))  # about as wide as a slide
    num_rows = math.ceil(len(images) / num_columns)
    figure = plt.figure(figsize=(4.6 * num_columns, 2.1 * num_rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08)
    grid = figure.add_gridspec(num_rows, 2 * num_columns, width_ratios=[1, 1.1] * num_columns)
    for position, (image, ranking) in enumerate(zip(images, predictions, strict=True)):
        row, column = divmod(position, num_columns)
        picture = figure.add_subplot(grid[row, 2 * column])
        picture.imshow(image)
        picture.axis("off")
        _draw_bars(figure.add_subplot(grid[row, 2 * column + 1]), ranking)
    return _save(figure, path)


def _draw_bars(axes: plt.Axes, ranking: Sequence[tuple[str, float]]) -> None:
    """Draw one bar a class with its name above it, so that a long name needs no margin."""
    probabilities = [probability for _, probability in ranking]
    colours = [ACCENT] + [QUIET] * (len(ranking) - 1)
    axes.barh(range(len(ranking)), probabilities, height=0.34, color=colours)
    for position, (name, probability) in enumerate(ranking):
        weight = "bold" if position == 0 else "normal"
        axes.text(0, position - 0.28, _shorten(name, 30), va="bottom", fontsize=8, fontweight=weight)
        axes.text(1, position - 0.28, f"{probability:.1%}", va="bottom", ha="right", fontsize=8, fontweight=weight)
    axes.set(xlim=(0, 1), ylim=(len(ranking) - 0.6, -0.8))
    axes.axis("off")


@plt.rc_context(STYLE)
def plot_similarity(
    images: Sequence[Image.Image], texts: Sequence[str], similarities: Sequence[Sequence[float]], path: Path
) -> Path:
    """Draw the cosine similarity of each image (a column, shown above it) to each text (a row) in its cell.

    `similarities` is [num_images][num_texts]. More than ten images continue in a band below.
    """
    values = np.asarray(similarities).T
    num_columns = min(10, len(images))
    num_bands = math.ceil(len(images) / num_columns)
    cell, label = 0.62, 3.2  # inches
    height = 0.95 + cell * len(texts) + 0.15
    figure = plt.figure(figsize=(label + 0.95 * num_columns, height * num_bands), layout="constrained")
    grid = figure.add_gridspec(2 * num_bands, num_columns, height_ratios=[0.95, cell * len(texts)] * num_bands)
    for column, image in enumerate(images):
        picture = figure.add_subplot(grid[2 * (column // num_columns), column % num_columns])
        picture.imshow(image)
        picture.axis("off")
    for band in range(num_bands):
        columns = values[:, band * num_columns : (band + 1) * num_columns]
        axes = figure.add_subplot(grid[2 * band + 1, : columns.shape[1]])
        axes.imshow(columns, cmap="Blues", aspect="auto", vmin=values.min(), vmax=values.max())
        for (row, column), value in np.ndenumerate(columns):
            is_dark = value > (values.min() + values.max()) / 2
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if is_dark else INK)
        axes.set_yticks(range(len(texts)), [_wrap(text) for text in texts])
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return _save(figure, path)


@plt.rc_context(STYLE)
def plot_confusion(confusion: np.ndarray, classnames: Sequence[str], path: Path, *, title: str) -> Path:
    """Draw what the images of each class (a row) were taken for (a column), and list the most frequent confusions.

    `confusion`: counts, int64 [num_classes, num_classes]. Of more than 200 classes, neighbours are drawn together.
    """
    num_classes = len(classnames)
    block = math.ceil(num_classes / 200)
    starts = np.arange(0, num_classes, block)
    counts = np.add.reduceat(np.add.reduceat(confusion, starts, axis=0), starts, axis=1)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    side = min(20.0, max(4.5, 0.1 * len(starts)))  # inches
    figure = plt.figure(figsize=(side + 5.6, side + 2.2), layout="constrained")
    axes, panel = figure.subplots(1, 2, width_ratios=[side + 1.2, 4.4])
    image = axes.imshow(shares, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.5, 0, 100), interpolation="nearest")
    shown = range(0, len(starts), 1 if block == 1 else 4)
    names = [_shorten(classnames[starts[place]], 24) for place in shown]
    size = min(9.0, 0.62 * 72 * side / len(names))  # points: lines of text, as high as the rows
    axes.set_yticks(shown, names, fontsize=size)
    axes.set_xticks(shown, names, fontsize=size, rotation=90)
    axes.tick_params(length=0 if block == 1 else 3, pad=2)
    if num_classes <= 20:
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 40 else INK)
    axes.set(xlabel="taken for", ylabel="class", anchor="N")
    axes.set_title(title, loc="left")

    panel.axis("off")
    panel.set_title("most frequent confusions", loc="left")
    panel.text(0, 1, "\n".join(_list_confusions(confusion, classnames)), va="top", linespacing=1.5)
    colours = panel.inset_axes([0.02, 0.45 / side, 0.6, 0.12 / side])
    figure.colorbar(image, cax=colours, orientation="horizontal", ticks=[0, 1, 5, 20, 50, 100])
    colours.set_xlabel(f"% of the images of {'a class' if block == 1 else f'{block} neighbouring classes'}")
    return _save(figure, path, bbox_inches="tight")


def _list_confusions(confusion: np.ndarray, classnames: Sequence[str]) -> list[str]:
    """Return a line for each of the 18 most frequent confusions, by their share of the class's images."""
    wrong = np.where(np.eye(len(classnames), dtype=bool), 0, confusion)
    shares = 100 * wrong / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    order = np.lexsort((-wrong.ravel(), -shares.ravel()))[:18]
    return [
        f"{shares[row, column]:3.0f}".replace(" ", "\N{FIGURE SPACE}")
        + f" %  {_shorten(classnames[row], 22)} \N{RIGHTWARDS ARROW} {_shorten(classnames[column], 22)}"
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]


@plt.rc_context(STYLE)
def plot_class_accuracies(
    classes: Sequence[tuple[str, float]], path: Path, *, title: str, average: float, num_shown: int = 20
) -> Path:
    """Draw the best and the worst of (class name, top-1 accuracy in %) pairs as bars, with the average over images."""
    ordered = sorted(classes, key=lambda entry: -entry[1])
    if len(ordered) <= 2 * num_shown:
        parts = {"": ordered}
    else:
        parts = {f"the {num_shown} best": ordered[:num_shown], f"the {num_shown} worst": ordered[-num_shown:]}
    rows = max(map(len, parts.values()))
    figure = plt.figure(figsize=(5.4 * len(parts), 0.9 + 0.2 * rows), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for axes, (part, entries) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        values = [value for _, value in entries]
        axes.barh(range(len(entries)), values, height=0.68, color=[ACCENT if v >= average else QUIET for v in values])
        axes.set_yticks(range(len(entries)), [_shorten(name, 28) for name, _ in entries], fontsize=8)
        for row, value in enumerate(values):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the dashed line
            axes.text(value + 1, row, f"{value:.0f}", va="center", fontsize=7, bbox=box, zorder=3)
        axes.axvline(average, color=INK, linestyle="--", linewidth=0.8)
        axes.set(xlim=(0, 105), ylim=(rows - 0.4, -0.6), xlabel="top-1 accuracy, % (dashed: of all images)")
        axes.set_title(part, loc="left", fontsize=9)
        axes.tick_params(axis="y", length=0)
    return _save(figure, path)


class Match(NamedTuple):
    """One of the nearest to a query."""

    item: Image.Image | str
    similarity: float
    is_right: bool


@plt.rc_context(STYLE)
def plot_retrieval(
    text_queries: Sequence[tuple[str, Sequence[Match]]],
    image_queries: Sequence[tuple[Image.Image, Sequence[Match]]],
    path: Path,
) -> Path:
    """Draw captions with their nearest images, the right one framed, and images with their nearest captions."""
    num_columns = 1 + max(len(matches) for _, matches in text_queries)
    heights = [1.45] * len(text_queries) + [1.45] * len(image_queries)
    figure = plt.figure(figsize=(2.6 + 1.45 * (num_columns - 1), sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.05, hspace=0, wspace=0)
    grid = figure.add_gridspec(len(heights), num_columns, width_ratios=[1.7] + [1] * (num_columns - 1))
    for row, (text, matches) in enumerate(text_queries):
        label = figure.add_subplot(grid[row, 0])
        label.axis("off")
        label.text(0, 0.5, _wrap(text, 30), va="center", transform=label.transAxes)
        for column, match in enumerate(matches, start=1):
            _draw_match(figure.add_subplot(grid[row, column]), match)
    for row, (image, matches) in enumerate(image_queries, start=len(text_queries)):
        picture = figure.add_subplot(grid[row, 0])
        picture.imshow(image)
        picture.axis("off")
        captions = figure.add_subplot(grid[row, 1:])
        captions.axis("off")
        for place, match in enumerate(matches):
            y = 1 - (place + 0.5) / len(matches)
            frame = {"facecolor": "none", "edgecolor": RIGHT, "linewidth": 1.6, "pad": 2.5} if match.is_right else None
            text = f"{match.similarity:.2f}   {_shorten(str(match.item), 88)}"
            captions.text(0.01, y, text, va="center", transform=captions.transAxes, bbox=frame)
    figure.supxlabel("framed: right. The numbers are cosine similarities.", fontsize=8, color=INK)
    return _save(figure, path)


def _draw_match(axes: plt.Axes, match: Match) -> None:
    axes.imshow(match.item)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(visible=True, color=RIGHT if match.is_right else GRID, linewidth=3.5 if match.is_right else 0.8)
    axes.set_xlabel(f"{match.similarity:.2f}", fontsize=8, labelpad=2, color=RIGHT if match.is_right else INK)


def _shorten(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _wrap(text: str, width: int = 38) -> str:
    return "\n".join(textwrap.wrap(_shorten(text, 110), width))


def _save(figure: plt.Figure, path: Path, **options: str) -> Path:
    """Write the figure and return its path, with `savefig`'s options. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, **options)
    except OSError as error:
        raise UserError(f"the figure {path} cannot be written ({error.strerror})") from None
    finally:
        plt.close(figure)
    return path

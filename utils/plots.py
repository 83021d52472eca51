"""Draw the figures of the scripts."""

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
from utils.files import numbered
from utils.text import one_line

matplotlib.use("Agg")  # figures go to files: no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

INK, GRID, ACCENT, QUIET, RIGHT = "#22303c", "#e3e7ea", "#2f7ed8", "#b9c6d2", "#2a9d4a"
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # keeps text readable on a line
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
    "text.parse_math": False,  # draws a $ in a caption as it is
}


@plt.rc_context(STYLE)
def plot_loss_curve(metrics_file: Path, path: Path, *, batch_size: int) -> Path:
    """Plot the losses in `metrics.jsonl` against the step, beside the loss of guessing, ln(batch_size)."""
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    chance = math.log(batch_size)
    highest = chance
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(chance, color=QUIET, linestyle="--", linewidth=1)
    text, corner = f"chance: ln({batch_size}) = {chance:.2f}", ("axes fraction", "data")
    axes.annotate(text, (1, chance), xycoords=corner, ha="right", va="bottom", fontsize=8, bbox=BOX)
    for name, key, color in (("training", "loss", ACCENT), ("validation", "val_loss", INK)):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.6, marker=".", label=name)
            highest = max([highest, *(loss for _, loss in points)])
    axes.set(xlabel="step", ylabel="contrastive loss", ylim=(0, 1.08 * highest))
    if len(axes.lines) > 2:
        axes.legend(frameon=False, loc="lower left")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    return _save(figure, path)


@plt.rc_context(STYLE)
def plot_predictions(
    images: Sequence[Image.Image],
    predictions: Sequence[Sequence[tuple[str, float]]],
    path: Path,
    note: Sequence[str] = (),
) -> Path:
    """Draw a grid of images, each beside a bar chart of its (class name, probability) pairs, most probable first."""
    num_columns = max(1, min(6, round((0.75 * len(images)) ** 0.5)))  # about the aspect ratio of a slide
    num_rows = math.ceil(len(images) / num_columns)
    figure = plt.figure(figsize=(4.6 * num_columns, 2.1 * num_rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08)
    grid = figure.add_gridspec(num_rows, 2 * num_columns, width_ratios=[1, 1.1] * num_columns)
    for index, (image, ranking) in enumerate(zip(images, predictions, strict=True)):
        row, column = divmod(index, num_columns)
        _empty_axes(figure, grid[row, 2 * column]).imshow(image)
        axes = _empty_axes(figure, grid[row, 2 * column + 1])
        colors = [ACCENT] + [QUIET] * (len(ranking) - 1)
        axes.barh(range(len(ranking)), [probability for _, probability in ranking], height=0.34, color=colors)
        for bar, (name, probability) in enumerate(ranking):  # names stand above their bars: long ones need no margin
            style = {"va": "bottom", "fontsize": 8, "fontweight": "normal" if bar else "bold"}
            axes.text(0, bar - 0.28, _shorten(name, 30), **style)
            axes.text(1, bar - 0.28, f"{probability:.1%}", ha="right", **style)
        axes.set(xlim=(0, 1), ylim=(len(ranking) - 0.6, -0.8))
    return _save(figure, path, note)


@plt.rc_context(STYLE)
def plot_similarity(
    images: Sequence[Image.Image],
    texts: Sequence[str],
    similarities: Sequence[Sequence[float]],
    path: Path,
    note: Sequence[str] = (),
) -> Path:
    """Draw a table of cosine similarities: a column for each image, shown above it, and a row for each text.

    `similarities`: [num_images][num_texts]. More than ten images continue in another table below.
    """
    values = np.asarray(similarities).T
    middle = (values.min() + values.max()) / 2
    num_columns = min(10, len(images))
    num_bands = math.ceil(len(images) / num_columns)
    picture_height, table_height = 0.95, 0.62 * len(texts)  # inches
    size = (3.2 + 0.95 * num_columns, (picture_height + table_height + 0.15) * num_bands)
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2 * num_bands, num_columns, height_ratios=[picture_height, table_height] * num_bands)
    for index, image in enumerate(images):
        _empty_axes(figure, grid[2 * (index // num_columns), index % num_columns]).imshow(image)
    for band in range(num_bands):
        part = values[:, band * num_columns : (band + 1) * num_columns]
        axes = figure.add_subplot(grid[2 * band + 1, : part.shape[1]])
        axes.imshow(part, cmap="Blues", aspect="auto", vmin=values.min(), vmax=values.max())
        for (row, column), value in np.ndenumerate(part):
            color = "white" if value > middle else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        axes.set_yticks(range(len(texts)), [_wrap(text) for text in texts])
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return _save(figure, path, note)


@plt.rc_context(STYLE)
def plot_confusion(
    confusion: np.ndarray, classnames: Sequence[str], path: Path, *, title: str, note: Sequence[str] = ()
) -> Path:
    """Draw the share of each class's images (row) by predicted class (column), and list the most frequent confusions.

    `confusion`: counts, int64 [num_classes, num_classes]. More than 200 classes are drawn in blocks of neighbors.
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
    names = [_shorten(classnames[starts[index]], 24) for index in shown]
    font_size = min(9.0, 0.62 * 72 * side / len(names))  # points, so that the labels fit the rows
    axes.set_yticks(shown, names, fontsize=font_size)
    axes.set_xticks(shown, names, fontsize=font_size, rotation=90)
    axes.tick_params(length=0 if block == 1 else 3, pad=2)
    if num_classes <= 20:
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 40 else INK)
    axes.set(xlabel="predicted class", ylabel="class", anchor="N")
    axes.set_title(one_line(title), loc="left")

    panel.axis("off")
    panel.set_title("most frequent confusions", loc="left")
    panel.text(0, 1, "\n".join(_list_confusions(confusion, classnames)), va="top", linespacing=1.5)
    legend = panel.inset_axes([0.02, 0.45 / side, 0.6, 0.12 / side])
    figure.colorbar(image, cax=legend, orientation="horizontal", ticks=[0, 1, 5, 20, 50, 100])
    legend.set_xlabel(f"% of the images of {'a class' if block == 1 else f'{block} neighboring classes'}")
    return _save(figure, path, note, bbox_inches="tight")


def _list_confusions(confusion: np.ndarray, classnames: Sequence[str]) -> list[str]:
    """Return a line for each of the 18 most frequent confusions, by share of the class's images."""
    wrong = np.where(np.eye(len(classnames), dtype=bool), 0, confusion)
    shares = 100 * wrong / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    lines = []
    for index in np.lexsort((-wrong.ravel(), -shares.ravel()))[:18]:
        row, column = divmod(int(index), len(classnames))
        if wrong[row, column]:
            share = f"{shares[row, column]:3.0f}".replace(" ", "\N{FIGURE SPACE}")
            lines.append(f"{share} %  {_shorten(classnames[row], 22)} → {_shorten(classnames[column], 22)}")
    return lines


@plt.rc_context(STYLE)
def plot_class_accuracies(
    classes: Sequence[tuple[str, float]],
    path: Path,
    *,
    title: str,
    average: float,
    num_shown: int = 20,
    note: Sequence[str] = (),
) -> Path:
    """Draw bars of the best and the worst (class name, top-1 accuracy in %) pairs, with the average over images."""
    ordered = sorted(classes, key=lambda entry: -entry[1])
    parts = {f"the {num_shown} best": ordered[:num_shown], f"the {num_shown} worst": ordered[-num_shown:]}
    if len(ordered) <= 2 * num_shown:
        parts = {"": ordered}
    rows = max(map(len, parts.values()))
    figure = plt.figure(figsize=(5.4 * len(parts), 0.9 + 0.2 * rows), layout="constrained")
    figure.suptitle(one_line(title), x=0.01, ha="left", fontsize=10)
    for axes, (part, entries) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        names, values = [_shorten(name, 28) for name, _ in entries], [value for _, value in entries]
        axes.barh(range(len(entries)), values, height=0.68, color=[ACCENT if v >= average else QUIET for v in values])
        axes.set_yticks(range(len(entries)), names, fontsize=8)
        for row, value in enumerate(values):
            axes.text(value + 1, row, f"{value:.0f}", va="center", fontsize=7, bbox=BOX, zorder=3)
        axes.axvline(average, color=INK, linestyle="--", linewidth=0.8)
        axes.set(xlim=(0, 105), ylim=(rows - 0.4, -0.6), xlabel="top-1 accuracy, % (dashed: all images)")
        axes.set_title(part, loc="left", fontsize=9)
        axes.tick_params(axis="y", length=0)
    return _save(figure, path, note)


class Match(NamedTuple):
    """One of the items most similar to a query."""

    item: Image.Image | str
    similarity: float
    is_right: bool


@plt.rc_context(STYLE)
def plot_retrieval(
    text_queries: Sequence[tuple[str, Sequence[Match]]],
    image_queries: Sequence[tuple[Image.Image, Sequence[Match]]],
    path: Path,
    note: Sequence[str] = (),
) -> Path:
    """Draw captions with the most similar images, and images with the most similar captions; right ones are framed."""
    num_columns = 1 + max(len(matches) for _, matches in text_queries)
    num_rows = len(text_queries) + len(image_queries)
    figure = plt.figure(figsize=(1.15 + 1.45 * num_columns, 1.45 * num_rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.05, hspace=0, wspace=0)
    grid = figure.add_gridspec(num_rows, num_columns, width_ratios=[1.7] + [1] * (num_columns - 1))
    for row, (text, matches) in enumerate(text_queries):
        label = _empty_axes(figure, grid[row, 0])
        label.text(0, 0.5, _wrap(text, 30), va="center", transform=label.transAxes)
        for column, match in enumerate(matches, start=1):
            axes = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
            axes.imshow(match.item)
            frame, ink, width = (RIGHT, RIGHT, 3.5) if match.is_right else (GRID, INK, 0.8)
            axes.spines[:].set(visible=True, color=frame, linewidth=width)
            axes.set_xlabel(f"{match.similarity:.2f}", fontsize=8, labelpad=2, color=ink)
    for row, (image, matches) in enumerate(image_queries, start=len(text_queries)):
        _empty_axes(figure, grid[row, 0]).imshow(image)
        captions = _empty_axes(figure, grid[row, 1:])
        for index, match in enumerate(matches):
            y, text = 1 - (index + 0.5) / len(matches), f"{match.similarity:.2f}   {_shorten(str(match.item), 88)}"
            frame = {"facecolor": "none", "edgecolor": RIGHT, "linewidth": 1.6, "pad": 2.5} if match.is_right else None
            captions.text(0.01, y, text, va="center", transform=captions.transAxes, bbox=frame)
    figure.supxlabel("Frame: right match. Numbers: cosine similarity.", fontsize=8, color=INK)
    return _save(figure, path, note)


def own_figure(path: Path, note: Sequence[str]) -> Path:
    """Return the first of `path`, then with -2, -3 and so on, that is unused or has this `note`, except the date."""

    def is_own(file: Path) -> bool:
        try:
            with Image.open(file, formats=["PNG"]) as image:
                return image.info.get("Description", "").split("\n")[:-1] == list(note)[:-1]
        except OSError:
            return not file.exists()

    return next(filter(is_own, numbered(path)))


def _empty_axes(figure: plt.Figure, cell: matplotlib.gridspec.SubplotSpec) -> plt.Axes:
    """Add axes without ticks and frame."""
    axes = figure.add_subplot(cell)
    axes.axis("off")
    return axes


def _shorten(text: str, length: int) -> str:
    text = one_line(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _wrap(text: str, width: int = 38) -> str:
    return "\n".join(textwrap.wrap(_shorten(text, 110), width))


def _save(figure: plt.Figure, path: Path, note: Sequence[str] = (), **options: str) -> Path:
    """Save the figure and return its path; the lines of the `note` stand below it and in the file's description.

    `options` go to `savefig`. Raises UserError if it cannot be written.
    """
    if note:
        width = int(15 * figure.get_figwidth())  # characters
        lines = [line if len(line) <= width else f"{line[: width // 4]}…{line[-3 * width // 4 :]}" for line in note]
        lines = [figure.get_supxlabel(), *map(one_line, lines)]
        figure.supxlabel("\n".join(filter(None, lines)), x=0.01, ha="left", fontsize=7, color=INK)
        figure.set_figheight(figure.get_figheight() + 0.15 * len(note))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Description": "\n".join(note)} if note else None, **options)
    except OSError as error:
        raise UserError(f"the figure {path} cannot be written ({error.strerror}); check the folder") from None
    finally:
        plt.close(figure)
    return path

"""Every figure that the scripts draw."""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from utils.errors import UserError

matplotlib.use("Agg")  # files only: no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

INK, GRID, ACCENT, QUIET = "#22303c", "#e3e7ea", "#2f7ed8", "#b9c6d2"
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
    rows = [row for row in rows if math.isfinite(row["loss"])]
    chance = math.log(batch_size)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.axhline(chance, color=QUIET, linestyle="--", linewidth=1)
    axes.annotate(f"chance: ln({batch_size}) = {chance:.2f}", (1, chance), xycoords=("axes fraction", "data"),
                  ha="right", va="bottom", fontsize=8)  # fmt: skip
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    axes.plot(steps, losses, color=ACCENT, linewidth=1.6, marker="o" if len(rows) < 3 else None)
    axes.set(xlabel="step", ylabel="contrastive loss", ylim=(0, 1.08 * max([chance, *losses])))
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


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(_shorten(text, 110), 38))


def _save(figure: plt.Figure, path: Path) -> Path:
    """Write the figure and return its path. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"the figure {path} cannot be written ({error.strerror})") from None
    finally:
        plt.close(figure)
    return path

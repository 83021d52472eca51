"""Shared by the benchmarks: rates measured side by side, and their table, chart and JSON."""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from utils.errors import UserError


class Row(NamedTuple):
    """One measurement; `ratio` is to the first row of the benchmark."""

    name: str
    value: float
    unit: str
    ratio: float


def find_test_data(alternative: str = "") -> Path:
    """Return the folder that CLIP_TEST_DATA names. Raises UserError, which starts with `alternative`."""
    folder = os.environ.get("CLIP_TEST_DATA")
    if not folder:
        raise UserError(f"{alternative}set CLIP_TEST_DATA to the folder that holds coco_mini/ and flickr8k/")
    return Path(folder)


def measure_rates(
    rows: Mapping[str, Callable[[], int]], *, seconds: float = 1.0, rounds: int = 5, deadline: float = math.inf
) -> dict[str, list[float]]:
    """Return the units per second of each row in each round. Rows take turns, so that noise affects all of them.

    The function of a row does some work and returns its number of units; it is repeated for `seconds` per round. No
    round but the first begins after `deadline`, a time of `time.monotonic`.
    """
    for work in rows.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        for name, work in rows.items():
            done, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds:
                done += work()
            rates[name].append(done / elapsed)
    return rates


def to_rows(rates: Mapping[str, Sequence[float]], unit: str) -> list[Row]:
    """Return the median of each row, and the median of its ratios to the first row of the same round."""
    base = next(iter(rates.values()))
    return [
        Row(
            name,
            statistics.median(values),
            unit,
            statistics.median(value / first for value, first in zip(values, base, strict=True)),
        )
        for name, values in rates.items()
    ]


def describe_machine() -> str:
    """Return the processor or GPU, the number of cores and the version of PyTorch."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        device = names[0] if names else platform.processor() or platform.machine()
    return f"{device}, {os.cpu_count()} cores, PyTorch {torch.__version__}"


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add --json and --png."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the rows as a bar chart in this file")


def report(rows: Sequence[Row], title: str, args: argparse.Namespace) -> None:
    """Print the table, and write the files that the flags name."""
    print(f"{title}\n{describe_machine()}\n")
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:<{width}} {row.value:12,.1f} {row.unit:<14} {row.ratio:8.2f} x")
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    if args.png:
        draw(rows, title, args.png)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the rows as bars on a logarithmic scale, each with its value and ratio."""
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.42 * len(rows)), layout="constrained", dpi=120)
    values = [row.value for row in rows]
    axes.barh(range(len(rows)), values, color=["#9aa5b1"] + ["#3b6ea5"] * (len(rows) - 1), height=0.62)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2, max(values) * 8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(rows[0].unit)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    for position, row in enumerate(rows):
        axes.text(row.value * 1.1, position, f"{row.value:,.0f}  ({row.ratio:.1f}x)", va="center", fontsize=9)
    figure.savefig(path)
    plt.close(figure)

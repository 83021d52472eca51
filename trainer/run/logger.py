"""The log of a run: lines of text, and one JSON row every few steps."""

import json
import logging
import math
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from utils.config import to_plain
from utils.files import write_atomic
from utils.text import one_line, printable


class RunLogger(logging.Logger):
    """Logs lines to the terminal and `training_logs.txt`, and rows to `metrics.jsonl` and, if installed, TensorBoard.

    The files are open while the logger is used as a context; with `append` they continue those of an earlier run. All
    processes but rank 0 set `enabled` to False: their calls do nothing.
    """

    def __init__(self, folder: Path, *, append: bool = False, enabled: bool = True) -> None:
        super().__init__("train")
        self.disabled = not enabled
        self.folder = folder
        self.mode = "a" if append else "w"
        self.metrics_file = folder / "metrics.jsonl"
        self._tensorboard: Any = None

    def __enter__(self) -> "RunLogger":
        if not self.disabled:
            file = self.folder / "training_logs.txt"
            text_file = logging.FileHandler(file, self.mode, encoding="utf-8", errors="backslashreplace")
            text_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            self.handlers += [text_file, TerminalHandler()]
            self._metrics = self.metrics_file.open(self.mode, encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        if not self.disabled:
            for opened in (self._metrics, self._tensorboard, *self.handlers):
                if opened:
                    opened.close()

    def handle(self, record: logging.LogRecord) -> None:
        """Pass on a record without control characters, a warning on one line."""
        clean = one_line if record.levelno >= logging.WARNING else printable
        record.msg, record.args = clean(record.getMessage()), None
        super().handle(record)

    def log_setup(self, configs: Any, counts: Mapping[str, Any]) -> None:
        """Write the merged configuration to the text file alone, and the counts of the data to `data.json`."""
        text = "configuration\n" + yaml.safe_dump(to_plain(configs), sort_keys=False)
        self.info(text, extra={"file_only": True})
        if not self.disabled:
            write_atomic(self.folder / "data.json", (json.dumps(counts, indent=1) + "\n").encode())

    def drop_rows_after(self, step: int) -> None:
        """Delete the rows of steps after `step`, which a resumed run writes again, and a last row that is cut short."""
        if self.disabled:
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        self._metrics.close()
        write_atomic(self.metrics_file, "".join(kept).encode())
        self._metrics = self.metrics_file.open("a", encoding="utf-8")

    def log_training(self, row: Mapping[str, float], seconds_left: float, bar: tqdm) -> None:
        """Log a row of the training loss and speed; its main figures go to the bar, or to a line if there is none."""
        figures = {
            "loss": f"{row['loss']:.3f}",
            "lr": f"{row['lr']:.2e}",
            "scale": f"{row['logit_scale']:.1f}",
            "pairs/s": f"{row['pairs_per_second']:.0f}",
            "wait": f"{row['data_wait_share']:.0%}",
        }
        line = _place(row) + "  ".join(map(" ".join, figures.items()))
        self.log_row(row, f"{line}  {format_duration(seconds_left)} left", to_terminal=bar.disable)
        bar.set_postfix(figures)

    def log_validation(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log a row of validation metrics, each named `val_...`."""
        row = {"step": step, "epoch": epoch, **{f"val_{name}": value for name, value in metrics.items()}}
        parts = ["validation"]
        if "loss" in metrics:
            parts.append(f"loss {metrics['loss']:.3f}")
            for name in ("text_to_image", "image_to_text"):
                recalls = "/".join(f"{100 * metrics[f'{name}_R@{k}']:.1f}" for k in (1, 5, 10))
                parts.append(f"{name.replace('_', ' ')} R@1/5/10 {recalls} %")
        if "zero_shot_top1" in metrics:
            parts.append(f"zero-shot top-1 {metrics['zero_shot_top1']:.1f} %")
        self.log_row(row, _place(row) + "  ".join(parts))

    def draw_loss_curve(self, pairs_per_loss: int) -> Path:
        """Draw the losses of `metrics.jsonl` with the loss of guessing, ln(pairs_per_loss); return the picture."""
        from utils.plots import plot_loss_curve  # matplotlib's import takes half a second

        return plot_loss_curve(self.metrics_file, self.folder / "loss_curve.png", batch_size=pairs_per_loss)

    def log_row(self, row: Mapping[str, float], line: str, *, to_terminal: bool = True) -> None:
        """Append `row` to `metrics.jsonl`, with null for values that are not finite, and its `line` to the text."""
        if self.disabled:
            return
        is_finite = {name: not isinstance(value, float) or math.isfinite(value) for name, value in row.items()}
        self._metrics.write(json.dumps({name: row[name] if is_finite[name] else None for name in row}) + "\n")
        self._metrics.flush()
        self.info(line, extra={"file_only": not to_terminal})
        if self._tensorboard is None and find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # its import takes seconds

            self._tensorboard = SummaryWriter(self.folder, purge_step=row["step"])
        for name, value in row.items() if self._tensorboard else ():
            self._tensorboard.add_scalar(name, value, row["step"])


def _place(row: Mapping[str, float]) -> str:
    """Return the beginning of a row's line."""
    return f"epoch {row['epoch']:>2}  step {row['step']:>5}  "


class TerminalHandler(logging.Handler):
    """Prints lines above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            tqdm.write(prefix + record.getMessage(), file=sys.stdout)
            sys.stdout.flush()


def format_duration(seconds: float) -> str:
    """Return seconds in at most two units, e.g. "2 h 05 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"

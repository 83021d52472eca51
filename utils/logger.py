"""What a run tells: a text log, one JSON row every few steps, and a progress bar."""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from utils.files import delete_unfinished, write_whole


class RunLogger:
    """Lines to the terminal and `training_logs.txt`, rows to `metrics.jsonl` and TensorBoard, and a bar of steps."""

    def __init__(self, directory: Path, *, goes_on: bool = False, quiet: bool = False) -> None:
        """Open the files in `directory`, to add to them if a run `goes_on`.

        With `quiet`, for all processes but the main one, nothing is told or written.
        """
        self.quiet = quiet
        self.metrics_file = directory / "metrics.jsonl"
        mode, text_file = ("a" if goes_on else "w"), directory / "training_logs.txt"
        self._metrics = (Path(os.devnull) if quiet else self.metrics_file).open(mode, encoding="utf-8")
        self._text = logging.FileHandler(
            os.devnull if quiet else text_file, mode, encoding="utf-8", errors="backslashreplace"
        )
        self._text.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._bar = tqdm(disable=True)
        self._board: Any = None  # TensorBoard's writer, where it is installed

    def info(self, message: str) -> None:
        """Tell one line, or a block of them."""
        self._tell(logging.INFO, message)
        self._print(message)

    def warning(self, message: str) -> None:
        """Tell what went wrong without ending the run."""
        self._tell(logging.WARNING, message)
        self._print(f"warning: {message}")

    def log_config(self, configs: Mapping[str, Any]) -> None:
        """Write the merged configuration to the text log alone."""
        self._tell(logging.INFO, "configuration\n" + yaml.safe_dump(dict(configs), sort_keys=False))

    def drop_rows_after(self, step: int) -> None:
        """Delete the rows of steps after `step`, and a last one cut short: a resumed run writes them again."""
        if self.quiet:
            return
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # seconds, which only its users take

            self._board = SummaryWriter(self.metrics_file.parent, purge_step=step + 1)
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        self._metrics.close()
        delete_unfinished(self.metrics_file.parent)  # the run's lock keeps others out
        write_whole(self.metrics_file, "".join(kept).encode())
        self._metrics = self.metrics_file.open("a", encoding="utf-8")

    def start_bar(self, total_steps: int, first_step: int = 0) -> None:
        """Draw a bar of optimizer steps, `first_step` of them done, where there is a terminal to draw it on."""
        disable = True if self.quiet else None
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=disable)

    def advance_bar(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def close_bar(self) -> None:
        """Leave the bar as it stands; lines are told below it."""
        self._bar.close()

    def row(self, row: Mapping[str, float]) -> None:
        """Append a JSON row to `metrics.jsonl`, and show its main figures in the bar, or as a line if there is none."""
        figures = {
            "loss": f"{row['loss']:.3f}",
            "lr": f"{row['lr']:.2e}",
            "scale": f"{row['logit_scale']:.1f}",
            "pairs/s": f"{row['pairs_per_second']:.0f}",
            "wait": f"{row['data_wait_share']:.0%}",
        }
        line = f"epoch {row['epoch']:>2}  step {row['step']:>5}  " + "  ".join(map(" ".join, figures.items()))
        self.write_row(row, line, prints=self._bar.disable)
        self._bar.set_postfix(figures)

    def write_row(self, row: Mapping[str, float], line: str, *, prints: bool = True) -> None:
        """Append a JSON row, where what is no number is null, to `metrics.jsonl`, and its `line` to the text log."""
        is_none = {name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
        self._metrics.write(json.dumps({name: None if name in is_none else row[name] for name in row}) + "\n")
        self._metrics.flush()
        for name, value in row.items() if self._board else ():
            self._board.add_scalar(name, value, row["step"])
        self._tell(logging.INFO, line)
        if prints:
            self._print(line)

    def _tell(self, level: int, message: str) -> None:
        self._text.emit(logging.LogRecord("train", level, "", 0, message, None, None))

    def _print(self, message: str) -> None:
        if not self.quiet:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()


def duration(seconds: float) -> str:
    """Return seconds in two units at most, e.g. "2 h 05 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"

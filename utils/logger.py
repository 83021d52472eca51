"""What a run tells: a text log, one JSON row every few steps, and a progress bar."""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm


class RunLogger:
    """Lines to the terminal and `training_logs.txt`, rows to `metrics.jsonl`, and a bar over the run's steps."""

    def __init__(self, directory: Path, *, quiet: bool = False) -> None:
        """Open the files in `directory`; `quiet`, for all processes but the main one, tells and writes nothing."""
        self.quiet = quiet
        self.metrics_file = directory / "metrics.jsonl"
        self._metrics = (Path(os.devnull) if quiet else self.metrics_file).open("w", encoding="utf-8")
        self._text = logging.FileHandler(os.devnull if quiet else directory / "training_logs.txt", encoding="utf-8")
        self._text.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._bar = tqdm(disable=True)

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

    def start_bar(self, total_steps: int) -> None:
        """Draw a bar of optimizer steps, where there is a terminal to draw it on."""
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, disable=True if self.quiet else None)

    def advance_bar(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def close_bar(self) -> None:
        """Leave the bar as it stands; lines are told below it."""
        self._bar.close()

    def row(self, row: Mapping[str, float]) -> None:
        """Append a JSON row to `metrics.jsonl`, and show its main figures in the bar, or as a line if there is none."""
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        figures = {
            "loss": f"{row['loss']:.3f}",
            "lr": f"{row['lr']:.2e}",
            "scale": f"{row['logit_scale']:.1f}",
            "pairs/s": f"{row['pairs_per_second']:.0f}",
            "wait": f"{row['data_wait_share']:.0%}",
        }
        line = f"epoch {row['epoch']:>2}  step {row['step']:>5}  " + "  ".join(map(" ".join, figures.items()))
        self._tell(logging.INFO, line)
        if self._bar.disable:
            self._print(line)
        else:
            self._bar.set_postfix(figures)

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

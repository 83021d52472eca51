"""Measure everything that needs a GPU, in one call that ends within its minutes and keeps what it has if it is cut off.

python -m benchmarks.gpu [--minutes 9] [--output DIR] [--only SECTION ...] [--toy]

After each section DIR/results.json and DIR/results.md are written anew; a section that does not fit into the time
left is listed as open. With CLIP_TEST_DATA, train.py trains on Flickr8k. `--toy` runs the same code at a tiny size,
on a CPU too. Sections:
  steps_N     training steps of N pairs: the rows of benchmarks.train_step, and their peak memory
  compiled_N  the rows of torch.compile, and the project's without it
  largest     the largest batch that fits
  profile     the kernels of a step, the time between them, and where the time goes
  augment     crops, flips, colors and normalization of 256 images on the device
  save        how long a checkpoint keeps a run waiting, and how long writing it takes
  repeat      whether the same steps give the same weights, bit for bit
  training    train.py on Flickr8k: decoded by workers, and with the pixels on the GPU
  evaluation  benchmarks.zero_shot
  cpu         steps of 16 pairs on this machine's CPU
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/gpu.py` from any folder

from benchmarks import train_step, zero_shot
from benchmarks.common import describe_machine, find_test_data, to_rows
from dataloader.augment import NUM_DRAWS, Augmentation
from dataloader.config import load_data_config
from model import CLIP, load_model_config
from trainer.config import load_train_config
from trainer.optim import build_optimizer
from trainer.parallel import Runtime
from trainer.run.checkpoint import CheckpointWriter, TrainState
from trainer.run.configs import Configs
from utils.device import choose_device
from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parents[1]
COMPILED = ("open_clip_best", "project_compiled")
Table = list[dict[str, Any]]  # one dictionary per row, of the columns


class Sizes(NamedTuple):
    """How large everything is."""

    model: str = "RN50"
    batches: tuple[int, ...] = (256, 64, 1024)
    large: int = 1024  # from this batch on only the rows of LARGE_ROWS
    seconds: float = 1.0  # per row and round
    rounds: int = 3
    train_seconds: float = 60.0
    side: int = 128  # of the training images, in pixels


TOY = Sizes("RN-small", (8, 4), 8, 0.05, 1, 5.0, 64)
LARGE_ROWS = ("open_clip", "open_clip_bf16", "project", "project_checkpointing")


class Benchmark:
    """The sections, on one device."""

    def __init__(self, device: torch.device, sizes: Sizes, deadline: float) -> None:
        self.device = device
        self.sizes = sizes
        self.deadline = deadline  # of `time.monotonic`
        self.config = load_model_config({"name": sizes.model})

    def sections(self) -> dict[str, tuple[float, Callable[[], Table]]]:
        """Return each section with about the seconds that it takes, the most important first."""
        first, *others = self.sizes.batches
        return {
            f"steps_{first}": (150, lambda: self.steps(first)),
            **{f"steps_{batch}": (60, lambda batch=batch: self.steps(batch)) for batch in others},
            "training": (2 * self.sizes.train_seconds + 30, self.training),
            "profile": (30, self.profile),
            "largest": (40, self.largest),
            f"compiled_{first}": (180, lambda: self.compiled(first)),
            "repeat": (20, self.repeat),
            "save": (15, self.save),
            "augment": (10, self.augment),
            "evaluation": (60, self.evaluation),
            "cpu": (60, self.cpu),
            f"compiled_{min(self.sizes.batches)}": (180, lambda: self.compiled(min(self.sizes.batches))),
        }

    def steps(self, batch: int) -> Table:
        rows = self._builders(batch)
        wanted = LARGE_ROWS if batch >= self.sizes.large else [name for name in rows if name not in COMPILED]
        return self._measured({name: rows[name] for name in wanted if name in rows})

    def compiled(self, batch: int) -> Table:
        rows = self._builders(batch)
        wanted = ("open_clip", "project", *COMPILED)
        return self._measured({name: rows[name] for name in wanted if name in rows})

    def largest(self) -> Table:
        """Double the batch, then halve the interval three times."""
        table = []
        for name in ("open_clip", "open_clip_bf16", "project", "project_checkpointing"):
            fitting, failing = 0, 0
            batch = max(self.sizes.batches) if self.device.type == "cuda" else self.sizes.batches[0]
            for _ in range(7 if self.device.type == "cuda" else 1):
                rows = self._builders(batch)
                if name not in rows:
                    break
                try:
                    rows[name]()()
                    fitting = batch
                except torch.OutOfMemoryError:
                    failing = batch
                torch.cuda.empty_cache()
                batch = (fitting + failing) // 2 // 64 * 64 if failing else 2 * batch
                if batch in (fitting, failing):
                    break
            if fitting:
                table.append({"row": name, "largest batch that fits": fitting, "tried and failed": failing or None})
        return table

    def profile(self) -> Table:
        """Profile steps of the smallest and the first batch."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        table = []
        for batch in sorted({self.sizes.batches[0], min(self.sizes.batches)}):
            inputs = train_step.make_inputs(self.config, batch, self.device)
            num_steps = inputs.steps_per_call
            step, _ = train_step.project_step(self.config, inputs)
            step()
            with torch.profiler.profile(activities=activities) as profile:
                step()
            kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            kernels = kernels or [event for event in profile.events() if event.name.startswith("aten::")]
            span = max(k.time_range.end for k in kernels) - min(k.time_range.start for k in kernels)
            busy = sum(k.time_range.elapsed_us() for k in kernels)
            by_name: dict[str, float] = {}
            for kernel in kernels:
                by_name[kernel.name] = by_name.get(kernel.name, 0) + kernel.time_range.elapsed_us()
            row = {"row": f"{batch} pairs", "kernels per step": round(len(kernels) / num_steps)}
            row |= {"ms per step": span / num_steps / 1000, "idle share": max(0.0, 1 - busy / span)}
            row["ms to queue a step"] = self._queueing(step, num_steps)
            table.append(row)
            for name, microseconds in sorted(by_name.items(), key=lambda item: -item[1])[:12]:
                table.append({"row": f"  {name[:90]}", "ms per step": microseconds / num_steps / 1000})
        return table

    def augment(self) -> Table:
        """Time what a device does with a batch of 256-pixel squares."""
        batch, size = self.sizes.batches[0], self.config.image_resolution
        squares = torch.randint(0, 256, (batch, 256, 256, 3), dtype=torch.uint8, device=self.device).permute(0, 3, 1, 2)
        draws = np.random.default_rng(0).random((batch, NUM_DRAWS))
        table = []
        for name, keys in {
            "reference": {},
            "standard, flip": {"augmentation": "standard", "flip": True},
            "standard, flip, color_jitter": {"augmentation": "standard", "flip": True, "color_jitter": 0.3},
        }.items():
            augmentation = Augmentation(load_data_config(keys), size, self.config.image_mean, self.config.image_std)

            def work(augmentation: Augmentation = augmentation) -> Tensor:
                return augmentation.finish(augmentation.crop_squares(squares, draws), draws)

            table.append({"row": name, "ms per batch": self._milliseconds(work)})
        return table

    def save(self) -> Table:
        state = self._state()
        with tempfile.TemporaryDirectory() as folder:
            runtime = Runtime(self.device, num_devices=1)
            writer = CheckpointWriter(Path(folder), state.model, state.configs.trainer, runtime, None)
            times = []
            for step in (1, 2, 3):
                state.global_step = step
                start = time.perf_counter()
                writer.save(state)
                waited = time.perf_counter() - start
                writer.wait()
                times.append((waited, time.perf_counter() - start))
            size = next(Path(folder).glob("checkpoint_*_3.pt")).stat().st_size / 2**30
        waited, whole = (statistics.median(column) for column in zip(*times, strict=True))
        return [{"row": "checkpoint", "GiB": size, "the run waits, s": waited, "written after, s": whole}]

    def repeat(self) -> Table:
        """Take the same ten steps twice, with cuDNN's search for fast algorithms and without."""
        table = []
        for name, search in {"cuDNN's search": True, "without": False}.items():
            ends = []
            for _ in range(2):
                torch.manual_seed(0)
                inputs = train_step.make_inputs(self.config, min(self.sizes.batches), self.device)
                step, model = train_step.project_step(
                    self.config, inputs, cudnn_benchmark=search, **{"optimizer.params.lr": 1e-3}
                )
                step()
                start = time.perf_counter()
                step()
                seconds = time.perf_counter() - start
                ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
            equal = torch.equal(*ends)
            difference = (ends[0] - ends[1]).abs().max().item()
            steps = 2 * inputs.steps_per_call
            table.append({"row": name, "steps": steps, "equal": equal, "largest difference": difference, "s": seconds})
        return table

    def training(self) -> Table:
        """Run train.py as a user would, twice for a part of the minutes."""
        flickr = find_test_data() / "flickr8k"
        names = {"train": "captions_train.json", "val": "captions_val.json"}
        flags = ["--model", self.sizes.model, "--recipe", "best", "--batch_size", str(self.sizes.batches[0])]
        for part, name in names.items():
            flags += [
                f"--{part}_img_dir",
                flickr / "images",
                f"--{part}_annotation_file",
                flickr / "annotations" / name,
            ]
        workers = min(12, os.cpu_count() or 1)
        for key, value in {
            "model.image_resolution": self.sizes.side,
            "trainer.num_workers": workers,
            "trainer.logging_steps": 10 if self.device.type == "cuda" else 1,
            "trainer.eval_steps": 10**9,  # only after the last step
        }.items():
            flags += ["--set", f"{key}={value}"]
        table = []
        with tempfile.TemporaryDirectory() as temporary:
            for name, keys, epochs in (
                ("JPEG shards, workers decode, the GPU crops", {"cache": "jpeg"}, 8),
                ("pixel cache on the GPU", {"cache": "pixels"}, 60),
            ):
                output = Path(temporary) / name.split()[0]
                settings = [part for key, value in keys.items() for part in ("--set", f"dataloader.{key}={value}")]
                settings += ["--set", f"dataloader.cache_dir={temporary}/cache", "--output_dir", output]
                limit = ["--epochs", str(epochs), "--time_limit", f"{self.sizes.train_seconds:.0f}s"]
                command = [sys.executable, ROOT / "train.py", *flags, *settings, *limit]
                start = time.perf_counter()
                left = max(1.0, self.deadline - time.monotonic())
                done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=left, cwd=temporary)
                if done.returncode not in (0, 75):
                    raise RuntimeError(done.stderr[-2000:])
                rows = [json.loads(line) for line in (output / "logs/metrics.jsonl").read_text().splitlines()]
                steps = [row for row in rows if "pairs_per_second" in row]
                warm = steps[len(steps) // 3 :]
                row = {"row": name, "s": time.perf_counter() - start, "steps": steps[-1]["step"]}
                for column in ("pairs_per_second", "data_wait_share", "peak_memory_gib"):
                    row[column] = statistics.median(values[column] for values in warm)
                row |= {"loss": steps[-1]["loss"], "first loss": steps[0]["loss"]}
                metrics = rows[-1]
                row |= {name: metrics[name] for name in metrics if name.startswith("text_to_image_R@")}
                row["log"] = [line for line in done.stderr.splitlines() if "memory" in line][:3]
                table.append(row)
        return table

    def evaluation(self) -> Table:
        rows = zero_shot.measure(self.sizes.model, self.device, seconds=self.sizes.seconds, rounds=1)
        return [row._asdict() for row in rows]

    def cpu(self) -> Table:
        config, device = self.config, torch.device("cpu")
        batch = 16 if self.device.type == "cuda" else 4
        rows = train_step.builders(config, train_step.make_inputs(config, batch, device))
        wanted = ("open_clip", "open_clip_bf16", "open_clip_best", "project", "project_fp32")
        return self._measured({name: rows[name] for name in wanted if name in rows}, rounds=2)

    def _builders(self, batch: int) -> dict[str, Callable[[], train_step.Step]]:
        torch._dynamo.reset()
        return train_step.builders(self.config, train_step.make_inputs(self.config, batch, self.device))

    def _measured(self, rows: dict[str, Callable[[], train_step.Step]], rounds: int | None = None) -> Table:
        rounds = rounds or self.sizes.rounds
        options = {"seconds": self.sizes.seconds, "rounds": rounds, "deadline": self.deadline - 10}
        measured = train_step.measure_steps(rows, **options)
        torch.cuda.empty_cache()
        return [
            {"row": row.name, row.unit: row.value, "ratio": row.ratio, "peak GiB": measured.memory.get(row.name)}
            for row in to_rows(measured.rates, "pairs/s")
        ]

    def _state(self) -> TrainState:
        """Return a model after one step of AdamW."""
        trainer = load_train_config()
        model = CLIP(self.config).to(self.device, memory_format=torch.channels_last)
        optimizer = build_optimizer(model, trainer.optimizer, steps_per_epoch=1)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        return TrainState(model, optimizer, scaler, Configs(self.config, trainer, load_data_config()))

    def _queueing(self, step: train_step.Step, num_steps: int) -> float:
        """Return the host's time for a step in ms, without the synchronization at its end."""
        synchronize, torch.cuda.synchronize = torch.cuda.synchronize, lambda: None
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize = synchronize
        if self.device.type == "cuda":
            synchronize()
        return seconds / num_steps * 1000

    def _milliseconds(self, work: Callable[[], object], repeats: int = 20) -> float:
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats * 1000


def run(benchmark: Benchmark, output: Path, only: list[str]) -> dict[str, Table]:
    """Run the sections that fit into the time left; write all results after each."""
    sections = benchmark.sections()
    results: dict[str, Table] = {}
    open_sections: dict[str, str] = {}
    for name, (seconds, measure) in sections.items():
        if only and name not in only:
            continue
        left = benchmark.deadline - time.monotonic()
        if left < seconds:
            open_sections[name] = f"takes about {seconds:.0f} s, {left:.0f} s were left"
            continue
        start = time.monotonic()
        try:
            results[name] = measure()
        except Exception as error:  # the other sections are still worth their time
            traceback.print_exc()
            open_sections[name] = f"failed: {type(error).__name__}: {str(error)[-300:]}"
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        write(results, open_sections, output)
    write(results, open_sections, output)
    return results


def write(results: dict[str, Table], open_sections: dict[str, str], output: Path) -> None:
    """Write results.json and results.md."""
    content = {"machine": describe_machine(), "results": results, "open": open_sections}
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (output / "results.md").write_text(to_markdown(content))


def to_markdown(content: dict[str, Any]) -> str:
    """Return the results as tables."""
    parts = [content["machine"]]
    for name, table in content["results"].items():
        columns = list(dict.fromkeys(column for row in table for column in row))
        lines = [f"## {name}", "", f"| {' | '.join(columns)} |", "| " + "--- | " * len(columns)]
        for row in table:
            cells = ("" if row.get(column) is None else row[column] for column in columns)
            lines.append(f"| {' | '.join(f'{c:.4g}' if isinstance(c, float) else str(c) for c in cells)} |")
        parts.append("\n".join(lines))
    parts += [f"open: {name} ({reason})" for name, reason in content["open"].items()]
    return "\n\n".join(parts) + "\n"


def draw(results: dict[str, Table], title: str, path: Path) -> None:
    """Draw pairs per second of the rows that all batch sizes have, and their peak memory."""
    tables = {int(name.removeprefix("steps_")): table for name, table in results.items() if name.startswith("steps_")}
    if not tables:
        return
    batches = sorted(tables)
    values = {batch: {row["row"]: row for row in tables[batch]} for batch in batches}
    names = [name for name in values[batches[0]] if all(name in values[batch] for batch in batches)]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", dpi=120)
    colors = plt.get_cmap("tab10").colors
    for axes, column, label in zip(
        panels, ("pairs/s", "peak GiB"), ("pairs per second", "peak memory, GiB"), strict=True
    ):
        for number, name in enumerate(names):
            heights = [values[batch][name].get(column) or 0.0 for batch in batches]
            places = np.arange(len(batches)) + (number - (len(names) - 1) / 2) * 0.8 / len(names)
            axes.bar(places, heights, 0.8 / len(names), label=name, color=colors[number % len(colors)])
            for place, height in zip(places, heights, strict=True):
                axes.text(place, height, f"{height:,.0f}", ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(batches)), [f"{batch} pairs" for batch in batches])
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole call ends within them (default: 9)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks_gpu"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="run these alone")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a CPU too")
    args = parser.parse_args(argv)
    device = choose_device()
    if device.type != "cuda" and not args.toy:
        raise UserError("PyTorch finds no GPU; --toy runs the same code at a tiny size on this CPU")
    benchmark = Benchmark(device, TOY if args.toy else Sizes(), time.monotonic() + 60 * args.minutes)
    unknown = set(args.only) - set(benchmark.sections())
    if unknown:
        raise UserError(f"--only {min(unknown)}: the sections are {', '.join(benchmark.sections())}")
    args.output.mkdir(parents=True, exist_ok=True)
    results = run(benchmark, args.output, args.only)
    draw(results, f"Training steps of {benchmark.sizes.model}, {describe_machine()}", args.output / "steps.png")
    print((args.output / "results.md").read_text())


if __name__ == "__main__":
    run_script(main)

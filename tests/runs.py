"""Training runs for the tests: their flags, processes of their own, and what they leave behind."""

import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import train
from benchmarks.soak import TIMING, same
from model import CLIP, read_checkpoint
from tests.conftest import ROOT, SCRIPT_ENVIRONMENT, TINY
from trainer.loss import Objective
from trainer.run.checkpoint import list_checkpoints
from utils.errors import run_script

SECONDS = 120  # at most, for anything that a test waits for
TINY_KEYS = ("embed_dim", "image_resolution", "vision_width", "transformer_width", "transformer_heads")
Captions = tuple[Path, Path]  # img_dir, annotation_file


def tiny_flags(data: Captions, output: Path, *, epochs: int = 2, batch_size: int = 8, **settings: object) -> list[str]:
    """Return train.py's flags for a tiny model, without workers. `settings` are values by their dotted keys."""
    tiny = {f"model.{key}": getattr(TINY, key) for key in TINY_KEYS}
    settings = {**tiny, "trainer.precision": "fp32", "trainer.num_workers": 0, "trainer.logging_steps": 2, **settings}
    flags = ["--train_img_dir", data[0], "--train_annotation_file", data[1], "--output_dir", output]
    flags += ["--model", "RN-small", "--epochs", epochs, "--batch_size", batch_size]
    for key, value in settings.items():
        flags += ["--set", f"{key}={json.dumps(value, default=str)}"]
    return list(map(str, flags))


def val_flags(data: Captions) -> list[str]:
    """Return the flags that name the held-out captions."""
    return ["--val_img_dir", str(data[0]), "--val_annotation_file", str(data[1])]


def read_rows(output: Path, column: str = "step") -> list[dict]:
    """Return the rows of a run's log that have the column."""
    rows = map(json.loads, (output / "logs" / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if column in row]


def last_checkpoint(output: Path) -> dict:
    """Return the content of a run's newest checkpoint."""
    return read_checkpoint(list_checkpoints(output / "saved_checkpoints")[-1])


def same_end(a: Path, b: Path) -> bool:
    """Return whether two runs end alike, bit for bit: the rows of their logs but for the timing, and checkpoints."""
    rows = [[{key: row[key] for key in row.keys() - TIMING} for row in read_rows(output)] for output in (a, b)]
    return same(*rows) and same(last_checkpoint(a), last_checkpoint(b))


class Recorder:
    """Watches runs in this process. `images`: the indices in each loss; `before`: actions before the step of a loss."""

    def __init__(self, monkeypatch) -> None:
        self.images: list[list[int]] = []
        self.before: dict[int, Callable[[CLIP], None]] = {}
        call, take_step = Objective.__call__, train.take_step

        def recorded_call(objective, image_features, text_features, indices):
            self.images.append(indices.tolist())
            return call(objective, image_features, text_features, indices)

        def prepared_step(model, *rest):
            self.before.pop(len(self.images), lambda model: None)(model)
            return take_step(model, *rest)

        monkeypatch.setattr(Objective, "__call__", recorded_call)
        monkeypatch.setattr(train, "take_step", prepared_step)


def send(number: int) -> Callable[[CLIP], None]:
    """Return an action that sends this process a signal."""
    return lambda model: os.kill(os.getpid(), number)


def spoil_gradient(model: CLIP) -> None:
    """Make a gradient non-finite."""
    next(model.parameters()).grad.fill_(math.nan)


def free_port() -> int:
    """Return a TCP port that nothing uses."""
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


def wait_until(is_reached: Callable[[], bool]) -> None:
    """Wait for a condition; fail after SECONDS."""
    deadline = time.monotonic() + SECONDS
    while not is_reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_rows(output: Path, count: int) -> None:
    """Wait until a run has logged so many rows."""
    metrics = output / "logs" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= count)


def start_forks(target: Callable, arguments: Sequence[tuple]) -> list[multiprocessing.Process]:
    """Call `target` in one new process per tuple of arguments.

    The processes are forks of a server that has imported PyTorch: they start in milliseconds.
    """
    os.environ["PYTHONPATH"] = SCRIPT_ENVIRONMENT["PYTHONPATH"]  # the server inherits it
    context, method = multiprocessing.get_context("forkserver"), multiprocessing.get_start_method()
    context.set_forkserver_preload(["tests.runs", "tests.test_parallel"])
    processes = [context.Process(target=_call, args=(method, target, values)) for values in arguments]
    for process in processes:
        process.start()
    return processes


def _call(start_method: str, target: Callable, arguments: tuple) -> None:
    multiprocessing.set_start_method(start_method, force=True)  # of workers
    torch.set_num_threads(1)
    target(*arguments)


def join(processes: Sequence[multiprocessing.Process]) -> list[int]:
    """Wait for processes and return their exit statuses."""
    for process in processes:
        process.join(SECONDS)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


class ForkedRun:
    """`train.py` in processes of their own, with the environment that torchrun gives to each of several."""

    def __init__(self, flags: Sequence[str], log: Path, num_processes: int = 1) -> None:
        self.log = log
        shared = {"WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in range(num_processes)]
        arguments = [(flags, environment if num_processes > 1 else {}, log) for environment in ranks]
        self.processes = start_forks(_train, arguments)

    def signal_group(self, number: int) -> None:
        """Send a signal to the first process and its workers, as a terminal does."""
        os.killpg(self.processes[0].pid, number)

    def wait(self) -> list[int]:
        """Return the exit status of each process."""
        return join(self.processes)

    def printed(self) -> str:
        """Return the output of all processes."""
        return self.log.read_text()


def _train(flags: Sequence[str], environment: Mapping[str, object], log: Path) -> None:
    os.setsid()
    os.environ.update({name: str(value) for name, value in environment.items()})
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = None
    try:
        run_script(lambda: train.main(list(flags)))
    except SystemExit as end:
        status = end.code
    sys.exit(status)  # outside the except block, which keeps the loader and its workers alive


def torchrun(flags: Sequence[str], num_processes: int, *options: str) -> subprocess.Popen:
    """Start train.py under torchrun as a user does; its output is a pipe."""
    options = options or (f"--master_port={free_port()}",)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", *options]
    environment = {**SCRIPT_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(ROOT / "train.py"), *flags],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

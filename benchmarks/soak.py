"""Kill a run again and again, and see that nothing is lost: the end equals that of a run left alone, bit for bit.

python -m benchmarks.soak [--kills 100] [--seed S] [--keep DIR]

Trains on the sample with two workers for 20 epochs twice: once left alone, while its memory and open files are
watched, and once killed (SIGKILL) `--kills` times, each time resumed with `--resume auto`: at random moments of the
run, every third one while a checkpoint is being written, every tenth while it starts. Exits with 0 only if the two
ends are the same, no checkpoint was ever torn, nothing is left behind, and memory and files stayed flat. Linux only.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from model import read_checkpoint
from trainer.checkpoint import list_checkpoints
from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ["--sample", "--epochs", "20", "--set", "trainer.num_workers=2", "--set", "trainer.eval_steps=62"]
EVERY_STEP = ["--set", "trainer.logging_steps=1", "--set", "trainer.save_steps=5", "--resume", "auto"]
TIMING = {"pairs_per_second", "data_wait_share", "peak_memory_gib"}  # columns of the log that no two runs share
GROWTH = 1.05  # that may pass for flat


class SoakError(Exception):
    """Something that should hold does not."""


def start(flags: list[str], folder: Path, output: str) -> subprocess.Popen:
    log = (folder / f"{output}.txt").open("ab")
    command = [sys.executable, str(ROOT / "train.py"), *flags, *EVERY_STEP, "--output_dir", output]
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def rows_of(output: Path) -> list[dict]:
    """Return the rows of the log that are complete, without what is timed."""
    file = output / "logs" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def wait_for(process: subprocess.Popen, is_reached: Callable[[], bool], interval: float) -> None:
    """Wait until `is_reached`, asking every `interval` seconds; the process must not end before."""
    deadline = time.monotonic() + 600
    while not is_reached():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SoakError(f"the run ended with {process.poll()} before it could be killed")
        time.sleep(interval)


def kill_once(number: int, step: int, process: subprocess.Popen, output: Path, rng: random.Random) -> None:
    """Kill the run near `step`: anywhere, while it saves, or while it starts."""
    if number % 10 == 9:
        time.sleep(rng.uniform(0, 8))
    else:
        wait_for(process, lambda: (rows_of(output) or [{"step": 0}])[-1]["step"] >= step, interval=0.05)
        if number % 3 == 0:
            wait_for(process, lambda: any(output.glob("saved_checkpoints/*.part-*")), interval=0.002)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 0.5))
    process.kill()
    process.wait()


def processes_of(pid: int) -> Iterator[Path]:
    """Yield the folders in /proc of a process and its children."""
    yield Path(f"/proc/{pid}")
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield Path(f"/proc/{child}")


def usage(pid: int) -> tuple[float, int]:
    """Return the memory in MiB that a process and its children have written to and share with none, and their files."""
    memory, num_files = 0.0, 0
    for process in processes_of(pid):
        lines = (process / "smaps_rollup").read_text().splitlines()
        memory += sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024
        num_files += len(list((process / "fd").iterdir()))
    return memory, num_files


def watch(process: subprocess.Popen, output: Path) -> list[tuple[int, float, int]]:
    """Return (epoch, MiB, open files) of each epoch while the run goes on: medians, since a step comes and goes."""
    seen: dict[int, list[tuple[float, int]]] = {}
    while process.poll() is None:
        if rows := rows_of(output):
            epoch = rows[-1]["epoch"]
            try:
                seen.setdefault(epoch, []).append(usage(process.pid))
            except OSError:  # it just ended
                break
        time.sleep(0.1)
    return [(epoch, *map(statistics.median_high, zip(*usages, strict=True))) for epoch, usages in seen.items()]


def check_flat(seen: list[tuple[int, float, int]]) -> None:
    for epoch, memory, num_files in seen:
        print(f"epoch {epoch:>2}  {memory:7.0f} MiB  {num_files} open files")
    early, late = seen[4:8], seen[-4:]  # both with two validations
    for column, name in ((1, "memory"), (2, "open files")):
        before, after = (statistics.median_high(row[column] for row in rows) for rows in (early, late))
        if after > GROWTH * before:
            raise SoakError(f"{name} grew from {before:.0f} to {after:.0f}")


def same(a: object, b: object) -> bool:
    """Return whether two checkpoints' contents are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def soak(flags: list[str], folder: Path, kills: int, seed: int, *, watches: bool = True) -> None:
    """Run it all in `folder`. Raises SoakError where something does not hold."""
    rng = random.Random(seed)
    process = start(flags, folder, "alone")
    seen = watch(process, folder / "alone")
    if process.wait() != 0:
        raise SoakError(f"the run left alone ended with {process.returncode}; see {folder / 'alone.txt'}")
    if watches:
        check_flat(seen)

    expected, output = rows_of(folder / "alone"), folder / "killed"
    num_steps = expected[-1]["step"]
    for number in range(kills):
        step = round(num_steps * (number + rng.random()) / (kills + 1))
        kill_once(number, step, start(flags, folder, "killed"), output, rng)
        for file in list_checkpoints(output / "saved_checkpoints"):
            read_checkpoint(file)  # raises UserError if it is torn
        print(f"kill {number + 1}: after step {(rows_of(output) or [{'step': 0}])[-1]['step']} of {num_steps}")
    if start(flags, folder, "killed").wait() != 0:
        raise SoakError(f"the last resumed run failed; see {folder / 'killed.txt'}")

    if "passed over" in (folder / "killed.txt").read_text():
        raise SoakError("a resumed run found a damaged checkpoint")
    if rows_of(output) != expected:
        raise SoakError("the rows of the log differ")
    files = [{str(file.relative_to(run)) for file in run.rglob("*")} for run in (folder / "alone", output)]
    left_behind = [file for file in files[0] ^ files[1] if "tfevents" not in file]  # TensorBoard's: one a start
    if left_behind:
        raise SoakError(f"the files differ: {sorted(left_behind)}")
    ends = [read_checkpoint(list_checkpoints(run / "saved_checkpoints")[-1]) for run in (folder / "alone", output)]
    if not same(*ends):
        raise SoakError("the last checkpoints differ")
    print(f"{kills} kills: the same weights, optimizer, random states, rows and files as the run left alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this empty folder and leave it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            soak(SAMPLE, folder, args.kills, args.seed)
        except SoakError as failure:
            raise UserError(str(failure)) from None


if __name__ == "__main__":
    run_script(main)

"""Kill a run again and again, and check that it ends as an undisturbed one, bit for bit.

python -m benchmarks.soak [--kills 100] [--seed S] [--keep DIR]

Trains on the sample with two workers for 20 epochs, twice. The first run is undisturbed; its memory and open files are
measured. The second is killed (SIGKILL) `--kills` times and resumed with `--resume auto`: at random moments, every
third time during a save, every tenth time during the start. Exits with status 0 only if both runs end alike, no
checkpoint was ever damaged, no file is left over, and memory and open files stayed constant. Linux only.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/soak.py` from any folder


from model import read_checkpoint
from trainer.run.checkpoint import list_checkpoints
from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ["--sample", "--epochs", "20", "--set", "trainer.num_workers=2", "--set", "trainer.eval_steps=62"]
EVERY_STEP = ["--set", "trainer.logging_steps=1", "--set", "trainer.save_steps=5", "--resume", "auto"]
TIMING = {"pairs_per_second", "data_wait_share", "peak_memory_gib"}  # columns of the log that differ between runs
GROWTH = 1.05  # a larger factor is not constant
TIMEOUT = 600  # seconds


class SoakError(Exception):
    """A property that should hold does not."""


def soak(flags: list[str], folder: Path, kills: int, seed: int, *, is_measured: bool = True) -> None:
    """Do both runs in `folder` and compare them. Raises SoakError if a property does not hold."""
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    process = start(flags, undisturbed)
    usage_by_epoch = measure(process, undisturbed) if is_measured else []
    if process.wait() != 0:
        raise SoakError(f"the undisturbed run ended with {process.returncode}; see {log_of(undisturbed)}")
    check_constant(usage_by_epoch)

    rng = random.Random(seed)
    num_steps = last_step(undisturbed)
    for number in range(kills):
        step = round(num_steps * (number + rng.random()) / (kills + 1))
        kill_once(number, step, start(flags, killed), killed, rng)
        for file in list_checkpoints(killed / "saved_checkpoints"):
            read_checkpoint(file)  # raises UserError if it is damaged
        print(f"kill {number + 1}: after step {last_step(killed)} of {num_steps}")
    if start(flags, killed).wait() != 0:
        raise SoakError(f"the last resumed run failed; see {log_of(killed)}")
    if "skipped a checkpoint" in log_of(killed).read_text():
        raise SoakError("a resumed run found a damaged checkpoint")
    compare(undisturbed, killed)
    print(f"{kills} kills: the same weights, optimizer, random states, rows and files as the undisturbed run")


def start(flags: list[str], output: Path) -> subprocess.Popen:
    """Start or resume a run in its output folder."""
    command = [sys.executable, str(ROOT / "train.py"), *flags, *EVERY_STEP, "--output_dir", output.name]
    with log_of(output).open("ab") as log:
        return subprocess.Popen(command, cwd=output.parent, stdout=log, stderr=subprocess.STDOUT)


def log_of(output: Path) -> Path:
    """Return the file with everything that a run printed."""
    return output.with_suffix(".txt")


def kill_once(number: int, step: int, process: subprocess.Popen, output: Path, rng: random.Random) -> None:
    """Kill the run near `step`: at any moment, during a save, or during the start."""
    if number % 10 == 9:
        time.sleep(rng.uniform(0, 8))
    else:
        wait_for(process, lambda: last_step(output) >= step, interval=0.05)
        if number % 3 == 0:
            wait_for(process, lambda: any(output.glob("saved_checkpoints/*.part-*")), interval=0.002)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 0.5))
    process.kill()
    process.wait()


def wait_for(process: subprocess.Popen, is_reached: Callable[[], bool], interval: float) -> None:
    """Poll `is_reached` every `interval` seconds until it is true. Raises SoakError if the process ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not is_reached():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SoakError(f"the run ended with {process.poll()} before it could be killed")
        time.sleep(interval)


def read_rows(output: Path) -> list[dict]:
    """Return the complete rows of a run's log without the timing columns."""
    file = output / "logs" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def last_step(output: Path) -> int:
    """Return the last logged step."""
    rows = read_rows(output)
    return rows[-1]["step"] if rows else 0


def measure(process: subprocess.Popen, output: Path) -> list[tuple[int, float, int]]:
    """Return (epoch, MiB, open files) of each epoch until the run ends.

    The least memory, since a checkpoint is a copy in memory until it is written, and the median of open files.
    """
    seen: dict[int, list[tuple[float, int]]] = {}
    while process.poll() is None:
        if rows := read_rows(output):
            try:
                seen.setdefault(rows[-1]["epoch"], []).append(usage(process.pid))
            except OSError:  # it has just ended
                break
        time.sleep(0.1)
    columns = {epoch: tuple(zip(*usages, strict=True)) for epoch, usages in seen.items()}
    return [(epoch, min(memory), statistics.median_high(files)) for epoch, (memory, files) in columns.items()]


def usage(pid: int) -> tuple[float, int]:
    """Return the private written memory in MiB and the number of open files of a process and its children."""
    memory, num_files = 0.0, 0
    for process in processes_of(pid):
        lines = (process / "smaps_rollup").read_text().splitlines()
        memory += sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024
        num_files += len(list((process / "fd").iterdir()))
    return memory, num_files


def processes_of(pid: int) -> Iterator[Path]:
    """Yield the folders in /proc of a process and its children."""
    yield Path(f"/proc/{pid}")
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield Path(f"/proc/{child}")


def check_constant(usage_by_epoch: list[tuple[int, float, int]]) -> None:
    """Print the usage and raise SoakError if it grew."""
    for epoch, memory, num_files in usage_by_epoch:
        print(f"epoch {epoch:>2}  {memory:7.0f} MiB  {num_files} open files")
    early, late = usage_by_epoch[4:8], usage_by_epoch[-4:]  # both with two validations
    if not early:
        return
    for column, name in ((1, "memory"), (2, "open files")):
        before, after = (statistics.median_high(row[column] for row in rows) for rows in (early, late))
        if after > GROWTH * before:
            raise SoakError(f"{name} grew from {before:.0f} to {after:.0f}")


def compare(undisturbed: Path, killed: Path) -> None:
    """Raise SoakError if the rows, files or last checkpoints of two runs differ."""
    outputs = undisturbed, killed
    if read_rows(undisturbed) != read_rows(killed):
        raise SoakError("the rows of the log differ")
    files = [{str(file.relative_to(output)) for file in output.rglob("*")} for output in outputs]
    different = [file for file in files[0] ^ files[1] if "tfevents" not in file]  # TensorBoard writes one per start
    if different:
        raise SoakError(f"the files differ: {sorted(different)}")
    if not same(*(read_checkpoint(list_checkpoints(output / "saved_checkpoints")[-1]) for output in outputs)):
        raise SoakError("the last checkpoints differ")


def same(a: object, b: object) -> bool:
    """Return whether the contents of two checkpoints are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this empty folder and keep it")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            soak(SAMPLE, folder, args.kills, args.seed)
        except SoakError as failure:
            raise UserError(str(failure)) from None


if __name__ == "__main__":
    run_script(main)

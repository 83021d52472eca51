"""What recipes learn from Flickr8k for the compute of the reference, over several seeds.

python -m benchmarks.learning [--recipes NAME ...] [--epochs 60] [--seeds 11 12 13] [--test] [--png FILE]

Trains a small ResNet (`--model`) from scratch on the 6,000 training images of flickr8k/ in the folder CLIP_TEST_DATA,
and measures retrieval on the 1,000 validation images, by which recipes are selected; with `--test` also on the 1,000
test images, once, after training. `--epochs` are the reference's; every other recipe trains for the epochs that cost
the same number of floating-point operations in matrix products and convolutions.

The recipes are the files of trainer/recipes, each part of the best one alone, and the best one without each part. A
finished run is a line of `--results` and is not repeated; an interrupted one is resumed. The table and the drawing show
the runs that the flags select.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/learning.py` from any folder

from benchmarks.common import describe_machine, find_test_data
from dataloader.captions import CaptionSet, read_captions
from dataloader.token_table import tokenize
from model import CLIP, CLIPConfig, load_clip
from trainer.optional.word_loss import WordLoss
from trainer.run.checkpoint import list_checkpoints
from trainer.run.configs import RECIPES as RECIPE_FILES
from trainer.run.configs import load_configs
from trainer.run.flags import parse_args
from utils.config import flatten, read_yaml
from utils.errors import UserError, run_script
from utils.retrieval import retrieval_metrics

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 64
NUM_TOKENS = 32  # of the captions in most training batches
STEPS_PER_EPOCH = 6000 // BATCH_SIZE
NUM_CURVE_POINTS = 20
RECALLS = [f"{direction}_R@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
Settings = dict[str, Any]  # values by dotted key
Results = list[dict[str, Any]]


def read_recipe(name: str) -> Settings:
    """Return the settings of a file in trainer/recipes."""
    return {key: value for key, (value, _) in flatten(read_yaml(RECIPE_FILES / f"{name}.yaml"), name).items()}


BEST = read_recipe("best")
PARTS = {  # of the best recipe
    "words": ["trainer.word_loss_weight"],
    "augmentation": ["dataloader.augmentation", "dataloader.flip", "dataloader.color_jitter"],
    "token dropout": ["dataloader.token_dropout"],
    "decay": [f"trainer.optimizer.{key}" for key in ("params.lr", "params.weight_decay", "decay_timescale")],
}
RECIPES: dict[str, Settings] = {
    **{file.stem: read_recipe(file.stem) for file in sorted(RECIPE_FILES.glob("*.yaml")) if file.stem != "sample"},
    **{f"{part} alone": {key: BEST[key] for key in keys} for part, keys in PARTS.items()},
    **{f"best without {part}": {key: BEST[key] for key in BEST if key not in keys} for part, keys in PARTS.items()},
}


class Plan:
    """The runs of a recipe: `epochs` of training for the compute of `reference_epochs` of the reference."""

    def __init__(self, model: str, recipe: str, reference_epochs: int) -> None:
        self.recipe = recipe
        self.settings = RECIPES[recipe]
        self.reference_epochs = reference_epochs
        self.gflop_per_pair = gflop_per_pair(*cost_of(["--model", model, *self.flags]))
        reference = gflop_per_pair(*cost_of(["--model", model]))
        self.epochs = max(1, int(reference_epochs * reference / self.gflop_per_pair))

    @property
    def flags(self) -> list[str]:
        """The flags of train.py that select the recipe."""
        if (RECIPE_FILES / f"{self.recipe}.yaml").is_file():
            return ["--recipe", self.recipe]
        return set_flags(self.settings)

    def tflop(self, step: int) -> float:
        """Return the compute of the first `step` steps."""
        return step * BATCH_SIZE * self.gflop_per_pair / 1e3


def set_flags(settings: Settings) -> list[str]:
    """Return the flags of train.py that set values by dotted key."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value, default=str)}")]


def cost_of(flags: list[str]) -> tuple[CLIPConfig, bool]:
    """Return what the cost of a run with these flags of train.py depends on: the model, and if it has a word loss."""
    configs = load_configs(parse_args(flags, ""))
    return configs.model, configs.trainer.word_loss_weight > 0


@functools.cache
def gflop_per_pair(config: CLIPConfig, has_words: bool) -> float:
    """Return the cost of training on one pair in GFLOP, with or without the word loss.

    The backward pass costs twice the forward pass. The contrastive loss, the same in all recipes, is excluded.
    """
    model = CLIP(config).train()
    size = config.image_resolution
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model(torch.zeros(2, 3, size, size), torch.ones(2, NUM_TOKENS, dtype=torch.int64))
        if has_words:
            captions = [image.captions for image in read_split("train").images]
            word_loss = WordLoss(tokenize(captions, config.context_length), torch.device("cpu"))
            word_loss(model, *features, torch.arange(2))
    return 3 * counter.get_total_flops() / 2 / 1e9


def read_split(name: str) -> CaptionSet:
    """Return a split of Flickr8k: train, val or test."""
    data = find_test_data() / "flickr8k"
    return read_captions(data / "images", data / "annotations" / f"captions_{name}.json")


def run(plan: Plan, seed: int, folder: Path, model: str, num_workers: int) -> dict[str, Any]:
    """Train, or resume, in a process of its own; return the line of results. Raises UserError if the run fails."""
    data = find_test_data() / "flickr8k"
    output = folder / f"{plan.recipe}_{model}_{plan.reference_epochs}_{seed}".replace(" ", "_")
    settings = {
        "trainer.num_workers": num_workers,
        "trainer.per_gpu_train_batch_size": BATCH_SIZE,
        "trainer.logging_steps": STEPS_PER_EPOCH,
        "trainer.eval_steps": -(-plan.epochs // NUM_CURVE_POINTS) * STEPS_PER_EPOCH,
        "trainer.save_steps": STEPS_PER_EPOCH,
        "trainer.keep_last": 1,
        "trainer.keep_best": False,
        "trainer.seed": seed,
        "dataloader.cache": "pixels",
        "dataloader.cache_dir": folder / "cache",
    }
    flags = {
        "--model": model,
        "--epochs": plan.epochs,
        "--train_img_dir": data / "images",
        "--train_annotation_file": data / "annotations" / "captions_train.json",
        "--val_img_dir": data / "images",
        "--val_annotation_file": data / "annotations" / "captions_val.json",
        "--output_dir": output,
        "--resume": "auto",
    }
    command = [sys.executable, ROOT / "train.py", *(word for flag in flags.items() for word in flag)]
    command += [*set_flags(settings), *plan.flags]
    if subprocess.run(list(map(str, command)), cwd=ROOT).returncode:
        raise UserError(f"{plan.recipe}, seed {seed}: the run failed; repeat this command to resume it")

    rows = [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]
    validations = [row for row in rows if "val_loss" in row]
    logged = [row for row in rows if "pairs_per_second" in row]
    steps = [0, *(row["step"] for row in logged)]
    seconds = [
        (step - last) * BATCH_SIZE / row["pairs_per_second"]
        for last, step, row in zip(steps, steps[1:], logged, strict=False)
    ]
    return {
        "recipe": plan.recipe, "seed": seed, "model": model, "reference_epochs": plan.reference_epochs,
        "epochs": plan.epochs, "overrides": plan.settings, "tflop": plan.tflop(steps[-1]), "seconds": sum(seconds),
        "threads": torch.get_num_threads(), "machine": describe_machine(), "train_loss": logged[-1]["loss"],
        "val": {key: validations[-1][f"val_{key}"] for key in [*RECALLS, "mean_recall", "loss"]},
        "curve": [(plan.tflop(row["step"]), row["val_text_to_image_R@10"]) for row in validations],
        "checkpoint": str(list_checkpoints(output / "saved_checkpoints")[-1]),
    }  # fmt: skip


def measure_test(checkpoint: str) -> dict[str, float]:
    """Return the recall on the 1,000 test images."""
    test = read_split("test")
    features, _ = load_clip(checkpoint).encode_captioned(test.files, [image.captions for image in test.images])
    metrics = retrieval_metrics(*features)
    return {key: metrics[key] for key in RECALLS}


def find_result(file: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the newest line of results with the values of `key`."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = [result for result in map(json.loads, lines) if key.items() <= result.items()]
    return found[-1] if found else None


def by_recipe(results: Results) -> dict[str, Results]:
    """Return the runs of each recipe."""
    groups: dict[str, Results] = {}
    for result in results:
        groups.setdefault(result["recipe"], []).append(result)
    return groups


def format_table(results: Results, split: str) -> str:
    """Return mean and standard deviation over the seeds, one row per recipe; recalls in %."""
    lines = [f"| {split} | seeds | epochs | TFLOP | train s | loss | T2I R@1 | R@5 | R@10 | I2T R@1 | R@5 | R@10 |"]
    lines.append("|" + " --- |" * 12)
    for name, runs in by_recipe([result for result in results if split in result]).items():
        seconds = statistics.mean(result["seconds"] for result in runs)
        cells = [name, str(len(runs)), str(runs[0]["epochs"]), f"{runs[0]['tflop']:.1f}", f"{seconds:.0f}"]
        cells.append(mean_and_spread([result["train_loss"] for result in runs], 2))
        cells += [mean_and_spread([100 * result[split][key] for result in runs], 1) for key in RECALLS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_spread(values: list[float], digits: int) -> str:
    """Return "mean ± standard deviation"; the mean alone if there is one value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def draw_curves(results: Results, path: Path) -> None:
    """Draw validation recall against compute: the mean over each recipe's seeds, and a dot for the end of each run."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained", dpi=120)
    for name, runs in by_recipe(results).items():
        curves = [result["curve"] for result in runs]
        tflop = [point[0] for point in curves[0]]
        recalls = [100 * statistics.mean(recall for _, recall in points) for points in zip(*curves, strict=True)]
        line = axes.plot(tflop, recalls, label=f"{name} ({len(runs)})")[0]
        ends = [curve[-1] for curve in curves]
        axes.plot([tflop for tflop, _ in ends], [100 * recall for _, recall in ends], ".", color=line.get_color())
    axes.set_xlabel("compute of training, TFLOP")
    axes.set_ylabel("text-to-image R@10, validation, %")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, title="recipe (seeds)")
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["reference", "best"], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13], metavar="N")
    parser.add_argument("--epochs", type=int, default=60, metavar="N", help="of the reference (default: %(default)s)")
    parser.add_argument("--model", default="RN-small", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--test", action="store_true", help="measure on the test images too; not for selection")
    parser.add_argument("--results", type=Path, default=Path("learning_run/results.jsonl"), metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw recall against compute in this file")
    args = parser.parse_args(argv)
    args.results.parent.mkdir(parents=True, exist_ok=True)

    plans = [Plan(args.model, recipe, args.epochs) for recipe in args.recipes]
    results = []
    for seed in args.seeds:
        for plan in plans:
            key = {"recipe": plan.recipe, "seed": seed, "model": args.model, "reference_epochs": plan.reference_epochs}
            result = find_result(args.results, key)
            is_new = result is None
            if is_new:
                result = run(plan, seed, args.results.parent.resolve(), args.model, args.num_workers)
            if args.test and "test" not in result:
                result["test"] = measure_test(result["checkpoint"])
                is_new = True
            if is_new:
                with args.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            results.append(result)
    print(f"{args.model}, Flickr8k, {describe_machine()}\n")
    for split in ("val", "test") if args.test else ("val",):
        print(format_table(results, split), end="\n\n")
    if args.png:
        draw_curves(results, args.png)


if __name__ == "__main__":
    run_script(main)

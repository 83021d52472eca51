"""Train CLIP from scratch on images and their captions.

python train.py --sample    a small model on drawings it makes itself: minutes on a CPU, nothing to download
python train.py             the reference model on MS-COCO, from the paths in dataloader/data_config.yaml
python train.py --train_img_dir DIR --train_annotation_file FILE    any captions in COCO's format
torchrun --nproc_per_node=4 train.py    the same on four GPUs, a process each
python train.py --resume auto           goes on where the run in this folder was stopped, or begins it
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dataloader.batch import Batch
from dataloader.config import DataConfig, load_data_config
from dataloader.data_loaders import TrainLoader, open_class_set, open_train_set, open_val_set
from dataloader.order import EpochBatchSampler
from dataloader.sample import make_sample
from model import CLIP, CLIPConfig, TrainedCLIP, load_model_config
from trainer.accumulation import backward_in_chunks
from trainer.checkpoint import Checkpoints, TrainState, restore
from trainer.config import CONFIG_FILE as TRAIN_CONFIG_FILE
from trainer.config import TrainConfig, load_train_config
from trainer.interrupt import STOPPED, Interruption, parse_duration
from trainer.loss import Objective
from trainer.metrics import StepMeter
from trainer.optim import BatchNormStatistics, build_optimizer, clip_logit_scale, set_lr, take_step
from trainer.parallel import Runtime, init_runtime, without_sync, wrap
from trainer.plan import RunPlan, describe_run, make_folders, make_plan
from trainer.validation import Validation
from trainer.words import WordLoss
from utils.config import parse_override, read_yaml, to_plain
from utils.errors import UserError, run_script
from utils.logger import RunLogger
from utils.plots import plot_loss_curve

SAMPLE_DIR = Path("data/sample")
SAMPLE_CONFIG = {
    "model.name": "RN-small",
    "trainer.num_train_epochs": 40,
    "trainer.num_workers": 1,
    "trainer.optimizer.params.lr": 1e-3,
    "trainer.logging_steps": 20,
    "trainer.eval_steps": 310,
    "dataloader.cache": "pixels",
    "dataloader.cache_dir": f"{SAMPLE_DIR}/cache",
    "dataloader.train_img_dir": f"{SAMPLE_DIR}/train",
    "dataloader.train_annotation_file": f"{SAMPLE_DIR}/annotations/captions_train.json",
    "dataloader.val_img_dir": f"{SAMPLE_DIR}/val",
    "dataloader.val_annotation_file": f"{SAMPLE_DIR}/annotations/captions_val.json",
}
BEST_RECIPE = {  # of those that benchmarks/learning.py compares
    "dataloader.augmentation": "standard",
    "dataloader.flip": True,
    "dataloader.color_jitter": 0.3,
    "dataloader.token_dropout": 0.15,
    "trainer.word_loss_weight": 1.0,
    "trainer.optimizer.params.lr": 1e-3,
    "trainer.optimizer.params.weight_decay": None,
    "trainer.optimizer.decay_timescale": 11.2,
}


class Configs(NamedTuple):
    """One config a package, named as the package is."""

    model: CLIPConfig
    trainer: TrainConfig
    dataloader: DataConfig


class Run(NamedTuple):
    """What the training loop works with, beside the state that it changes."""

    config: TrainConfig
    plan: RunPlan
    runtime: Runtime
    order: EpochBatchSampler
    batches: Iterator[Batch]
    meter: StepMeter
    checkpoints: Checkpoints
    interruption: Interruption
    validation: Validation
    objective: Objective


def main(argv: list[str] | None = None) -> None:
    start = time.monotonic()
    args = parse_args(argv)
    configs = load_configs(args)
    config, data = configs.trainer, configs.dataloader

    runtime = init_runtime(config)
    with runtime.main_first():
        if args.sample:
            make_sample(SAMPLE_DIR)
        train_set, val_set, class_set = open_train_set(data), open_val_set(data), open_class_set(data)

    plan = make_plan(train_set.num_images, config, runtime)
    folders = make_folders(args.output_dir, config, runtime, args.resume)
    logger = RunLogger(folders.logs, goes_on=args.resume is not None, quiet=not runtime.is_main)
    checkpoints = Checkpoints(folders.checkpoints, config, runtime, logger)

    model = CLIP(configs.model).to(runtime.device, memory_format=torch.channels_last)
    if config.activation_checkpointing:
        model.recompute_activations()
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    state = TrainState(model, build_optimizer(model, config.optimizer, plan.weight_decay), scaler, to_plain(configs))
    checkpoint = runtime.from_main(lambda: checkpoints.find(args.resume))
    if checkpoint:
        restore(state, checkpoint, runtime, logger.info)
    logger.drop_rows_after(state.global_step)

    order = EpochBatchSampler(
        train_set.num_images,
        batch_size=plan.batch_size,
        num_epochs=config.num_train_epochs,
        seed=config.seed,
        batches_per_step=config.gradient_accumulation_steps,
        rank=runtime.rank,
        world_size=runtime.world_size,
        start_epoch=state.epoch,
        start_sample=state.sample,
    )
    plan = plan.resumed(state.global_step, order.num_steps)
    with runtime.main_first():
        loader = TrainLoader(
            train_set,
            data,
            order,
            image_size=configs.model.image_resolution,
            context_length=configs.model.context_length,
            num_workers=config.num_workers,
            device=runtime.device,
            tell=logger.info,
            warn=logger.warning,
        )
    parallel_model = wrap(model, runtime, config)
    word_loss = WordLoss(loader.captions, runtime.device) if config.word_loss_weight else None
    objective = Objective(model, config, word_loss)

    logger.info(describe_run(plan, config, runtime, model, train_set))
    logger.log_config(state.configs)
    clip = TrainedCLIP(model, data.image_mean, data.image_std)
    validation = Validation(clip, val_set, class_set, checkpoints, plan, config, runtime, logger)
    validation.warn_of_shared_images(train_set)
    meter = StepMeter(state, logger, loader, checkpoints, plan, config, runtime)
    with Interruption(args.time_limit, start) as interruption:
        run = Run(config, plan, runtime, order, iter(loader), meter, checkpoints, interruption, validation, objective)
        if validation.is_due(state):  # the run was stopped just before it
            validation.run(state)
        while state.epoch < config.num_train_epochs and not interruption.reason:
            train_one_epoch(state, parallel_model, run)
    logger.close_bar()

    if interruption.reason:
        logger.info(f"stopped by {interruption.reason} after step {state.global_step}; go on with --resume auto")
    elif runtime.is_main:
        curve = plot_loss_curve(logger.metrics_file, folders.logs / "loss_curve.png", batch_size=plan.contrast_size)
        logger.info(f"saved {checkpoints.saved}\ndrew {curve}\n{validation.describe()}".rstrip())
    folders.leave()
    runtime.close(STOPPED if interruption.reason else 0)


def train_one_epoch(state: TrainState, parallel_model: nn.Module, run: Run) -> None:
    """Show the model every image that is left of the epoch, with one of its captions, and update it step by step."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    config, plan, meter, objective = run.config, run.plan, run.meter, run.objective
    num_micro_batches = config.gradient_accumulation_steps
    statistics = BatchNormStatistics(model)
    parallel_model.train()
    for _ in range(run.order.steps_left(state.epoch, state.sample)):
        set_lr(optimizer, plan.lr(state.global_step))
        optimizer.zero_grad()
        statistics.keep()

        micro_batches = islice(run.batches, num_micro_batches)
        if config.accumulation == "contrastive":
            chunks = list(micro_batches)
            scalars = backward_in_chunks(model, parallel_model, chunks, objective, scaler)
            meter.update(state, scalars, torch.cat([chunk.indices for chunk in chunks]))
        else:
            for number, batch in enumerate(micro_batches, start=1):
                with without_sync(parallel_model, is_last=number == num_micro_batches):
                    image_features, text_features = parallel_model(batch.images, batch.tokens)  # [batch, embed_dim]
                    loss, scalars = objective(image_features, text_features, batch.indices)
                    scaler.scale(loss / num_micro_batches).backward()
                meter.update(state, scalars, batch.indices)

        grad_norm, is_skipped = take_step(model, optimizer, scaler, statistics, config.max_grad_norm)
        clip_logit_scale(model.logit_scale)
        state.global_step += 1
        state.sample += plan.pairs_per_step
        meter.end_step(state, grad_norm, is_skipped)

        stops = run.interruption.is_due(run.runtime, run.checkpoints.expected_seconds(state))
        if plan.is_due(config.logging_steps, state.global_step):
            meter.report(state)
        if run.validation.is_due(state) and not stops:
            with meter.paused():
                run.validation.run(state)
        if stops or plan.is_due(config.save_steps, state.global_step):
            meter.check(state)
            run.checkpoints.save(state)
        if stops:
            return
    state.epoch, state.sample = state.epoch + 1, 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sample", action="store_true", help="train a small model on drawings; needs no download")
    parser.add_argument("--train_img_dir", metavar="DIR", help="the training images")
    parser.add_argument("--train_annotation_file", metavar="FILE", help="their captions, in COCO's JSON format")
    parser.add_argument("--val_img_dir", metavar="DIR", help="held-out images, to measure retrieval on while training")
    parser.add_argument("--val_annotation_file", metavar="FILE", help="their captions")
    parser.add_argument("--model", metavar="NAME", help="an architecture of model/model_config.yaml")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the images")
    parser.add_argument("--batch_size", type=int, metavar="N", help="pairs per GPU, or on the CPU")
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="where checkpoints and logs go (default: here; sample_run)",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on from a checkpoint; auto: from the newest in --output_dir, if there is one",
    )
    parser.add_argument(
        "--time_limit", type=parse_duration, metavar="TIME", help="save and stop before it: 90m, 11.5h or 11:30:00"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any key of a YAML file, e.g. trainer.optimizer.params.lr=1e-3, model.embed_dim=512, "
        "dataloader.max_unreadable_share=0.05",
    )
    args = parser.parse_args(argv)
    if args.sample and (args.train_img_dir or args.train_annotation_file):
        parser.error("--sample draws its own data: leave --train_img_dir and --train_annotation_file out")
    if args.output_dir is None:
        args.output_dir = Path("sample_run" if args.sample else ".")
    return args


def load_configs(args: argparse.Namespace) -> Configs:
    """Read the three YAML files; the sample's settings, the recipe, --set and the other flags override them in turn."""
    changes = dict(map(parse_override, args.set))
    recipe = changes.get("trainer.recipe", read_yaml(TRAIN_CONFIG_FILE).get("recipe"))
    overrides = (SAMPLE_CONFIG if args.sample else {}) | (BEST_RECIPE if recipe == "best" else {}) | changes
    flags = {
        "model.name": args.model,
        "trainer.num_train_epochs": args.epochs,
        "trainer.per_gpu_train_batch_size": args.batch_size,
        "dataloader.train_img_dir": args.train_img_dir,
        "dataloader.train_annotation_file": args.train_annotation_file,
        "dataloader.val_img_dir": args.val_img_dir,
        "dataloader.val_annotation_file": args.val_annotation_file,
    }
    overrides |= {key: value for key, value in flags.items() if value is not None}
    sections = {section: [] for section in Configs._fields}
    for dotted_key, value in overrides.items():
        section, _, key = dotted_key.partition(".")
        if section not in sections or not key:
            raise UserError(f"--set {dotted_key}: should begin with {'., '.join(sections)}.")
        sections[section].append((key, value))
    trainer = load_train_config(sections["trainer"])
    sections["model"].append(("logit_bias", trainer.loss == "sigmoid"))
    data = load_data_config(sections["dataloader"])
    if trainer.word_loss_weight and data.format == "stream":
        raise UserError("word_loss_weight needs all captions at the start, which a stream has not; set it to 0")
    return Configs(model=load_model_config(sections["model"]), trainer=trainer, dataloader=data)


if __name__ == "__main__":
    run_script(main)

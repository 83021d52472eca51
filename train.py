"""Train CLIP on images and their captions.

python train.py --sample    a small model on generated drawings: minutes on a CPU, no download
python train.py             the reference model on MS-COCO, from the paths in dataloader/data_config.yaml
python train.py --train_img_dir DIR --train_annotation_file FILE    your own captions
torchrun --nproc_per_node=4 train.py    four GPUs, one process each
python train.py --resume auto           continue the run in this folder, or start it
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from trainer.run.flags import parse_args

if __name__ == "__main__":
    parse_args(None, __doc__)  # `--help` and mistyped flags end here: importing PyTorch takes seconds

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataloader.data_loaders import TrainLoader, open_data, open_dataset
from dataloader.sample import make_sample
from model import CLIP
from trainer.loss import build_objective
from trainer.optim import build_optimizer, clip_logit_scale, take_step
from trainer.optional.accumulation import backward_in_chunks
from trainer.parallel import init_runtime, without_sync, wrap
from trainer.run import summary
from trainer.run.checkpoint import CheckpointWriter, TrainState, find_checkpoint, restore
from trainer.run.configs import load_configs
from trainer.run.folder import open_run_folder
from trainer.run.logger import RunLogger
from trainer.run.stop_signal import StopSignal
from trainer.run.train_meter import SpeedMeter
from trainer.run.validation import Validation
from trainer.schedule import Schedule, make_sampler
from utils.errors import run_script

SAMPLE_DIR = Path("data/sample")


def main(argv: list[str] | None = None) -> None:
    start = time.monotonic()
    args = parse_args(argv, __doc__)
    configs = load_configs(args)  # the packages' YAML files <- recipe <- --config FILE <- flags
    config = configs.trainer
    runtime = init_runtime(config)  # device, processes, precision, seed
    with runtime.main_first():
        if args.sample:
            make_sample(SAMPLE_DIR)
        data = open_data(configs.dataloader)  # training, validation and class sets

    with (
        open_run_folder(args.output_dir, config, args.resume, is_main=runtime.is_main) as folder,
        RunLogger(folder.logs, append=args.resume is not None, enabled=runtime.is_main) as logger,
        summary.explain_out_of_memory(config, runtime),
    ):
        identity = runtime.on_main(data.identify)  # a fingerprint of the training images and captions
        same_data = {"training_data": identity, "allow_other_data": args.allow_other_data}
        # the contents of the checkpoint to resume, or None; rank 0 reads it for all
        checkpoint = runtime.on_main(lambda: find_checkpoint(args.resume, folder.checkpoints, logger, **same_data))
        sampler = make_sampler(data.train.num_images, config, runtime, checkpoint)

        model = CLIP(configs.model).to(runtime.device, memory_format=torch.channels_last)
        if config.activation_checkpointing:
            model.recompute_activations()
        optimizer = build_optimizer(model, config.optimizer, sampler.steps_per_epoch)  # decay is set in epochs
        scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        state = TrainState(model, optimizer, scaler, configs, training_data=identity)
        if checkpoint:
            restore(state, checkpoint, runtime, logger)
            del checkpoint  # 1.2 GB of an RN50
        logger.drop_rows_after(state.global_step)
        schedule = Schedule(config, sampler, state.global_step)

        with runtime.main_first():  # rank 0 builds the image cache, if one is configured
            inputs = {"image_size": configs.model.image_resolution, "context_length": configs.model.context_length}
            inputs |= {"image_mean": configs.model.image_mean, "image_std": configs.model.image_std}
            options = {**inputs, "num_workers": config.num_workers, "logger": logger}
            dataset = open_dataset(data.train, configs.dataloader, sampler, **options)
        loader = TrainLoader(dataset, sampler, runtime.device, config.num_workers, logger)
        objective = build_objective(model, config, dataset.captions)  # contrastive, and the captions' words
        parallel_model = wrap(model, runtime, config)  # DataParallel, DistributedDataParallel, autocast, compile

        validation = Validation(data, state, schedule, runtime)
        writer = CheckpointWriter(folder.checkpoints, model, config, runtime, logger)
        speed = SpeedMeter(loader, schedule.pairs_per_step, state.global_step)
        counts = runtime.on_main(lambda: data.count(configs.model.context_length))
        logger.info(summary.describe_run(schedule, runtime, state, data, counts))
        logger.log_setup(configs, counts)
        validation.warn_if_trained_on(data.train, logger)

        batches = iter(loader)
        bar = tqdm(
            total=schedule.total_steps,
            initial=state.global_step,
            unit="step",
            disable=None if runtime.is_main else True,
        )
        with StopSignal(args.time_limit, start) as stop, bar, writer:
            if validation.is_due():  # a stop postponed it
                validate(state, validation, writer, logger)
            while state.epoch < config.num_train_epochs and not stop.reason:
                for grad_norm in train_one_epoch(state, parallel_model, batches, objective, schedule):
                    bar.update()
                    if state.global_step == schedule.first_step + 2:
                        logger.info(summary.describe_memory(config, runtime))
                    stop_now = stop.requested(runtime, writer.expected_seconds)  # the same on all ranks
                    if schedule.is_due(config.logging_steps, state.global_step):
                        state.meter.check_skipped(config.max_skipped_steps, logger)
                        row = summary.training_row(state, grad_norm, speed, runtime)
                        state.meter.reset()
                        logger.log_training(row, schedule.seconds_left(state.global_step, row["pairs_per_second"]), bar)
                        if advice := speed.advice(row):
                            logger.info(advice)
                    if validation.is_due() and not stop_now:
                        with speed.paused():
                            validate(state, validation, writer, logger)
                    if stop_now or schedule.is_due(config.save_steps, state.global_step):
                        state.meter.check_skipped(config.max_skipped_steps, logger)  # raises before a useless save
                        writer.save(state)
                    if stop_now:
                        break

        if stop.reason:
            logger.info(f"stopped by {stop.reason} after step {state.global_step}; continue with --resume auto")
        elif runtime.is_main:
            curve = logger.draw_loss_curve(schedule.pairs_per_loss)
            logger.info(summary.describe_results(folder, curve, data, validation.metrics))
    runtime.close(stop.exit_status)


def train_one_epoch(
    state: TrainState, parallel_model: nn.Module, batches: Iterator, objective: Callable, schedule: Schedule
) -> Iterator[Tensor]:
    """Train on every remaining image of the epoch once. After each optimizer step yield the gradient norm, a scalar.

    The caller may stop between two steps: a resumed run continues from `state.position`.
    """
    config = schedule.config
    micro_batches_per_step = config.gradient_accumulation_steps
    parallel_model.train()
    for _ in range(schedule.steps_left(state.position)):
        schedule.set_lr(state.optimizer, state.global_step)
        state.optimizer.zero_grad()
        state.batchnorm.snapshot()  # a skipped step restores these statistics
        micro_batches = islice(batches, micro_batches_per_step)
        if config.accumulation == "contrastive":  # one loss over the pairs of all micro-batches
            losses = [backward_in_chunks(parallel_model, list(micro_batches), objective, state.scaler)]
        else:
            losses = []
            for number, batch in enumerate(micro_batches, start=1):
                with without_sync(parallel_model, is_last=number == micro_batches_per_step):
                    image_features, text_features = parallel_model(batch.images, batch.tokens)  # [batch, embed_dim]
                    loss, scalars = objective(image_features, text_features, batch.indices)
                    state.scaler.scale(loss / micro_batches_per_step).backward()
                losses.append(scalars)
        grad_norm, is_skipped = take_step(
            state.model, state.optimizer, state.scaler, state.batchnorm, config.max_grad_norm
        )
        clip_logit_scale(state.model.logit_scale)
        state.meter.update(losses, is_skipped)
        state.global_step += 1
        state.samples_seen += schedule.pairs_per_step
        yield grad_norm
    state.epoch, state.samples_seen = state.epoch + 1, 0


def validate(state: TrainState, validation: Validation, writer: CheckpointWriter, logger: RunLogger) -> None:
    """Measure, log, and save `best.pt` if the best metric improved."""
    metrics = validation.run(logger)
    state.validated_step = state.global_step
    logger.log_validation(state.global_step, state.epoch, metrics)
    if (score := validation.score(metrics)) > state.best:
        state.best = score
        writer.save_best(state)


if __name__ == "__main__":
    run_script(main)

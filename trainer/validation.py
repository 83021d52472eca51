"""What the model makes of images that it does not train on, measured every so many steps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dataloader.captions import CaptionSet
from dataloader.classification import ClassificationSet
from dataloader.stream import ShardStream
from model import TrainedCLIP
from trainer.checkpoint import Checkpoints, TrainState
from trainer.config import TrainConfig
from trainer.evaluation import CaptionFeatures, encode_captions, encode_sources
from trainer.loss import LOSSES
from trainer.parallel import Runtime
from trainer.plan import RunPlan
from utils.logger import RunLogger
from utils.retrieval import FOLD_SIZE, fold_metrics, format_metrics, retrieval_metrics
from utils.zero_shot import build_classifier, zero_shot_accuracy


class Validation:
    """Retrieval on `val_set`, and zero-shot accuracy on `class_set`; either may be None.

    Every process encodes its share of the images with the bare model; the main one counts, logs a row, and saves
    `best.pt` where the `best_metric` improved.
    """

    def __init__(
        self,
        clip: TrainedCLIP,
        val_set: CaptionSet | None,
        class_set: ClassificationSet | None,
        checkpoints: Checkpoints,
        plan: RunPlan,
        config: TrainConfig,
        runtime: Runtime,
        logger: RunLogger,
    ) -> None:
        self.clip = clip
        self.val_set = val_set
        self.class_set = class_set
        self.checkpoints = checkpoints
        self.plan = plan
        self.config = config
        self.runtime = runtime
        self.logger = logger
        self.loading = {
            "batch_size": config.per_gpu_eval_batch_size,
            "num_workers": config.num_workers,
            "shows_progress": runtime.is_main,
        }
        self.metrics: dict[str, float] = {}  # of the last validation

    def warn_of_shared_images(self, train_set: CaptionSet | ShardStream) -> None:
        """Tell how many validation images are trained on; of a stream nobody knows."""
        is_known = self.val_set is not None and isinstance(train_set, CaptionSet)
        shared = shared_images(self.val_set, train_set) if is_known else []
        if shared:
            self.logger.warning(
                f"{len(shared):,} of the {self.val_set.num_images:,} validation images are trained on (e.g. "
                f"{shared[0]}): their recall says little; for a train2017 model use val2017"
            )

    def is_due(self, state: TrainState) -> bool:
        """Return whether the step that was just taken, and not validated yet, should be."""
        every = self.config.eval_steps or self.plan.steps_per_epoch
        is_new = state.global_step > state.validated_step
        return is_new and self.plan.is_due(every, state.global_step) and bool(self.val_set or self.class_set)

    def run(self, state: TrainState) -> None:
        """Measure, log and keep the best. Every process calls it; the model is in training mode after it."""
        self.runtime.share_buffers(state.model)
        state.model.eval()
        metrics: dict[str, float] = {}
        if self.val_set:
            features = self._encode(self.val_set)
            if self.runtime.is_main:
                metrics |= self._retrieval(state, features)
        if self.class_set:
            metrics |= self._zero_shot(self.class_set)
        state.model.train()
        state.validated_step = state.global_step
        if self.runtime.is_main:
            self.metrics = metrics
            named = {f"val_{name}": value for name, value in metrics.items()}
            self.logger.write_row({"step": state.global_step, "epoch": state.epoch, **named}, self._in_a_line(state))
            self._keep_best(state)

    def describe(self) -> str:
        """Return the last figures as a small table."""
        lines = []
        if self.val_set and self.metrics:
            num_images, num_captions = self.val_set.num_images, self.val_set.num_captions
            lines.append(f"retrieval on {num_images:,} held-out images, {num_captions:,} captions")
            lines.append(format_metrics(self.metrics))
        if "zero_shot_top1" in self.metrics:
            lines.append(f"zero-shot top-1 accuracy {self.metrics['zero_shot_top1']:.2f} %")
        return "\n".join(lines)

    def _encode(self, val_set: CaptionSet) -> CaptionFeatures:
        """Encode the images and captions, each process its own share; in the order of the images, each counted once."""
        own = range(self.runtime.rank, val_set.num_images, self.runtime.world_size)
        part = None
        if own:
            features, readable, _ = encode_captions(self.clip, val_set.take(own), **self.loading)
            if self.runtime.world_size == 1:
                return features
            part = CaptionFeatures(*(tensor.cpu() for tensor in features)), [own[number] for number in readable]
        parts = [part for part in self.runtime.collect(part) if part]
        numbers = torch.tensor([number for _, readable in parts for number in readable])
        place = numbers.argsort().argsort()  # of each image, as the parts have them, in the order of the set
        starts = torch.tensor([0, *(len(readable) for _, readable in parts)]).cumsum(0).tolist()
        owners = [part.image_of_text + start for (part, _), start in zip(parts, starts, strict=False)]
        images = torch.cat([part.images for part, _ in parts])[place.argsort()]
        device = self.runtime.device
        texts = torch.cat([part.texts for part, _ in parts])
        return CaptionFeatures(images.to(device), texts.to(device), place[torch.cat(owners)].to(device))

    @torch.no_grad()
    def _retrieval(self, state: TrainState, features: CaptionFeatures) -> dict[str, float]:
        metrics = {"loss": self._loss(state, features), **retrieval_metrics(*features)}
        recalls = [value for name, value in metrics.items() if "R@" in name]
        metrics["mean_recall"] = sum(recalls) / len(recalls)
        if len(features.images) > FOLD_SIZE:
            folds, _ = fold_metrics(*features)
            metrics |= {f"1k_{name}": value for name, value in folds.items()}
        return metrics

    def _loss(self, state: TrainState, features: CaptionFeatures) -> float:
        """Return the mean loss of batches as large as training's, of each image with its first caption."""
        model, num_images = state.model, len(features.images)
        numbers = torch.arange(len(features.texts), device=features.texts.device)
        first = torch.full((num_images,), len(numbers), device=numbers.device)
        first = first.scatter_reduce(0, features.image_of_text, numbers, "amin")
        size = min(self.plan.contrast_size, num_images)
        losses = []
        for start in range(0, num_images - size + 1, size):
            texts = features.texts[first[start : start + size]]
            images = features.images[start : start + size]
            loss, _ = LOSSES[self.config.loss](images, texts, model.logit_scale.exp(), model.logit_bias, gathers=False)
            losses.append(loss)
        return torch.stack(losses).mean().item()

    def _zero_shot(self, class_set: ClassificationSet) -> dict[str, float]:
        own = range(self.runtime.rank, len(class_set.images), self.runtime.world_size)
        part: tuple[Tensor, Tensor] | None = None
        if own:
            images = [class_set.images[number] for number in own]
            indices, features, _ = encode_sources(self.clip, images, **self.loading)
            part = torch.tensor(own)[indices.cpu()], features.cpu()
        parts: Sequence[tuple[Tensor, Tensor]] = [part for part in self.runtime.collect(part) if part]
        if not self.runtime.is_main:
            return {}
        indices, features = (torch.cat(column) for column in zip(*parts, strict=True))
        classifier = build_classifier(self.clip.model, class_set.classnames).cpu()
        top1, top5 = zero_shot_accuracy(features, torch.tensor(class_set.labels)[indices], classifier).percentages()
        return {"zero_shot_top1": top1, "zero_shot_top5": top5}

    def _keep_best(self, state: TrainState) -> None:
        value = self.metrics.get(self.config.best_metric, math.nan)
        value = -value if self.config.best_metric == "loss" else value
        if value > state.best:
            state.best = value
            self.checkpoints.save_best(state)

    def _in_a_line(self, state: TrainState) -> str:
        words = [f"epoch {state.epoch:>2}  step {state.global_step:>5}  validation"]
        if self.val_set:
            words.append(f"loss {self.metrics['loss']:.3f}")
            for name, short in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
                figures = "/".join(f"{100 * self.metrics[f'{name}_R@{k}']:.1f}" for k in (1, 5, 10))
                words.append(f"{short} R@1/5/10 {figures} %")
        if self.class_set:
            words.append(f"zero-shot top-1 {self.metrics['zero_shot_top1']:.1f} %")
        return "  ".join(words)


def shared_images(val_set: CaptionSet, train_set: CaptionSet) -> list[int | str]:
    """Return the ids of validation images that are trained on: the same id, and a caption in common.

    Karpathy's test split lies by some 88 % in COCO's train2017.
    """
    training = {image.image_id: image.captions for image in train_set.images}
    return [
        image.image_id
        for image in val_set.images
        if not set(image.captions).isdisjoint(training.get(image.image_id, ()))
    ]

"""Retrieval and zero-shot accuracy on held-out images, measured while training."""

import math

import torch
from torch import Tensor

from dataloader.captions import CaptionSet
from dataloader.counts import find_shared, require_complete
from dataloader.data_loaders import OpenedData
from dataloader.storage.stream import ShardStream
from model import CLIP, TrainedCLIP
from model.pretrained.inference import CaptionFeatures
from trainer.loss import LOSSES
from trainer.parallel import Runtime
from trainer.run.checkpoint import TrainState
from trainer.run.logger import RunLogger
from trainer.schedule import Schedule
from utils.errors import UserError
from utils.retrieval import FOLD_SIZE, fold_metrics, retrieval_metrics
from utils.zero_shot import zero_shot_accuracy


class Validation:
    """Measures retrieval on `data.val` and zero-shot accuracy on `data.classes`; either may be None.

    Every process encodes its share of the images with the bare model; rank 0 computes the metrics.
    """

    def __init__(self, data: OpenedData, state: TrainState, schedule: Schedule, runtime: Runtime) -> None:
        config = schedule.config
        self.clip = TrainedCLIP(state.model)
        self.data_config = state.configs.dataloader
        self.val_set = data.val
        self.class_set = data.classes
        self.state = state
        self.schedule = schedule
        self.config = config
        self.runtime = runtime
        self.metrics: dict[str, float] = {}  # of the last validation
        self.loading = {
            "batch_size": config.per_gpu_eval_batch_size,
            "num_workers": config.num_workers,
            "show_progress": runtime.is_main,
        }

    def is_due(self) -> bool:
        """Return whether the last step is to be followed by a validation, and was not yet."""
        step = self.state.global_step
        is_new = step > self.state.validated_step and bool(self.val_set or self.class_set)
        return is_new and self.schedule.is_due(self.config.eval_steps, step)

    def warn_if_trained_on(self, train_set: CaptionSet | ShardStream, logger: RunLogger) -> None:
        """Log the number of validation images that are training images too; for a stream it is unknown."""
        is_known = self.val_set and isinstance(train_set, CaptionSet) and self.runtime.is_main
        shared = find_shared(self.val_set, train_set) if is_known else []
        if shared:
            logger.warning(
                f"{len(shared):,} of the {self.val_set.num_images:,} validation images are also training images (e.g. "
                f"{shared[0]}), so their recall measures memorization; for a train2017 model use val2017"
            )

    def run(self, logger: RunLogger) -> dict[str, float]:
        """Return the metrics by name on rank 0, nothing on the others. Every process calls it.

        `loss`, `image_to_text_R@1` and so on in [0, 1], `mean_recall`, the same with `1k_` as means over folds of
        1,000 images, `zero_shot_top1` and `zero_shot_top5` in %, and the numbers of images behind them. Where too many
        images are unreadable, a warning is logged and there is no figure. The model is in training mode afterwards.
        """
        model = self.clip.model
        self.runtime.broadcast_buffers(model)
        model.eval()
        metrics: dict[str, float] = {}
        if self.val_set:
            features, unreadable = self._encode(self.val_set)
            missing = self.val_set.missing
            if self.runtime.is_main and self._is_complete(self.val_set.num_images, missing, unreadable, logger):
                metrics |= self._retrieval(features)
                metrics |= {"images": len(features.images), "images_left_out": len(missing) + len(unreadable)}
        if self.class_set:
            metrics |= self._zero_shot(logger)
        model.train()
        self.metrics = metrics
        return metrics

    def score(self, metrics: dict[str, float]) -> float:
        """Return the `best_metric`, larger is better; NaN where it was not measured."""
        value = metrics.get(self.config.best_metric, math.nan)
        return -value if self.config.best_metric == "loss" else value

    def _share(self, num_images: int) -> range:
        """Return the indices of this process's images."""
        return range(self.runtime.rank, num_images, self.runtime.world_size)

    def _is_complete(self, num_images: int, missing: list[str], unreadable: list[str], logger: RunLogger) -> bool:
        """Return whether enough images are left for a figure, and log a warning if not."""
        if self.data_config.allow_missing:
            return True
        try:
            require_complete(num_images + len(missing), [*missing, *unreadable], self.data_config.max_unreadable_share)
        except UserError as error:
            logger.warning(str(error))
            return False
        return True

    def _encode(self, val_set: CaptionSet) -> tuple[CaptionFeatures, list[str]]:
        """Encode the images and captions, each process its share; return also the unreadable images.

        The features are in the order of the images, each counted once.
        """
        own, part = self._share(val_set.num_images), None
        if own:
            share = val_set.take(own)
            captions = [image.captions for image in share.images]
            features, encoded = self.clip.encode_captioned(share.files, captions, **self.loading)
            numbers = torch.tensor(own)[encoded.indices.cpu()]  # of the images in the set
            owners = numbers[features.image_of_text.cpu()]  # of the texts
            part = (
                [failure.path for failure in encoded.failures],
                numbers,
                features.images.cpu(),
                owners,
                features.texts.cpu(),
            )
        parts = [part for part in self.runtime.all_gather_object(part) if part]
        unreadable, *columns = zip(*parts, strict=True)
        numbers, images, owners, texts = map(torch.cat, columns)
        order = numbers.argsort()
        image_of_text = torch.searchsorted(numbers[order], owners)
        features = CaptionFeatures(*(part.to(self.runtime.device) for part in (images[order], texts, image_of_text)))
        return features, sum(unreadable, [])

    @torch.no_grad()
    def _retrieval(self, features: CaptionFeatures) -> dict[str, float]:
        metrics = {"loss": self._loss(self.clip.model, features), **retrieval_metrics(*features)}
        recalls = [value for name, value in metrics.items() if "R@" in name]
        metrics["mean_recall"] = sum(recalls) / len(recalls)
        if len(features.images) > FOLD_SIZE:
            folds, _ = fold_metrics(*features)
            metrics |= {f"1k_{name}": value for name, value in folds.items()}
        return metrics

    def _loss(self, model: CLIP, features: CaptionFeatures) -> float:
        """Return the mean loss of batches of training's size, of each image with its first caption."""
        num_images = len(features.images)
        numbers = torch.arange(len(features.texts), device=features.texts.device)
        first = torch.full((num_images,), len(numbers), device=numbers.device)
        first = first.scatter_reduce(0, features.image_of_text, numbers, "amin")
        size, loss_function = min(self.schedule.pairs_per_loss, num_images), LOSSES[self.config.loss]
        losses = []
        for start in range(0, num_images - size + 1, size):
            texts = features.texts[first[start : start + size]]
            images = features.images[start : start + size]
            scale, bias = model.logit_scale.exp(), model.logit_bias
            losses.append(loss_function(images, texts, scale, bias, across_ranks=False)[0])
        return torch.stack(losses).mean().item()

    def _zero_shot(self, logger: RunLogger) -> dict[str, float]:
        own = self._share(len(self.class_set.images))
        part: tuple[list[str], Tensor, Tensor] | None = None
        if own:
            images = [self.class_set.images[number] for number in own]
            encoded = self.clip.encode_readable(images, **self.loading)
            unreadable = [failure.path for failure in encoded.failures]
            part = unreadable, torch.tensor(own)[encoded.indices.cpu()], encoded.features.cpu()
        parts = [part for part in self.runtime.all_gather_object(part) if part]
        if not self.runtime.is_main:
            return {}
        unreadable, *columns = zip(*parts, strict=True)
        indices, features = map(torch.cat, columns)
        num_images, unreadable = len(self.class_set.images), sum(unreadable, [])
        if not self._is_complete(num_images, [], unreadable, logger):
            return {}
        classifier = self.clip.build_classifier(self.class_set.classnames).cpu()
        top1, top5 = zero_shot_accuracy(
            features, torch.tensor(self.class_set.labels)[indices], classifier
        ).percentages()
        numbers = {"zero_shot_images": len(indices), "zero_shot_images_left_out": len(unreadable)}
        return {"zero_shot_top1": top1, "zero_shot_top5": top5, **numbers}

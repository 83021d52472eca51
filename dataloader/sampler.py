"""The order of the training images, a function of the seed, the epoch and the position in it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from utils.image_loader import Failure


class Batch(NamedTuple):
    """One micro-batch of one process."""

    images: Tensor  # [batch, 3, size, size]: uint8 from a dataset, normalized float32 from `TrainLoader`
    tokens: Tensor  # int64 [batch, length]
    indices: Tensor  # int64 [batch], of the images in the training set; -1 in a stream
    draws: np.ndarray  # float64 [batch, NUM_DRAWS] in [0, 1), the random numbers of each sample
    failures: list[Failure]


class BatchLayout(NamedTuple):
    """How the pairs of an optimizer step are divided among processes and micro-batches."""

    batch_size: int  # pairs of one micro-batch of one process
    batches_per_step: int = 1  # micro-batches that each process accumulates
    rank: int = 0
    world_size: int = 1  # number of processes

    @property
    def pairs_per_step(self) -> int:
        """Number of pairs of an optimizer step over all processes."""
        return self.batch_size * self.batches_per_step * self.world_size


class Position(NamedTuple):
    """How far a run has come."""

    epoch: int = 0
    samples_seen: int = 0  # of this epoch, over all processes


START = Position()


class EpochSampler:
    """Iterate over the micro-batches of one process from `start` to the end of the run, as lists of (epoch, index).

    Each epoch is a new permutation of the images, cut to whole optimizer steps. All epochs form one sequence, so that
    loader workers prefetch across the end of an epoch.
    """

    def __init__(
        self, num_samples: int, layout: BatchLayout, *, num_epochs: int, seed: int, start: Position = START
    ) -> None:
        self.num_samples = num_samples
        self.layout = layout
        self.num_epochs = num_epochs
        self.seed = seed
        self.start = start

    def __len__(self) -> int:
        return self.layout.batches_per_step * self.num_steps

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps from `start` to the end of the run."""
        later_epochs = max(0, self.num_epochs - self.start.epoch - 1)
        return self.steps_left(self.start) + later_epochs * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of a whole epoch."""
        return self.num_samples // self.layout.pairs_per_step

    def steps_left(self, position: Position) -> int:
        """Return the number of optimizer steps from `position` to the end of its epoch, 0 after the last epoch."""
        if position.epoch >= self.num_epochs:
            return 0
        return max(0, self.num_samples - position.samples_seen) // self.layout.pairs_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch_size, batches_per_step, rank, world_size = self.layout
        position = self.start
        while position.epoch < self.num_epochs:
            order = np.random.default_rng((self.seed, position.epoch)).permutation(self.num_samples)
            for batch in range(batches_per_step * self.steps_left(position)):
                first = position.samples_seen + (batch * world_size + rank) * batch_size
                yield [(position.epoch, index) for index in order[first : first + batch_size].tolist()]
            position = Position(position.epoch + 1)

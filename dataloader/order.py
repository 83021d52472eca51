"""Which images make up which batch of a run: a function of the seed, the epoch and the place in it."""

from collections.abc import Iterator

import numpy as np


class EpochBatchSampler:
    """Batches of (epoch, index) for a whole run: each epoch a new permutation, cut to whole optimizer steps.

    One stream for all epochs, so that the workers read on where one ends and the next begins. Of `world_size`
    processes each takes its own part of a batch of batch_size * world_size; a step takes `batches_per_step` of them.
    A resumed run starts after the first `start_sample` images of `start_epoch`.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        num_epochs: int,
        seed: int,
        batches_per_step: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start_epoch: int = 0,
        start_sample: int = 0,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_epochs = num_epochs
        self.seed = seed
        self.batches_per_step = batches_per_step
        self.rank = rank
        self.world_size = world_size
        self.start_epoch = start_epoch
        self.start_sample = start_sample

    def __len__(self) -> int:
        return self.batches_per_step * self.num_steps

    @property
    def num_steps(self) -> int:
        """The optimizer steps of the whole run that are left."""
        later_epochs = max(0, self.num_epochs - self.start_epoch - 1)
        return self.steps_left(self.start_epoch, self.start_sample) + later_epochs * self.steps_left(0, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, first in self._epochs():
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            for batch in range(self.batches_per_step * self.steps_left(epoch, first)):
                start = first + (batch * self.world_size + self.rank) * self.batch_size
                yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]

    def steps_left(self, epoch: int, sample: int) -> int:
        """Return the optimizer steps of an epoch after its first `sample` images; none after the last epoch."""
        pairs_per_step = self.batch_size * self.world_size * self.batches_per_step
        return (self.num_samples - sample) // pairs_per_step if epoch < self.num_epochs else 0

    def _epochs(self) -> Iterator[tuple[int, int]]:
        """Yield each epoch with the images of it that are done."""
        for epoch in range(self.start_epoch, self.num_epochs):
            yield epoch, self.start_sample if epoch == self.start_epoch else 0

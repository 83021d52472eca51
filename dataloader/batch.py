"""What the loaders hand to the training loop."""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Failure(NamedTuple):
    """An image that could not be read."""

    path: str
    reason: str


class Batch(NamedTuple):
    """A training batch."""

    images: Tensor | None  # uint8, and from `TrainLoader` float32, normalized: [batch, 3, size, size]
    tokens: Tensor  # int64 [batch, length]
    indices: Tensor  # int64 [batch], of the training set's images; -1 in a stream
    draws: np.ndarray  # float64 [batch, NUM_DRAWS], the random numbers of each sample
    failures: list[Failure]

"""Counter-based randomness: every draw is a pure function of (seed, purpose, index).

There is no generator state, so a sample's draws do not depend on the rank, the world size, the batch size, the
order of calls, or how often a run was resumed. The generator is NumPy's Philox, a counter-based one: the seed and the
purpose are its key, the sample's index its counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a draw is for. Each purpose has its own stream, so adding one never shifts the others."""

    TRAINING_NOISE = 0
    TIMESTEP = 1
    CONDITION_DROP = 2
    FLIP = 3
    DATA_ORDER = 4
    SAMPLING_NOISE = 5
    SAMPLING_STEP_NOISE = 6


def generator(seed: int, stream: Stream, index: int) -> np.random.Generator:
    """Return the generator of one (seed, purpose, index).

    Args:
        seed: the run's seed, >= 0.
        stream: what the draw is for.
        index: which draw of that purpose: a global sample index, an epoch, an image number; >= 0.

    Raises:
        OverflowError: when the seed or the index lies outside [0, 2^64).
    """
    # uint64 arrays, not lists: NumPy turns a list that holds a number above 2^63 into float64, so that neighbouring seeds
    # would share a key, and wraps a negative one.
    key = np.array([seed, int(stream)], dtype=np.uint64)
    # The index goes into the counter's high words: the low word is left to count the draws made at this index.
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def standard_normal(seed: int, stream: Stream, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return N(0, I) noise of the given shape, float32."""
    return generator(seed, stream, index).standard_normal(shape, dtype=np.float32)


def uniform(seed: int, stream: Stream, index: int) -> float:
    """Return one uniform draw in [0, 1)."""
    return float(generator(seed, stream, index).random())


def permutation(seed: int, stream: Stream, index: int, length: int) -> np.ndarray:
    """Return a random order of range(length), int64."""
    return generator(seed, stream, index).permutation(length)

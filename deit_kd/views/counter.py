"""Random numbers by their index, so that a view's never depend on the batch it is drawn in (Steele et al. 2014)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.special import betaincinv, ndtri

from deit_kd.randomness import derive

_STEP = np.uint64(0x9E3779B97F4A7C15)
QUANTILES = 1 << 14  # a continuous distribution is drawn as one of this many equally likely values


def streams(stream: str, seed: int, ids: np.ndarray) -> np.ndarray:
    """Return the start [n] of one stream of words for each of `ids` [n, k]; k non-negative integers name a stream."""
    start = np.full(len(ids), derive(stream, seed), np.uint64)
    for column in ids.T:
        start = _scrambled(start + (column.astype(np.uint64) + np.uint64(1)) * _STEP)
    return start


def words(starts: np.ndarray, first: int, count: int) -> np.ndarray:
    """Return the words `first` to `first + count` of each stream: [n, count] of 64 bits."""
    places = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _STEP
    return _scrambled(starts[:, None] + places)


def fractions(random_words: np.ndarray) -> np.ndarray:
    """Return `random_words` as fractions in [0, 1), multiples of 2**-32."""
    return (random_words >> np.uint64(32)) * 2.0**-32


def below(random_words: np.ndarray, bounds: np.ndarray | int) -> np.ndarray:
    """Return integers in [0, bound)."""
    product = (random_words >> np.uint64(32)) * np.asarray(bounds, np.uint64)
    return (product >> np.uint64(32)).astype(np.int64)


def normal_quantiles(count: int = QUANTILES) -> np.ndarray:
    """Return `count` equally likely values of the standard normal distribution, rising."""
    return _settled(ndtri(_midpoints(count)))


@lru_cache(maxsize=8)
def beta_quantiles(alpha: float) -> np.ndarray:
    """Return equally likely values of Beta(alpha, alpha), rising."""
    return _settled(betaincinv(alpha, alpha, _midpoints(QUANTILES)))


def log_uniform_quantiles(low: float, high: float) -> np.ndarray:
    """Return equally likely values between `low` and `high` whose logarithm is uniform, rising."""
    return _settled(np.exp(np.log(low) + np.log(high / low) * _midpoints(QUANTILES)))


def _midpoints(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


def _settled(values: np.ndarray) -> np.ndarray:
    # Machines differ in the last bits of exp and log: they are rounded off.
    return values.astype(np.float32).astype(np.float64)


def _scrambled(state: np.ndarray) -> np.ndarray:
    # SplitMix64's output function: every bit of the state reaches every bit of the word.
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))

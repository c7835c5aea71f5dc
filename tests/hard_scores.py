"""Scores that are hard on a mask solver, by name: [rows, columns], non-negative, finite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Generator = np.random.Generator


def _normal(rng: Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.abs(rng.standard_normal(shape))


def _bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)


def _sparse(rng: Generator, shape: tuple[int, int]) -> np.ndarray:
    return _normal(rng, shape) * (rng.random(shape) < 0.1)


def _one_huge(rng: Generator, shape: tuple[int, int]) -> np.ndarray:
    scores = _normal(rng, shape)
    scores[rng.integers(shape[0]), rng.integers(shape[1])] = 1e30
    return scores


def _scaled_lines(rng: Generator, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = np.exp(3 * rng.standard_normal((shape[0], 1))), np.exp(3 * rng.standard_normal(shape[1]))
    return _normal(rng, shape) * rows * columns


# These have one optimal mask per block (with probability one, at float32 resolution nearly so).
CONTINUOUS: dict[str, Callable[[Generator, tuple[int, int]], np.ndarray]] = {
    "normal": _normal,
    "cubed": lambda rng, shape: _normal(rng, shape) ** 3,
    "scaled lines": _scaled_lines,
}
# And these many.
TIED: dict[str, Callable[[Generator, tuple[int, int]], np.ndarray]] = {
    "bf16": lambda rng, shape: _bf16(_normal(rng, shape)),
    "quarters": lambda rng, shape: np.rint(4 * _normal(rng, shape)) / 4,
    "integers": lambda rng, shape: rng.integers(0, 4, shape).astype(float),
    "all equal": lambda _rng, shape: np.full(shape, 0.3),
    "zeros": lambda _rng, shape: np.zeros(shape),
    "sparse": _sparse,
    "one huge": _one_huge,
    "denormal": lambda rng, shape: _normal(rng, shape) * 1e-40,
    "largest floats": lambda rng, shape: rng.random(shape) * 3.4e38,
    "identity": lambda _rng, shape: np.indices(shape)[0] % 7 == np.indices(shape)[1] % 7,
    "sums of lines": lambda rng, shape: rng.random((shape[0], 1)) + rng.random(shape[1]),  # every mask is optimal
    "rank one": lambda rng, shape: _normal(rng, (shape[0], 1)) * _normal(rng, (1, shape[1])),
}
ALL = CONTINUOUS | TIED


def make(name: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """The scores called `name`, float32 [rows, columns], C-contiguous."""
    return np.ascontiguousarray(ALL[name](np.random.default_rng(seed), shape), np.float32)

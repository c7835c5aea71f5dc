"""Powers and logarithms to the base 2 of float32 vectors, with the same bits on every machine."""

from __future__ import annotations

import numpy as np

from tsenor_cli.kernels.compilation import compiled
from tsenor_cli.kernels.contract import Untyped
from tsenor_cli.kernels.lanes import as_bits, as_float32, as_int32, from_bits, larger, smaller, spread, where

_BIAS = np.float32(127.0)
_LIMIT = np.float32(126.0)
# 2^f on [0, 1], highest power first: largest relative error 2e-7 (found by a minimax fit, checked by the tests).
_P5, _P4, _P3, _P2, _P1 = map(np.float32, (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1))
# log2((1 + s) / (1 - s)) = 2 / ln 2 · (s + s³/3 + s⁵/5 + s⁷/7 + …); |s| < 0.172 leaves 4e-8.
_L7, _L5, _L3, _L1 = map(np.float32, (2 / 7 / np.log(2), 2 / 5 / np.log(2), 2 / 3 / np.log(2), 2 / np.log(2)))
_ROOT = np.float32(2**0.5)
_ONE = np.float32(1.0)


@compiled
def exp2(x: Untyped) -> Untyped:
    """2^x, for x clamped to ±126."""
    x = larger(smaller(x, spread(_LIMIT)), spread(-_LIMIT))
    whole = as_int32(x + spread(_BIAS))  # positive, so this is the floor
    f = x - (as_float32(whole) - spread(_BIAS))  # exact, and at worst 4e-6 beyond [0, 1]
    power = ((spread(_P5) * f + spread(_P4)) * f + spread(_P3)) * f + spread(_P2)
    fraction = (power * f + spread(_P1)) * f + spread(_ONE)
    return fraction * from_bits(whole << spread(np.int32(23)), x)


@compiled
def log2(x: Untyped) -> Untyped:
    """The logarithm of x > 0, not denormal."""
    words = as_bits(x, False)
    mantissa = from_bits((words & spread(np.int32(0x007FFFFF))) | spread(np.int32(0x3F800000)), x)
    exponent = as_float32(words >> spread(np.int32(23))) - spread(_BIAS)
    upper = mantissa > spread(_ROOT)
    mantissa = where(upper, mantissa * spread(np.float32(0.5)), mantissa)
    exponent = where(upper, exponent + spread(_ONE), exponent)
    s = (mantissa - spread(_ONE)) / (mantissa + spread(_ONE))
    square = s * s
    series = ((spread(_L7) * square + spread(_L5)) * square + spread(_L3)) * square + spread(_L1)
    return exponent + s * series

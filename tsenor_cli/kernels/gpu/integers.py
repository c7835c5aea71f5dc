"""Scores as the integers that the mask is defined by: floor(score · 2^(55 - e)), see docs/decisions/0003."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponent_of(largest):
    """Int64 e with `largest`, float64, in [2^(e-1), 2^e); 0 for 0. A denormal counts as one of 2^-1022."""
    return tl.where(largest > 0.0, (largest.to(tl.int64, bitcast=True) >> 52) - 1022, 0)


@triton.jit
def scaled(x, shift):
    """floor(x · 2^shift) for x ≥ 0 float64, int64. In two steps: 2^shift may be no float64."""
    half = shift >> 1
    return (x * power(half) * power(shift - half)).to(tl.int64)


@triton.jit
def power(exponent):
    """2^exponent in float64, of an int64 exponent that is the exponent of a normal one."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)

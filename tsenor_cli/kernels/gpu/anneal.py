"""Prices of the columns by Dykstra's iteration of TSENOR (arXiv 2505.23949, Algorithm 1), a fixed number of times.

Only where the exact solver starts from: any number is right. See kernels/gpu/dykstra.py for the algebra.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tsenor_cli.kernels.gpu.tile import column_sum, row_max, row_sum

HIGHEST, LOWEST = tl.constexpr(60.0), tl.constexpr(-100.0)  # log2 of an entry of P: what does not overflow
OUTSIDE = tl.constexpr(1e6)


@triton.jit
def anneal(
    w, largest, row, column, n, sharpness, stages, per_stage, M: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr
):
    """Return v [L, 1, CI] float32 for w [L, RI, CI] float32, whose `largest` [L, 1, 1] are not far from 1.

    `sharpness` is log2(e) τ · largest of the first stage; every further one doubles it. At each stage the factors of
    rows and columns go back into U and V, as exp(τ w) alone would overflow.
    """
    t = sharpness / tl.where(largest > 0.0, largest, 1.0)
    u = -t * row_max(w, RO, CO)
    v = tl.sum(w, axis=1, keep_dims=True) * 0.0
    wanted = n.to(tl.float32)
    share = 1.0 / wanted
    for _ in range(stages):
        if M < CO * w.shape[2]:
            v = tl.where(column < M, v, -OUTSIDE)
        p = tl.exp2(tl.minimum(tl.maximum(w * t + u + v, LOWEST), HIGHEST))
        inverse = tl.zeros_like(u) + 1.0  # for u * 0.0 + 1.0 the AMD backend of Triton 3.7 fails
        factor = v * 0.0 + 1.0
        for _ in range(per_stage):
            s = tl.minimum(p, inverse)
            total = row_sum(s, RO, CO)
            if M < CO * w.shape[2]:
                total = tl.where(row < M, total, wanted)
            root = tl.rsqrt(total)  # n / x = n rsqrt(x)^2: one special instruction, where a division takes several
            inverse = total * share
            total = column_sum(s * (root * root * wanted), RO, CO)
            if M < CO * w.shape[2]:
                total = tl.where(column < M, total, wanted)
            root = tl.rsqrt(total)
            step = root * root * wanted
            p = p * step
            factor = factor * step
        u = 2.0 * (u - tl.log2(inverse))
        v = 2.0 * (v + tl.log2(factor))
        t = 2.0 * t
    return -v / t

"""Writing the blocks of a tile to a mask of bytes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write(mask, kept, offset, inside, WORDS: tl.constexpr):
    """Write kept [L, RI, CI] to mask + offset, the bytes of a bool matrix, where `inside`.

    WORDS: what a lane has of a row, 4 or 8 bytes, is one word, as a byte at a time is as many stores. The mask points
    to int32 or int64 then, the first offset of every lane's row is a multiple of it, and the row is inside or outside.
    """
    if WORDS:
        CI: tl.constexpr = kept.shape[2]
        TYPE: tl.constexpr = tl.int64 if CI == 8 else tl.int32
        byte = tl.arange(0, CI)[None, None, :].to(TYPE)
        word = tl.sum(tl.where(kept, tl.full((1, 1, 1), 1, TYPE) << (8 * byte), 0), axis=2, keep_dims=True)
        first = tl.min(offset, axis=2, keep_dims=True) // CI
        tl.store(
            mask + tl.max_contiguous(first, (kept.shape[0], 1, 1)),
            word,
            mask=tl.max(inside.to(tl.int32), axis=2, keep_dims=True) > 0,
        )
    else:
        tl.store(mask + offset, kept.to(tl.uint8), mask=inside)

"""The tile of every kernel here, [L, RI, CI]: L lanes of a warp, and the piece of a block that each of them holds.

A block of side SIDE is cut into RO×CO pieces of RI×CI entries. Lane (block * RO + ro) * CO + co holds piece (ro, co);
its entry (ri, ci) is (ro * RI + ri, co * CI + ci) of the block. What belongs to the rows is [L, RI, 1], to the columns
[L, 1, CI], to the block [L, 1, 1]; all lanes that share a line hold the same of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def across_columns(t, RO: tl.constexpr, CO: tl.constexpr):
    """View [L, a, b] so that axis 1 are the CO lanes that share rows."""
    return tl.reshape(t, (t.shape[0] // CO, CO, t.shape[1], t.shape[2]))


@triton.jit
def across_rows(t, RO: tl.constexpr, CO: tl.constexpr):
    """View [L, a, b] so that axis 1 are the RO lanes that share columns."""
    return tl.reshape(t, (t.shape[0] // (RO * CO), RO, CO, t.shape[1], t.shape[2]))


@triton.jit
def lanes_of_rows_sum(t, RO: tl.constexpr, CO: tl.constexpr):
    """Σ over the lanes that share rows."""
    if CO == 1:
        return t
    else:
        view = across_columns(t, RO, CO)
        return tl.reshape(tl.broadcast_to(tl.sum(view, axis=1, keep_dims=True), view.shape), t.shape)


@triton.jit
def lanes_of_rows_max(t, RO: tl.constexpr, CO: tl.constexpr):
    """The largest over the lanes that share rows."""
    if CO == 1:
        return t
    else:
        view = across_columns(t, RO, CO)
        return tl.reshape(tl.broadcast_to(tl.max(view, axis=1, keep_dims=True), view.shape), t.shape)


@triton.jit
def lanes_of_columns_sum(t, RO: tl.constexpr, CO: tl.constexpr):
    """Σ over the lanes that share columns."""
    if RO == 1:
        return t
    else:
        view = across_rows(t, RO, CO)
        return tl.reshape(tl.broadcast_to(tl.sum(view, axis=1, keep_dims=True), view.shape), t.shape)


@triton.jit
def lanes_of_columns_max(t, RO: tl.constexpr, CO: tl.constexpr):
    """The largest over the lanes that share columns."""
    if RO == 1:
        return t
    else:
        view = across_rows(t, RO, CO)
        return tl.reshape(tl.broadcast_to(tl.max(view, axis=1, keep_dims=True), view.shape), t.shape)


@triton.jit
def row_sum(x, RO: tl.constexpr, CO: tl.constexpr):
    """[L, RI, b] → [L, RI, 1]."""
    return lanes_of_rows_sum(tl.sum(x, axis=2, keep_dims=True), RO, CO)


@triton.jit
def row_max(x, RO: tl.constexpr, CO: tl.constexpr):
    """[L, RI, b] → [L, RI, 1]."""
    return lanes_of_rows_max(tl.max(x, axis=2, keep_dims=True), RO, CO)


@triton.jit
def column_sum(x, RO: tl.constexpr, CO: tl.constexpr):
    """[L, a, CI] → [L, 1, CI]."""
    return lanes_of_columns_sum(tl.sum(x, axis=1, keep_dims=True), RO, CO)


@triton.jit
def column_max(x, RO: tl.constexpr, CO: tl.constexpr):
    """[L, a, CI] → [L, 1, CI]."""
    return lanes_of_columns_max(tl.max(x, axis=1, keep_dims=True), RO, CO)


@triton.jit
def block_sum(x, RO: tl.constexpr, CO: tl.constexpr):
    """[L, a, b] → [L, 1, 1]."""
    in_lane = tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)
    return lanes_of_columns_sum(lanes_of_rows_sum(in_lane, RO, CO), RO, CO)


@triton.jit
def block_max(x, RO: tl.constexpr, CO: tl.constexpr):
    """[L, a, b] → [L, 1, 1]."""
    in_lane = tl.max(tl.max(x, axis=2, keep_dims=True), axis=1, keep_dims=True)
    return lanes_of_columns_max(lanes_of_rows_max(in_lane, RO, CO), RO, CO)


@triton.jit
def largest_of_all(x):
    """[L, a, b] int32 → scalar. As a loop's condition: of vectors only, as a whole tile costs a shuffle per entry."""
    return tl.max(tl.max(tl.max(x, axis=2), axis=1), axis=0)


@triton.jit
def rows_of(L: tl.constexpr, RI: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """The numbers of the rows in their block, [L, RI, 1]."""
    lane = tl.arange(0, L)[:, None, None]
    return ((lane // CO) % RO) * RI + tl.arange(0, RI)[None, :, None]


@triton.jit
def columns_of(L: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr):
    """The numbers of the columns in their block, [L, 1, CI]."""
    lane = tl.arange(0, L)[:, None, None]
    return (lane % CO) * CI + tl.arange(0, CI)[None, None, :]


@triton.jit
def blocks_of(L: tl.constexpr, RO: tl.constexpr, CO: tl.constexpr):
    """The numbers of this program's blocks, [L, 1, 1]."""
    return tl.program_id(0) * (L // (RO * CO)) + tl.arange(0, L)[:, None, None] // (RO * CO)


@triton.jit
def offsets_of(
    per_row,
    stride,
    M: tl.constexpr,
    L: tl.constexpr,
    RI: tl.constexpr,
    CI: tl.constexpr,
    RO: tl.constexpr,
    CO: tl.constexpr,
):
    """Where the entries stand in a matrix with `per_row` blocks of M along a row of `stride`, int64 [L, RI, CI].

    Triton would give neighbours in memory to neighbouring threads, but an entry must stay with its lane. The hint says,
    untruly, that lanes are neighbours and entries are not. As a thread has one lane, no load gets wider by it.
    """
    block, lane = blocks_of(L, RO, CO), tl.arange(0, L)[:, None, None]
    first_row = (block // per_row) * M + ((lane // CO) % RO) * RI
    first_column = (block % per_row) * M + (lane % CO) * CI
    corner = first_row.to(tl.int64) * stride + first_column
    line = corner + tl.arange(0, RI)[None, :, None].to(tl.int64) * stride
    return tl.max_contiguous(line + tl.arange(0, CI)[None, None, :], (L, 1, 1))


@triton.jit
def lanes_of_rows_min(t, RO: tl.constexpr, CO: tl.constexpr):
    """The smallest over the lanes that share rows."""
    if CO == 1:
        return t
    else:
        view = across_columns(t, RO, CO)
        return tl.reshape(tl.broadcast_to(tl.min(view, axis=1, keep_dims=True), view.shape), t.shape)


@triton.jit
def lanes_of_columns_min(t, RO: tl.constexpr, CO: tl.constexpr):
    """The smallest over the lanes that share columns."""
    if RO == 1:
        return t
    else:
        view = across_rows(t, RO, CO)
        return tl.reshape(tl.broadcast_to(tl.min(view, axis=1, keep_dims=True), view.shape), t.shape)


@triton.jit
def row_min(x, RO: tl.constexpr, CO: tl.constexpr):
    """[L, RI, b] → [L, RI, 1]."""
    return lanes_of_rows_min(tl.min(x, axis=2, keep_dims=True), RO, CO)


@triton.jit
def column_min(x, RO: tl.constexpr, CO: tl.constexpr):
    """[L, a, CI] → [L, 1, CI]."""
    return lanes_of_columns_min(tl.min(x, axis=1, keep_dims=True), RO, CO)

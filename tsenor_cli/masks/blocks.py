"""Matrices ↔ tiles: the only place that reshapes between [.., out, in] and [B, M, M]."""

from __future__ import annotations

import math

import torch


def to_blocks(matrix: torch.Tensor, m: int) -> torch.Tensor:
    """Cut [.., out, in] into tiles [B, m, m], row by row of tiles; m must divide out and in."""
    out_features, in_features = matrix.shape[-2:]
    tiles = matrix.reshape(math.prod(matrix.shape[:-2]), out_features // m, m, in_features // m, m)
    return tiles.transpose(2, 3).flatten(0, 2)


def from_blocks(blocks: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Put tiles [B, m, m] back together into `shape` [.., out, in]: the inverse of to_blocks."""
    m = blocks.shape[-1]
    out_features, in_features = shape[-2:]
    tiles = blocks.reshape(math.prod(shape[:-2]), out_features // m, in_features // m, m, m)
    return tiles.transpose(2, 3).reshape(shape)

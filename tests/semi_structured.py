"""A stand-in for torch's 2:4 kernels on a CPU: greedy tiles as its CUDA kernel makes them, then dense products."""

from __future__ import annotations

import torch

from tsenor_cli.masks.blocks import from_blocks, to_blocks
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.training.packing import Kernels, Packed


def greedy_tiles(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [out, in] without what torch's largest_abs_values_greedy drops of every tile.

    Entries are taken in descending order of |w| where their row and their column have room: at most two of each.
    """
    tiles = to_blocks(weight, 4)
    each, kept = torch.arange(len(tiles)), torch.zeros(len(tiles), 4, 4, dtype=torch.bool)
    for place in tiles.abs().flatten(1).sort(descending=True, stable=True).indices.unbind(1):
        row, column = place // 4, place % 4
        kept[each, row, column] = (kept[each, row].sum(-1) < 2) & (kept[each, :, column].sum(-1) < 2)
    return torch.where(from_blocks(kept, weight.shape), weight, 0)


def two_of_four(*shape: int, transposable: bool = True, seed: int = 0) -> torch.Tensor:
    """A random float32 matrix, 2:4 along rows, and along columns too unless not `transposable`."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(solve_mask(weight, "2:4", absolute=True, transposable=transposable).mask, weight, 0)


def stand_in(packed: list[torch.Tensor] | None = None) -> Kernels:
    """Kernels of every float type; weights that were packed are added to `packed`."""

    def pack(weight: torch.Tensor) -> Packed:
        if packed is not None:
            packed.append(weight)
        return Packed(greedy_tiles(weight), greedy_tiles(weight))

    floats = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    return Kernels("stand-in", floats, 8, pack, lambda weight: Packed(weight.clone(), weight))

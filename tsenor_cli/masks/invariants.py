"""Is this mask N:M? Decided by counting alone, by code that knows nothing of how masks are made."""

from __future__ import annotations

import torch

from tsenor_cli.specs import NMPattern


def violation(mask: torch.Tensor, pattern: NMPattern) -> str | None:
    """Say where `mask` [.., out, in] (bool) first breaks `pattern`, or None if it does not.

    The dimensions must be ones that the pattern divides.
    """
    if mask.numel() == 0:
        return None
    flat = mask.reshape(-1, mask.shape[-1]).contiguous()
    if mask.device.type != "cpu":
        return _first_violation(flat, pattern)
    from tsenor_cli.kernels.census import stripes_are_right  # loads numba, which only a solve needs

    if stripes_are_right(flat.numpy(), pattern.n, pattern.m, pattern.m if pattern.transposable else 1):
        return None
    return _first_violation(flat, pattern)


def _first_violation(mask: torch.Tensor, pattern: NMPattern) -> str | None:
    rows, columns = mask.shape
    along_rows = mask.view(rows, columns // pattern.m, pattern.m).sum(-1, dtype=torch.uint8)
    for row, group in (along_rows != pattern.n).nonzero()[:1].tolist():
        return f"row {row}, group {group} keeps {along_rows[row, group]} of {pattern.m}, not {pattern.n}"
    if not pattern.transposable:
        return None
    along_columns = mask.view(rows // pattern.m, pattern.m, columns).sum(1, dtype=torch.uint8)
    for tile_row, column in (along_columns != pattern.n).nonzero()[:1].tolist():
        kept = along_columns[tile_row, column]
        return f"column {column} of tile row {tile_row} keeps {kept} of {pattern.m}, not {pattern.n}"
    return None

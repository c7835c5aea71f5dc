"""Is this mask N:M? Decided by counting alone, by code that knows nothing of how masks are made."""

from __future__ import annotations

import torch

from tsenor_cli.specs import NMPattern


def violation(mask: torch.Tensor, pattern: NMPattern, right: torch.Tensor | None = None) -> str | None:
    """Say where `mask` [.., out, in] (bool) first breaks `pattern`, or None if it does not.

    The dimensions must be ones that the pattern divides. `right` is what count_words says of it, if it was asked.
    """
    if mask.numel() == 0:
        return None
    flat = mask.reshape(-1, mask.shape[-1]).contiguous()
    return None if (_is_right(flat, pattern) if right is None else right) else _first_violation(flat, pattern)


def _is_right(mask: torch.Tensor, pattern: NMPattern) -> bool:
    if mask.device.type != "cpu":
        return bool(count_words(mask, pattern))
    from tsenor_cli.kernels.census import stripes_are_right  # loads numba, which only a solve needs

    return stripes_are_right(mask.numpy(), pattern.n, pattern.m, pattern.m if pattern.transposable else 1)


def count_words(mask: torch.Tensor, pattern: NMPattern) -> torch.Tensor | None:
    """Is a contiguous mask [rows, columns] right? A bool on its device, which need not be there yet.

    Counts 4 or 8 entries at a time, as the bytes of a word; None where m or memory forbids it. No count is above 64, so
    none runs over into the byte beside it.
    """
    (rows, columns), n, m = mask.shape, pattern.n, pattern.m
    width = 8 if m % 8 == 0 else 4
    if m % width or mask.data_ptr() % width:
        return None
    word = torch.int64 if width == 8 else torch.int32
    words, ones = mask.view(word), 0x0101010101010101 >> (64 - 8 * width)
    groups = words.view(rows, columns // m, m // width).sum(-1, dtype=word) if m > width else words
    wrong = ((groups * ones) >> (8 * width - 8) != n).any()  # the highest byte of the product is the sum of all
    if pattern.transposable:
        wrong |= (words.view(rows // m, m, -1).sum(1, dtype=word) != n * ones).any()
    return ~wrong


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

"""What is wrong with a pruned weight, if anything is: counted from its numbers alone, group by group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from tsenor_cli.specs import NMPattern

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_AXIS_NAMES = {-1: "the input axis", -2: "the output axis"}


class Findings(NamedTuple):
    """In some rows or columns of a weight."""

    groups: int  # of M, in both directions where transposable
    exact: bool  # every group has exactly N nonzeros
    zeros: int
    wrong: dict[str, torch.Tensor]  # by what it is, where [.., out, in]


def examine(
    weight: torch.Tensor, pattern: NMPattern, original: torch.Tensor | None, mask: torch.Tensor | None
) -> Findings:
    """Look at some rows or columns of a weight, whole in groups.

    Args:
        weight: [.., out, in], of 2, 4 or 8 bytes each.
        pattern: what it is said to be.
        original: of its shape and dtype, if every weight that is not zero has to be this one's.
        mask: bool of its shape, if one is saved.
    """
    bits = weight.view(_INTEGERS[weight.element_size()])
    nonzero = (bits * 2).bool()  # without the sign
    wrong = _unsound(weight, bits)
    if original is not None:
        kept = original.view(bits.dtype) * nonzero
        if not torch.equal(kept, bits):
            wrong["a kept weight that is not the original's"] = (kept != bits) & nonzero
    if mask is not None:
        wrong |= _wrong_mask(mask, nonzero, pattern)
    groups, exact, in_groups = 0, True, group_counts(nonzero, pattern)
    for axis, counts in in_groups.items():
        groups += counts.numel()
        fewest, most = map(int, torch.aminmax(counts))
        exact = exact and fewest == most == pattern.n
        if most > pattern.n:
            too_many = (counts > pattern.n).repeat_interleave(pattern.m, axis)  # back to one entry per weight
            wrong[f"in a group of {pattern.m} along {_AXIS_NAMES[axis]} with more than {pattern.n}"] = too_many
    return Findings(groups, exact, nonzero.numel() - int(in_groups[-1].sum()), wrong)


def _unsound(weight: torch.Tensor, bits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where weights are negative zeros or not finite, if any are: what is quick to exclude is not looked for."""
    found = {}
    if int(bits.min()) == torch.iinfo(bits.dtype).min:  # only the sign is set
        found["a negative zero"] = bits == torch.iinfo(bits.dtype).min
    if not all(map(math.isfinite, torch.stack(torch.aminmax(weight)).tolist())):  # NaN travels through min and max
        found["not finite"] = ~torch.isfinite(weight)
    return found


def _wrong_mask(mask: torch.Tensor, nonzero: torch.Tensor, pattern: NMPattern) -> dict[str, torch.Tensor]:
    """Where a mask [.., out, in] is none of the pattern, or not that of the weights."""
    wrong = {"not zero, and its mask drops it": nonzero & ~mask}
    for axis, counts in group_counts(mask, pattern).items():
        others = counts != pattern.n
        if bool(others.any()):
            what = f"in a group of {pattern.m} along {_AXIS_NAMES[axis]} of which the mask does not keep {pattern.n}"
            wrong[what] = others.repeat_interleave(pattern.m, axis)
    return wrong


def group_counts(nonzero: torch.Tensor, pattern: NMPattern) -> dict[int, torch.Tensor]:
    """Nonzeros in each group of M, by axis: -1 is the input axis, -2 the output axis (transposable only)."""
    ones, m = nonzero.contiguous().view(torch.uint8), pattern.m
    counts = {-1: _sums_of_neighbours(ones, m)}
    if pattern.transposable:
        counts[-2] = _sum(ones[..., i::m, :] for i in range(m))
    return counts


def _sums_of_neighbours(ones: torch.Tensor, m: int) -> torch.Tensor:
    """Of every m along the last axis of a uint8 tensor, at most 64: two bytes of a word at a time, while m is even.

    Much faster than a reduction over a short axis, or than parts that are no neighbours in memory.
    """
    shape, ones = (*ones.shape[:-1], ones.shape[-1] // m), ones.flatten()
    while m % 2 == 0:
        pairs, m = ones.view(torch.int16), m // 2
        ones = (pairs + (pairs >> 8)).to(torch.uint8)
    return _sum(ones[i::m] for i in range(m)).view(shape)


def _sum(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(parts).clone()
    for part in parts:
        total += part
    return total

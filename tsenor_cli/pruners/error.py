"""How much of a layer's output a change of its weight loses."""

from __future__ import annotations

import torch

from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.pruners.base import Calibrated, InputStats, gram_of, working_dtype
from tsenor_cli.pruners.factor import Damping

_BLOCK = 512  # columns


def assess(
    weight: torch.Tensor, mask: torch.Tensor, pruned: torch.Tensor, stats: InputStats, damping: Damping
) -> Calibrated:
    """What `pruned`, and `mask` alone, lose of the output of `weight`; all [out, in], `pruned` of its dtype."""
    gram, dtype = gram_of(stats), working_dtype(weight)
    alone = apply_mask(weight, mask)
    mask_loss = output_energy(weight.to(dtype) - alone.to(dtype), gram)
    same = torch.equal(alone, pruned)
    loss = mask_loss if same else output_energy(weight.to(dtype) - pruned.to(dtype), gram)
    return Calibrated(stats.tokens, output_energy(weight, gram), mask_loss, loss, *damping)


def output_energy(weight: torch.Tensor, gram: torch.Tensor) -> float:
    """‖X Wᵀ‖² = tr(W G Wᵀ) of a weight [out, in] and a Gram matrix float64 [in, in]; never negative.

    The products are float32 (float64 for float64 weights) and their sum float64, which is off by some 1e-7 of the
    terms. G is symmetric: half of the products do.
    """
    dtype, columns = working_dtype(weight), weight.shape[1]
    weight, total = weight.to(dtype), 0.0
    for first in range(0, columns, _BLOCK):
        here = slice(first, first + _BLOCK)
        product = weight[:, here] @ gram[here, here].to(dtype)
        product.addmm_(weight[:, :first], gram[:first, here].to(dtype), alpha=2.0)
        total += float(product.mul_(weight[:, here]).sum(dtype=torch.float64))
    return max(total, 0.0)

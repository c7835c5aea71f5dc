"""How much of a layer's output a change of its weight loses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tsenor_cli.kernels import syrk
from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.pruners.base import Calibrated, InputStats, bands, dot, gram_of, working_dtype
from tsenor_cli.pruners.factor import Damping
from tsenor_cli.pruners.gram import columns


def assess(
    weight: torch.Tensor,
    mask: torch.Tensor,
    pruned: torch.Tensor,
    stats: InputStats,
    damping: Damping,
    loss: float | None = None,
) -> Calibrated:
    """What `pruned`, and `mask` alone, lose of the output of `weight`; all [out, in], `pruned` of its dtype.

    `loss` is that of `pruned` for a method that knows it.
    """
    gram, dropped = gram_of(stats), apply_mask(weight, ~mask)
    energy, mask_loss = output_energies([weight, dropped], gram)
    if loss is None:
        loss = mask_loss if torch.equal(apply_mask(weight, mask), pruned) else _loss(weight, pruned, gram)
    return Calibrated(stats.tokens, energy, mask_loss, loss, *damping)


def output_energies(weights: Sequence[torch.Tensor], gram: torch.Tensor) -> list[float]:
    """‖X Wᵀ‖² = tr(W G Wᵀ) of every weight [out, in], of one shape and dtype, and a Gram matrix float64 [in, in].

    Never negative. The products are float32 (float64 for float64 weights) and their sum float64, which is off by some
    1e-7 of the terms. G is symmetric and read from its upper triangle: half of the products do.
    """
    if all(map(syrk.takes, weights)):  # tr(W G Wᵀ) is Σ (WᵀW)_ij G_ij, of which the first factor is exact
        bits = [weight.contiguous().view(torch.uint16).numpy() for weight in weights]
        return [max(energy, 0.0) for energy in syrk.energies(bits, gram.contiguous().numpy())]
    return [_energy(weight.to(working_dtype(weight)), gram) for weight in weights]


def _energy(weight: torch.Tensor, gram: torch.Tensor) -> float:
    total, unit = 0.0, _unit(gram)
    for here, above, corner in columns(gram):
        product = weight[:, here] @ (corner / unit).to(weight.dtype)
        product.addmm_(weight[:, : here.start], (above / unit).to(weight.dtype), alpha=2.0)
        total += dot(product, weight[:, here])
    return max(total * unit, 0.0)


def _unit(gram: torch.Tensor) -> float:
    """A power of two, in which a Gram matrix fits into float32; to divide by it changes no digit."""
    largest = float(gram.diagonal().max())
    return 2.0 ** math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


def _loss(weight: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    """‖X(W − W')ᵀ‖², in one working copy."""
    difference = weight.to(working_dtype(weight), copy=True)
    for rows in bands(len(weight)):
        difference[rows] -= other[rows]
    return _energy(difference, gram)

"""Set the weights that a mask drops to zero: to +0.0, whatever they were; and sum up what is left."""

from __future__ import annotations

import torch

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_SQUARED_AS_READ = {torch.bfloat16: torch.uint16, torch.float32: torch.float32}


def apply_mask(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`weight` [.., out, in] where the mask is true, +0.0 elsewhere; same dtype, kept weights bit for bit.

    A product of floats would leave -0.0 for negative weights, which some sparse kernels cannot read. All bits zero is
    +0.0, so the product is taken of the bits, as integers: exact, and 25 times as fast as torch.where on bfloat16.
    A kept -0.0 becomes +0.0 too. On a CPU compiled code does the same in one pass.
    """
    if weight.device.type == "cpu" and weight.is_contiguous() and mask.is_contiguous():
        from tsenor_cli.kernels.weights import keep_bits  # loads numba, which only a solve needs

        kept, unsigned = torch.empty_like(weight), _UNSIGNED[weight.element_size()]
        keep_bits(weight.view(unsigned).numpy(), mask.numpy(), kept.view(unsigned).numpy())
        return kept
    bits = weight.view(_BITS[weight.element_size()]) * mask
    return bits.view(weight.dtype).add_(0.0)


def count_zeros(weight: torch.Tensor) -> int:
    """How many weights are +0.0; counted on the bits, which is 25 times as fast on bfloat16."""
    if weight.device.type == "cpu" and weight.is_contiguous():
        from tsenor_cli.kernels.weights import zeros  # loads numba

        return zeros(weight.view(_UNSIGNED[weight.element_size()]).numpy())
    return weight.numel() - int(torch.count_nonzero(weight.view(_BITS[weight.element_size()])))


def energy(weight: torch.Tensor) -> float:
    """Σ w², in float64: nothing overflows, and no float64 copy of the weight is made."""
    if weight.device.type == "cpu" and weight.dtype in _SQUARED_AS_READ and weight.is_contiguous() and weight.numel():
        from tsenor_cli.kernels.weights import squares  # five times as fast, and loads numba

        return squares(weight.view(-1, weight.shape[-1]).view(_SQUARED_AS_READ[weight.dtype]).numpy())
    return float(torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float64).square().sum())

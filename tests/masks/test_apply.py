"""Dropped weights become +0.0 and kept ones keep their bits, for every dtype and layout."""

from __future__ import annotations

import pytest
import torch

from tsenor_cli.masks.apply import apply_mask, count_zeros

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
EDGES = [0.0, -0.0, -1.5, 2.0, -6e-8, 6e-8, -65504.0, 65504.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [lambda t: t, torch.t, lambda t: t[:, ::2]], ids=["plain", "transposed", "strided"])
def test_bits(dtype, view):
    weight = view(torch.tensor(EDGES * 8, dtype=dtype).view(8, 8) * torch.arange(1, 9).view(8, 1))
    before, mask = weight.clone(), torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    pruned = apply_mask(weight, mask)
    assert pruned.dtype == dtype
    assert torch.equal(pruned, torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    assert not torch.signbit(pruned[pruned == 0]).any()
    assert torch.equal(weight, before)
    assert torch.equal(torch.signbit(weight), torch.signbit(before))
    assert count_zeros(pruned) == int((pruned == 0).sum()) > 0

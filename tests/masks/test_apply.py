"""Dropped weights become +0.0 and kept ones keep their bits, for every dtype and layout."""

from __future__ import annotations

import pytest
import torch

from tsenor_cli.masks.apply import apply_mask, count_zeros

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
EDGES = [0.0, -0.0, -1.5, 2.0, -6e-8, 6e-8, -65504.0, 65504.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [lambda t: t, torch.t, lambda t: t[:, ::2]], ids=["plain", "transposed", "strided"])
@pytest.mark.parametrize("rows", [8, 1 << 16])  # more than a thread takes at a time
def test_bits(dtype, view, rows):
    weight = view((torch.tensor(EDGES, dtype=dtype) * torch.arange(1, 9).view(8, 1)).to(dtype).repeat(rows // 8, 1))
    before, mask = weight.clone(), torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    pruned = apply_mask(weight, mask)
    assert pruned.dtype == dtype
    assert torch.equal(pruned, torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    assert not torch.signbit(pruned[pruned == 0]).any()
    assert torch.equal(weight, before)
    assert torch.equal(torch.signbit(weight), torch.signbit(before))
    assert count_zeros(pruned) == int((pruned == 0).sum()) > 0

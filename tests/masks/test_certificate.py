"""The readable certificate: weak duality for any duals, and the sum without cancellation equals the difference."""

import numpy as np
import oracles
import pytest
import torch

from tsenor_cli.kernels import reference
from tsenor_cli.masks import certificate


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_mask_beats_the_bound_whatever_the_duals(n):
    generator = torch.Generator().manual_seed(n)
    blocks = torch.rand(50, 4, 4, generator=generator)
    u, v = torch.randn(2, 50, 4, generator=generator)
    bounds = certificate.upper_bound(blocks, u, v, n)
    for block, bound in zip(blocks, bounds, strict=True):
        assert oracles.best_by_enumeration(block.numpy(), n) <= bound


@pytest.mark.parametrize("n", [1, 2, 3])
def test_excess_is_the_bound_minus_the_objective(n):
    generator = torch.Generator().manual_seed(n)
    masks = torch.from_numpy(oracles.all_masks(n, 4))
    blocks = torch.rand(len(masks), 4, 4, generator=generator)
    u, v = torch.randn(2, len(masks), 4, generator=generator)
    difference = certificate.upper_bound(blocks, u, v, n) - certificate.objective(blocks, masks)
    excess = certificate.excess(blocks, masks, u, v)
    assert (excess >= 0).all()
    torch.testing.assert_close(excess, difference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 4), (1, 8), (3, 8)])
def test_an_optimal_mask_has_no_excess(n, m):
    w = np.random.default_rng(m).integers(0, 1 << 40, (m, m))
    s, u, v, _ = reference.solve_block(w, n)
    blocks, mask = torch.from_numpy(w).double()[None], torch.from_numpy(s)[None]
    excess = certificate.excess(blocks, mask, torch.from_numpy(u)[None], torch.from_numpy(v)[None])
    assert excess.item() == reference.excess_of(w, s, u, v) == 0
    assert certificate.objective(blocks, mask).item() == pytest.approx(oracles.best_by_flow(w, n), rel=1e-9)

"""Every baseline does what its method says: the exact ones agree with one another, the others are as good as proven."""

import itertools

import hard_scores
import numpy as np
import pytest
import torch

from tsenor_cli.errors import UsageError
from tsenor_cli.masks.baselines import exhaustive, flow, heuristics, linear_program, plain_torch
from tsenor_cli.masks.blocks import to_blocks

EXACT = {"flow": flow.solve, "highs": linear_program.solve_highs, "pdlp": linear_program.solve_pdlp}
OTHERS = {
    "plain torch": plain_torch.solve,
    "two-approximation": heuristics.two_approximation,
    "bi-nm": heuristics.bi_nm,
    "max1000": heuristics.max_of_random,
}
AT_MOST = {"two-approximation", "bi-nm"}


def blocks_of(name, m, count=12, dtype=torch.float32):
    return to_blocks(torch.from_numpy(hard_scores.make(name, (m, count * m), seed=m)), m).to(dtype)


def kept(blocks, masks):
    return torch.where(masks, blocks.double(), 0.0).sum((1, 2))


def counts(masks):
    return torch.cat([masks.sum(1), masks.sum(2)], 1)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4)])
@pytest.mark.parametrize("name", ["normal", "cubed", "integers", "zeros"])
@pytest.mark.parametrize("solver", EXACT)
def test_exact_ones_agree_with_enumeration(solver, name, n, m):
    blocks = blocks_of(name, m)
    best = kept(blocks, exhaustive.solve(blocks, n))
    masks = EXACT[solver](blocks, n)
    assert masks.dtype == torch.bool
    assert (counts(masks) == n).all()
    torch.testing.assert_close(kept(blocks, masks), best, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "m"), [(4, 8), (3, 7), (8, 16)])
def test_exact_ones_agree_with_one_another(n, m):
    blocks = blocks_of("normal", m)
    best = kept(blocks, flow.solve(blocks, n))
    for solve in EXACT.values():
        torch.testing.assert_close(kept(blocks, solve(blocks, n)), best, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize("name", ["normal", "cubed", "integers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", OTHERS)
def test_others_are_feasible_and_no_better(solver, name, n, m, dtype):
    blocks = blocks_of(name, m, dtype=dtype)
    masks = OTHERS[solver](blocks, n)
    if solver in AT_MOST:  # which may even keep more than any mask with exactly n
        assert (counts(masks) <= n).all()
        return
    assert (counts(masks) == n).all()
    assert (kept(blocks, masks) <= kept(blocks, flow.solve(blocks, n)) * (1 + 1e-9)).all()


def test_how_good_they_are():
    """As the paper finds: plain torch within a percent, greedy at least half of the optimum, random far off."""
    blocks = blocks_of("normal", 16, count=64)
    best = kept(blocks, flow.solve(blocks, 8)).sum()
    gap = {name: 1 - (kept(blocks, solve(blocks, 8)).sum() / best).item() for name, solve in OTHERS.items()}
    assert 0 < gap["plain torch"] < 0.005 < gap["two-approximation"] < 0.02 < gap["bi-nm"] < 0.1 < gap["max1000"] < 0.3
    worst = kept(blocks, heuristics.two_approximation(blocks, 8)) / kept(blocks, flow.solve(blocks, 8))
    assert (worst >= 0.5).all()


def test_two_approximation_step_by_step():
    block = torch.tensor([[[9.0, 8, 1, 0], [8, 7, 2, 0], [1, 2, 3, 4], [0, 0, 4, 3]]])
    masks = heuristics.two_approximation(block, 1)
    assert masks.int().tolist() == [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]]


def test_bi_nm_step_by_step():
    block = torch.tensor([[[9.0, 8, 1, 0], [8, 7, 2, 0], [5, 6, 3, 4], [0, 1, 4, 3]]])
    rows_then_columns = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert heuristics.bi_nm(block, 2).int().tolist() == [rows_then_columns]


@pytest.mark.parametrize(("n", "m", "count"), [(1, 3, 6), (1, 4, 24), (2, 4, 90), (3, 4, 24), (2, 5, 2040)])
def test_all_masks_are_all_of_them(n, m, count):
    masks = exhaustive.all_masks(n, m)
    assert len(masks) == count
    assert len(masks.flatten(1).unique(dim=0)) == count
    assert (counts(masks) == n).all()
    if m < 5:
        every = np.array(list(itertools.product([False, True], repeat=m * m))).reshape(-1, m, m)
        assert count == ((every.sum(1) == n) & (every.sum(2) == n)).all(1).sum()


def test_too_many_masks_to_try():
    with pytest.raises(UsageError, match="too many masks of 4:8"):
        exhaustive.solve(torch.rand(1, 8, 8), 4)


@pytest.mark.parametrize("solver", EXACT | OTHERS)
def test_no_blocks(solver):
    masks = (EXACT | OTHERS)[solver](torch.empty(0, 4, 4), 2)
    assert masks.shape == (0, 4, 4)
    assert masks.dtype == torch.bool


def test_a_missing_package_is_named(monkeypatch):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr("tsenor_cli.masks.baselines.extra.import_module", refuse)
    with pytest.raises(UsageError, match=r"ortools is not installed: pip install 'tsenor\[bench\]'"):
        flow.solve(torch.rand(1, 4, 4), 2)

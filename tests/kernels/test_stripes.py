"""The columns of a stripe against NumPy one by one, and rounding against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruners.examples import make_inputs, make_weight, stats_of

from tsenor_cli.kernels import stripes
from tsenor_cli.kernels.contract import UnusableScoresError
from tsenor_cli.kernels.stripes import bring_up_to_date, close_block, finish, finish_all, open_block, rounding
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.specs import NMPattern

COLUMNS = 24


def make_parts(outputs, m, dtype=np.float32, columns=COLUMNS):
    """Columns of a weight, and what their updates are made of."""
    rng = np.random.default_rng(0)
    weight, updates = (rng.standard_normal((outputs, columns)).astype(dtype) for _ in range(2))
    pull, local = rng.standard_normal((columns, columns)) / columns, np.triu(rng.standard_normal((columns // m, m, m)))
    local += 2 * np.eye(m)
    return weight, np.ascontiguousarray(updates.T), pull.astype(dtype), local.astype(dtype)


def make_block(outputs, m, dtype=np.float32, columns=COLUMNS):
    weight, *others = make_parts(outputs, m, dtype, columns)
    return open_block(weight, 0, *others)


def flat(grouped, outputs):
    """[columns, outputs] float64 of [groups, columns, LANES]."""
    return grouped.transpose(1, 0, 2).reshape(grouped.shape[1], -1)[:, :outputs].astype(np.float64)


def closed(block, outputs):
    """What close_block writes down: weight, change, mask, and the two sums."""
    columns, dtype = block.values.shape[1], block.values.dtype
    weight, change = np.empty((outputs, columns), dtype), np.empty((columns, outputs), dtype)
    mask = np.empty((outputs, columns), np.bool_)
    return weight, change, mask, *close_block(block, 0, weight, change, mask)


TO_BFLOAT16 = rounding(torch.finfo(torch.bfloat16), torch.finfo(torch.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("outputs", [1, 5, 16, 33])
def test_a_block_is_opened_and_closed(outputs, dtype):
    """In its own columns, which are not the first, and in no others."""
    weight, updates, pull, local = make_parts(outputs, 4, dtype)
    whole = np.pad(weight, ((0, 0), (8, 4)))
    block = open_block(whole, 8, updates, pull, local)
    assert np.array_equal(flat(block.change, outputs), weight.T)
    assert np.array_equal(flat(block.values, outputs), weight.T + updates)
    block.kept[:] = block.values > 0
    change, mask = np.empty_like(updates), np.zeros(whole.shape, np.bool_)
    assert close_block(block, 8, whole, change, mask) == (0.0, 0.0)
    assert np.array_equal(change, weight.T)
    assert np.array_equal(whole, np.pad(weight + updates.T, ((0, 0), (8, 4))))
    assert np.array_equal(mask, whole > 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("outputs", "m", "first"), [(16, 4, 8), (5, 4, 0), (33, 3, 21), (40, 8, 16), (1, 2, 6)])
def test_a_stripe_is_brought_up_to_date(outputs, m, first, dtype):
    block, scores = make_block(outputs, m, dtype), np.empty((outputs, m), dtype)
    stripe = slice(first, first + m)
    expected = flat(block.values, outputs)
    expected[stripe] += block.pull[stripe, :first].astype(np.float64) @ flat(block.change, outputs)[:first]
    bring_up_to_date(block, first, scores)
    assert np.allclose(flat(block.values, outputs), expected, rtol=1e-5, atol=1e-5)
    diagonal = block.local[first // m].diagonal()
    assert np.allclose(scores, (flat(block.values, outputs)[stripe] / diagonal[:, None]).T ** 2, rtol=1e-5)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "m", "first"), [(16, 4, 8), (5, 4, 0), (33, 3, 21), (40, 8, 16)])
def test_a_stripe_is_finished(outputs, m, first, narrow):
    block = make_block(outputs, m)
    mask = np.random.default_rng(1).random((outputs, m)) < 0.5
    before, change = flat(block.values, outputs), flat(block.change, outputs)
    finish(block, first, mask, rounding(torch.finfo(narrow), torch.finfo(torch.float32)))
    errors, local = np.zeros((m, outputs)), block.local[first // m].astype(np.float64)
    for j in range(m):
        column = before[first + j] - local[:j, j] @ errors[:j]
        rounded = torch.from_numpy(column).to(narrow).double().numpy()
        before[first + j] = np.where(mask[:, j], rounded, 0.0)
        errors[j] = (column - before[first + j]) / local[j, j]
    stripe = slice(first, first + m)
    change[stripe] -= before[stripe]
    assert np.allclose(flat(block.values, outputs), before, rtol=1e-5, atol=1e-5)
    assert np.allclose(flat(block.change, outputs), change, rtol=1e-5, atol=1e-5)
    assert np.array_equal(flat(block.kept, outputs)[stripe].T, mask)
    assert closed(block, outputs)[3:] == pytest.approx(((errors**2).sum(), (change[stripe] ** 2).sum()), rel=1e-5)


def stripe_by_stripe(block, n, m, outputs):
    """Each stripe's mask from a sort, the first of equals first; and Σ of what it keeps."""
    scores, kept = np.empty((outputs, m), block.values.dtype), 0.0
    for first in range(0, block.values.shape[1], m):
        bring_up_to_date(block, first, scores)
        mask, best = np.zeros(scores.shape, np.bool_), np.argsort(-scores, axis=1, kind="stable")[:, :n]
        np.put_along_axis(mask, best, True, axis=1)
        finish(block, first, mask, TO_BFLOAT16)
        kept += scores[mask].sum(dtype=np.float64)
    return kept


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 3), (5, 8), (12, 24)])
@pytest.mark.parametrize("outputs", [1, 16, 33, 100])
def test_all_stripes_at_once_are_the_same_as_one_by_one(outputs, n, m, monkeypatch):
    """Bit for bit, with ties; in one chunk or many."""
    expected = None
    for size in (1, 1 << 20):
        monkeypatch.setattr(stripes, "_CHUNK", size)
        blocks = [make_block(outputs, m) for _ in range(2)]
        for block in blocks:
            block.values[:, ::3] = block.values[:, 1::3]
        kept = finish_all(blocks[0], n, m, outputs, TO_BFLOAT16)
        assert kept == pytest.approx(stripe_by_stripe(blocks[1], n, m, outputs), rel=1e-12)
        results = [closed(block, outputs) for block in blocks]
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
        expected = expected or (kept, *results[0])
        assert all(np.array_equal(a, b) for a, b in zip(expected, (kept, *results[0]), strict=True))


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_a_value_out_of_range_is_found(value):
    """Also one whose score is."""
    block = make_block(20, 4)
    block.values[1, 9, 3] = value
    with pytest.raises(UnusableScoresError):
        finish_all(block, 2, 4, 20, TO_BFLOAT16)


def test_threads_do_not_matter(monkeypatch):
    """Cut into as many chunks as there are groups, or one."""
    results = []
    for size in (1, 1 << 20):
        monkeypatch.setattr(stripes, "_CHUNK", size)
        block, scores = make_block(100, 4), np.empty((100, 4), np.float32)
        bring_up_to_date(block, 8, scores)
        finish(block, 8, scores > 1, TO_BFLOAT16)
        results.append((block.values, block.change, scores))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_of_all_shapes_run_the_same_code():
    """Arrays that are laid out otherwise would be compiled for once more, in the middle of a run."""
    for out, features, m, transposable in [(8, 8, 4, False), (33, 160, 4, False), (40, 256, 8, True)]:
        weight, stats = make_weight(out, features, torch.bfloat16), stats_of(make_inputs(99, features))
        for given in (weight, weight.float().T.contiguous().T):
            SparseGPT().prune(given, BoundSolver(NMPattern(m // 2, m, transposable)), stats)
    for kernel in stripes._compile(np.dtype(np.float32)):
        dtypes = [str(signature[0].types[0].dtype) for signature in kernel.signatures]
        assert len(set(dtypes)) == len(dtypes)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_that_of_torch(narrow):
    """Numbers of every exponent, halves between two neighbours, denormals; up to the largest of the format."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    grid = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    numbers = torch.cat([anything, grid, grid * (1 + 2.0**-11), grid * 2.0**-8, anything.to(torch.bfloat16).float()])
    numbers = numbers[numbers.isfinite() & (numbers.abs() <= torch.finfo(narrow).max)]
    expected = numbers.to(narrow).float()
    weight, nothing = numbers[:, None].numpy(), np.zeros((1, len(numbers)), np.float32)
    block = open_block(weight, 0, nothing, np.zeros((1, 1), np.float32), np.ones((1, 1, 1), np.float32))
    finish(block, 0, np.ones((len(numbers), 1), np.bool_), rounding(torch.finfo(narrow), torch.finfo(torch.float32)))
    rounded = closed(block, len(numbers))[0][:, 0]
    assert np.array_equal(rounded, expected.numpy())
    assert not np.signbit(rounded[rounded == 0]).any()

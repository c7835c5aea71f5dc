"""The columns of a stripe against NumPy one by one, and rounding against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruners.examples import make_inputs, make_weight, stats_of

from tsenor_cli.kernels import stripes
from tsenor_cli.kernels.stripes import LANES, Block, bring_up_to_date, finish, rounding
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.specs import NMPattern

COLUMNS = 24


def make_block(outputs, m, dtype=np.float32, columns=COLUMNS):
    rng, groups = np.random.default_rng(0), -(-outputs // LANES)
    values, change = (rng.standard_normal((groups, columns, LANES)).astype(dtype) for _ in range(2))
    local = np.triu(rng.standard_normal((columns // m, m, m))) + 2 * np.eye(m)
    return Block(values, change, rng.standard_normal((columns, columns)).astype(dtype), local.astype(dtype))


def flat(grouped, outputs):
    """[columns, outputs] float64 of [groups, columns, LANES]."""
    return grouped.transpose(1, 0, 2).reshape(grouped.shape[1], -1)[:, :outputs].astype(np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("outputs", "m", "first"), [(16, 4, 8), (5, 4, 0), (33, 3, 21), (40, 8, 16), (1, 2, 6)])
def test_a_stripe_is_brought_up_to_date(outputs, m, first, dtype):
    block, scores = make_block(outputs, m, dtype), np.empty((outputs, m), dtype)
    stripe = slice(first, first + m)
    expected = flat(block.values, outputs)
    expected[stripe] += block.pull[stripe, :first].astype(np.float64) @ flat(block.change, outputs)[:first]
    bring_up_to_date(block, first, m, scores)
    assert np.allclose(flat(block.values, outputs), expected, rtol=1e-5, atol=1e-5)
    diagonal = block.local[first // m].diagonal()
    assert np.allclose(scores, (flat(block.values, outputs)[stripe] / diagonal[:, None]).T ** 2, rtol=1e-5)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "m", "first"), [(16, 4, 8), (5, 4, 0), (33, 3, 21), (40, 8, 16)])
def test_a_stripe_is_finished(outputs, m, first, narrow):
    block = make_block(outputs, m)
    mask = np.random.default_rng(1).random((outputs, m)) < 0.5
    joined = np.zeros((outputs, COLUMNS), np.bool_)
    before, change = flat(block.values, outputs), flat(block.change, outputs)
    finish(block, first, m, mask, rounding(torch.finfo(narrow), torch.finfo(torch.float32)), joined)
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
    assert np.array_equal(joined[:, stripe], mask)
    assert joined.sum() == mask.sum()


def test_threads_do_not_matter(monkeypatch):
    """Cut into as many chunks as there are groups, or one."""
    results = []
    for size in (1, 1 << 20):
        monkeypatch.setattr(stripes, "_CHUNK", size)
        block, scores = make_block(100, 4), np.empty((100, 4), np.float32)
        bring_up_to_date(block, 8, 4, scores)
        to = rounding(torch.finfo(torch.bfloat16), torch.finfo(torch.float32))
        finish(block, 8, 4, scores > 1, to, np.empty((100, COLUMNS), np.bool_))
        results.append((block.values, block.change, scores))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_of_all_shapes_run_the_same_code():
    """Arrays that are laid out otherwise would be compiled for once more, in the middle of a run."""
    for out, features, m in [(8, 8, 4), (33, 160, 4), (40, 256, 32)]:
        weight, stats = make_weight(out, features, torch.bfloat16), stats_of(make_inputs(99, features))
        SparseGPT().prune(weight, BoundSolver(NMPattern(m // 2, m, transposable=False)), stats)
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
    numbers, expected = numbers[: len(numbers) // LANES * LANES], expected[: len(numbers) // LANES * LANES]
    values = numbers.view(-1, 1, LANES).numpy().copy()
    block = Block(values, values.copy(), np.zeros((1, 1), np.float32), np.ones((1, 1, 1), np.float32))
    mask = np.ones((len(numbers), 1), np.bool_)
    finish(block, 0, 1, mask, rounding(torch.finfo(narrow), torch.finfo(torch.float32)), mask.copy())
    assert np.array_equal(block.values.reshape(-1), expected.numpy())

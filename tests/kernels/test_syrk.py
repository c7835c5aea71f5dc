"""XᵀX of bfloat16 numbers: integers, of which every sum is exact, and sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tsenor_cli.kernels import bfloat16, syrk, threads

SHAPES = [(1, 1), (2, 16), (5, 7), (33, 97), (300, 511), (2048, 96), (2051, 40), (4200, 193)]


@pytest.fixture(params=["avx512", "amx"])
def unit(request, monkeypatch):
    """One of the two ways to multiply, where the processor has it, chosen or not."""
    if not bfloat16.has(request.param):
        pytest.skip(f"this processor does not have {request.param} for bfloat16 numbers")
    monkeypatch.setattr(bfloat16, "unit", lambda: request.param)


def integers(rows, columns, largest=15, seed=0):
    """Float64, and the bits of bfloat16."""
    x = torch.randint(-largest, largest + 1, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return x.double().numpy(), bits(x)


def bits(x):
    return x.to(torch.bfloat16).view(torch.uint16).numpy()


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_of_integers_are_exact(rows, columns):
    x, narrow = integers(rows, columns)
    total = np.ones((columns, columns))
    syrk.add_products(narrow, total, [(0, columns)])
    assert np.array_equal(np.triu(total), np.triu(x.T @ x + 1))


@pytest.mark.usefixtures("unit")
def test_ranges_of_columns_are_left_alone_by_others():
    x, narrow = integers(70, 400)
    total = np.zeros((400, 400))
    syrk.add_products(narrow, total, [(100, 101), (150, 305)])
    chosen = np.r_[100:101, 150:305]
    assert np.array_equal(np.triu(total)[:, chosen], np.triu(x.T @ x)[:, chosen])
    assert not np.delete(total, chosen, axis=1).any()


@pytest.mark.usefixtures("unit")
def test_cuts_and_threads_do_not_matter(monkeypatch):
    narrow, results = bits(torch.randn(200, 500, generator=torch.Generator().manual_seed(0))), []
    gram = np.random.default_rng(0).standard_normal((500, 500))
    for ranges, count in [([(0, 500)], 1), ([(0, 63), (63, 300), (300, 500)], 2)]:
        monkeypatch.setattr(threads.torch, "get_num_threads", lambda count=count: count)
        total = np.zeros((500, 500))
        syrk.add_products(narrow, total, ranges)
        results.append((np.triu(total), syrk.energies([narrow], gram)))
    assert np.array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_energies_of_integers_are_exact(rows, columns):
    """G is symmetric; what stands below its diagonal is not to be read."""
    matrices = [integers(rows, columns, largest=3, seed=seed) for seed in (0, 2)]
    gram = integers(columns, columns, largest=3, seed=1)[0]
    symmetric = np.triu(gram) + np.triu(gram, 1).T
    hidden = np.where(np.tri(columns, k=-1, dtype=bool), np.nan, symmetric)
    expected = [((x @ symmetric) * x).sum() for x, _ in matrices]
    assert syrk.energies([narrow for _, narrow in matrices], hidden) == expected


@pytest.mark.usefixtures("unit")
def test_sums_lose_no_more_than_those_of_float32():
    """Numbers far from zero, where what each addition cuts off adds up: 1e-5 if the sum were one chain."""
    x = torch.randn(2048, 128, generator=torch.Generator().manual_seed(0)).add(3).to(torch.bfloat16)
    exact, total = (x.double().T @ x.double()).triu().numpy(), np.zeros((128, 128))
    syrk.add_products(bits(x), total, [(0, 128)])
    assert np.abs(np.triu(total) - exact).max() < 6e-7 * exact.max()


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value):
    x = torch.ones(10, 40)
    x[7, 3] = value
    total = np.zeros((40, 40))
    syrk.add_products(bits(x), total, [(0, 40)])
    assert not np.isfinite(total[3, 3:]).any()
    assert np.isfinite(np.triu(total[4:, 4:])).all()


@pytest.mark.usefixtures("unit")
def test_no_rows_add_nothing():
    total = np.ones((5, 5))
    syrk.add_products(np.empty((0, 5), np.uint16), total, [(0, 5)])
    assert (total == 1).all()
    assert syrk.energies([np.empty((0, 5), np.uint16)], total) == [0.0]


def test_other_numbers_are_left_to_torch(monkeypatch):
    narrow = torch.zeros(1, dtype=torch.bfloat16)
    monkeypatch.setattr(bfloat16, "unit", lambda: "avx512")
    assert syrk.takes(narrow)
    assert not syrk.takes(narrow.float())
    assert not syrk.takes(narrow.half())
    assert not syrk.takes(narrow.to("meta"))
    monkeypatch.setattr(bfloat16, "unit", lambda: None)
    assert not syrk.takes(narrow)

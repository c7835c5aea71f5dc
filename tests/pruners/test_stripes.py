"""The same block in compiled code and in torch."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import make_inputs, make_weight, stats_of

from tsenor_cli.pruners import stripes
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.specs import NMPattern


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 5), (16, 32)])
@pytest.mark.parametrize("transposable", [False, True])
def test_both_give_the_same_weights(n, m, transposable, dtype, monkeypatch):
    features, out = m * -(-160 // m), m * -(-24 // m)
    weight, solver = make_weight(out, features, dtype), BoundSolver(NMPattern(n, m, transposable))
    compiled = SparseGPT().prune(weight, solver, stats_of(make_inputs(2 * features, features)))
    monkeypatch.setattr(stripes, "_Compiled", stripes.InTorch)
    plain = SparseGPT().prune(weight, solver, stats_of(make_inputs(2 * features, features)))
    assert torch.equal(compiled.solution.mask, plain.solution.mask)
    assert torch.equal(compiled.solution.mask, compiled.weight != 0)
    ulps = 1e-4 if dtype in {torch.float32, torch.float64} else 4 * torch.finfo(dtype).eps
    assert torch.allclose(compiled.weight.double(), plain.weight.double(), rtol=ulps, atol=ulps)

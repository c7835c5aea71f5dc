"""SparseGPT against the paper's loop over columns, against least squares, and against laws of its own."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import (
    KeepAll,
    damped,
    least_squares,
    loss,
    make_inputs,
    make_weight,
    stats_from,
    stats_of,
)

from tsenor_cli.errors import TsenorError
from tsenor_cli.pruners.base import BoundSolver
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.pruners.wanda import Wanda
from tsenor_cli.specs import NMPattern

PATTERNS = [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (3, 5), (6, 12)]


def reference(weight, gram, solver, damping):
    """Algorithm 1, column by column, without blocks, in float64; each column is rounded when it is done."""
    m = solver.pattern.m
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram, damping)), upper=True)
    current, mask = weight.double(), torch.empty(weight.shape, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % m == 0:
            stripe = slice(j, j + m)
            mask[:, stripe] = solver((current[:, stripe] / upper.diagonal()[stripe]).square()).mask
        done = torch.where(mask[:, j], current[:, j].to(weight.dtype).double(), 0.0)
        error = (current[:, j] - done) / upper[j, j]
        current[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
        current[:, j] = done
    return current, mask


def check(weight, gram, solver, damping=0.01, **options):
    layer = SparseGPT(damping, **options).prune(weight, solver, stats_from(gram))
    values, mask = reference(weight, gram, solver, damping)
    assert torch.equal(layer.solution.mask, mask)
    ulps = 1e-4 if weight.dtype in {torch.float32, torch.float64} else 4 * torch.finfo(weight.dtype).eps
    assert torch.allclose(layer.weight.double(), values, atol=ulps * float(weight.abs().max()), rtol=ulps)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_it_is_the_loop_of_the_paper(n, m, transposable, dtype):
    features, out = m * -(-160 // m), m * -(-24 // m)  # more than one block, and a last one that is not whole
    weight, inputs = make_weight(out, features, dtype), make_inputs(2 * features, features)
    check(weight, stats_of(inputs).gram, BoundSolver(NMPattern(n, m, transposable)))


@pytest.mark.parametrize("block", [1, 4, 20, 10**6])
def test_the_size_of_a_block_is_speed_only(block):
    check(make_weight(8, 72), stats_of(make_inputs(144, 72)).gram, BoundSolver(NMPattern(2, 4)), block=block)


@pytest.mark.parametrize("tokens", [1, 30])
def test_few_tokens(tokens):
    check(make_weight(16, 64), stats_of(make_inputs(tokens, 64)).gram, BoundSolver(NMPattern(4, 8)))


def test_dead_inputs_keep_the_weights_that_the_mask_keeps():
    weight, inputs = make_weight(16, 32), make_inputs(64, 32)
    inputs[:, [0, 5, 6, 7, 31]] = 0.0
    layer = check(weight, stats_of(inputs).gram, BoundSolver(NMPattern(2, 4)))
    dead = inputs.eq(0).all(0)
    assert layer.solution.mask[:, dead].any()
    assert torch.equal(layer.weight[:, dead], torch.where(layer.solution.mask, weight, 0.0)[:, dead])


def test_one_loud_input():
    inputs = make_inputs(64, 32)
    inputs[:, 7] *= 1e4
    check(make_weight(16, 32), stats_of(inputs).gram, BoundSolver(NMPattern(4, 8)), damping=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [2, 64])
def test_a_mask_that_keeps_all_changes_nothing(dtype, tokens):
    weight = make_weight(8, 32, dtype)
    layer = SparseGPT().prune(weight, KeepAll(), stats_of(make_inputs(tokens, 32)))
    assert torch.equal(layer.weight, weight)
    assert layer.calibrated.error == 0.0


@pytest.mark.parametrize("transposable", [False, True])
def test_with_uncorrelated_inputs_its_mask_is_wandas_of_squares(transposable):
    """For standard masks squaring changes no choice; a transposable mask is the best for the sum of squares."""
    weight = make_weight(16, 32)
    norms = torch.rand(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    solver, stats = BoundSolver(NMPattern(2, 4, transposable)), stats_from(norms.diag())
    layer = SparseGPT(damping=0.0).prune(weight, solver, stats)
    if transposable:
        assert torch.equal(layer.solution.mask, solver(weight.double().square() * norms).mask)
    else:
        assert torch.equal(layer.solution.mask, Wanda().prune(weight, solver, stats).solution.mask)
    assert torch.equal(layer.weight, torch.where(layer.solution.mask, weight, 0.0))
    assert (layer.calibrated.damping, layer.calibrated.damping_retries) == (0.0, 0)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_where_what_is_pruned_comes_first_it_is_least_squares(damping):
    """Inputs are correlated within groups of four; two weights of each that hardly count stand before the others."""
    inputs = torch.zeros(32 * 8, 32, dtype=torch.float64)
    for group in range(8):
        part = slice(4 * group, 4 * group + 4)
        inputs[32 * group : 32 * group + 32, part] = make_inputs(32, 4, seed=group)
    weight = make_weight(6, 32, torch.float64)
    weight.view(6, 8, 4)[..., :2] *= 1e-3
    layer = SparseGPT(damping).prune(weight, BoundSolver(NMPattern(2, 4, transposable=False)), stats_of(inputs))
    assert layer.solution.mask.tolist() == [[False, False, True, True] * 8] * 6
    best = least_squares(weight, layer.solution.mask, inputs, damping)
    assert torch.allclose(layer.weight, best, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_column_is_the_best_there_is_for_the_others(dtype):
    """Also for what rounding has done to them."""
    weight, inputs = make_weight(8, 32, dtype), make_inputs(64, 32)
    gram = damped(stats_of(inputs).gram, 0.01)
    layer = SparseGPT().prune(weight, BoundSolver(NMPattern(2, 4)), stats_of(inputs))
    change = weight.double() - layer.weight.double()
    best = weight[:, -1].double() + change[:, :-1] @ gram[:-1, -1] / gram[-1, -1]
    kept = layer.solution.mask[:, -1]
    assert kept.any()
    assert torch.allclose(layer.weight[kept, -1].double(), best[kept], rtol=torch.finfo(dtype).eps * 4, atol=1e-5)


def test_rounding_is_made_up_for():
    """One input is pruned and all others round: rounding at the end, as the original does, loses more."""

    class DropFirst(KeepAll):
        def __call__(self, scores, *, absolute=False):
            solution = super().__call__(scores, absolute=absolute)
            solution.mask[:, 0] = not first.pop()
            return solution

    weight, stats = make_weight(32, 64, torch.bfloat16), stats_of(make_inputs(2000, 64))
    first = [False] * 15 + [True]
    ours = SparseGPT(1e-4).prune(weight, DropFirst(), stats).weight
    first = [False] * 15 + [True]
    late = SparseGPT(1e-4).prune(weight.float(), DropFirst(), stats).weight
    unrounded = loss(weight, late, stats.gram)
    late = loss(weight, late.to(torch.bfloat16), stats.gram)
    assert loss(weight, ours, stats.gram) - unrounded < 0.7 * (late - unrounded)


@pytest.mark.parametrize("tokens", [300, 12])
@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0, 1000.0])
def test_the_loss_is_that_of_the_outputs(damping, tokens):
    """Where damping is nearly all of Σ E², what is left of it after its share is taken off is rounding errors."""
    weight, stats = make_weight(32, 64), stats_of(make_inputs(tokens, 64))
    layer = SparseGPT(damping).prune(weight, BoundSolver(NMPattern(2, 4)), stats)
    assert layer.calibrated.loss == pytest.approx(loss(weight, layer.weight, stats.gram), rel=1e-5)


def test_without_update_the_mask_is_the_same():
    weight, stats = make_weight(16, 64, torch.bfloat16), stats_of(make_inputs(100, 64))
    solver = BoundSolver(NMPattern(4, 8))
    updated, plain = (SparseGPT(update=update).prune(weight, solver, stats) for update in (True, False))
    assert torch.equal(updated.solution.mask, plain.solution.mask)
    assert torch.equal(plain.weight, torch.where(plain.solution.mask, weight, 0.0))
    assert plain.calibrated.error == plain.calibrated.mask_error == updated.calibrated.mask_error
    assert updated.calibrated.error < 0.8 * plain.calibrated.error


def test_the_solution_is_the_sum_of_its_stripes():
    weight, stats = make_weight(8, 32), stats_of(make_inputs(64, 32))
    parts = []

    class Recording(KeepAll):
        def __call__(self, scores, *, absolute=False):
            parts.append(BoundSolver(self.pattern)(scores, absolute=absolute))
            return parts[-1]

    solution = SparseGPT().prune(weight, Recording(), stats).solution
    assert [part.mask.shape for part in parts] == [(8, 4)] * 8
    assert torch.equal(solution.mask, torch.cat([part.mask for part in parts], dim=1))
    assert solution.objective == pytest.approx(sum(part.objective for part in parts))
    assert solution.upper_bound == pytest.approx(sum(part.upper_bound for part in parts))
    assert solution.blocks == 16
    assert solution.gap < 1e-9


def test_an_update_that_leaves_float16():
    """The kept weight would have to make up for one of 60000 by an input of a fiftieth of its size."""
    inputs = torch.tensor([[1.0, 0.02], [0.0, 1e-4]], dtype=torch.float64)
    weight = torch.tensor([[6e4, 6e4]], dtype=torch.float16)
    solver = BoundSolver(NMPattern(1, 2, transposable=False))

    class KeepSecond(KeepAll):
        def __call__(self, scores, *, absolute=False):
            return solver(torch.ones_like(scores).cumsum(1), absolute=absolute)

    with pytest.raises(TsenorError, match="do not fit into float16"):
        SparseGPT(1e-9).prune(weight, KeepSecond(NMPattern(1, 2)), stats_of(inputs))
    layer = SparseGPT(1e-9, update=False).prune(weight, KeepSecond(NMPattern(1, 2)), stats_of(inputs))
    assert layer.weight.tolist() == [[0.0, weight[0, 1].item()]], "what the error says to do helps"


def test_a_pruned_weight_may_be_updated_out_of_float16():
    """And those that come after it know nothing of that."""

    class DropFirstStripe(KeepAll):
        def __call__(self, scores, *, absolute=False):
            solution = super().__call__(scores, absolute=absolute)
            solution.mask.fill_(float(scores.sum()) < 1e6)
            return solution

    inputs = torch.eye(4, dtype=torch.float64)
    inputs[:2, :2] = torch.tensor([[1.0, 0.02], [0.0, 1e-4]])
    weight = torch.tensor([[6e4, 6e4, 1.0, 2.0]], dtype=torch.float16)
    layer = SparseGPT(1e-9).prune(weight, DropFirstStripe(NMPattern(1, 2)), stats_of(inputs))
    assert layer.weight.tolist() == [[0.0, 0.0, 1.0, 2.0]]

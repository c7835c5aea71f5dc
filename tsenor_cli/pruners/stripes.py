"""The columns of a block in SparseGPT's sweep (sparsegpt.py): on a CPU in compiled code, elsewhere in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tsenor_cli.errors import InputRefused
from tsenor_cli.kernels import stripes
from tsenor_cli.kernels.contract import Tally, UnusableScoresError
from tsenor_cli.masks.solution import MaskSolution, join_columns
from tsenor_cli.masks.solve import checked
from tsenor_cli.pruners.base import SolveMask, overflow


class Columns(NamedTuple):
    """A block of columns before its turn. All but `narrow` in the dtype of the sweep."""

    weight: torch.Tensor  # [out, columns]
    updates: torch.Tensor  # [columns, out]: what the changes of the blocks before this one ask for
    change: torch.Tensor  # [columns, out], contiguous: receives what the weight was less what it is
    pull: torch.Tensor  # [columns, columns]: how much of the change of a column (2nd) is to be added to a later one
    local: torch.Tensor  # [columns / m, m, m]: R_ss⁻¹ of every stripe, upper triangular
    narrow: torch.dtype  # of the weight: what values are rounded to


class Swept(NamedTuple):
    """And after it."""

    weight: torch.Tensor  # [out, columns], rounded
    solution: MaskSolution[torch.Tensor]  # of the stripes together
    lost: float  # Σ of the squared errors E: what the outputs lose by the damped Gram matrix
    moved: float  # Σ of the squared changes


def sweep(block: Columns, solve_mask: SolveMask) -> Swept:
    """For each stripe of m columns: bring it up to date, find its mask, give its columns their last values in turn.

    They are rounded then, not at the end, so that later columns make up for the rounding as well.

    Raises:
        TsenorError: a value that is not finite.
    """
    return (in_compiled_code if block.weight.device.type == "cpu" else in_torch)(block, solve_mask)


def in_torch(block: Columns, solve_mask: SolveMask) -> Swept:
    """On any device, as one would write it."""
    m, change, solutions, lost = solve_mask.pattern.m, block.change.copy_(block.weight.T), [], 0.0
    values = change + block.updates
    for number, local in enumerate(block.local):
        first, stripe = number * m, slice(number * m, (number + 1) * m)
        columns = values[stripe].addmm_(block.pull[stripe, :first], change[:first])
        scores = (columns / local.diagonal()[:, None]).square_().T.contiguous()
        solutions.append(_solve(solve_mask, scores, block.narrow))
        keep, errors = solutions[-1].mask.T.contiguous(), torch.empty_like(columns)
        for j, (column, kept) in enumerate(zip(columns, keep, strict=True)):
            column.addmv_(errors[:j].T, local[:j, j], alpha=-1)
            last = (column * kept).to(block.narrow).add_(0.0)  # no -0.0
            torch.sub(column, last, out=errors[j]).div_(local[j, j])
            column.copy_(last)
        change[stripe] -= columns
        lost += float(errors.square().sum(dtype=torch.float64))
    solution = join_columns(solutions, torch.cat([part.mask for part in solutions], dim=1))
    return Swept(values.T, solution, lost, float(change.square().sum(dtype=torch.float64)))


def _solve(solve_mask: SolveMask, scores: torch.Tensor, narrow: torch.dtype) -> MaskSolution[torch.Tensor]:
    """The weights were finite at first: scores that are not come from values that have left the dtype."""
    try:
        return solve_mask(scores)
    except InputRefused:
        if bool(torch.isfinite(scores).all()):
            raise
        raise overflow(narrow) from None


def in_compiled_code(block: Columns, solve_mask: SolveMask) -> Swept:
    """On a CPU, where calls of torch on a few columns would cost more than what they do."""
    shape, dtype = block.weight.shape, block.weight.dtype
    weight, mask = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=torch.bool)
    given = (block.weight, block.updates, block.pull, block.local)
    work = stripes.open_block(*(part.contiguous().numpy() for part in given))
    to = stripes.rounding(torch.finfo(block.narrow), torch.finfo(dtype))
    try:
        solution_of = _finish(work, to, solve_mask, weight)
    except UnusableScoresError:
        raise overflow(block.narrow) from None
    lost, moved = stripes.close_block(work, weight.numpy(), block.change.numpy(), mask.numpy())
    return Swept(weight, solution_of(mask), lost, moved)


def _finish(
    work: stripes.Block, to: stripes.Rounding, solve_mask: SolveMask, weight: torch.Tensor
) -> Callable[[torch.Tensor], MaskSolution[torch.Tensor]]:
    """Finish all stripes of a block like `weight`; gives what makes a solution of their mask."""
    pattern, (rows, columns) = solve_mask.pattern, weight.shape
    if solve_mask.keeps_largest:  # all at once: rows have nothing to do with one another
        tally = Tally(stripes.finish_all(work, pattern.n, pattern.m, rows, to), 0.0, 0.0, 0)
        return lambda mask: checked(mask, pattern, [tally], "top-n")
    solver = solve_mask.repeated(rows, weight.dtype)
    for first in range(0, columns, pattern.m):
        stripes.bring_up_to_date(work, first, solver.scores.numpy())
        solver.solve()
        stripes.finish(work, first, solver.mask.numpy(), to)
    return solver.solution

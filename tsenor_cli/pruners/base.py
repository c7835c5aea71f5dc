"""What every pruner takes and gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

import torch

from tsenor_cli.errors import InputRefused, TsenorError, UsageError
from tsenor_cli.masks.apply import apply_mask
from tsenor_cli.masks.repeated import Repeated, RepeatedOnCPU
from tsenor_cli.masks.request import Request
from tsenor_cli.masks.solution import MaskSolution
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.pruners.gram import is_finite
from tsenor_cli.specs import NMPattern

T = TypeVar("T")
Needs = Literal["nothing", "norms", "gram"]  # what a method wants to know of the inputs: see InputStats
_BAND = 128


class SolveMask(Protocol):
    """masks.solve.solve_mask, bound to a pattern and a solver."""

    @property
    def pattern(self) -> NMPattern:
        """For whoever cuts stripes of m columns; nobody else needs it."""
        ...

    @property
    def keeps_largest(self) -> bool:
        """Whether a mask is nothing but the n largest of every m scores along a row, earlier ones first among equals.

        Who has the scores of some rows in hand may then choose by itself.
        """
        ...

    def __call__(self, scores: torch.Tensor, /, *, absolute: bool = False) -> MaskSolution[torch.Tensor]:
        """Scores [.., out, in] → a solution with a mask of that shape; `absolute` takes |scores|."""
        ...

    def repeated(self, rows: int, dtype: torch.dtype) -> Repeated:
        """The same for scores [rows, m], float32 or float64, again and again, on a CPU."""
        ...


@dataclass(frozen=True)
class BoundSolver:
    """The SolveMask of a run. The options are those of masks.solve.solve_mask, and are checked when it is called."""

    pattern: NMPattern
    solver: str = "exact"
    device: str | None = None
    tau: float | None = None
    iterations: int | None = None
    local_search: int | None = None
    fallback: bool = False

    @property
    def keeps_largest(self) -> bool:
        """Of standard patterns, which know one solver."""
        return not self.pattern.transposable

    def repeated(self, rows: int, dtype: torch.dtype) -> Repeated:
        """See SolveMask."""
        request = Request(self.pattern, self.solver, False, self.tau, self.iterations, self.local_search, self.fallback)
        return RepeatedOnCPU(request, rows, dtype)

    def __call__(self, scores: torch.Tensor, /, *, absolute: bool = False) -> MaskSolution[torch.Tensor]:
        """See SolveMask."""
        return solve_mask(
            scores,
            self.pattern,
            absolute=absolute,
            solver=self.solver,
            device=self.device,
            tau=self.tau,
            iterations=self.iterations,
            local_search=self.local_search,
            fallback=self.fallback,
        )


@dataclass(frozen=True, eq=False)
class InputStats:
    """What calibration saw of the input x [tokens, in] of one linear map.

    Weights with the same input (q, k and v) share one object, and with it what was computed of it once. It can hold
    more matrices [in, in] after the first weight: drop it after the last. The Gram matrix belongs to the object: only
    its upper triangle, diagonal included, is read, and stays as it is; pruners write into the lower one.
    """

    tokens: int
    squared_norms: torch.Tensor  # float64 [in], Σ over tokens of x_j²
    gram: torch.Tensor | None = None  # float64 [in, in], Σ over tokens of x xᵀ, see above; None if no method needs it
    _computed: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The result of `compute`, kept under `key` for the next weight with this input."""
        if key not in self._computed:
            self._computed[key] = compute()
        return cast("T", self._computed[key])


@dataclass(frozen=True)
class Calibrated:
    """What calibration says of one pruned weight.

    Losses are Σ over outputs and tokens of squared differences; None where no Gram matrix is known.
    """

    tokens: int
    output_energy: float | None = None  # ‖XWᵀ‖² of the original weight
    mask_loss: float | None = None  # ‖X(W − M∘W)ᵀ‖²: of the mask alone, all kept weights as they were
    loss: float | None = None  # ‖X(W − W')ᵀ‖² of the weight given back, rounded to its dtype
    damping: float | None = None  # what was added to the Gram matrix's diagonal, in units of the diagonal's mean
    damping_retries: int = 0  # how often it was raised until the matrix could be factorised

    @property
    def mask_error(self) -> float | None:
        """As a share of the output energy, 0 where there is no output, None where they are beyond all bounds."""
        return self._relative(self.mask_loss)

    @property
    def error(self) -> float | None:
        """The same of the weight given back."""
        return self._relative(self.loss)

    def _relative(self, loss: float | None) -> float | None:
        if loss is None or self.output_energy is None or not math.isfinite(loss + self.output_energy):
            return None
        return loss / self.output_energy if self.output_energy > 0 else 0.0


@dataclass(frozen=True)
class PrunedLayer:
    """The result for one weight.

    The mask is kept apart from the values: a kept weight may be exactly zero.
    """

    weight: torch.Tensor  # [.., out, in], the input's dtype, +0.0 where pruned
    solution: MaskSolution[torch.Tensor]
    calibrated: Calibrated | None = None


class Pruner(Protocol):
    """Chooses a mask with `solve_mask` and gives the new weight; never knows which solver it is."""

    citation: str
    needs: ClassVar[Needs]

    def prune(self, weight: torch.Tensor, solve_mask: SolveMask, stats: InputStats | None = None) -> PrunedLayer:
        """Prune `weight`, a finite floating-point tensor of any strides.

        Args:
            weight: [.., out, in]; [out, in] for methods that need statistics.
            solve_mask: finds the masks.
            stats: of the inputs of `weight`, with what the method `needs`.

        Raises:
            UsageError: there are no such statistics, or of another size.
            InputRefused: the statistics are not finite.
            TsenorError: the method could not compute a finite weight of this dtype.
        """
        ...


def require(stats: InputStats | None, needs: Needs, weight: torch.Tensor) -> InputStats:
    """The statistics, if they are finite and fit `weight`. See Pruner.prune for the errors."""
    found = None if stats is None else stats.gram if needs == "gram" else stats.squared_norms
    if stats is None or found is None:
        raise UsageError(f"this method needs the {needs} of the inputs", "calibrate first, or use magnitude")
    if weight.ndim != 2 or found.shape[-1] != weight.shape[1]:
        raise UsageError(
            f"statistics of {found.shape[-1]} inputs do not fit a weight of shape {tuple(weight.shape)}",
            "give those of the input of this very weight, [out, in]",
        )
    if not stats.once(("finite", needs), lambda: is_finite(found) if needs == "gram" else bool(found.isfinite().all())):
        raise InputRefused(
            "the inputs seen in calibration are infinite or not a number",
            "the model overflows on this text: use other text, or --method magnitude",
            code="nonfinite-inputs",
        )
    return stats


def gram_of(stats: InputStats) -> torch.Tensor:
    """The Gram matrix of statistics that have one: float64 [in, in], its upper triangle. See gram.py to read it."""
    assert stats.gram is not None, "require() asks for it"
    return stats.gram


def working_dtype(weight: torch.Tensor) -> torch.dtype:
    """What to compute in: float32, and float64 for weights that are."""
    return torch.promote_types(weight.dtype, torch.float32)


def bands(rows: int) -> list[slice]:
    """A few rows at a time, for what would take a temporary tensor: also where dtypes differ, as torch casts first."""
    return [slice(first, first + _BAND) for first in range(0, rows, _BAND)]


def multiply(values: torch.Tensor, mask: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`values` times a mask, both [out, in], into `out`, which may be `values`; returned."""
    for rows in bands(len(values)):
        torch.mul(values[rows], mask[rows], out=out[rows])
    return out


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Σ a_ij b_ij of two [out, in], the products in their dtype and the sum in float64."""
    return math.fsum(float((a[rows] * b[rows]).sum(dtype=torch.float64)) for rows in bands(len(a)))


def finished(weight: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` [out, in] in the dtype of `weight`, +0.0 where `mask` drops them.

    Raises:
        TsenorError: an updated weight is too large for the dtype.
    """
    pruned = apply_mask(values.to(weight.dtype), mask)
    check_range(pruned)
    return pruned


def check_range(weight: torch.Tensor) -> None:
    """Raise if an update has left the range of the dtype."""
    if not all_finite(weight):
        raise overflow(weight.dtype)


def all_finite(weight: torch.Tensor) -> bool:
    """Whether no weight is NaN or infinite."""
    return all(map(math.isfinite, torch.stack(torch.aminmax(weight)).tolist()))  # NaN travels through min and max


def overflow(dtype: torch.dtype) -> TsenorError:
    """What check_range raises."""
    name = str(dtype).removeprefix("torch.")
    return TsenorError(
        f"the updated weights do not fit into {name}",
        "use --no-update, which keeps weights as they are, or --damping",
        code="overflow",
    )

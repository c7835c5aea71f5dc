"""N:M masks for `torch.nn.utils.prune`, and so for every framework that takes its pruning methods."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import prune

from tsenor_cli.errors import UsageError
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.specs import NMPattern


class TransposableNM(prune.BasePruningMethod):
    """Keep n of every m weights along rows and columns of every m×m tile: the best such mask, by magnitude or scores.

    For weights [out, in] as of Linear, and [out, in, k..] as of convolutions, where each kernel position is a matrix.
    ConvTranspose and transformers' Conv1D have [in, out, ..]: a transposable mask is the same for them, but with
    transposable=False groups would lie along the outputs.
    Of what an earlier method has pruned nothing comes back: such a tile then keeps at most n.

    Args:
        pattern: an NMPattern, or text such as "2:4".
        options: further arguments of `solve_mask`, such as transposable=False or solver="entropic".

    Example:
        TransposableNM.apply(layer, "weight", "2:4")
    """

    PRUNING_TYPE = "global"  # of the kinds that torch knows, the one that hands over whole tensors

    def __init__(self, pattern: NMPattern | str, **options: Any) -> None:  # noqa: ANN401  (those of solve_mask)
        self.pattern = pattern
        self.options = options

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        """The mask of `t` [out, in, ..] in the dtype of `default_mask`, 0 wherever that is."""
        if t.ndim < 2:
            raise UsageError(f"a parameter {list(t.shape)} has no rows and columns", "prune weights, not biases")
        matrices = (t.detach() * default_mask).permute(*range(2, t.ndim), 0, 1)
        mask = solve_mask(matrices, self.pattern, absolute=True, **self.options).mask
        found: torch.Tensor = mask.permute(t.ndim - 2, t.ndim - 1, *range(t.ndim - 2)).to(default_mask.dtype)
        return found * default_mask

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: torch.nn.Module,
        name: str,
        pattern: NMPattern | str,
        importance_scores: torch.Tensor | None = None,
        **options: Any,  # noqa: ANN401
    ) -> prune.BasePruningMethod:
        """Prune parameter `name` of `module`, by the magnitudes of `importance_scores` if given.

        Raises:
            UsageError: see solve_mask; the module is then as it was.
            InputRefused: see solve_mask.
        """
        hooks = module._forward_pre_hooks.copy()  # noqa: SLF001  (where torch keeps what was pruned before)
        earlier = {hook: hook._pruning_methods for hook in hooks.values() if isinstance(hook, prune.PruningContainer)}  # noqa: SLF001
        try:
            method: prune.BasePruningMethod = super().apply(  # type: ignore[no-untyped-call]
                module, name, pattern, importance_scores=importance_scores, **options
            )
        except Exception:  # torch has let go of them before it asked for a mask
            module._forward_pre_hooks.clear()  # noqa: SLF001
            module._forward_pre_hooks.update(hooks)  # noqa: SLF001
            for container, methods in earlier.items():
                container._pruning_methods = methods  # noqa: SLF001
            raise
        return method

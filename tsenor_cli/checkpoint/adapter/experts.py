"""See what every expert of a mixture is given, through an experts implementation registered with transformers.

Fused experts are parameters, not modules: no hook can see their inputs. `use_experts_implementation` lets a function
of our own take the place of their forward pass, expert by expert as transformers' own eager code does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

Observe = Callable[[nn.Module, str, int, torch.Tensor], None]  # (experts, parameter, expert, its input [tokens, in])
_NAME = "tsenor_watched"


@contextmanager
def watched_experts(model: Any, observe: Observe) -> Iterator[None]:  # noqa: ANN401  (a model of transformers, or not)
    """While it lasts, `observe` is told the input of every expert that is given any token."""
    watched = any(hasattr(module, "has_gate") and hasattr(module, "is_transposed") for module in model.modules())
    if not watched:
        yield
        return

    def forward(
        experts: Any,  # noqa: ANN401  (a module with what the decorator gives it)
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        return _forward(experts, hidden, top_k_index, top_k_weights, observe)

    before = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS.register(_NAME, forward)
    model.set_experts_implementation(_NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _forward(
    experts: Any,  # noqa: ANN401
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    observe: Observe,
) -> torch.Tensor:
    """Hidden [tokens, in] → [tokens, in], each token through its top k experts [tokens, k], weighted."""
    total = torch.zeros_like(hidden)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    for expert in torch.unique(top_k_index).tolist():
        if expert >= len(getattr(experts, first)):  # the mark of tokens that no expert takes
            continue
        tokens, rank = torch.where(top_k_index == expert)
        given = hidden[tokens]
        observe(experts, first, expert, given)
        opened = _linear(experts, first, expert, given)
        inner = experts._apply_gate(opened) if experts.has_gate else experts.act_fn(opened)  # noqa: SLF001
        observe(experts, "down_proj", expert, inner)
        found = _linear(experts, "down_proj", expert, inner)
        if getattr(experts, "has_post_expert_norm", False):
            found = experts.post_expert_norm(found)
        total.index_add_(0, tokens, (found * top_k_weights[tokens, rank, None]).to(total.dtype))
    return total


def _linear(experts: Any, parameter: str, expert: int, given: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    weight = getattr(experts, parameter)[expert]
    found = given @ weight if experts.is_transposed else nn.functional.linear(given, weight)
    return found + getattr(experts, f"{parameter}_bias")[expert] if experts.has_bias else found

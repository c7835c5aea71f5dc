"""What a calibrated run will need of memory, known from headers and shapes before it starts."""

from __future__ import annotations

import contextlib
from collections import defaultdict

import torch
from torch import nn

from tsenor_cli.calibration.replay import BATCH_TOKENS
from tsenor_cli.calibration.statistics import Collector
from tsenor_cli.checkpoint.adapter.meta import meta_model
from tsenor_cli.checkpoint.layouts import matrix_size
from tsenor_cli.checkpoint.plan import FIXED_BYTES, HIDDEN_STATES, Plan, TensorPlan
from tsenor_cli.checkpoint.site import NOT_IN_MODEL, Site
from tsenor_cli.specs import UPDATING

_GRAM_BYTES = 8  # float64
# Measured, docs/measured.md: what a method takes beside a weight, per entry of the weight and of its Gram matrix.
_WORK_BYTES = {"magnitude": (12, 0), "wanda": (12, 0), "sparsegpt": (20, 3), "alps": (30, 18)}


def expected_memory(plan: Plan, samples: int, length: int) -> dict[str, int]:
    """The most that is held at once above the imports, in bytes by what it is for.

    Args:
        plan: with at least one calibrated tensor.
        samples: windows of text.
        length: tokens of each.
    """
    model = meta_model(plan.checkpoint)
    itemsize = model.dtype.itemsize
    calibrated = [item for item in plan.pruned if item.calibrated]
    gram = any(item.choice is not None and item.choice.method in UPDATING for item in calibrated)
    by_layer: dict[int | None, int] = defaultdict(int)
    for item in plan.tensors:
        if item.reason != NOT_IN_MODEL:
            by_layer[item.layer] += item.tensor.parameters * itemsize
    outside = by_layer.pop(None, 0)
    hidden = model.config.get_text_config().hidden_size
    widest = max(matrix_size(item.tensor.shape, item.layout)[1] for item in calibrated if item.layout is not None)
    batch_bytes = max(BATCH_TOKENS, length) * widest * (4 + 4 * itemsize)  # a few tensors of it, one as float32
    return {
        "outside the decoder layers": outside,
        "two decoder layers": 2 * max(by_layer.values()),
        "Gram matrices of a layer": max(_gram_bytes(model, calibrated).values()) if gram else 0,
        HIDDEN_STATES: samples * length * hidden * itemsize,
        **({"a mask": max(item.tensor.parameters for item in plan.pruned)} if plan.saves_masks else {}),
        "a batch, or work on a weight": max(batch_bytes, *map(_work_bytes, calibrated)),
        "code and buffers": FIXED_BYTES,
    }


def _work_bytes(item: TensorPlan) -> int:
    assert item.layout is not None
    assert item.choice is not None
    out, inputs = matrix_size(item.tensor.shape, item.layout)
    per_weight, per_gram = _WORK_BYTES[item.choice.method]
    return per_weight * out * inputs + per_gram * inputs**2


def _gram_bytes(model: nn.Module, calibrated: list[TensorPlan]) -> dict[int, int]:
    """Bytes of the Gram matrices of each layer, those that several weights share counted once.

    A pass on the meta device shows which inputs are the same tensor; what it does not reach is counted on its own.
    Experts are: which tokens they are given depends on values.
    """
    modules = {item.site for item in calibrated if item.site is not None and not item.site.fused}
    collector = Collector(model, modules, gram=True)
    with collector.watching(), torch.no_grad(), contextlib.suppress(Exception):  # models may look at values
        # The dtype does not matter here, but without values grouped products are only known for this one.
        model.to(torch.bfloat16)(input_ids=torch.zeros(1, 8, dtype=torch.int64, device="meta"))
    leaders = collector.leaders
    found: dict[int, dict[Site, int]] = defaultdict(dict)
    for item in calibrated:
        assert item.site is not None
        assert item.layout is not None
        assert item.layer is not None
        _, inputs = matrix_size(item.tensor.shape, item.layout)
        experts = item.tensor.shape[0] if len(item.tensor.shape) == 3 else 1
        found[item.layer][leaders.get(item.site, item.site)] = experts * inputs**2 * _GRAM_BYTES
    return {layer: sum(sizes.values()) for layer, sizes in found.items()}

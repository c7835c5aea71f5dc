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

_GRAM_BYTES = 8  # float64
# Measured: float32 copies of a weight and its scores and masks, and what factorising a Gram matrix takes beside it.
_WORK_BYTES, _FACTOR_BYTES = 24, 16


def expected_memory(plan: Plan, samples: int, length: int, *, gram: bool) -> dict[str, int]:
    """The most that is held at once above the imports, in bytes by what it is for.

    Args:
        plan: with at least one calibrated tensor.
        samples: windows of text.
        length: tokens of each.
        gram: whether some method needs Gram matrices.
    """
    model = meta_model(plan.checkpoint)
    itemsize = model.dtype.itemsize
    calibrated = [item for item in plan.pruned if item.calibrated]
    shapes = [matrix_size(item.tensor.shape, item.layout) for item in calibrated if item.layout is not None]
    widest_in, most = max(inputs for _, inputs in shapes), max(out * inputs for out, inputs in shapes)
    by_layer: dict[int | None, int] = defaultdict(int)
    for item in plan.tensors:
        if item.reason != NOT_IN_MODEL:
            by_layer[item.layer] += item.tensor.parameters * itemsize
    outside = by_layer.pop(None, 0)
    hidden = model.config.get_text_config().hidden_size
    batch = max(BATCH_TOKENS, length)
    return {
        "outside the decoder layers": outside,
        "two decoder layers": 2 * max(by_layer.values()),
        "Gram matrices of a layer": max(_gram_bytes(model, calibrated).values()) if gram else 0,
        HIDDEN_STATES: samples * length * hidden * itemsize,
        "a batch in a layer": batch * widest_in * (4 + 4 * itemsize),
        "work on one weight": _WORK_BYTES * most + (_FACTOR_BYTES * widest_in**2 if gram else 0),
        "code and buffers": FIXED_BYTES,
    }


def _gram_bytes(model: nn.Module, calibrated: list[TensorPlan]) -> dict[int, int]:
    """Bytes of the Gram matrices of each layer, those that several weights share counted once.

    A pass on the meta device shows which inputs are the same tensor; what it does not reach is counted on its own.
    """
    collector = Collector(model, {item.site for item in calibrated if item.site is not None}, gram=True)
    with collector.watching(), torch.no_grad(), contextlib.suppress(Exception):  # models may look at values
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64, device="meta"))
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

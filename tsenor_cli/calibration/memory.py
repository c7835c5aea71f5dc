"""What a calibrated run will need of memory, known from headers and shapes before it starts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tsenor_cli.calibration.look import Look, look_through
from tsenor_cli.calibration.replay import BATCH_TOKENS
from tsenor_cli.checkpoint.adapter.meta import meta_model
from tsenor_cli.checkpoint.layouts import matrix_size
from tsenor_cli.checkpoint.plan import FIXED_BYTES, HIDDEN_STATES, Plan, TensorPlan
from tsenor_cli.checkpoint.site import NOT_IN_MODEL, Site
from tsenor_cli.errors import InputRefused
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

    Raises:
        InputRefused: the model does not call the modules of some of them, so that nothing can be known of their inputs.
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
    sites = {item.tensor.name: item.site for item in calibrated if item.site is not None and not item.site.fused}
    look = look_through(model, set(sites.values()))
    _refuse_uncalled(sites, look)
    widest = max(matrix_size(item.tensor.shape, item.layout)[1] for item in calibrated if item.layout is not None)
    batch_bytes = max(BATCH_TOKENS, length) * widest * (4 + 4 * itemsize)  # a few tensors of it, one as float32
    batch_bytes += attention_bytes(model.config.get_text_config(), length, itemsize)
    given = samples * length * look.given_bytes
    return {
        "outside the decoder layers": outside,
        "two decoder layers": 2 * max(by_layer.values()),
        "Gram matrices of a layer": max(_gram_bytes(calibrated, look.leaders).values()) if gram else 0,
        HIDDEN_STATES: samples * length * look.hidden_bytes,
        **({"what layers are given beside": given} if given else {}),
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


def _gram_bytes(calibrated: Iterable[TensorPlan], leaders: Mapping[Site, Site]) -> dict[int, int]:
    """Bytes of the Gram matrices of each layer, those that several weights share counted once.

    What the look has not reached is counted on its own. Experts are: which tokens they are given depends on values.
    """
    found: dict[int, dict[Site, int]] = defaultdict(dict)
    for item in calibrated:
        assert item.site is not None
        assert item.layout is not None
        assert item.layer is not None
        _, inputs = matrix_size(item.tensor.shape, item.layout)
        experts = item.tensor.shape[0] if len(item.tensor.shape) == 3 else 1
        found[item.layer][leaders.get(item.site, item.site)] = experts * inputs**2 * _GRAM_BYTES
    return {layer: sum(sizes.values()) for layer, sizes in found.items()}


def _refuse_uncalled(sites: Mapping[str, Site], look: Look) -> None:
    """Refuse what is used as a weight and never called, as in the recurrences of Mamba: now, and all at once."""
    uncalled = {name: site.module for name, site in sites.items() if look.complete and site not in look.leaders}
    if uncalled:
        name, module = next(iter(uncalled.items()))
        globs = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in uncalled})
        remedy = " ".join(f"--ignore '{glob}'" for glob in globs)
        raise InputRefused(f"{name}: the model never calls {module}", f"leave it out with {remedy}")


def attention_bytes(config: Any, length: int, itemsize: int) -> int:  # noqa: ANN401  (a PretrainedConfig, of text)
    """Bytes of the attention of a batch where all its scores are computed at once, in windows of `length` tokens.

    So do eager code, and torch's own where values are of another size than keys; else it goes over them in blocks.
    """
    heads = getattr(config, "num_attention_heads", None)
    whole = config._attn_implementation == "eager" or getattr(config, "v_head_dim", None) is not None  # noqa: SLF001
    if not whole or not isinstance(heads, int):
        return 0
    # Scores and what the softmax makes of them as float32, and two copies in the model's own dtype.
    return max(1, BATCH_TOKENS // length) * heads * length**2 * (8 + 2 * itemsize)

"""What makes two runs the same: everything that decides the bytes of the output, by the names that users know.

A run goes on where another one stopped only if all of it is equal (checkpoint/staging.py). Where things are, and what
only costs time or memory, is not part of it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from tsenor_cli import __version__
from tsenor_cli.checkpoint.journal import Identity
from tsenor_cli.checkpoint.plan import Plan
from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.device import CPU, computed_in
from tsenor_cli.report.build import deciding_options
from tsenor_cli.specs import PruneSpec
from tsenor_cli.versions import versions

if TYPE_CHECKING:
    from tsenor_cli.calibration.tokens import TextTokens


def run_identity(
    spec: PruneSpec, plan: Plan, device: str, tokens: TextTokens | None, eval_tokens: TextTokens | None
) -> Identity:
    """The identity of a run.

    Files of the model are known by size and time of change, or by the hub's hashes (Checkpoint.stamps): reading all of
    a large checkpoint would take as long as pruning it.
    """
    found = {"tsenor": __version__, **versions(), "the device": device}
    found["--nm"] = f"{spec.pattern} {spec.pattern.kind}" if spec.pattern is not None else "left to the recipe"
    found |= {option_name(name): json.dumps(value) for name, value in deciding_options(spec).items()}
    if plan.calibrated or eval_tokens is not None:  # sums depend on how they are cut into parts
        found["the number of threads"] = str(torch.get_num_threads())
        found["what bfloat16 layers run in"] = str(computed_in(torch.bfloat16, CPU))
    found |= {"the calibration text": text_identity(tokens), "the text of --eval": text_identity(eval_tokens)}
    return found | model_identity(plan.checkpoint)


def model_identity(checkpoint: Checkpoint) -> Identity:
    """Which model it is, and that its files are the same."""
    stamps = {f"{file} in the model": stamp for file, stamp in checkpoint.stamps.items()}
    return {"the commit of the model": checkpoint.revision or "none", **stamps}


def option_name(field: str) -> str:
    """The option of the command line that sets a field of a spec."""
    names = {"rules": "--recipe", "update": "--no-update", "field": "--text-field"}
    return names.get(field) or "--" + field.replace("_", "-")


def text_identity(tokens: TextTokens | None) -> str:
    if tokens is None:
        return "none"
    samples, length = tokens.windows.shape
    return f"{samples} windows of {length} tokens {tokens.tokens_sha256}"

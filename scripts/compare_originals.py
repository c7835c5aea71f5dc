#!/usr/bin/env python3
"""Hold our SparseGPT and ALPS against the code of their authors: the same weights, the same inputs, standard patterns.

Fetches nothing. Put the originals somewhere outside this repository first:

    git clone https://github.com/IST-DASLab/sparsegpt   # sparsegpt.py, and quant.py beside it
    git clone https://github.com/mazumder-lab/ALPS      # alps.py

    scripts/compare_originals.py --sparsegpt sparsegpt/sparsegpt.py --alps ALPS/alps.py

Compares the relative output error ‖X(W − W')ᵀ‖² / ‖XWᵀ‖². Exits with 1 if ours is above 1.001 times theirs for
SparseGPT, or above 1.01 times theirs for ALPS. Needs transformers, which both import.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from tsenor_cli.pruners.alps import Alps
from tsenor_cli.pruners.base import BoundSolver, InputStats
from tsenor_cli.pruners.error import output_energies
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.specs import NMPattern

SHAPES = ((256, 256), (768, 256), (256, 768))
PATTERNS = ("2:4", "4:8")
ALLOWED = {"sparsegpt": 1.001, "alps": 1.01}  # times the original's error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsegpt", type=Path, required=True, help="sparsegpt.py of IST-DASLab/sparsegpt")
    parser.add_argument("--alps", type=Path, required=True, help="alps.py of mazumder-lab/ALPS")
    arguments = parser.parse_args()
    originals: dict[str, Callable[..., torch.Tensor]] = {
        "sparsegpt": _original_sparsegpt(_load(arguments.sparsegpt)),
        "alps": _original_alps(_load(arguments.alps)),
    }
    ours = {"sparsegpt": SparseGPT(), "alps": Alps()}
    failed = False
    print("method         shape pattern     inputs       ours     theirs   ratio     s theirs")
    for out_features, in_features in SHAPES:
        for kind, inputs in _inputs(in_features).items():
            weight = torch.randn(out_features, in_features, generator=_seeded(out_features)) / in_features**0.5
            gram = inputs.double().T @ inputs.double()
            stats = InputStats(len(inputs), gram.diagonal().clone(), gram)
            for text in PATTERNS:
                pattern = NMPattern.parse(text, transposable=False)
                for name, original in originals.items():
                    started = time.perf_counter()
                    mine = ours[name].prune(weight, BoundSolver(pattern), stats).weight
                    between = time.perf_counter()
                    theirs = original(weight, inputs, pattern)
                    ended = time.perf_counter()
                    changes = [weight.double(), *((weight - pruned).double() for pruned in (mine, theirs))]
                    whole, *lost = output_energies(changes, gram)
                    errors = [loss / whole for loss in lost]
                    ratio = errors[0] / errors[1]
                    failed |= not ratio <= ALLOWED[name]
                    print(
                        f"{name:10} {out_features:4}x{in_features:<4} {text:>7} {kind:>10} {errors[0]:10.6f} "
                        f"{errors[1]:10.6f} {ratio:7.4f} {between - started:5.2f} {ended - between:5.2f}",
                        flush=True,
                    )
    print("worse than an original" if failed else "nowhere worse than allowed")
    return int(failed)


def _inputs(features: int) -> dict[str, torch.Tensor]:
    """Calibration inputs [tokens, features]: mixed, with columns of very different size, and fewer than features."""
    mixing = torch.randn(features, features, generator=_seeded(1)) / features**0.5
    mixed = torch.randn(4 * features, features, generator=_seeded(2)) @ mixing
    sizes = torch.randn(features, generator=_seeded(3)).exp()
    return {"mixed": mixed, "uneven": mixed * sizes, "few": mixed[: features // 2]}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"original_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        sys.exit(f"{path} is not there: --help says where to get it")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # it imports its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _original_sparsegpt(module: ModuleType) -> Callable[..., torch.Tensor]:
    """It counts zeros, and takes one sample as [tokens, in]."""

    def prune(weight: torch.Tensor, inputs: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
        layer = _linear(weight)
        with _on_cpu(module):
            method = module.SparseGPT(layer)
            method.add_batch(inputs, None)
            method.fasterprune(0.0, prunen=pattern.m - pattern.n, prunem=pattern.m)
        return layer.weight.data

    return prune


def _original_alps(module: ModuleType) -> Callable[..., torch.Tensor]:
    """It counts what is kept; the outputs that it is given it does not look at."""

    def prune(weight: torch.Tensor, inputs: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
        layer = _linear(weight)
        with _on_cpu(module):
            method = module.ALPS_prune(layer, 1, len(inputs))
            method.add_batch(inputs, torch.empty(0, 0))
            method.ALPS_admm(1 - pattern.n / pattern.m, nm_n=pattern.n, nm_m=pattern.m)
        return layer.weight.data

    return prune


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight.clone()
    return layer


@contextlib.contextmanager
def _on_cpu(module: ModuleType) -> Iterator[None]:
    """What the originals ask of "cuda:0" is done on the CPU, and what they print is dropped."""
    plain = torch.Tensor.to

    def to(tensor: torch.Tensor, target: Any, *rest: Any, **options: Any) -> torch.Tensor:  # noqa: ANN401
        return plain(tensor, "cpu" if target == "cuda:0" else target, *rest, **options)

    with (
        mock.patch.object(torch.Tensor, "to", to),
        mock.patch.object(torch.cuda, "synchronize", return_value=None),
        mock.patch.object(module, "dev", "cpu", create=True),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())

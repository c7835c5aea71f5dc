"""Packages that only the baselines need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tsenor_cli.errors import UsageError


def need(module: str) -> Any:  # noqa: ANN401  (a module's attributes are of any type)
    """Import an optional module, or say how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{module.partition('.')[0]} is not installed", "pip install 'tsenor[bench]'", code="missing-extra"
        ) from error

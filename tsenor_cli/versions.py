"""Versions of everything that takes part in a result; none of it is loaded for that."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version

_PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numba", "numpy")


@cache
def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}

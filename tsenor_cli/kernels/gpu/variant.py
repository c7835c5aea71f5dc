"""One kernel as it is launched, and as it is compiled without a GPU: the same record, so that what is checked runs.

Every module with kernels has variants(m, n, dtype, warp_size), which lists what the host code launches. Such a module
needs nothing but triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}  # torch's names, Triton's names


class Variant(NamedTuple):
    """A kernel, its types and its constants."""

    name: str
    kernel: Any  # what @triton.jit made
    signature: dict[str, str]  # the arguments that a launch gives, in order, and their types in Triton's spelling
    constants: dict[str, Any]  # the tl.constexpr ones
    warps: int = 1  # more need barriers in the test of every loop
    aligned: tuple[str, ...] = ()  # pointers that Triton is told are multiples of 16, if they are

    def launch(self, programs: int, **arguments: Any) -> None:  # noqa: ANN401 tensors and numbers
        """Run `programs` programs."""
        self.kernel[(programs,)](**arguments, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What to compile with. Fusion is asked for, as Triton 3.9 warns where nothing is said."""
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True}


class Tiling(NamedTuple):
    """How a block lies over lanes, see tile.py."""

    side: int  # the least power of two ≥ m
    constants: dict[str, int]  # RI, CI, RO, CO and L of tile.py
    warps: int

    @property
    def blocks(self) -> int:
        """The number of blocks of one program."""
        return self.constants["L"] // (self.constants["RO"] * self.constants["CO"])


def tiling(m: int, warp_size: int, high: int, wide: int) -> Tiling:
    """At most high×wide entries of a block in a lane, and whole warps."""
    side = 1 << (m - 1).bit_length()
    high, wide = min(side, high), min(side, wide)
    lanes = max(warp_size, side * side // (high * wide))
    pieces = {"RI": high, "CI": wide, "RO": side // high, "CO": side // wide}
    return Tiling(side, pieces | {"L": lanes}, lanes // warp_size)


def warp_size(tensor: Any) -> int:  # noqa: ANN401 a tensor, but this module knows no torch
    """The number of lanes of a warp of the tensor's device; 32 also for the interpreter on a CPU."""
    if tensor.device.type != "cuda":
        return 32
    import torch

    return int(torch.cuda.get_device_properties(tensor.device).warp_size)

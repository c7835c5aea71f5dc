"""The kernels of the exact solver as they are launched; see variant.py."""

from __future__ import annotations

from tsenor_cli.kernels.gpu import draft_kernel, four_kernel, settle_kernel
from tsenor_cli.kernels.gpu.variant import Tiling, Variant, tiling

_POINTERS = {
    "ties": "*i32",
    "warm": "*fp64",
    "mask": "*u8",
    "prices": "*i32",
    "exact_prices": "*i64",
    "state": "*i32",
    "queue": "*i64",
    "objective": "*fp64",
    "statistics": "*fp64",
    "duals": "*fp64",
}


def variants(m: int, n: int, dtype: str, warp_size: int = 32) -> list[Variant]:
    """The kernels for n:m blocks of `dtype`, in Triton's spelling, as a solve without duals launches them."""
    blocks_of_4 = [four_variant(n, dtype, warp_size)] if m == 4 else []
    return [*blocks_of_4, draft_variant(m, dtype, warp_size), *settle_variants(m, dtype, warp_size)]


def four_variant(n: int, dtype: str, warp_size: int, *, absolute: bool = True) -> Variant:
    """A block in a lane; it has no loops, so several warps do no harm."""
    constants = {"N": n, "L": 4 * warp_size, "ABSOLUTE": absolute}
    signature = _signature(four_kernel.POINTERS, four_kernel.NUMBERS, dtype) | {"mask": "*i32"}
    return Variant("four", four_kernel.four, signature, constants, 4)


def draft_tiling(m: int, warp_size: int) -> Tiling:
    """How the first kernel lays a block over lanes.

    8×8 entries take the fewest instructions, but so many different ones that a GPU waits for their fetching, and so
    many registers that little runs beside (docs/measured.md). More lanes than a warp has would wait for each other.
    """
    return tiling(m, warp_size, *((4, 4) if m <= 16 else (8, 4) if m <= 32 else (8, 8)))


def can_write_words(m: int, form: Tiling) -> bool:
    """Whether what a lane has of a row is a word of 4 or 8 bytes, inside the block or outside of it."""
    return form.constants["CI"] >= 4 and m % form.constants["CI"] == 0


def draft_variant(
    m: int,
    dtype: str,
    warp_size: int,
    *,
    absolute: bool = True,
    warm: bool = False,
    duals: bool = False,
    words: bool | None = None,
) -> Variant:
    """`words`: the mask is written CI bytes at a time; by default where m allows it."""
    form = draft_tiling(m, warp_size)
    words = can_write_words(m, form) if words is None else words
    constants = {"M": m, **form.constants, "ABSOLUTE": absolute, "WARM": warm, "DUALS": duals, "WORDS": words}
    signature = _signature(draft_kernel.POINTERS, draft_kernel.NUMBERS, dtype)
    signature |= {"mask": "*i64" if form.constants["CI"] == 8 else "*i32"} if words else {}
    return Variant("draft", draft_kernel.draft, signature, constants, form.warps)


def settle_variants(m: int, dtype: str, warp_size: int, *, duals: bool = False) -> tuple[Variant, Variant]:
    """First `arrange`, then `settle`: 4×8 entries in a lane, as each takes two registers."""
    form = tiling(m, warp_size, 4, 8)
    constants = {"M": m, **form.constants}
    first = _signature(settle_kernel.FIRST_POINTERS, settle_kernel.FIRST_NUMBERS, dtype)
    then = _signature(settle_kernel.POINTERS, settle_kernel.NUMBERS, dtype)
    return (
        Variant("arrange", settle_kernel.arrange, first, constants, form.warps),
        Variant("settle", settle_kernel.settle, then, constants | {"DUALS": duals}, form.warps),
    )


def _signature(pointers: list[str], numbers: list[str], dtype: str) -> dict[str, str]:
    kinds = _POINTERS | {"scores": f"*{dtype}", "sharpness": "fp32"}
    return {name: kinds.get(name, "i32") for name in pointers + numbers}

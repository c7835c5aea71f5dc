"""The kernels of the exact solver as they are launched; see variant.py."""

from __future__ import annotations

from tsenor_cli.kernels.gpu import draft_kernel, four_kernel, settle_kernel
from tsenor_cli.kernels.gpu.variant import Variant, tiling

_POINTERS = {
    "ties": "*i32",
    "warm": "*fp64",
    "mask": "*u8",
    "prices": "*i32",
    "exact_prices": "*i64",
    "state": "*i32",
    "queue": "*i64",
    "objective": "*fp64",
    "excess": "*fp64",
    "statistics": "*fp64",
    "status": "*i32",
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
    """8×8 entries in a lane, see tiling. `words`: the mask is written in int64; by default where m allows it."""
    form = tiling(m, warp_size)
    words = m % 8 == 0 if words is None else words
    constants = {"M": m, "INNER": form.inner, "OUTER": form.outer, "L": form.lanes}
    constants |= {"ABSOLUTE": absolute, "WARM": warm, "DUALS": duals, "WORDS": words}
    signature = _signature(draft_kernel.POINTERS, draft_kernel.NUMBERS, dtype)
    signature |= {"mask": "*i64"} if words else {}
    return Variant("draft", draft_kernel.draft, signature, constants, form.warps)


def settle_variants(m: int, dtype: str, warp_size: int, *, duals: bool = False) -> tuple[Variant, Variant]:
    """First `arrange`, then `settle`: 4×8 entries in a lane, as each takes two registers."""
    side = tiling(m, warp_size).side
    high, wide = min(side, 4), min(side, 8)
    lanes = max(warp_size, side * side // (high * wide))
    form = {"M": m, "RI": high, "CI": wide, "RO": side // high, "CO": side // wide, "L": lanes}
    first = _signature(settle_kernel.FIRST_POINTERS, settle_kernel.FIRST_NUMBERS, dtype)
    then = _signature(settle_kernel.POINTERS, settle_kernel.NUMBERS, dtype)
    warps = lanes // warp_size
    return (
        Variant("arrange", settle_kernel.arrange, first, form, warps),
        Variant("settle", settle_kernel.settle, then, form | {"DUALS": duals}, warps),
    )


def _signature(pointers: list[str], numbers: list[str], dtype: str) -> dict[str, str]:
    kinds = _POINTERS | {"scores": f"*{dtype}", "sharpness": "fp32"}
    return {name: kinds.get(name, "i32") for name in pointers + numbers}

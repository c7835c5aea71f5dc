"""Which instructions are used, and that AMX leaves its registers as it has found them."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from numba import types

from tsenor_cli.kernels import bfloat16
from tsenor_cli.kernels.bfloat16 import multiply_tiles
from tsenor_cli.kernels.lanes import intrinsic, lanes, pointer

AMD, INTEL = "znver4", "sapphirerapids"


@pytest.fixture
def processor(monkeypatch):
    """Pretend to run on another one."""
    bfloat16.unit.cache_clear()
    yield lambda name, **features: (
        monkeypatch.setattr(bfloat16.binding, "get_host_cpu_name", lambda: name),
        monkeypatch.setattr(bfloat16.binding, "get_host_cpu_features", lambda: features),
    )
    bfloat16.unit.cache_clear()


@pytest.mark.parametrize("granted", [True, False])
@pytest.mark.parametrize(
    ("name", "features", "with_tiles", "without"),
    [
        (AMD, {"avx512bf16": True}, "avx512", "avx512"),
        (AMD, {"avx512bf16": False}, None, None),
        (INTEL, {"avx512bf16": True, "amx-bf16": True}, "amx", None),
        (INTEL, {"avx512bf16": True, "amx-bf16": False}, None, None),
        ("generic", {}, None, None),
    ],
)
def test_the_fastest_unit_is_chosen(name, features, with_tiles, without, granted, processor, monkeypatch):
    monkeypatch.setattr(bfloat16, "_tiles_are_granted", lambda: granted)
    processor(name, **features)
    assert bfloat16.unit() == (with_tiles if granted else without)


def test_code_for_another_processor_does_without(processor, monkeypatch):
    processor(AMD, avx512bf16=True)
    monkeypatch.setattr(bfloat16.numba.config, "CPU_NAME", "generic")
    assert bfloat16.unit() is None


def configuration(instruction):
    """LDTILECFG or STTILECFG."""

    @intrinsic
    def apply(_typing, bytes_):
        def emit(context, builder, _signature, args):
            bfloat16._tile(builder, instruction, args[0])
            return context.get_dummy_value()

        return types.void(bytes_), emit

    return apply


configure, configured = configuration("ldtilecfg"), configuration("sttilecfg")


@numba.njit
def multiply_between(before, after, panels, tile):
    configure(pointer(before))
    multiply_tiles(pointer(panels), pointer(panels), len(panels[0]), pointer(tile))
    configured(pointer(after))


@pytest.mark.skipif(not bfloat16.has("amx"), reason="this processor does not have AMX")
@pytest.mark.parametrize(
    "there", [[], [1, *[0] * 15, 8, 0, 64, 0, *[0] * 28, 3, 16]], ids=["nothing", "two small tiles"]
)
def test_tiles_are_left_as_they_were_configured(there):
    """Libraries configure them once in a thread, and take for granted that they stay so."""
    before, after = np.array([*there, *[0] * (64 - len(there))], np.uint8), np.ones(64, np.uint8)
    panels, tile = lanes(6 * 16, np.int32).reshape(6, 16, 16), np.ones((32, 96), np.float32)
    multiply_between(before, after, panels, tile)
    assert after.tolist() == before.tolist()
    assert not tile.any()

"""What layers run in, and where."""

from __future__ import annotations

import pytest
import torch

from tsenor_cli.device import CPU, computed_in, find_device
from tsenor_cli.errors import InputRefused, UsageError

NARROW = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_narrow_dtype_is_kept_where_the_cpu_has_instructions_for_it(dtype, has_instructions, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, NARROW[dtype], lambda: has_instructions)
    assert computed_in(dtype, CPU) == (dtype if has_instructions else torch.float32)
    assert computed_in(dtype, torch.device("cuda")) == dtype
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert computed_in(dtype, CPU) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_others_are_kept(dtype):
    assert computed_in(dtype, CPU) == dtype


def test_devices():
    assert find_device("cpu") == find_device(str(torch.device("cpu", 0))) == CPU
    with pytest.raises(UsageError, match="not known"):
        find_device("tpu" if torch.cuda.is_available() else "cuda:x")
    if not torch.cuda.is_available():
        with pytest.raises(InputRefused, match="--device cuda"):
            find_device("cuda")

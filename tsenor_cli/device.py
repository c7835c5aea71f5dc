"""Which device a name stands for, and why there may be none."""

from __future__ import annotations

import re
from importlib.util import find_spec

import torch

from tsenor_cli.errors import InputRefused, UsageError

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device that "cpu", "cuda", "cuda:i" or "auto" stands for: auto is a GPU if there is one, else the CPU.

    Raises:
        UsageError: the name is none of these.
        InputRefused: there is no such GPU here.
    """
    if name in ("cpu", "cpu:0"):  # torch gives it a number where it is asked for one
        return CPU
    problem = why_no_gpu()
    if name == "auto":
        return CPU if problem else torch.device("cuda", torch.cuda.current_device())
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise UsageError(f"device {name!r} is not known", "give auto, cpu, cuda or cuda:0")
    if problem:
        raise InputRefused(f"--device {name}: {problem}", "use --device cpu", code="no-gpu")
    index = torch.cuda.current_device() if match[1] is None else int(match[1])
    if index >= torch.cuda.device_count():
        raise InputRefused(
            f"--device {name}: there are {torch.cuda.device_count()} GPUs", "count from 0", code="no-gpu"
        )
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """As reports and tables give it: cpu, or cuda:0 (NVIDIA H200)."""
    return "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What layers stored in `dtype` run in: float32 where the CPU has no instructions for a narrower one.

    Torch would go through such products one number at a time, nine times as slowly (docs/measured.md), and round more.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return dtype
    has_instructions = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,  # noqa: SLF001  (what torch itself asks)
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,  # noqa: SLF001
    }
    return torch.float32 if dtype in has_instructions and not has_instructions[dtype]() else dtype


def why_no_gpu() -> str | None:
    """What is missing for masks to be solved on a GPU, or None if nothing is."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU alone"
    if not torch.cuda.is_available():
        return "torch finds no GPU, or no driver for it"
    if find_spec("triton") is None:
        return "triton is not installed, which the GPU kernels are written in"
    return None

"""Where the GPU kernels are tested: on a card if scripts/gpu-check asks, else in Triton's interpreter, on the CPU."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if os.environ.get("TSENOR_TEST_DEVICE") == "cuda" else "cpu")

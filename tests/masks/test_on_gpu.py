"""What stands between a solve and the GPU kernels: bands, memory that runs out, kernels that do not compile.

The kernels themselves are stood in for by the CPU's, and the GPU by the CPU.
"""

from __future__ import annotations

from contextlib import contextmanager

import hard_scores
import numpy as np
import pytest
import torch

from tsenor_cli.device import CPU, find_device
from tsenor_cli.errors import InputRefused, TsenorError, UsageError
from tsenor_cli.kernels import reference
from tsenor_cli.kernels.contract import UnusableScoresError
from tsenor_cli.masks import on_cpu, on_gpu
from tsenor_cli.masks.request import Request
from tsenor_cli.masks.solve import solve_mask
from tsenor_cli.specs import NMPattern

ROOM = 1 << 30


@pytest.fixture
def gpu(monkeypatch):
    """Every solve goes the way of a GPU; returns the sizes of the bands that a kernel was given, and its limit."""
    seen, limit = [], [ROOM]

    def kernel(request):
        compiled = on_cpu.kernel_of(request)

        def run(scores, mask, warm, duals, sign):
            if scores.numel() > limit[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            seen.append(scores.numel())
            arrays = (None if array is None else array.numpy() for array in (warm, duals))
            tally = compiled(on_cpu._as_read(scores).numpy(), mask.numpy(), *arrays, sign)
            return lambda: tally

        return run

    monkeypatch.setattr(on_gpu, "_kernel", kernel)
    monkeypatch.setattr(on_gpu, "_free_bytes", lambda *_: ROOM)
    monkeypatch.setattr(on_cpu, "solve_bands", lambda *given: on_gpu.solve_bands(*given, CPU))
    return seen, limit


@pytest.mark.parametrize("transposable", [True, False])
@pytest.mark.parametrize("shape", [(32, 48), (3, 16, 48), (0, 8)])
def test_a_solve_is_the_same(shape, transposable, gpu):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs()
    found = solve_mask(scores, "4:8", transposable=transposable)
    assert gpu[0] == ([scores.numel()] if scores.numel() else [])
    assert found.mask.shape == scores.shape
    if scores.numel():
        kernel = reference.solve_transposable if transposable else reference.solve_standard
        expected = torch.empty(scores.shape, dtype=torch.bool)
        kernel(scores.view(-1, shape[-1]).numpy(), 4, 8, expected.view(-1, shape[-1]).numpy())
        assert torch.equal(found.mask, expected)


@pytest.mark.parametrize("rows", [8, 16, 24])
def test_memory_that_runs_out_halves_the_bands(rows, gpu):
    scores = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).abs()
    whole = solve_mask(scores, "4:8", return_duals=True)
    gpu[0].clear()
    gpu[1][0] = rows * 48
    cut = solve_mask(scores, "4:8", return_duals=True)
    assert torch.equal(cut.mask, whole.mask)
    assert torch.equal(cut.duals, whole.duals)
    assert cut.objective == pytest.approx(whole.objective, rel=1e-13)
    assert sum(gpu[0][-(64 // 8) :]) >= 64 * 48
    assert max(gpu[0]) <= rows * 48


def test_no_room_for_the_smallest_band(gpu):
    gpu[1][0] = 8 * 48 - 1
    with pytest.raises(TsenorError, match="too little free memory for 8 rows of 48 scores"):
        solve_mask(torch.ones(64, 48), "4:8")


def test_kernels_run_on_the_device_of_their_scores(monkeypatch):
    """Triton asks torch for the current one, which may be another."""
    current = ["cuda:0"]

    @contextmanager
    def on(device):
        current.append(str(device))
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(on_gpu, "_kernel", lambda _: None)
    monkeypatch.setattr(on_gpu, "_solve", lambda *_: current[-1])
    request = Request(NMPattern(2, 4), "exact", absolute=False)
    assert on_gpu.solve_bands(torch.ones(4, 4), request, None, None, torch.device("cuda:1")) == "cuda:1"
    assert current == ["cuda:0"]


def test_scores_are_refused_as_on_a_cpu(gpu):
    assert gpu
    with pytest.raises(InputRefused, match="infinite or not a number"):
        solve_mask(torch.full((8, 8), torch.nan), "4:8")
    with pytest.raises(UsageError, match="negative"):
        solve_mask(-torch.ones(8, 8), "4:8")


@pytest.fixture
def broken(gpu, monkeypatch):
    """A kernel that fails inside Triton."""
    assert gpu
    namespace = {"__name__": "triton.compiler"}
    exec("def fail(*_):\n    raise RuntimeError('PassManager::run failed')", namespace)
    monkeypatch.setattr(on_gpu, "_kernel", lambda _: namespace["fail"])


@pytest.mark.usefixtures("broken")
def test_a_kernel_that_does_not_compile_is_said():
    with pytest.raises(
        TsenorError, match=r"does not compile for cpu with triton .*: PassManager::run failed"
    ) as caught:
        solve_mask(torch.ones(8, 8), "4:8")
    assert "--fallback" in caught.value.remedy


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", sorted(hard_scores.ALL))
@pytest.mark.parametrize("text", ["2:4", "3:8", "16:32"])
def test_plain_torch_takes_over_where_it_may(name, text):
    pattern = NMPattern.parse(text)
    scores = torch.from_numpy(hard_scores.make(name, (2 * pattern.m, 3 * pattern.m)))
    found = solve_mask(scores, pattern, fallback=True)
    assert found.solver == "plain-torch"
    best = reference.solve_transposable(scores.numpy(), pattern.n, pattern.m, np.empty(scores.shape, np.bool_))
    assert found.objective == pytest.approx(float((scores.double() * found.mask).sum()), rel=1e-12)
    assert found.objective <= best.objective * (1 + 1e-12)
    assert found.upper_bound >= best.objective * (1 - 1e-12)


@pytest.mark.usefixtures("broken")
def test_plain_torch_makes_standard_masks_too():
    pattern = NMPattern(2, 4, transposable=False)
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 3.0, 2.0, 3.0]])
    assert solve_mask(scores, pattern, fallback=True).mask.tolist() == [[True, True, False, False] + [False, True] * 2]


@pytest.mark.usefixtures("broken")
def test_plain_torch_refuses_what_the_kernels_refuse():
    with pytest.raises(InputRefused):
        solve_mask(torch.full((8, 8), torch.nan), "4:8", fallback=True)
    with pytest.raises(UsageError, match="duals"):
        solve_mask(torch.ones(8, 8), "4:8", fallback=True, return_duals=True)


def test_a_mistake_of_ours_is_not_taken_for_tritons(gpu, monkeypatch):
    assert gpu

    def kernel(*_):
        raise KeyError("ours")

    monkeypatch.setattr(on_gpu, "_kernel", lambda _: kernel)
    with pytest.raises(KeyError):
        solve_mask(torch.ones(8, 8), "4:8", fallback=True)


def test_unusable_scores_pass_through(gpu, monkeypatch):
    """As a kernel says it of -0.0, which is solved as 0."""
    assert gpu
    tried = []

    def kernel(request):
        def run(scores, mask, _warm, _duals, sign):
            tried.append(sign)
            tally = reference.solve_transposable(
                scores.abs().numpy(), request.pattern.n, request.pattern.m, mask.numpy()
            )

            def pending():
                if not sign:
                    raise UnusableScoresError
                return tally

            return pending

        return run

    monkeypatch.setattr(on_gpu, "_kernel", kernel)
    assert solve_mask(torch.zeros(8, 8), "4:8").mask.sum() == 32
    assert tried == [False, True]


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "mps", "CPU", ""])
def test_unknown_devices(name):
    with pytest.raises(UsageError, match="give auto, cpu, cuda or cuda:0"):
        find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_without_a_gpu(name):
    assert find_device("auto") == find_device("cpu") == CPU
    with pytest.raises(InputRefused, match=f"--device {name}: ") as caught:
        find_device(name)
    assert caught.value.exit_code == 3


def test_a_gpu_is_found(monkeypatch):
    monkeypatch.setattr("tsenor_cli.device.why_no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 1)
    assert find_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(InputRefused, match="there are 2 GPUs"):
        find_device("cuda:2")

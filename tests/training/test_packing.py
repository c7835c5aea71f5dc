"""Which kernels a device has, and that the rule by which torch packs loses nothing of a transposable weight."""

import pytest
import torch
from semi_structured import greedy_tiles, two_of_four
from torch.sparse import SparseSemiStructuredTensor
from torch.sparse._semi_structured_conversions import _sparse_semi_structured_tile

from tsenor_cli.training.packing import CUSPARSELT, CUTLASS, find_kernels

CUDA = torch.device("cuda")


def test_the_greedy_rule_loses_nothing_of_a_transposable_matrix_and_much_of_a_row_wise_one():
    for seed in range(3):
        both, rows = (two_of_four(256, 512, transposable=kind, seed=seed) for kind in (True, False))
        assert torch.equal(greedy_tiles(both), both)
        assert torch.equal(greedy_tiles(both.t()), both.t())
        lost = (rows != 0).sum() - (greedy_tiles(rows) != 0).sum()
        assert 0.15 < lost / rows.count_nonzero() < 0.25


@pytest.mark.parametrize("transposable", [True, False])
def test_the_greedy_rule_is_that_of_torch(transposable):
    """Torch's own reference of its kernel sorts by what it is given; magnitudes make it the rule of absolute values."""
    weight = two_of_four(64, 64, transposable=transposable)
    mask = _sparse_semi_structured_tile(weight.abs()) != 0
    assert torch.equal(greedy_tiles(weight) != 0, mask)
    assert mask.sum() == (2048 if transposable else 2048 - 398)


def test_subsets_ties_and_zeros_are_no_exception():
    """A mask that is not full leaves room that zeros must not take."""
    both = two_of_four(64, 64).sign()
    both[::3, ::5] = 0
    both[:8, :8] = 0
    assert torch.equal(greedy_tiles(both), both)


@pytest.mark.parametrize(
    ("capability", "cusparselt", "forced", "found"),
    [
        ((7, 5), True, False, "2:4 kernels need compute capability 8.0 or more, this GPU has 7.5"),
        ((8, 0), True, False, CUSPARSELT),
        ((8, 0), True, True, CUTLASS),
        ((8, 9), False, False, CUTLASS),
        ((9, 0), True, False, CUSPARSELT),
        ((9, 0), False, False, "torch's CUTLASS kernels are for compute capability 8.x, this GPU has 9.0"),
    ],
)
def test_kernels_by_card(monkeypatch, capability, cusparselt, forced, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", forced)
    kernels = find_kernels(CUDA)
    assert kernels.startswith(found) if isinstance(found, str) else kernels is found


def test_there_are_none_on_a_cpu():
    assert find_kernels(torch.device("cpu")) == "torch has no 2:4 kernels on cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_kernel_leaves_a_transposable_weight_as_it_is(dtype):
    """`_sparse_semi_structured_tile` on the card, bit for bit; what it keeps is read from its masks."""
    for transposable in (True, False):
        weight = two_of_four(512, 1024, transposable=transposable).to(CUDA, dtype)
        *_, masks = torch._sparse_semi_structured_tile(weight, algorithm="largest_abs_values_greedy")
        kept = torch._sparse_semi_structured_apply_dense(weight, masks)
        if transposable:
            assert torch.equal(kept, weight)
        else:
            assert (kept != 0).sum() < 0.85 * weight.count_nonzero()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_packed_is_the_weight_bit_for_bit(dtype):
    """Products with the identity give it back, either way."""
    kernels = find_kernels(CUDA)
    weight = two_of_four(512, 1024).to(CUDA, dtype)
    packed = kernels.pack(weight)
    assert torch.equal(torch.eye(1024, device=CUDA, dtype=dtype) @ packed.forward.t(), weight.t())
    assert torch.equal(torch.eye(512, device=CUDA, dtype=dtype) @ packed.backward, weight)
    rows = two_of_four(512, 1024, transposable=False).to(CUDA, dtype)
    packed = kernels.pack_rows(rows)
    assert torch.equal(torch.eye(1024, device=CUDA, dtype=dtype) @ packed.forward.t(), rows.t())
    assert packed.backward is rows

"""Layers that run 2:4 kernels are the dense ones in all but speed: values, gradients, parameters, training."""

import copy
import gc
import io

import pytest
import torch
from semi_structured import stand_in, two_of_four
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from tsenor_cli.errors import CheckFailed, InputRefused, UsageError
from tsenor_cli.training import packing
from tsenor_cli.training.semi_structured import SemiStructuredLinear, densify, is_two_of_four, sparsify_for_training

CPU = torch.device("cpu")


@pytest.fixture
def packed(monkeypatch):
    """The weights that the stand-in for the kernels was given."""
    weights = []
    monkeypatch.setattr(packing, "find_kernels", lambda _: stand_in(weights))
    return weights


def layer(rows=32, columns=64, *, bias=True, seed=0, dtype=torch.float32, device=CPU):
    torch.manual_seed(seed)
    one = nn.Linear(columns, rows, bias=bias)
    one.weight.data.copy_(two_of_four(rows, columns, seed=seed))
    return one.to(device, dtype)


def pair(**options):
    """A dense layer, and the same swapped."""
    dense, sparse = layer(**options), layer(**options)
    assert [swap.reason for swap in sparsify_for_training(sparse)] == [None]
    return dense, sparse


def one_pass(module, x, loss=lambda y: y.square().mean()):
    """y, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = module(x)
    loss(y.float()).backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    return [y, x.grad, *gradients]


def same(ours, theirs, **tolerances):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerances)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_a_dense_layer(packed, bias, shape, dtype):
    dense, sparse = pair(bias=bias, dtype=dtype)
    x = torch.randn(*shape, 64, dtype=dtype)
    same(one_pass(sparse, x), one_pass(dense, x))
    same(one_pass(sparse, x, torch.sum), one_pass(dense, x, torch.sum))  # whose gradient is an expanded number
    assert len(packed) == 1


def test_both_products_are_those_of_the_kernels(monkeypatch):
    """Operands that are not the weight show up in y and in dx, and never in dW."""
    wrong = packing.Packed(torch.ones(32, 64), torch.full((32, 64), 2.0))
    kernels = packing.Kernels("wrong", frozenset({torch.float32}), 4, lambda _: wrong, lambda _: wrong)
    monkeypatch.setattr(packing, "find_kernels", lambda _: kernels)
    sparse, x = layer(bias=False), torch.randn(3, 64, requires_grad=True)
    sparsify_for_training(sparse)
    y = sparse(x)
    y.sum().backward()
    torch.testing.assert_close(y, x.sum(1, keepdim=True).expand(3, 32))
    assert (x.grad == 64).all()
    torch.testing.assert_close(sparse.weight.grad, x.detach().sum(0).expand(32, 64))


@pytest.mark.usefixtures("packed")
def test_gradients_by_finite_differences():
    _, sparse = pair(dtype=torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparse, x)


@pytest.mark.usefixtures("packed")
def test_operands_reach_the_kernels_contiguous(monkeypatch):
    """CuSPARSELt reads them as if they were."""
    _, sparse = pair()
    seen, module = [], "tsenor_cli.training.semi_structured.linear"
    monkeypatch.setattr(module, lambda x, weight, bias: seen.append(x) or nn.functional.linear(x, weight, bias))
    sparse(torch.randn(64, 6).t())
    assert seen[0].is_contiguous()


@pytest.mark.usefixtures("packed")
def test_frozen_weights_and_no_gradients():
    dense, sparse = pair()
    for one in (dense, sparse):
        one.requires_grad_(requires_grad=False)
    x = torch.randn(5, 64)
    y, dx, *none = one_pass(sparse, x)
    same([y, dx], one_pass(dense, x)[:2])
    assert none == [None, None]
    with torch.no_grad():
        assert torch.equal(sparse(x), dense(x))


def test_no_tokens(packed):
    dense, sparse = pair()
    same(one_pass(sparse, torch.randn(0, 64), torch.sum), one_pass(dense, torch.randn(0, 64), torch.sum))
    assert packed == []


def test_autocast(packed):
    """Weights stay float32, and get float32 gradients; the products are bfloat16."""
    dense, sparse = pair()
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        same(one_pass(sparse, x), one_pass(dense, x))
        assert sparse(x).dtype is torch.bfloat16
    assert [weight.dtype for weight in packed] == [torch.bfloat16]
    same(one_pass(sparse, x), one_pass(dense, x))
    assert [weight.dtype for weight in packed] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(packed, reentrant):
    dense, sparse = pair()
    x = torch.randn(5, 64)
    same(one_pass(sparse, x, lambda y: y.sum()), one_pass(dense, x, lambda y: y.sum()))

    class Recomputed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    same(one_pass(Recomputed(sparse), x), one_pass(dense, x))
    assert len(packed) == 1


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_training_with_masks_kept_packs_once_a_step(packed, options):
    dense, sparse = pair()
    masks = {one: one.weight != 0 for one in (dense, sparse)}
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01, **options) for one in (dense, sparse)]
    for _ in range(4):
        micro_batches = [torch.randn(6, 64) for _ in range(3)]
        for one, optimizer in zip((dense, sparse), optimizers, strict=True):
            for x in micro_batches:
                one(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                one.weight.mul_(masks[one])
    same(sparse.parameters(), dense.parameters())
    assert len(packed) == 4


@pytest.mark.usefixtures("packed")
def test_a_weight_that_lost_its_mask_is_refused_and_not_cut():
    """An optimizer without a keeper of the masks gives zeros a value: momentum, weight decay, or their gradient."""
    _, sparse = pair()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse(torch.randn(6, 64)).square().mean().backward()
    optimizer.step()
    with pytest.raises(CheckFailed, match=r"\[32, 64\] is not 2:4 along rows and columns any more: keep the masks"):
        sparse(torch.randn(6, 64))
    densify(sparse)
    sparse(torch.randn(6, 64))


def test_changes_are_seen(packed):
    """In place, of the tensor behind a parameter, and of the parameter itself, however its memory was used before."""
    dense, sparse = pair()
    x = torch.randn(5, 64)
    changes = [
        lambda one: one.weight.detach().mul_(2),
        lambda one: setattr(one.weight, "data", one.weight.data * 3),
        lambda one: one.load_state_dict(layer(seed=1).state_dict()),
        lambda one: one.load_state_dict(layer(seed=2).state_dict(), assign=True),
        lambda one: setattr(one, "weight", nn.Parameter(two_of_four(32, 64, seed=3))),
    ]
    for change in changes:
        for one in (dense, sparse):
            change(one)
        gc.collect()
        assert torch.equal(sparse(x), dense(x))
    assert len(packed) == len(changes)


@pytest.mark.usefixtures("packed")
def test_the_backward_pass_belongs_to_its_forward_pass():
    """A weight that has changed between them does not change what was computed."""
    dense, sparse = pair()
    x = torch.randn(5, 64, requires_grad=True)
    expected = torch.autograd.grad(dense(x).sum(), x)
    y = sparse(x)
    with torch.no_grad():
        sparse.weight.mul_(2)
    sparse(x)
    same(torch.autograd.grad(y.sum(), x), expected)


@pytest.mark.usefixtures("packed")
def test_swapping_changes_nothing_but_the_class():
    model = nn.Sequential(layer(), nn.ReLU(), layer(8, 32))
    before, fired = dict(model.state_dict(keep_vars=True)), []
    model[0].register_forward_hook(lambda *_: fired.append(1))
    sparsify_for_training(model)
    assert type(model[0]) is SemiStructuredLinear
    model(torch.randn(2, 64))
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert fired == [1]
    assert [swap.reason for swap in sparsify_for_training(model, {"2.weight"})] == ["not selected", None]  # again
    assert [type(one) for one in model] == [nn.Linear, nn.ReLU, SemiStructuredLinear]
    densify(model)
    assert [type(one) for one in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert "_memory" not in vars(model[0])


@pytest.mark.usefixtures("packed")
def test_copies_and_files():
    _, sparse = pair()
    x = torch.randn(2, 64)
    y = sparse(x)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for one in (copy.deepcopy(sparse), torch.load(file, weights_only=False)):
        assert one._memory is None
        assert torch.equal(one(x), y)


class Own(nn.Linear):
    pass


@pytest.mark.usefixtures("packed")
def test_what_stays_dense_and_why(monkeypatch):
    model = nn.ModuleDict(
        {
            "sparse": layer(),
            "odd": nn.Linear(64, 12),
            "whole": nn.Linear(64, 32),
            "rows": layer(),
            "own": Own(64, 32),
            "computed": prune.identity(layer(), "weight"),
            "other": nn.Embedding(4, 4),
        }
    )
    model["rows"].weight.data = two_of_four(32, 64, transposable=False)
    assert [str(swap) for swap in sparsify_for_training(model)] == [
        "sparse.weight: sparse both ways, stand-in",
        "odd.weight: dense, stand-in wants multiples of 8, not [12, 64]",
        "whole.weight: dense, its weight is not 2:4 along rows and columns",
        "rows.weight: dense, its weight is not 2:4 along rows and columns",
        "own.weight: dense, it is a Own, no plain Linear",
        "computed.weight: dense, its weight is a Tensor, no plain Parameter",
    ]
    assert {name for name, one in model.items() if type(one) is SemiStructuredLinear} == {"sparse"}
    half = packing.Kernels("halves", frozenset({torch.bfloat16}), 8, None, None)
    monkeypatch.setattr(packing, "find_kernels", lambda _: half)
    assert [swap.reason for swap in sparsify_for_training(layer())] == ["halves has no kernels for torch.float32"]
    assert [swap.kernels for swap in sparsify_for_training(layer(), autocast=torch.bfloat16)] == ["halves"]


@pytest.mark.usefixtures("packed")
def test_names():
    model = nn.Sequential(layer(), layer())
    swaps = sparsify_for_training(model, {"1.weight"})
    assert [swap.reason for swap in swaps] == ["not selected", None]
    with pytest.raises(UsageError, match=r"no Linear has a weight '2\.weight'"):
        sparsify_for_training(model, {"0.weight", "2.weight"})
    assert type(model[0]) is nn.Linear


def test_without_kernels_all_stays_dense_and_nothing_falls_back_later(monkeypatch):
    assert [swap.reason for swap in sparsify_for_training(layer())] == ["torch has no 2:4 kernels on cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(packing, "find_kernels", lambda _: stand_in())
        sparse = layer()
        sparsify_for_training(sparse)
    with pytest.raises(InputRefused, match="no 2:4 kernels on cpu: call densify"):
        sparse(torch.randn(2, 64))
    half = packing.Kernels("halves", frozenset({torch.bfloat16}), 8, None, None)
    monkeypatch.setattr(packing, "find_kernels", lambda _: half)
    with pytest.raises(InputRefused, match=r"halves has no kernels for torch\.float32: run the model under"):
        sparse(torch.randn(2, 64))


def test_the_pattern_is_counted_along_both_axes():
    both, rows = two_of_four(32, 64), two_of_four(32, 64, transposable=False)
    assert is_two_of_four(both)
    assert is_two_of_four(torch.zeros(4, 4))
    assert not is_two_of_four(rows)
    assert not is_two_of_four(rows.t())
    one_more = both.clone()
    one_more[0, (both[0, :4] == 0).nonzero()[0]] = 1e-30
    assert not is_two_of_four(one_more)


# --- on a card --------------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda")
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("tokens", [1, 5, 64, 1000])  # the kernels pad what is no multiple of eight
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_on_a_card(dtype, tokens, bias):
    dense, sparse = pair(rows=256, columns=512, bias=bias, dtype=dtype, device=CUDA)
    x = torch.randn(tokens, 512, device=CUDA, dtype=dtype)
    for given in (x, x.t().contiguous().t()):
        for loss in (lambda y: y.square().sum() / 256, torch.sum):
            ours, theirs = one_pass(sparse, given, loss), one_pass(dense, given, loss)
            for a, b in zip(ours, theirs, strict=True):
                assert (a - b).abs().max() <= 2 * torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.gpu
def test_autocast_on_a_card():
    dense, sparse = layer(256, 512, device=CUDA), layer(256, 512, device=CUDA)
    swaps = sparsify_for_training(sparse, autocast=torch.bfloat16)
    assert [swap.reason for swap in swaps] == [None]
    x = torch.randn(16, 512, device=CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        ours, theirs = one_pass(sparse, x), one_pass(dense, x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * b.abs().max()


@pytest.mark.gpu
@HALVES
def test_some_steps_on_a_card(dtype):
    """Beside a dense layer with the same masks: the losses go the same way, and no weight outside the masks appears."""
    losses, weights = [], []
    data = torch.Generator(CUDA).manual_seed(0)
    batches = [torch.randn(64, 512, device=CUDA, dtype=dtype, generator=data) for _ in range(10)]
    for one in pair(rows=256, columns=512, dtype=dtype, device=CUDA):
        mask, optimizer = one.weight != 0, torch.optim.SGD(one.parameters(), lr=0.5)
        for x in batches:
            loss = (one(x).float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                one.weight.mul_(mask)
        losses.append(loss.item())
        weights.append(one.weight.detach())
        assert not one.weight[~mask].any()
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert not torch.equal(weights[1], layer(256, 512, dtype=dtype, device=CUDA).weight)

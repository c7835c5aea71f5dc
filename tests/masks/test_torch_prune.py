"""TransposableNM is a pruning method like torch's own, and its masks are those of solve_mask."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tsenor_cli import NMPattern, TransposableNM, solve_mask
from tsenor_cli.errors import InputRefused, UsageError
from tsenor_cli.masks.invariants import violation


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(48, 32)


def test_a_linear_layer(linear):
    weight = linear.weight.detach().clone()
    TransposableNM.apply(linear, "weight", "8:16")
    expected = solve_mask(weight.abs(), "8:16").mask
    assert torch.equal(linear.weight_mask, expected.float())
    assert torch.equal(linear.weight, weight * expected)
    assert prune.is_pruned(linear)
    prune.remove(linear, "weight")
    assert torch.equal(linear.weight, weight * expected)


def test_the_mask_stays_through_training(linear):
    TransposableNM.apply(linear, "weight", "2:4")
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        linear(torch.randn(8, 48)).square().sum().backward()
        optimizer.step()
    linear(torch.randn(8, 48))
    assert violation(linear.weight != 0, NMPattern(2, 4)) is None


def test_by_scores_and_with_options(linear):
    scores = torch.rand(32, 48)
    TransposableNM.apply(linear, "weight", "2:4", importance_scores=scores, transposable=False)
    assert torch.equal(linear.weight_mask.bool(), solve_mask(scores, "2:4", transposable=False).mask)


@pytest.mark.parametrize(("layer", "axes"), [(nn.Conv2d(8, 16, 3), (2, 3, 0, 1)), (nn.Conv1d(8, 16, 3), (2, 0, 1))])
def test_convolutions_position_by_position(layer, axes):
    TransposableNM.apply(layer, "weight", "4:8")
    matrices = layer.weight_orig.detach().permute(axes)
    assert torch.equal(layer.weight_mask.permute(axes).bool(), solve_mask(matrices, "4:8", absolute=True).mask)


def test_on_top_of_another_method(linear):
    prune.l1_unstructured(linear, "weight", 0.3)
    before = linear.weight_mask.clone()
    TransposableNM.apply(linear, "weight", "2:4")
    assert (linear.weight_mask <= before).all()
    tiles = linear.weight_mask.view(8, 4, 12, 4)
    assert tiles.sum(1).max() <= 2
    assert tiles.sum(3).max() <= 2


def test_a_state_goes_to_another_model(linear):
    other = nn.Linear(48, 32)
    for layer in (linear, other):
        TransposableNM.apply(layer, "weight", NMPattern(2, 4))
    other.load_state_dict(linear.state_dict())
    x = torch.randn(4, 48)
    assert torch.equal(linear(x), other(x))


@pytest.mark.parametrize(("pattern", "value", "error"), [("5:7", 1.0, UsageError), ("2:4", float("nan"), InputRefused)])
def test_a_mistake_leaves_the_module_as_it_was(linear, pattern, value, error):
    linear.weight.data[0, 0] = value
    with pytest.raises(error):
        TransposableNM.apply(linear, "weight", pattern)
    assert isinstance(linear.weight, nn.Parameter)
    assert not prune.is_pruned(linear)


@pytest.mark.parametrize("earlier", [1, 2])
def test_a_mistake_leaves_what_was_pruned_before(linear, earlier):
    for _ in range(earlier):
        prune.l1_unstructured(linear, "weight", 0.3)
    (before,) = linear._forward_pre_hooks.values()
    methods = list(before) if earlier == 2 else [before]
    mask = linear.weight_mask.clone()
    with pytest.raises(UsageError):
        TransposableNM.apply(linear, "weight", "5:7")
    (after,) = linear._forward_pre_hooks.values()
    assert after is before
    assert (list(after) if earlier == 2 else [after]) == methods
    for _ in range(2):  # a second one needs the hook: the weight is computed anew for it
        linear(torch.randn(4, 48)).sum().backward()
    assert torch.equal(linear.weight_mask, mask)
    prune.remove(linear, "weight")
    assert torch.equal(linear.weight != 0, mask.bool())


def test_a_bias_is_refused_and_stays():
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(UsageError, match="no rows and columns"):
        TransposableNM.apply(layer, "bias", "2:4")
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]

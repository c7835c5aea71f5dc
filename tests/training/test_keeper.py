"""The pattern after training is the pattern before, whatever trains: real optimizers, wrappers and processes."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import make_checkpoint
from nets import OPTIMIZERS, PATTERN, STEPS, Net, assert_kept, batches, masked, train
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from tsenor_cli.errors import CheckFailed, InputRefused
from tsenor_cli.pipeline import prune
from tsenor_cli.specs import PruneSpec
from tsenor_cli.training import KeepMasks, keep_masks, model_masks
from tsenor_cli.training.masks import parameters_of


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name):
    net, masks = masked()
    before = copy.deepcopy(net.state_dict())
    with keep_masks(net, masks) as keeper:
        train(net, OPTIMIZERS[name](net.parameters()), accumulate=2, clip=0.5, autocast=torch.bfloat16)
        keeper.check()
    assert_kept(dict(net.named_parameters()), masks)
    assert all(not torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_weights_in_bfloat16():
    net, masks = masked()
    net.to(torch.bfloat16)
    with keep_masks(net, masks):
        optimizer = OPTIMIZERS["adamw"](net.parameters())
        for inputs, wanted in batches(STEPS, torch.bfloat16):
            nn.functional.mse_loss(net(inputs), wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_kept(dict(net.named_parameters()), masks)


def test_without_a_keeper_the_pattern_is_lost():
    """What these tests could not see if nothing were to lose."""
    net, masks = masked()
    train(net, OPTIMIZERS["adamw"](net.parameters()), steps=5)
    with pytest.raises(AssertionError):
        assert_kept(dict(net.named_parameters()), masks)


def test_it_trains_as_multiplying_with_the_masks_does():
    """The oracle: autograd through mask * weight, a plain optimizer on top, and no weight decay on what is dropped."""
    net, masks = masked()
    oracle = copy.deepcopy(net)
    with keep_masks(net, masks):
        losses = train(net, torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1), clip=0.5)
    for name, mask in masks.items():
        nn.utils.parametrize.register_parametrization(
            oracle.get_submodule(name.removesuffix(".weight")), "weight", _Times(mask)
        )
    expected = train(oracle, torch.optim.AdamW(oracle.parameters(), lr=1e-2, weight_decay=0.1), clip=0.5)
    assert losses == pytest.approx(expected, rel=1e-4)  # the norm is summed in another order


class _Times(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight * self.mask


def test_moments_from_before_do_not_fill_zeros():
    net, masks = masked()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    train(net, optimizer, steps=5)
    with keep_masks(net, masks):
        assert_kept(dict(net.named_parameters()), masks)  # at once
        train(net, optimizer, steps=5)
        assert_kept(dict(net.named_parameters()), masks)


def test_gradients_that_overflow_where_nothing_is_kept_do_no_harm():
    net, masks = masked()
    with keep_masks(net, masks):
        for name, mask in masks.items():
            weight = net.get_parameter(name)
            (weight * torch.where(mask, 1.0, torch.inf)).nan_to_num(0, 1, 1).sum().backward()
            weight.grad = None
            weight.register_hook(lambda grad, mask=mask: torch.where(mask, grad, torch.nan))
        train(net, OPTIMIZERS["adamw"](net.parameters()), steps=3)
    assert_kept(dict(net.named_parameters()), masks)
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_compiled():
    net, masks = masked()
    compiled = torch.compile(net, backend="aot_eager")
    with keep_masks(compiled, masks):
        train(compiled, OPTIMIZERS["adamw"](net.parameters()), steps=20)
    assert_kept(dict(net.named_parameters()), masks)


def test_another_model_trains_undisturbed():
    net, masks = masked()
    other, alone = Net(), None
    alone = copy.deepcopy(other)
    with keep_masks(net, masks):
        train(other, OPTIMIZERS["adamw"](other.parameters()), steps=5)
    train(alone, OPTIMIZERS["adamw"](alone.parameters()), steps=5)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), alone.parameters(), strict=True))


def test_what_is_let_go_is_free():
    net, masks = masked()
    keep_masks(net, masks).remove()
    train(net, OPTIMIZERS["adamw"](net.parameters()), steps=2)
    assert net.first.weight.count_nonzero() == net.first.weight.numel()


def test_what_is_let_go_can_still_be_looked_at():
    """And nothing is held again by that."""
    net, masks = masked()
    keeper = keep_masks(net, masks)
    keeper.remove()
    keeper.check()
    net.first.weight.data[~masks["first.weight"]] = 1
    with pytest.raises(CheckFailed, match="256 weights"):
        keeper.check()
    keeper.apply()
    keeper.check()
    assert not net.first.weight._post_accumulate_grad_hooks


def test_frozen_integers():
    """As 8-bit weights are; they never have gradients."""
    net, masks = masked()
    net.first.weight = nn.Parameter(torch.ones_like(net.first.weight, dtype=torch.int8), requires_grad=False)
    with keep_masks(net, masks) as keeper:
        keeper.check()
    assert torch.equal(net.first.weight != 0, masks["first.weight"])


def test_frozen_weights_that_thaw():
    net, masks = masked()
    net.requires_grad_(False)
    with keep_masks(net, masks):
        net.requires_grad_(True)
        net.first.weight.sum().backward()
        assert torch.equal(net.first.weight.grad != 0, masks["first.weight"])  # before the first step, too
        train(net, OPTIMIZERS["adamw"](net.parameters()), steps=5)
    assert_kept(dict(net.named_parameters()), masks)


def test_a_broken_mask_is_found():
    net, masks = masked()
    with keep_masks(net, masks) as keeper:
        net.first.weight.data[~masks["first.weight"]] = 1
        with pytest.raises(CheckFailed, match=r"first\.weight: 256 weights that the mask drops are not zero"):
            keeper.check()
        keeper.apply()
        keeper.check()


@pytest.mark.parametrize("wrong", ["third.weight", "second.weight"])
def test_masks_of_another_model(wrong):
    net, masks = masked()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputRefused, match=r"the mask .* of \[2, 2\] needs such a parameter"):
        keep_masks(net, {"first.weight": torch.zeros_like(masks["first.weight"]), wrong: torch.ones(2, 2)})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "masked, then refused"
    assert not net.first.weight._post_accumulate_grad_hooks


def test_a_training_that_breaks_off_leaves_others_alone():
    """As in a notebook: Trainer stopped, the model changed, another one trained."""
    hooks = len(_global_optimizer_post_hooks)
    net, masks = masked()
    callback = KeepMasks(masks)
    callback.on_train_begin(model=net)
    net.first = nn.Identity()
    other = Net()
    train(other, OPTIMIZERS["adamw"](other.parameters()), steps=1)
    whole, _ = masked()
    callback.on_train_begin(model=whole)
    assert len(_global_optimizer_post_hooks) == hooks + 1, "the first keeper is still there"
    whole.first.weight.data.fill_(1)
    with pytest.raises(CheckFailed):
        callback.on_train_end()
    assert len(_global_optimizer_post_hooks) == hooks
    train(whole, OPTIMIZERS["adamw"](whole.parameters()), steps=1)
    assert whole.first.weight.count_nonzero() == whole.first.weight.numel()


def test_a_model_that_was_not_loaded_from_there(tmp_path):
    source = make_checkpoint("llama", tmp_path / "source")
    prune(PruneSpec(str(source), tmp_path / "sparse", PATTERN))
    with pytest.raises(InputRefused, match="no such parameter of its shape"):
        model_masks(Net(), tmp_path / "sparse")


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.layers.0.weight",
        "module._orig_mod.layers.0.weight",
        "_orig_mod.module.layers.0.weight",
        "layers._orig_mod.0.weight",
        "layers.0._checkpoint_wrapped_module._orig_mod.weight",
        "base_model.model.layers.0.base_layer.weight",
    ],
)
def test_names_in_wrappers(name):
    class Wrapped(nn.Module):
        def named_parameters(self):
            return [(name, None)]

    assert [found for found, _ in parameters_of(Wrapped())] == ["layers.0.weight"]


def test_a_module_that_has_a_wrappers_name_keeps_it():
    assert [name for name, _ in parameters_of(nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(1, 1)})}))] == [
        "a.module.weight",
        "a.module.bias",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe", "gpt_oss", "qwen3_vl_moe"])
def test_masks_go_through_conversion_with_the_weights(architecture, tmp_path):
    """Experts are joined, transposed, renamed: the masks of the model are the zeros that transformers has loaded."""
    import transformers

    source = make_checkpoint(architecture, tmp_path / "source")
    report = prune(PruneSpec(str(source), tmp_path / "sparse", PATTERN))
    kind = getattr(transformers, report.model["architecture"])
    model = kind.from_pretrained(tmp_path / "sparse")
    masks = model_masks(model, tmp_path / "sparse")
    assert masks
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    sparse = {
        name
        for name, parameter in model.named_parameters()
        if (parameter == 0).float().mean() > 0.3 and parameter.dim() > 1
    }
    assert sparse == set(masks)
    with pytest.raises(InputRefused, match="the model has not the zeros"):
        model_masks(kind.from_pretrained(source), tmp_path / "sparse")

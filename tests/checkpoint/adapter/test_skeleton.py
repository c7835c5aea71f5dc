"""Layers come and go one at a time, as `from_pretrained` would have made them, or the checkpoint is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from checkpoints import load_whole, make_checkpoint, read_shards, write_checkpoint
from transformers.utils import logging

from tsenor_cli.checkpoint.adapter.skeleton import Skeleton, find_layers
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.errors import InputRefused


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = make_checkpoint(name, tmp_path_factory.mktemp("skeleton") / name)
        return made[name]

    return make


def skeleton_of(directory):
    return Skeleton(open_checkpoint(directory))


def live_bytes(module):
    return sum(parameter.nbytes for parameter in module.parameters() if not parameter.is_meta)


def edited(source, directory, edit):
    shards = read_shards(source)
    for tensors in shards.values():
        edit(tensors)
    return write_checkpoint(directory, shards, json.loads((source / "config.json").read_text()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "gemma3", "falcon", "gpt_neox"])
def test_everything_is_as_from_pretrained_makes_it(name, checkpoint_of):
    skeleton, expected = skeleton_of(checkpoint_of(name)), load_whole(checkpoint_of(name))
    for index in range(len(skeleton.layers)):
        skeleton.load_layer(index)
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(skeleton.model, kind)()), dict(getattr(expected, kind)())
        assert list(found) == list(wanted)
        for key, tensor in found.items():
            assert tensor.dtype == wanted[key].dtype, key
            assert torch.equal(tensor, wanted[key]), key


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("stored", ["twice", "twice, and they differ", "as the head alone"])
def test_a_tied_head_is_what_from_pretrained_makes_of_it(stored, tmp_path):
    """config.json may be wrong: weights that are there and differ are not tied, nor is a trained head thrown away."""

    def edit(tensors):
        if EMBEDDING in tensors:
            tensors[HEAD] = tensors[EMBEDDING] * (0.5 if "differ" in stored else 1)
            if "alone" in stored:
                del tensors[EMBEDDING]

    source = edited(make_checkpoint("qwen3", tmp_path / "qwen3"), tmp_path / "edited", edit)
    found, expected = skeleton_of(source).model, load_whole(source)
    embeddings = [
        (model.get_input_embeddings().weight, model.get_output_embeddings().weight) for model in (found, expected)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*embeddings, strict=True))
    assert [one is other for one, other in embeddings] == ["differ" not in stored] * 2


def test_buffers_that_another_module_fills(tmp_path):
    """Falcon-H1: the model computes the multipliers of its layers."""
    config = transformers.FalconH1Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8,
        ssm_multipliers=[1.5, 2.0, 3.0, 4.0, 5.0],
    )  # fmt: skip
    transformers.FalconH1ForCausalLM(config).save_pretrained(tmp_path)
    skeleton, expected = skeleton_of(tmp_path), load_whole(tmp_path)
    for layer, wanted in zip(skeleton.layers, expected.model.layers, strict=True):
        assert torch.equal(layer.mamba.mup_vector, wanted.mamba.mup_vector)
        assert layer.mamba.mup_vector.max() == 5


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_one_layer_is_in_memory_at_a_time(name, checkpoint_of):
    skeleton = skeleton_of(checkpoint_of(name))
    assert live_bytes(skeleton.layers) == 0
    for index, layer in enumerate(skeleton.layers):
        assert skeleton.load_layer(index) is layer
        assert live_bytes(skeleton.layers) == live_bytes(layer) == sum(p.nbytes for p in layer.parameters())
        skeleton.drop_layer(index)
        assert live_bytes(skeleton.layers) == 0


def test_a_layer_comes_back_unchanged(checkpoint_of):
    skeleton, name = skeleton_of(checkpoint_of("llama")), "model.layers.0.mlp.up_proj.weight"
    original = skeleton.load_layer(0).mlp.up_proj.weight.clone()
    skeleton.drop_layer(0)
    assert not skeleton.load_layer(0, {name: torch.zeros_like(original)}).mlp.up_proj.weight.any()
    skeleton.drop_layer(0)
    assert torch.equal(skeleton.load_layer(0).mlp.up_proj.weight, original)
    assert not any(parameter.requires_grad for parameter in skeleton.model.parameters())


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("qwen3", True), ("gpt2", True)])
def test_outside_bytes_count_a_tied_head_once(name, tied, checkpoint_of):
    skeleton, model = skeleton_of(checkpoint_of(name)), load_whole(checkpoint_of(name))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied
    layers = {id(parameter) for parameter in model.get_submodule(skeleton.layers_name).parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in layers]
    assert skeleton.outside_bytes() == sum(parameter.nbytes for parameter in outside)
    skeleton.load_layer(0)
    assert skeleton.outside_bytes() == sum(parameter.nbytes for parameter in outside)


def test_each_tensor_belongs_to_its_layer(checkpoint_of):
    skeleton = skeleton_of(checkpoint_of("mixtral"))
    assert skeleton.layers_name == "model.layers"
    for index in range(2):
        names = {tensor.name for tensor in skeleton.tensors_of(index)}
        assert names == {name for name in skeleton.checkpoint.tensors if name.startswith(f"model.layers.{index}.")}
    assert "lm_head.weight" not in skeleton.layer_of


def test_a_tensor_of_no_layer_is_none_of_its_own(checkpoint_of):
    """The tiny Llama has a weight of a tenth layer, which the model class does not know."""
    assert "model.layers.9.mtp.weight" not in skeleton_of(checkpoint_of("llama")).layer_of


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("t5", "has an encoder and a decoder"),
        ("whisper", "has an encoder and a decoder"),
        ("resnet", "has no list of layers that can be recognised"),
    ],
)
def test_models_without_one_stack_of_layers_are_refused(name, why, checkpoint_of):
    with pytest.raises(InputRefused, match=why) as refusal:
        skeleton_of(checkpoint_of(name))
    assert refusal.value.exit_code == 3
    assert "--method magnitude" in refusal.value.remedy


def test_layers_that_share_weights_are_refused(checkpoint_of):
    """Zamba: dropping one would take the other's weights away."""
    model = skeleton_of(checkpoint_of("llama")).model
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(InputRefused, match="share weights") as refusal:
        find_layers(model)
    assert refusal.value.exit_code == 3


def test_a_missing_tensor_outside_the_layers(checkpoint_of, tmp_path):
    directory = edited(checkpoint_of("llama"), tmp_path / "edited", lambda tensors: tensors.pop("model.norm.weight", 0))
    with pytest.raises(InputRefused, match=r"model\.norm\.weight is not in .*incomplete") as refusal:
        skeleton_of(directory)
    assert refusal.value.exit_code == 3


def test_a_missing_tensor_of_a_layer(checkpoint_of, tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    directory = edited(checkpoint_of("llama"), tmp_path / "edited", lambda tensors: tensors.pop(name, 0))
    skeleton = skeleton_of(directory)
    skeleton.load_layer(0)
    with pytest.raises(InputRefused, match=rf"{name} is not in .*incomplete") as refusal:
        skeleton.load_layer(1)
    assert refusal.value.exit_code == 3


def test_a_missing_expert(checkpoint_of, tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    directory = edited(checkpoint_of("mixtral"), tmp_path / "edited", lambda tensors: tensors.pop(name, 0))
    with pytest.raises(InputRefused) as refusal:
        skeleton_of(directory).load_layer(1)
    assert refusal.value.exit_code == 3


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_shapes_that_config_json_does_not_expect(name, checkpoint_of, tmp_path):
    def widen(tensors):
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], tensors[name]])

    directory = edited(checkpoint_of("llama"), tmp_path / "edited", widen)
    with pytest.raises(InputRefused, match=r"cannot load .*do not fit config\.json") as refusal:
        skeleton_of(directory).load_layer(0)
    assert refusal.value.exit_code == 3


def test_progress_bars_of_transformers_are_as_before(checkpoint_of):
    shown = logging.is_progress_bar_enabled()
    skeleton_of(checkpoint_of("llama"))
    assert logging.is_progress_bar_enabled() == shown


def test_everything_outside_can_be_dropped(tmp_path):
    skeleton = Skeleton(open_checkpoint(make_checkpoint("llama", tmp_path / "model")))
    skeleton.load_layer(1)
    skeleton.drop_outside()
    live = {name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta}
    assert live
    assert all(name.startswith("model.layers.1.") for name in live)
    assert not any(buffer.is_meta for buffer in skeleton.model.buffers())

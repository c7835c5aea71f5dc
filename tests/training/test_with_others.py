"""The keeper under what people train with: torchrun with DDP and FSDP2, transformers' Trainer, adapters of peft."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from nets import OPTIMIZERS, PATTERN, STEPS
from torch import nn

from tsenor_cli import solve_mask
from tsenor_cli.errors import InputRefused, UsageError
from tsenor_cli.pipeline import prune, verify
from tsenor_cli.specs import PruneSpec
from tsenor_cli.training import KeepMasks, mask_adapters, merge_lora, model_masks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A tiny Llama that is transposable 2:4."""
    folder = tmp_path_factory.mktemp("sparse")
    prune(PruneSpec(str(make_checkpoint("llama", folder / "dense")), folder / "sparse", PATTERN))
    return folder / "sparse"


def load(directory, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **options)


def rows():
    return torch.randint(5, 90, (16, 12), generator=torch.Generator().manual_seed(0))


def assert_pattern(model, directory, sparse):
    """Saved and checked from the files, and the zeros are those of before, bit for bit."""
    model.save_pretrained(directory)
    found = verify(str(directory), PATTERN)
    assert found.ok, found.failures
    before, after = load(sparse), load(directory)
    for name, mask in model_masks(before, sparse).items():
        assert torch.equal(after.get_parameter(name) != 0, mask)
        assert not torch.equal(after.get_parameter(name), before.get_parameter(name))


def test_several_processes(sparse, tmp_path):
    script = Path(__file__).parent / "train_together.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [*command, sparse, tmp_path / "out"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_pattern(load(tmp_path / "out"), tmp_path / "saved", sparse)


def test_trainer(sparse, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = load(sparse, dtype=torch.float32)
    arguments = TrainingArguments(
        tmp_path / "trainer",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows()]
    Trainer(model, arguments, train_dataset=data, callbacks=[KeepMasks(sparse)]).train()
    assert_pattern(model.to(torch.bfloat16), tmp_path / "out", sparse)


def adapted(sparse, *, masked=False):
    """The Llama with trained adapters."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(sparse, dtype=torch.float32), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    if masked:
        assert len(mask_adapters(model, sparse)) == 4
    optimizer = OPTIMIZERS["adamw"]([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(20):
        with torch.enable_grad():
            model(input_ids=rows(), labels=rows()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_adapters_merge_into_the_pattern(sparse, tmp_path):
    model = adapted(sparse)
    dense = copy.deepcopy(model).merge_and_unload()
    before = load(sparse, dtype=torch.float32)
    masks = model_masks(before, sparse)
    plain, merged = merge_lora(model, sparse)
    assert [weight.name for weight in merged] == [name for name in masks if "q_proj" in name or "down_proj" in name]
    for weight in merged:
        old, mask = before.get_parameter(weight.name), masks[weight.name]
        delta = dense.get_parameter(weight.name) - old
        assert torch.equal(plain.get_parameter(weight.name), torch.where(mask, dense.get_parameter(weight.name), 0.0))
        assert weight.lost == pytest.approx(float((delta[~mask] ** 2).sum() / (delta**2).sum()), rel=1e-4)
        assert weight.change == pytest.approx(float((delta[mask] ** 2).sum() / (old**2).sum()), rel=1e-4)
        assert 0.3 < weight.lost < 0.7
    assert not any("lora" in name for name, _ in plain.named_parameters())
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "out")
    assert verify(str(tmp_path / "out"), PATTERN).ok
    assert isinstance(plain.get_submodule("model.layers.0.self_attn.q_proj"), nn.Linear)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_what_masked_adapters_were_trained_to_is_what_the_merge_gives(sparse):
    model = adapted(sparse, masked=True).eval()
    trained, untrained = model(input_ids=rows()).logits, load(sparse, dtype=torch.float32)(input_ids=rows()).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=rows()).logits, untrained)
    by_peft = copy.deepcopy(model).merge_and_unload()
    plain, merged = merge_lora(model, sparse)
    torch.testing.assert_close(by_peft(input_ids=rows()).logits, trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain(input_ids=rows()).logits, trained, rtol=1e-4, atol=1e-5)
    assert [weight.lost for weight in merged] == [0.0] * 4
    assert (trained - untrained).abs().max() > 0.1

    model = adapted(sparse).eval()
    trained = model(input_ids=rows()).logits
    plain, _ = merge_lora(model, sparse)
    assert (plain(input_ids=rows()).logits - trained).abs().max() > 0.1  # unmasked, much is lost


@torch.no_grad()
def test_adapters_of_weights_that_lie_the_other_way_round():
    """GPT-2 has its linear maps as [in, out], and so are their masks."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    mask = torch.tensor([[True, False], [False, True]]).repeat(8, 4)  # [in, out] = [16, 8]
    net = nn.Sequential(Conv1D(8, 16))
    net[0].weight.mul_(mask)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True, init_lora_weights=False))
    lora, x = model.get_submodule("base_model.model.0"), torch.randn(5, 16)
    product = lora.lora_A["default"].weight.T @ lora.lora_B["default"].weight.T  # [in, out]
    weight = torch.where(mask, net[0].weight + product * lora.scaling["default"], 0)
    assert mask_adapters(model, {"0.weight": mask}) == ["0.weight"]
    torch.testing.assert_close(model(x), x @ weight + net[0].bias)
    plain, (merged,) = merge_lora(model, {"0.weight": mask})
    torch.testing.assert_close(plain.get_parameter("0.weight"), weight)
    assert merged.lost == 0.0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_of_experts(tmp_path):
    """Several parameters of one module, which peft wraps once for each."""
    from peft import LoraConfig, get_peft_model

    prune(PruneSpec(str(make_checkpoint("mixtral", tmp_path / "dense")), tmp_path / "sparse", PATTERN))
    model, experts = load(tmp_path / "sparse", dtype=torch.float32), ["gate_up_proj", "down_proj"]
    masks = model_masks(model, tmp_path / "sparse")
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{name}" for name in experts])
    plain, merged = merge_lora(get_peft_model(model, config), tmp_path / "sparse")
    assert sorted(weight.name for weight in merged) == sorted(
        name for name in masks if "q_proj" in name or name.endswith(tuple(experts))
    )
    for name, parameter in plain.named_parameters():
        assert name not in masks or not parameter[~masks[name]].any()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A pruned checkpoint whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    prune(PruneSpec(str(make_checkpoint("qwen3", folder / "dense")), folder / "sparse", PATTERN))
    return folder / "sparse"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_head_that_was_trained_apart_stays_itself(tied, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(tied), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
    plain, _ = merge_lora(model, tied)
    assert torch.equal(plain.lm_head.weight, 2 * plain.model.embed_tokens.weight)
    plain.save_pretrained(tmp_path / "out")
    assert not load(tmp_path / "out").config.tie_word_embeddings
    assert torch.equal(load(tmp_path / "out").lm_head.weight, plain.lm_head.weight)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_of_tied_weights_are_refused(target, tied):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(tied), LoraConfig(r=4, target_modules=["q_proj", target]))
    with pytest.raises(InputRefused, match="is tied to another weight"):
        merge_lora(model, tied)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_what_else_is_tied_stays_so(tmp_path):
    """BART ties its head and both embeddings, with one word in config.json for all of it."""
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.BartConfig(
        vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    net = transformers.BartForConditionalGeneration(config)
    name = "model.encoder.layers.0.fc1.weight"
    masks = {name: solve_mask(net.get_parameter(name), PATTERN, absolute=True).mask}
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["lm_head"]))
    model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
    plain, _ = merge_lora(model, masks)
    plain.save_pretrained(tmp_path)
    again = transformers.BartForConditionalGeneration.from_pretrained(tmp_path)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_rows_of_a_tied_embedding_that_were_trained(tied):
    """What peft trains of both it ties, so a merge changes both."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]})
    model = get_peft_model(load(tied, dtype=torch.float32), config)
    for parameter_name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in parameter_name:
            parameter.mul_(2)
    trained = model(input_ids=rows()).logits
    plain, _ = merge_lora(model, tied)
    torch.testing.assert_close(plain(input_ids=rows()).logits, trained, rtol=1e-4, atol=1e-5)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_masked_adapters_are_not_mixed_in_a_batch(sparse):
    model = adapted(sparse, masked=True).eval()
    with pytest.raises(UsageError, match="cannot be mixed in a batch"):
        model(input_ids=rows(), adapter_names=["default"] * len(rows()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_of_other_kinds_are_refused(sparse):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UsageError, match="no adapters"):
        merge_lora(load(sparse), sparse)
    model = get_peft_model(load(sparse), LoraConfig(r=4, target_modules=["q_proj"]))
    name = "model.layers.0.self_attn.q_proj.weight"
    for masks in ({f"base_model.model.{name}": torch.ones(64, 64)}, {name: torch.ones(2, 2)}):
        with pytest.raises(InputRefused, match=r"needs such a parameter"):
            mask_adapters(model, masks)
    mask_adapters(model, sparse)
    model.add_adapter("later", LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    model.set_adapter("later")
    with pytest.raises(InputRefused, match="later is no plain LoRA"):
        model(input_ids=rows())
    model = get_peft_model(load(sparse), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(InputRefused, match=r"the adapter of .*q_proj\.weight is no plain LoRA"):
        mask_adapters(model, sparse)

"""What a calibrated run is said to need, part by part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import ARCHITECTURES, HIDDEN, VOCAB, make_checkpoint

from tsenor_cli.calibration.memory import expected_memory
from tsenor_cli.calibration.replay import Replay
from tsenor_cli.checkpoint.adapter.skeleton import Skeleton
from tsenor_cli.checkpoint.plan import make_plan
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.device import CPU, computed_in
from tsenor_cli.errors import InputRefused
from tsenor_cli.specs import CalibrationSpec, NMPattern, PruneSpec


def parts(architecture, tmp_path, method="sparsegpt"):
    directory = tmp_path / architecture
    if not directory.exists():
        make_checkpoint(architecture, directory)
    spec = PruneSpec(
        str(directory), Path("out"), NMPattern(2, 4, transposable=False), method, calibration=CalibrationSpec("x")
    )
    return expected_memory(make_plan(open_checkpoint(directory), spec), samples=10, length=32)


def test_the_parts_of_a_llama(tmp_path):
    """By hand: hidden 64, feed-forward 96, keys and values of 32; q, k and v read one input, gate and up another."""
    found = parts("llama", tmp_path)
    assert found["Gram matrices of a layer"] == 8 * (3 * HIDDEN**2 + 96**2)
    layer = 2 * HIDDEN**2 + 2 * 32 * HIDDEN + 3 * 96 * HIDDEN + 2 * HIDDEN
    itemsize = computed_in(torch.bfloat16, CPU).itemsize
    assert found["two decoder layers"] == itemsize * 2 * layer
    assert found["outside the decoder layers"] == itemsize * (2 * VOCAB * HIDDEN + HIDDEN)
    assert found["hidden states"] == itemsize * 10 * 32 * HIDDEN


def test_norms_need_no_gram_matrices(tmp_path):
    assert parts("llama", tmp_path, "wanda")["Gram matrices of a layer"] == 0


def test_every_expert_counts(tmp_path):
    """Mixtral: 4 experts of width 32; attention as above. Gate and up of one expert read the same."""
    found = parts("mixtral", tmp_path)
    assert found["Gram matrices of a layer"] == 8 * (2 * HIDDEN**2 + 4 * (HIDDEN**2 + 32**2))


def test_without_a_look_at_the_model_every_weight_counts(tmp_path, monkeypatch):
    """Some models cannot run without values; then nothing is known to be shared."""

    def cannot(*_, **__):
        raise RuntimeError("needs values")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", cannot)
    assert parts("llama", tmp_path)["Gram matrices of a layer"] == 8 * (6 * HIDDEN**2 + 96**2)


@pytest.mark.parametrize(("method", "more"), [("alps", True), ("wanda", False)])
def test_methods_differ_in_their_work(method, more, tmp_path, monkeypatch):
    monkeypatch.setattr("tsenor_cli.calibration.memory.BATCH_TOKENS", 0)
    work = {name: parts("llama", tmp_path, name)["a batch, or work on a weight"] for name in (method, "sparsegpt")}
    assert (work[method] > work["sparsegpt"]) is more


def saved(model, directory):
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def memory_of(directory, length=32, **options):
    spec = PruneSpec(str(directory), Path("out"), NMPattern(2, 4, transposable=False), "sparsegpt", **options)
    return expected_memory(make_plan(open_checkpoint(directory), spec), samples=10, length=length)


def test_what_depends_on_tokens_and_stands_beside_the_hidden_states(tmp_path):
    """Gemma 3n: four streams of hidden states, and an embedding of every token for each layer."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=96, vocab_size_per_layer_input=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size_per_layer_input=32, laurel_rank=8,
        num_kv_shared_layers=0, layer_types=["full_attention"] * 3, activation_sparsity_pattern=[0.0] * 3,
    )  # fmt: skip
    source = saved(transformers.Gemma3nForCausalLM(config), tmp_path)
    found = memory_of(source)  # all are called, though some are not while a model is trained
    itemsize = computed_in(torch.bfloat16, CPU).itemsize
    assert found["hidden states"] == itemsize * 10 * 32 * 4 * 64
    assert found["what layers are given beside"] == itemsize * 10 * 32 * 3 * 32
    skeleton = Skeleton(open_checkpoint(source))
    with Replay(skeleton, list(torch.zeros(10, 32, dtype=torch.int64).split(5))) as replay:
        assert sum(replay.hidden[batch].nbytes for batch in range(2)) == found["hidden states"]


def test_states_that_are_wider_than_the_model(tmp_path):
    """Those of Mamba are float32."""
    config = transformers.Mamba2Config(**ARCHITECTURES["mamba2"].config)
    assert memory_of(saved(transformers.Mamba2ForCausalLM(config), tmp_path))["hidden states"] == 4 * 10 * 32 * 64


def test_attention_that_computes_all_scores(tmp_path):
    """GPT-J knows no other; Llama goes over them in blocks."""
    config = transformers.GPTJConfig(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=512, rotary_dim=8)
    source, llama = saved(transformers.GPTJForCausalLM(config), tmp_path / "gptj"), make_checkpoint("llama", tmp_path)
    part, itemsize = "a batch, or work on a weight", computed_in(torch.bfloat16, CPU).itemsize
    longer = {place: memory_of(place, 2048)[part] - memory_of(place, 1024)[part] for place in (source, llama)}
    assert longer == {source: (2048**2 - 2 * 1024**2) * 4 * (8 + 2 * itemsize), llama: 0}


def test_weights_whose_modules_are_never_called(tmp_path):
    """Noticed at once, and all of them."""
    config = transformers.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8)
    source = saved(transformers.MambaForCausalLM(config), tmp_path)
    with pytest.raises(InputRefused, match=r"never calls .*--ignore 'backbone\.layers\.\*\.mixer\.dt_proj\.weight'$"):
        memory_of(source)
    assert memory_of(source, ignore=("backbone.layers.*.mixer.dt_proj.weight",))

"""What experts are given is seen, and their outputs stay those of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from checkpoints import ARCHITECTURES, make_checkpoint

from tsenor_cli.calibration.statistics import Collector
from tsenor_cli.checkpoint.adapter.experts import watched_experts
from tsenor_cli.checkpoint.site import Site

MIXTURES = {
    "mixtral": "gate_up_proj",
    "qwen3_moe": "gate_up_proj",
    "gpt_oss": "gate_up_proj",
    "qwen2_moe": "gate_up_proj",
}


def load(architecture, tmp_path):
    directory = make_checkpoint(architecture, tmp_path / architecture)
    model = getattr(transformers, ARCHITECTURES[architecture].model_class).from_pretrained(directory)
    return model.float().eval(), ARCHITECTURES[architecture].inputs()


@pytest.mark.parametrize("architecture", MIXTURES)
def test_outputs_are_the_models_own(architecture, tmp_path):
    model, inputs = load(architecture, tmp_path)
    implementation = model.get_experts_implementation()
    with torch.no_grad():
        expected = model(**inputs).logits
        with watched_experts(model, lambda *_: None):
            watched = model(**inputs).logits
        assert model.get_experts_implementation() == implementation
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.allclose(watched, expected, atol=1e-5)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_what_an_expert_is_given(architecture, tmp_path):
    """Against the experts' eager code, whose matrix products are watched from below."""
    model, inputs = load(architecture, tmp_path)
    name, experts = next((n, m) for n, m in model.named_modules() if hasattr(m, "has_gate"))
    sites = [Site(name, parameter, fused=True) for parameter in ("gate_up_proj", "down_proj")]
    collector = Collector(model, sites, gram=True)
    routed = []
    hook = experts.register_forward_pre_hook(lambda _, args, kwargs: routed.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad(), collector.watching():
        model(**inputs)
    hook.remove()
    ((args, kwargs),) = routed
    hidden, chosen = [*args, *kwargs.values()][:2]
    stats = collector.results()
    for expert in range(len(experts.down_proj)):
        given = hidden[(chosen == expert).any(-1)].double()
        site = sites[0].of_expert(expert)
        if not len(given):
            assert site not in stats
            continue
        assert stats[site].tokens == len(given)
        assert torch.allclose(stats[site].gram, given.T @ given, rtol=1e-5, atol=1e-4)
        assert stats[sites[1].of_expert(expert)].tokens == len(given)
        weight = experts.gate_up_proj[expert].double()
        opened = given @ weight if experts.is_transposed else given @ weight.T
        opened = opened + experts.gate_up_proj_bias[expert] if experts.has_bias else opened
        inner = experts._apply_gate(opened.float()).double()
        assert torch.allclose(stats[sites[1].of_expert(expert)].gram, inner.T @ inner, rtol=1e-4, atol=1e-6)
    assert sum(s.tokens for site, s in stats.items() if site.parameter == "gate_up_proj") == chosen.numel()


def test_one_expert_alone(tmp_path):
    model, inputs = load("mixtral", tmp_path)
    wanted = Site("model.layers.0.mlp.experts", "down_proj", 2, fused=True)
    collector = Collector(model, [wanted], gram=False)
    with torch.no_grad(), collector.watching():
        model(**inputs)
    assert set(collector.results()) <= {wanted}


def test_a_model_without_experts_is_left_alone():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=8
    )
    with watched_experts(transformers.LlamaForCausalLM(config), lambda *_: pytest.fail("nothing to see")):
        pass

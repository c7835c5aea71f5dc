"""Calibrated pruning of whole checkpoints, against the whole model in memory and a few lines of torch."""

from __future__ import annotations

import hashlib
import json
import random
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import add_tokenizer, load_whole, make_checkpoint, read_shards
from torch import nn

from tsenor_cli.calibration.statistics import Collector
from tsenor_cli.device import CPU, computed_in
from tsenor_cli.errors import InputRefused, UsageError
from tsenor_cli.pipeline import plan_prune, prune, verify
from tsenor_cli.specs import CalibrationSpec, Choice, NMPattern, PruneSpec, Rule

STANDARD = NMPattern(2, 4, transposable=False)
SAMPLES, LENGTH = 12, 32


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Words of letters, too many for the windows that are wanted."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh ijklmnop,.", k=7)) for _ in range(400)]
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Checkpoints that can read, made once."""
    made: dict[str, Path] = {}

    def model(architecture: str) -> Path:
        if architecture not in made:
            directory = tmp_path_factory.mktemp("models") / architecture
            made[architecture] = add_tokenizer(make_checkpoint(architecture, directory))
        return made[architecture]

    return model


def spec(model, output, text, method, pattern=STANDARD, **options):
    calibration = CalibrationSpec(str(text), samples=SAMPLES, sequence_length=LENGTH)
    return PruneSpec(str(model), output, pattern, method, calibration=calibration, **options)


def tensors(directory):
    return {name: tensor for shard in read_shards(directory).values() for name, tensor in shard.items()}


def digest(directory):
    files = sorted(directory.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def inputs_of(model, names, windows):
    """What the named modules of a whole model are given, [tokens, in], in one forward pass of all windows."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2).float())
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    return seen


def windows_of(report, model, text):
    """The windows that the report's run saw, found again from its own words: samples, length, seed."""
    from tsenor_cli.calibration.tokens import calibration_windows
    from tsenor_cli.checkpoint.adapter.tokenizer import CheckpointTokenizer

    tokens = calibration_windows(str(text), CheckpointTokenizer(model), samples=SAMPLES, length=LENGTH, seed=0)
    assert tokens.to_dict() == report.calibration
    return tokens.windows


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3"])
def test_wanda_is_what_the_whole_model_in_memory_gives(architecture, models, text, tmp_path):
    """Layer after layer: |w|·‖x‖ with x from the model whose earlier layers are pruned already; two largest of four."""
    source = models(architecture)
    report = prune(spec(source, tmp_path / "out", text, "wanda"))
    model, pruned = load_whole(source), load_whole(tmp_path / "out")
    windows = windows_of(report, source, text)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    prefix = next(name for name, m in model.named_modules() if m is layers)
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    checked = 0
    for index, layer in enumerate(layers):
        names = [f"{prefix}.{index}.{name}" for name, m in layer.named_modules() if isinstance(m, kinds)]
        for name, x in inputs_of(model, names, windows).items():
            module, other = model.get_submodule(name), pruned.get_submodule(name)
            turned = isinstance(module, transformers.pytorch_utils.Conv1D)
            weight = module.weight.T if turned else module.weight
            scores = weight.float().abs() * x.double().square().sum(0).sqrt().float()
            best = scores.view(len(weight), -1, 4).topk(2).indices
            mask = torch.zeros(len(weight), weight.shape[1] // 4, 4).scatter(2, best, 1.0).view_as(weight).bool()
            expected = torch.where(mask, weight, 0)
            found = other.weight.T if turned else other.weight
            assert (found != expected).float().mean() < 2e-3, name  # ties of scores that rounding decides
            module.weight.data = other.weight.data  # the next layer sees what the pruned ones before it give
            checked += 1
    assert checked == report.summary.pruned_tensors


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", [STANDARD, NMPattern(2, 4), NMPattern(8, 16)], ids=lambda p: f"{p}-{p.kind}")
def test_methods_keep_their_promises(method, pattern, models, text, tmp_path):
    source = models("llama")
    report = prune(spec(source, tmp_path / "out", text, method, pattern))
    check = verify(str(tmp_path / "out"), against=str(source))
    assert check.ok, check.failures
    before, after = tensors(source), tensors(tmp_path / "out")
    for record in report.tensors:
        old, new = before[record.name], after[record.name]
        assert old.dtype == new.dtype
        if record.action == "kept":
            assert torch.equal(old, new)
            continue
        kept = new != 0
        assert torch.equal(old[kept], new[kept]) is (method == "wanda")
        assert record.method == method
        assert record.tokens == SAMPLES * LENGTH
        if method != "wanda":
            assert 0 < record.error < record.mask_error < 1
            assert record.damping == pytest.approx(0.01)
    assert report.summary.coverage == 1
    assert set(report.citations) == {method}


def test_the_error_in_the_report_is_that_of_the_outputs(models, text, tmp_path):
    """Against the outputs of the first layer's weights, computed by torch from the files."""
    source = models("qwen3")
    report = prune(spec(source, tmp_path / "out", text, "sparsegpt"))
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    model, after = load_whole(source), tensors(tmp_path / "out")
    before = tensors(source)
    for name, x in inputs_of(model, names, windows_of(report, source, text)).items():
        old, new = (found[f"{name}.weight"].double() for found in (before, after))
        record = next(r for r in report.tensors if r.name == f"{name}.weight")
        masked = torch.where(new != 0, old, 0)
        out = (x.double() @ old.T).square().sum()
        assert record.output_energy == pytest.approx(out.item(), rel=1e-4)
        assert record.error == pytest.approx(((x.double() @ (old - new).T).square().sum() / out).item(), rel=1e-3)
        assert record.mask_error == pytest.approx(
            ((x.double() @ (old - masked).T).square().sum() / out).item(), rel=1e-3
        )


@pytest.mark.parametrize(
    "architecture", ["mixtral", "qwen3_moe", "gpt_oss", "gpt_neox", "falcon", "bloom", "bert", "mamba2"]
)
def test_other_architectures(architecture, models, text, tmp_path):
    source = models(architecture)
    report = prune(spec(source, tmp_path / "out", text, "sparsegpt", NMPattern(2, 4)))
    assert verify(str(tmp_path / "out"), against=str(source)).ok
    calibrated = [r for r in report.tensors if r.tokens]
    assert calibrated
    assert all(r.error < r.mask_error for r in calibrated if not r.fallbacks)
    assert report.summary.coverage > 0.9


def test_experts_with_few_tokens(models, text, tmp_path):
    """An expert of Mixtral has 64 inputs: with so little text none sees as many tokens."""
    source = models("mixtral")
    few = CalibrationSpec(str(text), samples=2, sequence_length=16)
    wanted = PruneSpec(str(source), tmp_path / "out", STANDARD, "sparsegpt", calibration=few)
    report = prune(wanted)
    experts = [r for r in report.tensors if ".experts." in r.name and ".w1." in r.name]
    assert all("fewer than its 64 inputs" in r.fallbacks[0] for r in experts)
    assert all(r.fallbacks is None for r in report.tensors if "self_attn" in r.name)
    before, after = tensors(source), tensors(tmp_path / "out")
    for record in experts:
        assert record.tokens < 64
        assert record.error == record.mask_error
        assert (record.error > 0) == (record.tokens > 0)
        kept = after[record.name] != 0
        assert torch.equal(after[record.name][kept], before[record.name][kept])
    with pytest.raises(InputRefused, match="give more text"):
        prune(PruneSpec(str(source), tmp_path / "no", STANDARD, "sparsegpt", calibration=few, few_tokens="error"))
    assert not (tmp_path / "no").exists()


def test_a_recipe_of_everything(models, text, tmp_path):
    source = models("llama")
    rules = (
        Rule(("*.self_attn.[kv]_proj",), None),
        Rule(("*.self_attn.*",), Choice(NMPattern(8, 16), "alps")),
        Rule(("*.up_proj",), Choice(STANDARD, "magnitude")),
    )
    report = prune(spec(source, tmp_path / "out", text, "sparsegpt", NMPattern(1, 4), rules=rules))
    found = {r.name.removeprefix("model.layers.0."): (r.pattern, r.transposable, r.method) for r in report.tensors}
    assert found["self_attn.q_proj.weight"] == ("8:16", True, "alps")
    assert found["self_attn.k_proj.weight"] == (None, None, None)
    assert found["mlp.up_proj.weight"] == ("2:4", False, "magnitude")
    assert found["mlp.down_proj.weight"] == ("1:4", True, "sparsegpt")
    check = verify(str(tmp_path / "out"), against=str(source))
    assert check.ok, check.failures
    assert set(report.citations) == {"alps", "magnitude", "sparsegpt"}
    assert [rule["match"] for rule in report.options["rules"]] == [list(rule.match) for rule in rules]
    written = json.loads((tmp_path / "out" / "tsenor-report.json").read_text())
    assert written["options"]["rules"][0] == {"match": ["*.self_attn.[kv]_proj"], "skip": True}


def test_the_same_bytes_again_and_from_disk(models, text, tmp_path):
    source = models("llama")
    first = spec(source, tmp_path / "1", text, "sparsegpt")
    prune(first)
    prune(spec(source, tmp_path / "2", text, "sparsegpt"))
    plan = plan_prune(first)
    assert not plan.spills
    tight = plan.peak_bytes - 1
    assert plan_prune(spec(source, tmp_path / "3", text, "sparsegpt", memory_budget=tight)).spills
    prune(spec(source, tmp_path / "3", text, "sparsegpt", memory_budget=tight))
    assert digest(tmp_path / "1") == digest(tmp_path / "2") == digest(tmp_path / "3")
    assert sorted(p.name for p in (tmp_path / "3").iterdir()) == sorted(p.name for p in (tmp_path / "1").iterdir())
    with pytest.raises(UsageError, match="too small"):
        plan_prune(spec(source, tmp_path / "4", text, "sparsegpt", memory_budget=1000))


def test_mask_alone(models, text, tmp_path):
    source = models("llama")
    report = prune(spec(source, tmp_path / "out", text, "sparsegpt", update=False))
    check = verify(str(tmp_path / "out"), against=str(source))  # every kept weight is the original's
    assert check.ok
    assert all(r.error == r.mask_error for r in report.tensors if r.action == "pruned")


def test_perplexity_before_and_after(models, text, tmp_path):
    report = prune(spec(models("llama"), tmp_path / "out", text, "wanda", eval_text=str(text)))
    before, after = report.perplexity["before"], report.perplexity["after"]
    assert before["tokens_sha256"] == after["tokens_sha256"]
    assert before["perplexity"] > 1
    assert before["perplexity"] != after["perplexity"]
    assert before["dtype"] == str(computed_in(torch.bfloat16, CPU)).removeprefix("torch.")


@pytest.mark.parametrize("architecture", ["t5", "whisper", "resnet", "vit"])
def test_what_cannot_be_calibrated_is_refused(architecture, models, text, tmp_path):
    with pytest.raises(InputRefused, match="--method magnitude"):
        prune(spec(models(architecture), tmp_path / "out", text, "sparsegpt"))
    assert not (tmp_path / "out").exists()


def test_requests_that_make_no_sense(models, text, tmp_path):
    source = str(models("llama"))
    with pytest.raises(UsageError, match="--calibration FILE"):
        prune(PruneSpec(source, tmp_path / "out", STANDARD, "wanda"))
    with pytest.raises(UsageError, match="no method needs it"):
        prune(spec(source, tmp_path / "out", text, "magnitude"))
    with pytest.raises(UsageError, match="no method changes weights"):
        prune(spec(source, tmp_path / "out", text, "wanda", update=False))
    long = CalibrationSpec(str(text), sequence_length=65)
    with pytest.raises(UsageError, match="2 to 64 tokens"):
        prune(PruneSpec(source, tmp_path / "out", STANDARD, "wanda", calibration=long))
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_is_named(text, tmp_path):
    source = make_checkpoint("llama", tmp_path / "llama")  # its tokenizer.json is none
    with pytest.raises(InputRefused, match="no tokenizer"):
        prune(spec(source, tmp_path / "out", text, "wanda"))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_weights_that_are_not_finite_are_named(name, models, text, tmp_path):
    """And not the text, though it is inputs that show it."""
    from checkpoints import write_checkpoint

    source = models("llama")
    shards = read_shards(source)
    for shard in shards.values():
        if name in shard:
            shard[name][:, 1:3] = float("nan")
    config = json.loads((source / "config.json").read_text())
    broken = add_tokenizer(write_checkpoint(tmp_path / "broken", shards, config))
    with pytest.raises(InputRefused, match=rf"{name} has NaN or infinite weights, and so have the inputs of") as caught:
        prune(spec(broken, tmp_path / "out", text, "wanda"))
    assert caught.value.code == "nonfinite-weights"


def test_inputs_that_overflow_are_named(models, text, tmp_path, monkeypatch):
    monkeypatch.setattr("tsenor_cli.pruners.base.is_finite", lambda _: False)
    with pytest.raises(InputRefused, match=r"layers\.0.*: the inputs seen in calibration") as caught:
        prune(spec(models("llama"), tmp_path / "out", text, "sparsegpt"))
    assert caught.value.code == "nonfinite-inputs"


def test_what_was_seen_of_a_layer_is_gone_before_the_next(models, text, tmp_path, monkeypatch):
    """Gram matrices, and all that was computed of them."""
    seen, results = [], Collector.results

    def watched(collector, owners=None):
        assert not any(stats() for stats in seen)
        found = results(collector, owners)
        seen.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(Collector, "results", watched)
    prune(spec(models("llama"), tmp_path / "out", text, "sparsegpt"))
    assert len(seen) > 7

"""Perplexity by streaming is that of the whole model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoints import VOCAB, add_tokenizer, load_whole, make_checkpoint, read_shards, write_checkpoint

from tsenor_cli.calibration.activations import Activations
from tsenor_cli.calibration.perplexity import measure_perplexity
from tsenor_cli.calibration.tokens import TextTokens
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.errors import InputRefused, TsenorError, UsageError
from tsenor_cli.observer import Observer
from tsenor_cli.pipeline import evaluate


def windows(*shape):
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(3))


def measure(directory, tokens, **options):
    return measure_perplexity(open_checkpoint(directory), TextTokens(tokens, "a test", "t", "k"), Observer(), **options)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral", "bloom"])
def test_it_is_that_of_the_whole_model(architecture, tmp_path):
    directory, tokens = make_checkpoint(architecture, tmp_path / "model"), windows(70, 32)
    found = measure(directory, tokens)
    model = load_whole(directory)
    with torch.no_grad():
        loss = -model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    assert found.predicted_tokens == 70 * 31
    assert found.mean_loss == pytest.approx(loss.item(), rel=1e-3 if model.dtype == torch.bfloat16 else 1e-6)
    assert found.perplexity == math.exp(found.mean_loss)
    assert found.dtype == str(model.dtype).removeprefix("torch.")


@pytest.fixture
def spilled(monkeypatch):
    """Whether hidden states went to disk, run by run."""
    seen = []

    def watched(directory):
        seen.append(directory is not None)
        return Activations(directory)

    monkeypatch.setattr("tsenor_cli.calibration.replay.Activations", watched)
    return seen


def test_the_memory_budget_changes_no_bit(spilled, tmp_path):
    directory, tokens = make_checkpoint("llama", tmp_path / "model"), windows(64, 64)  # the hidden states do not fit
    assert measure(directory, tokens).mean_loss == measure(directory, tokens, memory_budget=800_000).mean_loss
    assert spilled == [False, True]


@pytest.mark.parametrize(("scale", "loss"), [(math.inf, "nan"), (1e5, r"[1-9]\d\d\d")])
def test_a_loss_without_a_perplexity_is_an_error(scale, loss, tmp_path):
    directory = make_checkpoint("llama", tmp_path / "model")
    shards = read_shards(directory)
    for shard in shards.values():
        if "model.norm.weight" in shard:
            shard["model.norm.weight"][:] = scale
    write_checkpoint(tmp_path / "broken", shards, json.loads((directory / "config.json").read_text()))
    with pytest.raises(TsenorError, match=f"the loss is {loss}") as caught:
        measure(tmp_path / "broken", windows(2, 8))
    assert (caught.value.exit_code, caught.value.code) == (1, "overflow")


def test_states_that_become_wider(spilled, tmp_path):
    """The layers of Mamba give float32 for bfloat16."""
    make_checkpoint("mamba2", tmp_path / "wide")
    shards = {
        file: {name: tensor.bfloat16() for name, tensor in shard.items()}
        for file, shard in read_shards(tmp_path / "wide").items()
    }
    config = json.loads((tmp_path / "wide" / "config.json").read_text()) | {"dtype": "bfloat16"}
    directory, tokens = write_checkpoint(tmp_path / "model", shards, config), windows(64, 32)
    with torch.no_grad():
        logits = load_whole(directory)(input_ids=tokens, use_cache=False).logits[:, :-1].double()
    loss = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    for budget in (None, 700_000):
        assert measure(directory, tokens, memory_budget=budget).mean_loss == pytest.approx(loss.item(), rel=1e-3)
    assert spilled == [False, True]


def test_logits_count_against_the_budget(tmp_path):
    """Of a batch of 2048 tokens; two layers and the embeddings are half as large here."""
    with pytest.raises(UsageError, match="at least"):
        measure(make_checkpoint("llama", tmp_path / "model"), windows(64, 64), memory_budget=2048 * VOCAB * 2)


def test_an_encoder_has_none(tmp_path):
    with pytest.raises(InputRefused, match="BertForMaskedLM predicts no next token"):
        measure(make_checkpoint("bert", tmp_path / "model"), windows(2, 8))


def test_models_with_other_tokenizers_are_not_compared(tmp_path):
    models = [add_tokenizer(make_checkpoint("llama", tmp_path / name)) for name in "ab"]
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 10)
    first, second = evaluate([str(model) for model in models], str(tmp_path / "a.txt"))
    assert first == second
    config = models[1] / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"is_local": True}))  # as save_pretrained leaves it
    _, again = evaluate([str(model) for model in models], str(tmp_path / "a.txt"))
    assert again.perplexity == second.perplexity
    tokenizer = models[1] / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a"', '"ä"'))
    with pytest.raises(UsageError, match="tokenizers of these models differ"):
        evaluate([str(model) for model in models], str(tmp_path / "a.txt"))


def test_from_a_text_on(tmp_path):
    """One letter is one token here, so windows are pieces of the text."""
    directory = add_tokenizer(make_checkpoint("llama", tmp_path / "model"))
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 10)
    (found,) = evaluate([str(directory)], str(tmp_path / "a.txt"), sequence_length=44, max_windows=3)
    assert found.tokens.windows.shape == (3, 44)
    assert torch.equal(found.tokens.windows[0], found.tokens.windows[2])
    assert found.to_dict()["source"] == str(tmp_path / "a.txt")
    (usual,) = evaluate([str(directory)], str(tmp_path / "a.txt"))
    assert usual.tokens.windows.shape[1] == 64  # the model's maximum

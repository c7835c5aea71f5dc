"""Configs that ask for absurdly much are refused before they get it; code from elsewhere is never run."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from checkpoints import add_tokenizer
from torch import nn

from tsenor_cli.checkpoint.adapter.bounds import TooLargeError, bounded_memory, bounded_modules
from tsenor_cli.checkpoint.adapter.meta import meta_model
from tsenor_cli.checkpoint.adapter.tokenizer import CheckpointTokenizer, window_length
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.errors import InputRefused

linux = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="only Linux enforces the limit")


def with_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_hidden_layers": 10**9}, "more layers than the checkpoint can have"),
        ({"num_hidden_layers": 10**4}, "more layers than the checkpoint can have"),
        ({"num_labels": 10**9}, "1,000,000,000 labels"),
        ({"text_config": {"num_labels": 10**9}}, "1,000,000,000 labels"),
        ({"vocab_size": 10**18}, "overflowed"),
        ({"num_attention_heads": 0}, "zero"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"architectures": ["AutoModel"]}, "no model 'AutoModel'"),
        ({"architectures": ["__version__"]}, "no model '__version__'"),
        ({"architectures": [5]}, "must be string"),
        ({"_attn_implementation": "someone/kernel"}, "code from elsewhere"),
        ({"text_config": {"_experts_implementation": "someone/kernel"}}, "code from elsewhere"),
    ],
)
def test_configs_that_ask_for_too_much(llama, changes, why):
    with pytest.raises(InputRefused, match=why):
        meta_model(with_config(llama, **changes))


def test_code_beside_the_config_is_not_run(llama, tmp_path):
    (llama / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\nclass Evil: pass")
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    with pytest.raises(InputRefused, match="custom code"):
        meta_model(with_config(llama, model_type="evil", auto_map=code))
    meta_model(with_config(llama, model_type="llama", auto_map=code))  # a known type needs none of it
    assert not (tmp_path / "proof").exists()


def test_modules_and_parameters_are_counted():
    with bounded_modules(3):
        nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    with pytest.raises(TooLargeError), bounded_modules(2):
        nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    nn.Sequential(*(nn.Identity() for _ in range(10)))  # nothing is counted any more


@linux
def test_memory_is_bounded_and_then_free_again():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises((MemoryError, RuntimeError)), bounded_memory():
        torch.zeros(2**30, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert torch.zeros(2**29, dtype=torch.uint8)[-1] == 0


@pytest.mark.parametrize("length", [0, -5, "64"])
def test_a_model_of_absurd_length(llama, length, monkeypatch):
    class Config:
        max_position_embeddings = length

        def get_text_config(self):
            return self

    name = "tsenor_cli.checkpoint.adapter.tokenizer.AutoConfig.from_pretrained"
    monkeypatch.setattr(name, lambda *_args, **_options: Config())
    with pytest.raises(InputRefused, match="max_position_embeddings"):
        window_length(open_checkpoint(llama), None)


def test_a_tokenizer_that_panics(llama, monkeypatch):
    """Errors of Rust are no exceptions."""
    PanicException = type("PanicException", (BaseException,), {})  # noqa: N806  (its name)

    def panics(*_args, **_options):
        raise PanicException("index out of bounds")

    add_tokenizer(llama)
    monkeypatch.setattr("tsenor_cli.checkpoint.adapter.tokenizer.AutoTokenizer.from_pretrained", panics)
    with pytest.raises(InputRefused, match="index out of bounds"):
        CheckpointTokenizer(llama)

"""What a tensor on disk is, through transformers' own renaming and with its own conversion objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from torch import nn
from transformers.core_model_loading import (
    Chunk,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from tsenor_cli.checkpoint.adapter import roles
from tsenor_cli.checkpoint.adapter.roles import read_roles
from tsenor_cli.checkpoint.plan import make_plan
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.specs import NMPattern, PruneSpec

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 16,
}
ATTENTION = "model.layers.0.self_attn."


def role(tmp_path, monkeypatch, name, shape, source, target, *operations):
    """The role of one tensor on disk that is loaded through these operations."""
    mapping = [WeightConverter([source], target, operations=list(operations))]
    monkeypatch.setattr(roles, "get_model_conversion_mapping", lambda _: mapping)
    tensors = {name: torch.zeros(shape)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", {"model.safetensors": tensors}, CONFIG))
    return read_roles(checkpoint)[name]


def test_joined_projections_are_cut_where_loading_cuts_them(tmp_path, monkeypatch):
    target = [f"self_attn.{p}_proj.weight" for p in "kv"]
    found = role(tmp_path, monkeypatch, f"{ATTENTION}kv.weight", (32, 32), "self_attn.kv.weight", target, Chunk(dim=0))
    assert (found.layout, found.out_pieces, found.rows_move) == ("out_in", (16, 16), False)


def test_pieces_that_do_not_add_up_are_skipped_and_counted(tmp_path, monkeypatch):
    target = [f"self_attn.{p}_proj.weight" for p in "kv"]
    found = role(tmp_path, monkeypatch, f"{ATTENTION}kv.weight", (40, 32), "self_attn.kv.weight", target, Chunk(dim=0))
    assert (found.layout, found.prunable) == (None, True)


def test_a_transposed_weight(tmp_path, monkeypatch):
    found = role(
        tmp_path,
        monkeypatch,
        "model.layers.0.mlp.w.weight",
        (32, 48),
        r"mlp\.w\.weight",
        "mlp.up_proj.weight",
        Transpose(0, 1),
    )
    assert (found.layout, found.out_pieces) == ("in_out", (48,))


@pytest.mark.parametrize("operation", [PermuteForRope(), Interleave(dim=0)])
def test_rows_that_move(tmp_path, monkeypatch, operation):
    found = role(tmp_path, monkeypatch, f"{ATTENTION}wq.weight", (32, 32), r"\.wq\.", ".q_proj.", operation)
    assert (found.layout, found.rows_move) == ("out_in", True)


@pytest.mark.parametrize("operations", [[Interleave(dim=1)], [Transpose(0, 1), Chunk(dim=0)]])
def test_what_is_not_understood_is_skipped_and_counted(tmp_path, monkeypatch, operations):
    """Interleaving the input axis would tear every group of M apart."""
    found = role(tmp_path, monkeypatch, f"{ATTENTION}wq.weight", (32, 32), r"\.wq\.", ".q_proj.", *operations)
    assert (found.layout, found.prunable) == (None, True)
    assert "not supported" in found.reason


def test_an_unknown_operation_is_skipped_and_counted(tmp_path, monkeypatch):
    class Surprise(MergeModulelist):
        pass

    found = role(tmp_path, monkeypatch, f"{ATTENTION}wq.weight", (32, 32), r"\.wq\.", ".q_proj.", Surprise())
    assert (found.layout, found.prunable) == (None, True)
    assert "Surprise" in found.reason


def test_moving_rows_survive_standard_patterns_only(tmp_path, monkeypatch):
    name = f"{ATTENTION}wq.weight"
    role(tmp_path, monkeypatch, name, (32, 32), r"\.wq\.", ".q_proj.", PermuteForRope())
    for transposable in (True, False):
        spec = PruneSpec("c", Path("o"), NMPattern(2, 4, transposable=transposable))
        item = make_plan(open_checkpoint(tmp_path / "c"), spec).by_name[name]
        assert item.pruned is not transposable
        assert item.prunable


def test_a_head_where_there_is_no_base_model_is_a_head(tmp_path):
    """T5 names a base model that it does not have, so only the model itself can tell its head."""
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "vocab_size": 16}
    tensors = {"lm_head.weight": torch.zeros(16, 32)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "t5", {"model.safetensors": tensors}, config))
    assert read_roles(checkpoint)["lm_head.weight"].reason == "head"


def test_a_router_is_known_by_its_class(tmp_path, monkeypatch):
    class DensityRouter(nn.Linear):
        """Named unlike any router."""

    real = roles.meta_model

    def with_router(checkpoint):
        model = real(checkpoint)
        with torch.device("meta"):
            model.model.layers[0].mlp.density = DensityRouter(32, 32)
        return model

    monkeypatch.setattr(roles, "meta_model", with_router)
    name = "model.layers.0.mlp.density.weight"
    tensors = {name: torch.zeros(32, 32)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", {"model.safetensors": tensors}, CONFIG))
    assert read_roles(checkpoint)[name].reason == "router"

"""What is pruned and why not, decided from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import make_checkpoint, write_checkpoint

from tsenor_cli.checkpoint.adapter import roles
from tsenor_cli.checkpoint.layouts import LAYOUTS, from_matrices, matrix_size, to_matrices
from tsenor_cli.checkpoint.plan import BAND_BYTES, bands, enforce, make_plan
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.errors import CheckFailed, InputRefused, UsageError
from tsenor_cli.specs import NMPattern, PruneSpec, matches


def plan(directory, nm="2:4", *, transposable=True, **options):
    spec = PruneSpec(str(directory), Path("out"), NMPattern.parse(nm, transposable=transposable), **options)
    result = make_plan(open_checkpoint(directory), spec)
    enforce(result, spec)
    return result


def names(result):
    return {item.tensor.name for item in result.pruned}


def reasons(result):
    return {item.tensor.name: item.reason for item in result.tensors}


def test_selection_by_glob_by_module_and_by_regex(llama):
    layer0 = {name for name in names(plan(llama)) if name.startswith("model.layers.0.")}
    assert names(plan(llama, only=("model.layers.0.*",))) == layer0
    assert names(plan(llama, only=(r"re:layers\.0\.",))) == layer0
    assert names(plan(llama, only=("*.mlp.up_proj",), ignore=("re:^model.layers.1",))) == {
        "model.layers.0.mlp.up_proj.weight"
    }


def test_coverage_counts_what_the_user_left_out(llama):
    everything, some = plan(llama), plan(llama, ignore=("*.mlp.*",))
    assert everything.coverage == 1.0
    assert some.coverage == some.pruned_parameters / everything.pruned_parameters < 1
    with pytest.raises(CheckFailed, match="below --min-coverage"):
        plan(llama, ignore=("*.mlp.*",), min_coverage=0.9)


def test_a_pattern_that_fits_no_tensor_is_a_typing_error(llama):
    with pytest.raises(UsageError, match="fits no tensor"):
        plan(llama, ignore=("*.mpl.*",))
    with pytest.raises(UsageError, match="regular expression"):
        matches("a", "re:(")


def test_nothing_to_prune_is_an_error(llama):
    with pytest.raises(CheckFailed, match="nothing to prune"):
        plan(llama, only=("lm_head",))


def test_what_m_does_not_divide_is_skipped_or_with_strict_refused(llama):

    result = plan(llama, "2:24", transposable=False)
    assert names(result) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert "M does not divide" in reasons(result)["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(CheckFailed, match="--strict"):
        plan(llama, "2:24", transposable=False, strict=True)


def test_a_quantised_tensor_is_refused(llama):
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64, dtype=torch.uint8)}
    config = open_checkpoint(llama).config
    directory = write_checkpoint(llama.parent / "u8", {"model.safetensors": tensors}, config)
    with pytest.raises(InputRefused, match="U8"):
        plan(directory)


def test_an_unknown_architecture_is_refused(llama):
    config = {**open_checkpoint(llama).config, "model_type": "nonesuch", "auto_map": {"AutoConfig": "x.Y"}}
    tensors = {"w": torch.zeros(8, 8)}
    with pytest.raises(InputRefused, match="transformers cannot build"):
        plan(write_checkpoint(llama.parent / "odd", {"model.safetensors": tensors}, config))


def test_tiles_never_straddle_gate_and_up(tmp_path):
    """Qwen3-VL-MoE stores gate and up side by side: 2 x 24 outputs, which 16 divides together but not apart."""
    directory = make_checkpoint("qwen3_vl_moe", tmp_path / "vl")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert name in names(plan(directory, "4:8"))
    assert name in names(plan(directory, "8:16", transposable=False))
    assert "joined outputs [24, 24]" in reasons(plan(directory, "8:16"))[name]


def test_experts_that_are_not_understood_count_against_the_coverage(tmp_path, monkeypatch):
    """Skipping experts silently is how other tools leave nine tenths of a model dense and report success."""
    directory = make_checkpoint("llama4", tmp_path / "llama4")
    assert plan(directory).coverage == 1.0
    monkeypatch.setattr(roles, "_transposed_by_size", lambda _: None)
    result = plan(directory)
    skipped = [item.tensor for item in result.tensors if item.reason == "experts of unknown layout"]
    assert [tensor.shape for tensor in skipped] == [(4, 32, 64), (4, 64, 64)]
    missing = sum(tensor.parameters for tensor in skipped)
    assert result.coverage == pytest.approx(1 - missing / result.prunable_parameters)


def test_experts_with_named_sizes_are_understood(tmp_path):
    """GraniteMoe and JetMoe keep [E, out, in] without transformers' decorator; here both matrices are square."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.GraniteMoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    transformers.GraniteMoeForCausalLM(config).save_pretrained(tmp_path / "granite")
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    assert plan(tmp_path / "granite").by_name[name].layout == "experts_out_in"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_views_and_their_own_inverse(layout):
    shape = {"out_in": (6, 4), "in_out": (4, 6), "experts_out_in": (2, 6, 4), "experts_in_out": (2, 4, 6)}.get(
        layout, (6, 4, 3, 3)
    )
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    matrices = to_matrices(tensor, layout)
    assert matrices.shape[-2:] == matrix_size(shape, layout) == (6, 4)
    assert matrices.data_ptr() == tensor.data_ptr()
    assert torch.equal(from_matrices(matrices, layout), tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [2, 24, 64])
def test_bands_cover_the_tensor_and_cut_no_group(layout, m):
    shape = (
        (m * 37, m * 2**18 // m, 3, 3)
        if layout == "conv2d"
        else (m * 37, m * 1000, 64)[: 3 if "experts" in layout else 2]
    )
    tensor = DiskTensor("w", Path("x"), "BF16", shape, 0, 2 * torch.Size(shape).numel())
    found = bands(tensor, layout, m)
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])]
    assert found[-1][1] == shape[0]
    row_bytes = tensor.nbytes // shape[0]
    assert all((last - first) * row_bytes <= max(BAND_BYTES, m * row_bytes) for first, last in found)
    if not layout.startswith("experts"):
        assert all(first % m == 0 and last % m == 0 for first, last in found)

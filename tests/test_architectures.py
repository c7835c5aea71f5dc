"""Pruned checkpoints of many architectures, judged in memory by rules written down by hand.

What transformers loads is what counts: each output is loaded with `from_pretrained` and compared, parameter by
parameter, with the source as loaded. Which parameters are prunable and along which axis their inputs run stands in
the table below, so nothing here asks the code under test.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import checkpoints
import pytest
import torch
import transformers
from safetensors import safe_open

from tsenor_cli.pipeline import prune, verify
from tsenor_cli.specs import NMPattern, PruneSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

QUICK = {("llama", "2:4"), ("gpt2", "2:4"), ("qwen3_moe", "2:4"), ("gpt_oss", "2:4")}
WRITTEN_BY_US = {"README.md", "tsenor-report.json", "tsenor-report.html"}


# --- what is prunable, by the names in memory -------------------------------------------------------------------------


class Prunable(NamedTuple):
    """Parameters whose name matches completely, and how their matrices lie in them.

    `parts` is how many matrices lie side by side along the output axis, such as gate and up: each is pruned by itself,
    and a tile must not straddle two of them. (Interleaved, as in gpt-oss, they are one.)
    """

    name: str
    layout: str = "out_in"
    parts: int = 1


_LLAMA_ATTENTION = Prunable(r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight")
_LLAMA_MLP = Prunable(r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight")
_EXPERTS_SPLIT_ON_DISK = (
    Prunable(r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj", "experts_out_in", parts=2),
    Prunable(r"model\.layers\.\d+\.mlp\.experts\.down_proj", "experts_out_in"),
)
_FUSED_QKV = r"\.\d+\.(self_attention|attention)\.(query_key_value|dense)\.weight"
_FUSED_QKV_MLP = r"\.\d+\.mlp\.dense_(h_to_4h|4h_to_h)\.weight"

PRUNABLE: dict[str, tuple[Prunable, ...]] = {
    "llama": (_LLAMA_ATTENTION, _LLAMA_MLP),
    "qwen3": (_LLAMA_ATTENTION, _LLAMA_MLP),
    "gemma3": (_LLAMA_ATTENTION, _LLAMA_MLP),
    "gpt2": (
        Prunable(r"transformer\.h\.\d+\.attn\.c_(attn|proj)\.weight", "in_out"),
        Prunable(r"transformer\.h\.\d+\.mlp\.c_(fc|proj)\.weight", "in_out"),
    ),
    "opt": (Prunable(r"model\.decoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|fc1|fc2)\.weight"),),
    "mixtral": (_LLAMA_ATTENTION, *_EXPERTS_SPLIT_ON_DISK),
    "qwen3_moe": (_LLAMA_ATTENTION, _LLAMA_MLP, *_EXPERTS_SPLIT_ON_DISK),
    # the gate of the shared expert routes: one number per token
    "qwen2_moe": (
        _LLAMA_ATTENTION,
        *_EXPERTS_SPLIT_ON_DISK,
        Prunable(r"model\.layers\.\d+\.mlp\.shared_expert\.(gate|up|down)_proj\.weight"),
    ),
    "deepseek_v3": (
        Prunable(r"model\.layers\.\d+\.self_attn\.(q_a|q_b|kv_b|o)_proj\.weight"),
        Prunable(r"model\.layers\.\d+\.self_attn\.kv_a_proj_with_mqa\.weight"),
        _LLAMA_MLP,
        Prunable(r"model\.layers\.\d+\.mlp\.shared_experts\.(gate|up|down)_proj\.weight"),
        *_EXPERTS_SPLIT_ON_DISK,
    ),
    "gpt_oss": (
        _LLAMA_ATTENTION,
        Prunable(r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj", "experts_in_out"),
    ),
    "llama4": (
        _LLAMA_ATTENTION,
        Prunable(r"model\.layers\.\d+\.feed_forward\.(shared_expert\.)?(gate|up|down)_proj\.weight"),
        Prunable(r"model\.layers\.\d+\.feed_forward\.experts\.gate_up_proj", "experts_in_out", parts=2),
        Prunable(r"model\.layers\.\d+\.feed_forward\.experts\.down_proj", "experts_in_out"),
    ),
    "qwen3_vl_moe": (
        Prunable(r"model\.language_model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight"),
        Prunable(r"model\.language_model\.layers\.\d+\.mlp\.experts\.gate_up_proj", "experts_out_in", parts=2),
        Prunable(r"model\.language_model\.layers\.\d+\.mlp\.experts\.down_proj", "experts_out_in"),
        Prunable(r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])\.weight"),
        Prunable(r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]\.weight"),
    ),
    "llava": (
        Prunable(r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight"),
        Prunable(r"model\.multi_modal_projector\.linear_[12]\.weight"),
        Prunable(r"model\.vision_tower\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight"),
        Prunable(r"model\.vision_tower\.embeddings\.patch_embedding\.weight", "conv2d"),
    ),
    "gpt_neox": (Prunable(r"gpt_neox\.layers" + _FUSED_QKV), Prunable(r"gpt_neox\.layers" + _FUSED_QKV_MLP)),
    "bloom": (Prunable(r"transformer\.h" + _FUSED_QKV), Prunable(r"transformer\.h" + _FUSED_QKV_MLP)),
    "falcon": (Prunable(r"transformer\.h" + _FUSED_QKV), Prunable(r"transformer\.h" + _FUSED_QKV_MLP)),
    "bert": (
        Prunable(r"bert\.encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)\.weight"),
        Prunable(r"bert\.encoder\.layer\.\d+\.(intermediate|output)\.dense\.weight"),
    ),
    "vit": (
        Prunable(r"vit\.layers\.\d+\.(attention\.[qkvo]_proj|mlp\.fc[12])\.weight"),
        Prunable(r"vit\.embeddings\.patch_embeddings\.projection\.weight", "conv2d"),
    ),
    "resnet": (Prunable(r"resnet\..*\.convolution\.weight", "conv2d"),),
    "t5": (
        Prunable(r"(en|de)coder\.block\.\d+\.layer\.\d+\.(SelfAttention|EncDecAttention)\.[qkvo]\.weight"),
        Prunable(r"(en|de)coder\.block\.\d+\.layer\.\d+\.DenseReluDense\.(wi_0|wi_1|wo)\.weight"),
    ),
    "whisper": (
        Prunable(r"model\.(en|de)coder\.layers\.\d+\.(self|encoder)_attn\.(q|k|v|out)_proj\.weight"),
        Prunable(r"model\.(en|de)coder\.layers\.\d+\.fc[12]\.weight"),
    ),
    "mamba2": (Prunable(r"backbone\.layers\.\d+\.mixer\.(in|out)_proj\.weight"),),
}


def matrices(weight: torch.Tensor, layout: str, parts: int = 1) -> torch.Tensor:
    """The weight as [matrices, out, in]: every matrix that is pruned on its own."""
    stack = {
        "out_in": lambda: weight[None],
        "in_out": lambda: weight.T[None],
        "experts_out_in": lambda: weight,
        "experts_in_out": lambda: weight.transpose(1, 2),
        "conv2d": lambda: weight.permute(2, 3, 0, 1).flatten(0, 1),  # one matrix for each position of the kernel
    }[layout]()
    return stack.reshape(-1, stack.shape[1] // parts, stack.shape[2])


# --- one pruned checkpoint --------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A source, its pruned output, and both as transformers loads them."""

    architecture: str
    pattern: NMPattern
    source: Path
    output: Path
    report: object = field(repr=False)

    @cached_property
    def source_loaded(self) -> tuple[PreTrainedModel, dict]:
        return load(self.source)

    @cached_property
    def output_loaded(self) -> tuple[PreTrainedModel, dict]:
        return load(self.output)

    def parameters(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, source value and output value of everything the model holds, buffers included."""
        source, output = self.source_loaded[0].state_dict(), self.output_loaded[0].state_dict()
        assert list(source) == list(output)
        for name, value in source.items():
            yield name, value, output[name]

    def rule(self, name: str) -> Prunable | None:
        return next((rule for rule in PRUNABLE[self.architecture] if re.fullmatch(rule.name, name)), None)

    def must_be_pruned(self, name: str, weight: torch.Tensor) -> bool:
        rule = self.rule(name)
        return rule is not None and self.pattern.divides(*matrices(weight, rule.layout, rule.parts).shape[1:])

    def pruned(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """What has to be N:M: name, and source and output as [matrices, out, in]."""
        for name, before, after in self.parameters():
            if self.must_be_pruned(name, before):
                rule = self.rule(name)
                yield name, matrices(before, rule.layout, rule.parts), matrices(after, rule.layout, rule.parts)


def load(directory: Path) -> tuple[PreTrainedModel, dict]:
    """The model as a user gets it, with what loading complained about."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, complaints = getattr(transformers, name).from_pretrained(directory, output_loading_info=True)
    for parameter in model.parameters():
        # freshly allocated, hence aligned alike: matrix products may differ in the last bit with the alignment
        parameter.data = parameter.data.clone()
    return model.eval(), complaints


def logits(model: PreTrainedModel, architecture: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**checkpoints.ARCHITECTURES[architecture].inputs()).logits


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def tiles(stack: torch.Tensor, m: int) -> torch.Tensor:
    """[matrices, out, in] -> [tiles, m, m]."""
    k, rows, columns = stack.shape
    return stack.reshape(k, rows // m, m, columns // m, m).transpose(2, 3).reshape(-1, m, m)


def is_nm(stack: torch.Tensor, pattern: NMPattern) -> bool:
    """Exactly n of every m along the inputs; if transposable, along the outputs of every tile too."""
    kept = stack != 0
    along_inputs = kept.reshape(-1, pattern.m).sum(1)
    if not pattern.transposable:
        return bool((along_inputs == pattern.n).all())
    along_outputs = tiles(kept, pattern.m).sum(1)
    return bool((along_inputs == pattern.n).all() and (along_outputs == pattern.n).all())


def greedy_sum(blocks: torch.Tensor, n: int) -> float:
    """What [tiles, m, m] keep if entries are taken from the largest down while their row and column have room."""
    count, m, _ = blocks.shape
    values, order = blocks.reshape(count, m * m).sort(dim=1, descending=True)
    room_in_row, room_in_column = torch.full((2, count, m), n)
    tile, total = torch.arange(count), 0.0
    for value, position in zip(values.T, order.T, strict=True):
        row, column = position // m, position % m
        taken = (room_in_row[tile, row] > 0) & (room_in_column[tile, column] > 0)
        room_in_row[tile, row] -= taken.long()
        room_in_column[tile, column] -= taken.long()
        total += float(value[taken].sum())
    return total


# --- the laws, in memory ----------------------------------------------------------------------------------------------


def verify_agrees(case: Case) -> None:
    """(a) The product's own check passes, alone and against the source."""
    for result in (verify(str(case.output)), verify(str(case.output), against=str(case.source))):
        assert result.ok, result.failures
        assert not result.failures


def loads_like_the_source(case: Case) -> None:
    """(b) Loading the output complains about nothing that loading the source does not complain about."""
    source, output = (
        {key: sorted(names) for key, names in loaded[1].items()} for loaded in (case.source_loaded, case.output_loaded)
    )
    assert output == source
    assert not output["missing_keys"]
    assert not output["mismatched_keys"]


def exactly_the_prunable_are_pruned(case: Case) -> None:
    """(c) Every prunable parameter that the pattern divides is N:M along its inputs; nothing else changed by a bit."""
    seen = set()
    for name, before, after in case.parameters():
        if case.must_be_pruned(name, before):
            rule = case.rule(name)
            assert is_nm(matrices(after, rule.layout, rule.parts), case.pattern), f"{name} is not {case.pattern}"
        else:
            assert same_bits(before, after), f"{name} changed"
        seen.add(case.rule(name))
    assert seen >= set(PRUNABLE[case.architecture]), "a rule of the table matches nothing"


def kept_values_are_unchanged(case: Case) -> None:
    """(c) What is not zero is the source's value, and no zero is negative."""
    for name, before, after in case.pruned():
        kept = after != 0
        assert torch.equal(after[kept], before[kept]), f"{name}: a kept value changed"
        assert not torch.signbit(after[~kept]).any(), f"{name}: a zero is negative"


def large_weights_are_kept(case: Case) -> None:
    """(c) Standard: the n largest of each group. Transposable: about what a greedy choice keeps."""
    n, m = case.pattern.n, case.pattern.m
    for name, before, after in case.pruned():
        if case.pattern.transposable:
            # Greedy may leave rows and columns short, so on a few tiles it can beat every mask that is exactly N:M.
            floor = 0.98 * greedy_sum(tiles(before.abs().double(), m), n)
            assert after.abs().double().sum() >= floor, f"{name}: greedy keeps more"
        else:
            largest = before.abs().reshape(-1, m).topk(n).values
            assert torch.equal(after.abs().reshape(-1, m).topk(n).values, largest), f"{name}: not the largest"


def computes_what_the_masked_source_computes(case: Case) -> None:
    """(c) Zeroing the loaded source where the loaded output is zero gives the same logits, bit by bit."""
    expected = case.source_loaded[0]
    output = dict(case.output_loaded[0].named_parameters())
    dense = logits(expected, case.architecture)
    for name, parameter in expected.named_parameters():
        if case.rule(name) is not None:
            parameter.data = torch.where(output[name] == 0, torch.zeros_like(parameter), parameter)
    masked = logits(expected, case.architecture)
    assert masked.isfinite().all()
    assert not torch.equal(masked, dense), "the input does not reach the pruned weights"
    assert torch.equal(logits(case.output_loaded[0], case.architecture), masked)


# --- the laws, on disk ------------------------------------------------------------------------------------------------


def report_tells_every_tensor(case: Case) -> None:
    """(d) One record for each tensor on disk: N:M as its layout says if pruned, with a reason if kept."""
    before, after = on_disk(case.source), on_disk(case.output)
    records = {record.name: record for record in case.report.tensors}
    assert len(records) == len(case.report.tensors)
    assert records.keys() == before.keys()
    for name, record in records.items():
        assert tuple(record.shape) == tuple(before[name].shape), name
        assert record.parameters == before[name].numel(), name
        if record.action == "pruned":
            assert record.reason is None, name
            assert is_nm(matrices(after[name], record.layout), case.pattern), f"{name} is not {record.layout}"
        else:
            assert record.action == "kept", name
            assert record.reason, f"{name} is kept without a reason"


def kept_tensors_are_byte_identical(case: Case) -> None:
    """(d) A tensor that the report does not call pruned has the source's bytes; a pruned one its dtype and shape."""
    before, after = on_disk(case.source), on_disk(case.output)
    pruned = {record.name for record in case.report.tensors if record.action == "pruned"}
    for name, tensor in before.items():
        if name in pruned:
            assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
            assert not torch.signbit(after[name][after[name] == 0]).any(), f"{name}: a zero is negative"
        else:
            assert same_bits(after[name], tensor), f"{name} changed"


def shards_are_laid_out_alike(case: Case) -> None:
    """(d) Same shards with the same tensors in them, same metadata (and format: pt), same index."""
    for path in sorted(case.source.glob("*.safetensors")):
        before, after = header(path), header(case.output / path.name)
        assert after["tensors"] == before["tensors"], path.name
        assert after["metadata"] == {**before["metadata"], "format": "pt"}, path.name
    index = json.loads((case.source / checkpoints.INDEX).read_text())
    assert json.loads((case.output / checkpoints.INDEX).read_text()) == index


def other_files_are_copied(case: Case) -> None:
    """(d) Every other file has the source's bytes; nothing but the model card and the report is added."""
    before, after = other_files(case.source), other_files(case.output)
    assert after.keys() - WRITTEN_BY_US == before.keys() - WRITTEN_BY_US
    assert after.keys() >= WRITTEN_BY_US
    for name in before.keys() - WRITTEN_BY_US:
        assert after[name] == before[name], f"{name} changed"
    config = json.loads(after["config.json"])
    assert not {"quantization_config", "sparsity_config", "compression_config"} & config.keys()


def coverage_is_counted_right(case: Case) -> None:
    """(e) Coverage is pruned by prunable parameters, counted in memory."""
    prunable = pruned = 0
    for name, parameter in case.source_loaded[0].named_parameters():
        if case.rule(name) is not None:
            prunable += parameter.numel()
            pruned += parameter.numel() * case.must_be_pruned(name, parameter)
    assert case.report.summary.coverage == pytest.approx(pruned / prunable, rel=1e-12)
    assert sum(record.parameters for record in case.report.tensors if record.action == "pruned") == pruned


def on_disk(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for tensors in checkpoints.read_shards(directory).values() for name, t in tensors.items()}


def header(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        tensors = {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118  (not a dict)
        return {"tensors": tensors, "metadata": file.metadata() or {}}


def other_files(directory: Path) -> dict[str, bytes]:
    """Everything but shards and index, by relative path."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    files = {str(path.relative_to(directory)): path.read_bytes() for path in paths}
    return {name: data for name, data in files.items() if not name.endswith((".safetensors", checkpoints.INDEX))}


# --- the tests --------------------------------------------------------------------------------------------------------

LAWS = (
    verify_agrees,
    loads_like_the_source,
    report_tells_every_tensor,
    exactly_the_prunable_are_pruned,
    kept_values_are_unchanged,
    large_weights_are_kept,
    kept_tensors_are_byte_identical,
    shards_are_laid_out_alike,
    other_files_are_copied,
    coverage_is_counted_right,
    computes_what_the_masked_source_computes,  # last: it changes the loaded source
)


def _cases() -> Iterator[pytest.ParameterSet]:
    for architecture in checkpoints.ARCHITECTURES:
        for text in ("2:4", "8:16"):
            marks = () if (architecture, text) in QUICK else pytest.mark.slow
            for transposable in (True, False):
                pattern = NMPattern.parse(text, transposable=transposable)
                yield pytest.param(architecture, pattern, marks=marks, id=f"{architecture}-{text}-{pattern.kind}")


@pytest.fixture(scope="session")
def source_of(tmp_path_factory):
    """The dense checkpoint of an architecture, made once per session."""
    made: dict[str, Path] = {}

    def source(architecture: str) -> Path:
        if architecture not in made:
            directory = tmp_path_factory.mktemp("dense") / architecture
            made[architecture] = checkpoints.make_checkpoint(architecture, directory)
        return made[architecture]

    return source


@pytest.mark.parametrize(("architecture", "pattern"), list(_cases()))
def test_laws_hold(architecture, pattern, source_of, tmp_path):
    source, output = source_of(architecture), tmp_path / "pruned"
    report = prune(PruneSpec(model=str(source), output=output, pattern=pattern))
    case = Case(architecture, pattern, source, output, report)
    for law in LAWS:
        law(case)


def test_every_architecture_has_rules():
    assert PRUNABLE.keys() == checkpoints.ARCHITECTURES.keys()

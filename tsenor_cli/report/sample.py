"""What a report shows of the weights themselves: a corner of one tensor, and a histogram. Both are read from the files.

So they are the same whether a run was interrupted or not, and cost a few reads, whatever the size of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tsenor_cli.checkpoint.layouts import Layout, to_matrices
from tsenor_cli.checkpoint.plan import TensorPlan
from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.report.records import Histogram, Tile

_SIDE = 8  # of the corner, at least
_TENSORS, _WEIGHTS = 256, 2**15  # of the histogram: so many of each of so many
_EDGE, _BINS = 4.0, 80


def take_samples(
    pruned: Sequence[TensorPlan], output: Callable[[DiskTensor], DiskTensor]
) -> tuple[Tile | None, Histogram | None]:
    """Of the tensors of a run that were pruned, if any were; `output` gives the pruned tensor for that of the input."""
    if not pruned:
        return None, None
    return _tile(pruned[0], output(pruned[0].tensor)), _histogram(pruned, output)


def sampled_bytes(pruned: Sequence[TensorPlan]) -> dict[str, int]:
    """How many of the first bytes of which tensors of the input `take_samples` reads, by their names."""
    found = {item.tensor.name: _WEIGHTS * item.tensor.nbytes // item.tensor.parameters for item in _chosen(pruned)}
    for item in pruned[:1]:
        corner = item.tensor.nbytes // item.tensor.shape[0] * _corner_rows(item)
        found[item.tensor.name] = max(found[item.tensor.name], corner)
    return found


def _tile(item: TensorPlan, output: DiskTensor) -> Tile:
    """The first rows and columns of the first matrix of a pruned tensor, whole tiles of its pattern."""
    assert item.layout is not None
    assert item.choice is not None
    pattern, side, rows = item.choice.pattern, _side(item), _corner_rows(item)
    before, after = (_corner(tensor, item.layout, side, rows) for tensor in (item.tensor, output))
    return Tile(
        tensor=item.tensor.name,
        pattern=str(pattern),
        transposable=pattern.transposable,
        weights=[" ".join(f"{weight:.4g}" for weight in row) for row in before.tolist()],
        kept=["".join("01"[kept] for kept in row) for row in (after != 0).tolist()],
    )


def _histogram(items: Sequence[TensorPlan], output: Callable[[DiskTensor], DiskTensor]) -> Histogram:
    """Of the first weights of pruned tensors, of evenly chosen ones if there are many."""
    chosen = _chosen(items)
    before, after = torch.zeros(_BINS), torch.zeros(_BINS)
    weights = 0
    for item in chosen:
        old, new = (_first_weights(tensor) for tensor in (item.tensor, output(item.tensor)))
        unit = old.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
        before += _count(old / unit)
        after += _count(new[new != 0] / unit)
        weights += old.numel()
    return Histogram(len(chosen), weights, _EDGE, _whole(before), _whole(after))


def _chosen(items: Sequence[TensorPlan]) -> Sequence[TensorPlan]:
    return items[:: max(-(-len(items) // _TENSORS), 1)]


def _side(item: TensorPlan) -> int:
    assert item.choice is not None
    return item.choice.pattern.m * -(-_SIDE // item.choice.pattern.m)


def _corner_rows(item: TensorPlan) -> int:
    """Of the leading axis, that the corner is in."""
    assert item.layout is not None
    return 1 if item.layout.startswith("experts") else _side(item)


def _corner(tensor: DiskTensor, layout: Layout, side: int, rows: int) -> torch.Tensor:
    """Float32 [side, side], or less where the tensor is smaller."""
    matrices = to_matrices(tensor.read(0, rows), layout)
    return matrices.reshape(-1, *matrices.shape[-2:])[0, :side, :side].float()


def _first_weights(tensor: DiskTensor) -> torch.Tensor:
    return replace(tensor, shape=(tensor.parameters,)).read(0, _WEIGHTS).float()


def _count(values: torch.Tensor) -> torch.Tensor:
    return torch.histc(values.clamp(-_EDGE, _EDGE), _BINS, -_EDGE, _EDGE)


def _whole(counts: torch.Tensor) -> list[int]:
    return [int(count) for count in counts.tolist()]

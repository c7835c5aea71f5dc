"""The masks beside the weights: a kept weight may happen to be zero, so the zeros do not tell which weights may change.

    OUTPUT/tsenor-masks/NAME.safetensors    beside OUTPUT/NAME.safetensors, if that has pruned tensors

For each of them it has a uint8 tensor of the same name, [rows, ⌈weights of a row / 8⌉]. A row is one entry of the
leading axis as the tensor lies on disk. Eight weights are a byte, the first its lowest bit; 1 is a weight that is kept,
and the last byte of a row is filled up with 0: numpy.packbits(mask.reshape(rows, -1), axis=1, bitorder="little").
The metadata has "format": "pt" and "tsenor_masks": "1", the version of all this.

Whole rows, because bands of rows are what is pruned, and so that a convolution's axis of 1 or 3 is not filled up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from tsenor_cli.checkpoint.reader import MASKS_DIRECTORY, Checkpoint, check_contained
from tsenor_cli.checkpoint.shard import DiskTensor, Shard, read_shard
from tsenor_cli.checkpoint.writer import encode_header
from tsenor_cli.errors import InputRefused

if TYPE_CHECKING:
    import torch

_METADATA = {"format": "pt", "tsenor_masks": "1"}
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1, as one number: their bits are its highest byte


def mask_file(pruned: Sequence[DiskTensor]) -> Shard:
    """The file of the masks of one shard's pruned tensors, as it is going to be."""
    path = _path(pruned[0].path)
    shapes = {tensor.name: packed_shape(tensor.shape) for tensor in pruned}
    places = dict(zip(shapes, pairwise(accumulate(map(prod, shapes.values()), initial=0)), strict=True))
    entries = {name: {"dtype": "U8", "shape": shapes[name], "data_offsets": places[name]} for name in shapes}
    header = encode_header({"__metadata__": _METADATA, **entries})
    begin = 8 + len(header)
    tensors = (DiskTensor(name, path, "U8", shapes[name], begin + a, begin + b) for name, (a, b) in places.items())
    return Shard(path, header, _METADATA, tuple(tensors))


def saved_masks(checkpoint: Checkpoint) -> dict[str, DiskTensor]:
    """Where the packed mask of each tensor is, by its name; empty where none were saved.

    Raises:
        InputRefused: a file of masks is damaged, or of another version.
    """
    files = (path for shard in checkpoint.shards if (path := _path(shard.path)).is_file())
    return {name: mask for path in files for name, mask in _open(path).items()}


def read_mask(tensor: DiskTensor) -> torch.Tensor:
    """The mask of a pruned tensor of an opened checkpoint: bool, of its shape, True for a weight that is kept.

    Raises:
        InputRefused: it was not saved, does not fit the tensor, or its file is damaged or of another version.
    """
    path = _path(tensor.path)
    if not path.is_file():
        raise InputRefused(f"{path} is missing", "prune with --save-masks", code="no-masks")
    mask = _open(path).get(tensor.name)
    if mask is None or not mask_fits(mask, tensor):
        raise InputRefused(
            f"{path} has no mask for {tensor.name} {list(tensor.shape)}",
            "it is the mask of a pruned tensor that is saved, in the checkpoint that it was pruned to",
            code="no-masks",
        )
    return unpack_mask(mask.read(), tensor.shape)


def mask_fits(mask: DiskTensor, tensor: DiskTensor) -> bool:
    """Whether a packed mask can be that of this tensor."""
    return (mask.dtype, mask.shape) == ("U8", packed_shape(tensor.shape))


def packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Of the packed mask of a tensor of this shape."""
    return shape[0], -(-prod(shape[1:]) // 8)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor [rows, ..] of any strides → uint8 [rows, ⌈weights of a row / 8⌉], on its device."""
    import torch

    (rows, row_bytes), width = packed_shape(mask.shape), prod(mask.shape[1:])
    ones = torch.zeros(rows, 8 * row_bytes, dtype=torch.uint8, device=mask.device)
    ones[:, :width] = mask.reshape(rows, width)
    return (ones.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """What `pack_mask` made, on the CPU, → bool of this shape, that of the mask or of some of its rows."""
    import numpy as np
    import torch

    bits = np.unpackbits(packed.numpy(), axis=1, count=prod(shape[1:]), bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).reshape(*shape)


def _path(shard: Path) -> Path:
    return shard.parent / MASKS_DIRECTORY / shard.name


def _open(path: Path) -> Mapping[str, DiskTensor]:
    check_contained(path, path.parent.parent)
    found = read_shard(path)
    if found.metadata.get("tsenor_masks") != _METADATA["tsenor_masks"]:
        raise InputRefused(
            f"{path} is not a file of masks of version {_METADATA['tsenor_masks']}",
            "use the version of tsenor that wrote it, or prune again",
            code="no-masks",
        )
    return {mask.name: mask for mask in found.tensors}

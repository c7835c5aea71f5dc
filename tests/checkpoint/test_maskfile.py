"""The format of mask files, held against numpy's bits and safetensors' reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from tsenor_cli.checkpoint.maskfile import mask_file, pack_mask, read_mask, saved_masks, unpack_mask
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.errors import InputRefused

SHAPES = [(4, width) for width in range(1, 18)] + [(1, 64), (3, 5, 7), (6, 2, 3, 3), (16, 4, 1, 1), (0, 8)]


def drawn(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_numpy_and_come_back(shape):
    mask = drawn(shape)
    packed = pack_mask(mask)
    wanted = np.packbits(mask.numpy().reshape(shape[0], int(np.prod(shape[1:]))), axis=1, bitorder="little")
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), wanted)
    assert torch.equal(unpack_mask(packed, shape), mask)
    assert torch.equal(unpack_mask(packed[1:], mask[1:].shape), mask[1:])


@pytest.mark.parametrize("value", [True, False])
def test_bytes_of_equal_bits(value):
    assert pack_mask(torch.full((2, 16), value)).tolist() == [[255 * value] * 2] * 2


def test_strides_do_not_matter():
    mask = drawn((12, 10, 6))
    for view in (mask.transpose(0, 1), mask.permute(2, 1, 0), mask[1:, 1:, 1::2]):
        assert torch.equal(pack_mask(view), pack_mask(view.contiguous()))


def written(directory, masks=("a.weight", "b ☃"), metadata=None, shape=(4, 12)):
    """A checkpoint of two weights, and a file of masks beside it as safetensors writes it."""
    tensors = {"a.weight": torch.ones(4, 12), "b ☃": torch.ones(3, 5, 7)}
    write_checkpoint(directory, {"model.safetensors": tensors}, {"model_type": "llama"})
    shapes = {"a.weight": shape, "b ☃": (3, 5, 7)}
    (directory / "tsenor-masks").mkdir()
    packed = {name: pack_mask(drawn(shapes[name])) for name in masks}
    save_file(packed, directory / "tsenor-masks" / "model.safetensors", metadata or {"tsenor_masks": "1"})
    return open_checkpoint(directory).tensors


def test_what_others_have_written_is_read(tmp_path):
    for name, tensor in written(tmp_path).items():
        assert torch.equal(read_mask(tensor), drawn(tensor.shape)), name
    assert saved_masks(open_checkpoint(tmp_path)).keys() == {"a.weight", "b ☃"}


def test_others_read_what_is_planned(tmp_path):
    pruned = [
        DiskTensor(name, Path("in/model.safetensors"), "BF16", shape, 0, 0)
        for name, shape in (("z", (4, 12)), ("a ☃", (3, 5, 7)))
    ]
    planned = mask_file(pruned)
    masks = {tensor.name: pack_mask(drawn(tensor.shape)) for tensor in pruned}
    content = b"".join(masks[tensor.name].numpy().tobytes() for tensor in planned.tensors)
    path = tmp_path / planned.path.name
    path.write_bytes(len(planned.header).to_bytes(8, "little") + planned.header + content)
    assert {name: mask.tolist() for name, mask in load_file(path).items()} == {k: v.tolist() for k, v in masks.items()}
    assert path.stat().st_size == planned.nbytes
    assert len(planned.header) % 8 == 0
    assert planned.path == Path("in/tsenor-masks/model.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"masks": ["b ☃"]}, r"no mask for a.weight \[4, 12\]"),
        ({"shape": (4, 20)}, r"no mask for a.weight \[4, 12\]"),
        ({"metadata": {"format": "pt"}}, "not a file of masks of version 1"),
        ({"metadata": {"tsenor_masks": "2"}}, "not a file of masks of version 1"),
    ],
)
def test_masks_that_are_none(tmp_path, options, words):
    tensor = written(tmp_path, **options)["a.weight"]
    with pytest.raises(InputRefused, match=words) as refused:
        read_mask(tensor)
    assert refused.value.code == "no-masks"


def test_files_that_cannot_be_read(tmp_path):
    tensor = written(tmp_path)["a.weight"]
    path = tmp_path / "tsenor-masks" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputRefused, match="cut short"):
        read_mask(tensor)
    path.rename(tmp_path.parent / "elsewhere")
    path.symlink_to(tmp_path.parent / "elsewhere")
    with pytest.raises(InputRefused, match="links out"):
        read_mask(tensor)
    path.unlink()
    assert saved_masks(open_checkpoint(tmp_path)) == {}
    with pytest.raises(InputRefused, match=r"model.safetensors is missing.*--save-masks"):
        read_mask(tensor)

"""Shards with the headers of the input's, and tensors put where they belong."""

from __future__ import annotations

import hashlib
import json
import time

import pytest
import torch
from checkpoints import read_shards

from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.checkpoint.writer import OutputShards


@pytest.fixture
def staging(tmp_path):
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging"


def fill(shards, tensor):
    with shards.place_of(tensor) as place:
        for chunk in tensor.chunks():
            place.write(chunk)
    return place.sha256()


def test_format_pt_is_always_written_and_nothing_else_changes(llama, staging):
    """Some loaders crash on files without `format: pt`."""
    name = "model-00001-of-00004.safetensors"
    raw = (llama / name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = {"note": "no format ☃"}
    text = json.dumps(header).encode()
    (llama / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    checkpoint = open_checkpoint(llama)
    shards = OutputShards(checkpoint, staging)
    for tensor in reversed(checkpoint.tensors.values()):  # in any order
        fill(shards, tensor)
    shards.sync()
    copy = read_shards(staging)[name]
    assert {k: v.tolist() for k, v in copy.items()} == {k: v.tolist() for k, v in read_shards(llama)[name].items()}
    written = (staging / name).read_bytes()
    header_length = int.from_bytes(written[:8], "little")
    assert header_length % 8 == 0
    assert json.loads(written[8 : 8 + header_length])["__metadata__"] == {"note": "no format ☃", "format": "pt"}


def test_what_is_there_is_known_by_its_bytes(llama, staging):
    """Also by a later run, whatever the header has become."""
    (llama / "model-00001-of-00004.safetensors").write_bytes(without_metadata(llama))
    checkpoint = open_checkpoint(llama)
    tensor = checkpoint.shards[0].tensors[1]
    sha256 = fill(OutputShards(checkpoint, staging), tensor)
    assert sha256 == hashlib.sha256(b"".join(tensor.chunks())).hexdigest()
    again = OutputShards(checkpoint, staging)
    assert again.has(tensor, sha256)
    assert torch.equal(again.read(tensor), tensor.read())
    assert not again.has(tensor, "0" * 64)
    assert not again.has(checkpoint.shards[0].tensors[-1], sha256), "nothing is there yet"


def without_metadata(llama):
    raw = (llama / "model-00001-of-00004.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def test_a_shard_whose_beginning_is_not_whole_is_begun_anew(llama, staging):
    checkpoint = open_checkpoint(llama)
    tensor = checkpoint.shards[0].tensors[0]
    sha256 = fill(OutputShards(checkpoint, staging), tensor)
    path = staging / tensor.path.name
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    assert not OutputShards(checkpoint, staging).has(tensor, sha256)


def within_seconds(condition):
    """It is done in another thread."""
    return any(condition() or time.sleep(0.01) for _ in range(500))


def test_a_shard_is_synced_when_its_last_tensor_is_there(llama, staging, monkeypatch):
    synced = []
    monkeypatch.setattr("tsenor_cli.checkpoint.writer._sync", lambda file: synced.append(file.name))
    checkpoint = open_checkpoint(llama)
    shards = OutputShards(checkpoint, staging)
    first, *others = checkpoint.shards[0].tensors
    sha256 = fill(shards, first)
    for tensor in others:
        assert synced == []
        fill(shards, tensor)
    assert within_seconds(lambda: synced == [str(staging / first.path.name)])
    for tensor in others:
        fill(shards := OutputShards(checkpoint, staging), tensor)
    synced.clear()
    again = OutputShards(checkpoint, staging)
    for tensor in others:
        fill(again, tensor)
    assert synced == []
    assert again.has(first, sha256)
    assert within_seconds(lambda: synced == [str(staging / first.path.name)])


def test_a_tensor_that_failed_half_way_is_not_there(llama, staging):
    checkpoint = open_checkpoint(llama)
    shards = OutputShards(checkpoint, staging)
    *others, last = checkpoint.shards[0].tensors
    for tensor in others:
        fill(shards, tensor)
    with pytest.raises(ZeroDivisionError), shards.place_of(last) as place:
        place.write(next(last.chunks()))
        raise ZeroDivisionError
    assert shards._missing[last.path] == {last.name}


def test_what_is_written_is_settled_in_time(llama, staging, monkeypatch):
    """Put to disk, and its pages given back, before a shard is complete; not one byte of it changes."""
    forgotten = []
    monkeypatch.setattr("tsenor_cli.checkpoint.writer.SETTLE_BYTES", 1000)
    monkeypatch.setattr(
        "tsenor_cli.checkpoint.writer.settle",
        lambda file, parts: forgotten.extend((file.name, *part) for part in parts),
    )
    checkpoint = open_checkpoint(llama)
    shards = OutputShards(checkpoint, staging)
    shard = checkpoint.shards[0]
    for tensor in shard.tensors:
        fill(shards, tensor)
    shards.sync()
    assert {name for name, _, _ in forgotten} == {str(staging / shard.path.name)}
    covered = {at for _, start, nbytes in forgotten for at in range(start, start + nbytes)}
    assert len(covered) == sum(nbytes for _, _, nbytes in forgotten), "each byte once"
    written = sum(tensor.nbytes for tensor in shard.tensors)
    assert written - 1000 < len(covered) <= written
    assert (staging / shard.path.name).read_bytes() == shard.path.read_bytes()

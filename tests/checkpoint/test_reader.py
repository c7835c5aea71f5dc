"""Nothing in a checkpoint is trusted: what is damaged or points elsewhere is refused with one line."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import time

import pytest
import torch
from checkpoints import INDEX, write_checkpoint
from safetensors import SafetensorError, deserialize

from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.checkpoint.shard import _fill, read_shard
from tsenor_cli.errors import InputRefused

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def one_tensor_file(path, entry=None, header=None, data=bytes(8)):
    """A safetensors file around a header of our choice."""
    if header is None:
        header = json.dumps({"w": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_headers_read_as_safetensors_reads_them(llama):
    from safetensors import safe_open

    checkpoint = open_checkpoint(llama)
    for shard in checkpoint.shards:
        with safe_open(shard.path, "pt") as file:
            assert {t.name for t in shard.tensors} == set(file.keys())
            assert shard.metadata == file.metadata()
            for tensor in shard.tensors:
                expected = file.get_tensor(tensor.name)
                assert torch.equal(tensor.read(), expected)
                assert b"".join(tensor.chunks()) == expected.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_bands_read_the_rows_they_name(llama):
    tensor = open_checkpoint(llama).tensors["model.layers.0.mlp.gate_proj.weight"]
    assert torch.equal(torch.cat([tensor.read(0, 16), tensor.read(16, 80), tensor.read(80)]), tensor.read())


def test_a_read_that_returns_less_than_asked_is_continued():
    """The operating system may return fewer bytes at a time, and nothing when the file became shorter."""

    class Slow(io.BytesIO):
        def readinto(self, buffer):
            return super().readinto(buffer[:3])

    buffer = bytearray(10)
    _fill(Slow(b"0123456789"), memoryview(buffer), "x")
    assert buffer == b"0123456789"
    with pytest.raises(InputRefused, match="shorter"):
        _fill(Slow(b"012345678"), memoryview(buffer), "x")


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "dtype": "F33"},
        {**GOOD, "shape": [3]},
        {**GOOD, "shape": [-2, -1]},
        {**GOOD, "shape": [2.0]},
        {**GOOD, "shape": [True, 2]},
        {**GOOD, "shape": [2**40, 2**40, 0.5]},
        {**GOOD, "shape": [2**61, 2**61]},
        {**GOOD, "shape": [1] * 65},
        {**GOOD, "remark": 1},
        {**GOOD, "data_offsets": [8, 0]},
        {**GOOD, "data_offsets": [-8, 0]},
        {**GOOD, "data_offsets": [0]},
        {**GOOD, "data_offsets": [8, 16]},
        {"dtype": "F32"},
        [],
        None,
    ],
    ids=str,
)
def test_a_wrong_entry_is_refused(tmp_path, entry):
    with pytest.raises(InputRefused):
        read_shard(one_tensor_file(tmp_path / "x.safetensors", entry))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        (200_000_000).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{]",
        (2).to_bytes(8, "little") + b"[]",
        (60_000).to_bytes(8, "little") + b"[" * 60_000,
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_broken_file_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputRefused):
        read_shard(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}',
        b'{"e":{"dtype":"U8","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}        ',
        b'\xef\xbb\xbf{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"a":"\\ud800"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"\\udfff":""},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"a":"\xed\xa0\x80"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"w":{"x":NaN,"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
    ids=repr,
)
def test_what_python_would_take_and_safetensors_does_not(tmp_path, header):
    """Accepted, it would make an output that nobody can load."""
    path = one_tensor_file(tmp_path / "x.safetensors", header=header, data=bytes(8 if b'"w"' in header else 0))
    with pytest.raises(SafetensorError):
        deserialize(path.read_bytes())
    with pytest.raises(InputRefused):
        read_shard(path)


def test_a_name_that_appears_twice_is_refused(tmp_path):
    entry = json.dumps(GOOD)
    header = f'{{"w": {entry}, "w": {entry}}}'.encode()
    with pytest.raises(InputRefused, match="twice"):
        read_shard(one_tensor_file(tmp_path / "x.safetensors", header=header))


@pytest.mark.parametrize(
    ("name", "fine"), [("é ☃.weight", True), ("a\x1b[2J", False), ("a\nb", False), ("a\x9bb", False)]
)
def test_names_with_control_characters_are_refused(tmp_path, name, fine):
    path = one_tensor_file(tmp_path / "x.safetensors", header=json.dumps({name: GOOD}).encode())
    if fine:
        assert read_shard(path).tensors[0].name == name
    else:
        with pytest.raises(InputRefused, match="not valid"):
            read_shard(path)


@pytest.mark.parametrize(("data", "what"), [(bytes(7), "cut short"), (bytes(9), "after its last tensor")])
def test_a_file_of_the_wrong_length_is_refused(tmp_path, data, what):
    with pytest.raises(InputRefused, match=what):
        read_shard(one_tensor_file(tmp_path / "x.safetensors", GOOD, data=data))


@pytest.mark.parametrize("start", [4, 12], ids=["overlap", "hole"])
def test_tensors_that_overlap_or_leave_holes_are_refused(tmp_path, start):
    entries = {"a": GOOD, "b": {**GOOD, "data_offsets": [start, start + 8]}}
    with pytest.raises(InputRefused, match="overlap or leave a hole"):
        read_shard(
            one_tensor_file(tmp_path / "x.safetensors", header=json.dumps(entries).encode(), data=bytes(start + 8))
        )


def test_mutated_headers_are_refused_or_read_safely(tmp_path):
    """Whatever bytes stand in a header: a checked shard or InputRefused, never another exception."""
    tensors = {"a": torch.zeros(4, 4), "b": torch.zeros(3, dtype=torch.bfloat16)}
    write_checkpoint(tmp_path, {"model.safetensors": tensors}, CONFIG)
    path = tmp_path / "model.safetensors"
    good, choose = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(choose.randint(1, 3)):
            bad[choose.randrange(len(bad))] = choose.randrange(256)
        path.write_bytes(bad[: choose.choice([len(bad), choose.randrange(len(bad))])])
        try:
            shard = read_shard(path)
        except InputRefused:
            refused += 1
        else:
            assert all(0 <= t.start <= t.stop <= path.stat().st_size for t in shard.tensors)
    assert 1000 < refused < 2000  # both outcomes are met


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "c:x.safetensors",
        "x.bin",
        7,
        "x\n.safetensors",
        "\x9b2J.safetensors",
    ],
)
def test_an_index_that_names_a_path_is_refused(llama, name):
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (llama / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputRefused):
        open_checkpoint(llama)


@pytest.mark.parametrize("file", ["config.json", "model-00001-of-00004.safetensors", "LICENSE", INDEX])
def test_a_link_out_of_the_checkpoint_is_refused(llama, tmp_path, file):
    """Following it would copy a file of the user's into an output that may be published."""
    target = tmp_path / "outside"
    (llama / file).rename(target)
    (llama / file).symlink_to(target)
    with pytest.raises(InputRefused, match="links out"):
        _ = open_checkpoint(llama).other_files


def test_a_tensor_that_the_index_names_and_no_shard_has_is_refused(llama):
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    (llama / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputRefused, match=r"layers\.7"):
        open_checkpoint(llama)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shards = {f"model-0000{i}-of-00002.safetensors": {"w": torch.zeros(2)} for i in (1, 2)}
    write_checkpoint(tmp_path, {**shards, "model-00003.safetensors": {"x": torch.zeros(1)}}, CONFIG)
    index = {
        "weight_map": {
            "x": "model-00003.safetensors",
            "w": "model-00002-of-00002.safetensors",
            "v": "model-00001-of-00002.safetensors",
        }
    }
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputRefused, match="two shards"):
        open_checkpoint(tmp_path)


@pytest.mark.slow
def test_many_names_of_which_one_is_twice(tmp_path):
    """In linear time: a hundred thousand tensors of nothing, in two shards."""
    names = [f"w{number}" for number in range(100_000)]
    for file, some in (("a", names), ("b", ["other", names[-1]])):
        entries = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in some}
        one_tensor_file(tmp_path / f"{file}.safetensors", header=json.dumps(entries).encode(), data=b"")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    index = {"weight_map": {names[0]: "a.safetensors", "other": "b.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    started = time.process_time()
    with pytest.raises(InputRefused, match="'w99999' is in two shards"):
        open_checkpoint(tmp_path)
    assert time.process_time() - started < 30, "quadratic: minutes"


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": "' + b"x" * 33 * 2**20 + b'"}',
        b'{"a": [' + b"[]," * 1_000_000 + b"1]}",
        b'{"a": [' + b"{}," * 1_000_000 + b"1]}",
    ],
    ids=["bytes", "lists", "objects"],
)
def test_json_that_would_unfold_into_too_much(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputRefused, match="larger than"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputRefused, match=r"larger than|not a whole"):
        read_shard(one_tensor_file(tmp_path / "model.safetensors", header=text))


@pytest.mark.slow
def test_the_largest_header_that_is_allowed(tmp_path):
    entries = ",".join(f'"w{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(300_000))
    shard = read_shard(one_tensor_file(tmp_path / "a.safetensors", header=f"{{{entries}}}".encode(), data=b""))
    assert len(shard.tensors) == 300_000


@pytest.mark.parametrize("depth", [1000, 100_000, 400_000])
def test_json_of_absurd_depth(tmp_path, depth):
    (tmp_path / "config.json").write_bytes(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
    with pytest.raises(InputRefused, match=r"not valid JSON|no safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00001-of-00004.safetensors", "LICENSE"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(llama, file, kind):
    (llama / file).unlink()
    if kind == "fifo":
        os.mkfifo(llama / file)
    elif kind == "directory":
        (llama / file).mkdir()
    else:
        (llama / file).symlink_to("/dev/zero")
    if (kind, file) == ("directory", "LICENSE"):
        assert file not in map(str, open_checkpoint(llama).other_files)
        return
    with pytest.raises(InputRefused):
        _ = open_checkpoint(llama).other_files


@pytest.mark.parametrize(("target", "why"), [("templates", "a link to a directory"), ("/etc", "links out of")])
def test_a_linked_directory_is_refused_and_not_left_out(llama, target, why):
    (llama / "templates").mkdir()
    (llama / "linked").symlink_to(target)
    with pytest.raises(InputRefused, match=why) as caught:
        _ = open_checkpoint(llama).other_files
    assert caught.value.code == "unsafe-file"


def test_links_in_a_circle(llama):
    (llama / "circle").symlink_to(llama)
    with pytest.raises(InputRefused, match="circle is a link to a directory"):
        _ = open_checkpoint(llama).other_files
    (llama / "circle").unlink()
    (llama / "loop").symlink_to("loop")
    with pytest.raises(InputRefused, match="loop"):
        _ = open_checkpoint(llama).other_files


def test_an_input_that_cannot_be_read_is_named():
    class Broken(io.BytesIO):
        def readinto(self, _buffer):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match=r"Input/output error: 'model.safetensors'"):
        _fill(Broken(), memoryview(bytearray(1)), "model.safetensors")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "sparsity_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_checkpoint_is_refused(llama, key, nested):
    config = json.loads((llama / "config.json").read_text())
    (config.setdefault("text_config", {}) if nested else config)[key] = {"format": "sparse-24-bitmask"}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match=key):
        open_checkpoint(llama)


def test_packed_weights_are_refused_even_if_the_config_is_silent(tmp_path):
    tensors = {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(4, dtype=torch.int32)}
    with pytest.raises(InputRefused, match="packed"):
        open_checkpoint(write_checkpoint(tmp_path, {"model.safetensors": tensors}, CONFIG))


def test_only_dense_copies_in_other_formats_are_left_out(llama):
    dense = ("pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.Q4.gguf", "model.fp16.safetensors")
    (llama / "checkpoint-5").mkdir()
    for name in (*dense, "checkpoint-5/optimizer.pt", "spiece.bin.model"):
        (llama / name).write_bytes(b"x")
    checkpoint = open_checkpoint(llama)
    assert {p.as_posix() for p in checkpoint.left_out_files} == {*dense, "checkpoint-5/optimizer.pt"}
    assert "spiece.bin.model" in {p.name for p in checkpoint.other_files}

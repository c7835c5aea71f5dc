"""Checkpoints with one file spoilt. A number always gives the same mutant, so that a failure can be seen again."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

_Change = Callable[[random.Random, Any], Any]
_NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, 1e400, float("nan"), True, None, "1", [], {})
_NAMES = (
    "", "../../evil", "/evil", "a\0b", "a\nb", "\x1b[2J", "__metadata__", "é☃", "\ud800",
    "x" * 5000, "model.norm.weight",
)  # fmt: skip
_WORDS = (*_NAMES, "weights.bin", "../model.safetensors", "C:\\x.safetensors", "a/b.safetensors", "MODEL.safetensors")
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64", "Q4", "", "f32")
_ADDITIONS = (
    ("quantization_config", {"quant_method": "gptq"}),
    ("auto_map", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
    ("_attn_implementation", "someone/kernel"),
    ("dtype", "float8_e4m3fn"),
    ("layer_types", ["full_attention"] * 100_000),
    ("text_config", {"num_hidden_layers": 10**9}),
    ("id2label", {str(number): "x" for number in range(10_000)}),
    ("num_labels", 10**9),
)


def safetensors(whole: bytes, number: int) -> bytes:
    """One safetensors file, spoilt; now and then only in its data, which is no fault."""
    dice = random.Random(f"safetensors {number}")
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length], whole[8 + length :]
    kind = dice.random()
    if kind < 0.55:
        entries = json.loads(header)
        for _ in range(dice.choice((1, 1, 1, 2, 4))):
            dice.choice(_HEADER_CHANGES)(dice, entries)
        header = _written(dice, entries)
    elif kind < 0.6:
        header, data = _folded(dice, json.loads(header), data)
    elif kind < 0.85:
        header = _spoilt(dice, header)
    elif kind < 0.88:
        data = _not_finite(dice, data) if dice.random() < 0.3 else _spoilt(dice, data, keeps_length=dice.random() < 0.7)
    size = len(header) if dice.random() < 0.9 else dice.choice((0, 1, 7, len(header) - 1, 2**31, 2**63, 2**64 - 1))
    found = size.to_bytes(8, "little") + header + data
    if kind > 0.94:
        return found[: dice.randrange(len(found))]
    return found + dice.randbytes(dice.choice((1, 8, 4096))) if kind > 0.88 else found


def config(whole: bytes, number: int) -> bytes:
    """A config.json, spoilt."""
    dice = random.Random(f"config {number}")
    if dice.random() < 0.3:
        return _spoilt(dice, whole)
    entries = json.loads(whole)
    for _ in range(dice.choice((1, 1, 2, 3))):
        if dice.random() < 0.1:
            entries.update([_one(dice, *_ADDITIONS)])
        else:
            _change_somewhere(dice, entries)
    return _written(dice, entries)


def index(whole: bytes, number: int) -> bytes:
    """A model.safetensors.index.json, spoilt."""
    dice = random.Random(f"index {number}")
    if dice.random() < 0.3:
        return _spoilt(dice, whole)
    entries = json.loads(whole)
    for _ in range(dice.choice((1, 1, 2))):
        places = (
            entries["weight_map"] if dice.random() < 0.8 and isinstance(entries.get("weight_map"), dict) else entries
        )
        _change_somewhere(dice, places)
    return _written(dice, entries)


def _one(dice: random.Random, *options: Any) -> Any:
    """One of them, and not the object itself: the next change may be made within it."""
    return deepcopy(dice.choice(options))


# --- JSON -------------------------------------------------------------------------------------------------------------


def _written(dice: random.Random, entries: Any) -> bytes:
    """As JSON, now and then with a key that appears twice, nested absurdly, padded, or spelt as few readers take it."""
    text = json.dumps(entries)
    kind = dice.random()
    if kind < 0.03:
        name, value = (dice.choice(list(found)) for found in ((entries, entries.values()) if entries else ("a", [1])))
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(value)}}}"
    elif kind < 0.05:
        depth = dice.choice((50, 1000, 100_000))
        text = f'{text[:-1]}, "deep": {"[" * depth}{"]" * depth}}}'
    elif kind < 0.06:
        text += " " * dice.choice((1, 100_000))
    elif kind < 0.07:
        text = dice.choice((text.replace("[0, ", "[-0, ", 1), text.replace("[0, ", "[0e0, ", 1), "\ufeff" + text))
    return text.encode("utf-8", "surrogatepass")


def _change_somewhere(dice: random.Random, entries: dict[str, Any]) -> None:
    """Put something else in one place of a JSON tree, or take it away, or rename it."""
    places = list(_places(entries))
    if not places:
        return
    holder, key = dice.choice(places)
    kind = dice.random()
    if kind < 0.2 and isinstance(holder, dict):
        del holder[key]
    elif kind < 0.3 and isinstance(holder, dict):
        holder[dice.choice(_WORDS)] = holder.pop(key)
    else:
        holder[key] = _one(dice, *_NUMBERS, *_WORDS, 10**6, 10**9, [holder[key]], {"a": holder[key]})


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield value, key
        yield from _places(one)


def _spoilt(dice: random.Random, raw: bytes, *, keeps_length: bool = False) -> bytes:
    """Bytes flipped, cut out, put in, doubled."""
    found = bytearray(raw)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at, some = dice.randrange(len(found) + 1), dice.choice((1, 1, 2, 8, 100))
        kind = dice.randrange(2 if keeps_length else 6)
        if kind < 2 and at < len(found):
            found[at] = found[at] ^ (1 << dice.randrange(8)) if kind else dice.randrange(256)
        elif kind == 2:
            del found[at : at + some]
        elif kind == 3:
            found[at:at] = dice.randbytes(some)
        elif kind == 4:
            found[at:at] = found[at : at + some]
        elif kind == 5:
            found[at:at] = dice.choice((b'"', b"{", b"[", b"}", b",", b"\\", b"1e9", b"-", b"NaN", b"null", b"\xff"))
    return bytes(found)


def _not_finite(dice: random.Random, raw: bytes) -> bytes:
    """A NaN or an infinity among numbers of 32 bits."""
    at = dice.randrange(0, len(raw), 4)
    return raw[:at] + struct.pack("<f", dice.choice((math.nan, math.inf, -math.inf))) + raw[at + 4 :]


# --- safetensors headers ----------------------------------------------------------------------------------------------


def _entry(dice: random.Random, entries: dict[str, Any]) -> dict[str, Any]:
    found = [entry for name, entry in entries.items() if name != "__metadata__" and isinstance(entry, dict)]
    return dice.choice(found) if found else {}


def _dtype(dice: random.Random, entries: dict[str, Any]) -> None:
    _entry(dice, entries)["dtype"] = _one(dice, *_DTYPES, *_NUMBERS)


def _shape(dice: random.Random, entries: dict[str, Any]) -> None:
    entry = _entry(dice, entries)
    shape = entry.get("shape")
    if not isinstance(shape, list) or not shape or dice.random() < 0.2:
        entry["shape"] = _one(dice, *_NUMBERS, [2**40, 2**40], [1] * 100, [0], [[1]])
    elif dice.random() < 0.3:
        dice.shuffle(shape)
    else:
        shape[dice.randrange(len(shape))] = _one(dice, *_NUMBERS)


def _offsets(dice: random.Random, entries: dict[str, Any]) -> None:
    entry = _entry(dice, entries)
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or dice.random() < 0.2:
        entry["data_offsets"] = _one(dice, *_NUMBERS, [0], [0, 0, 0], [2**63, 2**63])
        return
    place = dice.randrange(2)
    number = offsets[place]
    known = isinstance(number, int)
    offsets[place] = (
        number + dice.choice((-8, -1, 1, 2, 8, 64)) if known and dice.random() < 0.6 else _one(dice, *_NUMBERS)
    )


def _swap(dice: random.Random, entries: dict[str, Any]) -> None:
    """Two tensors in each other's places."""
    one, other = _entry(dice, entries), _entry(dice, entries)
    one["data_offsets"], other["data_offsets"] = other.get("data_offsets"), one.get("data_offsets")


def _overlap(dice: random.Random, entries: dict[str, Any]) -> None:
    _entry(dice, entries)["data_offsets"] = _entry(dice, entries).get("data_offsets")


def _folded(dice: random.Random, entries: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    """One tensor laid over others, and its own bytes cut out: the header still accounts for the whole file."""
    tensors = [entry for name, entry in entries.items() if name != "__metadata__"]
    moved = dice.choice(tensors)
    start, stop = moved["data_offsets"]
    for entry in tensors:
        if entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [offset - (stop - start) for offset in entry["data_offsets"]]
    first = dice.randrange(0, max(len(data) - 2 * (stop - start), 0) + 1, 4)
    moved["data_offsets"] = [first, first + stop - start]
    return json.dumps(entries).encode(), data[:start] + data[stop:]


def _rename(dice: random.Random, entries: dict[str, Any]) -> None:
    if entries:
        name = dice.choice(list(entries))
        entries[dice.choice(_NAMES)] = entries.pop(name)


def _drop(dice: random.Random, entries: dict[str, Any]) -> None:
    if entries:
        del entries[dice.choice(list(entries))]


def _metadata(dice: random.Random, entries: dict[str, Any]) -> None:
    entries["__metadata__"] = dice.choice(
        ({"format": 1}, {"format": "tf"}, {"a": {}}, [], "pt", None, {"x" * 1000: "y" * 1000}, {"a": "\ud800"})
    )


def _empty(dice: random.Random, entries: dict[str, Any]) -> None:
    """A tensor of nothing, which is allowed."""
    start = dice.choice((0, 0, 8, 2**40))
    shape = dice.choice(([0], [0], [3, 0], [0, 2**62], [2**40, 2**40, 0]))
    entries[dice.choice(_NAMES)] = {"dtype": dice.choice(_DTYPES), "shape": shape, "data_offsets": [start, start]}


def _remark(dice: random.Random, entries: dict[str, Any]) -> None:
    """A key that the format does not know."""
    _entry(dice, entries)["remark"] = dice.choice((1, math.nan, 10**400, "x", [[]]))


def _anywhere(dice: random.Random, entries: dict[str, Any]) -> None:
    _change_somewhere(dice, entries)


_HEADER_CHANGES = (
    _dtype, _shape, _offsets, _offsets, _swap, _overlap, _rename, _drop, _metadata, _empty, _remark, _anywhere,
)  # fmt: skip
MUTANTS: dict[str, tuple[str, Callable[[bytes, int], bytes]]] = {
    "safetensors": ("model-00001-of-00002.safetensors", safetensors),
    "config": ("config.json", config),
    "index": ("model.safetensors.index.json", index),
}

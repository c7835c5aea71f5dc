#!/usr/bin/env python3
"""Measure what `tsenor prune` needs of memory and time on a checkpoint of a given size.

    scripts/measure_memory.py [--gib 4] [--nm 2:4] [--limit-mib 1536] [PRUNE OPTION...]

Makes a random bf16 checkpoint with the shapes of Llama 3 8B, copies it with fsync for comparison, and prunes it
in a fresh process. Memory is counted above what the process held once everything was imported. The first run
after a change compiles kernels too, the second takes them from the cache. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

MIB = 2**20
GIB = 2**30
SHARDS = 4

HIDDEN = 4096
INTERMEDIATE = 14336
KEY_VALUE = 1024
VOCABULARY = 32000  # at least; takes up what is left after the last whole layer
BYTES_PER_WEIGHT = 2

SAMPLE_EVERY_S = 0.05


def main() -> None:
    if sys.argv[1:2] == ["--in-child"]:
        prune_and_record(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint in GiB [4]")
    parser.add_argument("--nm", default="2:4", help="pattern [2:4]")
    parser.add_argument("--limit-mib", type=float, help="exit 1 when the peak above the imports is more MiB")
    parser.add_argument("--dir", type=Path, help="where to work; needs three times the size [the temporary directory]")
    args, prune_options = parser.parse_known_args()
    size = round(args.gib * GIB)
    if size < smallest_bytes():
        parser.error(f"--gib must be at least {smallest_bytes() / GIB:.2f}: one layer and the vocabulary")
    with tempfile.TemporaryDirectory(prefix="tsenor-memory-", dir=args.dir) as folder:
        peak_mib = measure(Path(folder), size, ["--nm", args.nm, *prune_options])
    if args.limit_mib is not None and peak_mib > args.limit_mib:
        sys.exit(f"over the limit: {peak_mib:.0f} MiB above the imports, {args.limit_mib:.0f} allowed")


def measure(folder: Path, size: int, options: list[str]) -> float:
    """Print all figures; returns the peak above the imports in MiB."""
    source = folder / "checkpoint"
    make_checkpoint(source, size)
    copy_s = timed_copy(source, folder / "copy")
    shutil.rmtree(folder / "copy")
    run = run_child(folder, ["prune", str(source), "-o", str(folder / "pruned"), *options])
    above = (run["peak"] - run["baseline"]) / MIB
    weights = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    print(f"checkpoint           {weights / GIB:8.2f} GiB in {SHARDS} shards; options: {' '.join(options)}")
    print(f"after the imports    {run['baseline'] / MIB:8.0f} MiB")
    print(f"peak                 {run['peak'] / MIB:8.0f} MiB")
    print(f"peak above imports   {above:8.0f} MiB")
    print(f"  largest anonymous  {run['anonymous'] / MIB:8.0f} MiB   sampled every {SAMPLE_EVERY_S * 1000:.0f} ms")
    print(f"  largest file-backed{run['file'] / MIB:8.0f} MiB   each at its own moment, imports included")
    print(f"prune                {run['seconds']:8.1f} s     without the imports")
    print(f"copy and fsync       {copy_s:8.1f} s     prune / copy = {run['seconds'] / copy_s:.2f}")
    return above


def layer_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }


def shape_bytes(shape: tuple[int, ...]) -> int:
    weights = BYTES_PER_WEIGHT
    for length in shape:
        weights *= length
    return weights


def layer_bytes() -> int:
    return sum(map(shape_bytes, layer_shapes().values()))


def smallest_bytes() -> int:
    return layer_bytes() + 2 * shape_bytes((VOCABULARY, HIDDEN)) + shape_bytes((HIDDEN,))


def plan(size: int) -> tuple[int, int]:
    """How many layers and words make a checkpoint of `size` bytes, one word (16 KiB) short at most."""
    layers = 1 + (size - smallest_bytes()) // layer_bytes()
    rest = size - layers * layer_bytes() - shape_bytes((HIDDEN,))
    return layers, rest // (2 * shape_bytes((HIDDEN,)))


def all_shapes(layers: int, words: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, HIDDEN)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes().items()}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (words, HIDDEN)}


def make_checkpoint(folder: Path, size: int) -> None:
    """Write the checkpoint tensor by tensor, so that this process stays small too."""
    folder.mkdir()
    layers, words = plan(size)
    shapes = all_shapes(layers, words)
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    done = 0
    for name, shape in shapes.items():
        shards[min(SHARDS - 1, done * SHARDS // size)][name] = shape
        done += shape_bytes(shape)
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{SHARDS:05}.safetensors"
        write_shard(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": done}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config(layers, words)), encoding="utf-8")


def config(layers: int, words: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": words,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": KEY_VALUE * 32 // HIDDEN,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file: length of the header, header, and the tensors one behind the other."""
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            file.write(tensor.view(torch.uint8).numpy())
        os.fsync(file.fileno())  # else its writing back would slow down what is measured


def timed_copy(source: Path, target: Path) -> float:
    """Seconds to copy the folder's files and have them on the disk."""
    started = time.monotonic()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.monotonic() - started


def run_child(folder: Path, command: list[str]) -> dict[str, float]:
    """Run tsenor in a fresh process; its own figures, and the largest that were sampled from outside."""
    record = folder / "record.json"
    child = subprocess.Popen([sys.executable, __file__, "--in-child", str(record), *command])
    sampled = {"anonymous": 0, "file": 0}
    sampler = threading.Thread(target=sample, args=(child, sampled))
    sampler.start()
    status = child.wait()
    sampler.join()
    if status != 0:
        sys.exit(f"tsenor failed with exit code {status}")
    return sampled | json.loads(record.read_text(encoding="utf-8"))


def sample(child: subprocess.Popen[bytes], largest: dict[str, int]) -> None:
    while child.poll() is None:
        try:
            now = memory(child.pid)
            largest["anonymous"] = max(largest["anonymous"], now["RssAnon"])
            largest["file"] = max(largest["file"], now["RssFile"])
        except (OSError, KeyError):
            return  # it has just ended
        time.sleep(SAMPLE_EVERY_S)


def memory(pid: int | str) -> dict[str, int]:
    """The fields of /proc/PID/status that are sizes, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in fields}


def prune_and_record(record: Path, command: list[str]) -> None:
    """In the child: import everything, run the command, write down the peaks (VmHWM only ever grows)."""
    import_everything()
    from tsenor_cli.cli import run

    baseline = memory("self")["VmHWM"]
    started = time.monotonic()
    status = run(command)
    figures = {"baseline": baseline, "peak": memory("self")["VmHWM"], "seconds": time.monotonic() - started}
    record.write_text(json.dumps(figures), encoding="utf-8")
    sys.exit(status)


def import_everything() -> None:
    import importlib
    import pkgutil

    import tsenor_cli

    for name in ("torch", "numba", "transformers", "safetensors.torch"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(tsenor_cli.__path__, "tsenor_cli."):
        importlib.import_module(module.name)


if __name__ == "__main__":
    main()

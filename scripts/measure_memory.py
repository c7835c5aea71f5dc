#!/usr/bin/env python3
"""Measure what `tsenor prune` needs of memory and time on a checkpoint of a given size.

    scripts/measure_memory.py [--gib 4] [--shapes 8b] [--nm 2:4] [--limit-mib 1536] [--hold-bound] [PRUNE OPTION...]
    scripts/measure_memory.py --gib 3 --shapes 1.5b --hold-bound --method sparsegpt --samples 32

Makes a random bf16 checkpoint with the shapes of Llama 3 8B, or of smaller models, copies it with
fsync for comparison, and prunes it in a fresh process. With a calibrated method it gets a tokenizer and a text.
Memory is counted above what the process held once everything was imported, and compared with what --dry-run said.
The first run after a change compiles kernels too, the second takes them from the cache. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20
GIB = 2**30
SHARDS = 4

WHOLE_LAYERS, WHOLE_WORDS = 32, 128256  # config.json of meta-llama/Llama-3.1-8B
WHOLE_BYTES = 16_060_522_496
VOCABULARY = 32000  # at least; takes up what is left after the last whole layer
BYTES_PER_WEIGHT = 2

SAMPLE_EVERY_S = 0.05
TEXT_BYTES = 2**21
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}  # models are local; tsenor sets the other


class Shapes(NamedTuple):
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    key_value: int
    heads: int


SHAPES = {"8b": Shapes(4096, 14336, 1024, 32), "1.5b": Shapes(2048, 8192, 512, 16), "0.5b": Shapes(1024, 4096, 256, 16)}


def main() -> None:
    if sys.argv[1:2] == ["--in-child"]:
        prune_and_record(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint in GiB [4]")
    parser.add_argument("--shapes", choices=SHAPES, default="8b", help="sizes of its layers [8b]")
    parser.add_argument("--whole", action="store_true", help="all of Llama 3.1 8B instead: 16.06 GB in its own layers")
    parser.add_argument("--nm", default="2:4", help="pattern [2:4]")
    parser.add_argument("--method", default="magnitude", help="pruning method [magnitude]")
    parser.add_argument("--limit-mib", type=float, help="exit 1 when the peak above the imports is more MiB")
    parser.add_argument("--hold-bound", action="store_true", help="exit 1 when it is more than --dry-run has said")
    parser.add_argument("--dir", type=Path, help="where to work; needs three times the size [the temporary directory]")
    args, options = parser.parse_known_args()
    size, shapes = (WHOLE_BYTES, SHAPES["8b"]) if args.whole else (round(args.gib * GIB), SHAPES[args.shapes])
    if size < smallest_bytes(shapes):
        parser.error(f"--gib must be at least {smallest_bytes(shapes) / GIB:.2f}: one layer and the vocabulary")
    with tempfile.TemporaryDirectory(prefix="tsenor-memory-", dir=args.dir) as folder:
        options = ["--nm", args.nm, "--method", args.method, *options]
        if args.method != "magnitude":
            options += ["--calibration", str(Path(folder) / "text.txt")]
        peak_mib, bound_mib = measure(Path(folder), size, shapes, options)
    limits = [args.limit_mib, bound_mib if args.hold_bound else None]
    if any(limit is not None and peak_mib > limit for limit in limits):
        sys.exit(f"over the limit: {peak_mib:.0f} MiB above the imports, {limits} allowed")


def measure(folder: Path, size: int, shapes: Shapes, options: list[str]) -> tuple[float, float]:
    """Print all figures; returns the peak above the imports and what --dry-run says of it, in MiB."""
    source = folder / "checkpoint"
    make_checkpoint(source, size, shapes)
    make_text(folder / "text.txt")
    copy_s = timed_copy(source, folder / "copy")
    shutil.rmtree(folder / "copy")
    os.sync()  # its going would slow down what is measured, too
    command = ["prune", str(source), "-o", str(folder / "pruned"), *options]
    said = dry_run(command)
    bound = said["memory"]
    run = run_child(folder, command)
    alone = run_child(folder, ["verify", str(folder / "pruned")])
    check = run_child(folder, ["verify", str(folder / "pruned"), "--against", str(source)])
    layers, _ = plan(size, shapes)
    solve_s = layers * layer_seconds(shapes, options)
    above = (run["peak"] - run["baseline"]) / MIB
    weights = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    print(f"checkpoint           {weights / GIB:8.2f} GiB in {SHARDS} shards; options: {' '.join(options)}")
    print(f"after the imports    {run['baseline'] / MIB:8.0f} MiB")
    print(f"peak                 {run['peak'] / MIB:8.0f} MiB")
    print(f"peak above imports   {above:8.0f} MiB")
    print(f"  largest anonymous  {run['anonymous'] / MIB:8.0f} MiB   sampled every {SAMPLE_EVERY_S * 1000:.0f} ms")
    print(f"  largest file-backed{run['file'] / MIB:8.0f} MiB   each at its own moment, imports included")
    print(f"--dry-run says       {sum(bound.values()) / MIB:8.0f} MiB")
    for part, nbytes in bound.items():
        print(f"  {part:27} {nbytes / MIB:8.0f} MiB")
    print(f"copy and fsync       {copy_s:8.1f} s")
    print(f"solving alone        {solve_s:8.1f} s     by magnitude, in memory, one layer timed for all")
    print(
        f"prune                {run['seconds']:8.1f} s     {(run['seconds'] - solve_s) / copy_s:.2f} copies and solving"
    )
    foretold, stages, whole = said["forecast"]["seconds"], said["forecast"]["stages"], run["whole"]
    print(f"  with the imports   {whole:8.1f} s")
    print(f"--dry-run says       {foretold:8.1f} s     {foretold / whole - 1:+.0%}; {stages}")
    print(f"verify               {alone['seconds']:8.1f} s     {alone['seconds'] / copy_s:.2f} copies")
    print(f"verify --against     {check['seconds']:8.1f} s     {check['seconds'] / copy_s:.2f} copies")
    print(f"  peak               {check['peak'] / MIB:8.0f} MiB")
    return above, sum(bound.values()) / MIB


def layer_seconds(shapes: Shapes, options: list[str]) -> float:
    """To solve the masks of one layer's matrices, all of them in memory."""
    import torch

    from tsenor_cli import solve_mask

    pattern, transposable = options[options.index("--nm") + 1], "--standard" not in options
    weights = [torch.randn(shape).to(torch.bfloat16) for shape in layer_shapes(shapes).values() if len(shape) == 2]
    seconds = []
    for _ in range(2):  # the first time compiles, or reads what was compiled
        started = time.monotonic()
        for weight in weights:
            solve_mask(weight, pattern, transposable=transposable, absolute=True)
        seconds.append(time.monotonic() - started)
    return min(seconds)


def dry_run(command: list[str]) -> dict[str, Any]:
    """What the command says it will need."""
    done = subprocess.run(
        [sys.executable, "-m", "tsenor_cli", *command, "--dry-run", "--json"],
        check=True,
        capture_output=True,
        env=ENVIRONMENT,
    )
    return json.loads(done.stdout)


def layer_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    hidden, intermediate, key_value, _ = shapes
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }


def shape_bytes(shape: tuple[int, ...]) -> int:
    weights = BYTES_PER_WEIGHT
    for length in shape:
        weights *= length
    return weights


def layer_bytes(shapes: Shapes) -> int:
    return sum(map(shape_bytes, layer_shapes(shapes).values()))


def smallest_bytes(shapes: Shapes) -> int:
    return layer_bytes(shapes) + 2 * shape_bytes((VOCABULARY, shapes.hidden)) + shape_bytes((shapes.hidden,))


def plan(size: int, shapes: Shapes) -> tuple[int, int]:
    """How many layers and words make a checkpoint of `size` bytes, one word short at most."""
    if size == WHOLE_BYTES:
        return WHOLE_LAYERS, WHOLE_WORDS
    layers = 1 + (size - smallest_bytes(shapes)) // layer_bytes(shapes)
    rest = size - layers * layer_bytes(shapes) - shape_bytes((shapes.hidden,))
    return layers, rest // (2 * shape_bytes((shapes.hidden,)))


def all_shapes(layers: int, words: int, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, shapes.hidden)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes(shapes).items()}
    return found | {"model.norm.weight": (shapes.hidden,), "lm_head.weight": (words, shapes.hidden)}


def make_checkpoint(folder: Path, size: int, sizes: Shapes) -> None:
    """Write the checkpoint tensor by tensor, so that this process stays small too."""
    folder.mkdir()
    layers, words = plan(size, sizes)
    shapes = all_shapes(layers, words, sizes)
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
    (folder / "config.json").write_text(json.dumps(config(layers, words, sizes)), encoding="utf-8")
    add_tokenizer(folder)


def add_tokenizer(folder: Path) -> None:
    """A token for each byte: the model is random, too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def make_text(path: Path) -> None:
    generator = random.Random(0)
    path.write_text("".join(generator.choices("abcdefghijklmnopqrstuvwxyz .,\n", k=TEXT_BYTES)), encoding="utf-8")


def config(layers: int, words: int, shapes: Shapes) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": words,
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.key_value * shapes.heads // shapes.hidden,
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
    record, started = folder / "record.json", time.monotonic()
    child = subprocess.Popen([sys.executable, __file__, "--in-child", str(record), *command], env=ENVIRONMENT)
    sampled = {"anonymous": 0, "file": 0}
    sampler = threading.Thread(target=sample, args=(child, sampled))
    sampler.start()
    status = child.wait()
    sampler.join()
    if status != 0:
        sys.exit(f"tsenor failed with exit code {status}")
    return sampled | {"whole": time.monotonic() - started} | json.loads(record.read_text(encoding="utf-8"))


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

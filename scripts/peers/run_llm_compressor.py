#!/usr/bin/env python3
"""Prune a Llama-like checkpoint with llm-compressor's SparseGPT, on the CPU, on given samples.

llm-compressor wants other versions than we do, so it has an environment of its own, outside this repository.
The constraint keeps pip from fetching a CUDA build of torch:

    python3.11 -m venv ../llm-compressor
    ../llm-compressor/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    echo torch==2.13.0 > ../llm-compressor/constraints.txt
    ../llm-compressor/bin/pip install llmcompressor==0.14.0.1 -c ../llm-compressor/constraints.txt

    ../llm-compressor/bin/python scripts/peers/run_llm_compressor.py MODEL --tokens FILE --out DIR [--nm 2:4]

FILE is a safetensors file with one int64 tensor `windows` [samples, length]. Every linear layer within the decoder
layers is pruned, in the checkpoint's own data type and with llm-compressor's defaults (batches of one sample).
The checkpoint in DIR is a dense one with zeros. Prints one line of JSON: the seconds each step took, on the clock and
on all cores together, the process's highest resident memory by the end of each step, and the versions. Linux only.
OMP_NUM_THREADS sets the number of threads.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")
DECODER_LAYERS = r"re:.*\blayers\.\d+$"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt")
BLOCK = 128  # columns that llm-compressor prunes at a time; a group must not straddle two blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="samples, see above")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--nm", default="2:4", help="pattern, N of M are kept [2:4]")
    args = parser.parse_args()
    match = re.fullmatch(r"(\d+):(\d+)", args.nm)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        parser.error("--nm must look like 2:4")
    if BLOCK % int(match[2]):
        parser.error(f"llm-compressor needs an M that divides {BLOCK}")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    with contextlib.redirect_stdout(sys.stderr):  # llm-compressor logs to stdout
        record = prune(args.model, args.tokens, args.out, int(match[1]), int(match[2]))
    print(json.dumps(record))


def prune(source: Path, tokens: Path, out: Path, n: int, m: int) -> dict[str, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    steps = Steps()
    with steps.step("import"):
        import datasets
        import safetensors.torch
        import torch
        import transformers
        from llmcompressor import oneshot
        from llmcompressor.modifiers.pruning import SparseGPTModifier
    with steps.step("load"):
        windows = safetensors.torch.load_file(tokens)["windows"]
        samples, length = windows.shape
        dataset = datasets.Dataset.from_dict(
            {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with steps.step("oneshot"):
        oneshot(
            model=model,
            processor=object(),  # else it wants a tokenizer, which it does not need for samples that are tokens
            dataset=dataset,
            recipe=SparseGPTModifier(
                sparsity=1 - n / m,  # has no effect beside a mask structure
                mask_structure=f"{m - n}:{m}",  # llm-compressor's N is the number of zeros
                targets=[DECODER_LAYERS],
                ignore=["re:.*lm_head"],
                block_size=BLOCK,
            ),
            pipeline="sequential",
            max_seq_length=length,
            num_calibration_samples=samples,
            shuffle_calibration_samples=False,
        )
    with steps.step("save"):
        model.save_pretrained(out, save_compressed=False)
        for pattern in TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copy(file, out)
    return {
        "nm": f"{n}:{m}",
        "samples": samples,
        "length": length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seconds": steps.seconds,
        "cpu_seconds": steps.cpu_seconds,
        "peak_mib": steps.peak_mib,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


class Steps:
    """What each step took, and the process's highest resident memory so far at its end, mapped files included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.peak_mib: dict[str, int] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)
        self.cpu_seconds[name] = round(time.process_time() - cpu_started, 2)
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        self.peak_mib[name] = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024


if __name__ == "__main__":
    main()

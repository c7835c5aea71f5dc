#!/usr/bin/env python3
"""Train a small Llama on the source code of Python's standard library, in about a minute on two cores.

    scripts/make_demo_checkpoint.py [OUT [--steps N] [--wider K]]

OUT receives `checkpoint/`, an ordinary Hugging Face checkpoint in several shards, `eval.txt`, text the model has not
seen, and `calibration.jsonl`, some of the text it has. Without OUT they go to the cache, where the next call finds
them. Prints the folder.
The text is on every machine that has Python, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import tokenizers
import torch
import transformers

PACKAGES = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing")
PACKAGES += ("unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo")
HELD_OUT_EVERY = 40  # one file of so many is kept for eval.txt
CALIBRATE_EVERY = 5  # one of so many of the others is put into calibration.jsonl

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"

# Every linear layer is a multiple of 64 both ways, so that every pattern up to 32:64 fits.
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
MAX_SHARD_BYTES = "3MB"  # small enough for several shards

STEPS = 130
WARM_UP_STEPS = 20
BATCH = 16
WINDOW = 128  # tokens
MATRIX_RATE, OTHER_RATE = 2e-2, 8e-3  # learning rates: of Muon, and of AdamW for embeddings and vectors
MOMENTUM = 0.95
WEIGHT_DECAY = 0.1  # of the matrices
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # see orthogonal()
NEWTON_SCHULZ_STEPS = 5
SEED = 0
THREADS = 2  # their number decides how sums are rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder to make; default: one in the cache")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training; {STEPS} take a minute")
    parser.add_argument("--wider", type=int, default=1, metavar="K", help="all widths K times as large")
    args = parser.parse_args()
    if (args.steps, args.wider) != (STEPS, 1) and args.out is None:
        parser.error("--steps and --wider need OUT: the cache holds the usual one")
    out = args.out or default_folder()
    if not is_made(out):
        if out.exists() and any(out.iterdir()):
            parser.error(f"{out} holds something else")
        make(out, args.steps, args.wider)
    print(out)


def is_made(out: Path) -> bool:
    return (out / "checkpoint").is_dir()


def default_folder() -> Path:
    """The folder in the cache, named after everything that decides its content."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("TSENOR_CACHE_DIR") or Path(base) / "tsenor")
    made_by = (
        Path(__file__).read_text(encoding="utf-8"),
        platform.python_version(),  # decides the text
        tokenizers.__version__,
        torch.__version__,
        transformers.__version__,
    )
    return cache / "demo" / hashlib.sha256("\0".join(made_by).encode()).hexdigest()[:16]


def make(out: Path, steps: int, wider: int) -> None:
    """Work in a temporary folder beside `out` and rename it last: an interrupted run leaves no `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    try:
        fill(partial, steps, wider)
        partial.chmod(0o755)  # mkdtemp's 0700 is meant for the time of writing
        try:
            partial.rename(out)
        except OSError:
            if not is_made(out):  # else another process was faster, with the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fill(folder: Path, steps: int, wider: int) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    training, held_out = texts()
    say(f"{sum(map(len, training)) / 1e6:.1f} MB of text to learn, {sum(map(len, held_out)) / 1e3:.0f} kB held out")
    tokenizer = train_tokenizer(training)
    model = train_model(token_stream(tokenizer, training), steps, wider)
    model.to(torch.bfloat16).save_pretrained(folder / "checkpoint", max_shard_size=MAX_SHARD_BYTES)
    tokenizer.save_pretrained(folder / "checkpoint")
    (folder / "eval.txt").write_text("\n".join(held_out), encoding="utf-8")
    seen = "".join(json.dumps({"text": text}) + "\n" for text in training[::CALIBRATE_EVERY])
    (folder / "calibration.jsonl").write_text(seen, encoding="utf-8")


def texts() -> tuple[list[str], list[str]]:
    """The library's sources in the order of their names, as (training, held out)."""
    root = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata holds this machine's compiler settings.
    files = {p for p in root.glob("*.py") if not p.name.startswith("_sysconfigdata")}
    for package in PACKAGES:
        files.update(p for p in (root / package).rglob("*.py") if "test" not in p.relative_to(root).parts)
    all_texts = [p.read_text(encoding="utf-8") for p in sorted(files)]
    training = [text for i, text in enumerate(all_texts) if i % HELD_OUT_EVERY]
    return training, all_texts[::HELD_OUT_EVERY]


def train_tokenizer(training: list[str]) -> transformers.PreTrainedTokenizerFast:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(training, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=MODEL["max_position_embeddings"],
    )


def token_stream(tokenizer: transformers.PreTrainedTokenizerFast, training: list[str]) -> torch.Tensor:
    encoded = tokenizer(training, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (tokenizer.eos_token_id, *ids)])


def train_model(stream: torch.Tensor, steps: int, wider: int) -> transformers.LlamaForCausalLM:
    """Muon for the matrices of the layers: in the same time AdamW alone gets to one and a half times the perplexity."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**MODEL | {name: MODEL[name] * wider for name in WIDTHS})
    )
    matrices = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    averages = [torch.zeros_like(matrix) for matrix in matrices]
    optimizers = [
        torch.optim.SGD(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(SEED)
    started = time.monotonic()
    for step in range(1, steps + 1):
        starts = torch.randint(len(stream) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([stream[start : start + WINDOW] for start in starts])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for matrix, average in zip(matrices, averages, strict=True):
            average.lerp_(matrix.grad, 1 - MOMENTUM)
            matrix.grad = orthogonal(matrix.grad.lerp(average, MOMENTUM)) * (0.2 * max(matrix.shape) ** 0.5)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % max(steps // 6, 1) == 0:
            say(f"step {step} of {steps}: loss {loss.item():.2f}, {time.monotonic() - started:.0f} s")
    return model


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U Vᵀ of a matrix U S Vᵀ, by Newton and Schulz (Jordan et al., Muon, https://kellerjordan.github.io/posts/muon).

    As torch.optim.Muon has it, but in float32: not every CPU has instructions for bfloat16.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found, (a, b, c) = wide / wide.norm(), NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = found @ found.T
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found if wide is matrix else found.T


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    return 0.55 + 0.45 * math.cos(math.pi * (step - WARM_UP_STEPS) / (steps - WARM_UP_STEPS))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

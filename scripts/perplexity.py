#!/usr/bin/env python3
"""Perplexity of checkpoints on a text: exp of the mean loss per predicted token.

    scripts/perplexity.py CHECKPOINT... --text FILE

The text is cut into windows that do not overlap; the model sees nothing of the window before, and the first
token of each window is not predicted. Prints one line per checkpoint. Comparable only between checkpoints
with the same tokenizer, and with the same window.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to predict")
    parser.add_argument("--window", type=int, default=256, help="tokens per window [256]")
    parser.add_argument("--max-tokens", type=int, default=65536, help="tokens of the text to use at most [65536]")
    parser.add_argument("--dtype", default="float32", help="data type to compute in [float32]")
    args = parser.parse_args()
    if args.window < 2:  # the first token of a window is only context
        parser.error("--window must be at least 2")
    logging.disable_progress_bar()
    text = args.text.read_text(encoding="utf-8")
    for checkpoint in args.checkpoints:
        windows = cut(checkpoint, text, args.window, args.max_tokens)
        if len(windows) == 0:
            parser.error(f"{args.text} is shorter than one window of {args.window} tokens")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, args.dtype)).eval()
        figure = math.exp(mean_loss(model, windows))
        print(f"{figure:.2f}  {windows.numel()} tokens in windows of {args.window}, {args.dtype}: {checkpoint}")


def cut(checkpoint: str, text: str, window: int, max_tokens: int) -> torch.Tensor:
    """The text's tokens as windows [count, window]; what does not fill the last window is left out."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0, :max_tokens]
    return tokens[: len(tokens) // window * window].view(-1, window)


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    total = 0.0
    for batch in windows.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


if __name__ == "__main__":
    main()

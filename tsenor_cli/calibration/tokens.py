"""From text to windows of tokens, all of the same length.

Documents are joined, with the tokenizer's end of text between them, and cut into windows that do not overlap: a short
document shares a window with others, and no text is waited for that is as long as a window.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from tsenor_cli.calibration.text import Piece, read_pieces
from tsenor_cli.errors import InputRefused, UsageError

OVERSAMPLING = 4  # windows are drawn from so many times as many, if the text has them
# Pieces that are tokenised in one call: at most the first, or some more of these. Tokenisers take 100 bytes a token.
_TOGETHER, _CHARACTERS = 64, 2**17


class Tokenizer(Protocol):
    """A checkpoint's tokenizer."""

    eos: int | None
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without special tokens."""
        ...


@dataclass(frozen=True)
class TextTokens:
    """Windows of tokens, and all that is needed to know them again."""

    windows: torch.Tensor  # int64 [samples, sequence length]
    source: str
    text_sha256: str  # of the pieces that tokens were taken from: see _token_runs
    tokenizer_sha256: str
    samples_wanted: int | None = None
    seed: int | None = None

    @property
    def tokens_sha256(self) -> str:
        """Of the shape, and the windows as little-endian int64."""
        shape = ",".join(map(str, self.windows.shape))
        return hashlib.sha256(shape.encode() + self.windows.numpy().astype("<i8").tobytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """For a report: everything but the tokens."""
        return {
            "source": self.source,
            "samples": self.windows.shape[0],
            "samples_wanted": self.samples_wanted,
            "sequence_length": self.windows.shape[1],
            "tokens": self.windows.numel(),
            "seed": self.seed,
            "text_sha256": self.text_sha256,
            "tokens_sha256": self.tokens_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
        }


def calibration_windows(
    source: str, tokenizer: Tokenizer, *, samples: int, length: int, seed: int = 0, field: str = "text"
) -> TextTokens:
    """Draw windows from the beginning of a text: `samples`, or all there are if there are fewer; never one twice.

    They stand in the order of the text. No more than `samples` of them are in memory.

    Args:
        source: see text.py.
        tokenizer: of the model.
        samples: windows, at most.
        length: tokens of each.
        seed: decides which windows; the same for every machine and version.
        field: see text.py.

    Raises:
        UsageError: a number that makes no sense, or a source that cannot be one.
        InputRefused: the text cannot be read, or is shorter than one window.
    """
    if samples < 1 or length < 1 or seed < 0:  # Python takes seed -1 for 1
        raise UsageError(
            f"{samples} windows of {length} tokens with seed {seed}", "give one or more of each, and a seed from 0"
        )
    digest = hashlib.sha256()
    windows = islice(_windows(source, tokenizer, length, field, digest), samples * OVERSAMPLING)
    chosen = _stacked(_drawn(windows, samples, seed))
    return TextTokens(chosen, source, digest.hexdigest(), tokenizer.fingerprint, samples, seed)


def all_windows(
    source: str, tokenizer: Tokenizer, *, length: int, limit: int | None = None, field: str = "text"
) -> TextTokens:
    """The windows of a text from its beginning on, `limit` at most; what does not fill the last one is left out.

    Raises:
        UsageError, InputRefused: as for calibration_windows.
    """
    if length < 1 or (limit is not None and limit < 1):
        raise UsageError(f"{limit} windows of {length} tokens", "give one or more of each")
    digest = hashlib.sha256()
    windows = _stacked(islice(_windows(source, tokenizer, length, field, digest), limit))
    return TextTokens(windows, source, digest.hexdigest(), tokenizer.fingerprint)


def _drawn(windows: Iterable[array[int]], samples: int, seed: int) -> list[array[int]]:
    """Reservoir sampling: every window is as likely as any other, however many come."""
    uniform = random.Random(seed).random  # noqa: S311  (nothing secret; Python promises that its numbers stay)
    kept: list[tuple[int, array[int]]] = []
    for index, window in enumerate(windows):
        if index < samples:
            kept.append((index, window))
        elif (place := int(uniform() * (index + 1))) < samples:
            kept[place] = (index, window)
    return [window for _, window in sorted(kept)]


def _stacked(windows: Iterable[array[int]]) -> torch.Tensor:
    return torch.stack([torch.frombuffer(window, dtype=torch.int64) for window in windows])


def _windows(source: str, tokenizer: Tokenizer, length: int, field: str, digest: hashlib._Hash) -> Iterator[array[int]]:
    """At least one window of `length` tokens; `digest` gets the text that they are from."""
    pending, found = array("q"), False
    for run in _token_runs(read_pieces(source, field), tokenizer, digest):
        pending.extend(run)
        whole = len(pending) - len(pending) % length
        for first in range(0, whole, length):
            found = True
            yield pending[first : first + length]
        del pending[:whole]
    if not found:
        raise InputRefused(
            f"{source} has {len(pending):,} tokens, and a window {length:,}",
            "give more text, or a smaller --sequence-length",
            code="too-few-tokens",
        )


def _token_runs(pieces: Iterator[Piece], tokenizer: Tokenizer, digest: hashlib._Hash) -> Iterator[list[int]]:
    """The tokens of each piece, and the end of text before a document that is not the first.

    The digest is that of the text's UTF-8 bytes, so for one document what sha256sum says of it; between documents
    stands the byte 0xFF, which UTF-8 never has. A piece counts when its tokens are asked for.
    """
    first = True
    for group in _groups(pieces):
        for piece, tokens in zip(group, tokenizer.encode([piece.text for piece in group]), strict=True):
            follows = piece.begins and not first
            digest.update(b"\xff" * follows + piece.text.encode())
            yield [tokenizer.eos, *tokens] if follows and tokenizer.eos is not None else tokens
            first = False


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """A few pieces at a time: tokenisers are quicker with several short ones."""
    group: list[Piece] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text)
        if len(group) == _TOGETHER or characters >= _CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group

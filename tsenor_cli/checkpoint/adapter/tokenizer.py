"""The checkpoint's own tokenizer: text to tokens, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.errors import InputRefused, UsageError

USUAL_LENGTH = 2048
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "vocab.txt",
)


class CheckpointTokenizer:
    """Attributes: `eos`, the token between documents, if there is one; `fingerprint`, the SHA-256 of its files.

    Raises:
        InputRefused: the checkpoint has no tokenizer that transformers can load.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except BaseException as error:  # whatever a foreign file breaks is its fault
            panic = type(error).__name__ == "PanicException"  # of tokenizers' Rust
            if not isinstance(error, Exception) and not panic:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputRefused(
                f"{directory} has no tokenizer that can be loaded ({reason})",
                "copy the tokenizer's files into the checkpoint",
                code="no-tokenizer",
            ) from error
        self.eos: int | None = self._tokenizer.eos_token_id
        digest = hashlib.sha256()
        for path in (directory / name for name in _FILES):
            if path.is_file():
                digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        self.fingerprint = digest.hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without special tokens."""
        found: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found


class CommonTokenizer:
    """That of several checkpoints, as long as all give the same tokens: their files may differ in what does not matter.

    Attributes: those of CheckpointTokenizer, of the first.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        found = [CheckpointTokenizer(directory) for directory in directories]
        self.eos, self.fingerprint = found[0].eos, found[0].fingerprint
        self._different = list({tokenizer.fingerprint: tokenizer for tokenizer in found}.values())
        if any(tokenizer.eos != self.eos for tokenizer in self._different):
            raise _incomparable()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """As CheckpointTokenizer.

        Raises:
            UsageError: they differ on this text.
        """
        first, *others = (tokenizer.encode(texts) for tokenizer in self._different)
        if any(other != first for other in others):
            raise _incomparable()
        return first


def _incomparable() -> UsageError:
    return UsageError("the tokenizers of these models differ: perplexities cannot be compared", "give one model")


def window_length(checkpoint: Checkpoint, wanted: int | None) -> int:
    """Tokens of a window: what is wanted, or as many as the model can take, 2048 at most.

    Raises:
        UsageError: the model cannot take what is wanted.
    """
    config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, local_files_only=True)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not (longest is None or (isinstance(longest, int) and longest >= 2)):
        raise InputRefused(
            f"the config has max_position_embeddings {longest!r}", "give it a whole number from 2", code="bad-config"
        )
    if wanted is None:
        return min(USUAL_LENGTH, longest or USUAL_LENGTH)
    if wanted < 2 or (longest is not None and wanted > longest):
        raise UsageError(f"--sequence-length {wanted}", f"the model takes 2 to {longest or 'any number of'} tokens")
    return wanted

"""The hidden states between two decoder layers, in memory or in a file that vanishes with the process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


class Activations:
    """One tensor for each batch of tokens; a new value takes the place of the old one.

    Args:
        spill_to: a directory with room for all of them; None keeps them in memory.
    """

    def __init__(self, spill_to: Path | None = None) -> None:
        self._held: list[torch.Tensor] = []  # on the meta device where the values are in the file
        self._starts: list[int] = []
        self._end = 0
        # Without a name from the start (on Windows it goes with its handle): nothing is left behind, whatever happens.
        self._file = None if spill_to is None else tempfile.TemporaryFile(dir=spill_to, buffering=0)  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._held)

    def append(self, states: torch.Tensor) -> None:
        """Add the next batch."""
        self._starts.append(self._end)
        self._held.append(states.new_empty(0))
        self[len(self) - 1] = states

    def __getitem__(self, batch: int) -> torch.Tensor:
        held = self._held[batch]
        if self._file is None:
            return held
        states = torch.empty(held.shape, dtype=held.dtype)
        self._transfer(states, batch, self._file.readinto)
        return states

    def __setitem__(self, batch: int, states: torch.Tensor) -> None:
        if self._file is None:
            self._held[batch] = states
            return
        if states.nbytes > self._held[batch].nbytes:  # of no batch yet; or wider than before, as the states of Mamba
            self._starts[batch], self._end = self._end, self._end + states.nbytes
        self._held[batch] = states.to("meta")
        self._transfer(states.contiguous(), batch, self._file.write)

    def close(self) -> None:
        """Give back what they take on disk; nothing can be read any more."""
        if self._file is not None:
            self._file.close()

    def _transfer(self, states: torch.Tensor, batch: int, move: Callable[[memoryview], int]) -> None:
        """Move all bytes of `states` to or from the file; one call may move fewer."""
        assert self._file is not None
        self._file.seek(self._starts[batch])
        left = states.view(-1).view(torch.uint8).numpy().data
        while left:
            left = left[move(left) :]

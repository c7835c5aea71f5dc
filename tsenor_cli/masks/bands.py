"""A tensor of scores in pieces that a kernel takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def cut(scores: torch.Tensor, m: int, elements: int) -> Iterator[torch.Tensor]:
    """Cut scores [.., out, in] into contiguous bands [rows, in] of whole tile rows, in order, of some `elements`.

    A band is a view where it can be: a contiguous tensor is never copied.
    """
    if scores.numel() == 0:
        return
    out_features, in_features = scores.shape[-2:]
    # The batch axes are flattened, which copies only where strides allow no view.
    matrices = scores.reshape(-1, out_features, in_features)
    if matrices.is_contiguous():  # the tiles of a batch of contiguous matrices lie like those of one
        matrices = matrices.view(1, -1, in_features)
    _, height, _ = matrices.shape
    tiles_high = max(1, elements // (m * in_features))
    whole = max(1, elements // (height * in_features))  # small matrices share a band
    for first in range(0, len(matrices), whole):
        for row in range(0, height, rows := min(height, tiles_high * m)):
            yield matrices[first : first + whole, row : row + rows].reshape(-1, in_features).contiguous()

"""Tiles are cut row by row of tiles, and put back where they were."""

import pytest
import torch

from tsenor_cli.masks.blocks import from_blocks, to_blocks


def test_order_of_tiles():
    matrix = torch.arange(24).view(4, 6)
    blocks = to_blocks(matrix, 2)
    assert blocks.shape == (6, 2, 2)
    for index, block in enumerate(blocks):
        row, column = 2 * (index // 3), 2 * (index % 3)
        assert torch.equal(block, matrix[row : row + 2, column : column + 2])


@pytest.mark.parametrize("shape", [(8, 12), (3, 8, 4), (2, 3, 4, 8), (0, 4)])
def test_there_and_back(shape):
    matrix = torch.rand(shape)
    assert torch.equal(from_blocks(to_blocks(matrix, 4), shape), matrix)
    assert torch.equal(from_blocks(to_blocks(matrix.transpose(-1, -2), 4), matrix.mT.shape), matrix.mT)

"""A symmetric matrix, read from its upper triangle alone."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import make_inputs, stats_of, symmetric

from tsenor_cli.pruners.gram import columns, columns_of, is_finite, mean_square


@pytest.mark.parametrize(("features", "width"), [(1, 512), (12, 4), (13, 4), (12, 12), (12, 100), (600, 512)])
def test_columns_are_those_of_the_whole(features, width):
    stats = stats_of(make_inputs(20, features))
    whole, seen = symmetric(stats.gram), 0
    for here, above, corner in columns(stats.gram, width):
        assert here.start == seen
        assert torch.equal(torch.cat([above, corner]), whole[: here.stop, here])
        assert above.numel() == 0 or above.untyped_storage().data_ptr() == stats.gram.untyped_storage().data_ptr()
        seen = here.stop
    assert seen == features


def test_some_columns():
    stats = stats_of(make_inputs(20, 12))
    here, above, corner = columns_of(stats.gram, slice(5, 9))
    assert here == slice(5, 9)
    assert torch.equal(torch.cat([above, corner]), symmetric(stats.gram)[:9, 5:9])


def test_the_unit():
    assert mean_square(torch.tensor([[2.0, 7.0], [0.0, 4.0]])) == 3.0
    assert mean_square(torch.zeros(2, 2)) == 1.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 599), (598, 599), (599, 599)])
def test_what_is_not_finite_is_found(row, column, bad):
    gram = torch.zeros(600, 600, dtype=torch.float64)
    gram[column, row] = bad
    assert is_finite(gram) == (row < column)
    gram[row, column] = bad
    assert not is_finite(gram)

"""A selection network puts the n-th and (n+1)-th largest in their places, in any order, whatever the input.

By the 0-1 principle (Knuth, vol. 3, 5.3.4) a network that handles all inputs of zeros and ones handles all inputs.
That is exhaustive up to m = 12; beyond it, thresholded permutations are drawn. Places that nobody will read are NaN.
"""

import itertools

import numpy as np
import pytest

from tsenor_cli.kernels.network import selection_network, sorting_network


def run(network, columns):
    places = [column.astype(float) for column in columns.T]
    for high, low, want_high, want_low in network:
        a, b = places[high], places[low]
        assert not np.isnan(a).any()
        assert not np.isnan(b).any()
        unread = np.full_like(a, np.nan)
        places[high] = np.maximum(a, b) if want_high else unread
        places[low] = np.minimum(a, b) if want_low else unread
    return places


@pytest.mark.parametrize("m", range(2, 13))
def test_every_input_of_zeros_and_ones(m):
    inputs = np.array(list(itertools.product((0, 1), repeat=m)))
    descending = -np.sort(-inputs, axis=1)
    assert np.array_equal(np.array(run(sorting_network(m), inputs)).T, descending)
    for n in range(1, m):
        places = run(selection_network(m, n), inputs)
        assert np.array_equal(np.maximum(places[n - 1], places[n]), descending[:, n - 1])
        assert np.array_equal(np.minimum(places[n - 1], places[n]), descending[:, n])


@pytest.mark.parametrize("m", range(13, 65))
def test_random_inputs(m):
    rng = np.random.default_rng(m)
    inputs = rng.random((64, m))
    thresholds = np.sort(inputs, axis=1)[:, rng.integers(m, size=64)].diagonal()[:, None]
    inputs = np.concatenate([inputs, inputs >= thresholds, rng.integers(0, 3, (64, m))])
    descending = -np.sort(-inputs, axis=1)
    for n in {1, m // 4 or 1, m // 2, m - 1}:
        places = run(selection_network(m, n), inputs)
        assert np.array_equal(np.maximum(places[n - 1], places[n]), descending[:, n - 1])
        assert np.array_equal(np.minimum(places[n - 1], places[n]), descending[:, n])


def test_selection_is_cheaper_than_sorting():
    for m, n in [(16, 8), (32, 16), (64, 32)]:
        wanted = sum(c.want_high + c.want_low for c in selection_network(m, n))
        assert wanted < 0.8 * 2 * len(sorting_network(m))


def test_one_half_comes_before_the_other():
    """What the order is for: at no time are more than 3/4 of the places in use before they have been compared."""
    for m in (32, 64):
        network = selection_network(m, m // 2)
        seen_high = next(k for k, comparator in enumerate(network) if comparator.high >= m // 2)
        assert all(comparator.low < m // 2 for comparator in network[:seen_high])
        assert seen_high > m

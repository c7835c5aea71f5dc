"""Output errors against the outputs themselves."""

from __future__ import annotations

import pytest
import torch
from pruners.examples import make_inputs, make_weight, stats_of

from tsenor_cli.kernels import bfloat16
from tsenor_cli.pruners.base import Calibrated
from tsenor_cli.pruners.error import assess, output_energies
from tsenor_cli.pruners.factor import Damping


@pytest.mark.parametrize(("out", "features"), [(3, 5), (7, 512), (5, 700), (2, 1030)])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("unit", [None, "avx512", "amx"])
def test_energies_are_those_of_the_outputs(out, features, dtype, relative, unit, monkeypatch):
    """Of bfloat16 weights with the processor's own instructions, as far as it has them, and without."""
    if unit is not None and not bfloat16.has(unit):
        pytest.skip("this processor does not have the instruction")
    monkeypatch.setattr(bfloat16, "unit", lambda: unit)
    inputs = make_inputs(40, features)
    weights = [make_weight(out, features, dtype, seed=seed) for seed in range(2)]
    expected = [float((inputs @ weight.double().T).square().sum()) for weight in weights]
    assert output_energies(weights, stats_of(inputs).gram) == pytest.approx(expected, rel=relative)


@pytest.mark.parametrize("scale", [1e-20, 1e17, 1e100])
def test_inputs_of_any_unit(scale):
    """Squares of them would be nothing, or too much, for float32."""
    inputs, weight = make_inputs(40, 512) * scale, make_weight(7, 512) * 1000
    expected = float((inputs @ weight.double().T).square().sum())
    assert output_energies([weight], stats_of(inputs).gram) == pytest.approx([expected], rel=1e-5)


def test_an_energy_beyond_all_bounds_is_no_error_of_zero():
    assert Calibrated(5, float("nan"), 1.0, 1.0).error is None
    assert Calibrated(5, float("inf"), float("inf"), 1.0).mask_error is None


def test_losses_are_those_of_the_outputs():
    weight, inputs = make_weight(6, 8, torch.bfloat16), make_inputs(40, 8)
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    pruned = (torch.where(mask, weight, 0.0) * 1.5).to(torch.bfloat16)
    seen = assess(weight, mask, pruned, stats_of(inputs), Damping(0.1, 2))

    def expected(other):
        return float((inputs @ (weight.double() - other.double()).T).square().sum())

    assert seen.output_energy == pytest.approx(expected(torch.zeros(6, 8)), rel=1e-5)
    assert seen.mask_loss == pytest.approx(expected(torch.where(mask, weight, 0.0)), rel=1e-5)
    assert seen.loss == pytest.approx(expected(pruned), rel=1e-5)
    assert (seen.tokens, seen.damping, seen.damping_retries) == (40, 0.1, 2)


def test_nothing_changed_is_no_error_at_all():
    weight, stats = make_weight(6, 8), stats_of(make_inputs(40, 8))
    seen = assess(weight, torch.ones(6, 8, dtype=torch.bool), weight, stats, Damping(0.01, 0))
    assert (seen.mask_error, seen.error) == (0.0, 0.0)

"""What a dry run foretells: sums done by hand, rates that are measured, and no figure of a card that nobody has."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from test_distribution import plan_of

from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.forecast import PLANNED, Rates, forecast
from tsenor_cli.pipeline import plan_prune, predict
from tsenor_cli.specs import GPU_TYPES, CalibrationSpec, Choice, Cluster, NMPattern, PruneSpec

SCRIPT = Path(__file__).parent.parent / "scripts" / "simulate_scale.py"


def planned(sizes, pattern=NMPattern(2, 4)):  # noqa: B008  (frozen)
    plan = plan_of(sizes)
    return replace(plan, tensors=tuple(replace(item, choice=Choice(pattern, "magnitude")) for item in plan.tensors))


def rates(**given):
    known = {"solve": {(4, True): 50.0, (8, True): 10.0}, "matmul": 1.0, "layers": 1.0, "gram": 1.0}
    known |= {"read": 1000.0, "write": 500.0, "hash": 2000.0}
    return Rates("by hand", **(known | given))


def test_where_everything_overlaps_the_slowest_decides():
    """Two pruned tensors of 1000 bytes, 500 weights each, and one that is kept: 20 s of masks, 6 of writing."""
    found = forecast(planned([[1000, 1000, 1000]]), rates())
    assert {name: seconds for name, seconds in found.stages.items() if name != "starting"} == pytest.approx(
        {"reading": 3.0, "masks": 20.0, "hashing": 1.5, "writing": 6.0}
    )
    assert found.seconds == pytest.approx(found.stages["starting"] + 20.0)
    assert (found.read_bytes, found.written_bytes, found.network_bytes) == (3000, 3000, 0)


def test_where_cores_are_few_they_are_shared(monkeypatch):
    monkeypatch.setattr("tsenor_cli.forecast._COPIED", 1000.0)
    found = forecast(planned([[1000, 1000, 1000]]), rates(cores=2))
    assert found.seconds - found.stages["starting"] == pytest.approx((2 * 20 + 1.5 + 3 + 3) / 2 / 0.9)
    alone = forecast(planned([[1000, 1000, 1000]]), rates(cores=8, solve={(4, True): 1e9}))
    assert alone.seconds - alone.stages["starting"] == pytest.approx(3.0 + 6.0), "the disk, which is one"


def test_the_slowest_process_of_several():
    plan = planned([[1000, 1000, 1000], [1000, 1000, 1000]])
    one, two, far = (forecast(plan, rates(), nodes) for nodes in ([[0]], [[0, 1]], [[0], [1]]))
    assert one.stages["masks"] == pytest.approx(2 * two.stages["masks"]) == pytest.approx(2 * far.stages["masks"])
    assert two.stages["writing"] == pytest.approx(one.stages["writing"]), "they share a disk"
    assert far.stages["writing"] == pytest.approx(one.stages["writing"] / 2)
    assert (two.balance, two.processes, two.machines, far.machines) == (1.0, 2, 1, 2)


@pytest.mark.parametrize(("m", "rate"), [(2, 50.0), (4, 50.0), (8, 10.0), (16, 10.0)])
def test_a_pattern_that_is_not_known_is_taken_for_a_larger_one(m, rate):
    assert rates().seconds_to_solve(NMPattern(1, m), 100) == pytest.approx(100 / rate)


def test_every_card_that_can_be_named_has_rates_and_says_that_they_are_predicted():
    assert tuple(PLANNED) == GPU_TYPES
    assert all("predicted" in found.where and not found.measured for found in PLANNED.values())


def test_this_machine_is_measured_and_nothing_stays(llama, tmp_path):
    spec = PruneSpec(str(llama), tmp_path / "deep" / "out", NMPattern(2, 4))
    before = set(tmp_path.rglob("*"))
    found = predict(spec, plan_prune(spec))
    assert found.rates.measured
    assert found.rates.cores >= 1
    assert all(1e5 < rate < 1e13 for rate in (*found.rates.solve.values(), found.rates.write, found.rates.hash))
    assert set(tmp_path.rglob("*")) == before


def test_reading_is_tried_all_over_the_files_and_no_byte_twice(llama, tmp_path, monkeypatch):
    read = []

    def read_bytes(tensor, first, last):
        read.append((tensor.name, first, last))
        return bytes(last - first)

    monkeypatch.setattr(DiskTensor, "read_bytes", read_bytes)
    spec = PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4))
    plan = plan_prune(spec)
    predict(spec, plan)
    assert sorted(read) == sorted((item.tensor.name, 0, item.tensor.nbytes) for item in plan.tensors)
    assert [name for name, *_ in read] != [item.tensor.name for item in plan.tensors]


def test_where_nothing_can_be_written_writing_is_taken_to_be_reading(llama, tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    spec = PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4))
    found = predict(spec, plan_prune(spec)).rates
    assert found.write == found.read
    assert "as fast as reading (No space left on device)" in found.where


def test_calibrated_methods_take_longer_the_more_they_see(llama, tmp_path):
    def seconds(method, samples):
        calibration = CalibrationSpec("unread.txt", samples=samples, sequence_length=32)
        spec = PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4), method=method, calibration=calibration)
        found = predict(spec, plan_prune(spec), Cluster(2, "h200"))
        assert found.network_bytes > 0
        return found.seconds

    assert seconds("sparsegpt", 1000) > seconds("sparsegpt", 10)
    assert seconds("alps", 10) > seconds("sparsegpt", 10)


def test_products_are_counted_at_the_rate_of_their_kind(llama, tmp_path):
    spec = PruneSpec(
        str(llama), tmp_path / "out", NMPattern(2, 4), method="sparsegpt", calibration=CalibrationSpec("-")
    )
    plan = plan_prune(spec)
    stages = [forecast(plan, rates(**given), tokens=100).stages for given in ({}, {"layers": 2.0}, {"gram": 4.0})]
    weights = sum(item.tensor.parameters for item in plan.pruned if item.layer is not None)
    assert stages[0]["layers"] == pytest.approx(1.4 * 2 * 2 * 100 * weights)
    assert stages[1]["layers"] == stages[0]["layers"] / 2
    assert stages[1]["Gram matrices"] == stages[0]["Gram matrices"] == 4 * stages[2]["Gram matrices"]


def test_the_command(tsenor, llama):
    done = tsenor("prune", llama, "--nm", "2:4", "--dry-run", "--json")
    facts = json.loads(done.out)["forecast"]
    assert facts["seconds"] > 0
    assert "measured on this machine" in facts["rates"]
    done = tsenor("prune", llama, "--nm", "2:4", "--dry-run", "--plan", "gpus=8,type=h200,nodes=2")
    assert "16 processes on 2 machines" in done.out.splitlines()[-1]
    assert "predicted for an H200" in done.out.splitlines()[-1]


@pytest.mark.parametrize(
    "text", ["", "gpus=8", "type=h300", "gpus=0,type=h200", "gpus=8,type=h200,disk=1", "gpus,type"]
)
def test_clusters_that_are_none(tsenor, llama, text):
    done = tsenor("prune", llama, "--nm", "2:4", "--dry-run", f"--plan={text}")
    assert done.code == 2
    assert "gpus=8,type=h200,nodes=2" in done.err


def test_a_plan_is_for_a_dry_run(tsenor, llama):
    done = tsenor("prune", llama, "--nm", "2:4", "--plan", "gpus=8,type=h200")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--dry-run" in done.err


@pytest.mark.slow
def test_a_mixture_of_experts_is_shared_out_evenly():
    """The headers of 671B parameters, planned as they are."""
    command = [sys.executable, str(SCRIPT), "--only", "8b,671b", "--ranks", "8"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for model in ("8b", "671b"):
        (row,) = [line.split() for line in out.splitlines() if line.split()[0] == model]
        assert float(row[5].rstrip("%")) >= 95.0, row

"""--log-format json: one event a line, from the first to the error; and what people see instead."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.errors import UsageError


def events(outcome):
    return [json.loads(line) for line in outcome.err.splitlines()]


def test_a_run_in_events(tsenor, llama):
    outcome = tsenor("prune", llama, "--nm", "2:4", "-o", "x", "--log-format", "json")
    assert (outcome.code, outcome.out) == (0, "x\n")
    found = events(outcome)
    names = [event["event"] for event in found]
    assert names[0] == "planned"
    assert names[-1] == "finished"
    assert names.count("pruned") == 14
    assert found[0]["to_prune"] == 14
    (last,) = [event for event in found if event["event"] == "pruned"][-1:]
    tensors = list(open_checkpoint(llama).tensors.values())
    behind = tensors[[tensor.name for tensor in tensors].index(last["tensor"]) + 1 :]
    assert last["total_bytes"] - last["done_bytes"] == sum(tensor.nbytes for tensor in behind)
    assert last["memory_bytes"] > 0
    assert 0.5 < last["kept_energy"] <= 1
    assert all(event["time"].endswith("+00:00") for event in found)


def test_quiet_leaves_the_end(tsenor, llama):
    outcome = tsenor("prune", llama, "--nm", "2:4", "-o", "x", "-q", "--log-format=json")
    assert [event["event"] for event in events(outcome)] == ["finished"]


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (("prune", "nowhere", "--nm", "2:4"), 3, "no-checkpoint"),
        (("prune", "nowhere", "--nm", "9:4"), 2, "bad-pattern"),
        (("prune", "nowhere", "--nm", "2:4", "--no-such-option"), 2, UsageError.code),
        (("verify", "nowhere"), 3, "no-checkpoint"),
    ],
)
def test_errors_are_events_whenever_they_come(tsenor, arguments, code, name):
    for given in (["--log-format", "json"], ["--log-format=json"]):
        outcome = tsenor(*arguments, *given)
        (event,) = events(outcome)
        assert outcome.code == code
        assert (event["event"], event["code"], event["exit_code"]) == ("error", name, code)
    outcome = tsenor(*arguments)
    assert outcome.err.startswith("tsenor: error: ")
    assert outcome.err.endswith(f" [{name}]\n")


def test_notes_are_events(tsenor, llama):
    outcome = tsenor("prune", llama, "--nm", "2:4", "-o", "x", "--ignore", "*.up_proj", "--log-format", "json")
    assert "skipped, ignored" in next(event["message"] for event in events(outcome) if event["event"] == "note")


def test_a_condition_is_refused_before_anything_is_done(tsenor, llama, tmp_path):
    for condition, word in (("perplexity>9", "--eval"), ("beauty>9", "not a condition")):
        outcome = tsenor("prune", llama, "--nm", "2:4", "--fail-if", condition)
        assert outcome.code == 2
        assert word in outcome.err
    assert not any((tmp_path / "work").iterdir())


def test_a_condition_that_holds_fails_the_finished_run(tsenor, llama):
    outcome = tsenor(
        "prune", llama, "--nm", "2:4", "-o", "x", "-q", "--fail-if", "coverage<0.5", "--fail-if", "kept_energy<=1"
    )
    assert (outcome.code, outcome.out) == (4, "x\n")
    assert outcome.err.endswith("failing on kept_energy<=1 [fail-if]\n")
    assert tsenor("verify", "x").code == 0


def test_the_version_says_what_matters(tsenor):
    first, others, *more = tsenor("--version").out.splitlines()
    assert first.startswith("tsenor 0.")
    assert all(f"{name} " in others for name in ("python", "torch", "transformers", "safetensors", "numba"))
    assert more == []


@pytest.mark.slow
def test_colours_only_where_they_are_wanted(llama):
    def shown(**environment):
        arguments = [sys.executable, "-m", "tsenor_cli", "inspect", str(llama)]
        return subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout

    assert "\x1b" not in shown()
    assert "\x1b[1m" in shown(FORCE_COLOR="1")
    assert "\x1b" not in shown(TERM="dumb")

"""Calibrated pruning and evaluation from the command line, as people and scripts use them."""

from __future__ import annotations

import io
import json
import sys
import types

import pytest
import torch
from checkpoints import add_tokenizer, make_checkpoint

from tsenor_cli.device import CPU, computed_in

TEXT = "the quick brown fox jumps over the lazy dog, and again; " * 60
SHORT = ("--samples", 8, "--sequence-length", 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return add_tokenizer(make_checkpoint("llama", tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "a.txt"


def one_line(outcome, code, *parts):
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert all(part in outcome.err for part in parts), outcome.err


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_prune_and_verify(tsenor, model, text, method):
    done = tsenor("prune", model, "--nm", "2:4", "--method", method, "--calibration", text, *SHORT, "--eval", text)
    assert (done.code, done.out) == (0, "llama-2of4-transposable\n"), done.err
    assert "perplexity" in done.err
    assert "→" in done.err
    assert ("output error" in done.err) is (method != "wanda")
    assert tsenor("verify", "llama-2of4-transposable", "--against", model).code == 0
    assert "perplexity before → after" in open("llama-2of4-transposable/README.md").read()  # noqa: PTH123, SIM115


def test_standard_input_and_json(tsenor, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(TEXT.encode()), closed=False))
    arguments = ("--nm", "2:4", "--standard", "--method", "wanda", "--calibration", "-", *SHORT, "--json", "-q")
    done = tsenor("prune", model, *arguments)
    report = json.loads(done.out)
    assert report["calibration"]["source"] == "-"
    assert report["calibration"]["samples"] == 8
    assert report["output"] == "llama-2of4-standard"
    assert done.err == ""


def test_a_recipe_and_what_overrides_it(tsenor, model, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n- {match: '*.mlp.*', nm: 2:4, method: wanda}\n- {match: '*.q_proj', nm: 8:16}\n")
    arguments = ("prune", model, "--recipe", recipe, "--calibration", text, *SHORT, "--json")
    report = json.loads(tsenor(*arguments).out)
    assert report["output"] == "llama-sparse"
    assert report["pattern"] is None
    found = {(r["pattern"], r["transposable"], r["method"]) for r in report["tensors"] if r["action"] == "pruned"}
    assert found == {("2:4", True, "wanda"), ("8:16", True, "magnitude")}
    done = tsenor("verify", "llama-sparse", "--against", model)
    assert "2:4, 8:16 transposable, exactly N nonzeros" in done.out
    report = json.loads(tsenor(*arguments, "--standard", "--nm", "1:4", "-o", "x").out)
    found = {(r["pattern"], r["transposable"]) for r in report["tensors"] if r["action"] == "pruned"}
    assert found == {("1:4", False)}
    assert report["pattern"] == {"n": 1, "m": 4, "transposable": False}  # a given pattern is one for all


def test_the_plan_says_what_and_how_much(tsenor, model, text):
    arguments = ("prune", model, "--nm", "2:4", "--method", "alps", "--calibration", text, "--dry-run")
    plan = json.loads(tsenor(*arguments, "--json").out)
    assert plan["expected_peak_memory_bytes"] == sum(plan["memory"].values())
    assert "hidden states" in plan["memory"]
    assert {t["method"] for t in plan["tensors"] if t["action"] == "prune"} == {"alps"}
    assert "2:4 transposable, alps" in tsenor(*arguments).out
    tight = plan["expected_peak_memory_bytes"] - 1
    spilled = json.loads(tsenor(*arguments, "--json", "--memory-budget", f"{tight}B").out)
    assert spilled["memory"]["hidden states"] == 0


def test_eval(tsenor, model, text):
    done = tsenor("eval", model, "--text", text, "--sequence-length", 32, "--baseline", model)
    first, second, ratio = done.out.splitlines()
    assert done.code == 0
    assert first == second
    assert ratio == "ratio 1.0000"
    assert "tokens in windows of 32, tokenizer " in first
    assert first.endswith(str(computed_in(torch.bfloat16, CPU)).removeprefix("torch."))
    found = json.loads(tsenor("eval", model, "--text", text, "--sequence-length", 32, "--json").out)
    assert f"{found['perplexity']:.4f}" == first.split()[0]
    assert found["tokens"] == found["samples"] * 32
    budget = tsenor("eval", model, "--text", text, "--sequence-length", 32, "--memory-budget", "1M", "--max-windows", 3)
    assert " 96 tokens " in budget.out


def test_mistakes(tsenor, model, text, tmp_path):
    prune = ("prune", model, "--nm", "2:4", "--method", "sparsegpt")
    one_line(tsenor(*prune), 2, "--calibration FILE")
    one_line(tsenor(*prune, "--calibration", tmp_path / "none.txt"), 3, "none.txt", "No such file")
    one_line(tsenor(*prune, "--calibration", text, "--sequence-length", 4096), 2, "2 to 64 tokens")
    one_line(tsenor(*prune, "--calibration", "text.csv"), 2, "no text that can be read")
    one_line(tsenor(*prune, "--calibration", "hf:a/b"), 2, "pip install 'tsenor[datasets]'")
    one_line(tsenor(*prune, "--calibration", text, "--memory-budget", "1M"), 2, "too small", "needed")
    one_line(tsenor(*prune, "--calibration", text, "--memory-budget", "lots"), 2, "is not a size")
    one_line(tsenor(*prune, "--calibration", "-", "--eval", "-"), 2, "standard input")
    one_line(tsenor("prune", model), 2, "Missing option '--nm'")
    one_line(tsenor("prune", model, "--nm", "2:4", "--calibration", text), 2, "no method needs it")
    one_line(tsenor("prune", model, "--nm", "2:4", "--no-update"), 2, "no method changes weights")
    one_line(tsenor("prune", model, "--recipe", tmp_path / "none.yaml"), 2, "No such file")
    one_line(tsenor("eval", model, "--text", tmp_path / "none.txt"), 3, "No such file")
    one_line(tsenor("eval", model), 2, "needs the package datasets")
    assert not list((tmp_path / "work").iterdir())

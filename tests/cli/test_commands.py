"""The command line as people, CI jobs and pipes meet it: streams, exit codes, one line per mistake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, read_shards
from safetensors.torch import save_file

from tsenor_cli import job
from tsenor_cli.cli.signals import Stopped, signals_raise
from tsenor_cli.streaming import Streaming

TSENOR = [sys.executable, "-m", "tsenor_cli"]


def fails(outcome, code, *words):
    """One line on stderr with these words, nothing on stdout, the documented code."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("tsenor: error: ")
    assert all(word in outcome.err for word in words), outcome.err


def untouched(directory):
    """The work directory is empty: nothing was written, not even for a moment kept."""
    return not any(directory.iterdir())


# --- what works -------------------------------------------------------------------------------------------------------


def test_prune_as_typed(tsenor, llama, tmp_path):
    outcome = tsenor("prune", llama, "--nm", "2:4")
    assert (outcome.code, outcome.out) == (0, "llama-2of4-transposable\n")
    assert "coverage" in outcome.err
    assert (tmp_path / "work" / "llama-2of4-transposable" / "tsenor-report.json").is_file()


def test_quiet_says_nothing_but_the_output(tsenor, llama):
    outcome = tsenor("prune", llama, "--nm", "2:4", "--standard", "-q", "-o", "x")
    assert (outcome.code, outcome.out, outcome.err) == (0, "x\n", "")


def test_verbose_names_every_tensor(tsenor, llama):
    assert "model.layers.1.mlp.up_proj.weight" in tsenor("prune", llama, "--nm", "2:4", "-v").err


def test_json_is_one_object(tsenor, llama, tmp_path):
    outcome = tsenor("prune", llama, "--nm", "8:16", "--json", "-o", "x")
    result = json.loads(outcome.out)
    assert result.pop("output") == "x"
    assert result == json.loads((tmp_path / "work" / "x" / "tsenor-report.json").read_text())
    assert json.loads(tsenor("verify", "x", "--json").out)["ok"] is True


def test_what_a_library_prints_does_not_reach_stdout(tsenor, llama, monkeypatch):
    real = job.make_plan
    monkeypatch.setattr(job, "make_plan", lambda *arguments: sys.stdout.write("noise\n") and real(*arguments))
    outcome = tsenor("prune", llama, "--nm", "2:4", "-q", "-o", "x")
    assert (outcome.out, outcome.err) == ("x\n", "noise\n")


def test_dry_run_shows_the_plan_and_writes_nothing(tsenor, llama, tmp_path):
    outcome = tsenor("prune", llama, "--nm", "2:4", "--dry-run")
    assert outcome.code == 0
    assert "keep: embedding" in outcome.out
    plan = json.loads(tsenor("prune", llama, "--nm", "2:4", "--dry-run", "--json").out)
    assert plan["coverage"] == 1.0
    assert plan["expected_peak_memory_bytes"] > 0
    assert {t["action"] for t in plan["tensors"]} == {"prune", "keep"}
    assert untouched(tmp_path / "work")


def test_inspect(tsenor, llama):
    assert "14 of 22 tensors are prunable" in tsenor("inspect", llama).out
    found = {t["name"]: t for t in json.loads(tsenor("inspect", llama, "--json").out)["tensors"]}
    assert found["lm_head.weight"]["reason"] == "head"
    up = found["model.layers.0.mlp.up_proj.weight"]
    assert (up["layout"], up["kernels"]) == ("out_in", ["CUTLASS", "cuSPARSELt"])
    assert up["transposable_m"] == [2, 4, 8, 16, 32]
    assert up["standard_m"] == [2, 4, 8, 16, 32, 64]


def test_verify_says_what_holds(tsenor, llama):
    tsenor("prune", llama, "--nm", "2:4", "-o", "x")
    outcome = tsenor("verify", "x", "--against", llama)
    assert outcome.code == 0
    assert "14 tensors are 2:4 transposable, exactly 2" in outcome.out


def test_overwrite_replaces_the_old_output(tsenor, llama):
    assert tsenor("prune", llama, "--nm", "2:4", "-o", "x", "-q").code == 0
    assert tsenor("prune", llama, "--nm", "1:4", "-o", "x", "-q", "--overwrite").code == 0
    assert "1:4" in tsenor("verify", "x").out


@pytest.mark.slow
def test_pipes(llama, tmp_path):
    """Real shells: the result and nothing else travels through a pipe, progress or not."""

    def shell(command):
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
        )

    tsenor = " ".join(TSENOR)
    report = shell(f"{tsenor} prune {llama} --nm 2:4 --json -o a | {sys.executable} -m json.tool").stdout
    assert json.loads(report)["summary"]["coverage"] == 1.0
    assert "exactly 2" in shell(f"{tsenor} prune {llama} --nm 2:4 -q -o b | xargs {tsenor} verify").stdout
    quiet = shell(f"{tsenor} inspect {llama} --json | head -c 1; sleep 0.1")
    assert (quiet.stdout, quiet.stderr) == ("{", "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere paths are text")
@pytest.mark.slow
def test_paths_that_are_no_text(llama, tmp_path):
    """Written to reports with escapes, and to stdout as they are on disk."""
    model = llama.rename(tmp_path / os.fsdecode(b"mod\xff"))
    output = tmp_path / os.fsdecode(b"out\xfe")

    def call(*arguments):
        utf8 = os.environ | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"}
        return subprocess.run([*TSENOR, *arguments], capture_output=True, check=True, env=utf8).stdout

    assert call("prune", model, "--nm", "2:4", "-o", output, "-q") == os.fsencode(output) + b"\n"
    report = json.loads((output / "tsenor-report.json").read_text())
    assert report["model"]["source"] == str(model)
    assert b"14 tensors are 2:4" in call("verify", output, "--against", model)
    call("report", output, "-o", tmp_path / os.fsdecode(b"table\xfd.md"))
    assert json.loads(call("inspect", model, "--json"))


# --- what people get wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "2:65", "x", "2:2", "2:4:8", "-1:4", "2/4", "1:1", ""])
def test_impossible_patterns_are_usage_errors(tsenor, llama, tmp_path, pattern):
    fails(tsenor("prune", llama, f"--nm={pattern}"), 2, "pattern")
    fails(tsenor("verify", llama, f"--nm={pattern}"), 2, "pattern")
    assert untouched(tmp_path / "work")


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune",),
        ("prune", "x"),
        ("prune", "x", "--nm", "2:4", "--method", "lottery"),
        ("prune", "x", "--nm", "2:4", "--min-coverage", "2"),
        ("prune", "x", "--nm", "2:4", "--no-such-flag"),
        ("verify", "x", "--standard"),
        ("fly",),
    ],
    ids=" ".join,
)
def test_usage_errors(tsenor, arguments):
    fails(tsenor(*arguments), 2, "--help")


def no_safetensors(llama):
    for path in llama.glob("*.safetensors"):
        path.unlink()
    (llama / INDEX).unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04")


def truncated(llama):
    path = llama / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_shard(llama):
    (llama / "model-00002-of-00004.safetensors").unlink()


def missing_tensor(llama):
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"]["model.layers.0.extra.weight"] = "model-00001-of-00004.safetensors"
    (llama / INDEX).write_text(json.dumps(index))


def outside_path(llama):
    (llama.parent / "outside.safetensors").write_bytes((llama / "model-00001-of-00004.safetensors").read_bytes())
    index = json.loads((llama / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../outside.safetensors"
    (llama / INDEX).write_text(json.dumps(index))


def quantised(llama):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-24-bitmask"},
    }
    (llama / "config.json").write_text(json.dumps(config))


def nan_weight(llama, value=torch.nan):
    for file, tensors in read_shards(llama).items():
        if "model.layers.1.mlp.up_proj.weight" in tensors:
            tensors["model.layers.1.mlp.up_proj.weight"][50, 3] = value
            save_file(tensors, llama / file, metadata={"format": "pt"})


def infinite_weight(llama):
    nan_weight(llama, -torch.inf)


def no_config(llama):
    (llama / "config.json").unlink()


def config_is_no_json(llama):
    (llama / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (no_safetensors, "pickle"),
        (truncated, "cut short"),
        (without_a_shard, "missing"),
        (missing_tensor, "model.layers.0.extra.weight"),
        (outside_path, "../outside.safetensors"),
        (quantised, "quantization_config"),
        (nan_weight, "model.layers.1.mlp.up_proj.weight"),
        (infinite_weight, "model.layers.1.mlp.up_proj.weight"),
        (no_config, "config.json"),
        (config_is_no_json, "JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refused_checkpoints(tsenor, llama, tmp_path, damage, word):
    damage(llama)
    fails(tsenor("prune", llama, "--nm", "2:4"), 3, word)
    assert untouched(tmp_path / "work")


def test_no_such_checkpoint(tsenor):
    fails(tsenor("prune", "./nowhere", "--nm", "2:4"), 3, "no such directory")
    fails(tsenor("inspect", "./nowhere"), 3, "no such directory")
    fails(tsenor("inspect", "~nobody-of-this-name/model"), 3, "no such directory")
    fails(tsenor("prune", "~nobody-of-this-name/model", "--nm", "2:4", "--no-cache-input"), 3, "no such directory")


HUGE = "9" * 400


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--solver", "entropic", "--iterations", HUGE), "leave it out"),
        (("--solver", "entropic", "--local-search", HUGE), "leave it out"),
        (("--memory-budget", HUGE), "is not a size"),
        (("--seed", HUGE), "not in the range"),
    ],
)
def test_numbers_beyond_all_bounds(tsenor, llama, options, word):
    fails(tsenor("prune", llama, "--nm", "2:4", *options), 2, word)


def test_the_root_is_no_place_for_parts(tsenor, llama):
    fails(tsenor("prune", llama, "--nm", "2:4", "-o", "/", "--shard", "1/2"), 5, "give another -o")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_means_the_cpu_and_says_so(tsenor, llama):
    done = tsenor("prune", llama, "--nm", "2:4", "--json")
    assert json.loads(done.out)["device"] == "cpu"
    assert "cpu (this torch is built for the CPU alone)" in done.err or "cpu (torch finds no GPU" in done.err
    assert "cpu (" not in tsenor("prune", llama, "--nm", "2:4", "--overwrite", "--device", "cpu").err


def test_a_device_without_an_engine(tsenor, llama):
    fails(tsenor("prune", llama, "--nm", "2:4", "--device", "cuda"), 3, "--device cpu")


def test_checks_that_fall_short(tsenor, llama, tmp_path):
    fails(tsenor("prune", llama, "--nm", "2:48", "--standard", "--strict"), 4, "--strict")
    fails(tsenor("prune", llama, "--nm", "2:4", "--ignore", "*.mlp.*", "--min-coverage", "0.9"), 4, "--min-coverage")
    fails(tsenor("verify", llama), 4, "claims no sparsity")
    assert untouched(tmp_path / "work")


def test_verify_names_the_first_places_that_fail(tsenor, llama):
    outcome = tsenor("verify", llama, "--nm", "2:4")
    assert (outcome.code, outcome.out) == (4, "")
    assert "first at [0, 0]" in outcome.err
    assert "28 checks failed" in outcome.err.splitlines()[-1]


def test_outputs_that_are_taken(tsenor, llama, tmp_path):
    (tmp_path / "work" / "taken").mkdir()
    fails(tsenor("prune", llama, "--nm", "2:4", "-o", "taken"), 5, "exists")
    fails(tsenor("prune", llama, "--nm", "2:4", "-o", llama, "--overwrite"), 5, "overlap")
    fails(tsenor("prune", llama, "--nm", "2:4", "-o", llama / "inside"), 5, "overlap")


def test_names_from_a_checkpoint_cannot_command_the_terminal(tsenor, llama):
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"]["evil\x1b[2J\nname"] = "model-00001-of-00004.safetensors"
    (llama / INDEX).write_text(json.dumps(index))
    outcome = tsenor("prune", llama, "--nm", "2:4")
    fails(outcome, 3, "evil")
    assert "\x1b" not in outcome.err


def test_names_of_files_cannot_command_the_terminal(tsenor, llama):
    (llama / "evil\x1b[2J\r.gguf").write_bytes(b"x")
    outcome = tsenor("prune", llama, "--nm", "2:4")
    assert outcome.code == 0
    assert "evil\\x1b[2J\\r.gguf" in outcome.err
    assert "\x1b[2J" not in outcome.err


def test_a_bug_shows_its_traceback(tsenor, llama, monkeypatch):
    monkeypatch.setattr("tsenor_cli.job.make_plan", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tsenor("prune", llama, "--nm", "2:4")


SLOW = (  # as on a large checkpoint
    "import time; from tsenor_cli.streaming import Streaming as s; real = s._prune_band;"
    "s._prune_band = lambda *a: (real(*a), time.sleep(0.3))[0];"
    "from tsenor_cli.__main__ import main; main()"
)


def running(code, *arguments, cwd):
    """A real process in the middle of pruning: something is finished, and noted."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(b"\n" in path.read_bytes().partition(b"\n")[2] for path in cwd.glob("*.tsenor-partial/journal")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "what"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_signals_stop_where_the_run_can_go_on(tsenor, llama, tmp_path, number, code, what):
    """Real signals to a real process that is in the middle of writing."""
    process = running(SLOW, "prune", llama, "--nm", "2:4", cwd=tmp_path / "work")
    fails(tsenor("prune", llama, "--nm", "2:4", "--resume"), 5, "another run is writing")
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        code,
        f"tsenor: error: {what}; the same command with --resume goes on where this one stopped [{what}]\n",
    )
    fails(tsenor("prune", llama, "--nm", "2:4"), 5, "--resume")
    done = tsenor("prune", llama, "--nm", "2:4", "--resume", "-q")
    assert (done.code, done.out, done.err) == (0, "llama-2of4-transposable\n", "")
    assert tsenor("verify", "llama-2of4-transposable", "--against", llama).code == 0
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["llama-2of4-transposable"]


DEAF = (  # as in the factorisation of a large Gram matrix; the second time, when something is finished
    "import torch; from tsenor_cli.streaming import Streaming as s; real = s._prune_band; calls = [];"
    "matrix = torch.rand(6000, 6000, dtype=torch.float64); long = lambda: torch.linalg.eigh(matrix);"
    "s._prune_band = lambda *a: (calls.append(1), len(calls) == 5 and long(), real(*a))[2];"
    "from tsenor_cli.__main__ import main; main()"
)


def test_a_signal_that_a_library_makes_an_error_of():
    """As pybind11 does while a module is imported."""
    error = ImportError("initialization failed")
    error.add_note("go on")
    with pytest.raises(Stopped) as caught, signals_raise(lambda _: None):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped as stopped:
            raise error from stopped
    assert caught.value.exit_code == 143
    assert caught.value.__notes__ == ["go on"]
    with pytest.raises(ImportError), signals_raise(lambda _: None):
        raise error


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_a_computation_that_does_not_listen_is_left_alone(llama, tmp_path, signals):
    """Minutes inside C, where Python handles no signal: the process ends all the same, after a second one at once."""
    process = running(DEAF, "prune", llama, "--nm", "2:4", cwd=tmp_path / "work")
    time.sleep(1)  # until it is in there
    started = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, err = process.communicate(timeout=60)
    seconds = time.monotonic() - started
    assert process.returncode == 130
    assert err.startswith("tsenor: error: interrupted, without waiting for what was being computed; the same command")
    assert err.count("\n") == 1
    assert (0.1 * signals <= seconds < 1.2) if signals == 2 else (1.4 <= seconds < 5)


def test_out_of_memory_in_the_middle(tsenor, llama, monkeypatch):
    """The message is torch's own."""
    real, done = Streaming._prune_band, []

    def greedy(*arguments):
        done.append(1)
        return real(*arguments) if len(done) < 5 else torch.empty(2**50, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(Streaming, "_prune_band", greedy)
        outcome = tsenor("prune", llama, "--nm", "2:4")
    fails(outcome, 1, "out of memory: free some")
    assert outcome.err.endswith("; the same command with --resume goes on where this one stopped [out-of-memory]\n")
    assert tsenor("prune", llama, "--nm", "2:4", "--resume").code == 0


@pytest.mark.slow
def test_resume_is_idempotent(tsenor, llama, tmp_path):
    """A CI job can always say --resume: there may be nothing to go on with, or nothing left to do."""
    assert tsenor("prune", llama, "--nm", "2:4", "--resume", "-q", "-o", "out").code == 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "out").iterdir()}
    again = tsenor("prune", llama, "--nm", "2:4", "--resume", "-q", "-o", "out")
    assert (again.code, again.out) == (0, "out\n")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "out").iterdir()} == written
    fails(tsenor("prune", llama, "--nm", "1:4", "--resume", "-o", "out"), 5, "exists")


def test_what_is_not_finite_is_copied_if_it_may(tsenor, llama):
    nan_weight(llama)
    fails(tsenor("prune", llama, "--nm", "2:4"), 3, "--allow-nonfinite")
    done = tsenor("prune", llama, "--nm", "2:4", "--allow-nonfinite", "--json", "-q")
    report = json.loads(done.out)
    kept = {record["name"]: record["reason"] for record in report["tensors"] if record["prunable"] and record["reason"]}
    assert kept == {"model.layers.1.mlp.up_proj.weight": "it has NaN or infinite weights"}
    assert report["summary"]["coverage"] < 1
    assert tsenor("verify", "llama-2of4-transposable", "--against", llama).code == 0
    fails(tsenor("prune", llama, "--nm", "2:4", "--allow-nonfinite", "--min-coverage", "1", "-o", "x"), 4, "coverage")


# --- bench ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_masks(tsenor, tmp_path):
    picture = tmp_path / "masks.svg"
    outcome = tsenor(
        *("bench", "masks", "--nm", "2:4", "--nm", "8:16", "--size", "64x128", "--budget", "0.01", "--repeat", 1),
        *("--plot", picture),
    )
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert result["machine"]["processor"]
    assert [one["pattern"] for one in result["comparisons"]] == ["2:4", "8:16"]
    assert all(one["parity"]["worst_shortfall"] <= 1e-6 for one in result["comparisons"])
    assert "optimum confirmed" in outcome.err
    assert "plain-torch" in outcome.err
    assert picture.is_file()


@pytest.mark.slow
def test_bench_masks_of_a_model(tsenor, llama):
    arguments = ("--model", llama, "--solver", "exact", "--solver", "bi-nm", "--tensors", 2, "--budget", "0.01", "-q")
    outcome = tsenor("bench", "masks", "--nm", "4:8", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    comparisons = json.loads(outcome.out)["comparisons"]
    assert len(comparisons) == 2
    assert all(one["problem"]["name"].endswith("_proj.weight") for one in comparisons)


def test_bench_mistakes(tsenor, llama):
    fails(tsenor("bench", "masks", "--size", "big"), 2, "ROWSxCOLUMNS")
    fails(tsenor("bench", "masks", "--nm", "4:4"), 2, "not possible")
    fails(tsenor("bench", "masks", "--nm", "2:4", "--size", "6x6", "-q"), 2, "does not divide")
    fails(tsenor("bench", "masks", "--model", llama, "--nm", "31:62"), 2, "no prunable tensor")


# --- solvers ----------------------------------------------------------------------------------------------------------


def test_prune_with_the_entropic_solver(tsenor, llama):
    outcome = tsenor("prune", llama, "--nm", "8:16", "--solver", "entropic", "--iterations", 5, "--json", "-o", "x")
    report = json.loads(outcome.out)
    assert outcome.code == 0
    assert "stopped at the largest number of iterations" in outcome.err
    assert report["options"]["solver"] == "entropic"
    assert report["options"]["iterations"] == 5
    pruned = [tensor for tensor in report["tensors"] if tensor["action"] == "pruned"]
    assert {tensor["solver"] for tensor in pruned} == {"entropic"}
    assert {tensor["status"] for tensor in pruned} == {"max_iterations"}
    assert 0 < report["summary"]["gap"] < 0.05
    assert tsenor("verify", "x").code == 0


def test_options_of_the_other_solver(tsenor, llama, tmp_path):
    fails(tsenor("prune", llama, "--nm", "2:4", "--tau", 10), 2, "not an option of the exact solver")
    fails(tsenor("prune", llama, "--nm", "2:4", "--solver", "entropic", "--tau", -1), 2, "tau is -1")
    fails(tsenor("prune", llama, "--nm", "2:4", "--standard", "--solver", "entropic"), 2, "transposable patterns")
    assert untouched(tmp_path / "work")


def test_too_little_memory_anywhere_is_one_line(tsenor, llama, monkeypatch):
    def inspect(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("tsenor_cli.checkpoint.inspection.inspect_checkpoint", inspect)
    fails(tsenor("inspect", llama), 1, "out of memory", "[out-of-memory]")


def test_files_beside_the_weights_need_space_too(tsenor, llama, tmp_path, monkeypatch):
    (llama / "notes.bin").write_bytes(bytes(5_000_000))
    weights = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    free = shutil.disk_usage(tmp_path)._replace(free=weights + 4_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    fails(tsenor("prune", llama, "--nm", "2:4", "-o", tmp_path / "out"), 1, "bytes free", "[disk-full]")


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "llama", "--nm", "2:4", "--damping", "nan"),
        ("prune", "llama", "--nm", "2:4", "--damping", "inf"),
        ("prune", "llama", "--nm", "2:4", "--min-coverage", "nan"),
        ("finetune", "llama", "--text", "t.txt", "--learning-rate", "inf"),
        ("finetune", "llama", "--text", "t.txt", "--clip", "nan"),
    ],
)
def test_numbers_are_finite(tsenor, arguments):
    fails(tsenor(*arguments), 2, "is not a finite number", "[usage]")


def test_what_no_method_of_the_run_measures_cannot_fail_it(tsenor, llama, tmp_path):
    options = ("--nm", "2:4", "--method", "wanda", "--calibration", tmp_path / "text.txt", "--fail-if", "error>0.1")
    fails(tsenor("prune", llama, *options), 2, "only sparsegpt and alps know it")


def test_what_no_method_of_the_run_takes(tsenor, llama):
    fails(tsenor("prune", llama, "--nm", "2:4", "--damping", 1), 2, "no method takes it: it is for alps and sparsegpt")


def test_a_picture_needs_a_place_and_a_format(tsenor, tmp_path):
    fails(tsenor("bench", "masks", "--plot", tmp_path / "absent" / "x.png"), 2, "no directory for --plot")
    fails(tsenor("bench", "masks", "--plot", "x.xyz"), 2, "ends in .png, .svg or .pdf")


def test_a_condition_that_is_none_has_its_own_code(tsenor, llama):
    fails(tsenor("prune", llama, "--nm", "2:4", "--fail-if", "foo>1"), 2, "is not a condition", "[bad-condition]")


@pytest.mark.parametrize("arguments", [(), ("bench",)])
def test_nothing_to_do_gets_help(tsenor, arguments):
    outcome = tsenor(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: tsenor")
    assert outcome.err.count("\n") > 10


def test_shapes_that_are_not_those_of_the_config(tsenor, llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    fails(tsenor("prune", llama, "--nm", "2:4"), 3, "mlp", "config.json makes it", "[inconsistent-checkpoint]")
    assert untouched(tmp_path / "work")


def test_shards_without_an_index(tsenor, llama):
    (llama / INDEX).unlink()
    fails(tsenor("prune", llama, "--nm", "2:4"), 3, f"{INDEX} is missing", "[inconsistent-checkpoint]")


@pytest.mark.parametrize("name", ["adapter_model", "consolidated", "model.fp16"])
def test_safetensors_of_another_name(tsenor, tmp_path, name):
    source = tmp_path / "other"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"w": torch.ones(4, 4)}, source / f"{name}.safetensors")
    fails(tsenor("inspect", source), 3, f"has {name}.safetensors, but no model.safetensors", "[no-safetensors]")


def test_what_cannot_be_copied_is_noticed_before_the_work(tsenor, llama, tmp_path, monkeypatch):
    opened = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "generation_config.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *args, **kwargs)

    (llama / "generation_config.json").write_text("{}")
    monkeypatch.setattr(Path, "open", refuse)
    fails(tsenor("prune", llama, "--nm", "2:4"), 3, "generation_config.json: Permission denied", "[input-refused]")
    assert untouched(tmp_path / "work")


def test_a_link_gives_the_output_its_own_name(tsenor, llama, tmp_path):
    (tmp_path / "work" / "mine").symlink_to(llama)
    assert tsenor("prune", "mine", "--nm", "2:4").out == "mine-2of4-transposable\n"


@pytest.mark.slow
def test_without_standard_streams(llama, tmp_path):
    """A real process that is started with none of them: no file of the output takes the place of one."""
    without = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash"]
    command = [*without, *TSENOR, "prune", llama, "--nm", "2:4", "-q", "-o", "x"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    assert subprocess.run([*TSENOR, "verify", "x", "-q"], cwd=tmp_path, check=False).returncode == 0
    next_one = "import os, tsenor_cli.__main__ as m; m.run = lambda _: os.open(os.devnull, os.O_RDONLY) <= 2; m.main()"
    assert subprocess.run([*without, sys.executable, "-c", next_one], check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_an_error_that_cannot_be_said_keeps_its_exit_code(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for options in ([], ["--log-format", "json"]):
        command = [*TSENOR, "verify", "nowhere", *options]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stderr=full, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 3


def test_evaluation_keeps_to_the_budget_or_says_so(tsenor, speaking_llama, text):
    options = ("--text", text, "--sequence-length", 16, "--memory-budget")
    fails(tsenor("eval", speaking_llama, *options, "1K"), 2, "at least", "[budget-too-small]")

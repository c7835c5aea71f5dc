"""The commands of the tutorial, the README and the page on CI are run as they stand.

A plain `tsenor …` is called in this process, for to start one takes longer than most commands; all else is the shell's.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(console|python|bash|yaml|make)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCRIPT = "python scripts/make_demo_checkpoint.py demo"
PLAIN = re.compile(r"tsenor [\w ./:=@-]+")
SKIPPED = "pip install ."  # into an environment of its own: scripts/try_packages.py


def blocks(page, kind):
    return [text for found, text in BLOCK.findall((ROOT / page).read_text()) if found == kind]


@pytest.fixture
def shell(tmp_path, tsenor, real_page):  # noqa: ARG001  (a fixture that acts by being there)
    """Runs a line as people do: `tsenor` and `python` are commands, and nothing is downloaded."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, line in (("tsenor", f'"{sys.executable}" -m tsenor_cli "$@"'), ("python", f'"{sys.executable}" "$@"')):
        (programs / name).write_text(f"#!/bin/sh\nexec {line}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def run(line):
        if PLAIN.fullmatch(line):
            done = tsenor(*line.split()[1:])
            return done.code, done.out, done.err
        command = ["bash", "-o", "pipefail", "-ec", line]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return ended.returncode, ended.stdout, ended.stderr

    return run


def commands(page):
    """(command, what it should print) of a page, one after the other."""
    for block in blocks(page, "console"):
        for part in block.removeprefix("$ ").split("\n$ "):
            command, _, output = part.partition("\n")
            yield command, output.replace("…", "...").strip()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/fine-tuning.md"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_the_tutorials(page, shell):
    short = f"python {ROOT}/scripts/make_demo_checkpoint.py demo --steps 3"
    found = list(commands(page))
    assert SCRIPT in [command for command, _ in found]
    checker = doctest.OutputChecker()
    for command, expected in found:
        if command == SKIPPED:
            continue
        quick = command.replace("--steps 200", "--steps 2").replace("--calibration", "--samples 8 --calibration")
        code, out, err = shell(short if command == SCRIPT else quick)
        if "[output-exists]" in expected:
            assert code == 5, command
            out = err
        else:
            assert code == 0, f"{command}\n{out}{err}"
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert not expected or checker.check_output(expected, out.strip(), flags), f"{command}\n{out}"
    names = {}
    for example in blocks(page, "python"):
        exec(compile(example, page, "exec"), names)


def usage(page):
    """The commands in plain blocks of a page, without the words that explain them."""
    text = "\n".join(re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL))
    return [
        re.split(r" {3,}|  +→", line)[0].strip() for line in text.splitlines() if re.match(r"(\w+=\$\()?tsenor ", line)
    ]


README_NAMES = {
    "./llama": "model",
    "MODEL --recipe recipe.yaml": "model --recipe recipe.yaml --overwrite",
    "MODEL": "model",
    "prune … --shard": "prune model --nm 4:8 --shard",
    "prune … --save-masks": "prune model --nm 2:4 --save-masks",
    "prune … --resume": "prune model --nm 2:4 --resume",
    "finetune DIR --text FILE": "finetune model-2of4-transposable --text eval.txt --steps 1 --sequence-length 16",
    "DIR --text FILE": "model-2of4-transposable --text eval.txt --sequence-length 16",
    "DIR...": "model-2of4-transposable model-8of16-transposable",
    "DIR": "model-2of4-transposable",
    "--calibration text.jsonl": "--calibration text.jsonl --sequence-length 16 -o calibrated",
    "-q) &&": "-q --overwrite) &&",
    "--json |": "--json --overwrite |",
    "bench masks": "bench masks --nm 2:4 --tensors 1 --repeat 1 --budget 0.01",
}


@pytest.mark.slow
@pytest.mark.usefixtures("work")
def test_every_command_of_the_readme_runs(shell):
    lines = usage("README.md")
    assert len(lines) > 12
    for line in lines:
        if "| jq" in line and not shutil.which("jq"):
            continue
        run = line
        for name, here in README_NAMES.items():
            run = run.replace(name, here) if name in run else run
        if run.startswith("tsenor prune model --nm 2:4") and "-o" not in run:
            run = run.replace("--nm 2:4", "--nm 2:4 --overwrite")
        code, out, err = shell(run)
        assert code == 0, f"{run}\n{out}{err}"


@pytest.fixture
def work(tmp_path, speaking_llama):
    """A directory with what the pages speak of."""
    here = tmp_path / "work"
    for name in ("model", "model-a", "model-b", "models/tiny"):
        shutil.copytree(speaking_llama, here / name)
    (here / "text.jsonl").write_text("\n".join(json.dumps({"text": f"words {i} and more of them"}) for i in range(400)))
    shutil.copy(here / "text.jsonl", here / "calibration.jsonl")
    (here / "eval.txt").write_text("other words " * 300)
    (here / "recipe.yaml").write_text('nm: 2:4\nrules:\n- match: "*.mlp.*"\n  nm: 4:8\n')
    return here


@pytest.mark.slow
def test_the_github_job(shell, work):
    (job,) = yaml.safe_load(blocks("docs/ci.md", "yaml")[0])["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert len(steps) == 4
    for step in steps[1:]:
        short = step.replace("--method", "--sequence-length 16 --samples 8 --method")
        code, out, err = shell(f"export MODEL={job['env']['MODEL']} GITHUB_STEP_SUMMARY=summary.md; {short}")
        assert code == 0, f"{step}\n{out}{err}"
    assert "| sparse | sparsegpt | 2:4 transposable |" in (work / "summary.md").read_text()
    assert (work / job["steps"][-1]["with"]["path"]).is_file()


@pytest.mark.slow
def test_a_job_fails_where_it_should(shell, work):
    line = "tsenor prune model --nm 2:4 --eval eval.txt -o bad --fail-if 'perplexity_ratio>0.5' --log-format json"
    code, out, err = shell(line)
    assert (code, out) == (4, "bad\n")
    events = [json.loads(event) for event in err.splitlines()]
    assert events[-1]["code"] == "fail-if"
    assert (work / "bad" / "tsenor-report.json").is_file()


@pytest.mark.slow
def test_the_shell_pipeline_and_jq(shell, work):
    pipeline, jq = blocks("docs/ci.md", "bash")
    code, out, err = shell(pipeline)
    assert code == 0, err
    assert out.count("exactly 2 nonzeros") == 2
    assert (work / "comparison.csv").read_text().count("\nmodel-") == 2
    if shutil.which("jq"):
        (work / "sparse" / "tsenor-report.json").write_bytes((work / "sparse/model-a/tsenor-report.json").read_bytes())
        for line in jq.splitlines():
            code, out, err = shell(line)
            assert code == 0, err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_make_rule(shell, work):
    (work / "Makefile").write_text(blocks("docs/ci.md", "make")[0])
    target = "models/tiny-2of4/tsenor-report.json"
    assert shell(f"make {target}")[0] == 0
    first = (work / target).read_text()
    assert shell(f"make {target}")[0] == 0
    assert (work / target).read_text() == first, "make ran a rule for what is up to date"
    os.utime(work / "models/tiny/config.json")
    code, out, err = shell(f"make {target}")
    assert code == 0, out + err
    assert (work / target).read_text() != first

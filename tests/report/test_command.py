"""The command in a report gives the same run again."""

from __future__ import annotations

import json
import shlex
from html import unescape

import pytest
from report.examples import large_report

from tsenor_cli.report.command import recipe, repeat_command, shell_command
from tsenor_cli.report.records import Report

RUNS = {
    "plain": "--nm 2:4",
    "standard": "--nm 4:8 --standard --only '*.mlp.*' --ignore 're:up|gate' --min-coverage 0.1",
    "entropic": "--nm 2:4 --solver entropic --tau 30.5 --iterations 50 --local-search 3",
    "flags": "--nm 2:4 --strict --allow-nonfinite --save-masks --fallback --device cpu",
    "evaluated": "--nm 2:4 --eval 'text file.jsonl' --text-field body --sequence-length 16",
    "recipe": "--recipe given.yaml",
    "recipe overridden": "--recipe given.yaml --nm 1:4 --method magnitude",
    "calibrated": "--nm 2:4 --method sparsegpt --calibration 'text file.jsonl' --text-field body --samples 4"
    " --sequence-length 16 --seed 3 --no-update --damping 0.02 --eval eval.txt --memory-budget 1GiB",
}
RECIPE = """
nm: 2:4
kind: standard
rules:
- match: "*.mlp.*"
  nm: 4:8
  kind: transposable
- match: ["re:.*q_proj", "*.k_proj"]
  skip: true
"""


@pytest.fixture
def texts(tmp_path):
    work = tmp_path / "work"
    (work / "given.yaml").write_text(RECIPE)
    lines = (json.dumps({"body": f"some words {i} and more of them"}) for i in range(200))
    (work / "text file.jsonl").write_text("\n".join(lines))
    (work / "eval.txt").write_text("other words " * 200)
    return work


@pytest.mark.usefixtures("real_page")
@pytest.mark.parametrize("name", RUNS)
def test_it_gives_the_same_run(name, tsenor, speaking_llama, texts):
    """Not only the same bytes: `--resume` would refuse it, were anything that decides them different."""
    first = tsenor("prune", speaking_llama, *shlex.split(RUNS[name]), "-o", "first", "--json")
    assert first.code == 0, first.err
    page = (texts / "first" / "tsenor-report.html").read_text()
    report = json.loads(first.out)
    report.pop("output")
    command = shell_command(Report.from_dict(report))
    program, *arguments = shlex.split(command)
    assert program == "tsenor"
    if "--recipe" in arguments:
        (texts / "recipe.yaml").write_text(recipe(Report.from_dict(report)))
    again = tsenor(*arguments, "-o", "second", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["identity"] == report["identity"]
    assert json.loads(again.out)["options"] == report["options"]
    assert command in unescape(page)


def test_a_hub_id_has_its_revision():
    assert repeat_command(large_report())[1] == f"meta-llama/Llama-3.1-8B@{'a' * 40}"

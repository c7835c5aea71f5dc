#!/usr/bin/env python3
"""Build the packages and try them where there is nothing else: in empty environments, outside this tree.

    scripts/try_packages.py [--python PYTHON]... [--torch VERSION] [--transformers VERSION]
    scripts/try_packages.py --python python3.11 --python python3.13 --torch 2.15.0 --transformers 5.24.0

Checks what sdist and wheel contain, then installs the wheel for each PYTHON into a fresh environment and prunes,
verifies and loads a tiny checkpoint there; at last it runs the wheel through pipx. Every other package is the one that
scripts/constraints.txt pins; once a version is given, whatever pip chooses. Needs git and a network, and some GB in the
temporary directory where torch is a CUDA build. Prints a table; exits 1 when anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED = ROOT / "scripts" / "constraints.txt"
SCRIPTS = "Scripts" if os.name == "nt" else "bin"
SHOWN = ("python", "torch", "transformers", "tokenizers", "numba", "numpy")
MADE = ("PKG-INFO", "setup.cfg", "tsenor.egg-info/")  # by setuptools, in the sdist


class Failed(SystemExit):
    """A command did not succeed; its output has been printed."""


def main() -> None:
    if sys.argv[1:2] == ["--in-environment"]:
        {"make": make_model, "versions": print_versions, "load": load_model}[sys.argv[2]](*map(Path, sys.argv[3:]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="an interpreter to try; repeatable [the one that runs this]")
    parser.add_argument("--torch", metavar="VERSION", help="instead of the pinned versions")
    parser.add_argument("--transformers", metavar="VERSION", help="instead of the pinned versions")
    args = parser.parse_args()
    pythons = args.python or [sys.executable]
    if missing := [python for python in pythons if not shutil.which(python)]:
        parser.error(f"no such interpreter: {missing[0]}")
    wanted = {name: version for name in ("torch", "transformers") if (version := getattr(args, name))}
    with tempfile.TemporaryDirectory(prefix="tsenor-packages-") as name:
        folder = Path(name)
        pins = folder / "pins.txt"
        lines = [f"{name}=={version}\n" for name, version in wanted.items()]
        pins.write_text("".join(lines) or PINNED.read_text(encoding="utf-8"), encoding="utf-8")
        wheel = build(folder)
        rows = [try_wheel(python, wheel, pins, folder / "trial") for python in pythons]
        rows.append(try_pipx(pythons[0], wheel, pins, folder))
    print_table(rows)
    sys.exit(any(row["result"] != "ok" for row in rows))


# --- the packages -----------------------------------------------------------------------------------------------------


def build(folder: Path) -> Path:
    """Both packages from a copy of the tree, and the wheel once more from the sdist; returns the wheel."""
    tree = folder / "tree"
    files = copy_tree(tree)
    bin_ = new_environment(sys.executable, folder / "building")
    run(bin_ / "pip", "install", "build", "twine")
    run(bin_ / "python", "-m", "build", "--sdist", "--wheel", "--outdir", folder / "dist", tree)
    run(bin_ / "twine", "check", "--strict", *(folder / "dist").iterdir())
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    run(bin_ / "pip", "wheel", "--no-deps", "--wheel-dir", folder / "again", sdist)
    with tarfile.open(sdist) as archive:
        inside = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    must_equal("the sdist holds the tree", {name for name in inside if not name.startswith(MADE)}, files)
    contents = wheel_contents(wheel)
    must_equal(
        "the sdist builds the same wheel", wheel_contents(folder / "again" / wheel.name).items(), contents.items()
    )
    package = {name for name in contents if ".dist-info/" not in name}
    must_equal("the wheel holds the package", package, {name for name in files if name.startswith("tsenor_cli/")})
    shutil.rmtree(bin_.parent)
    return wheel


def copy_tree(target: Path) -> set[str]:
    """What git knows or would add: no build folder, no cache."""
    listed = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    files = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return files


def wheel_contents(wheel: Path) -> dict[str, int]:
    """The files and their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


def must_equal(what: str, found: object, expected: object) -> None:
    found, expected = set(found), set(expected)
    if found != expected:
        sys.exit(f"not so: {what}; too much: {sorted(found - expected)}, missing: {sorted(expected - found)}")
    print(f"{what}: {len(found)} files", file=sys.stderr)


# --- trying them ------------------------------------------------------------------------------------------------------


def try_wheel(python: str, wheel: Path, pins: Path, folder: Path) -> dict[str, str]:
    """Install and use the wheel; returns a row of the table."""
    print(f"{python}: installing and trying", file=sys.stderr)
    row = {"python": python}
    started = time.monotonic()
    try:
        bin_ = new_environment(python, folder / "environment")
        run(bin_ / "pip", "install", "-c", pins, wheel)
        run(bin_ / "pip", "check")
        row |= json.loads(in_environment(bin_, folder, "versions"))
        use(bin_, folder)
        row["result"] = "ok"
    except Failed as failed:
        row["result"] = str(failed)
    shutil.rmtree(folder, ignore_errors=True)  # room for the next one
    return row | {"seconds": f"{time.monotonic() - started:.0f}"}


def use(bin_: Path, folder: Path) -> None:
    """What a user does, in an empty directory."""
    tsenor = bin_ / "tsenor"
    model, text = folder / "model", folder / "text.txt"
    run(tsenor, "--version", cwd=folder)
    run(bin_ / "python", "-m", "tsenor_cli", "--help", cwd=folder)
    in_environment(bin_, folder, "make", model, text)
    calibrated = ["--method", "sparsegpt", "--calibration", text, "--samples", "4", "--sequence-length", "32"]
    for name, options in {"data-free": [], "calibrated": calibrated}.items():
        run(tsenor, "prune", model, "--nm", "2:4", "-o", folder / name, *options, cwd=folder)
        run(tsenor, "verify", folder / name, "--against", model, cwd=folder)
        in_environment(bin_, folder, "load", folder / name)


def try_pipx(python: str, wheel: Path, pins: Path, folder: Path) -> dict[str, str]:
    """The wheel as pipx runs it; returns a row of the table."""
    print(f"{python}: pipx run", file=sys.stderr)
    started = time.monotonic()
    row = {"python": "pipx run"}
    try:
        bin_ = new_environment(python, folder / "pipx")
        run(bin_ / "pip", "install", "pipx")
        own = {"PIPX_HOME": folder / "pipx-home", "PIP_CONSTRAINT": pins}
        run(bin_ / "pipx", "run", "--spec", wheel, "tsenor", "--version", cwd=folder, **own)
        row["result"] = "ok"
    except Failed as failed:
        row["result"] = str(failed)
    return row | {"seconds": f"{time.monotonic() - started:.0f}"}


def new_environment(python: str, folder: Path) -> Path:
    """Make it; returns the folder of its programs."""
    run(python, "-m", "venv", "--clear", folder)
    return folder / SCRIPTS


def in_environment(bin_: Path, folder: Path, *arguments: object) -> str:
    return run(bin_ / "python", "-I", Path(__file__).resolve(), "--in-environment", *arguments, cwd=folder)


def run(*command: object, cwd: Path | None = None, **variables: object) -> str:
    """Run one command and return what it prints; tsenor compiles its kernels anew, and the hub is off."""
    own = {"HF_HUB_OFFLINE": "1"} | {name: str(value) for name, value in variables.items()}
    if cwd is not None:
        own |= {"TSENOR_CACHE_DIR": str(cwd / "kernels"), "HF_HOME": str(cwd / "hub")}
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | own
    words = [*map(str, command)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=cwd, env=env)
    if done.returncode:
        print(f"{' '.join(words)}\n{done.stdout}{done.stderr}", file=sys.stderr)
        raise Failed("failed: " + " ".join(Path(word).name for word in words[:3]))
    return done.stdout


def print_table(rows: list[dict[str, str]]) -> None:
    titles = [*SHOWN, "seconds", "result"]
    table = [titles, *([row.get(title, "") for title in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# --- inside the environment -------------------------------------------------------------------------------------------


def print_versions() -> None:
    from importlib.metadata import version
    from platform import python_version

    print(json.dumps({"python": python_version(), **{name: version(name) for name in SHOWN[1:]}}))


def make_model(model: Path, text: Path) -> None:
    """A tiny random Llama, a tokenizer that knows single letters, and a text."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {chr(32 + i): 2 + i for i in range(95)}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, **letters}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    text.write_text("Whatever holds here holds where nothing else is. " * 40, encoding="utf-8")


def load_model(pruned: Path) -> None:
    """It loads, computes, and is 2:4 both ways."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pruned)
    assert model(**AutoTokenizer.from_pretrained(pruned)("holds", return_tensors="pt")).logits.isfinite().all()
    layers = [part for part in model.model.layers.modules() if isinstance(part, torch.nn.Linear)]
    assert len(layers) == 14
    for weight in (turned for layer in layers for turned in (layer.weight, layer.weight.T)):
        assert (weight.reshape(-1, 4).count_nonzero(dim=1) <= 2).all()


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The pictures of the README, made from the real program: a run in a terminal, and the page of its report.

    scripts/make_pictures.py MODEL CALIBRATION EVAL     needs Chromium (CHROMIUM names it) for the page

scripts/make_demo_checkpoint.py makes all three. The terminal is a real one, 100 columns wide.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
COLUMNS = 100
SHOT = (1280, 1640)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "eval"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        shutil.copytree(given.model, work / "llama")
        shutil.copy(given.calibration, work / "text.jsonl")
        shutil.copy(given.eval, work / "eval.txt")
        commands = (
            "tsenor prune llama --nm 2:4 --method alps --calibration text.jsonl --sequence-length 256 --eval eval.txt",
            "tsenor verify llama-2of4-transposable --against llama",
        )
        shown = Text()
        for command in commands:
            shown.append(f"$ {command}\n", style="bold")
            shown.append_text(Text.from_ansi(run_in_terminal(command, work)))
            shown.append("\n")
        console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: PTH123, SIM115
        console.print(shown)
        (PICTURES / "prune.svg").write_text(without_fonts(console.export_svg(title="tsenor", theme=MONOKAI)))
        photograph(work / "llama-2of4-transposable" / "tsenor-report.html", PICTURES / "report.png")


def run_in_terminal(command: str, work: Path) -> str:
    """What stands in a terminal after a command: progress bars are gone by then."""
    program, *arguments = command.split()
    assert program == "tsenor"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tsenor_cli", *arguments],
        cwd=work, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = bytearray()
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        seen += part
    if process.wait():
        sys.exit(f"{command} failed:\n{seen.decode()}")
    lines = seen.decode().replace("\r\n", "\n").split("\n")
    return "\n".join(re.sub(r"\x1b\[[0-9]*[AK]", "", line.rpartition("\r")[2]) for line in lines).strip("\n")


def without_fonts(svg: str) -> str:
    """The picture must not ask anyone for a font."""
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def photograph(page: Path, picture: Path) -> None:
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no Chromium found: name it with CHROMIUM")
    size = "{},{}".format(*SHOT)
    arguments = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={size}", f"--screenshot={picture}"]
    subprocess.run([browser, *arguments, page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()

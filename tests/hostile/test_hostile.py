"""Spoilt checkpoints through the real command line: 6,000 safetensors files, 1,400 configs and indexes.

In processes of their own, for what is watched (memory, every file that is opened) belongs to a process.
scripts/campaign_hostile takes more of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.mutants import MUTANTS

JUDGE = Path(__file__).with_name("judge.py")
MEMORY = [path for path in ("/dev/shm",) if os.access(path, os.W_OK)]
CHUNKS = [("safetensors", first, 1000) for first in range(0, 4_000, 1000)] + [("config", 0, 300), ("index", 0, 400)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "count"), CHUNKS)
def test_mutants(kind, first, count):
    command = [sys.executable, JUDGE, kind, str(first), str(count), *MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert sum(result["found"].values()) == count
    assert result["found"]["taken, and verified"] > count // 100, "mutants have to be close to what is right"


@pytest.mark.parametrize("kind", MUTANTS)
def test_a_mutant_can_be_had_again(kind, llama):
    name, mutate = MUTANTS[kind]
    whole = (llama / name.replace("00002", "00004")).read_bytes()
    assert [mutate(whole, number) for number in range(300)] == [mutate(whole, number) for number in range(300)]
    assert len({mutate(whole, number) for number in range(20)}) > 10

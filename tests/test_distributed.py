"""Several processes make the bytes that one makes, whatever dies on the way: real processes, some under torchrun."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace

import pytest
import torch
from checkpoints import add_tokenizer, make_checkpoint
from crash.harness import content

import tsenor_cli.calibration.perplexity
import tsenor_cli.layerwise
import tsenor_cli.report.page  # noqa: F401  (forked processes need not load them again)
from tsenor_cli.distributed import Team, join_team
from tsenor_cli.errors import SaidElsewhereError, UsageError
from tsenor_cli.job import prepare
from tsenor_cli.observer import Observer
from tsenor_cli.pipeline import prune
from tsenor_cli.specs import CalibrationSpec, NMPattern, PruneSpec

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


class Seen(Observer):
    def __init__(self):
        self.nbytes, self.wanted = 0, None

    def planned(self, plan):
        self.wanted = sum(item.tensor.nbytes for item in plan.tensors)

    def advanced(self, _name, nbytes):
        self.nbytes += nbytes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(size, work, nodes=1):
    """Run work(team) in `size` forked processes that find what torchrun would have told them; their exit codes."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % -(-size // nodes)),
                "GROUP_RANK": str(rank * nodes // size),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            torch.set_num_threads(1)  # torch's pool does not outlive a fork: made anew before several threads want it
            work(join_team())
            code = 0
        except SaidElsewhereError as error:
            code = error.exit_code
        except BaseException:  # noqa: BLE001  (this is a process of its own)
            traceback.print_exc()
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = random.Random(0)
    path.write_text(" ".join("".join(letters.choices("abcdefgh ijklmnop,.", k=7)) for _ in range(2000)))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def model(name):
        if name not in made:
            made[name] = add_tokenizer(make_checkpoint(name, folder / name))
        return made[name]

    return model


def report(output):
    return json.loads((output / "tsenor-report.json").read_text())


CASES = [
    ("llama", "magnitude", True),
    ("llama", "sparsegpt", True),
    ("llama", "sparsegpt", False),
    ("llama", "alps", True),
    ("llama", "alps", False),
    ("llama", "wanda", True),
    ("qwen3_moe", "sparsegpt", True),  # experts on disk one by one
    ("gpt_oss", "alps", True),  # all experts in one tensor
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "transposable"), CASES)
def test_bytes_do_not_depend_on_the_number_of_processes(models, text, tmp_path, model, method, transposable):
    """Five batches, so that some processes have one more; the four are on two machines."""
    spec = PruneSpec(str(models(model)), tmp_path / "1", NMPattern(2, 4, transposable), method=method, save_masks=True)
    if method != "magnitude":
        length = 32
        calibration = CalibrationSpec(str(text), samples=5 * (2048 // length) - 3, sequence_length=length)
        spec = replace(spec, calibration=calibration, eval_text=str(text))
    assert together(1, lambda team: prune(spec, team=team)) == [0]
    for size, nodes in ((2, 1), (4, 2)):
        several = replace(spec, output=tmp_path / str(size))
        assert together(size, lambda team, spec=several: prune(spec, team=team), nodes) == [0] * size
        assert content(several.output) == content(spec.output)
        assert report(several.output)["processes"] == size
    assert list(tmp_path.glob("*tsenor*")) == []


@pytest.mark.slow
def test_progress_is_that_of_all(models, tmp_path):
    spec = PruneSpec(str(models("llama")), tmp_path / "out", NMPattern(2, 4))

    def work(team):
        seen = Seen()
        prune(spec, seen, team)
        assert seen.nbytes == (seen.wanted if team.rank == 0 else 0)

    assert together(3, work) == [0] * 3


@pytest.mark.slow
def test_more_processes_than_batches(models, text, tmp_path):
    calibration = CalibrationSpec(str(text), samples=4, sequence_length=16)
    spec = PruneSpec(str(models("llama")), tmp_path / "1", NMPattern(2, 4), method="alps", calibration=calibration)
    prune(spec)
    several = replace(spec, output=tmp_path / "3")
    assert together(3, lambda team: prune(several, team=team)) == [0] * 3
    assert content(several.output) == content(spec.output)


@pytest.mark.slow
def test_one_refusal_is_said_once_and_ends_all(models, tmp_path, capfd):
    """What the first process finds wrong before anything is written."""
    spec = PruneSpec(str(models("llama")), tmp_path / "out", NMPattern(2, 4), ignore=("nothing",))
    assert together(3, lambda team: prune(spec, team=team)) == [1, 2, 2]
    assert capfd.readouterr().err.count("fits no tensor") == 1
    assert list(tmp_path.glob("out*")) == []


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some cluster has set it
    assert type(join_team()) is Team


SLOW = """
import os, time
from tsenor_cli.layerwise import Layerwise
from tsenor_cli.streaming import Streaming
for room, name in ((Streaming, "_prune_band"), (Layerwise, "_prune_matrix")):
    real = getattr(room, name)
    setattr(room, name, lambda *given, real=real: (real(*given), time.sleep(0.25))[0])
open(os.path.join("pids", f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}-{os.getpid()}"), "w")
from tsenor_cli.__main__ import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "victim"), [("magnitude", 1), ("sparsegpt", 0)])
def test_a_process_is_killed_and_torchrun_starts_anew(models, text, tmp_path, method, victim):
    options = [str(models("llama")), "--nm", "2:4", "--method", method]
    if method != "magnitude":
        options += ["--calibration", str(text), "--samples", "70", "--sequence-length", "32", "--save-masks"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    tsenor = [sys.executable, "-m", "tsenor_cli"]
    subprocess.run([*tsenor, "prune", *options, "-q", "-o", tmp_path / "whole"], check=True, env=environment)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "pids").mkdir()
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "slow.py", "prune", *options, "-o", "out"]
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journals = tmp_path / "out.tsenor-partial"
    until(lambda: all((journals / name).is_file() for name in ("journal", "journal-1")) and noted(journals) >= 6)
    (pid,) = (int(path.name.rpartition("-")[2]) for path in (tmp_path / "pids").glob(f"0-{victim}-*"))
    os.kill(pid, signal.SIGKILL)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert out == "out\n"
    assert len(list((tmp_path / "pids").glob("1-*"))) == 2, "both were started anew"
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not journals.exists()


def noted(folder):
    return sum(path.read_bytes().count(b"\n") - 1 for path in folder.glob("journal*"))


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip")
def test_two_machines(models, tmp_path):
    """Two network namespaces that reach each other and nothing else, the loopback of each being its own."""
    prune(PruneSpec(str(models("llama")), tmp_path / "whole", NMPattern(2, 4)))
    names = [f"tsenor{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
                pytest.skip("no network namespaces here")
        ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.9.0.{number + 1}/24", "dev", f"v{'ab'[number]}")
            ip("-n", name, "link", "set", f"v{'ab'[number]}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "10.9.0.1", "--master-port", "29411"]
        work = ["-m", "tsenor_cli", "prune", str(models("llama")), "--nm", "2:4", "-o", "out"]
        runs = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *TORCHRUN, *options, "--node-rank", str(rank), *work],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, name in enumerate(names)
        ]
        done = [run.communicate(timeout=240) for run in runs]
        assert [run.returncode for run in runs] == [0, 0], done
        assert [out for out, _ in done] == ["out\n", ""]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def test_a_numbered_gpu_is_not_shared(llama, tmp_path):
    spec = PruneSpec(str(llama), tmp_path / "out", NMPattern(2, 4), device="cuda:0")
    with pytest.raises(UsageError, match="one GPU for 2 processes: give cuda"):
        prepare(spec, 2)

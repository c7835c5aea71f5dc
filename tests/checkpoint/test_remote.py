"""--no-cache-input: a model of the hub is pruned shard by shard, and nothing of it is kept."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, read_shards, write_checkpoint
from crash.harness import content
from hub import COMMIT, Hub

from tsenor_cli.checkpoint.hub import Repository, _StoppedError, find_repository
from tsenor_cli.checkpoint.remote import open_remote
from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.distributed import Team
from tsenor_cli.errors import InputRefused, OutputUnavailable, TsenorError, UsageError
from tsenor_cli.observer import Observer
from tsenor_cli.pipeline import merge, plan_prune, prune
from tsenor_cli.specs import CalibrationSpec, NMPattern, Part, PruneSpec

SHARDS = [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama in six shards of about the same size, and a weights file that no index names."""
    directory = make_checkpoint("llama", tmp_path_factory.mktemp("model") / "llama")
    tensors = {name: tensor for shard in read_shards(directory).values() for name, tensor in shard.items()}
    for path in directory.glob("*.safetensors"):
        path.unlink()
    shards: dict[str, dict] = {name: {} for name in SHARDS}
    for name, tensor in sorted(tensors.items(), key=lambda pair: -pair[1].numel()):
        smallest = min(shards.values(), key=lambda shard: sum(t.numel() for t in shard.values()))
        smallest[name] = tensor
    write_checkpoint(directory, shards, json.loads((directory / "config.json").read_text()))
    (directory / "extra").mkdir()
    (directory / "extra" / "more.safetensors").write_bytes(b"anything")
    (directory / "pytorch_model.bin").write_bytes(b"never fetched")
    return directory


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    """Caches and temporary files in places of their own, that tests look into."""
    for name in ("cache", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(model, monkeypatch):
    with Hub(model) as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.endpoint)
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between tries
        yield found


@pytest.fixture
def spec(tmp_path) -> PruneSpec:
    return PruneSpec("org/tiny@main", tmp_path / "place" / "out", NMPattern(2, 4), stream_input=True)


@pytest.fixture
def wanted(hub, spec, tmp_path) -> dict[str, bytes]:
    """What a run gives that downloads the model first."""
    prune(replace(spec, output=tmp_path / "ordinary", stream_input=False))
    hub.asked.clear()
    for path in sorted((tmp_path / "cache").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return whole(tmp_path / "ordinary")


def whole(output: Path) -> dict[str, bytes]:
    """Every file; the report without costs, and without what the files of the input are known by."""
    found = content(output)
    assert found is not None
    report = json.loads(found["tsenor-report.json"])
    del report["identity"]
    return {**found, "tsenor-report.json": json.dumps(report).encode()}


def nothing_is_left(spec: PruneSpec, tmp_path: Path) -> bool:
    """Beside the output, in the cache and in the temporary directory."""
    beside = [path for path in spec.output.parent.iterdir() if path != spec.output]
    return not [*beside, *(tmp_path / "cache").rglob("*.safetensors"), *(tmp_path / "temporary").iterdir()]


def used(*places: Path) -> int:
    """Bytes on the disk of everything in these places; holes are none."""
    total = 0
    for path in chain(places, *(place.rglob("*") for place in places)):
        with suppress(FileNotFoundError):  # it has just gone
            total += path.lstat().st_blocks * 512 if path.is_file() else 0
    return total


class Stops(Observer):
    """Interrupts when the first tensor of a shard is done."""

    def __init__(self, spec: PruneSpec, shard: str) -> None:
        self._names = {item.tensor.name for item in plan_prune(spec).tensors if item.tensor.path.name == shard}

    def advanced(self, name, _nbytes) -> None:
        if name in self._names:
            raise KeyboardInterrupt


def test_the_bytes_are_those_of_an_ordinary_run(hub, spec, wanted, tmp_path):
    report = prune(spec)
    assert whole(spec.output) == wanted
    assert report.model == {**report.model, "source": "org/tiny@main", "revision": COMMIT}
    assert [file for file in hub.fetched() if file in SHARDS] == SHARDS
    assert "pytorch_model.bin" not in hub.fetched()
    assert nothing_is_left(spec, tmp_path)


def test_two_shards_are_on_the_disk_at_the_most(hub, spec, tmp_path):
    """Looked at while each piece of each shard is on its way, when the one before it has long been there."""
    input_directory = Path(f"{spec.output}.tsenor-partial") / "input"
    files, nbytes, elsewhere = [], [], []

    def look(file, _sent):
        if file in SHARDS:
            time.sleep(0.02)
            there = [path for path in input_directory.rglob("*") if path.suffix in {".safetensors", ".incomplete"}]
            files.append(len(there))
            nbytes.append(used(*there))
            elsewhere.append(used(tmp_path / "cache", tmp_path / "temporary"))

    hub.before_piece = look
    prune(spec)
    sizes = [(hub.directory / name).stat().st_size for name in SHARDS]
    assert max(files) == 2
    assert min(sizes) < max(nbytes) < max(map(sum, pairwise(sizes))) + 2 * 4096, "blocks are that large"
    assert max(elsewhere) - min(elsewhere) < min(sizes)


def test_the_next_shard_is_fetched_while_one_is_solved(hub, spec, monkeypatch):
    """Not a tensor of the first shard is read before the second one has been asked for."""
    asked, real = threading.Event(), DiskTensor.read
    hub.before_piece = lambda file, _sent: asked.set() if file == SHARDS[1] else None

    def read(tensor, *arguments, **options):
        assert asked.wait(20)
        return real(tensor, *arguments, **options)

    monkeypatch.setattr(DiskTensor, "read", read)
    prune(spec)


@pytest.mark.parametrize("stopped_in", [0, 3, 5])
def test_a_run_that_was_interrupted_goes_on(hub, spec, wanted, tmp_path, stopped_in):
    with pytest.raises(KeyboardInterrupt):
        prune(spec, Stops(spec, SHARDS[stopped_in]))
    assert not list((tmp_path / "place").rglob("input")), "shards were left lying about"
    hub.asked.clear()
    prune(replace(spec, resume=True))
    assert whole(spec.output) == wanted
    again = [file for file in hub.fetched() if file in SHARDS]
    assert again in (SHARDS[stopped_in:], SHARDS[stopped_in + 1 :])
    assert nothing_is_left(spec, tmp_path)


def test_a_finished_run_fetches_no_shard_again(hub, spec):
    prune(spec)
    hub.asked.clear()
    assert prune(replace(spec, resume=True)).summary.pruned_tensors
    assert not set(hub.fetched()) & set(SHARDS)


@pytest.mark.slow
def test_after_kill_9(hub, spec, wanted, tmp_path):
    """A real process, killed while the fourth shard is on its way and the third one is there."""
    reached, killed = threading.Event(), threading.Event()

    def hold(file, sent):
        if file == SHARDS[3] and sent and not killed.is_set():
            reached.set()
            killed.wait(60)

    hub.before_piece = hold
    command = [sys.executable, "-m", "tsenor_cli", "prune", spec.model, "--nm", "2:4", "--no-cache-input", "-q", "-o"]
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "temporary"),
    }  # fmt: skip
    process = subprocess.Popen([*command, spec.output], env=environment, stderr=subprocess.PIPE, text=True)
    assert reached.wait(120), process.communicate()
    journal = Path(f"{spec.output}.tsenor-partial") / "journal"
    until = time.monotonic() + 60
    while SHARDS[2] not in journal.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed.set()
    assert not spec.output.exists()
    hub.asked.clear()
    done = subprocess.run(
        [*command, spec.output, "--resume"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{spec.output}\n", "")
    found = whole(spec.output)
    del found["tsenor-report.html"], wanted["tsenor-report.html"]  # drawn in the process, and not here
    assert found == wanted
    assert not set(hub.fetched()) & set(SHARDS[:2])
    assert list(spec.output.parent.iterdir()) == [spec.output]
    left = list((tmp_path / "temporary").iterdir())
    assert len(left) == 1, "what the killed process had there, and nothing of the other"
    assert not list(left[0].rglob("*.safetensors.new"))
    assert used(left[0]) < 2**18, "no shard is among it"


@pytest.mark.parametrize("trouble", ["it has gone", "it is cut short", "it is another file"])
def test_a_shard_that_cannot_be_had_ends_the_run_with_a_line(hub, spec, wanted, tmp_path, trouble, tsenor):
    victim = SHARDS[3]

    def happen(file, sent):
        if file == SHARDS[1] and not sent:  # long after planning
            hub.gone |= {victim} if trouble == "it has gone" else set()
            hub.cut |= {victim: 2**12} if trouble == "it is cut short" else {}
            raw = (hub.directory / victim).read_bytes()
            hub.content |= {victim: raw.replace(b"BF16", b"BF61")} if trouble == "it is another file" else {}

    hub.before_piece = happen
    arguments = ["prune", spec.model, "--nm", "2:4", "--no-cache-input", "-q", "-o", spec.output]
    failed = tsenor(*arguments)
    assert (failed.code, failed.out, failed.err.count("\n")) == (1, "", 1), failed
    assert victim in failed.err
    assert failed.err.endswith("the same command with --resume goes on where this one stopped [fetch-failed]\n")
    assert not spec.output.exists()
    hub.before_piece, hub.content, hub.cut, hub.gone = lambda *_: None, {}, {}, set()
    hub.asked.clear()
    assert tsenor(*arguments, "--resume").code == 0
    assert whole(spec.output) == wanted
    assert [file for file in hub.fetched() if file in SHARDS] == SHARDS[3:]
    assert nothing_is_left(spec, tmp_path)


def test_nothing_is_left_when_the_first_shard_cannot_be_had(hub, spec, tmp_path):
    class Goes(Observer):
        def planned(self, _plan) -> None:
            hub.gone.add(SHARDS[0])

    with pytest.raises(TsenorError, match=r"cannot be fetched \(404") as failed:
        prune(spec, Goes())
    assert failed.value.code == "fetch-failed"
    assert nothing_is_left(spec, tmp_path)


@pytest.mark.usefixtures("hub")
def test_a_full_disk_is_called_that(spec, monkeypatch):
    real = Repository._download

    def full(repository, file, *arguments):
        if file == SHARDS[1]:
            raise OSError(errno.ENOSPC, "No space left on device", file)
        return real(repository, file, *arguments)

    monkeypatch.setattr(Repository, "_download", full)
    with pytest.raises(TsenorError, match="No space left") as failed:
        prune(spec)
    assert failed.value.code == "disk-full"


def test_what_ends_a_run_does_not_wait_for_a_download(hub, spec, tmp_path):
    """The first shard has a NaN, and the second one does not come; when it does, it is too late."""
    hub.directory = shutil.copytree(hub.directory, tmp_path / "changed")
    shards = read_shards(hub.directory)
    victim = next(name for name in shards[SHARDS[0]] if "proj" in name)
    shards[SHARDS[0]][victim][0, 0] = torch.nan
    write_checkpoint(hub.directory, shards, json.loads((hub.directory / "config.json").read_text()))
    released = threading.Event()
    hub.before_piece = lambda file, sent: released.wait(60) if file == SHARDS[1] and sent else None
    started = time.monotonic()
    with pytest.raises(InputRefused, match=victim):
        prune(spec)
    assert time.monotonic() - started < 20
    released.set()
    for thread in threading.enumerate():
        if thread.name == f"fetching {SHARDS[1]}":
            thread.join(20)
    assert nothing_is_left(spec, tmp_path)


@pytest.mark.usefixtures("hub")
def test_a_download_that_nobody_waits_for_is_given_up(tmp_path):
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(_StoppedError):
        find_repository("org/tiny", None).fetch_shard(SHARDS[0], tmp_path / "there", stopped)
    assert not list((tmp_path / "there").glob("*.safetensors"))


def test_an_ordinary_download_that_fails_is_refused_in_a_line(hub, spec):
    hub.cut[SHARDS[1]] = 2**12
    with pytest.raises(InputRefused, match="the hub has no usable org/tiny"):
        prune(replace(spec, stream_input=False))


@pytest.mark.parametrize("damage", ["no header", "a header that ends nowhere", "a hole", "cut short", "empty"])
def test_wrong_headers_are_refused_as_those_of_local_files(hub, spec, tmp_path, damage):
    raw = (hub.directory / SHARDS[2]).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    broken = {
        "no header": bytes(len(raw)),
        "a header that ends nowhere": (2**40).to_bytes(8, "little") + raw[8:],
        "a hole": raw[:8]
        + re.sub(rb'"data_offsets":\[0,', rb'"data_offsets":[8,', raw[8 : 8 + length])
        + raw[8 + length :],
        "cut short": raw[:-4],
        "empty": b"",
    }[damage]
    local = tmp_path / "local"
    local.mkdir()
    for path in hub.directory.iterdir():
        if path.is_file():
            (local / path.name).write_bytes(broken if path.name == SHARDS[2] else path.read_bytes())
    with pytest.raises(InputRefused) as here:
        plan_prune(replace(spec, model=str(local), stream_input=False))
    hub.directory = local
    with pytest.raises(InputRefused) as there:
        prune(spec)
    assert there.value.message == here.value.message.replace(str(local), "org/tiny")
    assert (there.value.code, there.value.remedy) == (here.value.code, here.value.remedy)
    assert not list((tmp_path / "temporary").rglob("*.safetensors"))


def test_a_server_that_knows_no_ranges_will_do(hub, spec, wanted):
    hub.knows_ranges = False
    prune(spec)
    assert whole(spec.output) == wanted


def test_a_long_header_is_asked_for_in_full(spec, wanted, monkeypatch):
    monkeypatch.setattr("tsenor_cli.checkpoint.hub._MOST_HEADERS", 64)
    prune(spec)
    assert whole(spec.output) == wanted


def test_of_a_shard_nothing_but_its_header_is_fetched_for_a_plan(hub, spec, tmp_path):
    plan = plan_prune(spec)
    local = plan_prune(replace(spec, model=str(hub.directory), stream_input=False))
    facts = [(item.tensor.name, item.tensor.shape, item.tensor.path.name, item.reason) for item in plan.tensors]
    assert facts == [(i.tensor.name, i.tensor.shape, i.tensor.path.name, i.reason) for i in local.tensors]
    assert plan.checkpoint.nbytes == local.checkpoint.nbytes
    assert not set(hub.fetched()) & set(SHARDS)
    with pytest.raises(FileNotFoundError):
        plan.tensors[0].tensor.read()  # a hole would read as zeros
    pickle.loads(pickle.dumps(plan))  # as processes of a team do
    del plan
    assert not list((tmp_path / "temporary").iterdir())


def test_the_dry_run_says_that_the_network_is_left_out(hub, tsenor):
    planned = tsenor("prune", "org/tiny", "--nm", "2:4", "--no-cache-input", "--dry-run")
    assert (planned.code, planned.err) == (0, "")
    assert "as if the hub were never waited for" in planned.out
    assert not set(hub.fetched()) & set(SHARDS)


def test_a_single_file_will_do(hub, spec, tmp_path):
    hub.directory = make_checkpoint("llama", tmp_path / "single")
    shards = read_shards(hub.directory)
    for path in hub.directory.glob("model*"):
        path.unlink()
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    config = json.loads((hub.directory / "config.json").read_text())
    write_checkpoint(hub.directory, {"model.safetensors": tensors}, config)
    spec = replace(spec, save_masks=True)
    prune(spec)
    prune(replace(spec, model=str(hub.directory), output=tmp_path / "ordinary", stream_input=False))
    for file in ("model.safetensors", "tsenor-masks/model.safetensors"):
        assert (spec.output / file).read_bytes() == (tmp_path / "ordinary" / file).read_bytes()


def test_parts_fetch_their_own_shards(hub, spec, wanted):
    for number in (1, 2):
        hub.asked.clear()
        prune(replace(spec, part=Part(number, 2)))
        assert len(set(hub.fetched()) & set(SHARDS)) == 3
    merge(spec.output)
    found = whole(spec.output)
    assert {name: found[name] for name in SHARDS} == {name: wanted[name] for name in SHARDS}


def test_another_commit_is_another_run(hub, spec):
    with pytest.raises(KeyboardInterrupt):
        prune(spec, Stops(spec, SHARDS[2]))
    hub.commit = "f" * 40
    with pytest.raises(OutputUnavailable, match=f"the commit of the model was {COMMIT} and is ffff"):
        prune(replace(spec, resume=True))


def test_other_content_is_another_run_even_under_the_same_commit(hub, spec, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prune(spec, Stops(spec, SHARDS[2]))
    changed = shutil.copytree(hub.directory, tmp_path / "changed")
    raw = (changed / SHARDS[4]).read_bytes()
    (changed / SHARDS[4]).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    hub.directory = changed
    with pytest.raises(OutputUnavailable, match=re.escape(f"{SHARDS[4]} in the model was")):
        prune(replace(spec, resume=True))


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "/outside", "C:\\outside", "a//b", "./a", "a\\..\\..\\outside", ""]
)
def test_names_that_lead_elsewhere_are_refused_before_anything_is_fetched(hub, spec, tmp_path, name):
    hub.names = [name]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputRefused) as refused:
        prune(spec)
    assert refused.value.code == "unsafe-file"
    assert not hub.asked
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_leads_elsewhere_is_refused(hub, spec, tmp_path):
    hub.directory = shutil.copytree(hub.directory, tmp_path / "changed")
    index = hub.directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(SHARDS[0], "../" + SHARDS[0]))
    with pytest.raises(InputRefused) as refused:
        prune(spec)
    assert refused.value.code == "unsafe-index"


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda", "calibration": CalibrationSpec("text.txt")},
        {"eval_text": "text.txt"},
        {"allow_nonfinite": True},
        {"model": "."},
    ],
)
def test_what_it_cannot_go_with_is_refused_at_once(spec, options):
    with pytest.raises(UsageError) as refused:
        prune(replace(spec, **options))
    assert refused.value.code == "cannot-stream"
    with pytest.raises(UsageError):
        plan_prune(replace(spec, **options))


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_refused(spec, name, monkeypatch):
    monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError, match="fetches from the hub"):
        open_remote(spec.model)


def test_several_processes_are_refused(spec):
    team = Team(size=2)
    with pytest.raises(UsageError, match="--shard"):
        prune(spec, team=team)


@pytest.mark.parametrize("model", ["org/nowhere", "org/tiny@nothing", "no-id"])
@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have_is_refused(spec, model):
    with pytest.raises(InputRefused) as refused:
        prune(replace(spec, model=model))
    assert refused.value.code == "no-checkpoint"
    assert "\n" not in str(refused.value)


def test_a_hub_that_is_not_there_is_refused(hub, spec):
    hub.__exit__()
    with pytest.raises(InputRefused, match="check the name, the revision, HF_TOKEN and the network"):
        prune(spec)


def test_the_space_for_two_shards_is_checked(hub, spec, monkeypatch):
    sizes = [(hub.directory / name).stat().st_size for name in SHARDS]
    needed = sum(sizes) + max(map(sum, pairwise(sizes)))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(TsenorError, match=r"and [\d,]+ two shards of the input at a time") as failed:
        prune(spec)
    assert failed.value.code == "disk-full"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed + 2**20))  # and the other files
    prune(spec)

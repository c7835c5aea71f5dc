"""`tsenor finetune`: the pattern holds, interruptions cost nothing, the output lies as the input did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import add_tokenizer, make_checkpoint, read_shards, write_checkpoint

import tsenor_cli.training.trainer
from tsenor_cli.checkpoint.adapter.whole import load_model
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.errors import CheckFailed, InputRefused, TsenorError
from tsenor_cli.observer import Observer
from tsenor_cli.pipeline import finetune, prune, verify
from tsenor_cli.specs import FinetuneSpec, NMPattern, PruneSpec

PATTERN = NMPattern(2, 4)
ARCHITECTURES = ["llama", "gpt2", "qwen3_moe", "gpt_oss"]  # plain, renamed and transposed, joined experts, fused ones


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("sparse"), {}

    def pruned(name):
        if name not in made:
            dense = add_tokenizer(make_checkpoint(name, folder / f"{name}-dense"))
            prune(PruneSpec(str(dense), folder / name, PATTERN))
            made[name] = folder / name
        return made[name]

    return pruned


def spec(model, output, text, **options):
    given = {"sequence_length": 16, "steps": 6, "batch_size": 2, "learning_rate": 1e-2, "save_every": 2, **options}
    return FinetuneSpec(str(model), output, str(text), **given)


def tensors(directory):
    return {name: tensor for shard in read_shards(directory).values() for name, tensor in shard.items()}


def zeros(tensor):
    return tensor == 0


def test_checkpoints_of_the_training_need_space_too(sparse, text, tmp_path, monkeypatch):
    """Three, of weights and two moments in float32 each, while Trainer changes one for the next."""
    source = sparse("llama")
    checkpoint = open_checkpoint(source)
    needed = checkpoint.nbytes + checkpoint.other_bytes
    needed += 3 * 12 * sum(tensor.parameters for tensor in checkpoint.tensors.values())
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=needed - 1))
    with pytest.raises(TsenorError, match="free and the output needs"):
        finetune(spec(source, tmp_path / "out", text))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pattern_and_the_layout_hold(architecture, sparse, text, tmp_path):
    source = sparse(architecture)
    report = finetune(spec(source, tmp_path / "out", text, accumulate=2, weight_decay=0.1, clip=0.5))
    assert verify(str(tmp_path / "out")).ok
    before, after = tensors(source), tensors(tmp_path / "out")
    facts = {name: (tensor.dtype, tensor.shape) for name, tensor in before.items()}
    assert facts == {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()}
    assert [file.name for file in sorted(source.iterdir())] == [
        file.name for file in sorted((tmp_path / "out").iterdir())
    ]
    pruned = [record.name for record in report.tensors if record.action == "pruned" and "mtp" not in record.name]
    for name in pruned:
        assert torch.equal(zeros(before[name]), zeros(after[name]))
        assert not torch.equal(before[name], after[name])
    assert report.perplexity["after"]["perplexity"] < report.perplexity["before"]["perplexity"]
    assert len(report.training["losses"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_what_transformers_loads_is_what_was_trained(architecture, sparse, text, tmp_path, monkeypatch):
    trained = {}

    def train(model, *arguments):
        losses = tsenor_cli.training.trainer.train(model, *arguments)
        trained.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return losses

    monkeypatch.setattr("tsenor_cli.training.finetune.train", train)
    finetune(spec(sparse(architecture), tmp_path / "out", text))
    loaded = load_model(open_checkpoint(tmp_path / "out"))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16), trained[name].to(torch.bfloat16))


@pytest.mark.gpu
def test_on_a_card(sparse, text, tmp_path):
    """As on the CPU but for the rounding of bfloat16 products, and stopped half-way it goes on."""
    pytest.importorskip("jsonschema", reason="reading a report needs it")
    source = sparse("llama")
    there, here = (
        finetune(spec(source, tmp_path / device, text, device=device, accumulate=2, weight_decay=0.1))
        for device in ("cuda", "cpu")
    )
    assert there.training["losses"] == pytest.approx(here.training["losses"], rel=0.02)
    assert verify(str(tmp_path / "cuda")).ok
    for name, tensor in tensors(source).items():
        assert torch.equal(zeros(tensor), zeros(tensors(tmp_path / "cuda")[name])) or not zeros(tensor).any()
    with pytest.raises(KeyboardInterrupt):
        finetune(spec(source, tmp_path / "out", text, device="cuda", accumulate=2, weight_decay=0.1), _Stops(4))
    again = finetune(spec(source, tmp_path / "out", text, device="cuda", accumulate=2, weight_decay=0.1, resume=True))
    assert again.training["losses"] == pytest.approx(there.training["losses"], rel=1e-3)


class _Stops(Observer):
    def __init__(self, step):
        self._step = step

    def trained(self, step, _steps, _loss):
        if step == self._step:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(("step", "architecture"), [(1, "llama"), (4, "llama"), (4, "qwen3_moe"), (4, "mixtral")])
def test_an_interrupted_run_goes_on_to_the_same_bytes(step, architecture, sparse, text, tmp_path):
    """Also where weights lie on disk by other names than in the model."""
    source = sparse(architecture)
    whole = finetune(spec(source, tmp_path / "whole", text))
    with pytest.raises(KeyboardInterrupt):
        finetune(spec(source, tmp_path / "out", text), _Stops(step))
    assert not (tmp_path / "out").exists()
    seen = []

    class Seen(Observer):
        def trained(self, step, _steps, _loss):
            seen.append(step)

    resumed = finetune(spec(source, tmp_path / "out", text, resume=True), Seen())
    assert seen[0] == (step - 1) // 2 * 2 + 1  # after the last whole checkpoint
    assert resumed.training == whole.training
    assert resumed.identity == whole.identity
    for file in read_shards(tmp_path / "whole"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_run_that_was_interrupted_after_training_trains_no_more(architecture, sparse, text, tmp_path, monkeypatch):
    source, options = (
        sparse(architecture),
        {"warmup": 1.0},
    )  # the rate is not 0 at the end, so that one step more would show
    whole = finetune(spec(source, tmp_path / "whole", text, **options))
    with monkeypatch.context() as patch:
        patch.setattr("tsenor_cli.training.finetune._write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(spec(source, tmp_path / "out", text, **options))
    resumed = finetune(spec(source, tmp_path / "out", text, resume=True, **options))
    assert resumed.training == whole.training
    for file in read_shards(tmp_path / "whole"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.mark.slow
def test_a_torn_checkpoint_is_passed_over(sparse, text, tmp_path):
    """As a power cut may leave it: the one before serves."""
    whole = finetune(spec(sparse("llama"), tmp_path / "whole", text))
    with pytest.raises(KeyboardInterrupt):
        finetune(spec(sparse("llama"), tmp_path / "out", text), _Stops(5))
    with (tmp_path / "out.tsenor-partial" / "trainer" / "checkpoint-4" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    resumed = finetune(spec(sparse("llama"), tmp_path / "out", text, resume=True))
    assert resumed.training == whole.training


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0", ["could not be written", "[disk-full]"]),
        ("CUDA out of memory. Tried to allocate 1 GiB", ["--batch-size", "[out-of-memory]"]),
    ],
)
def test_what_the_machine_refuses(tsenor, sparse, text, tmp_path, monkeypatch, failure, words):
    def train(*_, **__):
        raise RuntimeError(failure)

    monkeypatch.setattr(tsenor_cli.training.trainer.Trainer, "train", train)
    done = tsenor("finetune", sparse("llama"), "--text", text, "--sequence-length", 16, "-o", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert all(word in done.err for word in words)
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_killed_and_resumed(sparse, text, tmp_path):
    """A real process, a real signal: what is left is the journal and the last whole checkpoint of Trainer."""
    options = ["--sequence-length=16", "--steps=60", "--batch-size=2", "--learning-rate=1e-2", "--save-every=5"]

    def command(out, *more):
        return [
            sys.executable,
            "-m",
            "tsenor_cli",
            "finetune",
            sparse("llama"),
            "--text",
            text,
            "-o",
            out,
            *options,
            *more,
        ]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True)
    out, journal = tmp_path / "out", tmp_path / "out.tsenor-partial" / "journal"
    with subprocess.Popen(command(out), env=environment, stderr=subprocess.DEVNULL) as running:
        while not (journal.is_file() and journal.read_text().count('"saved"') >= 2):
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()
    assert not out.exists()
    done = subprocess.run(command(out), env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 5
    assert "[unfinished-run]" in done.stderr
    subprocess.run(command(out, "--resume"), env=environment, check=True, capture_output=True)
    for file in read_shards(out):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_lost_pattern_is_no_output(sparse, text, tmp_path, monkeypatch):
    def train(model, *_):
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.up_proj.weight").fill_(1)
        return [1.0]

    monkeypatch.setattr("tsenor_cli.training.finetune.train", train)
    with pytest.raises(CheckFailed, match=r"up_proj\.weight: .* weights that the mask drops are not zero"):
        finetune(spec(sparse("llama"), tmp_path / "out", text))
    assert not list(tmp_path.glob("out*"))


def test_a_diverged_model_is_no_output(sparse, text, tmp_path, monkeypatch):
    def train(model, *_):
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(torch.inf).nan_to_num_(0, torch.inf)
        return [1.0]

    monkeypatch.setattr("tsenor_cli.training.finetune.train", train)
    with pytest.raises(CheckFailed, match=r"diverged.*the loss is nan"):
        finetune(spec(sparse("llama"), tmp_path / "out", text))
    assert not (tmp_path / "out").exists()


def test_a_weight_that_would_not_come_back_is_refused(sparse, text, tmp_path, monkeypatch):
    from tsenor_cli.checkpoint.adapter import whole

    monkeypatch.setattr(whole, "revert_weight_conversion", lambda _model, state: {k: v + 1 for k, v in state.items()})
    with pytest.raises(InputRefused, match="does not come back from transformers as it went in"):
        finetune(spec(sparse("llama"), tmp_path / "out", text))
    assert not (tmp_path / "out").exists()


def test_what_launchers_set_changes_no_bit(sparse, text, tmp_path, monkeypatch):
    finetune(spec(sparse("llama"), tmp_path / "out", text, steps=2))
    launched = {"ACCELERATE_MIXED_PRECISION": "bf16", "LOCAL_RANK": "0", "WORLD_SIZE": "one", "PMI_SIZE": "2"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    finetune(spec(sparse("llama"), tmp_path / "launched", text, steps=2))
    for file in read_shards(tmp_path / "out"):
        assert (tmp_path / "launched" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert launched.items() <= os.environ.items()


def test_it_trains_on_the_gpu_that_was_asked_for(text, tmp_path, monkeypatch):
    """Trainer would take the first one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr("tsenor_cli.training.trainer.autocasts", lambda _: False)
    asked = torch.device("cuda:1")
    arguments = tsenor_cli.training.trainer._arguments(spec("model", tmp_path, text), asked, tmp_path)
    assert (arguments.device, arguments.n_gpu, current[-1]) == (asked, 1, asked)


def test_a_pattern_that_is_lost_already_is_refused_before_the_work(sparse, text, tmp_path, monkeypatch):
    monkeypatch.setattr("tsenor_cli.training.finetune._perplexity", lambda *_: pytest.fail("it has begun"))
    source = shutil.copytree(sparse("llama"), tmp_path / "dense-again")
    shards = {file: {name: tensor + 1 for name, tensor in shard.items()} for file, shard in read_shards(source).items()}
    write_checkpoint(source, shards, json.loads((source / "config.json").read_text()))
    with pytest.raises(InputRefused, match="is not 2:4 any more"):
        finetune(spec(source, tmp_path / "out", text))
    assert not list(tmp_path.glob("out*"))


def test_training_that_diverges_stops_at_once(tsenor, sparse, text, tmp_path):
    options = [
        "--sequence-length",
        16,
        "--batch-size",
        2,
        "--learning-rate",
        1e30,
        "--warmup",
        0,
        "-o",
        tmp_path / "out",
    ]
    done = tsenor("finetune", sparse("llama"), "--text", text, *options)
    assert (done.code, done.out) == (4, "")
    assert "training has diverged: the loss of step" in done.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("real_page")
def test_at_the_command_line(tsenor, sparse, text, tmp_path):
    out = tmp_path / "out"
    options = ["--steps", 4, "--batch-size", 2, "--sequence-length", 16, "--eval", text, "-o", out]
    done = tsenor("finetune", sparse("llama"), "--text", text, *options, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (
        report["training"]["pruning"]["identity"]
        == json.loads((sparse("llama") / "tsenor-report.json").read_text())["identity"]
    )
    assert "Traceback" not in done.err
    assert tsenor("verify", out).code == 0
    against = tsenor("verify", out, "--against", sparse("llama"))
    assert against.code == 0, against.err
    assert "fine-tuned, in the shapes of" in against.out
    again = tsenor("finetune", sparse("llama"), "--text", text, *options)
    assert (again.code, again.out) == (5, "")
    assert "[output-exists]" in again.err
    assert tsenor("finetune", sparse("llama"), "--text", text, *options, "--resume", "-q").out == f"{out}\n"
    assert tsenor("report", out, "-o", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "transposable, magnitude, fine-tuned" in page
    assert (
        f"tsenor finetune {sparse('llama')} --text {text} --batch-size 2 --sequence-length 16 --steps 4 --eval {text}"
        in page
    )
    assert tsenor("finetune", out, "--text", text, *options[:-1], tmp_path / "second", "-q").code == 0


def test_what_is_refused(tsenor, sparse, text, tmp_path, monkeypatch):
    def refused(model, *options):
        done = tsenor("finetune", model, "--text", text, "-o", tmp_path / "out", *options)
        assert done.out == ""
        assert len(done.err.splitlines()) == 1
        assert not list(tmp_path.glob("out*"))
        return done.code, done.err

    plain = shutil.copytree(sparse("llama"), tmp_path / "plain")
    (plain / "tsenor-report.json").unlink()
    assert refused(plain)[0] == 3
    code, error = refused(sparse("llama"), "--sequence-length", 32, "--text", tmp_path / "none.txt")
    assert code == 3
    (tmp_path / "short.txt").write_text("a" * 40)
    code, error = refused(sparse("llama"), "--sequence-length", 32, "--text", tmp_path / "short.txt")
    assert code == 3
    assert "[too-few-tokens]" in error
    monkeypatch.setattr("tsenor_cli.training.finetune.find_spec", lambda _name: None)
    code, error = refused(sparse("llama"))
    assert code == 2
    assert "pip install 'tsenor[train]'" in error

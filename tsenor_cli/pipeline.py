"""The map: resolve → open → plan → prune (layer by layer what needs calibration, the rest band by band) → record.

`plan_prune`, `prune`, `verify` and `evaluate` are all that the command line and the library call; every room is reached
from here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tsenor_cli.checkpoint.journal import Identity, Journal
from tsenor_cli.checkpoint.parts import bring_together, find_parts, part_directory
from tsenor_cli.checkpoint.plan import Plan, enforce, make_plan
from tsenor_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tsenor_cli.checkpoint.remote import fetched, open_remote
from tsenor_cli.checkpoint.source import resolve_checkpoint
from tsenor_cli.checkpoint.staging import (
    Staged,
    already_finished,
    check_output,
    check_space,
    joined_output,
    staged_output,
)
from tsenor_cli.checkpoint.verifier import Verification, verify_checkpoint
from tsenor_cli.checkpoint.writer import PAGE_FILE, REPORT_FILE, OutputShards, copy_file, write_text
from tsenor_cli.device import device_name, find_device
from tsenor_cli.distributed import Team
from tsenor_cli.distribution import share_out, share_shards
from tsenor_cli.errors import InputRefused, UsageError
from tsenor_cli.forecast import PLANNED, Forecast, forecast, planned_like
from tsenor_cli.identity import run_identity
from tsenor_cli.observer import Observer
from tsenor_cli.pruners.alps import Alps
from tsenor_cli.pruners.base import BoundSolver, Pruner
from tsenor_cli.pruners.magnitude import Magnitude
from tsenor_cli.pruners.sparsegpt import SparseGPT
from tsenor_cli.pruners.wanda import Wanda
from tsenor_cli.rates import measure_rates
from tsenor_cli.report.build import build_report
from tsenor_cli.report.card import CARD_FILE, model_card
from tsenor_cli.report.costs import Costs
from tsenor_cli.report.merge import merge_reports
from tsenor_cli.report.read import read_report
from tsenor_cli.report.records import Report, TensorRecord
from tsenor_cli.report.sample import sampled_bytes, take_samples
from tsenor_cli.specs import CALIBRATED, METHODS, UPDATING, Cluster, NMPattern, PruneSpec
from tsenor_cli.streaming import Streaming, leave_nonfinite

if TYPE_CHECKING:
    from tsenor_cli.calibration.perplexity import Perplexity
    from tsenor_cli.calibration.tokens import TextTokens


def plan_prune(spec: PruneSpec) -> Plan:
    """Decide what would be done to every tensor, from headers alone; nothing is written."""
    _check_methods(spec)
    _solvers(spec)
    return _plan(_open(spec), spec)


@dataclass(frozen=True)
class _Job:
    """A run that has been thought through: what every process of it knows before it begins."""

    spec: PruneSpec
    output: Path
    checkpoint: Checkpoint
    plan: Plan  # of all of it, or of this part
    tokens: TextTokens | None
    eval_tokens: TextTokens | None
    identity: Identity

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return find_device(self.spec.device)


def predict(spec: PruneSpec, plan: Plan, cluster: Cluster | None = None) -> Forecast:
    """How long a planned run would take and what it would need, here or on `cluster`.

    Here, rates are measured in two seconds or so; a file of up to 1 GiB is written beside the output and is gone.
    """
    tokens = 0
    if spec.calibration is not None and plan.calibrated:
        from tsenor_cli.checkpoint.adapter.tokenizer import window_length

        tokens = spec.calibration.samples * window_length(plan.checkpoint, spec.calibration.sequence_length)
    if cluster is not None:
        return forecast(plan, PLANNED[cluster.type], cluster.ranks, tokens)
    device = find_device(spec.device)
    if device.type != "cpu":
        return forecast(plan, planned_like(device_name(device)), tokens=tokens)
    return forecast(plan, measure_rates(plan, _absolute(spec.output), _solvers(spec)), tokens=tokens)


def prune(spec: PruneSpec, observer: Observer | None = None, team: Team | None = None) -> Report:
    """Prune the checkpoint `spec.model` into `spec.output`, streaming tensors from disk to disk.

    In memory are a band of a tensor, or, where calibration is needed, one decoder layer with what it needs (see
    Plan.memory). The output appears only when it is complete. A run that was interrupted at any time can go on with
    `spec.resume`, and gives the bytes of one that was not.

    Args:
        spec: what to do.
        observer: told how it goes.
        team: the processes that do it together, each of them calling this (distributed.py); None for this one alone.

    Raises:
        UsageError, InputRefused, CheckFailed, OutputUnavailable, TsenorError: see errors.py and staged_output.
    """
    team, costs = team or Team(), Costs()
    observer = team.observer(observer or Observer())
    if team.restarted and spec.resume is None:
        spec = replace(spec, resume=True)
    job = team.first(lambda: _prepare(spec, team.size))
    if isinstance(job, Report):
        return job
    observer.planned(job.plan)
    costs.spent("planning")
    with _staged(job, team) as staged:
        before = _noted_perplexity(job, staged, observer, team)
        if before is not None:
            costs.spent("perplexity")
        writers = share_out(job.plan, team.nodes)
        mine = {name for name, rank in writers.items() if rank == team.rank}
        shards = team.in_turn(lambda: OutputShards(job.plan.checkpoint, staged.directory, mine))
        records = _finished(staged.journal, job.plan, shards, observer, mine)
        if records:
            costs.spent("resuming")
        for record in _written(job, set(records), shards, staged, observer, team, writers):
            staged.journal.note("tensor", asdict(record))
            records[record.name] = record
            _count(record, costs)
            if record.action == "pruned":
                observer.pruned(record)
        shards.sync()
        team.wait()
        for part in team.gather(records):
            records |= part
        if spec.part is None or spec.part.number == 1:
            team.first(lambda: _copy_the_rest(job.checkpoint, staged.directory))
        costs.spent("finishing")
        after = _perplexity(job, staged.directory, observer, team)
        if after is not None:
            costs.spent("perplexity")
        costs.join(team.gather(costs.of_process))
        perplexity = {"before": before, "after": after} if before and after else None
        return team.first(lambda: _finish(job, staged, shards, records, costs, perplexity))


def _prepare(spec: PruneSpec, processes: int) -> _Job | Report:
    """Everything that can be refused before a byte is written; the report, if all has been done already."""
    output = _absolute(spec.output)
    if spec.part is not None:
        output = part_directory(output, spec.part)
    _check_methods(spec)
    if spec.stream_input and processes > 1:
        raise UsageError(
            "--no-cache-input is for one process", "make parts with --shard instead of torchrun", code="cannot-stream"
        )
    device = find_device(spec.device)
    _solvers(spec)
    checkpoint = _open(spec)
    check_output(output, checkpoint.directory, overwrite=spec.overwrite or spec.resume is True)
    plan = _plan(checkpoint, spec)
    if spec.allow_nonfinite:
        plan = leave_nonfinite(plan)
    enforce(plan, spec)
    tokens, eval_tokens = _calibration_tokens(spec, plan), _eval_tokens(spec, checkpoint)
    identity = run_identity(spec, plan, device_name(device), tokens, eval_tokens)
    if spec.resume and already_finished(output, identity):
        return read_report(output)
    check_output(output, checkpoint.directory, overwrite=spec.overwrite)
    if spec.part is not None:
        plan = plan.restricted_to(share_shards(plan, [1.0] * spec.part.count)[spec.part.number - 1])
    check_space(output, plan.checkpoint.nbytes, plan.checkpoint.fetched_bytes)
    return _Job(spec, output, checkpoint, plan, tokens, eval_tokens, identity)


def _open(spec: PruneSpec) -> Checkpoint:
    """The input, its headers checked."""
    return open_remote(spec.model) if spec.stream_input else open_checkpoint(*resolve_checkpoint(spec.model))


@contextmanager
def _staged(job: _Job, team: Team) -> Iterator[Staged]:
    """The place where the output is made, which the first process keeps for all."""
    with ExitStack() as stack:
        spec = job.spec
        stack.callback(job.checkpoint.close)
        make = partial(staged_output, job.output, job.identity, overwrite=spec.overwrite, resume=spec.resume)
        staged = team.first(lambda: stack.enter_context(make()))
        yield staged if team.rank == 0 else stack.enter_context(joined_output(job.output, staged, team.rank))


def _copy_the_rest(checkpoint: Checkpoint, target: Path) -> None:
    """Everything that an output has of its input beside the shards."""
    for relative in checkpoint.other_files:
        copy_file(checkpoint.directory / relative, target / relative)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow a link)


def _finish(
    job: _Job,
    staged: Staged,
    shards: OutputShards,
    records: Mapping[str, TensorRecord],
    costs: Costs,
    perplexity: dict[str, Any] | None,
) -> Report:
    """The samples, the report, and what is written of it."""
    spec, plan = job.spec, job.plan
    tile, histogram = take_samples(plan.pruned, shards.there)
    costs.spent("finishing")
    report = build_report(
        spec,
        job.identity,
        plan,
        [records[item.tensor.name] for item in plan.tensors],
        {name: pruner.citation for name, pruner in _pruners(spec).items()},
        costs,
        device_name(job.device),
        job.tokens.to_dict() if job.tokens is not None else None,
        perplexity,
        tile,
        histogram,
    )
    if spec.part is None:
        _write_pages(report, job.checkpoint, staged.directory)
    write_text(staged.directory / REPORT_FILE, report.to_json())
    return report


def _write_pages(report: Report, original: Checkpoint, directory: Path) -> None:
    """What people read of a run."""
    write_text(directory / CARD_FILE, model_card(original, str(report.model["source"]), report))
    write_text(directory / PAGE_FILE, _page(report))


def merge(output: Path, *, overwrite: bool = False) -> Report:
    """Put the parts together that runs with `spec.part` have made of `output`; they go when it is complete.

    Raises:
        InputRefused: a part is missing or damaged, or is of another run than the others.
        OutputUnavailable, TsenorError: as prune.
    """
    output = _absolute(output)
    parts = find_parts(output)
    reports = [read_report(part) for part in parts]
    for part, other in zip(parts[1:], reports[1:], strict=True):
        if other.identity != reports[0].identity:
            raise InputRefused(
                f"{part} and {parts[0]} are not of one run",
                "make all parts with the same options, versions and model",
                code="parts-differ",
            )
    report = merge_reports(reports)
    identity = {"parts": report.identity}
    with staged_output(output, identity, overwrite=overwrite, resume=False) as staged:
        bring_together(parts, staged.directory, left_out=(REPORT_FILE,))
        merged = open_checkpoint(staged.directory, report.model["revision"])
        if merged.tensors.keys() != {record.name for record in report.tensors}:
            raise InputRefused(
                f"the parts of {output} do not have the tensors that their reports name",
                "they are damaged: make them again",
                code="parts-differ",
            )
        _write_pages(report, merged, staged.directory)
        write_text(staged.directory / REPORT_FILE, report.to_json())
    for part in parts:
        shutil.rmtree(part)
    return report


def verify(
    model: str, pattern: NMPattern | None = None, against: str | None = None, observer: Observer | None = None
) -> Verification:
    """Check a pruned checkpoint from its files alone (see verifier.py); failures are in the result.

    Raises:
        CheckFailed: no pattern is given and the checkpoint carries no report that claims one.
        InputRefused: a checkpoint cannot be read.
    """
    original = open_checkpoint(*resolve_checkpoint(against)) if against is not None else None
    checkpoint = open_checkpoint(*resolve_checkpoint(model))
    return verify_checkpoint(checkpoint, pattern, original, (observer or Observer()).advanced)


def evaluate(
    models: Sequence[str],
    text: str,
    *,
    field: str = "text",
    sequence_length: int | None = None,
    max_windows: int | None = None,
    memory_budget: int | None = None,
    device: str = "auto",
    observer: Observer | None = None,
) -> list[Perplexity]:
    """Perplexity of checkpoints on a text, one decoder layer in memory at a time (see calibration/perplexity.py).

    All of them see the same tokens, those of the first one's tokenizer.

    Raises:
        UsageError: their tokenizers differ, so that figures would say nothing; or the text cannot be one.
        InputRefused: the text or a checkpoint cannot be used.
        TsenorError: a loss is not finite.
    """
    from tsenor_cli.checkpoint.adapter.tokenizer import CheckpointTokenizer

    checkpoints = [open_checkpoint(*resolve_checkpoint(model)) for model in models]
    if len({CheckpointTokenizer(checkpoint.directory).fingerprint for checkpoint in checkpoints}) > 1:
        raise UsageError("the tokenizers of these models differ: perplexities cannot be compared", "give one model")
    tokens = _text_tokens(checkpoints[0], text, field, sequence_length, max_windows)
    place = find_device(device)
    return [_measure(checkpoint, tokens, observer or Observer(), memory_budget, place) for checkpoint in checkpoints]


def _page(report: Report) -> str:
    from tsenor_cli.report.page import report_page  # and with it matplotlib, which only this needs

    return report_page(report)


def _count(record: TensorRecord, costs: Costs) -> None:
    """A tensor is done: what was not spent in its method went to running layers, or to waiting for files."""
    masks, method = record.solver_seconds or 0.0, record.seconds or 0.0
    costs.spent("layers", masks=masks, weights=method - masks)


def _finished(
    journal: Journal, plan: Plan, shards: OutputShards, observer: Observer, mine: Collection[str]
) -> dict[str, TensorRecord]:
    """What an interrupted run has done of the tensors that are `mine`, as far as it is really there."""
    found = {}
    for record in (TensorRecord(**facts) for facts in journal.notes("tensor")):
        tensor = plan.by_name[record.name].tensor
        if record.name in mine and record.name not in found and shards.has(tensor, record.sha256):
            observer.advanced(record.name, tensor.nbytes)
            found[record.name] = record
    return found


def _written(
    job: _Job,
    done: set[str],
    shards: OutputShards,
    staged: Staged,
    observer: Observer,
    team: Team,
    writers: Mapping[str, int],
) -> Iterator[TensorRecord]:
    """Write what is not `done` of this process's tensors.

    All processes go together through the layers with what needs calibration; the rest each does alone, band by band.
    """
    spec, plan = job.spec, job.plan
    pruners, solvers = _pruners(spec), _solvers(spec)
    done = set().union(*team.gather(done))
    if job.tokens is not None and any(item.calibrated and item.tensor.name not in done for item in plan.tensors):
        from tsenor_cli.layerwise import Layerwise

        layerwise = Layerwise(plan, pruners, solvers, job.device, spec.few_tokens, shards, observer, team, writers)
        for record in layerwise.run(job.tokens.windows, staged.scratch if plan.spills else None, frozenset(done)):
            yield record
            done.add(record.name)
    left = (item for item in plan.tensors if writers[item.tensor.name] == team.rank and item.tensor.name not in done)
    forgetful = job.checkpoint.outgrows_cache
    streaming = Streaming(pruners, solvers, job.device, shards, observer, forgetful=forgetful)
    for group in fetched(plan.checkpoint, left, staged.scratch, sampled_bytes(plan.pruned)):
        yield from streaming.run(group)


def _noted_perplexity(job: _Job, staged: Staged, observer: Observer, team: Team) -> dict[str, Any] | None:
    """The perplexity before pruning, measured once however often the run is interrupted."""
    if job.eval_tokens is not None and not staged.journal.notes("perplexity"):
        found = _perplexity(job, job.plan.checkpoint.directory, observer, team)
        assert found is not None
        staged.journal.note("perplexity", found)
    return next(iter(staged.journal.notes("perplexity")), None)


def _perplexity(job: _Job, directory: Path, observer: Observer, team: Team) -> dict[str, Any] | None:
    if job.eval_tokens is None:
        return None
    return _measure(
        open_checkpoint(directory), job.eval_tokens, observer, job.spec.memory_budget, job.device, team
    ).to_dict()


def _text_tokens(
    checkpoint: Checkpoint, text: str, field: str, sequence_length: int | None, limit: int | None = None
) -> TextTokens:
    """The windows of a text that perplexity is measured on."""
    from tsenor_cli.calibration.tokens import all_windows
    from tsenor_cli.checkpoint.adapter.tokenizer import CheckpointTokenizer, window_length

    length = window_length(checkpoint, sequence_length)
    return all_windows(text, CheckpointTokenizer(checkpoint.directory), length=length, limit=limit, field=field)


def _measure(
    checkpoint: Checkpoint,
    tokens: TextTokens,
    observer: Observer,
    memory_budget: int | None,
    device: torch.device,
    team: Team | None = None,
) -> Perplexity:
    from tsenor_cli.calibration.perplexity import measure_perplexity

    return measure_perplexity(checkpoint, tokens, observer, memory_budget, device, team or Team())


def _eval_tokens(spec: PruneSpec, checkpoint: Checkpoint) -> TextTokens | None:
    """The text to measure perplexity on before and after, in windows like those of the calibration."""
    if spec.eval_text is None:
        return None
    field, length = spec.eval_windows
    return _text_tokens(checkpoint, spec.eval_text, field, length)


def _calibration_tokens(spec: PruneSpec, plan: Plan) -> TextTokens | None:
    """The tokens that calibrated methods see, if any tensor gets one."""
    if not plan.calibrated:
        return None
    from tsenor_cli.calibration.tokens import calibration_windows
    from tsenor_cli.checkpoint.adapter.tokenizer import CheckpointTokenizer, window_length

    wanted = spec.calibration
    assert wanted is not None, "_check_methods has seen to that"
    tokenizer = CheckpointTokenizer(plan.checkpoint.directory)
    length = window_length(plan.checkpoint, wanted.sequence_length)
    return calibration_windows(
        wanted.source, tokenizer, samples=wanted.samples, length=length, seed=wanted.seed, field=wanted.field
    )


def _plan(checkpoint: Checkpoint, spec: PruneSpec) -> Plan:
    """The plan, with what calibration will need of memory, and whether hidden states have to go to disk.

    Raises:
        UsageError: the memory budget is too small even so.
    """
    plan = make_plan(checkpoint, spec)
    if plan.calibrated:
        from tsenor_cli.calibration.memory import expected_memory
        from tsenor_cli.checkpoint.adapter.tokenizer import window_length

        assert spec.calibration is not None
        length = window_length(checkpoint, spec.calibration.sequence_length)
        memory = expected_memory(plan, spec.calibration.samples, length)
        plan = replace(plan, memory=memory)
    if spec.memory_budget is None or plan.peak_bytes <= spec.memory_budget:
        return plan
    spilled = plan.spilled()
    if spilled.peak_bytes > spec.memory_budget:
        raise UsageError(
            f"--memory-budget {spec.memory_budget:,} bytes is too small",
            f"at least {spilled.peak_bytes:,} are needed",
            code="budget-too-small",
        )
    return spilled


def _check_methods(spec: PruneSpec) -> None:
    """Methods and the options that belong to them fit together."""
    if spec.part is not None and (spec.methods & CALIBRATED or spec.eval_text is not None):
        raise UsageError(
            "--shard makes a part that knows nothing of the others, and layers that run need all",
            "use torchrun for calibrated methods and --eval",
        )
    if spec.stream_input and (spec.methods & CALIBRATED or spec.eval_text is not None or spec.allow_nonfinite):
        raise UsageError(
            "--no-cache-input reads shards once; calibrated methods, --eval and --allow-nonfinite do so more often",
            "leave it out",
            code="cannot-stream",
        )
    if unknown := spec.methods - set(METHODS):
        raise UsageError(f"unknown method {min(unknown)!r}", f"known: {', '.join(METHODS)}")
    calibrated = sorted(spec.methods & CALIBRATED)
    if calibrated and spec.calibration is None:
        raise UsageError(f"{calibrated[0]} has to see text", "give it with --calibration FILE")
    if not calibrated and spec.calibration is not None:
        raise UsageError(
            "--calibration is given, and no method needs it", "choose one with --method, such as sparsegpt"
        )
    if spec.calibration is not None and spec.calibration.source.startswith("-") and spec.eval_text in {"-", "-:jsonl"}:
        raise UsageError(
            "--calibration and --eval both ask for standard input", "give one of them a file", code="bad-text-source"
        )
    if not spec.update and spec.methods.isdisjoint(UPDATING):
        raise UsageError("--no-update: no method changes weights", f"it is for {' and '.join(sorted(UPDATING))}")


def _pruners(spec: PruneSpec) -> Mapping[str, Pruner]:
    return {
        "magnitude": Magnitude(),
        "wanda": Wanda(),
        "sparsegpt": SparseGPT(damping=spec.damping, update=spec.update),
        "alps": Alps(damping=spec.damping, update=spec.update),
    }


def _solvers(spec: PruneSpec) -> Mapping[NMPattern, BoundSolver]:
    """What pruners are handed to find their masks with, for every pattern of the run."""
    patterns = {rule.choice.pattern for rule in spec.rules if rule.choice is not None}
    if spec.pattern is not None:
        patterns.add(spec.pattern)
    options: dict[str, Any] = {"tau": spec.tau, "iterations": spec.iterations, "local_search": spec.local_search}
    device, fallback = str(find_device(spec.device)), spec.fallback
    solvers = {pattern: BoundSolver(pattern, spec.solver, device, fallback=fallback, **options) for pattern in patterns}
    for pattern, solver in solvers.items():
        solver(torch.empty(0, pattern.m))  # no scores, but options that contradict each other are refused
    return solvers

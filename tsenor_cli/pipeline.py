"""The map: open and plan (job.py) → prune (layer by layer what needs calibration, the rest band by band) → record.

What the command line and the library call is here: `plan_prune`, `predict`, `prune`, `merge`, `verify`, `evaluate` and
`finetune`; every room is reached from here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tsenor_cli.checkpoint.journal import Journal
from tsenor_cli.checkpoint.maskfile import saved_masks
from tsenor_cli.checkpoint.parts import (
    bring_together,
    find_parts,
    parts_beside,
    removal_has_begun,
    remove_parts,
    sweep_parts,
)
from tsenor_cli.checkpoint.plan import Plan
from tsenor_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tsenor_cli.checkpoint.remote import fetched
from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.checkpoint.source import resolve_checkpoint
from tsenor_cli.checkpoint.staging import Staged, check_output, joined_output, staged_output
from tsenor_cli.checkpoint.verifier import Verification, verify_checkpoint
from tsenor_cli.checkpoint.writer import CARD_FILE, PAGE_FILE, REPORT_FILE, OutputShards, copy_file, write_text
from tsenor_cli.device import device_name, find_device
from tsenor_cli.distributed import Team
from tsenor_cli.distribution import share_out
from tsenor_cli.errors import InputRefused
from tsenor_cli.forecast import PLANNED, Forecast, forecast, planned_like
from tsenor_cli.job import (
    Job,
    absolute,
    check_methods,
    open_input,
    plan_of,
    prepare,
    pruners_of,
    solvers_of,
    text_tokens,
)
from tsenor_cli.observer import Observer
from tsenor_cli.rates import measure_rates
from tsenor_cli.report.build import build_report
from tsenor_cli.report.card import model_card
from tsenor_cli.report.costs import Costs
from tsenor_cli.report.merge import merge_reports
from tsenor_cli.report.read import read_report
from tsenor_cli.report.records import Report, TensorRecord
from tsenor_cli.report.sample import sampled_bytes, take_samples
from tsenor_cli.specs import Cluster, FinetuneSpec, NMPattern, PruneSpec
from tsenor_cli.streaming import Streaming

if TYPE_CHECKING:
    from tsenor_cli.calibration.perplexity import Perplexity
    from tsenor_cli.calibration.tokens import TextTokens


def plan_prune(spec: PruneSpec) -> Plan:
    """Decide what would be done to every tensor, from headers alone; nothing is written."""
    check_methods(spec)
    solvers_of(spec)
    return plan_of(open_input(spec), spec)


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
    return forecast(plan, measure_rates(plan, absolute(spec.output), solvers_of(spec)), tokens=tokens)


def prune(spec: PruneSpec, observer: Observer | None = None, team: Team | None = None) -> Report:
    """Prune the checkpoint `spec.model` into `spec.output`, streaming tensors from disk to disk.

    In memory are a few bands of a tensor, or, where calibration is needed, one decoder layer with what it needs (see
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
    job = team.first(lambda: prepare(spec, team.size))
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
        shards = team.in_turn(lambda: OutputShards(job.plan.checkpoint, staged.directory, mine, job.plan.masks))
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


@contextmanager
def _staged(job: Job, team: Team) -> Iterator[Staged]:
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


def _finish(
    job: Job,
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
        {name: pruner.citation for name, pruner in pruners_of(spec).items()},
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
    output = absolute(output)
    stopped = removal_has_begun(output)
    if (stopped or (parts_beside(output) and not overwrite)) and (report := _merged_before(output)) is not None:
        return report
    if stopped:
        sweep_parts(output)  # of an output that is not there any more
    parts = find_parts(output)
    reports = [read_report(part) for part in parts]
    for part, other in zip(parts[1:], reports[1:], strict=True):
        if other.identity != reports[0].identity:
            raise InputRefused(
                f"{part} and {parts[0]} are not of one run",
                "make all parts with the same options, versions and model",
                code="parts-differ",
            )
    check_output(output, parts[0], overwrite=overwrite)
    report = merge_reports(reports)
    identity = {"parts": report.identity}
    with staged_output(output, identity, overwrite=overwrite, resume=None) as staged:
        bring_together(parts, staged.directory, left_out=(REPORT_FILE,))
        merged = open_checkpoint(staged.directory, report.model["revision"])
        tensors = {record.name for record in report.tensors}
        masks = {record.name for record in report.tensors if record.mask_sha256 is not None}
        if merged.tensors.keys() != tensors or saved_masks(merged).keys() != masks:
            raise InputRefused(
                f"the parts of {output} do not have the tensors and masks that their reports name",
                "they are damaged: make them again",
                code="parts-differ",
            )
        _write_pages(report, merged, staged.directory)
        write_text(staged.directory / REPORT_FILE, report.to_json())
    remove_parts(output)
    return report


def _merged_before(output: Path) -> Report | None:
    """The report of an output from which only the parts have to be removed, if it is one of the same run as they."""
    with suppress(InputRefused):
        report = read_report(output)
        if all(read_report(part).identity == report.identity for part in parts_beside(output)):
            remove_parts(output)
            return report
    return None


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
    return verify_checkpoint(checkpoint, pattern, original, observer or Observer())


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

    All of them see the same tokens.

    Raises:
        UsageError: their tokenizers give other tokens, so that figures would say nothing; or the text cannot be one.
        InputRefused: the text or a checkpoint cannot be used.
        TsenorError: a loss is not finite.
    """
    checkpoints = [open_checkpoint(*resolve_checkpoint(model)) for model in models]
    tokens = text_tokens(checkpoints, text, field, sequence_length, max_windows)
    place = find_device(device)
    return [_measure(checkpoint, tokens, observer or Observer(), memory_budget, place) for checkpoint in checkpoints]


def finetune(spec: FinetuneSpec, observer: Observer | None = None) -> Report:
    """Train a pruned checkpoint with its masks kept (see training/finetune.py)."""
    from tsenor_cli.training.finetune import finetune as run

    return run(spec, observer)


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
        if record.name in mine and record.name not in found and _is_there(record, tensor, shards):
            observer.advanced(record.name, tensor.nbytes)
            found[record.name] = record
    return found


def _is_there(record: TensorRecord, tensor: DiskTensor, shards: OutputShards) -> bool:
    mask = shards.mask_of(tensor)
    return shards.has(tensor, record.sha256) and (mask is None or shards.has(mask, record.mask_sha256))


def _written(
    job: Job,
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
    pruners, solvers = pruners_of(spec), solvers_of(spec)
    done = set().union(*team.gather(done))
    if job.tokens is not None and any(item.calibrated and item.tensor.name not in done for item in plan.tensors):
        from tsenor_cli.layerwise import Layerwise

        layerwise = Layerwise(plan, pruners, solvers, job.device, spec.few_tokens, shards, observer, team, writers)
        for record in layerwise.run(job.tokens.windows, staged.scratch if plan.spills else None, frozenset(done)):
            yield record
            done.add(record.name)
    left = (item for item in plan.tensors if writers[item.tensor.name] == team.rank and item.tensor.name not in done)
    streaming = Streaming(pruners, solvers, job.device, shards, observer)
    for group in fetched(plan.checkpoint, left, staged.scratch, sampled_bytes(plan.pruned)):
        yield from streaming.run(group)


def _noted_perplexity(job: Job, staged: Staged, observer: Observer, team: Team) -> dict[str, Any] | None:
    """The perplexity before pruning, measured once however often the run is interrupted."""
    if job.eval_tokens is not None and not staged.journal.notes("perplexity"):
        found = _perplexity(job, job.plan.checkpoint.directory, observer, team)
        assert found is not None
        staged.journal.note("perplexity", found)
    return next(iter(staged.journal.notes("perplexity")), None)


def _perplexity(job: Job, directory: Path, observer: Observer, team: Team) -> dict[str, Any] | None:
    if job.eval_tokens is None:
        return None
    return _measure(
        open_checkpoint(directory), job.eval_tokens, observer, job.spec.memory_budget, job.device, team
    ).to_dict()


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

"""Checks a pruned checkpoint from its files alone, sharing no code with the solver or the writer.

Per pruned tensor: no group of M along the input axis (and, transposable, along the output axis) has more than N
nonzeros, no zero is negative, every value is finite. A kept weight may be zero in the original, so fewer than N is
allowed; `exact` says whether every group has N.
Unless a pattern was given in the report's stead, there are just the tensors that the report names, with the hashes that
it names. So has every mask that it names, which keeps exactly N of each group, and every weight that is not zero.
Against the original: every tensor that was not pruned is bit-identical, and so is every other file; for methods that
only mask, every weight that is not zero is the original's. What was fine-tuned has the original's shapes and dtypes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tsenor_cli.checkpoint.claims import Claim, PrunedClaim, claim_of
from tsenor_cli.checkpoint.layouts import Layout, banded_axis, fits, matrix_size, to_matrices
from tsenor_cli.checkpoint.maskfile import mask_fits, saved_masks, unpack_mask
from tsenor_cli.checkpoint.plan import bands
from tsenor_cli.checkpoint.reader import MASKS_DIRECTORY, Checkpoint
from tsenor_cli.checkpoint.shard import PRUNABLE_DTYPES, DiskTensor
from tsenor_cli.checkpoint.soundness import Findings, examine
from tsenor_cli.checkpoint.writer import WRITTEN_ANEW
from tsenor_cli.errors import InputRefused
from tsenor_cli.observer import Observer
from tsenor_cli.overlap import ahead
from tsenor_cli.specs import NMPattern

_READ_AHEAD = _AT_ONCE = 2  # bands
_PIECE = 2**20  # bytes of a file that are compared at a time
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Failure:
    """One thing that does not hold, at its first place in one tensor or file."""

    where: str
    what: str
    count: int = 1


@dataclass(frozen=True)
class TensorCheck:
    """The counts of one pruned tensor."""

    name: str
    groups: int  # groups of M checked, in both directions where transposable
    exact: bool  # every group has exactly N nonzeros
    zeros: int
    masked: bool  # its saved mask was checked, too


@dataclass
class Verification:
    """The outcome; `ok` when nothing failed."""

    directory: str
    pattern: str
    kind: str
    against: str | None
    trained: bool  # fine-tuned after pruning
    tensors: list[TensorCheck] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": 1, "ok": self.ok, **asdict(self)}


@dataclass(frozen=True, eq=False)
class _Subject:
    """A tensor to check, and what it is compared with."""

    tensor: DiskTensor
    claimed: PrunedClaim
    mask: DiskTensor | None
    source: DiskTensor | None  # of which a mask was taken, and nothing else changed


class _Band(NamedTuple):
    """Some of its leading axis."""

    subject: _Subject
    first: int
    values: torch.Tensor
    source: torch.Tensor | None
    mask: torch.Tensor | None


def verify_checkpoint(
    checkpoint: Checkpoint, pattern: NMPattern | None, original: Checkpoint | None, observer: Observer
) -> Verification:
    """Check everything and collect what fails; see the module's text for what is checked."""
    observer.began(sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
    advanced = observer.advanced
    claim = claim_of(checkpoint, pattern)
    result = Verification(
        str(checkpoint.directory),
        ", ".join(dict.fromkeys(map(str, claim.patterns))),
        ", ".join(dict.fromkeys(pattern.kind for pattern in claim.patterns)),
        str(original.directory) if original else None,
        claim.trained,
    )
    masks = _masks(checkpoint, claim, result)
    hashes = _check_pruned(_subjects(checkpoint, original, claim, masks, result), result, advanced)
    if original is not None:
        changed = set(original.tensors) if claim.trained else set(claim.tensors)
        result.failures += _differences(checkpoint, original, changed, hashes, advanced)
    failed = {failure.where for failure in result.failures}
    result.failures += (
        Failure(name, "its bytes are not those that the report was written for")
        for name, tensor in checkpoint.tensors.items()
        if name in claim.hashes
        and name not in failed
        and (hashes.get(name) or _sha256(tensor, advanced)) != claim.hashes[name]
    )
    places = {True: ("report", "checkpoint"), False: ("checkpoint", "report")}
    result.failures += (
        Failure(name, "in the {}, but not in the {}".format(*places[name in claim.hashes]))
        for name in sorted(claim.hashes.keys() ^ checkpoint.tensors.keys() if claim.hashes else ())
        if name not in failed
    )
    result.failures += (
        Failure(name, "its mask is not the one that the report was written for")
        for name, mask in masks.items()
        if name not in failed and _sha256(mask) != claim.tensors[name].mask_sha256
    )
    return result


def _masks(checkpoint: Checkpoint, claim: Claim, result: Verification) -> dict[str, DiskTensor]:
    """The packed masks that there have to be, by tensor; those that are not there, or fit no tensor, are failures."""
    wanted = [name for name, tensor in claim.tensors.items() if tensor.mask_sha256 is not None]
    try:
        saved = saved_masks(checkpoint) if wanted else {}
    except InputRefused as error:
        result.failures.append(Failure(MASKS_DIRECTORY, error.message))
        return {}
    found = {}
    for name in wanted:
        tensor, mask = checkpoint.tensors.get(name), saved.get(name)
        if mask is None or (tensor is not None and not mask_fits(mask, tensor)):
            result.failures.append(Failure(name, "its mask is not there as the report describes it"))
        else:
            found[name] = mask
    return found


def _subjects(
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    claim: Claim,
    masks: Mapping[str, DiskTensor],
    result: Verification,
) -> Iterator[_Subject]:
    """The tensors said to be pruned that can be; the others are failures."""
    for name, claimed in claim.tensors.items():
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.dtype not in PRUNABLE_DTYPES or not fits(tensor.shape, claimed.layout):
            result.failures.append(Failure(name, "not in the checkpoint as the report describes it"))
        elif not claimed.pattern.divides(*matrix_size(tensor.shape, claimed.layout)):
            what = f"{claimed.pattern.m} does not divide its shape {list(tensor.shape)}"
            result.failures.append(Failure(name, what))
        else:
            source = original.tensors.get(name) if original and claimed.mask_only and not claim.trained else None
            comparable = source is not None and (source.dtype, source.shape) == (tensor.dtype, tensor.shape)
            yield _Subject(tensor, claimed, masks.get(name), source if comparable else None)


def _sha256(tensor: DiskTensor, advanced: Progress = lambda *_: None) -> str:
    digest = hashlib.sha256()
    for (chunk,) in _chunks(tensor):
        digest.update(chunk)
        advanced(tensor.name, len(chunk))
    return digest.hexdigest()


def _chunks(*tensors: DiskTensor) -> Iterator[tuple[bytearray | memoryview, ...]]:
    """The bytes of tensors of one size, a few MiB of each at a time; the next are read meanwhile."""
    return ahead(
        lambda *piece: tuple(tensor.read_bytes(*piece) for tensor in tensors), tensors[0].pieces(), _READ_AHEAD
    )


def _check_pruned(subjects: Iterable[_Subject], result: Verification, advanced: Progress) -> dict[str, str]:
    """Check tensors band by band; every kind of failure is reported once for each, with its count and first place.

    Returns the hashes of their bytes. Bands are read, checked and hashed at once.
    """
    places = (
        (subject, *rows)
        for subject in subjects
        for rows in bands(subject.tensor, subject.claimed.layout, subject.claimed.pattern.m)
    )
    examined = ahead(_examine, ahead(_read, places, _READ_AHEAD), _AT_ONCE, threads=_AT_ONCE)
    hashes = {}
    for subject, parts in groupby(examined, lambda part: part[0].subject):
        digest, found, name = hashlib.sha256(), dict[str, Failure](), subject.tensor.name
        groups, exact, zeros = 0, True, 0
        for band, here in parts:
            digest.update(band.values.view(-1).view(torch.uint8).numpy().data)
            groups, exact, zeros = groups + here.groups, exact and here.exact, zeros + here.zeros
            _collect(found, name, here.wrong, subject.claimed.layout, band.first)
            advanced(name, band.values.nbytes)
        result.failures += found.values()
        result.tensors.append(TensorCheck(name, groups, exact, zeros, subject.mask is not None))
        hashes[name] = digest.hexdigest()
    return hashes


def _read(subject: _Subject, first: int, last: int) -> tuple[_Band]:
    band, source, mask = subject.tensor.read(first, last), subject.source, subject.mask
    kept = None if mask is None else unpack_mask(mask.read(first, last), band.shape)
    return (_Band(subject, first, band, None if source is None else source.read(first, last), kept),)


def _examine(band: _Band) -> tuple[_Band, Findings]:
    claimed = band.subject.claimed
    source, mask = (None if part is None else to_matrices(part, claimed.layout) for part in (band.source, band.mask))
    return band, examine(to_matrices(band.values, claimed.layout), claimed.pattern, source, mask)


def _collect(found: dict[str, Failure], name: str, wrong: dict[str, torch.Tensor], layout: Layout, first: int) -> None:
    """Add what is wrong in one band; the place of the first is counted in the whole [.., out, in] tensor."""
    for what, where in wrong.items():
        count = int(torch.count_nonzero(where))
        if count and what in found:
            found[what] = replace(found[what], count=found[what].count + count)
        elif count:
            place = where.nonzero()[0].tolist()
            place[banded_axis(layout)] += first
            found[what] = Failure(name, f"{what}, first at {place} of [.., out, in]", count)


def _differences(
    checkpoint: Checkpoint, original: Checkpoint, changed: set[str], hashes: dict[str, str], advanced: Progress
) -> Iterator[Failure]:
    """Everything that should be the original's and is not; the hashes of what is compared are left in `hashes`."""
    for name, tensor in original.tensors.items():
        copy = checkpoint.tensors.get(name)
        if copy is None:
            yield Failure(name, "in the original, but not in the checkpoint")
        elif (copy.dtype, copy.shape) != (tensor.dtype, tensor.shape):
            yield Failure(name, f"{copy.dtype} {list(copy.shape)}, the original {tensor.dtype} {list(tensor.shape)}")
        elif name not in changed:
            digest, same = hashlib.sha256(), True
            for chunk, wanted in _chunks(copy, tensor):
                digest.update(chunk)
                same = same and _equal(chunk, wanted)
            hashes[name] = digest.hexdigest()
            if not same:
                yield Failure(name, "not pruned, but not bit-identical to the original")
            advanced(name, copy.nbytes)
    for name in checkpoint.tensors.keys() - original.tensors.keys():
        yield Failure(name, "not in the original")
    for path in set(original.other_files) - WRITTEN_ANEW:
        if not _same_bytes(checkpoint.directory / path, original.directory / path):
            yield Failure(str(path), "this file is not the original's")


def _equal(chunk: bytearray | memoryview, other: bytearray | memoryview) -> bool:
    """Of one length. Python compares two memoryviews one number at a time."""
    return np.array_equal(np.frombuffer(chunk, np.uint8), np.frombuffer(other, np.uint8))


def _same_bytes(copy: Path, original: Path) -> bool:
    """Piece by piece: a file beside the weights may be of any size."""
    if not copy.is_file() or copy.stat().st_size != original.stat().st_size:
        return False
    with copy.open("rb") as first, original.open("rb") as second:
        while piece := first.read(_PIECE):
            if piece != second.read(_PIECE):
                return False
    return True

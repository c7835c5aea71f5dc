"""The shared vocabulary: what to prune to, and what a run was asked to do.

Imports nothing heavy, so that the command line can use it before torch is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tsenor_cli.errors import UsageError

MAX_M = 64
GPU_TYPES = ("h200", "h100", "a100")  # that there are rates of (forecast.py)
SOLVERS = ("exact", "entropic")  # of transposable masks
METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
CALIBRATED = frozenset(METHODS[1:])  # those that have to see what goes into a weight
UPDATING = frozenset({"sparsegpt", "alps"})  # those that change the weights that stay


@dataclass(frozen=True)
class NMPattern:
    """N:M sparsity: of every `m` consecutive weights `n` are *kept*.

    `transposable` asks for it along rows and columns at once: every m x m tile of a weight then
    keeps exactly n per row and n per column, so W and its transpose are both N:M.
    Other tools count zeros instead (SparseGPT, Wanda); 1:4 here means 75 % zeros.
    """

    n: int
    m: int
    transposable: bool = True

    def __post_init__(self) -> None:
        if not (2 <= self.m <= MAX_M and 1 <= self.n < self.m):
            raise UsageError(
                f"pattern {self.n}:{self.m} is not possible",
                f"give N:M with 1 <= N < M and M from 2 to {MAX_M}, such as 2:4; N is the number kept",
                code="bad-pattern",
            )

    @classmethod
    def parse(cls, text: str, *, transposable: bool = True) -> NMPattern:
        """Read "2:4"; raises UsageError for anything else."""
        match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text)
        if match is None:
            raise UsageError(
                f"pattern {text!r} is not of the form N:M", "give it as two numbers, such as 2:4", code="bad-pattern"
            )
        return cls(int(match[1]), int(match[2]), transposable)

    @property
    def kind(self) -> str:
        return "transposable" if self.transposable else "standard"

    def divides(self, out_features: int, in_features: int) -> bool:
        """Whether a [out, in] matrix splits into whole groups (standard) or whole tiles (transposable)."""
        return in_features % self.m == 0 and (not self.transposable or out_features % self.m == 0)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Choice:
    """What is done to one tensor."""

    pattern: NMPattern
    method: str


@dataclass(frozen=True)
class Rule:
    """What is done to the tensors whose name fits one of `match`; nothing if there is no `choice`."""

    match: tuple[str, ...]  # globs, or re:REGEX
    choice: Choice | None


@dataclass(frozen=True)
class CalibrationSpec:
    """The text that calibrated methods see."""

    source: str  # a file, "-", or hf:dataset[:config][:split]
    field: str = "text"  # of a line of JSON or a row of a table
    samples: int = 128
    sequence_length: int | None = None  # tokens; None: as many as the model can, 2048 at most
    seed: int = 0

    def __post_init__(self) -> None:
        """Take a path as str or Path."""
        object.__setattr__(self, "source", str(self.source))


@dataclass(frozen=True)
class Part:
    """One of the parts that jobs make of an output."""

    number: int  # from 1
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "3/8"; raises UsageError for anything else."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"part {text!r} is not possible", "give it as I/N with I from 1 to N, such as 3/8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class Cluster:
    """Machines to plan for."""

    gpus: int  # of each
    type: str
    nodes: int = 1

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Read "gpus=8,type=h200,nodes=2"; raises UsageError for anything else."""
        given = dict(part.partition("=")[::2] for part in text.split(","))
        numbers = [given.get("gpus", "1"), given.get("nodes", "1")]
        known = given.keys() <= {"gpus", "type", "nodes"} and given.get("type") in GPU_TYPES
        if not known or not all(re.fullmatch("[1-9][0-9]{0,3}", number) for number in numbers):
            raise UsageError(
                f"cluster {text!r} is not known",
                f"give it as gpus=8,type=h200,nodes=2, with type one of {', '.join(GPU_TYPES)}",
            )
        return cls(int(numbers[0]), given["type"], int(numbers[1]))

    @property
    def ranks(self) -> list[list[int]]:
        """The numbers of the processes of every machine, one for each GPU."""
        return [list(range(node * self.gpus, (node + 1) * self.gpus)) for node in range(self.nodes)]


@dataclass(frozen=True)
class PruneSpec:
    """Everything that decides the bytes of a pruned checkpoint, and where they go."""

    model: str  # a local directory, or a hub id: org/name[@revision]
    output: Path
    pattern: NMPattern | None  # for tensors that no rule fits; None leaves those alone
    method: str = "magnitude"
    rules: tuple[Rule, ...] = ()  # the first that fits a tensor decides
    solver: str = "exact"  # one of SOLVERS
    tau: float | None = None  # these three: see masks.solve.solve_mask; None is its default
    iterations: int | None = None
    local_search: int | None = None
    calibration: CalibrationSpec | None = None
    update: bool = True  # let sparsegpt and alps change the weights that stay
    damping: float = 0.01  # of a Gram matrix's mean diagonal
    few_tokens: str = "magnitude"  # what is done to an expert that saw too few tokens: or "error"
    memory_budget: int | None = None  # bytes above the imports
    eval_text: str | None = None  # measure perplexity on it before and after
    eval_field: str = "text"  # of that text, and the tokens of its windows, where no calibration says them
    eval_length: int | None = None
    only: tuple[str, ...] = ()  # name patterns: a glob, or re:REGEX
    ignore: tuple[str, ...] = ()
    min_coverage: float = 0.0  # share of the prunable parameters, 0 to 1
    strict: bool = False
    device: str = "auto"  # where masks are solved and layers run: auto, cpu, cuda or cuda:i
    fallback: bool = False  # let plain torch solve masks on a GPU that a kernel does not compile for
    allow_nonfinite: bool = False  # copy tensors with NaN or infinite weights instead of refusing them
    stream_input: bool = False  # fetch a hub checkpoint shard by shard and keep none of it
    save_masks: bool = False  # beside the weights (checkpoint/maskfile.py)
    part: Part | None = None  # make this part of the output only, for `merge`
    overwrite: bool = False
    resume: bool | None = None  # go on with what an interrupted run left, or start over; None refuses to choose

    def __post_init__(self) -> None:
        """Take paths as str or Path."""
        _take_paths(self, "model", "eval_text")

    def choice(self, name: str) -> Choice | None:
        """What the rules say of a tensor, or else the defaults."""
        for rule in self.rules:
            if any(matches(name, pattern) for pattern in rule.match):
                return rule.choice
        return Choice(self.pattern, self.method) if self.pattern is not None else None

    @property
    def eval_windows(self) -> tuple[str, int | None]:
        """Field and window length of the text to measure perplexity on: those of the calibration, if there is one."""
        if self.calibration is not None:
            return self.calibration.field, self.calibration.sequence_length
        return self.eval_field, self.eval_length

    @property
    def methods(self) -> set[str]:
        """Every method that some tensor could get."""
        found = {rule.choice.method for rule in self.rules if rule.choice is not None}
        return found | ({self.method} if self.pattern is not None else set())


@dataclass(frozen=True)
class FinetuneSpec:
    """Everything that decides the bytes of a fine-tuned sparse checkpoint, and where they go."""

    model: str  # made by `prune`
    output: Path
    text: str  # to learn; see calibration/text.py
    field: str = "text"  # of a line of JSON or a row of a table
    eval_text: str | None = None  # measure perplexity on it before and after; None: on the end of `text`, held out
    sequence_length: int | None = None  # tokens; None: as many as the model can, 2048 at most
    steps: int = 200
    batch_size: int = 8  # windows that go through the model at once
    accumulate: int = 1  # batches of a step
    learning_rate: float = 1e-4  # the highest: rises for the first steps, then falls as a cosine to 0
    warmup: float = 0.05  # share of the steps in which it rises
    weight_decay: float = 0.0
    clip: float = 1.0  # the largest norm of the gradients
    checkpoint_activations: bool = False  # compute activations twice, to keep fewer of them
    seed: int = 0  # decides the order of the windows
    save_every: int = 50  # steps, to resume from
    memory_budget: int | None = None  # of measuring perplexity, bytes above the imports
    device: str = "auto"
    overwrite: bool = False
    resume: bool | None = None  # as of PruneSpec

    def __post_init__(self) -> None:
        """Take paths as str or Path."""
        _take_paths(self, "model", "text", "eval_text")


def _take_paths(spec: PruneSpec | FinetuneSpec, *as_text: str) -> None:
    """Callers have them as str or as Path; what reports hold is text, and the output is a Path."""
    for name in as_text:
        if (given := getattr(spec, name)) is not None:
            object.__setattr__(spec, name, str(given))
    object.__setattr__(spec, "output", Path(spec.output))


def matches(name: str, pattern: str) -> bool:
    """Whether a tensor name fits a user's pattern: `re:REGEX` (searched), or a glob over the whole name or module."""
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise UsageError(
                f"{pattern!r} is not a regular expression ({error})", "see Python's re module", code="bad-selection"
            ) from error
    module = name.removesuffix(".weight")
    return fnmatchcase(name, pattern) or fnmatchcase(module, pattern)

"""What is in the machine code of a kernel: its loops, what they hold, and the least cycles that takes a warp.

Reads the SASS of an NVIDIA GPU, as nvdisasm prints it, and the assembly of an AMD GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P\w+)?\s*([A-Z][\w.]*)(.*?);")
_AMD = re.compile(r"^\t()([a-z]\w+)(.*?)(?:;.*)?$")
_LABEL = re.compile(r"^\s*(\.L[\w.]+):")
_TARGET = re.compile(r"(\.L[\w.]+)")

# The pipe of an instruction, and for how many cycles a warp has it; sm_90, one of the four schedulers of an SM.
_PIPES = {
    "fma": ("FADD", "FMUL", "FFMA"),
    "fma heavy": ("IMAD",),
    "special": ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV", "F2IP"),
    "shuffle": ("SHFL", "LDS", "STS", "ATOMS"),
    "double": ("DADD", "DMUL", "DFMA", "DSETP"),
    "memory": ("LDG", "STG", "LDL", "STL", "LD", "ST"),
    "control": ("BRA", "BSSY", "BSYNC", "EXIT", "WARPSYNC", "BAR", "BREAK", "BMOV", "VOTE", "REDUX", "S2R", "LDC"),
}
_CYCLES = {
    "fma": 1,
    "fma heavy": 2,
    "special": 8,
    "shuffle": 4,
    "double": 2,
    "memory": 4,
    "control": 1,
    "uniform": 1,
    "alu": 2,
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names}


class Loop(NamedTuple):
    """Code without the loops inside it; the first one is what is in no loop."""

    depth: int  # how many loops it is in
    names: Counter[str]  # instructions, by their first word

    @property
    def size(self) -> int:
        """The number of instructions."""
        return self.names.total()

    @property
    def spills(self) -> int:
        """Loads and stores of registers that had no room."""
        return sum(count for name, count in self.names.items() if name in {"LDL", "STL"} or name.startswith("scratch_"))

    @property
    def cycles(self) -> int:
        """The least cycles of one pass: what its busiest pipe takes, or the issue of one instruction a cycle."""
        busy: Counter[str] = Counter({"issue": self.size})
        for name, count in self.names.items():
            pipe = pipe_of(name)
            busy[pipe] += count * _CYCLES[pipe]
        busy["fma"] += busy.pop("fma heavy", 0) // 2  # half of the FMA units do it
        return max(busy.values())


def pipe_of(name: str) -> str:
    """The pipe that executes an instruction of SASS."""
    return _PIPE_OF.get(name, "uniform" if name.startswith("U") else "alu")


class Block(NamedTuple):
    """A stretch of code that is entered at its start only and left at its end only."""

    names: list[str]
    following: list[int]  # numbers of blocks


def loops_of(text: str) -> list[Loop]:
    """What is in no loop, then the loops in the order of their addresses, each without what is in loops inside it.

    Code that only a divided warp reaches is left out: these kernels do not divide.
    """
    blocks = blocks_of(text)
    members = natural_loops(blocks)
    reached = dominators(blocks).keys()
    spans = {-1: set(reached)} | dict(sorted(members.items()))
    counts = {head: Counter[str]() for head in spans}
    for number in reached:
        innermost = min((head for head in spans if number in spans[head]), key=lambda head: len(spans[head]))
        counts[innermost].update(blocks[number].names)
    return [Loop(sum(head in other for other in members.values()), names) for head, names in counts.items()]


def blocks_of(text: str) -> list[Block]:
    """Cut the code where it jumps and where it is jumped to."""
    words, labels, jumps = parse(text)
    targets = {at: labels.get(target) for at, target in jumps.items()}
    starts = sorted({0, *labels.values(), *(at + 1 for at, word in enumerate(words) if at in jumps or ends(word))})
    starts = [start for start in starts if start < len(words)]
    number = {start: k for k, start in enumerate(starts)}
    blocks = []
    for start, stop in pairwise([*starts, len(words)]):
        last, following = stop - 1, []
        target = targets.get(last)
        if target in number and ".DIV" not in words[last]:
            following.append(number[target])
        if stop in number and not (words[last] in {"BRA", "s_branch"} or ends(words[last])):
            following.append(number[stop])
        blocks.append(
            Block(
                [word.rstrip("?").split(".")[0] for word in words[start:stop] if word not in {"NOP", "s_nop"}],
                following,
            )
        )
    return blocks


def ends(word: str) -> bool:
    """Is it the end of a kernel, or of a function?"""
    return word in {"EXIT", "RET", "s_endpgm"} or word.startswith("RET.")


def dominators(blocks: list[Block]) -> dict[int, set[int]]:
    """For every block that can be reached, the blocks that every way there goes through."""
    order, seen, waiting = [], {0}, [0]
    while waiting:
        number = waiting.pop()
        order.append(number)
        fresh = [other for other in blocks[number].following if other not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    before: dict[int, list[int]] = {number: [] for number in order}
    for number in order:
        for other in blocks[number].following:
            before[other].append(number)
    result = {number: set(order) for number in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            new = set.intersection(*(result[other] for other in before[number])) | {number}
            changed |= new != result[number]
            result[number] = new
    return result


def natural_loops(blocks: list[Block]) -> dict[int, set[int]]:
    """The first block of every loop → its blocks: those from which a jump back to it can be reached."""
    above = dominators(blocks)
    loops: dict[int, set[int]] = {}
    for number, over in above.items():
        for head in set(blocks[number].following) & over:
            members = loops.setdefault(head, {head})
            waiting = [number]
            while waiting:
                block = waiting.pop()
                if block not in members:
                    members.add(block)
                    waiting.extend(other for other in above if block in blocks[other].following)
    return {head: members for head, members in loops.items() if len(members) > 1 or len(blocks[head].names) > 1}


def parse(text: str) -> tuple[list[str], dict[str, int], dict[int, str]]:
    """→ the instructions, where the labels are, and what jumps whereto. "?" marks a BRA or EXIT with a condition.

    A CALL counts as one: ptxas for sm_80 writes it for a far jump, and what calls a function goes on afterwards.
    """
    words: list[str] = []
    labels: dict[str, int] = {}
    jumps: dict[int, str] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(words)
        elif instruction := _SASS.match(line) or _AMD.match(line):
            condition, word, rest = instruction.groups()
            if word.startswith(("BRA", "CALL", "s_cbranch", "s_branch")) and (target := _TARGET.search(rest)):
                jumps[len(words)] = target[1]
            conditional = condition or "P" in rest.split(".L")[0] or word.startswith("CALL")
            perhaps = word.startswith(("BRA", "CALL", "EXIT")) and conditional
            words.append(word + "?" * bool(perhaps))
    return words, labels, jumps


def global_widths(text: str) -> Counter[str]:
    """How often SASS reads or writes global memory, by the full names, which tell the width."""
    return Counter(word for word in parse(text)[0] if word.startswith(("LDG", "STG")))

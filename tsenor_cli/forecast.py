"""How long a run will take and what it will need, from sizes in headers and rates of a machine (docs/scaling.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsenor_cli.checkpoint.layouts import matrix_size
from tsenor_cli.checkpoint.plan import Plan, TensorPlan
from tsenor_cli.checkpoint.site import Site
from tsenor_cli.distribution import balance, loads, share_out
from tsenor_cli.specs import NMPattern

_START_S = 4.0  # to import and to plan
_BUSY = 0.9  # of their time cores are busy, which wait for one another in between (docs/measured.md)
_LAYER = 1.4  # times as long as its products a layer takes: attention, norms, activations
_COPIED = 2.5e9  # bytes a second that a core copies from the system's cache or to it (docs/measured.md)


@dataclass(frozen=True)
class Rates:
    """What one process gets done, and what the machine has for all of its processes."""

    where: str  # they are from
    solve: Mapping[tuple[int, bool], float]  # weights a second, by M and whether transposable
    matmul: float  # operations a second of a matrix product in float32
    layers: float  # in the dtype of the checkpoint
    gram: float  # of XᵀX of inputs in that dtype, its upper triangle alone
    read: float  # bytes a second, of the machine
    write: float  # bytes a second until they are on the disk, of the machine
    hash: float  # bytes a second
    cores: int = 0  # that all of this shares; 0 where it does not matter
    measured: bool = False

    def seconds_to_solve(self, pattern: NMPattern, weights: int) -> float:
        """Of the next larger M that is known, if this one is not."""
        known = {m: rate for (m, transposable), rate in self.solve.items() if transposable == pattern.transposable}
        return weights / known[min((m for m in known if m >= pattern.m), default=max(known))]


def _card(name: str, speed: float, matmul: float, layers: float) -> Rates:
    """What an H200 took for masks of 8192×8192 weights (docs/measured.md), at another card's speed beside it.

    The rest is from data sheets: half the peak in float32 and bfloat16, and an NVMe disk; hashing is one core's.
    """
    measured_ms = {(4, True): 1.35, (8, True): 3.15, (16, True): 4.76, (32, True): 8.32, (64, True): 18.4}
    measured_ms |= {(4, False): 0.82, (8, False): 0.63, (16, False): 0.81, (32, False): 0.68, (64, False): 0.89}
    solve = {key: speed * 8192**2 / (1e-3 * ms) for key, ms in measured_ms.items()}
    where = f"predicted for an {name} from an H200's masks and data sheets"
    return Rates(where, solve, matmul, layers, matmul, read=6e9, write=4e9, hash=1.5e9)


PLANNED = {  # specs.GPU_TYPES
    "h200": _card("H200", 1.0, 30e12, 495e12),
    "h100": _card("H100", 1.0, 30e12, 495e12),
    "a100": _card("A100", 0.6, 9e12, 156e12),  # 108 multiprocessors at 1.41 GHz beside 132 at 1.9
}


def planned_like(device: str) -> Rates:
    """Of a card with this name, or else of the one in the middle."""
    return next((rates for name, rates in PLANNED.items() if name in device.lower()), PLANNED["h100"])


@dataclass(frozen=True)
class Forecast:
    """Of a run. Seconds are those of the slowest process."""

    rates: Rates
    processes: int
    machines: int
    seconds: float
    stages: dict[str, float]  # seconds of the slowest process; where they overlap they are more than all
    balance: float  # mean over largest load of the processes
    largest_tensor: str  # that the slowest process has: no number of processes makes it faster
    peak_memory_bytes: int  # of a process, above the imports
    read_bytes: int
    written_bytes: int
    network_bytes: int  # between processes

    def to_dict(self) -> dict[str, Any]:
        return {"rates": self.rates.where, **{name: value for name, value in vars(self).items() if name != "rates"}}


def forecast(plan: Plan, rates: Rates, nodes: Sequence[Sequence[int]] = ((0,),), tokens: int = 0) -> Forecast:
    """What a run will take.

    Args:
        plan: of all of it.
        rates: of each process and each machine.
        nodes: the ranks of every machine.
        tokens: of the calibration text, if there is one.
    """
    size = sum(map(len, nodes))
    writers = share_out(plan, nodes)
    shares = loads(plan, writers, size)
    slowest = shares.index(max(shares))
    machine = next(ranks for ranks in nodes if slowest in ranks)
    own = [item for item in plan.tensors if writers[item.tensor.name] == slowest]
    mask_bytes = {mask.name: mask.nbytes for file in plan.masks for mask in file.tensors}
    stages = _streaming(own, mask_bytes, rates, len(machine)) | _calibrating(plan, rates, size, tokens)
    calibrated, nbytes = plan.calibrated, sum(item.tensor.nbytes for item in plan.tensors)
    return Forecast(
        rates=rates,
        processes=size,
        machines=len(nodes),
        seconds=_START_S + _together(stages, rates),
        stages={"starting": _START_S, **stages},
        balance=balance(shares),
        largest_tensor=max(own, key=lambda item: item.tensor.nbytes).tensor.name if own else "",
        peak_memory_bytes=plan.peak_bytes,
        read_bytes=nbytes * (1 + 2 * size * calibrated),  # each process loads each layer twice
        written_bytes=nbytes + sum(mask_bytes.values()),
        network_bytes=_network(plan, mask_bytes, size, tokens) if calibrated else 0,
    )


def _streaming(
    items: Sequence[TensorPlan], mask_bytes: Mapping[str, int], rates: Rates, beside: int
) -> dict[str, float]:
    """Seconds to read, solve, hash and write tensors, when `beside` processes share a disk."""
    nbytes = sum(item.tensor.nbytes for item in items)
    written = nbytes + sum(mask_bytes.get(item.tensor.name, 0) for item in items)
    solving = [(item.choice.pattern, item.tensor.parameters) for item in items if item.pruned and item.choice]
    return {
        "reading": nbytes * beside / rates.read,
        "masks": sum(rates.seconds_to_solve(pattern, weights) for pattern, weights in solving),
        "hashing": written / rates.hash,
        "writing": written * beside / rates.write,
    }


def _together(stages: dict[str, float], rates: Rates) -> float:
    """The disk, solving and hashing overlap, as far as there are cores for all; layers come one by one."""
    reading, masks, hashing, writing = (stages[name] for name in ("reading", "masks", "hashing", "writing"))
    longest = max(reading + writing, masks, hashing)
    if rates.cores:
        copying = 2 * hashing * rates.hash / _COPIED  # what is hashed has been read and will be written
        longest = max(longest, (masks * rates.cores + hashing + copying) / rates.cores / _BUSY)
    return longest + sum(stages.values()) - (reading + masks + hashing + writing)


def _calibrating(plan: Plan, rates: Rates, size: int, tokens: int) -> dict[str, float]:
    """Seconds to run the layers twice, sum up Gram matrices and update weights, counted in operations; roughly."""
    if not plan.calibrated:
        return {}
    inside = [item for item in plan.tensors if item.layer is not None]
    forward = sum(item.tensor.parameters for item in inside if item.prunable) * 2.0 * tokens
    seen = {
        item.site: matrix_size(item.tensor.shape, item.layout)[1] for item in inside if item.calibrated and item.layout
    }
    gram = sum(inputs**2 for inputs in seen.values()) * tokens
    return {
        "layers": _LAYER * 2 * forward / rates.layers / size,
        "Gram matrices": gram / rates.gram / size,
        "weights": sum(map(_update, inside)) / rates.matmul / size,
    }


def _update(item: TensorPlan) -> float:
    """Operations to prune a tensor by its method; float64 counts twice. Fitted to runs on two cores."""
    if not item.calibrated or item.layout is None or item.choice is None:
        return 0.0
    out, inputs = matrix_size(item.tensor.shape, item.layout)
    factor, update = {"sparsegpt": (1.0, 4.0), "alps": (20.0, 30.0)}.get(item.choice.method, (0.0, 0.0))
    return item.tensor.parameters / (out * inputs) * (factor * inputs**3 + update * out * inputs**2)


def _network(plan: Plan, mask_bytes: Mapping[str, int], size: int, tokens: int) -> int:
    """Bytes that processes hand each other: inputs and pruned weights to all of them, masks to who writes them."""
    inside = [item for item in plan.pruned if item.layer is not None]
    to_each = sum(_widths(inside).values()) * 2 * tokens + sum(item.tensor.nbytes for item in inside)
    masks = sum(mask_bytes.get(item.tensor.name, 0) for item in inside)
    return (size - 1) * to_each + masks * (size - 1) // size


def _widths(items: Sequence[TensorPlan]) -> dict[Site, int]:
    """Of the inputs that calibration looks at; those that several weights share are counted for each."""
    return {
        item.site: matrix_size(item.tensor.shape, item.layout)[1]
        for item in items
        if item.calibrated and item.site is not None and item.layout is not None
    }

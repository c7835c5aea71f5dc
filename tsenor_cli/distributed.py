"""Processes that make one output together, started by torchrun on one machine or many.

The first one decides, stages, reports and speaks; what it is alone to do, the others wait for. Their bytes are those
of one process: work is only ever moved, never cut differently (docs/scaling.md).
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from tsenor_cli.errors import SaidElsewhereError, TsenorError
from tsenor_cli.observer import Observer

if TYPE_CHECKING:
    from tsenor_cli.report.records import TensorRecord

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # others may factorise a large matrix meanwhile; torchrun ends us if one of them dies
_POLL_S = 0.2
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_ADVANCED, _DONE = "advanced bytes", "done"


class Team:
    """The processes of a run; alone, unless `join_team` made it.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        nodes: the ranks of each machine.
        restarted: an earlier attempt of this run has died.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, restarted: bool = False) -> None:
        self.rank, self.size, self.restarted = rank, size, restarted
        self.nodes = [[0]]

    def observer(self, observer: Observer) -> Observer:
        """The one to tell of progress, of all processes together."""
        return observer

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives when the first process does it, here too. If it fails there, all end."""
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` gives here, begun when the first process is done with it."""
        return work()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return [value]

    def give(
        self,
        tensor: torch.Tensor | None,
        like: tuple[tuple[int, ...], torch.dtype],
        device: torch.device,
        source: int,
        receivers: Collection[int],
    ) -> torch.Tensor | None:
        """Hand a tensor to some processes; all of them call it in the same order.

        Args:
            tensor: at `source`.
            like: its shape and dtype.
            device: where it is, and is put.
            source: who has it.
            receivers: who gets it.

        Returns:
            The tensor at `source` and the receivers, None elsewhere.
        """
        del like, device, source, receivers
        return tensor

    def wait(self) -> None:
        """Until all processes are here; the first one goes on telling of progress."""


class _Torchrun(Team):
    """The processes that torchrun has started."""

    def __init__(self) -> None:
        from torch.distributed.rendezvous import rendezvous  # not all builds of torch have it

        backend = "gloo"
        if torch.cuda.is_available():
            local = int(os.environ["LOCAL_RANK"])
            torch.cuda.set_device(local % torch.cuda.device_count())  # what "auto" and "cuda" mean from now on
            backend = "cpu:gloo,cuda:nccl"
        if network := _network_to(os.environ["MASTER_ADDR"]):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
        store, rank, size = next(rendezvous("env://"))
        super().__init__(rank, size, restarted=_restarts() > 0)
        self._store = dist.PrefixStore(f"tsenor attempt {_restarts()}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size, timeout=_PATIENCE)
        by_node: dict[int, list[int]] = defaultdict(list)
        for rank, node in enumerate(self.gather(int(os.environ["GROUP_RANK"]))):
            by_node[node].append(rank)
        self.nodes = list(by_node.values())
        self._observer = _Shared(self._store, self.rank, Observer())

    def observer(self, observer: Observer) -> Observer:
        self._observer = _Shared(self._store, self.rank, observer)
        return self._observer

    def first(self, work: Callable[[], T]) -> T:
        box: list[Any] = [None, 0]
        if self.rank == 0:
            try:
                box = [work(), None]
            except Exception as error:
                dist.broadcast_object_list([None, getattr(error, "exit_code", 1)])
                raise
        dist.broadcast_object_list(box)
        result, failed = box
        if failed is not None:
            raise SaidElsewhereError(failed)
        return cast("T", result)

    def in_turn(self, work: Callable[[], T]) -> T:
        done = [work()] if self.rank == 0 else []
        dist.barrier()
        return done[0] if done else work()

    def gather(self, value: T) -> list[T]:
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, value)
        return cast("list[T]", found)

    def give(
        self,
        tensor: torch.Tensor | None,
        like: tuple[tuple[int, ...], torch.dtype],
        device: torch.device,
        source: int,
        receivers: Collection[int],
    ) -> torch.Tensor | None:
        others = set(receivers) - {source}
        if not others or (len(others) == 1 and self.rank not in {source, *others}):
            return tensor
        if tensor is None:
            tensor = torch.empty(like[0], dtype=like[1], device=device)
        plain = tensor.contiguous().view(-1).view(torch.uint8)  # gloo does not know every dtype
        if len(others) > 1:
            dist.broadcast(plain, source)
        elif self.rank == source:
            dist.send(plain, min(others))
        elif self.rank in others:
            dist.recv(plain, source)
        return tensor if self.rank in {source, *others} else None

    def wait(self) -> None:
        self._store.add(_DONE, 1)
        while self.rank == 0 and self._store.add(_DONE, 0) < self.size:
            time.sleep(_POLL_S)
            self._observer.catch_up()
        dist.barrier()
        self._observer.catch_up()


class _Shared(Observer):
    """Tells the first process's observer of the bytes of all; records reach it where they are gathered."""

    def __init__(self, store: Any, rank: int, observer: Observer) -> None:  # noqa: ANN401  (torch publishes no type)
        self._store, self._rank, self._observer = store, rank, observer
        self._told, self._when, self._name = 0, 0.0, ""

    def planned(self, plan: Any) -> None:  # noqa: ANN401
        self._observer.planned(plan)

    def entered(self, stage: str) -> None:
        self._observer.entered(stage)

    def pruned(self, record: TensorRecord) -> None:
        self._observer.pruned(record)

    def advanced(self, name: str, nbytes: int) -> None:
        self._name = name
        if self._rank:
            self._store.add(_ADVANCED, nbytes)
            return
        self._observer.advanced(name, nbytes)
        if time.monotonic() - self._when > _POLL_S:
            self.catch_up()

    def catch_up(self) -> None:
        """Tell what others have done since the last time."""
        if self._rank == 0:
            self._when, done = time.monotonic(), self._store.add(_ADVANCED, 0)
            self._observer.advanced(self._name, done - self._told)
            self._told = done


def _restarts() -> int:
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def _network_to(host: str) -> str | None:
    """The interface that leads there. Gloo would take that of this machine's name, which is often the loopback's."""
    if sys.platform != "linux":
        return None
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    return None


def join_team() -> Team:
    """The processes that torchrun has started, or this one alone.

    Raises:
        TsenorError: the others cannot be reached.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return Team()
    if os.environ["WORLD_SIZE"] == "1":
        return Team(restarted=_restarts() > 0)
    try:
        return _Torchrun()
    except (RuntimeError, ValueError) as error:  # of its kinds of errors all are one of these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TsenorError(
            f"the other processes cannot be reached ({reason})",
            "see that all machines reach the first one, and set GLOO_SOCKET_IFNAME if they have several networks",
            code="no-team",
        ) from error

"""The broadcast group that weights travel through: gloo between CPUs, NCCL between GPUs, CUDA IPC within one GPU.

    rank 0 (learner)                   ranks 1..n (engines)              driver
    start(flat) -> wait                start(flat) -> wait               abandon(where): a member died
         '---- every wait ends with the transfer, the timeout, or ----------------'

A group is built straight from the backend class instead of through the default process group, so that it can be left
and rebuilt while a run goes on and so that several ranks may live in one process. gloo hears when a member dies. NCCL
and IPC do not, so nobody blocks in them: a wait looks at the transfer, the clock and the group's store in turn.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from asyncrl.utils.threads import started
from asyncrl.weights.ipc import IpcGroup, synchronize
from asyncrl.weights.receipts import ABANDONED, STORE_LOOK_S, count, wait_until

_group_numbers = itertools.count()


Audience: TypeAlias = Literal["rollouts", "evaluators"]
"""Who listens: the learner broadcasts to each in a group of its own, at times of its own."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where a broadcast group meets. `host` is the learner's node; `name` differs for every group ever built."""

    host: str
    port: int
    world_size: int
    name: str
    backend: str = "gloo"
    timeout_s: float = 120.0


def open_rendezvous(host: str, world_size: int, timeout_s: float, backend: str = "gloo") -> tuple[Rendezvous, TCPStore]:
    """A new meeting point at this node's address alone, on a free port; keep the store until all have joined."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(address[:2], family=family)  # of its own accord a store listens on all addresses
    store = TCPStore(
        host,
        listener.getsockname()[1],
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )
    name = f"asyncrl-{store.port}-{next(_group_numbers)}"
    return Rendezvous(host, store.port, world_size, name, backend, timeout_s), store


def abandon(where: Rendezvous, reason: str) -> None:
    """Ends every wait in the group with an error, from any process: for the driver, when it learns of a death.

    Over gloo it ends the wait for members that have not arrived; a death within a broadcast is heard there anyhow.
    """
    store = TCPStore(where.host, where.port, timeout=timedelta(seconds=where.timeout_s), wait_for_workers=False)
    PrefixStore(where.name, store).set(ABANDONED, reason)


class BroadcastFailed(RuntimeError):
    """A member of a broadcast group failed or was missing: of which one it was, the others know nothing."""


class BroadcastGroup:
    """One member of the group that weights travel through. Rank 0 is the learner and the source of every broadcast."""

    def __init__(
        self,
        where: Rendezvous,
        rank: int,
        address: str = "127.0.0.1",
        store: TCPStore | None = None,
        slots: list[Tensor] | None = None,
    ) -> None:
        """Blocks until all members have arrived. `address` is this member's own node, for the gloo transport.

        At rank 0, `store` is the opened meeting point, and `slots` are the send buffers that groups over CUDA IPC make
        one after the other: the caller keeps the list, the next group goes on with what is in it.

        Raises `BroadcastFailed` naming the rendezvous when the others do not arrive within `where.timeout_s`.
        """
        self.where, self.rank = where, rank
        timeout = timedelta(seconds=where.timeout_s)
        try:
            store = store or TCPStore(where.host, where.port, where.world_size, timeout=timeout, wait_for_workers=False)
            self._store = PrefixStore(where.name, store)
            self._group = _backend(where, self._store, rank, address, slots if slots is not None else [])
        except Exception as error:
            raise BroadcastFailed(
                f"rank {rank} of {where.world_size} could not join the broadcast group {where.name!r} at "
                f"{where.host}:{where.port} within {where.timeout_s:g} s: {error}"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where buffers must live to travel through this group."""
        return torch.device("cpu" if self.where.backend == "gloo" else "cuda")

    def buffer(self, num_bytes: int, largest: int) -> Tensor:
        """Room for what rank 0 broadcasts next, uint8[num_bytes]; no broadcast needs more than `largest` bytes.

        Over CUDA IPC the same `IN_FLIGHT` buffers are given again and again, each once every member has copied out of
        it; raises as a wait does if that does not happen.
        """
        if isinstance(self._group, IpcGroup):
            return self._group.buffer(num_bytes, largest)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def start(self, flat: Tensor) -> Callable[[], None]:
        """Begins to send from rank 0, or to fill `flat` (uint8) in place elsewhere. Call what it returns to wait.

        Over CUDA IPC rank 0 sends what `buffer` gave it last.
        A member whose broadcast fails leaves the group, so that the others hear of it at once and not by their timeout.
        """
        failed = (
            f"rank {self.rank}: broadcast of {flat.numel()} bytes failed or took longer than {self.where.timeout_s:g} s"
        )
        try:
            if self._group is None:
                raise RuntimeError("this member has left the group after a failure")
            work = self._group.broadcast(flat, 0)
        except Exception as error:
            self.leave()
            raise BroadcastFailed(f"{failed}: {error}") from error

        def wait() -> None:
            nonlocal work
            try:
                if self.where.backend == "nccl":
                    wait_until(work.is_completed, self._store, self.where.timeout_s)
                work.wait()
                synchronize(flat)  # the wait above is of the stream, not of this thread
            except Exception as error:
                work = None  # it holds connections open
                self.leave()
                raise BroadcastFailed(f"{failed}: {error}") from error

        return wait

    def leave(self) -> None:
        """Ends the membership, before another group is joined: NCCL would wait a minute for members that are gone."""
        group, self._group = self._group, None
        if group is not None and self.where.backend == "nccl":
            group.abort()  # its kernel waits on the device for the member that is gone


def _backend(where: Rendezvous, store: PrefixStore, rank: int, address: str, slots: list[Tensor]) -> Any:
    """Connects to the others, once all of them have arrived: torch would wait for one that is gone without a look."""
    timeout = timedelta(seconds=where.timeout_s)
    # Members may be waited for long, and an engine generates in this process meanwhile.
    count(store, "join", where.world_size, where.timeout_s).wait(STORE_LOOK_S)
    if where.backend == "gloo":
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        return ProcessGroupGloo(store, rank, where.world_size, options)
    if where.backend == "nccl":
        # NCCL waits for ever for a member that dies while they meet: so does the thread, and nobody else.
        meeting = started(partial(_meet_over_nccl, store, rank, where.world_size, torch.cuda.current_device()))
        wait_until(meeting.done, store, where.timeout_s, STORE_LOOK_S)
        return meeting.result()
    if where.backend == "ipc":
        return IpcGroup(store, rank, where.world_size, where.timeout_s, slots)
    raise ValueError(f"weights.backend must be 'gloo', 'nccl' or 'ipc', got {where.backend!r}")


def _meet_over_nccl(store: PrefixStore, rank: int, world_size: int, device: int) -> Any:
    torch.cuda.set_device(device)  # each thread has its own
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=1)  # `wait_until` ends waits; torch's own watchdog would hold up the abort
    with _own_error_handling():
        group: Any = torch.distributed.ProcessGroupNCCL(store, rank, world_size, options)
    # NCCL meets at the first collective. Here, so that a member that is missing is missed at the join.
    group.broadcast(torch.zeros(1, device="cuda"), 0).wait()
    torch.cuda.synchronize()
    return group


@contextlib.contextmanager
def _own_error_handling() -> Iterator[None]:
    """A group that is built here does not end its process when a broadcast takes too long; `wait_until` sees to it."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

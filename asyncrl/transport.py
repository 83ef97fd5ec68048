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
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from torch.multiprocessing.reductions import reduce_tensor

from asyncrl.threads import started

IN_FLIGHT = 2
"""Broadcasts that a member may have begun without having waited for them, over CUDA IPC."""
_LOOK_S = 0.0002  # between two looks at a transfer
_STORE_LOOK_S = 0.02  # the same at the store, which costs more
_ABANDONED = "abandoned"
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
    PrefixStore(where.name, store).set(_ABANDONED, reason)


class BroadcastGroup:
    """One member of the group that weights travel through. Rank 0 is the learner and the source of every broadcast."""

    def __init__(self, where: Rendezvous, rank: int, address: str = "127.0.0.1", store: TCPStore | None = None) -> None:
        """Blocks until all members have arrived. `address` is this member's own node, for the gloo transport;
        `store` is the opened meeting point, at rank 0.

        Raises `RuntimeError` naming the rendezvous when the others do not arrive within `where.timeout_s`.
        """
        self.where, self.rank = where, rank
        timeout = timedelta(seconds=where.timeout_s)
        try:
            store = store or TCPStore(where.host, where.port, where.world_size, timeout=timeout, wait_for_workers=False)
            self._store = PrefixStore(where.name, store)
            self._group = _backend(where, self._store, rank, address)
        except Exception as error:
            raise RuntimeError(
                f"rank {rank} of {where.world_size} could not join the broadcast group {where.name!r} at "
                f"{where.host}:{where.port} within {where.timeout_s:g} s: {error}"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where buffers must live to travel through this group."""
        return torch.device("cpu" if self.where.backend == "gloo" else "cuda")

    def start(self, flat: Tensor) -> Callable[[], None]:
        """Begins to send from rank 0, or to fill `flat` (uint8) in place elsewhere. Call what it returns to wait.

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
            raise RuntimeError(f"{failed}: {error}") from error

        def wait() -> None:
            nonlocal work
            try:
                if self.where.backend == "nccl":
                    _wait_until(work.is_completed, self._store, self.where.timeout_s)
                work.wait()
                _synchronize(flat)  # the wait above is of the stream, not of this thread
            except Exception as error:
                work = None  # it holds connections open
                self.leave()
                raise RuntimeError(f"{failed}: {error}") from error

        return wait

    def leave(self) -> None:
        """Ends the membership, before another group is joined: NCCL would wait a minute for members that are gone."""
        group, self._group = self._group, None
        if group is not None and self.where.backend == "nccl":
            group.abort()  # its kernel waits on the device for the member that is gone


def _wait_until(done: Callable[[], bool], store: PrefixStore, timeout_s: float, look_s: float = _LOOK_S) -> None:
    """Raises `TimeoutError`, or `RuntimeError` when the group was abandoned."""
    end = time.monotonic() + timeout_s
    looks_at_store = max(1, round(_STORE_LOOK_S / look_s))
    for look in itertools.count(1):
        if done():
            return
        if time.monotonic() > end:
            raise TimeoutError(f"nothing came for {timeout_s:g} s")
        if look % looks_at_store == 0 and store.check([_ABANDONED]):
            raise RuntimeError(f"the group was abandoned: {store.get(_ABANDONED).decode()}")
        time.sleep(look_s)


def _backend(where: Rendezvous, store: PrefixStore, rank: int, address: str) -> Any:
    """Connects to the others, once all of them have arrived: torch would wait for one that is gone without a look."""
    timeout = timedelta(seconds=where.timeout_s)
    # Members may be waited for long, and an engine generates in this process meanwhile.
    _count(store, "join", where.world_size, where.timeout_s).wait(_STORE_LOOK_S)
    if where.backend == "gloo":
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        return ProcessGroupGloo(store, rank, where.world_size, options)
    if where.backend == "nccl":
        # NCCL waits for ever for a member that dies while they meet: so does the thread, and nobody else.
        meeting = started(partial(_meet_over_nccl, store, rank, where.world_size, torch.cuda.current_device()))
        _wait_until(meeting.done, store, where.timeout_s, _STORE_LOOK_S)
        return meeting.result()
    if where.backend == "ipc":
        return _IpcGroup(store, rank, where.world_size, where.timeout_s)
    raise ValueError(f"weights.backend must be 'gloo', 'nccl' or 'ipc', got {where.backend!r}")


def _meet_over_nccl(store: PrefixStore, rank: int, world_size: int, device: int) -> Any:
    torch.cuda.set_device(device)  # each thread has its own
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=1)  # `_wait_until` ends waits; torch's own watchdog would hold up the abort
    with _own_error_handling():
        group: Any = torch.distributed.ProcessGroupNCCL(store, rank, world_size, options)
    # NCCL meets at the first collective. Here, so that a member that is missing is missed at the join.
    group.broadcast(torch.zeros(1, device="cuda"), 0).wait()
    torch.cuda.synchronize()
    return group


@contextlib.contextmanager
def _own_error_handling() -> Iterator[None]:
    """A group that is built here does not end its process when a broadcast takes too long; `_wait_until` sees to it."""
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


class _IpcGroup:
    """Ranks that share one GPU: rank 0 hands out its buffer by a CUDA IPC handle, the others copy from it.

    NCCL refuses two ranks on one GPU, and gloo would take every byte through the host. The store carries the handles,
    which are pickles: like every store of torch it must be reachable for the members of the run only.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float) -> None:
        self._store, self._rank, self._world_size, self._timeout_s = store, rank, world_size, timeout_s
        self._number = 0

    def broadcast(self, flat: Tensor, _root: int) -> _Receipt:
        """Hands `flat` out at rank 0, fills it elsewhere. The receipt is of all ranks."""
        self._number += 1
        name = f"broadcast-{self._number}"
        if self._rank == 0:
            self._forget(f"broadcast-{self._number - 2 * IN_FLIGHT}")
            _synchronize(flat)  # the others' copies are ordered by nothing else
            self._store.set(name, _export(flat))
            return _Receipt(self._store, name, self._timeout_s)
        _wait_until(lambda: self._store.check([name]), self._store, self._timeout_s)
        try:
            flat.copy_(_open(self._store.get(name)))
            _synchronize(flat)
        except Exception as error:
            self._count(name, f"rank {self._rank}: {error}")
            raise
        return self._count(name)

    def _count(self, name: str, failure: str = "") -> _Receipt:
        return _count(self._store, name, self._world_size - 1, self._timeout_s, failure)

    def _forget(self, name: str) -> None:
        """Nobody looks at it any more: rank 0 begins a broadcast when all have taken part in the one `IN_FLIGHT`
        before, and whoever has taken part in that one has the receipt of the one as many before it."""
        for key in (name, f"{name}/count", f"{name}/all"):
            self._store.delete_key(key)


def _count(store: PrefixStore, name: str, expected: int, timeout_s: float, failure: str = "") -> _Receipt:
    """The last rank to come opens the way for all, and so does the first to fail."""
    if failure:  # told before it is counted: the last to come must not open the way as if all were well
        store.compare_set(f"{name}/all", "", failure)
    if store.add(f"{name}/count", 1) == expected:
        store.compare_set(f"{name}/all", "", "")  # a failure that is there stays
    return _Receipt(store, name, timeout_s)


@dataclass(frozen=True, slots=True)
class _Receipt:
    """Something that every rank takes part in."""

    store: PrefixStore
    name: str
    timeout_s: float

    def is_completed(self) -> bool:
        return bool(self.store.check([f"{self.name}/all"]))

    def wait(self, look_s: float = _LOOK_S) -> None:
        """Raises the first failure of any rank."""
        _wait_until(self.is_completed, self.store, self.timeout_s, look_s)
        if failure := self.store.get(f"{self.name}/all"):
            raise RuntimeError(failure.decode())


def _export(flat: Tensor) -> bytes:
    return pickle.dumps(reduce_tensor(flat))


def _open(handle: bytes) -> Tensor:
    rebuild, arguments = pickle.loads(handle)
    opened: Tensor = rebuild(*arguments)
    return opened


def _synchronize(flat: Tensor) -> None:
    if flat.is_cuda:
        torch.cuda.current_stream().synchronize()

"""The broadcast group of ranks that share one GPU."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from asyncrl.weights.receipts import Receipt, count, wait_until

IN_FLIGHT = 2
"""Broadcasts that a member may have begun without having waited for them."""


class IpcGroup:
    """Ranks that share one GPU: rank 0 lends its send buffers by CUDA IPC, the others copy out of them.

        rank 0                                store                      every other rank
        a free slot, packed
        its first time: one handle a rank --> slot-S-BYTES/RANK -------> opened once
        broadcast N ------------------------> broadcast-N: its slot ---> copied out; counted
        the slot is free again <------------- broadcast-N/all <--------- by the last of them

    NCCL refuses two ranks on one GPU, and gloo would take every byte through the host. The buffers live longer than an
    update, which allocates and opens nothing. torch frees an exported block when its counter, one for each export and
    made for one user, is 0: two users would take it past 0, where it is never freed, so each rank gets an export of its
    own. A rank that is killed never counts; rank 0's buffers go from group to group, so that no memory is lost then
    either. The store carries the handles, which are pickles: like every store of torch it must be reachable for the
    members of the run only.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float, slots: list[Tensor]) -> None:
        self._store, self._rank, self._world_size, self._timeout_s = store, rank, world_size, timeout_s
        self._number = 0
        self._slots = slots
        self._last = 0  # the slot that `buffer` gave last
        self._receipts: dict[int, Receipt] = {}  # by slot
        self._exported: set[str] = set()
        self._opened: dict[str, Tensor] = {}

    def buffer(self, num_bytes: int, largest: int) -> Tensor:
        """At rank 0: a slot that every rank has copied out of, cut to uint8[num_bytes]."""
        free = [slot for slot in range(len(self._slots)) if self._is_free(slot)]
        if free:
            self._last = free[0]
        elif len(self._slots) < IN_FLIGHT:
            self._last = len(self._slots)
            self._slots.append(torch.empty(0, dtype=torch.uint8))
        else:
            self._last = min(self._receipts, key=lambda slot: self._receipts[slot].number)
            self._receipts[self._last].wait()
        if self._slots[self._last].numel() < largest:
            self._slots[self._last] = torch.empty(largest, dtype=torch.uint8, device=_ipc_device())
        if self._key(self._last) not in self._exported:
            self._export(self._last)
        return self._slots[self._last][:num_bytes]

    def broadcast(self, flat: Tensor, _root: int) -> Receipt:
        """Hands `flat` out at rank 0, fills it elsewhere. The receipt is of all ranks."""
        self._number += 1
        name = f"broadcast-{self._number}"
        if self._rank == 0:
            if not self._slots or flat.data_ptr() != self._slots[self._last].data_ptr():
                raise RuntimeError("rank 0 sends over CUDA IPC what buffer() gave it")
            self._forget(self._number - 2 * IN_FLIGHT)
            synchronize(flat)  # the others' copies are ordered by nothing else
            self._store.set(name, f"{flat.numel()} {self._key(self._last)}")
            receipt = self._receipts[self._last] = Receipt(self._store, name, self._timeout_s, self._number)
            return receipt
        wait_until(lambda: self._store.check([name]), self._store, self._timeout_s)
        try:
            num_bytes, key = self._store.get(name).decode().split()
            flat.copy_(self._open(key)[: int(num_bytes)])
            synchronize(flat)
        except Exception as error:
            self._count(name, f"rank {self._rank}: {error}")
            raise
        return self._count(name)

    def _is_free(self, slot: int) -> bool:
        return slot not in self._receipts or self._receipts[slot].is_completed()

    def _key(self, slot: int) -> str:
        return f"slot-{slot}-{self._slots[slot].numel()}"

    def _export(self, slot: int) -> None:
        """Once in a group. An update that the group before did not finish may still be packing into the slot."""
        if self._slots[slot].is_cuda:
            torch.cuda.synchronize()
        key = self._key(slot)
        for rank in range(1, self._world_size):
            self._store.set(f"{key}/{rank}", _export(self._slots[slot]))
        self._exported.add(key)

    def _open(self, key: str) -> Tensor:
        if key not in self._opened:
            slot = key.rpartition("-")[0]
            self._opened = {name: opened for name, opened in self._opened.items() if not name.startswith(f"{slot}-")}
            self._opened[key] = _open(self._store.get(f"{key}/{self._rank}"))
        return self._opened[key]

    def _count(self, name: str, failure: str = "") -> Receipt:
        return count(self._store, name, self._world_size - 1, self._timeout_s, failure)

    def _forget(self, number: int) -> None:
        """Nobody looks at that broadcast any more: rank 0 begins one when all have taken part in the one `IN_FLIGHT`
        before, and whoever has taken part in that one has the receipt of the one as many before it."""
        for ending in ("", "/count", "/all"):
            self._store.delete_key(f"broadcast-{number}{ending}")
        self._receipts = {slot: receipt for slot, receipt in self._receipts.items() if receipt.number > number}


def _ipc_device() -> torch.device:
    return torch.device("cuda")


def _export(flat: Tensor) -> bytes:
    return pickle.dumps(reduce_tensor(flat))


def _open(handle: bytes) -> Tensor:
    rebuild, arguments = pickle.loads(handle)
    opened: Tensor = rebuild(*arguments)
    return opened


def synchronize(flat: Tensor) -> None:
    if flat.is_cuda:
        torch.cuda.current_stream().synchronize()

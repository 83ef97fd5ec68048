"""What the members of a broadcast group tell one another through its store: who took part, and that it is over.

NCCL and CUDA IPC do not notice when a member dies, so nobody blocks in them: a wait looks at the transfer, the clock
and the store in turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed import PrefixStore

LOOK_S = 0.0002  # between two looks at a transfer
STORE_LOOK_S = 0.02  # the same at the store, which costs more
ABANDONED = "abandoned"
"""Key under which the store says why the group is over."""


def wait_until(done: Callable[[], bool], store: PrefixStore, timeout_s: float, look_s: float = LOOK_S) -> None:
    """Raises `TimeoutError`, or `RuntimeError` when the group was abandoned."""
    end = time.monotonic() + timeout_s
    looks_at_store = max(1, round(STORE_LOOK_S / look_s))
    for look in itertools.count(1):
        if done():
            return
        if time.monotonic() > end:
            raise TimeoutError(f"nothing came for {timeout_s:g} s")
        if look % looks_at_store == 0 and store.check([ABANDONED]):
            raise RuntimeError(f"the group was abandoned: {store.get(ABANDONED).decode()}")
        time.sleep(look_s)


def count(store: PrefixStore, name: str, expected: int, timeout_s: float, failure: str = "") -> Receipt:
    """The last rank to come opens the way for all, and so does the first to fail."""
    if failure:  # told before it is counted: the last to come must not open the way as if all were well
        store.compare_set(f"{name}/all", "", failure)
    if store.add(f"{name}/count", 1) == expected:
        store.compare_set(f"{name}/all", "", "")  # a failure that is there stays
    return Receipt(store, name, timeout_s)


@dataclass(frozen=True, slots=True)
class Receipt:
    """Something that every rank takes part in."""

    store: PrefixStore
    name: str
    timeout_s: float
    number: int = 0
    """Of a broadcast, in its group."""

    def is_completed(self) -> bool:
        return bool(self.store.check([f"{self.name}/all"]))

    def wait(self, look_s: float = LOOK_S) -> None:
        """Raises the first failure of any rank."""
        wait_until(self.is_completed, self.store, self.timeout_s, look_s)
        if failure := self.store.get(f"{self.name}/all"):
            raise RuntimeError(failure.decode())

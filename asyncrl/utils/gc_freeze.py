"""Keeps Python's garbage collector off what a process holds for as long as it lives."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 10_000
"""Objects made and not yet freed that start a collection of the youngest; Python's own number is 700 or 2,000."""


def settle() -> None:
    """For a process of our own that has started and will now serve: what is there stays, and is looked at no more.

    Models and their libraries are some hundred thousand objects, and a full collection that walks all of them stops the
    process for half a second, again and again, as requests and groups come and go. Cycles among what is there now are
    never freed any more; everything else is, as before.
    """
    gc.collect()
    _leave_alone()


@contextmanager
def settled() -> Iterator[None]:
    """The same for as long as this lasts, in a process that is not ours alone, such as a notebook's. Garbage is not
    looked for before: what there is stays until the end."""
    before = gc.get_threshold()
    _leave_alone()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def _leave_alone() -> None:
    gc.freeze()
    gc.set_threshold(_YOUNG, 10, 10)

"""Losses and advantages of the user, by import path."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from asyncrl.algo.loss_spec import Loss
from asyncrl.utils.importing import load_module


def check(loss: Loss) -> None:
    """Imports what `loss` names. Raises `ValueError` saying which half of a path is wrong."""
    for path in (loss.function, loss.advantage):
        if path:
            load(path)


@cache
def load(path: str) -> Callable[..., Any]:
    """The function at `package.module:function`. Raises `ValueError` saying which half of the path is wrong."""
    told, form = repr(path), "package.module:function"
    module, name = load_module(path, told, form)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{told}: module {module.__name__!r} has no function {name!r}; write {form!r}")
    return function

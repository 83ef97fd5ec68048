"""Losses and advantages of the user, by import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from asyncrl.algo.method import Loss


def check(loss: Loss) -> None:
    """Imports what `loss` names. Raises `ValueError` saying which half of a path is wrong."""
    for path in (loss.function, loss.advantage):
        if path:
            load(path)


@cache
def load(path: str) -> Callable[..., Any]:
    """The function at `package.module:function`. Raises `ValueError` saying which half of the path is wrong."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path!r}: no module {error.name!r}; write 'package.module:function', and for a file of your own add its "
            "folder to PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path!r}: module {module_name!r} has no function {name!r}; write 'package.module:function'")
    return function

"""Modules of the user, named in a configuration by import path."""

from __future__ import annotations

import importlib
import traceback
from types import ModuleType


def load_module(path: str, told: str, form: str) -> tuple[ModuleType, str]:
    """The module of `module:name`, and the name, which nobody has looked for yet.

    Raises `ValueError` if there is no such module, or saying where it failed while it was imported; `told` is how
    errors speak of the path, `form` how it is written.
    """
    module_name, _, name = path.partition(":")
    try:
        return importlib.import_module(module_name), name
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{told}: no module {error.name!r}; write {form!r}, and for a file of your own add its folder to PYTHONPATH"
        ) from error
    except Exception as error:  # whatever the user's code raises
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
        where = "".join(f", {frame.filename} line {frame.lineno}" for frame in frames[1:2])  # the first is this file
        raise ValueError(f"{told}: importing {module_name} failed{where}: {type(error).__name__}: {error}") from error

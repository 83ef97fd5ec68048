"""Code of the user: modules that a configuration names by import path, and the line of it that raised."""

from __future__ import annotations

import importlib
import sysconfig
import traceback
from types import ModuleType

_LIBRARIES = ("<frozen", *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")))


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
        failed = f"importing {module_name} failed{line_of(error)}"
        raise ValueError(f"{told}: {failed}: {type(error).__name__}: {error}") from error


def line_of(error: BaseException) -> str:
    """Where the user's code raised what the caller has caught: its own line, not that of a library which it called.

    A comma, file and line; nothing where no line is the user's.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the caller's
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    return f", {own[-1].filename} line {own[-1].lineno}" if own else ""

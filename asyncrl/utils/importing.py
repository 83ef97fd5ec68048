"""What a run finds beside the package: modules that a configuration names by import path, the line of them that raised,
folders, and the interpreter."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from asyncrl.utils.quote import cut, quote

_PACKAGE = str(Path(__file__).parents[1])
_NOT_THE_USERS = (
    "<frozen",
    *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
    _PACKAGE,
)
LOCAL = ("models/", "data/", "runs/", "./", "../", "/")
"""What paths of this machine begin with; anything else may be an id of the hub."""


def load_module(path: str, told: str, form: str) -> tuple[ModuleType, str]:
    """The module of `module:name`, and the name, which nobody has looked for yet.

    Raises `ValueError` if there is no such module, or saying where it failed while it was imported; `told` is how
    errors speak of the path, `form` how it is written.
    """
    module_name, _, name = path.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        file = Path(module_name)
        written = f"{file.stem}:{name or form.partition(':')[2]}"
        raise ValueError(
            f"{told} names a file: write {written!r}, and have the file's folder on PYTHONPATH "
            f"(export PYTHONPATH={file.absolute().parent})"
        )
    if not name:
        raise ValueError(f"{told} has no ':' with a name after it: write {form!r}")
    try:
        return importlib.import_module(module_name), name
    except Exception as error:  # whatever the user's code raises
        remedy = ""
        if isinstance(error, ModuleNotFoundError):
            if f"{module_name}.".startswith(f"{error.name}."):
                raise ValueError(
                    f"{told}: no module {error.name!r}; write {form!r}, and for a file of your own add its folder to "
                    "PYTHONPATH"
                ) from error
            remedy = "; install what is missing, or add its folder to PYTHONPATH"
        failed = f"importing {module_name} failed{line_of(error)}"
        raise ValueError(f"{told}: {failed}: {type(error).__name__}: {cut(str(error))}{remedy}") from error


def line_of(error: BaseException) -> str:
    """Where the user's code raised what the caller has caught: its own line, not that of what it called.

    A comma, file and line; nothing where no line is the user's.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the caller's
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
    return f", {own[-1].filename} line {own[-1].lineno}" if own else ""


@contextmanager
def told(what: str) -> Iterator[None]:
    """What the user's code raises becomes a `ValueError` that says what was called, and where that failed. A
    `ValueError` of this package explains itself, and stays as it is."""
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ValueError) and last.filename.startswith(_PACKAGE):
            raise
        where = line_of(error) or f", {last.filename} line {last.lineno}"
        raise ValueError(f"{what} raised {quote(error, 400)}{where}") from error


def check_folder(path: str | Path, script: str, knob: str) -> None:
    """Raises `ValueError` if nothing is at a path that looks like one of this machine: the hub need not be asked, which
    takes a minute where there is no network. `script` makes such folders, `knob` names them."""
    if str(path).startswith("~"):
        raise ValueError(f"{knob} is {str(path)!r}, and nobody expands ~ there: write the folder in full")
    if str(path).startswith(LOCAL) and not Path(path).exists():
        raise ValueError(
            f"there is no folder {str(path)!r}, seen from {Path.cwd()}: make it, for example with `{interpreter()} "
            f"{script}`, or name another in {knob}"
        )


def check_run(folder: Path) -> None:
    """Raises `ValueError` unless `folder` is that of a run, naming some that are."""
    if not (folder / "config.json").is_file():
        why = "it has no config.json" if folder.exists() else f"it is not there, seen from {Path.cwd()}"
        raise ValueError(f"{folder} is no run folder: {why}; {runs_near(folder)}")


def runs_near(folder: Path) -> str:
    """The newest run folders in `folder`, beside it or where runs go by default, as an advice."""
    for parent in (folder, folder.parent, Path("runs")):
        if runs := sorted(file.parent for file in parent.glob("*/run.json")):
            return f"the newest run in {parent} is {runs[-1]}"
    return "runs make their folders in run_dir ('runs' by default)"


def interpreter() -> str:
    """The Python that runs, as it is typed in the current folder."""
    near = os.path.relpath(sys.executable)
    return sys.executable if near.startswith("..") else near

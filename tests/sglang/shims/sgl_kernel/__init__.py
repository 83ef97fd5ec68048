"""Stands in for SGLang's compiled kernels on a CPU.

SGLang imports names from here that a dense text model never calls on a CPU; each stands for a kernel that raises when
called. No torch operators are registered: SGLang would take their presence for a CPU with matrix extensions and use
them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

__version__ = "0.0.0"


class _Absent:
    """A kernel, or a table of things that only kernels use."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_args: object, **_keywords: object) -> NoReturn:
        raise NotImplementedError(f"{self._name} is a compiled kernel that does not exist on this machine")

    def __getattr__(self, name: str) -> _Absent:
        return _lookup(self._name, name)


class _Submodules(MetaPathFinder, Loader):
    """Makes `sgl_kernel.<anything>` importable, with the same stand-ins."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(name, self, is_package=True) if name.startswith("sgl_kernel.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        del spec
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = lambda name: _lookup(module.__name__, name)


def _lookup(owner: str, name: str) -> _Absent:
    if name.startswith("__"):
        raise AttributeError(f"{owner!r} has no attribute {name!r}")
    return _Absent(f"{owner}.{name}")


def __getattr__(name: str) -> _Absent:
    return _lookup(__name__, name)


sys.meta_path.append(_Submodules())

"""Makes the CUDA build of torchvision importable on a machine without CUDA.

Its compiled operators cannot load there, and importing torchvision then fails because it registers shape functions for
two of them. They are declared here, without an implementation, just before torchvision is first imported. Python
imports this module by itself at start-up when its folder is on PYTHONPATH, in spawned processes too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it only notices the first import of torchvision."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare()
        return None


def _declare() -> None:
    import torch

    if torch.cuda.is_available():
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)  # The operators disappear with the object.


sys.meta_path.insert(0, _DeclareOperators())

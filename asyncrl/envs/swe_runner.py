"""Runs the tests of a repository and signs what came of them: the program that `swe.py` starts in a sandbox, as text.

On stdin, a line of JSON: `key`, and `tests`, paths in the folder "repository". The last line on stdout is the key and,
as JSON, the tests that passed and those that failed; what comes before it is for the model. The key is read before any
code of the repository runs: one that prints a result of its own and exits has signed nothing.

A test passes if it ran to its end without a failure, was not skipped, and neither it nor `unittest` was replaced. No
value that a test compares may equal two things that differ.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import sys
import traceback
import unittest
import unittest.mock
from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePosixPath
from types import FunctionType, ModuleType
from typing import Any

_CHECK = "__checked__"
_DEEPEST = 3
_PLAIN = (bool, int, float, complex, str, bytes, type(None), list, tuple, set, frozenset, dict)
_PROBES = (object(), -7919, 104729.5, "one", "other", b"1", b"2", [7919], [0, 1], (7919,), (0, 1), {7: 1}, {8: 1})
_ANY: Any = type(unittest.mock.ANY)


def main() -> None:
    """Never returns: what the repository does at exit comes too late."""
    task = json.loads(sys.stdin.readline())
    key, paths = task["key"], task["tests"]
    os.chdir("repository")
    sys.path[0] = os.getcwd()
    for name in [name for name in dir(unittest.TestCase) if name.startswith("assert")]:
        setattr(unittest.TestCase, name, _asserting(getattr(unittest.TestCase, name)))
    frozen = _state()
    suite, failed = unittest.TestSuite(), []
    codes: dict[str, Any] = {}
    for path in paths:
        try:
            loaded = unittest.defaultTestLoader.loadTestsFromModule(_load(path))
        except BaseException:  # SystemExit and SkipTest too
            failed.append(path)
            traceback.print_exc(file=sys.stdout)
        else:
            codes |= {_id(test): _code(test) for test in _flat(loaded)}
            suite.addTest(loaded)
    passed: list[str] = []

    class Result(unittest.TextTestResult):
        def addSuccess(self, test: unittest.TestCase) -> None:
            super().addSuccess(test)
            if _state() == frozen and _code(test) is codes.get(_id(test)):
                passed.append(_id(test))
            else:
                failed.append(_id(test))

    runner = unittest.TextTestRunner(stream=sys.stdout, resultclass=Result)  # type: ignore[arg-type]
    result = runner.run(suite)
    failed += [str(test) for test, _ in [*result.failures, *result.errors, *result.expectedFailures]]
    failed += map(str, result.unexpectedSuccesses)
    print("passed" if passed and not failed else "failed", len(passed))
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        os.write(1, f"\n{key} {json.dumps([passed, failed])}\n".encode())
    os._exit(0)


def _load(path: str) -> ModuleType:
    """A test file as a module, by its place: its folders need no __init__.py. Comparisons in it check what they get."""
    parts = PurePosixPath(path).with_suffix("").parts
    sys.path.append(os.path.abspath(os.path.dirname(path)))  # for helpers beside it
    with suppress(ImportError):
        if len(parts) > 1:
            importlib.import_module(".".join(parts[:-1]))
    spec = importlib.util.spec_from_file_location(".".join(parts), os.path.abspath(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with open(path, encoding="utf-8") as file:
        tree = ast.fix_missing_locations(_Checking().visit(ast.parse(file.read(), path)))
    sys.modules[module.__name__] = module
    setattr(module, _CHECK, _checked)
    exec(compile(tree, path, "exec", dont_inherit=True), vars(module))
    return module


class _Checking(ast.NodeTransformer):
    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        checks: list[ast.expr] = [
            ast.Call(ast.Name(_CHECK, ast.Load()), [one], []) for one in (node.left, *node.comparators)
        ]
        node.left, node.comparators = checks[0], checks[1:]
        return node


def _asserting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def checking(case: unittest.TestCase, *args: Any, **named: Any) -> Any:
        for value in (*args, *named.values()):
            _checked(value)
        return method(case, *args, **named)

    return checking


def _checked(value: Any) -> Any:
    """The value. Raises `AssertionError` for one that equals two things that differ: it would be any right answer."""
    if _equals_others(value, _DEEPEST):
        raise AssertionError(f"an object of {type(value).__name__} equals values that differ from each other")
    return value


def _equals_others(value: Any, depth: int) -> bool:
    if isinstance(value, list | tuple | set | frozenset | dict) and depth:
        each = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if any(_equals_others(one, depth - 1) for one in each):
            return True
    if type(value) in _PLAIN or (type(value) is _ANY and "ANY" in _test_text()):
        return False
    return sum(_equal(value, probe) for probe in _PROBES) > 1


def _equal(value: Any, probe: Any) -> bool:
    try:
        return bool(value == probe)
    except Exception:  # an equality may take its own kind for granted
        return False


def _test_text() -> str:
    """The names in the test that is running: one that has `mock.ANY` may compare with it."""
    frame = sys._getframe()
    names: list[str] = []
    while frame.f_back is not None:
        frame = frame.f_back
        if _CHECK in frame.f_globals:
            names += frame.f_code.co_names
    return " ".join(names)


def _flat(suite: Any) -> list[unittest.TestCase]:
    return [test for part in suite for test in _flat(part)] if isinstance(suite, unittest.TestSuite) else [suite]


def _id(test: unittest.TestCase) -> str:
    return f"{type(test).__module__}.{type(test).__qualname__}.{test._testMethodName}"


def _code(test: unittest.TestCase) -> Any:
    method = getattr(type(test), test._testMethodName, None)
    return getattr(getattr(method, "__wrapped__", method), "__code__", None)


def _state() -> list[Any]:
    """What the verdict rests on: replacing any of it shows."""
    kinds = (unittest.TestCase, unittest.TestSuite, unittest.TestResult, unittest.TextTestResult)
    found: list[Any] = [
        (name, value) for kind in kinds for name, value in sorted(vars(kind).items(), key=lambda one: one[0])
    ]
    functions: list[Any] = [value for _, value in found if isinstance(value, FunctionType)]
    functions += [_checked, _equals_others, _equal, _state, _asserting]
    return found + [function.__code__ for function in functions]


if __name__ == "__main__":
    main()

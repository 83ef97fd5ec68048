"""Code generation against unit tests, on rows as LiveCodeBench has them (Jain et al., 2024).

The program of a reply runs in a sandbox, one run a test. What a test expects stays outside of it.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from asyncrl.envs.base import Tokenizer
from asyncrl.envs.chat import Message
from asyncrl.envs.data import Row
from asyncrl.envs.multi_turn import SHIPPED, Episode, MultiTurn, field
from asyncrl.envs.sandbox import Limits, Sandbox
from asyncrl.envs.tools import shorten
from asyncrl.utils.quote import cut, quote

# Appended to a program with a function to call: arguments come in as lines of JSON, the result goes out as JSON.
_CALL = """

if __name__ == "__main__":
    import json as _json, sys as _sys
    _arguments = [_json.loads(_line) for _line in _sys.stdin.read().splitlines() if _line.strip()]
    _function = getattr(Solution(), {name!r}) if "Solution" in globals() else globals()[{name!r}]
    print(_json.dumps(_function(*_arguments)))
"""
_IMPORTABLE = "it can import the standard library, nothing else."
# What LiveCodeBench's solutions take for granted: what is in these modules, the modules by name (which come second, as
# some hold a function of their own name), and calls this deep.
_IMPORTS = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from typing import *
from builtins import *
import bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator, random, re
import statistics, string, sys, typing
sys.setrecursionlimit(50000)
"""
_FENCE = re.compile(r"```[ \t]*+([\w+.-]*+)[^\n`]*+\n")
_LANGUAGES = ("", "py", "py3", "python", "python3")
_ROOM = 1 << 16
"""Bytes that a program may print at least; or twice the longest output that the data expect."""


@dataclass(frozen=True, slots=True)
class UnitTest:
    """Input and what must come out: text of stdin and stdout, or lines of JSON for a function."""

    input: str
    output: str
    functional: bool


class CodeTask(MultiTurn):
    """Rows of `question_content`, `starter_code`, `public_test_cases`, `private_test_cases` and `metadata`.

    Reward 1 if the last program passes every test. With `max_turns` above 1 a program that fails a public test is shown
    which, and may be replaced.
    """

    pass_reward = 1.0

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        data: str | Path = SHIPPED / "code.jsonl",
        max_turns: int = 1,
        max_context_tokens: int = 1024,
        time_limit_s: float = 6.0,
        memory_mb: int = 512,
    ) -> None:
        self._longest = 0
        super().__init__(tokenizer, data=data, max_turns=max_turns, max_context_tokens=max_context_tokens)
        room = max(_ROOM, 2 * self._longest)
        self._sandbox = Sandbox(Limits(time_s=time_limit_s, memory_mb=memory_mb, output_bytes=room))

    def opening(self, row: Row) -> list[Message]:
        tests = read_tests(field(row, "public_test_cases")) + read_tests(row.get("private_test_cases", "[]"))
        self._longest = max([self._longest, *(len(test.output.encode()) for test in tests)])
        if not tests:
            raise ValueError(f"a row has no tests: {quote(row['question_content'], 200)}")
        if any(test.functional for test in tests) and not _function(row):
            raise ValueError(
                f"tests call a function, and metadata has no func_name: {quote(row['question_content'], 200)}"
            )
        text = f"{field(row, 'question_content')}\nWrite Python in one ```python block; {_IMPORTABLE}"
        if row.get("starter_code"):
            text += f" Complete this:\n```python\n{row['starter_code']}\n```"
        else:
            text += " Read standard input and print the result."
        return [{"role": "user", "content": text}]

    @asynccontextmanager
    async def episode(self, row: Row) -> AsyncIterator[Episode]:
        yield _CodeEpisode(self._sandbox, row, feedback=self._max_turns > 1)


class _CodeEpisode:
    def __init__(self, sandbox: Sandbox, row: Row, *, feedback: bool) -> None:
        self.metrics = {"no_program": 0.0, "tests_passed": 0.0}
        self._sandbox, self._feedback, self._program = sandbox, feedback, ""
        self._public = read_tests(row["public_test_cases"])
        self._private = read_tests(row.get("private_test_cases", "[]"))
        self._function = _function(row)

    async def respond(self, reply: str) -> str | None:
        blocks = programs_in(reply)
        if not blocks:
            self.metrics["no_program"] += 1
            return "error: no program; write it in one ```python block"
        self._program = blocks[-1]
        if self._feedback:
            for test in self._public:
                if wrong := await self._run(test):
                    return shorten(f"A test fails. Input:\n{test.input}\nExpected:\n{test.output}\nBut it {wrong}")
        return None

    async def score(self) -> float:
        tests = [*self._public, *self._private]
        if not self._program:
            return 0.0
        for test in tests:
            if await self._run(test):
                return 0.0
            self.metrics["tests_passed"] += 1 / len(tests)
        return 1.0

    async def _run(self, test: UnitTest) -> str:
        """What is wrong with the program on this test, "" if it passes."""
        call = _CALL.format(name=self._function) if test.functional else ""
        outcome = await self._sandbox.run(_IMPORTS + self._program + call, stdin=test.input)
        if not outcome.ok:
            return f"failed: {outcome.explain()}"
        if matches(outcome.stdout, test):
            return ""
        return f"printed:\n{outcome.stdout}"


def programs_in(reply: str) -> list[str]:
    """What its fences hold that are of Python, or of no language; one that is not closed holds nothing."""
    found = []
    end = 0
    while opened := _FENCE.search(reply, end):
        close = reply.find("```", opened.end())
        if close < 0:
            break
        if opened[1].lower() in _LANGUAGES:
            found.append(reply[opened.end() : close])
        end = close + 3
    return found


def matches(printed: str, test: UnitTest) -> bool:
    """Whether the output is right: as JSON for a function; else line by line, words equal as text or as numbers."""
    if test.functional:
        try:  # what the program itself printed stands before the result
            return bool(json.loads(printed.strip().rpartition("\n")[2]) == json.loads(test.output))
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, thousands of brackets
            return False
    found, right = ([line.split() for line in text.strip().splitlines()] for text in (printed, test.output))
    return [len(line) for line in found] == [len(line) for line in right] and all(
        _same_word(a, b) for one, other in zip(found, right, strict=True) for a, b in zip(one, other, strict=True)
    )


def _same_word(a: str, b: str) -> bool:
    """Numbers are compared exactly: as floats, large integers would be equal to their neighbours."""
    try:
        return a == b or Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


def read_tests(column: str) -> list[UnitTest]:
    """The tests of a column: JSON, or, as LiveCodeBench packs the private ones, base64 of zlib of a pickled JSON text.

    Raises `ValueError` if it is neither, if the pickle holds anything but text, and for a test that lacks its input or
    output, or whose output is no JSON where a function has to return it: no program could pass.
    """
    try:
        cases: list[dict[str, Any]] = json.loads(column)
    except json.JSONDecodeError:
        cases = json.loads(_unpack(column))
    return [_read_test(case) for case in cases]


def _read_test(case: dict[str, Any]) -> UnitTest:
    try:
        test = UnitTest(case["input"], case["output"], case.get("testtype") == "functional")
        if test.functional:
            json.loads(test.output)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"a test needs input and output, which is JSON for a function: {quote(error)}: {quote(case)}"
        ) from error
    return test


def _function(row: Row) -> str | None:
    """The name of the function that tests call."""
    try:
        name: str | None = json.loads(row.get("metadata") or "{}").get("func_name")
    except (AttributeError, ValueError) as error:
        raise ValueError(f"a row's metadata is no JSON object: {error}: {quote(row['metadata'])}") from error
    return name


class _TextOnly(pickle.Unpickler):
    """A pickle that names a class could run anything; a text needs none."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"the tests name {module_name}.{global_name}")


def _unpack(column: str) -> str:
    try:
        return str(_TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(column)))).load())
    except (ValueError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"tests are neither JSON nor packed JSON: {cut(str(error))}: {quote(column)}") from error

"""Small software engineering: look at files of a repository, edit them, run the tests, until an issue is solved.

The repository lives in memory; a run of the tests gets a copy of it, in a sandbox. A model can overwrite any file, but
for scoring the test files are the row's own, every test in them has to pass, and the result is signed with a key that
the code under test is not given (`swe_runner.py`). Tests share a process with that code, as is usual, so it is not
proof against a program that goes through the frames of its callers; one that replaces parts of `unittest`, skips,
exits, or returns objects that equal everything earns nothing.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath

from asyncrl.envs.base import Tokenizer
from asyncrl.envs.chat import Message
from asyncrl.envs.data import Row
from asyncrl.envs.multi_turn import SHIPPED, Episode, MultiTurn, field
from asyncrl.envs.sandbox import Limits, Sandbox
from asyncrl.envs.tools import between, shorten, tagged
from asyncrl.utils.quote import quote

_OLD_TO_NEW = re.compile(r"</old>\s*<new>")
_LONGEST_PATH = 200
_RUNNER = Path(__file__).with_name("swe_runner.py").read_text(encoding="utf-8")
_SYSTEM = """You fix a Python repository. One action per turn:
<view>path</view> shows a file.
<edit path="path"><old>text that occurs once</old><new>its replacement</new></edit> edits a file.
<test></test> runs the tests.
<done></done> ends your work.
Files: {files}"""


class RepairTask(MultiTurn):
    """Rows of `issue`, `files` and `tests` (both path -> text; tests are `unittest` in files named test_*.py).

    Reward 1 if the row's tests pass in the end, however the attempt ended.
    """

    pass_reward = 1.0

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        data: str | Path = SHIPPED / "swe.jsonl",
        max_turns: int = 8,
        max_context_tokens: int = 2048,
        time_limit_s: float = 10.0,
    ) -> None:
        self._sandbox = Sandbox(Limits(time_s=time_limit_s))
        super().__init__(tokenizer, data=data, max_turns=max_turns, max_context_tokens=max_context_tokens)

    def opening(self, row: Row) -> list[Message]:
        tests = field(row, "tests")
        if not tests or not all(PurePosixPath(path).match("test_*.py") for path in tests):
            raise ValueError(f"a row needs tests in files named test_*.py, got {list(tests)}")
        for path, text in {**field(row, "files"), **tests}.items():
            if not isinstance(text, str) or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(
                    f"a row's files are texts under paths inside the repository, got {quote(path)}: {quote(text)}"
                )
        if not any(tests_in(text) for text in tests.values()):
            raise ValueError(f"a row's tests hold no class of unittest with a test: {list(tests)}")
        files = ", ".join([*field(row, "files"), *tests])
        return [
            {"role": "system", "content": _SYSTEM.format(files=files)},
            {"role": "user", "content": field(row, "issue")},
        ]

    @asynccontextmanager
    async def episode(self, row: Row) -> AsyncIterator[Episode]:
        yield _RepairEpisode(self._sandbox, row["files"], row["tests"])


class _RepairEpisode:
    def __init__(self, sandbox: Sandbox, files: dict[str, str], tests: dict[str, str]) -> None:
        self.metrics = {"edits": 0.0, "test_runs": 0.0, "bad_calls": 0.0}
        self._sandbox, self._tests = sandbox, tests
        self._files = {**files, **tests}

    async def respond(self, reply: str) -> str | None:
        if tagged(reply, "done") is not None:
            return None
        if (path := tagged(reply, "view")) is not None:
            return self._files[path] if path in self._files else self._bad(f"no file {path[:_LONGEST_PATH]!r}")
        if edit := between(reply, '<edit path="', '">', "</edit>"):
            return self._edit(*edit)
        if tagged(reply, "test") is not None:
            self.metrics["test_runs"] += 1
            return (await self._test(self._files))[1]
        return self._bad("no action; write <view>, <edit>, <test> or <done>")

    async def score(self) -> float:
        return float((await self._test({**self._files, **self._tests}))[0])

    def _edit(self, path: str, change: str) -> str:
        change = change.strip()
        # What is inside is not stripped: in Python, space at the start of a line has a meaning.
        parts = _OLD_TO_NEW.split(change.removeprefix("<old>").removesuffix("</new>"), maxsplit=1)
        if len(parts) < 2 or not change.startswith("<old>") or not change.endswith("</new>"):
            return self._bad("an edit needs <old>...</old><new>...</new>")
        if path not in self._files:
            return self._bad(f"no file {path[:_LONGEST_PATH]!r}")
        old, new = parts
        count = self._files[path].count(old)
        if not old or count != 1:
            return self._bad(f"the old text must occur once in {path}, it occurs {count} times")
        self._files[path] = self._files[path].replace(old, new)
        self.metrics["edits"] += 1
        return f"edited {path}"

    async def _test(self, files: dict[str, str]) -> tuple[bool, str]:
        """Whether all tests pass, and what the runner says."""
        key = secrets.token_hex(16)
        task = json.dumps({"key": key, "tests": list(self._tests)})
        # In a folder of their own: a repository may have a main.py, which is the runner's name.
        placed = {f"repository/{path}": text for path, text in files.items()}
        outcome = await self._sandbox.run(_RUNNER, stdin=task + "\n", files=placed)
        told, signed, verdict = outcome.stdout.rpartition(f"\n{key} ")
        if not outcome.ok or not signed:
            return False, shorten(outcome.explain() or "the tests did not run to their end")
        passed, failed = json.loads(verdict)
        expected = {
            f"{'.'.join(PurePosixPath(path).with_suffix('').parts)}.{name}"
            for path, text in self._tests.items()
            for name in tests_in(text)
        }
        return bool(expected) and expected <= set(passed) and not failed, shorten(told)

    def _bad(self, text: str) -> str:
        self.metrics["bad_calls"] += 1
        return f"error: {text}"


def tests_in(text: str) -> set[str]:
    """`Class.method` of the tests in a test file that have to pass: all but those that it skips in any case.

    Raises `ValueError` for a file that is no Python.
    """
    try:
        classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"a row's tests cannot be parsed: {error}") from error
    return {
        f"{node.name}.{test.name}"
        for node in classes
        if node.bases and not _skipped(node)
        for test in node.body
        if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef) and test.name.startswith("test")
        if not _skipped(test)
    }


def _skipped(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(one).removeprefix("unittest.").startswith("skip(") for one in node.decorator_list)

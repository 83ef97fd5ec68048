"""Runs Python that nobody has read: what a model wrote, in a process of its own that can do next to nothing.

    run() --> a place --> own folder --> process that watches --fork, confine--> the program
              |waits for a place             |waits for its end, its time, or too much output
              '------------------------------'--> folder removed, processes gone, Outcome

What holds, for root and for other users alike, without privileges (`confine` has the mechanism of each):

    descriptors       its input and its two outputs alone, whatever the caller had open (close_range)
    system calls      those of a list, all others are refused (seccomp; `calls` has the list)
    network           no socket can be opened, but pairs of streams to itself (seccomp)
    processes         no new ones (seccomp); so each limit below is a limit of the whole program
    threads           64 at once, give or take those that are asked for at the same moment (seccomp asks the watcher)
    other processes   no signals, also none through a socket's owner, no access to their memory, limits, priorities, or
                      files in /proc, no shared memory, semaphores or messages of System V or POSIX (seccomp, Landlock)
    files             its folder, the Python library and the system's libraries, all read-only; no others (Landlock)
    disk              nothing can be written, not even to a file in memory (Landlock, RLIMIT_FSIZE 0), and no file gets
                      another mode, owner, time or attribute (seccomp)
    memory            RLIMIT_AS
    what users share  no POSIX timers, locked memory, larger pipes, watches of files, or message queues (seccomp); 64
                      descriptors and 64 queued signals (setrlimit)
    time              `time_s` of processor time and of sleep; what others take of the processors does not count, up to
                      ten times that on the clock: then `run` raises `Starved`, as nothing is known of the program
    its end           with the attempt, and with the process that called, however that ends (PR_SET_PDEATHSIG, which the
                      program cannot clear)
    environment       empty
    output            cut at `output_bytes`, and the program killed

As many programs run at once as there are processors, among all processes of a user on the machine (`places`).

What does not hold: the kernel itself is shared, and a fault of it is a way out, as are leaks through caches and timing.
A program may find out that it is watched. It can ask of any path whether it exists and how large it is. It shares
processors, memory bandwidth and the memory of the machine with the run: there is no cgroup, and `memory_mb` times the
number of places must fit. Its output is whatever it says: a grader must not believe it more than the model.

The Python is the standard library alone, as installed packages may lie beside data that holds the answers. Needs Linux
on x86-64 with Landlock (5.13 or later), and no other listener of seccomp around the process, as some system containers
have; elsewhere `run` raises `RuntimeError`. It never runs a program with less protection.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from asyncrl.envs.sandbox.calls import call_filter, thread_filter
from asyncrl.envs.sandbox.places import place
from asyncrl.utils.threads import in_thread

_CONFINE = Path(__file__).with_name("confine.py")
_FLAGS = ("-E", "-s", "-S", "-B", "-X", "utf8")
_PROGRAM = "main.py"
_CHUNK = 1 << 16
_PATIENCE = 10.0
"""A program may take this many times its own time on the clock, while others have the processors."""
_GRACE_S = 10.0

waiting: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar("waiting", default=nullcontext)
"""Entered while a program waits for its place: a caller with a clock of its own may stop it."""


class Starved(RuntimeError):
    """A program had too little of the processors to show what it does: no fault of its own. Try again."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may use. Raises `ValueError` unless all are positive."""

    time_s: float = 5.0
    """Of its own, the interpreter's start included: processor time, and time asleep. Not time that others take."""
    memory_mb: int = 512
    """Address space; the interpreter alone takes some 20 MB, each thread 8 MB more."""
    output_bytes: int = 1 << 16
    """Of stdout and of stderr."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"a sandbox's {name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `returncode` is negative for a signal, and None if it was killed for time or output."""

    stdout: str
    stderr: str
    returncode: int | None
    timed_out: bool = False
    flooded: bool = False

    @property
    def ok(self) -> bool:
        return self.returncode == 0

    def explain(self) -> str:
        """What went wrong in one line for the model, "" if nothing did."""
        if self.timed_out:
            return "timed out"
        if self.flooded:
            return "printed too much"
        if self.returncode:
            last = self.stderr.strip().splitlines()[-1:]
            return last[0] if last else f"ended with code {self.returncode}"
        return ""


class Sandbox:
    """Runs programs, `max_running` of them at once (one a processor by default); more wait. One event loop's own."""

    def __init__(self, limits: Limits | None = None, max_running: int | None = None) -> None:
        self.limits = limits or Limits()
        self._places = asyncio.Semaphore(max_running or os.cpu_count() or 1)
        self._works = False

    async def run(self, code: str, *, stdin: str = "", files: Mapping[str, str | bytes] | None = None) -> Outcome:
        """Runs `code` as main.py in a folder with `files` (relative path -> content), which it may import and read.

        Raises `ValueError` for a path that leaves the folder, `Starved` if the machine had no time for it,
        `RuntimeError` where programs cannot be confined.
        """
        async with AsyncExitStack() as stack:
            with waiting.get()():
                await stack.enter_async_context(self._places)
                await stack.enter_async_context(place())
            if not self._works:
                await self._prove()
            return await self._run(code, stdin, files or {})

    async def _prove(self) -> None:
        """Runs a program that must work: what is wrong later is then a program's own doing."""
        outcome = await self._run("print('works')", "", {})
        if outcome.stdout != "works\n":
            raise RuntimeError(f"no program can be run in a sandbox here: {outcome.explain()}\n{outcome.stderr}")
        self._works = True

    async def _run(self, code: str, stdin: str, files: Mapping[str, str | bytes]) -> Outcome:
        folder = await in_thread(partial(tempfile.mkdtemp, prefix="sandbox-"))
        try:
            await in_thread(partial(_write, Path(folder), {**files, _PROGRAM: code}))
            return await self._execute(folder, stdin.encode(errors="replace"))
        finally:
            await in_thread(partial(shutil.rmtree, folder))

    async def _execute(self, folder: str, stdin: bytes) -> Outcome:
        python = os.path.realpath(sys.executable)
        task = {
            "argv": [python, *_FLAGS, _PROGRAM],
            "readable": [*_library(), folder],
            "listable": [sysconfig.get_path("stdlib")],
            "time_s": self.limits.time_s,
            "patience_s": _PATIENCE * self.limits.time_s,
            "memory_bytes": self.limits.memory_mb << 20,
            "filter": call_filter().hex(),
            "thread_filter": thread_filter().hex(),
            "caller": os.getpid(),
        }
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            python, "-I", "-S", "-B", str(_CONFINE), json.dumps(task),
            stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
        captured = (bytearray(), bytearray())
        flooded = False
        try:
            # Only a process that watches and gets no processor itself comes to this bound.
            async with asyncio.timeout(2 * _PATIENCE * self.limits.time_s + _GRACE_S):
                flooded = not await self._talk(process, stdin, captured)
                if not flooded:
                    await process.wait()
        except TimeoutError as error:
            raise self._starved() from error
        finally:
            await _end(process)
        if process.returncode == -signal.SIGUSR1:
            raise self._starved()
        timed_out = process.returncode in (-signal.SIGALRM, -signal.SIGXCPU)
        stdout, stderr = (bytes(part[: self.limits.output_bytes]).decode(errors="replace") for part in captured)
        return Outcome(stdout, stderr, None if timed_out or flooded else process.returncode, timed_out, flooded)

    def _starved(self) -> Starved:
        limit_s = self.limits.time_s
        return Starved(
            f"a program could not use its {limit_s:g} s within {_PATIENCE * limit_s:g} s, as others had the "
            "processors: run fewer other processes on this machine"
        )

    async def _talk(
        self, process: asyncio.subprocess.Process, stdin: bytes, captured: tuple[bytearray, bytearray]
    ) -> bool:
        """Feeds the program and collects what it prints until both streams end; False as soon as it is too much."""
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        feed = asyncio.create_task(_feed(process.stdin, stdin))
        streams = zip((process.stdout, process.stderr), captured, strict=True)
        readers = [asyncio.create_task(self._collect(stream, into)) for stream, into in streams]
        try:
            for reader in asyncio.as_completed(readers):
                if not await reader:
                    return False
            return True
        finally:
            for task in (feed, *readers):
                task.cancel()
            await asyncio.gather(feed, *readers, return_exceptions=True)

    async def _collect(self, stream: asyncio.StreamReader, into: bytearray) -> bool:
        while chunk := await stream.read(_CHUNK):
            into += chunk
            if len(into) > self.limits.output_bytes:
                return False
        return True


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kills what still runs. What is left in the pipes must be read: `wait` waits until they are empty."""
    assert process.stdout is not None
    assert process.stderr is not None
    rest = asyncio.gather(process.stdout.read(), process.stderr.read(), process.wait())
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(_GRACE_S):
            await asyncio.shield(rest)
    except TimeoutError:
        if process.returncode is None:
            process.kill()
        await rest


async def _feed(stream: asyncio.StreamWriter, data: bytes) -> None:
    """A program need not read its input: then the pipe breaks, and that is no error."""
    try:
        stream.write(data)
        await stream.drain()
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        stream.close()


def _write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"a file of a sandbox must have a path inside its folder, got {name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


@cache
def _library() -> tuple[str, ...]:
    """What any Python program must read: the interpreter, its standard library without packages, shared libraries."""
    standard = Path(sysconfig.get_path("stdlib"))
    found = [path for path in standard.iterdir() if path.name not in ("site-packages", "dist-packages")]
    found += Path(sys.base_prefix, "lib").glob("*.so*")
    system = ("/lib", "/lib64", "/usr/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom")
    found += [Path(name) for name in system]
    found.append(Path(os.path.realpath(sys.executable)))
    return tuple(str(path) for path in found if path.exists())

"""Runs one program, confined, and watches it: the inside of `sandbox`. Standard library only.

    python -I -S confine.py '{"argv": [...], "readable": [...], "listable": [...], "time_s": 5, ...}'

This process closes every descriptor but 0, 1 and 2 and forks. The child confines itself and becomes the program, in
this order: limits of `setrlimit`; root gives its capabilities up; no new privileges (`prctl`); Landlock leaves the
paths in `readable` for reading, the names below `listable`, and nothing else of the file system; a seccomp filter
(`thread_filter`) has the parent asked about each thread, another (`filter`) leaves the system calls of a list. All of
it needs no privilege, is the same for root and for others, holds for the rest of the program's life, and passes through
`exec`. Linux on x86-64 with Landlock (5.13 or later).

The parent counts the threads and the time of the program, and ends as the program does: with its code or signal. It
ends it after `time_s` of its own time, which it computes or sleeps, and dies of SIGALRM; after `patience_s` on the
clock, and dies of SIGUSR1: then others had the processors. The program also ends when this process does, and this one
when its caller (`caller`) does; SIGTERM ends both.

See landlock(7), seccomp(2), seccomp_unotify(2), and the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import math
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from typing import Any, NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CLOSE_RANGE = 436
_SECCOMP, _SET_FILTER, _NEW_LISTENER, _GO_ON = 317, 1, 8, 1
_NOTIFICATION_RECEIVE, _NOTIFICATION_SEND = 0xC0502100, 0xC0182101
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
# Rights that each version of Landlock added to the one before; all are taken away, three are given back for paths.
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NUM_RIGHTS_NEWEST = 16

_NUM_CAPABILITIES = 64
_NUM_OPEN_FILES = 64
_NUM_PENDING_SIGNALS = 64
_NUM_THREADS = 64
_TICK_S = 0.05
"""How often the state of the program is looked at."""


def main() -> None:
    _drop_inherited()
    task: dict[str, Any] = json.loads(sys.argv[1])
    _end_with(task["caller"], signal.SIGTERM)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # this process dies as the program does
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    watcher, (ours, theirs) = os.getpid(), socket.socketpair()
    program = os.fork()
    if not program:
        _become(task, theirs, watcher)
    verdict = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        theirs.close()
        for stream in range(3):  # whose ends are the program's alone
            os.close(stream)
        verdict = _watch(program, ours, task["time_s"], task["patience_s"])
    finally:
        os.kill(program, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    _end_as(-verdict or code)


def _end_with(parent: int, number: signal.Signals) -> None:
    """This process gets the signal when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _become(task: dict[str, Any], channel: socket.socket, watcher: int) -> NoReturn:
    """In the child."""
    try:
        _end_with(watcher, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _limit(math.ceil(task["time_s"]), task["memory_bytes"])
        if os.geteuid() == 0:
            for capability in range(_NUM_CAPABILITIES):  # beyond the last that the kernel knows the call fails
                _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _hide_files(task["readable"], task["listable"])
        listener = _filter_calls(bytes.fromhex(task["thread_filter"]), _NEW_LISTENER)
        socket.send_fds(channel, [b"."], [listener])
        os.closerange(3, _NUM_OPEN_FILES)
        _filter_calls(bytes.fromhex(task["filter"]))
        os.execv(task["argv"][0], task["argv"])
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _watch(program: int, channel: socket.socket, time_s: float, patience_s: float) -> int:
    """Returns when the program has ended (0) or must be (the signal that says why)."""
    ended, poll = os.pidfd_open(program), select.poll()
    for number in (ended, channel.fileno()):
        poll.register(number, select.POLLIN)
    begin = last = time.monotonic()
    asleep_s, listener = 0.0, -1
    while True:
        events = dict(poll.poll(1000 * _TICK_S))
        if ended in events:
            return 0
        if events.get(listener, 0) & select.POLLIN:
            _answer(listener, program)
        elif channel.fileno() in events:
            poll.unregister(channel)
            listener = (socket.recv_fds(channel, 1, 1)[1] or [-1])[0]
            if listener >= 0:
                poll.register(listener, select.POLLIN)
        now = time.monotonic()
        if now - last < _TICK_S / 2:
            continue
        with contextlib.suppress(OSError):  # of files of a thread, or a program, that has just ended
            asleep_s += (now - last) * _sleeps(program)
            if _processor_s(program) + asleep_s >= time_s:
                return signal.SIGALRM
        last = now
        if now - begin >= patience_s:
            return signal.SIGUSR1


def _sleeps(program: int) -> bool:
    """Whether no thread runs, waits for a processor, or waits for a disk."""
    return not any(_stat(f"/proc/{program}/task/{thread}")[0] != "S" for thread in os.listdir(f"/proc/{program}/task"))


def _processor_s(program: int) -> float:
    fields = _stat(f"/proc/{program}")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stat(folder: str) -> list[str]:
    """The fields from the state on; see proc_pid_stat(5)."""
    with open(f"{folder}/stat") as file:
        return file.read().rpartition(")")[2].split()


def _answer(listener: int, program: int) -> None:
    """The program wants a thread: it gets `_NUM_THREADS` at once."""
    request = bytearray(80)
    with contextlib.suppress(OSError):  # the thread that asked may be gone
        fcntl.ioctl(listener, _NOTIFICATION_RECEIVE, request)
        (number,) = struct.unpack_from("=Q", request)
        full = len(os.listdir(f"/proc/{program}/task")) >= _NUM_THREADS
        reply = (number, 0, -errno.EAGAIN, 0) if full else (number, 0, 0, _GO_ON)
        fcntl.ioctl(listener, _NOTIFICATION_SEND, struct.pack("=QqiI", *reply))


def _end_as(code: int) -> NoReturn:
    """Ends with a code, or by a signal (below 0)."""
    if code < 0:
        with contextlib.suppress(OSError):  # of SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _drop_inherited() -> None:
    """Closes all that the caller had open, as some event loops do not; signals are what they are in a new process."""
    _checked(_LIBC.syscall(_CLOSE_RANGE, ctypes.c_uint(3), ctypes.c_uint(0xFFFFFFFF), 0), "close_range")
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGPIPE}:
        with contextlib.suppress(OSError):  # of the C library's own two
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _limit(cpu_s: int, memory_bytes: int) -> None:
    # SIGXCPU at the first limit ends the program and says why; a second later SIGKILL ends one that catches it.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _NUM_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, _NUM_PENDING_SIGNALS),
    ):
        resource.setrlimit(what, (most, most))


def _hide_files(readable: list[str], listable: list[str]) -> None:
    """Landlock: `readable` files, and all below `readable` folders, may be read and executed, and nothing else be."""
    version = _LIBC.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    if version < 1:
        raise OSError(ctypes.get_errno(), "this kernel has no Landlock (Linux 5.13 or later, switched on)")
    handled = struct.pack("=Q", (1 << _NUM_RIGHTS.get(version, _NUM_RIGHTS_NEWEST)) - 1)
    rules = _checked(_LIBC.syscall(_LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0), "Landlock")
    for path in readable:
        _allow(rules, path, _EXECUTE | _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0))
    for path in listable:
        _allow(rules, path, _READ_DIR)
    _checked(_LIBC.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0), "Landlock")
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, place)
    _checked(_LIBC.syscall(_LANDLOCK_ADD_RULE, rules, _LANDLOCK_PATH_BENEATH, rule, 0), path)
    os.close(place)


def _filter_calls(program: bytes, flags: int = 0) -> int:
    """The descriptor that flags may ask for."""
    buffer = ctypes.create_string_buffer(program, len(program))
    code = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))
    return _checked(_LIBC.syscall(_SECCOMP, _SET_FILTER, flags, code), "seccomp")


def _prctl(option: int, *values: Any) -> None:
    """`prctl` with the unused arguments zero, as some options demand."""
    arguments = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in values]
    arguments += [ctypes.c_ulong(0)] * (4 - len(arguments))
    _checked(_LIBC.prctl(option, *arguments), f"prctl({option})")


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    main()

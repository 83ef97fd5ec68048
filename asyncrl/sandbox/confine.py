"""Confines this process and then becomes another program: the inside of `sandbox`. Standard library only.

    python -I -S confine.py '{"argv": [...], "readable": [...], "listable": [...], "cpu_s": 5, "memory_bytes": 1e8,
                                     "filter": "2000..."}'

In order: every descriptor but 0, 1 and 2 is closed; limits of `setrlimit`; root gives its capabilities up; no new
privileges (`prctl`); Landlock leaves the paths in `readable` for reading, the names below `listable`, and nothing else
of the file system; a seccomp filter (`filter`, made by `calls`) leaves the system calls of a list. All of it needs no
privilege, is the same for root and for others, holds for the rest of this process's life, and passes through `exec`.
Linux on x86-64 with Landlock (5.13 or later).

See landlock(7), seccomp(2), and the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_CLOSE_RANGE = 436
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
# Rights that each version of Landlock added to the one before; all are taken away, three are given back for paths.
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NUM_RIGHTS_NEWEST = 16

_NUM_CAPABILITIES = 64
_NUM_OPEN_FILES = 64
_NUM_PENDING_SIGNALS = 64


def main() -> None:
    _drop_inherited()
    task: dict[str, Any] = json.loads(sys.argv[1])
    _limit(task["cpu_s"], task["memory_bytes"])
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.geteuid() == 0:
        for capability in range(_NUM_CAPABILITIES):  # beyond the last that the kernel knows the call fails
            _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _hide_files(task["readable"], task["listable"])
    _filter_calls(bytes.fromhex(task["filter"]))
    os.execv(task["argv"][0], task["argv"])


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


def _filter_calls(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    code = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))
    _prctl(_PR_SET_SECCOMP, 2, code)


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

"""The system calls that a program in the sandbox may make, as a seccomp filter: all that is not listed here is refused.

The list holds what CPython with its standard library, SQLite and NumPy use on what the program already has: its own
memory, threads, descriptors and clocks, and files, which Landlock decides about. Nothing in it names another process, a
socket, or an object of the kernel that others reach by number (System V memory, semaphores and messages). Calls on the
list that could do more with other arguments are narrowed by argument.

What is refused fails with EPERM; a call newer than Landlock fails with ENOSYS, for which C libraries have an older one.
Numbers are those of x86-64. See seccomp(2), and Documentation/userspace-api/seccomp_filter.rst of the kernel.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import TypeAlias

ALLOWED = {
    # descriptors that the program has or gets from below: files, pipes, pairs of streams
    "read": 0, "write": 1, "close": 3, "lseek": 8, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20,
    "preadv": 295, "pwritev": 296, "preadv2": 327, "pwritev2": 328, "sendfile": 40, "fsync": 74, "fdatasync": 75,
    "fadvise64": 221, "dup": 32, "dup2": 33, "dup3": 292, "close_range": 436, "pipe": 22, "pipe2": 293,
    "sendto": 44, "recvfrom": 45, "shutdown": 48, "getsockname": 51, "getpeername": 52, "getsockopt": 55,
    # waiting for them
    "poll": 7, "select": 23, "pselect6": 270, "ppoll": 271, "epoll_create": 213, "epoll_create1": 291,
    "epoll_ctl": 233, "epoll_wait": 232, "epoll_pwait": 281, "epoll_pwait2": 441, "eventfd": 284, "eventfd2": 290,
    # files: Landlock decides which may be opened
    "open": 2, "openat": 257, "stat": 4, "fstat": 5, "lstat": 6, "newfstatat": 262, "statx": 332, "access": 21,
    "faccessat": 269, "faccessat2": 439, "readlink": 89, "readlinkat": 267, "getdents": 78, "getdents64": 217,
    "getcwd": 79, "chdir": 80, "fchdir": 81, "statfs": 137, "fstatfs": 138, "umask": 95,
    # its memory
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "madvise": 28, "get_mempolicy": 239,
    # its threads
    "futex": 202, "set_robust_list": 273, "set_tid_address": 218, "rseq": 334, "sched_yield": 24, "gettid": 186,
    "sched_getaffinity": 204, "sched_getparam": 143, "sched_getscheduler": 145, "sched_get_priority_max": 146,
    "sched_get_priority_min": 147, "sched_rr_get_interval": 148, "getpriority": 140, "getcpu": 309, "arch_prctl": 158,
    # its signals, and one timer of each kind
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "rt_sigpending": 127, "rt_sigtimedwait": 128,
    "rt_sigsuspend": 130, "sigaltstack": 131, "pause": 34, "getitimer": 36, "alarm": 37, "setitimer": 38,
    "restart_syscall": 219,
    # clocks and chance
    "nanosleep": 35, "clock_nanosleep": 230, "gettimeofday": 96, "time": 201, "clock_gettime": 228,
    "clock_getres": 229, "times": 100, "getrandom": 318,
    # who and where it is
    "getpid": 39, "getppid": 110, "getpgrp": 111, "getpgid": 121, "getsid": 124, "getuid": 102, "geteuid": 107,
    "getgid": 104, "getegid": 108, "getgroups": 115, "getresuid": 118, "getresgid": 120, "uname": 63, "sysinfo": 99,
    "getrlimit": 97, "setrlimit": 160, "getrusage": 98,
    # the program itself: begins, and ends
    "execve": 59, "exit": 60, "exit_group": 231, "wait4": 61,
}  # fmt: skip
"""System calls that are allowed whatever their arguments, and their numbers."""

_CLONE, _CLONE3, _FCNTL, _IOCTL, _PRCTL, _PRLIMIT, _SOCKETPAIR = 56, 435, 72, 16, 157, 302, 53
_CLONE_THREAD = 0x00010000
_NO_STREAM = 0b110
"""Bits of a socket's type that a stream does not have: a datagram goes to any socket that has a name."""
_FCNTLS = {"F_DUPFD": 0, "F_GETFD": 1, "F_SETFD": 2, "F_GETFL": 3, "F_SETFL": 4, "F_DUPFD_CLOEXEC": 1030} | {
    "F_GETLK": 5, "F_SETLK": 6, "F_SETLKW": 7, "F_GETPIPE_SZ": 1032  # the locks are SQLite's
}  # fmt: skip
"""Others set whom the signals of a file go to, or use up what a user may have of pipes."""
_IOCTLS = {
    "TCGETS": 0x5401,
    "TIOCGWINSZ": 0x5413,
    "FIONREAD": 0x541B,
    "FIONBIO": 0x5421,
    "FIOCLEX": 0x5451,
    "FIONCLEX": 0x5450,
}
"""What Python asks of a stream. Others set whom signals of a socket go to, or the flags of a file."""
_PRCTLS = {"PR_SET_NAME": 15, "PR_GET_NAME": 16, "PR_GET_SECCOMP": 21, "PR_SET_VMA": 0x53564D41}
"""Names of threads and of memory. Others would clear the signal that ends the program with the run."""

# Berkeley packet filter: load a word, jump on a comparison, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ASK, _ERRNO, _KILL = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x80000000
_SYSCALL_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_X86_64, _X32_BIT = 0xC000003E, 0x40000000
_NEWER = 447
"""The first call that is newer than the last of Landlock's."""

_Line: TypeAlias = tuple[int, int, int, int]
"""Code, lines to skip if true, lines to skip if false, value."""
_PERMIT: _Line = (_RETURN, 0, 0, _ALLOW)
_REFUSE: _Line = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
_UNKNOWN: _Line = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
_DIE: _Line = (_RETURN, 0, 0, _KILL)


def call_filter() -> bytes:
    """The program that the kernel runs at each system call, 8 bytes a line."""
    lines = _native_only()
    for number in ALLOWED.values():
        lines += [(_EQUAL, 0, 1, number), _PERMIT]
    # The C library takes this for an old kernel and calls `clone`, whose flags a filter can see.
    lines += [(_EQUAL, 0, 1, _CLONE3), _UNKNOWN]
    lines += _by_argument(_CLONE, 0, _ANY_BIT, [_CLONE_THREAD], then=_PERMIT)
    lines += _by_argument(_PRLIMIT, 0, _EQUAL, [0], then=_PERMIT)  # of this process, not of another
    lines += _by_argument(_SOCKETPAIR, 1, _ANY_BIT, [_NO_STREAM], then=_REFUSE, otherwise=_PERMIT)
    lines += _by_argument(_FCNTL, 1, _EQUAL, list(_FCNTLS.values()), then=_PERMIT)
    lines += _by_argument(_IOCTL, 1, _EQUAL, list(_IOCTLS.values()), then=_PERMIT)
    lines += _by_argument(_PRCTL, 0, _EQUAL, list(_PRCTLS.values()), then=_PERMIT)
    return _packed([*lines, (_AT_LEAST, 0, 1, _NEWER), _UNKNOWN, _REFUSE])


def thread_filter() -> bytes:
    """The program that has another process asked about each thread; see seccomp_unotify(2)."""
    return _packed([*_native_only(), (_EQUAL, 0, 1, _CLONE), (_RETURN, 0, 0, _ASK), _PERMIT])


def _native_only() -> list[_Line]:
    """Leaves the call's number loaded. Numbers mean other calls to programs of 32 bits."""
    return [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _X86_64),
        _DIE,
        (_LOAD, 0, 0, _SYSCALL_AT),
        (_AT_LEAST, 0, 1, _X32_BIT),
        _DIE,
    ]


def _by_argument(
    number: int, argument: int, test: int, values: Sequence[int], *, then: _Line, otherwise: _Line = _REFUSE
) -> list[_Line]:
    """Decides call `number` by whether the low half of an argument passes the test for one of `values`."""
    count = len(values)
    return [
        (_EQUAL, 0, count + 3, number),
        (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),
        *((test, count - place, 0, value) for place, value in enumerate(values)),
        otherwise,
        then,
    ]


def _packed(lines: Sequence[_Line]) -> bytes:
    return b"".join(struct.pack("HBBI", *line) for line in lines)

"""Confines this process and then becomes another program: the inside of `sandbox`. Standard library only.

    python -I -S confine.py '{"argv": [...], "readable": [...], "listable": [...], "cpu_s": 5, "memory_bytes": 1e8}'

In order: limits of `setrlimit`; root gives its capabilities up; no new privileges (`prctl`); Landlock leaves the paths
in `readable` for reading, the names below `listable`, and nothing else of the file system; a seccomp filter refuses new
processes, sockets, signals to others, what reaches across processes, and changes to the mode, owner and times of files,
which Landlock leaves alone. All of it needs no privilege, is the same for root and for others, holds for the rest of
this process's life, and passes through `exec`. Linux on x86-64 with Landlock (5.13 or later).

See landlock(7), seccomp(2), and the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
# Rights that each version of Landlock added to the one before; all are taken away, three are given back for paths.
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NUM_RIGHTS_NEWEST = 16

_NUM_CAPABILITIES = 64
_NUM_OPEN_FILES = 64

# Berkeley packet filter: load a word, jump on a comparison, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_SYSCALL_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_X86_64, _X32_BIT = 0xC000003E, 0x40000000

REFUSED = {
    # new processes: one process is what the limits of setrlimit count; threads go through `clone`, see below
    "fork": 57, "vfork": 58,
    # the network, and the other way to open a socket
    "socket": 41, "io_uring_setup": 425,
    # signals to other processes; the group and the session that a signal from outside reaches
    "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
    "pidfd_open": 434, "pidfd_send_signal": 424, "setpgid": 109, "setsid": 112,
    # the memory and the files of other processes
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438, "kcmp": 312,
    # their priority, processors and placement
    "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203,
    "sched_setattr": 314, "ioprio_set": 251, "migrate_pages": 256, "move_pages": 279,
    # mode, owner, times and attributes of any file of this user's, which takes no right to open it
    "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452,
    "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260,
    "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "setxattrat": 463,
    "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "removexattrat": 466,
    "file_setattr": 469, "truncate": 76,
    # what others do with files
    "inotify_add_watch": 254, "fanotify_init": 300,
    # memory that outlives the process
    "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
    # namespaces, and parts of the kernel that no program here needs
    "unshare": 272, "setns": 308, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "add_key": 248, "request_key": 249, "keyctl": 250,
}  # fmt: skip
"""System calls that fail with EPERM, and their numbers on x86-64."""

_CLONE, _CLONE3, _FCNTL, _PRLIMIT, _IOCTL, _SOCKETPAIR = 56, 435, 72, 302, 16, 53
_CLONE_THREAD, _F_SETOWN, _F_SETOWN_EX = 0x00010000, 8, 15
_NO_STREAM = 0b110
"""Bits of a socket's type that a stream does not have."""
_IOCTLS = {
    "TCGETS": 0x5401,
    "TIOCGWINSZ": 0x5413,
    "FIONREAD": 0x541B,
    "FIONBIO": 0x5421,
    "FIOCLEX": 0x5451,
    "FIONCLEX": 0x5450,
}
"""What Python asks of a stream. Others set whom signals of a socket go to, or the flags of a file."""


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    _limit(task["cpu_s"], task["memory_bytes"])
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.geteuid() == 0:
        for capability in range(_NUM_CAPABILITIES):  # beyond the last that the kernel knows the call fails
            _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _hide_files(task["readable"], task["listable"])
    _filter_calls()
    os.execv(task["argv"][0], task["argv"])


def _limit(cpu_s: int, memory_bytes: int) -> None:
    # SIGXCPU at the first limit ends the program and says why; a second later SIGKILL ends one that catches it.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _NUM_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
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


def _filter_calls() -> None:
    program = call_filter()
    count = len(program) // 8
    buffer = ctypes.create_string_buffer(program, len(program))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.create_string_buffer(struct.pack("HxxxxxxQ", count, ctypes.addressof(buffer))))


def call_filter() -> bytes:
    """The seccomp program: instructions of (code, jump if true, jump if false, value), 8 bytes each."""
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _SYSCALL_AT),
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
    ]
    for number in REFUSED.values():
        lines += [(_EQUAL, 0, 1, number), refuse]
    # The C library takes this for an old kernel and calls `clone`, whose flags a filter can see.
    lines += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    lines += _refuse_by_argument(_CLONE, 0, _ANY_BIT, _CLONE_THREAD, unless=True)
    lines += _refuse_by_argument(_PRLIMIT, 0, _EQUAL, 0, unless=True)  # the limits of another process
    for command in (_F_SETOWN, _F_SETOWN_EX):  # whom the signals of a file go to
        lines += _refuse_by_argument(_FCNTL, 1, _EQUAL, command)
    lines += _refuse_by_argument(_SOCKETPAIR, 1, _ANY_BIT, _NO_STREAM)  # datagrams go to any socket that has a name
    lines += _allow_by_argument(_IOCTL, 1, tuple(_IOCTLS.values()))
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _refuse_by_argument(
    number: int, argument: int, test: int, value: int, *, unless: bool = False
) -> list[tuple[int, int, int, int]]:
    """Refuses call `number` if the low half of an argument passes the test, or (`unless`) if it does not."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),
        (test, int(unless), int(not unless), value),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_LOAD, 0, 0, _SYSCALL_AT),
    ]


def _allow_by_argument(number: int, argument: int, values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Refuses call `number` unless the low half of an argument is one of `values`."""
    count = len(values)
    return [
        (_EQUAL, 0, count + 3, number),
        (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument),
        *((_EQUAL, count - place, 0, value) for place, value in enumerate(values)),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_LOAD, 0, 0, _SYSCALL_AT),
    ]


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

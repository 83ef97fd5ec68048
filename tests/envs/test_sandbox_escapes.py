"""A battery of escapes in one program, on each event loop that runs use and inside an actor of Ray.

The process that calls the sandbox holds what a run holds meanwhile: sockets, an epoll set, pipes and log files that
children inherit, and memory, semaphores and messages that any process reaches by number.
"""

import asyncio
import ctypes
import json
import os
import platform
import select
import socket
import sys
import tempfile
from contextlib import ExitStack, contextmanager

import pytest
import uvloop
from helpers import run

from asyncrl.envs.sandbox import Limits, Sandbox

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the sandbox needs Linux on x86-64"
)

BATTERY = """
import ctypes, errno, json, os, socket, struct

libc = ctypes.CDLL(None, use_errno=True)
given = json.loads(input())
parent, (memory, semaphore, queue) = given["pid"], given["ids"]
room = ctypes.create_string_buffer(4096)
up, down = struct.pack("Hhh", 0, 1, 0), struct.pack("Hhh", 0, -1, 0)
calls = {
    "shmget": (29, 7, 4096, 0o1600), "shmat": (30, memory, 0, 0), "shmctl remove": (31, memory, 0, 0),
    "shmctl stat": (31, memory, 2, room), "shmdt": (67, 0),
    "semget": (64, 7, 1, 0o1600), "semop": (65, semaphore, up, 1), "semtimedop": (220, semaphore, down, 1, 0),
    "semctl remove": (66, semaphore, 0, 0), "semctl set": (66, semaphore, 0, 16, 9),
    "msgget": (68, 7, 0o1600), "msgsnd": (69, queue, room, 1, 0o4000), "msgrcv": (70, queue, room, 9, 0, 0o4000),
    "msgctl remove": (71, queue, 0, 0), "mq_open": (240, b"queue", 0o100, 0o600, 0), "mq_unlink": (241, b"queue"),
    "fork": (57,), "vfork": (58,), "clone a process": (56, 17, 0, 0, 0, 0), "clone3": (435, room, 88),
    "kill": (62, parent, 0), "tkill": (200, parent, 0), "tgkill": (234, parent, parent, 0),
    "kill all": (62, -1, 0), "rt_sigqueueinfo": (129, parent, 10, room), "pidfd_open": (434, parent, 0),
    "ptrace": (101, 16, parent, 0, 0), "process_vm_readv": (310, parent, room, 1, room, 1, 0),
    "process_vm_writev": (311, parent, room, 1, room, 1, 0), "process_madvise": (440, 0, room, 1, 4, 0),
    "kcmp": (312, parent, parent, 0, 0, 0), "prlimit": (302, parent, 7, room, 0),
    "get_robust_list": (274, parent, room, room), "migrate_pages": (256, parent, 8, room, room),
    "setpriority": (141, 0, parent, 19), "sched_setscheduler": (144, parent, 0, room),
    "sched_setaffinity": (203, parent, 8, room), "sched_setattr": (314, parent, room, 0),
    "ioprio_set": (251, 1, parent, 0),
    "socket": (41, 1, 1, 0), "datagrams": (53, 1, 2, 0, room), "connect": (42, 0, room, 16), "bind": (49, 0, room, 2),
    "setsockopt": (54, 0, 1, 7, room, 4), "pass a descriptor": (46, 0, room, 0), "io_uring": (425, 8, room),
    "set owner of signals": (72, 0, 8, parent), "choose the signal": (72, 0, 10, 9), "lease": (72, 0, 1024, 0),
    "notify": (72, 0, 1026, 1), "size of a pipe": (72, 0, 1031, 1 << 20),
    "type into the terminal": (16, 0, 0x5412, b"x"),
    "flock": (73, 0, 2), "live on without the run": (157, 1, 0, 0, 0, 0), "adopt processes": (157, 36, 1, 0, 0, 0),
    "be undumpable": (157, 4, 0, 0, 0, 0), "timer_create": (222, 1, 0, room), "timerfd_create": (283, 1, 0),
    "memfd_create": (319, b"x", 0), "memfd_secret": (447, 0), "mlock": (149, room, 4096), "mlockall": (151, 2),
    "inotify_init": (253,), "inotify_add_watch": (254, 0, b"/tmp", 0xFFF), "fanotify_init": (300, 0, 0),
    "chmod": (90, b"main.py", 0o777), "chown": (92, b"main.py", 0, 0), "utimensat": (280, -100, b"main.py", 0, 0),
    "setxattr": (188, b"main.py", b"user.x", b"x", 1, 0), "getxattr": (191, b"main.py", b"user.x", room, 9),
    "truncate": (76, b"main.py", 0), "unlink": (87, b"main.py"), "rename": (82, b"main.py", b"x"),
    "mkdir": (83, b"x", 0o777),
    "symlink": (88, b"/", b"x"), "link": (86, b"main.py", b"x"), "mknod": (133, b"x", 0o10600, 0),
    "mount": (165, b"x", b".", b"tmpfs", 0, 0), "umount": (166, b".", 0), "chroot": (161, b"."),
    "pivot_root": (155, b".", b"."),
    "open_tree": (428, -100, b".", 0), "fsopen": (430, b"tmpfs", 0), "open_by_handle_at": (304, 0, room, 0),
    "name_to_handle_at": (303, -100, b".", room, room, 0), "openat2": (437, -100, b"main.py", room, 24),
    "unshare": (272, 0x10000000), "setns": (308, 0, 0), "bpf": (321, 0, room, 72),
    "perf_event_open": (298, room, 0, -1, -1, 0),
    "userfaultfd": (323, 0), "add_key": (248, b"user", b"x", b"x", 1, -4), "keyctl": (250, 0, -3, 0),
    "seccomp": (317, 1, 0, room), "landlock": (444, 0, 0, 1), "personality": (135, 0x40000), "setsid": (112,),
    "setpgid": (109, 0, 0),
    "setuid": (105, 0), "setgroups": (116, 0, 0), "capset": (126, room, room), "iopl": (172, 3),
    "ioperm": (173, 0, 1, 1),
    "reboot": (169, 0, 0, 0, 0), "kexec_load": (246, 0, 0, 0, 0), "init_module": (175, room, 0, b""),
    "syslog": (103, 3, room, 9),
    "swapon": (167, b"x", 0), "sethostname": (170, b"x", 1), "settimeofday": (164, room, 0),
    "clock_settime": (227, 0, room),
    "adjtimex": (159, room), "quotactl": (179, 0, 0, 0, 0), "acct": (163, 0), "modify_ldt": (154, 0, 0, 0),
    "vmsplice": (278, 1, room, 1, 0), "splice": (275, 0, 0, 1, 0, 1, 0), "tee": (276, 0, 1, 1, 0),
    "membarrier": (324, 1, 0, 0),
    "a call of tomorrow": (999,),
}
refused = (errno.EPERM, errno.ENOSYS)
through = {}
for name, (number, *arguments) in calls.items():
    as_long = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *as_long)
    if not (result == -1 and ctypes.get_errno() in refused):
        through[name] = [result, errno.errorcode.get(ctypes.get_errno())]
files = {}
for path in ["/etc/passwd", "/", "/tmp", "/dev/shm", "/proc/self/maps", f"/proc/{parent}/fd", *given["paths"]]:
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT):
        try:
            files[f"{path} {flags}"] = os.open(path, flags)
        except PermissionError:
            pass
        except IsADirectoryError:
            pass
held = []
for number in range(1 << 16):
    try:
        os.fstat(number)
    except OSError:
        continue
    held.append(number)
environment = sorted(os.environ.keys() - {"LC_CTYPE"})
print(json.dumps({"held": held, "through": through, "files": files, "environment": environment}))
"""

_LIBC = ctypes.CDLL(None, use_errno=True)
_REMOVE, _GETVAL, _MARK = 0, 12, b"the run's own"


@contextmanager
def by_number():
    """Ids of shared memory, a semaphore and a queue with a message, which must be untouched in the end."""
    memory, semaphore, queue = _LIBC.shmget(0, 4096, 0o1666), _LIBC.semget(0, 1, 0o1666), _LIBC.msgget(0, 0o1666)
    _LIBC.shmat.restype = ctypes.c_void_p
    place = _LIBC.shmat(memory, None, 0)
    message = ctypes.create_string_buffer((1).to_bytes(8, "little") + _MARK)
    try:
        assert min(memory, semaphore, queue) >= 0
        ctypes.memmove(place, _MARK, len(_MARK))
        assert _LIBC.msgsnd(queue, message, len(_MARK), 0) == 0
        yield [memory, semaphore, queue]
        assert ctypes.string_at(place, len(_MARK)) == _MARK
        assert _LIBC.semctl(semaphore, 0, _GETVAL) == 0
        assert _LIBC.msgrcv(queue, message, 64, 0, 0o4000) == len(_MARK)
    finally:
        _LIBC.shmdt(ctypes.c_void_p(place))
        _LIBC.shmctl(memory, _REMOVE, None)
        _LIBC.semctl(semaphore, 0, _REMOVE)
        _LIBC.msgctl(queue, _REMOVE, None)


@contextmanager
def inherited():
    """Paths of files. Like them, sockets, pipes and an epoll set are open, and go to every child that does not close
    them, as those of libraries in C do."""
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.NamedTemporaryFile())
        sockets = socket.socketpair()
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        epoll = stack.enter_context(select.epoll())
        pipe = os.pipe()
        for number in pipe:
            stack.callback(os.close, number)
        for end in sockets:
            stack.enter_context(end)
        for number in (log.fileno(), server.fileno(), epoll.fileno(), *pipe, *(end.fileno() for end in sockets)):
            os.set_inheritable(number, True)
        yield [log.name]


async def tried():
    """What of the battery came through, in the process that this is called in."""
    with by_number() as ids, inherited() as paths:
        given = {"pid": os.getpid(), "ids": ids, "paths": paths}
        outcome = await Sandbox(Limits(time_s=30)).run(BATTERY, stdin=json.dumps(given))
        assert outcome.ok, outcome
    return json.loads(outcome.stdout)


NOTHING = {"held": [0, 1, 2], "through": {}, "files": {}, "environment": []}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_nothing_of_the_battery_comes_through(loop):
    if loop == "asyncio":
        assert run(tried()) == NOTHING
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(asyncio.wait_for(tried(), 60)) == NOTHING


def test_nothing_comes_through_from_an_actor_of_ray():
    import ray

    class Caller:
        async def tries(self):
            return type(asyncio.get_running_loop()).__module__, await tried()

    here = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": here}})
    try:
        loop, came_through = ray.get(ray.remote(num_cpus=0)(Caller).remote().tries.remote(), timeout=60)
    finally:
        ray.shutdown()
    assert loop.startswith("uvloop")
    assert came_through == NOTHING

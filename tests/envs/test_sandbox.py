"""Escapes from the sandbox, each tried for real. Every test fails when the limit that it is about is taken away."""

import asyncio
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers import run

from asyncrl.envs.sandbox import Limits, Sandbox, Starved

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the sandbox needs Linux on x86-64"
)


def attempt(code, *, limits=None, **arguments):
    return run(Sandbox(limits or Limits(time_s=20)).run(code, **arguments))


def test_a_program_reads_its_input_and_files_and_prints():
    code = "import part, sqlite3, random\nprint(input() + part.x + open('a/b.txt').read())"
    outcome = attempt(code, stdin="one ", files={"part.py": "x = 'two '", "a/b.txt": b"three"})
    assert (outcome.ok, outcome.stdout, outcome.explain()) == (True, "one two three\n", "")


def test_an_error_is_reported_in_one_line():
    outcome = attempt("print('before')\n1 / 0")
    assert (outcome.ok, outcome.stdout) == (False, "before\n")
    assert outcome.explain() == "ZeroDivisionError: division by zero"


def test_nothing_of_a_run_stays_behind():
    folder = attempt("import os; print(os.getcwd())").stdout.strip()
    assert folder.startswith(tempfile.gettempdir())
    assert not Path(folder).exists()


def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = attempt(f"import socket; socket.create_connection({server.getsockname()!r}); print('in')")
    assert "PermissionError" in outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.parametrize(
    "way", ["os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "subprocess.Popen(['/bin/true'])"]
)
def test_there_is_no_second_process_so_no_fork_bomb(way):
    outcome = attempt(f"import os, subprocess\n{way}\nprint('two')")
    assert "PermissionError" in outcome.stderr
    assert "two" not in outcome.stdout


def test_threads_still_work():
    code = "import threading\nt = threading.Thread(target=print, args=('thread',))\nt.start()\nt.join()"
    assert attempt(code).stdout == "thread\n"


@pytest.mark.parametrize(
    "where", ["'here'", "'/tmp/sandbox-escape'", "'/dev/shm/sandbox-escape'", "os.memfd_create('memory')"]
)
def test_nothing_can_be_written(where):
    outcome = attempt(f"import os\nwith open({where}, 'wb', 0) as f: f.write(b'x' * 4096)\nprint('written')")
    assert "written" not in outcome.stdout
    assert not Path("/tmp/sandbox-escape").exists()


def test_memory_is_limited():
    code = "x = bytearray(300 << 20)\nprint(len(x))"
    assert attempt(code, limits=Limits(memory_mb=600)).ok
    assert attempt(code, limits=Limits(memory_mb=200)).explain() == "MemoryError"


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(1000)"])
def test_a_program_that_does_not_end_is_ended(code):
    outcome = attempt(code, limits=Limits(time_s=1))
    assert (outcome.timed_out, outcome.ok, outcome.explain()) == (True, False, "timed out")


def test_processor_time_is_limited_by_the_kernel_too():
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU))"
    assert attempt(code, limits=Limits(time_s=6.5)).stdout == "(7, 8)\n"


def test_a_program_whose_processor_time_ends_first_has_timed_out_too():
    limit = "resource.setrlimit(resource.RLIMIT_CPU, (1, 8))"  # what busy threads on many processors come to
    outcome = attempt(f"import resource\n{limit}\nwhile True: pass", limits=Limits(time_s=7))
    assert (outcome.timed_out, outcome.returncode, outcome.explain()) == (True, None, "timed out")


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    assert eval(attempt("import os; print(dict(os.environ))").stdout).keys() <= {"LC_CTYPE"}  # the interpreter's own


@pytest.mark.parametrize(
    "path",
    [f"/proc/{os.getpid()}/environ", __file__, "/etc/passwd", "/proc/self/maps"],
    ids=["environment of the parent", "this file", "users", "own memory"],
)
def test_other_files_cannot_be_read(path):
    outcome = attempt(f"print(open({path!r}).read())")
    assert "PermissionError" in outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.parametrize(
    "harm",
    [
        "os.kill({pid}, 0)",
        "os.killpg(os.getpgid({pid}), 0)",
        "signal.pidfd_send_signal(os.pidfd_open({pid}), 0)",
        "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
        "os.sched_setaffinity({pid}, [0])",
        "resource.prlimit({pid}, resource.RLIMIT_CORE)",
        "fcntl.fcntl(0, fcntl.F_SETOWN, {pid})",
        "os.setsid()",
    ],
)
def test_the_parent_is_out_of_reach(harm):
    before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    outcome = attempt(f"import fcntl, os, resource, signal\n{harm.format(pid=os.getpid())}\nprint('done')")
    assert "PermissionError" in outcome.stderr
    assert outcome.stdout == ""
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == before


@pytest.mark.parametrize(
    "change",
    [
        "os.chmod(path, 0o777)",
        "os.chown(path, -1, os.getgid())",
        "os.utime(path, (0, 0))",
        "os.setxattr(path, 'user.note', b'seen')",
        "os.truncate(path, 0)",
        "os.symlink(path, 'link')",
        "os.link(path, 'link')",
        "os.rename('main.py', 'other.py')",
        "os.unlink('main.py')",
    ],
)
def test_files_of_the_same_user_stay_as_they_are(tmp_path, change):
    path = tmp_path / "theirs"
    path.write_text("theirs")
    before = path.stat()
    outcome = attempt(f"import os\npath = {str(path)!r}\n{change}\nprint('done')")
    assert "PermissionError" in outcome.stderr
    assert outcome.stdout == ""
    after = path.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )


def test_what_happens_to_other_files_cannot_be_watched():
    code = "import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.inotify_add_watch(libc.inotify_init(), b'/tmp', 0xfff))"
    assert attempt(code).stdout == "-1\n"


def test_no_datagram_reaches_a_socket_outside(tmp_path):
    """One end of a pair of datagram sockets may send to any socket with a name; no `socket` call is needed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "socket"))
        pair = "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"
        outcome = attempt(f"import socket\n{pair}\na.sendto(b'in', {str(tmp_path / 'socket')!r})\nprint('sent')")
        assert "PermissionError" in outcome.stderr
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(2)


@pytest.mark.parametrize("command", [0x8901, 0x8902])  # FIOSETOWN, SIOCSPGRP
def test_no_signal_goes_out_by_way_of_a_socket(command):
    """A socket's owner gets a signal of choice, SIGKILL too, when something arrives on it."""
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    code = f"""import fcntl, os, socket, struct
a, b = socket.socketpair()
fcntl.ioctl(a, {command}, struct.pack("i", {victim.pid}))
fcntl.fcntl(a, 10, 9)  # F_SETSIG, SIGKILL
fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)
b.send(b"now")
print("sent")"""
    outcome = attempt(code)
    victim.communicate(b"\n")
    assert "PermissionError" in outcome.stderr
    assert outcome.stdout == ""
    assert victim.returncode == 0


def test_an_event_loop_and_pairs_of_streams_still_work():
    code = "import asyncio, os, sys\nos.set_inheritable(0, True)\nos.set_blocking(0, False)\nprint(os.isatty(0))"
    assert attempt(f"{code}\nasyncio.run(asyncio.sleep(0))").explain() == ""


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_CPU"])
def test_limits_cannot_be_raised_again(limit):
    outcome = attempt(f"import resource\nresource.setrlimit(resource.{limit}, (-1, -1))\nprint('raised')")
    assert outcome.explain() == "ValueError: not allowed to raise maximum limit"


def test_root_is_root_no_longer():
    assert attempt("import os; os.chroot('.')").explain().startswith("PermissionError")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_of_output_ends_the_program(stream):
    outcome = attempt(f"import sys\nwhile True: sys.{stream}.write('x' * 65536)", limits=Limits(60, output_bytes=1000))
    assert (outcome.flooded, outcome.ok, outcome.explain()) == (True, False, "printed too much")
    assert len(getattr(outcome, stream)) == 1000


def test_a_cancelled_run_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where no other test's sandboxes are

    async def body():
        before = set(Path(tempfile.gettempdir()).glob("sandbox-*"))
        own_children = Path(f"/proc/self/task/{os.getpid()}/children")
        others = set(own_children.read_text().split())  # such as torch's compile workers
        sandbox = Sandbox(Limits(time_s=50))
        await sandbox.run("pass")
        task = asyncio.create_task(sandbox.run("import time; time.sleep(1000)"))
        await asyncio.sleep(0.5)
        children = set(own_children.read_text().split()) - others
        assert children
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        assert set(Path(tempfile.gettempdir()).glob("sandbox-*")) <= before

    run(body())


def test_a_program_has_so_many_threads_at_once_and_no_more():
    code = """import threading
threading.stack_size(32768)
for _ in range(2):
    stop, threads = threading.Event(), []
    try:
        while len(threads) < 1000:
            threads.append(threading.Thread(target=stop.wait))
            threads[-1].start()
    except RuntimeError as error:
        print(len(threads), error)
        threads.pop()
    stop.set()
    for thread in threads:
        thread.join()"""
    assert attempt(code).stdout == "64 can't start new thread\n" * 2


def test_no_program_outlives_a_run_that_is_killed(tmp_path):
    code = """import asyncio, os, threading, time
from asyncrl.envs.sandbox import Limits, Sandbox
def children(pid):
    return open(f"/proc/{pid}/task/{pid}/children").read().split()
def tell():
    while not any(watcher := children(os.getpid())) or not any(program := children(watcher[0])):
        time.sleep(0.01)
    print(*watcher, *program, flush=True)
threading.Thread(target=tell).start()
asyncio.run(Sandbox(Limits(time_s=100)).run("import time; time.sleep(90)"))"""
    code = code.replace("asyncio.run", "Sandbox._prove = lambda self: asyncio.sleep(0)\nasyncio.run")
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=_environment(tmp_path))
    with caller:
        pids = caller.stdout.readline().split()
        assert len(pids) == 2
        caller.kill()
    end = time.monotonic() + 20
    while any(_lives(int(pid)) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.02)


def _environment(folder):
    return {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # where nobody reaps orphans
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_whom_others_leave_no_processor_is_no_wrong_program(monkeypatch):
    sandbox = Sandbox(Limits(time_s=20))
    run(sandbox.run("pass"))
    monkeypatch.setattr("asyncrl.envs.sandbox._PATIENCE", 0.02)
    with pytest.raises(Starved, match=r"could not use its 20 s within 0\.4 s, as others had the processors"):
        run(sandbox.run("while True: pass"))


def test_places_are_the_machines_and_those_of_a_killed_process_are_free_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = """import asyncio, os, time
from contextlib import AsyncExitStack
from asyncrl.envs.sandbox.places import place
async def main():
    async with AsyncExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            await stack.enter_async_context(place())
        if not os.fork():
            os.read(0, 1)  # a child that outlives the holder
            os._exit(0)
        print("all", flush=True)
        time.sleep(1000)
asyncio.run(main())"""
    pipe = subprocess.PIPE
    other = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, env=_environment(tmp_path))

    async def body():
        waits = asyncio.create_task(Sandbox(Limits(time_s=20)).run("print(1)"))
        await asyncio.sleep(0.5)
        assert not waits.done()
        other.kill()
        assert (await waits).ok

    with other:
        assert other.stdout.readline() == b"all\n"
        run(body())


def test_as_many_run_at_once_as_told():
    code = "import time\nprint(time.monotonic())\ntime.sleep(0.1)\nprint(time.monotonic())"

    async def body():
        sandbox = Sandbox(Limits(time_s=20), max_running=1)
        outcomes = await asyncio.gather(*(sandbox.run(code) for _ in range(3)))
        times = [float(line) for outcome in outcomes for line in outcome.stdout.split()]
        assert len(times) == 6
        assert times == sorted(times)

    run(body())


def test_mistakes_of_the_caller_are_errors():
    with pytest.raises(ValueError, match=r"inside its folder, got '\.\./x'"):
        attempt("pass", files={"../x": ""})
    with pytest.raises(ValueError, match="time_s must be above 0, got 0"):
        Limits(time_s=0)


def test_without_confinement_nothing_runs(monkeypatch):
    monkeypatch.setattr("asyncrl.envs.sandbox._library", lambda: ())
    with pytest.raises(RuntimeError, match="no program can be run in a sandbox here"):
        attempt("print(1)")

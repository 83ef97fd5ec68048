"""The facts that preconditions are about: what this machine has, and what can be reached from it.

Nothing heavy is imported here, so that a package that is missing is a finding and not a traceback.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import netrc
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from asyncrl.config import out_of_memory as memory
from asyncrl.driver.preflight import Gpu

if TYPE_CHECKING:
    from asyncrl.config.schema import Config

_MIB = 2**20 / 1e9
_JOIN = """
import json, logging, sys
import ray
ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
print("TOTALS", json.dumps(ray.cluster_resources()))
ray.shutdown()
"""


def installed(name: str) -> str | None:
    """The version of an installed package."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def find_gpus() -> list[Gpu]:
    """The GPUs that torch sees. nvidia-smi describes them where it can: torch would open a context on each of them,
    which takes memory there for as long as this process lives."""
    import torch

    count = torch.cuda.device_count()
    rows = _visible(_nvidia_smi("uuid,name,compute_cap,memory.free,memory.total")) if count else []
    if len(rows) == count:
        return [
            Gpu(name, _capability(kind), float(free) * _MIB, float(total) * _MIB) for _, name, kind, free, total in rows
        ]
    gpus = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        gpus.append(Gpu(name, capability, free / 1e9, total / 1e9))
    return gpus


def _visible(rows: list[list[str]]) -> list[list[str]]:
    """Those of nvidia-smi's rows, by index and UUID, that CUDA_VISIBLE_DEVICES leaves."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return rows
    wanted = [name.strip() for name in named.split(",")]
    return [
        row for index, row in enumerate(rows) if any(row[0].startswith(name) or name == str(index) for name in wanted)
    ]


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def cuda_build() -> str | None:
    """The CUDA version that torch was built for."""
    import torch

    return torch.version.cuda


def find_driver() -> str | None:
    """The version of NVIDIA's driver, as nvidia-smi tells it."""
    rows = _nvidia_smi("driver_version")
    return rows[0][0] if rows else None


def _nvidia_smi(query: str) -> list[list[str]]:
    """A row for each GPU of the machine; none where there is no such program, or it fails."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[value.strip() for value in row] for row in csv.reader(told.splitlines())]


def open_files_limit() -> int:
    """Files and sockets that this process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def available_gb() -> float | None:
    """Memory that can still be taken; None where the system does not tell."""
    free = memory.available_bytes()
    return None if free is None else free / 1e9


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def write(folder: Path) -> str:
    """Writes a file to the nearest existing folder and locks it, as a run does its journal; nothing is left behind."""
    from asyncrl.recovery.journal import lock

    with tempfile.TemporaryFile(dir=nearest(folder)) as file:
        file.write(b"x")
        lock(file.fileno(), folder)
    return f"{folder} can be written, and files in it locked"


def has_wandb_key() -> bool:
    """Whether a key is where the package looks for one: in the environment, or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
    return False


def show_token(address: str | None) -> None:
    """Has Ray show the cluster that it joins the token of `~/.ray/auth_token`, unless RAY_AUTH_MODE is set. To be
    called before Ray is imported, which reads that variable then.

    With an address Ray shows none of its own accord, and a head that was started where there is a token refuses it; a
    cluster that asks for no token takes no notice of one.
    """
    os.environ.update(_token_mode(address))


def _token_mode(address: str | None) -> dict[str, str]:
    """The variable that has Ray show its token, unless it is set."""
    shown = address is not None and (Path.home() / ".ray" / "auth_token").exists()
    return {"RAY_AUTH_MODE": "token"} if shown and "RAY_AUTH_MODE" not in os.environ else {}


def reach(address: str) -> str:
    """Connects to the Ray cluster's head; "auto" is the one that was started on this machine."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _started_here()
    head = urlsplit(address if "://" in address else f"ray://{address}")
    if head.hostname is None or head.port is None:
        raise ValueError(f"cluster.address {address!r} has no host and port: write HOST:6379")
    socket.create_connection((head.hostname, head.port), timeout=5).close()
    return f"{address} answers"


def join(address: str, timeout_s: float = 60.0) -> dict[str, float]:
    """Joins the Ray cluster and leaves it again, in a process of its own, as Ray waits for minutes for a cluster that
    does not let it in. Returns the totals of its resources. Raises `ValueError` if it cannot be joined."""
    command = [sys.executable, "-c", _JOIN, address]
    environment = os.environ | _token_mode(address)  # here it would hold for a Ray of this process's own as well
    pipe, lines = subprocess.PIPE, list[str]()
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        clock = threading.Timer(timeout_s, process.kill)
        clock.start()
        for line in process.stdout or ():
            lines.append(line.strip())
            if line.startswith("TOTALS"):
                totals: dict[str, float] = json.loads(line.removeprefix("TOTALS"))
            if "InvalidAuthToken" in line:
                process.kill()
        clock.cancel()
    if process.returncode == 0:
        return totals
    if any("InvalidAuthToken" in line for line in lines):
        raise ValueError(
            f"the Ray cluster at {address} asks for a token, and the one here is missing or another: copy "
            "~/.ray/auth_token from its head node, or name it in RAY_AUTH_TOKEN_PATH with RAY_AUTH_MODE=token"
        )
    last = next((line for line in reversed(lines) if line), "no answer")
    raise ValueError(
        f"the Ray cluster at {address} cannot be joined ({last}): look at `ray status` there, and take the same "
        "versions of Ray and Python"
    )


def own_resources(config: Config) -> dict[str, float]:
    """The custom resources of a Ray that the run starts: those that the environment gives it, and as much as is wanted
    of those that Ray itself names, such as node:ADDRESS, as they are not known before."""
    named = {*config.cluster.learner_resources, *config.cluster.rollout_resources}
    given: dict[str, float] = json.loads(os.environ.get("RAY_OVERRIDE_RESOURCES") or "{}")
    return {name: math.inf for name in named if ":" in name} | given


def _started_here() -> str:
    """The address that `ray start` left on this machine, in the folder that Ray takes."""
    usual = os.environ.get("TMPDIR", "/tmp") if sys.platform == "linux" else "/tmp"
    file = Path(os.environ.get("RAY_TMPDIR", usual)) / "ray" / "ray_current_cluster"
    if not file.exists():
        raise ValueError(
            "cluster.address is 'auto' and no Ray was started on this machine: run `ray start --head`, or give the "
            "address of a cluster"
        )
    return file.read_text().strip()


def bind_loopback(wanted: int) -> int:
    """Binds up to `wanted` free ports at once and lets go of them. Returns how many it got."""
    with contextlib.ExitStack() as stack:
        bound: list[socket.socket] = []
        with contextlib.suppress(OSError):
            while len(bound) < wanted:
                bound.append(stack.enter_context(socket.create_server(("127.0.0.1", 0))))
        return len(bound)


def listen(host: str, port: int) -> str:
    """Opens the port and lets go of it."""
    socket.create_server((host, port)).close()
    return f"{port} of {host} is free"
